//! The head of a Linux kernel's image: all that a clone's QEMU needs, and the version.
//!
//! A clone's kernel has long been in its memory; QEMU wants `-kernel` only so
//! that the machine is the template's, and would hold the whole file in memory
//! of its own. A clone never boots: QEMU ends when its guest resets.
//!
//! Source: Linux's Documentation/arch/x86/boot.rst.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::sys::sealed;
use crate::walls::Wall;

/// Where the number of setup sectors stands, and what 0 means there.
const SETUP_SECTORS: (usize, usize) = (0x1f1, 4);
/// Where the header's signature stands, and what it is.
const SIGNATURE: (usize, [u8; 4]) = (0x202, *b"HdrS");
const SECTOR: usize = 512;
/// Of the kernel proper: QEMU looks at a header of 8 KiB.
const KERNEL: usize = 8192;
/// Longest head: all sectors that a byte can count.
const LONGEST: usize = (0xff + 1) * SECTOR + KERNEL;

/// A sealed file in memory with the head of a kernel, which all clones share; `None` when it is
/// no bzImage.
///
/// # Errors
/// As open(2), read(2) and memfd_create(2).
pub fn head(kernel: &Path) -> io::Result<Option<File>> {
    let mut bytes = Vec::new();
    File::open(kernel)?.take(LONGEST as u64).read_to_end(&mut bytes)?;
    let Some(length) = length(&bytes) else { return Ok(None) };
    let copied = match Wall::Seals.stands() {
        true => sealed::copy(c"vmcache-kernel-head", &mut &bytes[..length])?,
        false => sealed::unsealed(c"vmcache-kernel-head", &mut &bytes[..length])?,
    };
    Ok(Some(copied))
}

/// Where the place of the version's text stands, counted from [`TEXT_BASE`].
const VERSION: usize = 0x20e;
const TEXT_BASE: usize = 0x200;

/// The kernel's version, such as `6.1.0-48-cloud-amd64`; `None` when it does not tell.
///
/// # Errors
/// As open(2) and read(2).
pub fn version(kernel: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    File::open(kernel)?.take(LONGEST as u64).read_to_end(&mut bytes)?;
    Ok(told(&bytes))
}

fn told(bytes: &[u8]) -> Option<String> {
    let (at, signature) = SIGNATURE;
    if bytes.get(at..at + signature.len())? != signature {
        return None;
    }
    let place = bytes.get(VERSION..VERSION + 2)?;
    let place = usize::from(u16::from_le_bytes([place[0], place[1]]));
    let text = bytes.get(place + TEXT_BASE..).filter(|_| place != 0)?;
    // "version (who@where) …"
    let end = text.iter().take(256).position(|b| !b.is_ascii_graphic())?;
    String::from_utf8(text[..end].to_vec()).ok().filter(|v| !v.is_empty())
}

fn length(bytes: &[u8]) -> Option<usize> {
    let (at, signature) = SIGNATURE;
    if bytes.get(at..at + signature.len())? != signature {
        return None;
    }
    let (at, default) = SETUP_SECTORS;
    let sectors = match bytes.get(at)? {
        0 => default,
        n => usize::from(*n),
    };
    let length = (sectors + 1) * SECTOR + KERNEL;
    (length <= bytes.len()).then_some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_where_the_header_says() {
        let mut image = vec![0; LONGEST];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(told(&image), None);
        image[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        image[0x300..0x30d].copy_from_slice(b"6.1.0-x (me) ");
        assert_eq!(told(&image).as_deref(), Some("6.1.0-x"));
        image[0x20e..0x210].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(told(&image[..0x400]), None);
    }

    #[test]
    fn a_head_is_setup_and_a_little_more() {
        let mut image = vec![0; LONGEST];
        assert_eq!(length(&image), None);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(length(&image), Some(5 * SECTOR + KERNEL));
        image[0x1f1] = 0xff;
        assert_eq!(length(&image), Some(LONGEST));
        image.pop();
        assert_eq!(length(&image), None);
        assert_eq!(length(&image[..0x203]), None);
    }
}
