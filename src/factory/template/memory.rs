//! A template's memory: its digest, and a copy that nobody can change.
//!
//! Invariants: the digest is of what is not zero, for reading makes holes into zeros;
//! a sealed copy is made of, and has, what was digested, so that what lies in the
//! directory may change meanwhile.
//!
//! Why a copy: QEMU opens a clone's memory to write, though it never does. A file that it can
//! open so, a QEMU that a guest has taken over can write, whoever it runs as, and so every
//! clone's memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{lseek, Whence};
use sha2::{Digest, Sha256};

use crate::digest::hexadecimal;
use crate::sys::sealed;

const PAGE: usize = 4096;
/// Bytes read at once.
const CHUNK: usize = 64 * PAGE;

/// Calls `each` with every page that is not zero and where it stands.
fn pages(file: &File, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    loop {
        at = match lseek(file, at, Whence::SeekData) {
            Ok(data) => data - data % PAGE as i64,
            Err(Errno::ENXIO) => return Ok(()),
            Err(e) => return Err(e.into()),
        };
        let end = lseek(file, at, Whence::SeekHole)?;
        while at < end {
            let wanted = CHUNK.min((end - at) as usize);
            file.read_exact_at(&mut chunk[..wanted], at as u64)?;
            for (n, page) in chunk[..wanted].chunks(PAGE).enumerate() {
                if page.iter().any(|b| *b != 0) {
                    each(at as u64 + (n * PAGE) as u64, page)?;
                }
            }
            at += wanted as i64;
        }
    }
}

fn hash(hash: &mut Sha256, at: u64, page: &[u8]) {
    hash.update(at.to_le_bytes());
    hash.update(page);
}

/// Its digest.
///
/// # Errors
/// As read(2).
pub fn digest(file: &File) -> io::Result<String> {
    let mut all = Sha256::new();
    pages(file, |at, page| {
        hash(&mut all, at, page);
        Ok(())
    })?;
    Ok(hexadecimal(all))
}

/// A copy that can only be read, and its digest.
///
/// # Errors
/// As read(2), memfd_create(2) and fcntl(2).
pub fn sealed(file: &File) -> io::Result<(File, String)> {
    let copy = sealed::open(c"vmcache-template")?;
    copy.set_len(file.metadata()?.len())?;
    let mut all = Sha256::new();
    pages(file, |at, page| {
        hash(&mut all, at, page);
        copy.write_all_at(page, at)
    })?;
    sealed::close(&copy)?;
    Ok((copy, hexadecimal(all)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_copy_is_alike_and_can_not_be_changed() {
        let path = format!("/dev/shm/vmcache-memory-{}", std::process::id());
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(b"a guest's", 300_000).unwrap();
        let (copy, of_both) = sealed(&file).unwrap();
        assert_eq!(
            (digest(&file).unwrap(), digest(&copy).unwrap()),
            (of_both.clone(), of_both.clone())
        );
        // A hole that was read is zeros, and no other memory.
        file.write_all_at(&[0; PAGE], 0).unwrap();
        assert_eq!(digest(&file).unwrap(), of_both);
        file.write_all_at(b"A", 300_000).unwrap();
        assert_ne!(digest(&file).unwrap(), of_both);
        assert!(copy.write_all_at(b"A", 300_000).is_err());
        assert!(copy.set_len(1).is_err());
        let mut back = [0; 9];
        copy.read_exact_at(&mut back, 300_000).unwrap();
        assert_eq!(&back, b"a guest's");
    }
}
