//! A writer of the cpio format that the kernel unpacks: "newc".
//!
//! Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
//! Not a general archiver: no hard links, no sizes over 4 GiB, owner root.

use std::collections::HashSet;
use std::io::{self, Write};

/// Type bits of a mode.
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// Writes one archive; directories above an entry are added by themselves.
pub struct Cpio<W: Write> {
    out: W,
    inode: u32,
    written: u64,
    directories: HashSet<String>,
}

struct Entry<'a> {
    name: &'a str,
    mode: u32,
    device: (u32, u32),
    data: &'a [u8],
}

impl<W: Write> Cpio<W> {
    /// An archive that goes to `out`.
    pub fn new(out: W) -> Cpio<W> {
        Cpio { out, inode: 0, written: 0, directories: HashSet::new() }
    }

    /// A directory, unless it is there already.
    ///
    /// # Errors
    /// As the writer's, here and below.
    pub fn directory(&mut self, path: &str, mode: u32) -> io::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || !self.directories.insert(path.to_string()) {
            return Ok(());
        }
        self.parents(path)?;
        self.entry(&Entry { name: path, mode: DIRECTORY | mode, device: (0, 0), data: &[] })
    }

    /// A regular file.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.parents(path)?;
        self.entry(&Entry { name: path, mode: REGULAR | mode, device: (0, 0), data })
    }

    /// A symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.parents(path)?;
        let data = target.as_bytes();
        self.entry(&Entry { name: path, mode: SYMLINK | 0o777, device: (0, 0), data })
    }

    /// A character device.
    pub fn character(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.parents(path)?;
        self.entry(&Entry { name: path, mode: CHARACTER | mode, device: (major, minor), data: &[] })
    }

    /// Ends the archive and gives the writer back.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry(&Entry { name: "TRAILER!!!", mode: 0, device: (0, 0), data: &[] })?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.directory(parent, 0o755),
            None => Ok(()),
        }
    }

    fn entry(&mut self, e: &Entry<'_>) -> io::Result<()> {
        let size = u32::try_from(e.data.len())
            .map_err(|_| io::Error::other(format!("{}: over 4 GiB", e.name)))?;
        self.inode += 1;
        let links = if e.mode & DIRECTORY != 0 { 2 } else { 1 };
        let name_size = e.name.len() as u32 + 1;
        let fields =
            [self.inode, e.mode, 0, 0, links, 0, size, 0, 0, e.device.0, e.device.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(e.name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(e.data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let over = (self.written % 4) as usize;
        if over > 0 {
            self.put(&[0; 3][..4 - over])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_parents_come_first() {
        let mut cpio = Cpio::new(Vec::new());
        cpio.file("a/b/c", 0o755, b"xyz").unwrap();
        cpio.symlink("a/l", "b/c").unwrap();
        let bytes = cpio.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |needle: &str| text.find(needle).unwrap();
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/b/c\0"));
        assert!(text.contains("TRAILER!!!"));
        assert!(text.starts_with("070701"));
    }
}
