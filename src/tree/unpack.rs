//! A stream becomes a tree, with owners, modes, times, links, devices and extended
//! attributes: in a guest, from its host, which it trusts; as GNU tar would make it of the
//! same stream, with the target as its `/`.
//!
//! Invariants: nothing is written outside the target: a name that leads up is an error,
//! and links are followed as if the target were `/`; of a stream no more is kept in memory
//! than an entry's names ([`MAX_NAMES`](super::MAX_NAMES)), and names and attributes of the
//! directories that it makes ([`MAX_KEPT`]).
//!
//! Does not: defend the host against a guest; that is `extract`.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{openat, openat2, AtFlags, OFlag, OpenHow, ResolveFlag};
use nix::sys::stat::{fstat, makedev, mkdirat, mknodat, Mode, SFlag};
use nix::unistd::{linkat, symlinkat, unlinkat, UnlinkatFlags};

use super::inode::{Lost, Meta};
use super::reader::{path as shown, Entry, Kind, Reader};
use super::walk::{identity, kind, look};
use super::{io_at, Error, Why};

/// Most bytes of names and attributes of directories that are kept until the end.
const MAX_KEPT: usize = 64 << 20;
/// Most links of a stream that are remembered.
const MAX_LINKS: usize = 1 << 20;
/// Bytes that are written at once.
const CHUNK: usize = 128 * 1024;
/// What a directory has that no entry told of.
const UNTOLD: Mode = Mode::from_bits_truncate(0o755);

/// What became of a stream that was unpacked.
#[derive(Debug, Default)]
pub struct Unpacked {
    /// Extended attributes that the target's file system does not take.
    pub lost: Lost,
}

impl Unpacked {
    /// That in a sentence, if there is anything.
    pub fn complaint(&self) -> Option<String> {
        let (path, name, n) = self.lost.as_ref()?;
        let path = path.display();
        Some(format!(
            "unpack {path}: its file system does not take the extended attribute {name}: left \
             out, as {n} in all"
        ))
    }
}

/// Unpacks a tar stream into `target`, to its end.
///
/// `owners` says whether files get the owners that the stream names, which
/// only root can give.
///
/// # Errors
/// [`Error`]; what was unpacked until then stays.
pub fn unpack(stream: &mut dyn Read, target: &Path, owners: bool) -> Result<Unpacked, Error> {
    into(stream, target, owners, true)
}

/// The same into a directory that is somebody's, and stays what it is: an entry for the
/// target itself is not for it.
///
/// # Errors
/// As [`unpack`].
pub fn unpack_into(stream: &mut dyn Read, target: &Path) -> Result<Unpacked, Error> {
    into(stream, target, true, false)
}

fn into(
    stream: &mut dyn Read,
    target: &Path,
    owners: bool,
    itself: bool,
) -> Result<Unpacked, Error> {
    fs::create_dir_all(target).map_err(io_at("create", target))?;
    let root = super::walk::open_named(target).map_err(io_at("open", target))?;
    let mut work = Work {
        root,
        owners,
        itself,
        links: HashSet::new(),
        here: None,
        directories: Vec::new(),
        kept: 0,
        lost: None,
        chunk: vec![0; CHUNK],
    };
    let mut reader = Reader::trusting(stream);
    let done = work.all(&mut reader);
    // On errors, too: what was opened up for files to be made in it is closed again.
    let finished = work.finish();
    done.and(finished)
}

/// What a directory is to be in the end: what is made in it changes its time, and its mode
/// may forbid just that.
struct Directory {
    name: PathBuf,
    identity: (u64, u64),
    meta: Meta,
}

struct Work {
    root: OwnedFd,
    owners: bool,
    /// Whether an entry for the target itself counts.
    itself: bool,
    /// Links that this stream made.
    links: HashSet<(u64, u64)>,
    /// The directory that was used last: most entries are in the one before's.
    here: Option<(PathBuf, OwnedFd)>,
    directories: Vec<Directory>,
    kept: usize,
    lost: Lost,
    chunk: Vec<u8>,
}

/// A name below the target: its directories and itself; the latter is empty for the
/// target.
fn parse(name: &[u8]) -> Result<PathBuf, Error> {
    let escape = || Error::Escape { name: shown(name) };
    if name.contains(&0) {
        return Err(escape());
    }
    let mut out = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(name)).components() {
        match part {
            Component::Normal(part) => out.push(part),
            // As tar itself: a name that begins with `/` is one below the target.
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(escape()),
        }
    }
    Ok(out)
}

impl Work {
    fn all(&mut self, reader: &mut Reader<'_>) -> Result<(), Error> {
        while let Some(entry) = reader.next()? {
            self.entry(&entry, reader)?;
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry, reader: &mut Reader<'_>) -> Result<(), Error> {
        let name = parse(&entry.name)?;
        let refuse = |why| Error::Refused { name: name.clone(), why };
        let mut meta = Meta::of(entry).map_err(refuse)?;
        meta.owner = meta.owner.filter(|_| self.owners);
        let Some(base) = name.file_name() else {
            // The target itself.
            return match entry.kind {
                Kind::Directory if !self.itself => Ok(()),
                Kind::Directory => self.note(name, meta),
                _ => Err(Error::Escape { name: shown(&entry.name) }),
            };
        };
        let dir = self.parent(&name)?;
        let dir = dir.as_fd();
        let failed = |e: Errno| io_at("unpack", &name)(e.into());
        match entry.kind {
            Kind::Directory => {
                self.directory(dir, base, &name)?;
                return self.note(name, meta);
            }
            Kind::File => return self.file(entry, reader, (dir, base, &name), &meta),
            Kind::Link => return self.link(entry, (dir, base, &name)),
            Kind::Symlink => {
                let make = || symlinkat(entry.link.as_slice(), dir, base);
                in_place_of((dir, base), make).map_err(failed)?;
                if let Some(seen) = look(dir, base).ok().filter(|_| self.links.len() < MAX_LINKS) {
                    self.links.insert(identity(&seen));
                }
            }
            Kind::Character | Kind::Block | Kind::Fifo => {
                let kind = match entry.kind {
                    Kind::Character => SFlag::S_IFCHR,
                    Kind::Block => SFlag::S_IFBLK,
                    _ => SFlag::S_IFIFO,
                };
                let device = makedev(entry.device.0, entry.device.1);
                let make = || mknodat(dir, base, kind, Mode::S_IRUSR, device);
                in_place_of((dir, base), make).map_err(failed)?;
            }
        }
        meta.give_at((dir, base), &name, entry.kind == Kind::Symlink, &mut self.lost)
    }

    /// The directory that a name is in, made if it is not there.
    fn parent(&mut self, name: &Path) -> Result<OwnedFd, Error> {
        let parent = name.parent().unwrap_or(Path::new(""));
        let failed = |e: std::io::Error| io_at("open the directory of", name)(e);
        if self.here.as_ref().is_none_or(|(at, _)| at != parent) {
            self.here = None;
            let opened = match self.within(parent) {
                Err(Errno::ENOENT) => self.make_parents(parent),
                opened => opened,
            };
            self.here = Some((parent.to_path_buf(), opened.map_err(|e| failed(e.into()))?));
        }
        let (_, here) = self.here.as_ref().ok_or_else(|| failed(Errno::ENOENT.into()))?;
        here.try_clone().map_err(failed)
    }

    /// Opens a directory below the target, which is every link's `/`.
    fn within(&self, path: &Path) -> nix::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
        openat2(&self.root, path, OpenHow::new().flags(flags).resolve(resolve))
    }

    fn make_parents(&self, path: &Path) -> nix::Result<OwnedFd> {
        let mut at = PathBuf::new();
        let mut dir = self.within(&at)?;
        for part in path {
            match mkdirat(&dir, part, UNTOLD) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(e) => return Err(e),
            }
            at.push(part);
            // By its whole name: a part may be a link, which is somebody's directory.
            dir = self.within(&at)?;
        }
        Ok(dir)
    }

    /// Makes a directory, unless one is there, or a link to one that was there before this
    /// stream; what else has the name goes.
    fn directory(&mut self, dir: BorrowedFd<'_>, base: &OsStr, name: &Path) -> Result<(), Error> {
        let failed = |e: Errno| io_at("unpack", name)(e.into());
        match mkdirat(dir, base, UNTOLD) {
            Err(Errno::EEXIST) if self.keeps(dir, base, name) => Ok(()),
            Err(Errno::EEXIST) => {
                in_place_of((dir, base), || mkdirat(dir, base, UNTOLD)).map_err(failed)
            }
            made => made.map_err(failed),
        }
    }

    /// Whether what is there is a directory, or leads to one. GNU tar would replace every
    /// link; a root's own, such as /lib, are not this stream's to replace.
    fn keeps(&self, dir: BorrowedFd<'_>, base: &OsStr, name: &Path) -> bool {
        let ours = look(dir, base).is_ok_and(|seen| self.links.contains(&identity(&seen)));
        !ours && self.within(name).is_ok()
    }

    /// Keeps what a directory is to be; it is usable until then.
    fn note(&mut self, name: PathBuf, meta: Meta) -> Result<(), Error> {
        let failed = |e: Errno| io_at("unpack", &name)(e.into());
        let opened = self.within(&name).map_err(failed)?;
        let stat = fstat(&opened).map_err(failed)?;
        let identity = identity(&stat);
        // Usable meanwhile, and for nobody who could not use it before.
        let mode = Mode::from_bits_truncate(stat.st_mode) | Mode::S_IRWXU;
        nix::sys::stat::fchmod(&opened, mode).map_err(failed)?;
        self.kept += size_of::<Directory>() + name.as_os_str().len() + meta.bytes();
        if self.kept > MAX_KEPT {
            return Err(Error::Refused { name, why: Why::TooManyDirectories });
        }
        self.directories.push(Directory { name, identity, meta });
        Ok(())
    }

    fn file(
        &mut self,
        entry: &Entry,
        reader: &mut Reader<'_>,
        (dir, base, name): (BorrowedFd<'_>, &OsStr, &Path),
        meta: &Meta,
    ) -> Result<(), Error> {
        let failed = |e: std::io::Error| io_at("unpack", name)(e);
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let make = || openat(dir, base, flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let file = File::from(in_place_of((dir, base), make).map_err(|e| failed(e.into()))?);
        let filled = self.fill(entry, reader, &file, name);
        if filled.is_err() {
            // It is whole, or it is not there.
            let _ = unlinkat(dir, base, UnlinkatFlags::NoRemoveDir);
        }
        filled?;
        meta.give(&file, name, &mut self.lost)
    }

    fn fill(
        &mut self,
        entry: &Entry,
        reader: &mut Reader<'_>,
        file: &File,
        name: &Path,
    ) -> Result<(), Error> {
        let failed = |e: std::io::Error| io_at("unpack", name)(e);
        for piece in &entry.pieces {
            let (mut at, mut left) = (piece.offset, piece.length);
            while left > 0 {
                let most = self.chunk.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let n = reader.read(&mut self.chunk[..most])?;
                if n == 0 {
                    // The pieces are as long as the data: this was checked.
                    return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
                }
                file.write_all_at(&self.chunk[..n], at).map_err(failed)?;
                (at, left) = (at + n as u64, left - n as u64);
            }
        }
        let written = entry.pieces.iter().rev().find(|piece| piece.length > 0);
        if written.map_or(0, |piece| piece.offset + piece.length) < entry.size {
            file.set_len(entry.size).map_err(failed)?;
        }
        Ok(())
    }

    /// Another name of what came before: a file, a link, a device.
    fn link(
        &mut self,
        entry: &Entry,
        (dir, base, name): (BorrowedFd<'_>, &OsStr, &Path),
    ) -> Result<(), Error> {
        let to = parse(&entry.link)?;
        let failed = |e: Errno| {
            let e: std::io::Error = e.into();
            let text = format!("a hard link to {}: {e}", to.display());
            io_at("unpack", name)(std::io::Error::new(e.kind(), text))
        };
        let Some(to_base) = to.file_name() else { return Err(failed(Errno::EISDIR)) };
        let to_dir = self.within(to.parent().unwrap_or(Path::new(""))).map_err(failed)?;
        let seen = look(to_dir.as_fd(), to_base).ok();
        let there = look(dir, base).ok();
        if let (Some(a), Some(b)) = (seen, there) {
            if identity(&a) == identity(&b) {
                return Ok(());
            }
        }
        let make = || linkat(&to_dir, to_base, dir, base, AtFlags::empty());
        in_place_of((dir, base), make).map_err(failed)
    }

    /// Makes directories what they are to be, the inner ones first.
    fn finish(mut self) -> Result<Unpacked, Error> {
        let mut done = HashSet::new();
        for directory in std::mem::take(&mut self.directories).iter().rev() {
            // One that another thing has replaced since, or that was told of twice.
            let Ok(opened) = self.within(&directory.name) else { continue };
            let failed = |e: Errno| io_at("set owner and mode of", &directory.name)(e.into());
            let same = identity(&fstat(&opened).map_err(failed)?) == directory.identity;
            if same && done.insert(directory.identity) {
                directory.meta.give(&File::from(opened), &directory.name, &mut self.lost)?;
            }
        }
        Ok(Unpacked { lost: self.lost })
    }
}

/// Makes something; what has its name goes first, but for a directory that is not empty.
fn in_place_of<T>(
    (dir, base): (BorrowedFd<'_>, &OsStr),
    make: impl Fn() -> nix::Result<T>,
) -> nix::Result<T> {
    match make() {
        Err(Errno::EEXIST) => {}
        made => return made,
    }
    let is_directory = look(dir, base).is_ok_and(|s| kind(&s) == SFlag::S_IFDIR);
    let how = if is_directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
    unlinkat(dir, base, how)?;
    make()
}
