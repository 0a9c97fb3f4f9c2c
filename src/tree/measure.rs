//! How much room a tree, or a tar, takes where it is unpacked.
//!
//! Invariant: nothing is read of a tree's files; of a tar, its headers are understood, so
//! that a broken one is known before anything is sent.

use std::collections::HashSet;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::sys::stat::SFlag;

use super::reader::{Kind, Reader};
use super::{io_at, walk, Error, MAX_DEPTH};

/// Bytes that a file system in memory gives at once.
const PAGE: u64 = 4096;

/// What something takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Bytes, in whole pages.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

impl Needs {
    fn add(&mut self, bytes: u64) {
        let pages = bytes.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        self.bytes = self.bytes.saturating_add(pages);
        self.inodes += 1;
    }
}

/// What a file or directory takes, with all that is in it.
///
/// # Errors
/// As [`pack`](super::pack()).
pub fn of_tree(source: &Path) -> Result<Needs, Error> {
    let mut walk = Walk { needs: Needs::default(), seen: HashSet::new() };
    if source.is_dir() {
        let dir = walk::open_named(source).map_err(io_at("open", source))?;
        walk.contents(dir.as_fd(), source, 0)?;
        return Ok(walk.needs);
    }
    let meta = std::fs::symlink_metadata(source).map_err(io_at("look at", source))?;
    walk.needs.add(if meta.is_file() { meta.len() } else { 0 });
    Ok(walk.needs)
}

struct Walk {
    needs: Needs,
    seen: HashSet<(u64, u64)>,
}

impl Walk {
    fn contents(&mut self, dir: BorrowedFd<'_>, path: &Path, depth: usize) -> Result<(), Error> {
        let failed = io_at("look at", path);
        if depth > MAX_DEPTH {
            return Err(Error::Deep { path: path.to_path_buf() });
        }
        for name in walk::names(dir).map_err(&failed)? {
            let at = path.join(&name);
            let failed = io_at("look at", &at);
            let stat = walk::look(dir, &name).map_err(&failed)?;
            if stat.st_nlink > 1
                && walk::kind(&stat) != SFlag::S_IFDIR
                && !self.seen.insert(walk::identity(&stat))
            {
                continue;
            }
            let of = |n: i64| u64::try_from(n).unwrap_or(0);
            match walk::kind(&stat) {
                SFlag::S_IFREG => {
                    let allocated = of(stat.st_blocks).saturating_mul(512);
                    // A file may be larger than what it takes here, by its holes, and smaller,
                    // where it is compressed.
                    let holes = allocated < of(stat.st_size);
                    self.needs.add(if holes { allocated } else { of(stat.st_size) });
                }
                SFlag::S_IFDIR => {
                    self.needs.add(0);
                    let opened = walk::open_directory(dir, &name, &stat).map_err(&failed)?;
                    self.contents(opened.as_fd(), &at, depth + 1)?;
                }
                SFlag::S_IFSOCK => {}
                _ => self.needs.add(0),
            }
        }
        Ok(())
    }
}

/// What a tar takes, and whether it is one that `docker save` wrote, whose files are layers.
///
/// # Errors
/// As [`unpack`](super::unpack()).
pub fn of_tar(stream: &mut dyn Read) -> Result<(Needs, bool), Error> {
    let mut needs = Needs::default();
    let (mut manifest, mut system) = (false, false);
    let mut reader = Reader::trusting(stream);
    while let Some(entry) = reader.next()? {
        let name = entry.name.strip_prefix(b"./").unwrap_or(&entry.name);
        manifest |= matches!(name, b"manifest.json" | b"oci-layout");
        system |= ["bin", "usr", "etc", "sbin"].iter().any(|dir| {
            name.strip_prefix(dir.as_bytes()).is_some_and(|r| r.is_empty() || r[0] == b'/')
        });
        match entry.kind {
            Kind::File => needs.add(entry.pieces.iter().map(|p| p.length).sum()),
            Kind::Link => {}
            _ => needs.add(0),
        }
    }
    Ok((needs, manifest && !system))
}
