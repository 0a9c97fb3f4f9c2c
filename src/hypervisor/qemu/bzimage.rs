//! The head of a Linux kernel's image, which is all that a clone's QEMU needs.
//!
//! A clone's kernel has long been in its memory; QEMU wants `-kernel` only so
//! that the machine is the template's, and would hold the whole file in memory
//! of its own. A clone never boots: QEMU ends when its guest resets.
//!
//! Source: Linux's Documentation/arch/x86/boot.rst.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use nix::sys::memfd::{memfd_create, MFdFlags};

/// Where the number of setup sectors stands, and what 0 means there.
const SETUP_SECTORS: (usize, usize) = (0x1f1, 4);
/// Where the header's signature stands, and what it is.
const SIGNATURE: (usize, [u8; 4]) = (0x202, *b"HdrS");
const SECTOR: usize = 512;
/// Of the kernel proper: QEMU looks at a header of 8 KiB.
const KERNEL: usize = 8192;
/// Longest head: all sectors that a byte can count.
const LONGEST: usize = (0xff + 1) * SECTOR + KERNEL;

/// A file in memory with the head of a kernel; `None` when it is no bzImage.
///
/// # Errors
/// As open(2), read(2) and memfd_create(2).
pub fn head(kernel: &Path) -> io::Result<Option<File>> {
    let mut bytes = Vec::new();
    File::open(kernel)?.take(LONGEST as u64).read_to_end(&mut bytes)?;
    let Some(length) = length(&bytes) else { return Ok(None) };
    let mut file = File::from(memfd_create(c"vmcache-kernel-head", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&bytes[..length])?;
    Ok(Some(file))
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
