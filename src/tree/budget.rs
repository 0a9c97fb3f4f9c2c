//! How much a guest may make this host keep.
//!
//! Invariants: what is to be written is counted before it is written, holes of files
//! included; the target's file system keeps a twentieth of its room and of its inodes.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::fstatvfs;

use super::{io_at, Error, Why};

/// Of a file system's room and inodes, one of so many parts stays free.
const RESERVE: u64 = 20;

/// What may still be written.
#[derive(Debug)]
pub struct Budget {
    bytes: (u64, u64),
    entries: (u64, u64),
}

impl Budget {
    /// So many bytes and entries.
    pub fn new(bytes: u64, entries: u64) -> Budget {
        Budget { bytes: (bytes, bytes), entries: (entries, entries) }
    }

    /// Bytes and entries so far.
    pub fn spent(&self) -> (u64, u64) {
        (self.bytes.1 - self.bytes.0, self.entries.1 - self.entries.0)
    }

    /// Takes one entry with a file of so many bytes from it.
    ///
    /// # Errors
    /// [`Why::TooMany`], [`Why::TooLarge`].
    pub fn take(&mut self, name: &Path, bytes: u64) -> Result<(), Error> {
        let refuse = |why| Error::Refused { name: name.to_path_buf(), why };
        self.entries.0 = self
            .entries
            .0
            .checked_sub(1)
            .ok_or_else(|| refuse(Why::TooMany { allowed: self.entries.1 }))?;
        self.bytes.0 = self
            .bytes
            .0
            .checked_sub(bytes)
            .ok_or_else(|| refuse(Why::TooLarge { allowed: self.bytes.1 }))?;
        Ok(())
    }
}

/// Whether so many bytes, and an inode, still fit the file system of what is open there.
///
/// # Errors
/// [`Why::Full`].
pub fn room(at: impl AsFd, name: &Path, bytes: u64) -> Result<(), Error> {
    let all = fstatvfs(at).map_err(|e| io_at("look at the file system of", name)(e.into()))?;
    let refuse = |free: u64, total: u64, what| Error::Refused {
        name: PathBuf::from(name),
        why: Why::Full { free, total, what },
    };
    let block = all.fragment_size().max(1);
    let (free, total) = (all.blocks_available(), all.blocks());
    // Some have no bound, and tell none. One block is for what the file system needs.
    let needed = bytes.div_ceil(block).saturating_add(1).saturating_add(total.div_ceil(RESERVE));
    if total > 0 && free < needed {
        return Err(refuse(free.saturating_mul(block), total.saturating_mul(block), "bytes"));
    }
    let (free, total) = (all.files_available(), all.files());
    if total > 0 && free <= total.div_ceil(RESERVE) {
        return Err(refuse(free, total, "inodes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_allowed_is_refused_before_it_is_written() {
        let mut budget = Budget::new(100, 3);
        let name = Path::new("f");
        budget.take(name, 60).unwrap();
        let e = budget.take(name, 41).unwrap_err().to_string();
        assert!(e.starts_with("f: with it, the files would have over 100 bytes"), "{e}");
        budget.take(name, 40).unwrap();
        let e = budget.take(name, 0).unwrap_err().to_string();
        assert!(e.contains("one of over 3 files"), "{e}");
    }
}
