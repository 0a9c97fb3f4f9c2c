//! A tar stream from a guest becomes a tree on this host, which does not trust it.
//!
//! As `docker cp` without -a: files, directories, symbolic links, and hard links to what
//! came before them; the caller's own, with permissions but no set-id and sticky bits, with
//! the time of their last change, no extended attributes; nothing but the one name that was
//! asked for. Of a guest that is trusted ([`Policy::archive`]) also owners, all modes,
//! extended attributes, devices and FIFOs.
//!
//! Invariants: nothing is written outside the target (`Target`), nor more than is allowed
//! (`Budget`); a file is whole, or it is not there; in memory are at most [`MAX_NAMES`]
//! bytes of an entry, 20 bytes or so for each inode made, and `MAX_KEPT` bytes of
//! directories.
//!
//! Does not: restore what was there before an error; what came until then stays.
//!
//! [`MAX_NAMES`]: super::MAX_NAMES

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::stat::{fchmod, fstat, makedev, mknodat, Mode, SFlag};

use nix::sys::time::TimeSpec;

use super::budget::{room, Budget};
use super::inode::{Lost, Meta};
use super::naming::Allowed;
use super::reader::{path as shown, Entry, Kind, Reader};
use super::target::{Name, Target};
use super::walk::identity;
use super::{io_at, Error, Stop, Why};

/// Most bytes of names and attributes of directories that are kept until the end.
const MAX_KEPT: usize = 64 << 20;
/// Bytes that are written at once, and before which the file system is looked at.
const CHUNK: usize = 128 * 1024;
/// Permissions, without set-id and sticky bits.
const PERMISSIONS: u32 = 0o777;
/// What a directory needs while files are made in it.
const USABLE: u32 = 0o700;

/// Bytes that a copy may have unless more are allowed.
pub const MAX_BYTES: u64 = 16 << 30;
/// Files, directories and links that a copy may have unless more are allowed.
pub const MAX_ENTRIES: u64 = 1_000_000;

/// What may come out of a guest.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The one name that the stream may have, at its top; empty: any, since it is what is
    /// in a directory.
    pub name: Vec<u8>,
    /// What that is called on this host, if it is called something else.
    pub called: Option<Vec<u8>>,
    /// What that may be.
    pub allowed: Allowed,
    /// Whether owners, all modes, extended attributes, devices and FIFOs come, too:
    /// for guests that are trusted, and for root only.
    pub archive: bool,
    /// Most bytes of all files together, holes included.
    pub bytes: u64,
    /// Most files, directories and links.
    pub entries: u64,
}

impl Policy {
    /// What is usual, for a name.
    pub fn of(name: impl Into<Vec<u8>>) -> Policy {
        Policy {
            name: name.into(),
            called: None,
            allowed: Allowed::Any,
            archive: false,
            bytes: MAX_BYTES,
            entries: MAX_ENTRIES,
        }
    }
}

impl Policy {
    /// A name of the stream, which begins with the one that was asked for, as it is on this
    /// host.
    pub(super) fn place(&self, bytes: &[u8]) -> Result<Name, Why> {
        let name = Name::parse(bytes)?;
        if !self.name.is_empty() && name.first().as_bytes() != self.name {
            let wanted = String::from_utf8_lossy(&self.name).into_owned();
            return Err(Why::Foreign { wanted });
        }
        let Some(called) = &self.called else { return Ok(name) };
        let path = name.path();
        let rest = path.strip_prefix(name.first()).unwrap_or(Path::new(""));
        Name::parse(&[called, &b"/"[..], rest.as_os_str().as_bytes()].concat())
    }

    /// What of an entry's inode comes.
    fn meta(&self, entry: &Entry) -> Result<Meta, Why> {
        match self.archive {
            true => Meta::of(entry),
            false => Ok(Meta {
                mode: entry.mode & PERMISSIONS,
                owner: None,
                changed: TimeSpec::new(entry.changed.0, entry.changed.1.into()),
                attributes: Vec::new(),
            }),
        }
    }

    /// Whether it may be of that kind: a guest says what it is, and this host has looked at
    /// where it goes.
    pub(super) fn admit(&self, name: &Name, directory: bool) -> Result<(), Why> {
        let below = name.path().components().nth(1).is_some();
        match self.allowed.refusal(directory || below) {
            Some(why) if self.allowed == Allowed::NotDirectory || !below => Err(Why::NotThere(why)),
            _ => Ok(()),
        }
    }
}

/// What came.
#[derive(Debug, Default)]
pub struct Extracted {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of files, holes included.
    pub bytes: u64,
    /// Extended attributes that the target's file system does not take: the first one's
    /// file and name, and how many.
    pub lost: Lost,
}

/// Extracts a stream below `target`, to its end.
///
/// # Errors
/// [`Error`]; what came until then stays, but for the file that was half written.
pub fn extract(
    stream: &mut dyn Read,
    target: &Path,
    policy: &Policy,
    stop: &Stop,
) -> Result<Extracted, Error> {
    let mut work = Work {
        target: Target::open(target)?,
        budget: Budget::new(policy.bytes, policy.entries),
        policy,
        stop,
        directories: Vec::new(),
        kept: 0,
        lost: None,
        chunk: vec![0; CHUNK],
    };
    let mut reader = Reader::new(stream);
    while let Some(entry) = reader.next()? {
        stop.check()?;
        work.entry(&entry, &mut reader)?;
    }
    work.finish()
}

/// What a directory is to be in the end: while files are made in it, it could not be.
struct Directory {
    name: Name,
    identity: (u64, u64),
    meta: Meta,
}

struct Work<'a> {
    target: Target,
    budget: Budget,
    policy: &'a Policy,
    stop: &'a Stop,
    directories: Vec<Directory>,
    /// Bytes of those.
    kept: usize,
    lost: Lost,
    chunk: Vec<u8>,
}

impl Work<'_> {
    fn entry(&mut self, entry: &Entry, reader: &mut Reader<'_>) -> Result<(), Error> {
        let refuse = |why| Error::Refused { name: shown(&entry.name), why };
        let name = self.policy.place(&entry.name).map_err(refuse)?;
        self.policy.admit(&name, entry.kind == Kind::Directory).map_err(refuse)?;
        let device = match entry.kind {
            Kind::Character => Some("character device"),
            Kind::Block => Some("block device"),
            Kind::Fifo => Some("FIFO"),
            _ => None,
        };
        if let Some(kind) = device.filter(|_| !self.policy.archive) {
            return Err(refuse(Why::Kind(kind)));
        }
        let path = name.path();
        self.budget.take(&path, if entry.kind == Kind::File { entry.size } else { 0 })?;
        let budget = &mut self.budget;
        let dir = self.target.parent(&name, || budget.take(&path, 0))?;
        let dir = dir.as_fd();
        let stored = entry.pieces.iter().fold(0u64, |sum, p| sum.saturating_add(p.length));
        room(dir, &path, if entry.kind == Kind::File { stored } else { 0 })?;
        let failed = |e: io::Error| io_at("write", &path)(e);
        match entry.kind {
            Kind::Directory => return self.directory(entry, dir, name),
            Kind::Link => {
                let to = self.policy.place(&entry.link).map_err(|_| {
                    let to = String::from_utf8_lossy(&entry.link).chars().take(256).collect();
                    refuse(Why::Link { to, why: "which leads out of the target" })
                })?;
                return self.target.link(dir, &name, &to);
            }
            _ => self.target.clear(dir, &name)?,
        }
        match entry.kind {
            Kind::File => return self.file(entry, reader, dir, &name),
            Kind::Symlink if entry.link.contains(&0) => return Err(refuse(Why::Nameless)),
            Kind::Symlink => {
                self.target.symlink(dir, name.base(), &entry.link).map_err(failed)?;
            }
            kind => {
                let kind = match kind {
                    Kind::Character => SFlag::S_IFCHR,
                    Kind::Block => SFlag::S_IFBLK,
                    _ => SFlag::S_IFIFO,
                };
                let device = makedev(entry.device.0, entry.device.1);
                mknodat(dir, name.base(), kind, Mode::S_IRUSR, device)
                    .map_err(|e| failed(e.into()))?;
                self.target.remember(dir, name.base()).map_err(failed)?;
            }
        }
        let (meta, link) = (self.policy.meta(entry).map_err(refuse)?, entry.kind == Kind::Symlink);
        meta.give_at((dir, name.base()), &path, link, &mut self.lost)
    }

    fn directory(&mut self, entry: &Entry, dir: BorrowedFd<'_>, name: Name) -> Result<(), Error> {
        let path = name.path();
        let found = self.target.directory(dir, &name, self.policy.archive)?;
        // One that was there is somebody else's: what comes is put into it.
        let Some((opened, stat, new)) = found else { return Ok(()) };
        let refuse = |why| Error::Refused { name: path.clone(), why };
        let mode = entry.mode & PERMISSIONS;
        fchmod(&opened, Mode::from_bits_truncate(mode | USABLE))
            .map_err(|e| io_at("set the mode of", &path)(e.into()))?;
        let meta = self.policy.meta(entry).map_err(refuse)?;
        let size = size_of::<Directory>() + 2 * path.as_os_str().len() + meta.bytes();
        // All that one of very many does not get is its time.
        let usable = mode & USABLE == USABLE && new && !self.policy.archive;
        if usable && self.kept + size > MAX_KEPT / 2 {
            return Ok(());
        }
        self.kept += size;
        if self.kept > MAX_KEPT {
            return Err(refuse(Why::TooManyDirectories));
        }
        self.directories.push(Directory { name, identity: identity(&stat), meta });
        Ok(())
    }

    fn file(
        &mut self,
        entry: &Entry,
        reader: &mut Reader<'_>,
        dir: BorrowedFd<'_>,
        name: &Name,
    ) -> Result<(), Error> {
        let path = name.path();
        let failed = |e: io::Error| io_at("write", &path)(e);
        let (file, stat) = self.target.file(dir, name.base()).map_err(failed)?;
        if let Err(e) = self.stop.begun(dir, name.base(), identity(&stat)) {
            self.target.clear(dir, name)?;
            return Err(failed(e));
        }
        let written = self.write(entry, reader, &file, &path);
        match &written {
            Ok(()) => self.stop.done(),
            Err(_) => self.stop.failed(),
        }
        written
    }

    fn write(
        &mut self,
        entry: &Entry,
        reader: &mut Reader<'_>,
        file: &File,
        path: &Path,
    ) -> Result<(), Error> {
        let failed = |e: io::Error| io_at("write", path)(e);
        for piece in &entry.pieces {
            let (mut at, mut left) = (piece.offset, piece.length);
            while left > 0 {
                self.stop.check()?;
                let most = self.chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let n = reader.read(&mut self.chunk[..most])?;
                if n == 0 {
                    // The pieces are as long as the data: this was checked.
                    return Err(failed(io::ErrorKind::UnexpectedEof.into()));
                }
                // Others write to the same file system.
                room(file, path, n as u64)?;
                file.write_all_at(&self.chunk[..n], at).map_err(failed)?;
                (at, left) = (at + n as u64, left - n as u64);
            }
        }
        // A hole at its end: a piece without a length says no more than where that is.
        let written = entry.pieces.iter().rev().find(|piece| piece.length > 0);
        if written.map_or(0, |piece| piece.offset + piece.length) < entry.size {
            file.set_len(entry.size).map_err(failed)?;
        }
        let refuse = |why| Error::Refused { name: path.to_path_buf(), why };
        let meta = self.policy.meta(entry).map_err(refuse)?;
        meta.give(file, path, &mut self.lost)
    }

    /// Makes directories what they are to be, the inner ones first.
    fn finish(mut self) -> Result<Extracted, Error> {
        let directories = std::mem::take(&mut self.directories);
        let mut done = HashSet::new();
        for directory in directories.iter().rev() {
            if !done.insert(directory.identity) {
                continue;
            }
            let path = directory.name.path();
            let opened = self.reopen(directory).map_err(io_at("set the mode of", &path))?;
            directory.meta.give(&opened, &path, &mut self.lost)?;
        }
        let (bytes, entries) = self.budget.spent();
        Ok(Extracted { entries, bytes, lost: self.lost })
    }

    /// Opens a directory again, if it is still the one that was made.
    fn reopen(&self, directory: &Directory) -> io::Result<File> {
        use nix::fcntl::{openat, OFlag};
        let found: OwnedFd = self.target.find(&directory.name)?;
        let opened = openat(
            &found,
            ".",
            OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        match identity(&fstat(&opened)?) == directory.identity {
            true => Ok(opened.into()),
            false => Err(io::Error::other("another directory has its name now")),
        }
    }
}

#[cfg(test)]
mod tests;
