//! Whose a path is: the one check of every path that a configuration, a command line or a
//! message names, before what is there is read, executed, written or removed.
//!
//! The rule (`policy`): every component, from `/` on, is root's or this process's user's, and
//! nobody else may write it. A sticky directory that others may write (/tmp) passes, since the
//! entry below it must be root's or this user's, too. A symbolic link in a directory that passes
//! is followed, and where it leads is checked alike. What is opened for writing
//! ([`Destination`]) is never a link.
//!
//! Invariants: each component is opened once, from the directory that was checked before it, and
//! looked at through that fd, so that a name which is swapped meanwhile leads nowhere else; what
//! is used is the fd that was checked. A FIFO, device or socket is never opened where a file is
//! wanted. A path that passed can only be changed by root and this user: a program that is
//! executed, or a socket that is bound, by its name right after the check is what was checked.
//!
//! Does not: look at mandatory access control, at NFSv4's access control lists, or at who else
//! is root.
//!
//! Source: openat(2), path_resolution(7), acl(5).

mod destination;
mod fuse;
mod policy;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component as Part, Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{open, openat, readlinkat, OFlag};
use nix::sys::stat::{fstat, mkdirat, FileStat, Mode, SFlag};

pub use destination::{Destination, Draft};
pub use policy::{refused, Untrusted};
use policy::{Asker, Component, Fault, Standing};

use crate::walls::Wall;

/// Most symbolic links on the way, as the kernel has it.
const MAX_LINKS: u32 = 40;
/// Most components of a path whose links are resolved; each is an open fd meanwhile.
const MAX_DEPTH: usize = 128;
/// Most entries of a directory that are read.
pub const MAX_NAMES: usize = 4096;
/// What a component is opened with: nothing of it is read, and nothing waits.
const LOOKED_AT: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// As what a path is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A regular file that somebody may execute.
    Program,
    /// A directory in which nobody else makes entries.
    Directory,
    /// A directory in which others may make entries of their own, as /tmp.
    SharedDirectory,
    /// A regular file, or a character device.
    Source,
    /// A socket to connect to. It may be another user's where only root or this user can have
    /// put it.
    Socket,
    /// Whatever it is, but a FIFO.
    Any,
}

/// What is at a path that passed the check, held open without any right to it but that of
/// naming it.
#[derive(Debug)]
pub struct TrustedPath {
    fd: OwnedFd,
    path: PathBuf,
    /// The directory that it is in; none for `/`.
    above: Option<OwnedFd>,
}

impl TrustedPath {
    /// Checks a path.
    ///
    /// # Errors
    /// [`Untrusted`] inside of an [`io::Error`]; as open(2) when it is not there.
    pub fn of(path: &Path, kind: Kind) -> io::Result<TrustedPath> {
        if !Wall::Paths.stands() {
            return TrustedPath::unchecked(path);
        }
        let mut walk = Walk::along(path, kind)?;
        while let Some(name) = walk.rest.pop_front() {
            walk.step(&name)?;
        }
        walk.end()
    }

    /// A regular file.
    ///
    /// # Errors
    /// As [`TrustedPath::of`].
    pub fn file(path: &Path) -> io::Result<TrustedPath> {
        TrustedPath::of(path, Kind::File)
    }

    /// A program.
    ///
    /// # Errors
    /// As [`TrustedPath::of`].
    pub fn program(path: &Path) -> io::Result<TrustedPath> {
        TrustedPath::of(path, Kind::Program)
    }

    /// A directory in which nobody else makes entries.
    ///
    /// # Errors
    /// As [`TrustedPath::of`].
    pub fn directory(path: &Path) -> io::Result<TrustedPath> {
        TrustedPath::of(path, Kind::Directory)
    }

    /// The same, or one that others may share; what of it is missing is made, with that mode.
    ///
    /// # Errors
    /// As [`TrustedPath::of`], and mkdir(2).
    pub fn make_directory(path: &Path, mode: u32, kind: Kind) -> io::Result<TrustedPath> {
        if !Wall::Paths.stands() {
            DirBuilder::new().recursive(true).mode(mode).create(path)?;
            return TrustedPath::unchecked(path);
        }
        let mut walk = Walk::along(path, kind)?;
        while let Some(name) = walk.rest.pop_front() {
            match walk.step(&name) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                done => {
                    done?;
                    continue;
                }
            }
            match mkdirat(walk.here(), name.as_os_str(), Mode::from_bits_truncate(mode)) {
                // Whoever made it meanwhile: it is looked at like any other.
                Ok(()) | Err(Errno::EEXIST) => walk.step(&name)?,
                Err(e) => return Err(e.into()),
            }
        }
        walk.end()
    }

    /// Without the check: a test's wall is down.
    fn unchecked(path: &Path) -> io::Result<TrustedPath> {
        let fd = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let path = std::fs::read_link(by_fd(fd.as_fd()))?;
        Ok(TrustedPath { fd, path, above: None })
    }

    /// Opens it, to be read.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(&self) -> io::Result<File> {
        let above = self.above.as_ref().map(AsFd::as_fd);
        reopened(self.as_fd(), above.zip(self.path.file_name()), OFlag::O_RDONLY)
    }

    /// The names in a directory.
    ///
    /// # Errors
    /// As open(2) and getdents(2); when there are more than [`MAX_NAMES`].
    pub fn names(&self) -> io::Result<Vec<OsString>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut names = Vec::new();
        for entry in Dir::openat(&self.fd, ".", flags, Mode::empty())?.iter() {
            let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_os_string();
            if name == "." || name == ".." {
                continue;
            }
            if names.len() == MAX_NAMES {
                return Err(io::Error::other(format!("it has more than {MAX_NAMES} entries")));
            }
            names.push(name);
        }
        Ok(names)
    }

    /// Its path, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for TrustedPath {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Checks a path as far as it exists: what is missing of it, this process will make.
///
/// # Errors
/// As [`TrustedPath::of`], but for what is missing.
pub fn check_existing(path: &Path, kind: Kind) -> io::Result<()> {
    match TrustedPath::of(path, kind) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map(drop),
    }
}

/// The same for what this process does not make: where others could, it must be there already.
///
/// # Errors
/// As [`check_existing`].
pub fn check_provided(path: &Path, kind: Kind) -> io::Result<()> {
    if !Wall::Paths.stands() {
        return Ok(());
    }
    let mut walk = Walk::along(path, kind)?;
    while let Some(name) = walk.rest.pop_front() {
        match walk.step(&name) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return match walk.top().standing {
                    Standing::Closed => Ok(()),
                    Standing::Sticky => Err(walk.refuse(&name, Fault::Missing)),
                };
            }
            done => done?,
        }
    }
    walk.end().map(drop)
}

/// As [`check_existing`] for a path below a directory that is the system's own, such as a mount of the
/// kernel's, and is not looked at.
///
/// # Errors
/// As [`check_existing`].
pub fn check_existing_below(base: &Path, path: &Path, kind: Kind) -> io::Result<()> {
    if !Wall::Paths.stands() {
        return Ok(());
    }
    let check = || {
        let mut walk = Walk::from(base, kind)?;
        walk.rest.extend(parts(path));
        while let Some(name) = walk.rest.pop_front() {
            walk.step(&name)?;
        }
        walk.end().map(drop)
    };
    match check() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// The kernel's own link to what an fd is.
fn by_fd(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// Another opening of what an fd names. In a root without /proc, by the name that it has above,
/// if it is still the same.
fn reopened(
    fd: BorrowedFd<'_>,
    above: Option<(BorrowedFd<'_>, &OsStr)>,
    flags: OFlag,
) -> io::Result<File> {
    match open(&by_fd(fd), flags | OFlag::O_CLOEXEC, Mode::empty()) {
        Err(Errno::ENOENT) => reopened_by_name(fd, above.ok_or(Errno::ENOENT)?, flags),
        opened => Ok(opened?.into()),
    }
}

fn reopened_by_name(
    fd: BorrowedFd<'_>,
    (above, name): (BorrowedFd<'_>, &OsStr),
    flags: OFlag,
) -> io::Result<File> {
    // What is there now is not waited for, whatever it is.
    let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let opened = openat(above, name, flags, Mode::empty())?;
    let (checked, found) = (fstat(fd)?, fstat(&opened)?);
    match (checked.st_dev, checked.st_ino) == (found.st_dev, found.st_ino) {
        true => Ok(opened.into()),
        false => Err(Errno::ESTALE.into()),
    }
}

/// A path's components, without the root.
fn parts(path: &Path) -> impl DoubleEndedIterator<Item = OsString> + '_ {
    path.components().filter_map(|part| match part {
        Part::Normal(name) => Some(name.to_os_string()),
        Part::ParentDir => Some("..".into()),
        Part::RootDir | Part::CurDir | Part::Prefix(_) => None,
    })
}

/// A component that passed.
struct Step {
    fd: OwnedFd,
    name: OsString,
    stat: FileStat,
    standing: Standing,
}

/// From `/` to where a path leads, component by component.
struct Walk {
    asker: Asker,
    kind: Kind,
    /// What passed, from `/` to here: `..` goes back to what was checked.
    steps: Vec<Step>,
    /// Names that are still to come.
    rest: VecDeque<OsString>,
    links: u32,
}

impl Walk {
    fn along(path: &Path, kind: Kind) -> io::Result<Walk> {
        let path = std::path::absolute(path)?;
        let mut walk = Walk::from(Path::new("/"), kind)?;
        walk.rest.extend(parts(&path));
        Ok(walk)
    }

    /// Begins at a directory; only the root itself is checked.
    fn from(base: &Path, kind: Kind) -> io::Result<Walk> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(base, flags, Mode::empty())?;
        let stat = fstat(&fd)?;
        let mut walk = Walk {
            asker: Asker::this_process(),
            kind,
            steps: Vec::new(),
            rest: VecDeque::new(),
            links: 0,
        };
        let name = base.as_os_str().to_os_string();
        let standing = match base == Path::new("/") {
            true => walk.look(&name, fd.as_fd(), &stat)?,
            false => Standing::Closed,
        };
        walk.steps.push(Step { fd, name, stat, standing });
        Ok(walk)
    }

    fn top(&self) -> &Step {
        // The root is never left.
        &self.steps[self.steps.len() - 1]
    }

    fn here(&self) -> BorrowedFd<'_> {
        self.top().fd.as_fd()
    }

    /// The path of an entry here, for an error.
    fn named(&self, name: &OsStr) -> PathBuf {
        let mut path: PathBuf = self.steps.iter().map(|s| s.name.as_os_str()).collect();
        path.push(name);
        path
    }

    fn refuse(&self, name: &OsStr, fault: Fault) -> io::Error {
        Untrusted::new(self.named(name), fault, self.asker).into()
    }

    /// Goes to an entry here, or takes where a link leads as what is to come.
    fn step(&mut self, name: &OsStr) -> io::Result<()> {
        if SFlag::from_bits_truncate(self.top().stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFDIR {
            return Err(Errno::ENOTDIR.into());
        }
        if name == ".." {
            self.steps.truncate(self.steps.len().saturating_sub(1).max(1));
            return Ok(());
        }
        let fd = self.opened(name)?;
        let stat = fstat(&fd)?;
        let standing = self.look(name, fd.as_fd(), &stat)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFLNK {
            self.links += 1;
            if self.links > MAX_LINKS {
                return Err(Errno::ELOOP.into());
            }
            let target = PathBuf::from(readlinkat(&fd, "")?);
            if target.is_absolute() {
                self.steps.truncate(1);
            }
            for part in parts(&target).rev() {
                self.rest.push_front(part);
            }
            return Ok(());
        }
        if self.steps.len() > MAX_DEPTH {
            return Err(self.refuse(name, Fault::Deep(MAX_DEPTH)));
        }
        self.steps.push(Step { fd, name: name.to_os_string(), stat, standing });
        Ok(())
    }

    /// An entry here. As a directory first, which mounts what is mounted there on demand.
    fn opened(&self, name: &OsStr) -> io::Result<OwnedFd> {
        let flags = LOOKED_AT | OFlag::O_DIRECTORY;
        match openat(self.here(), name, flags, Mode::empty()) {
            Err(Errno::ENOTDIR) => Ok(openat(self.here(), name, LOOKED_AT, Mode::empty())?),
            other => Ok(other?),
        }
    }

    /// Whether an entry passes.
    fn look(&self, name: &OsStr, fd: BorrowedFd<'_>, stat: &FileStat) -> io::Result<Standing> {
        let component = Component::of(stat, || has_list(fd, &self.named(name)));
        let last = self.rest.is_empty() && !self.steps.is_empty();
        if last && self.kind == Kind::Socket && component.is(SFlag::S_IFSOCK) {
            // Who connects trusts who may have put it there.
            if self.top().standing == Standing::Closed {
                return Ok(Standing::Closed);
            }
        }
        let standing =
            policy::acceptable(self.asker, &component).map_err(|f| self.refuse(name, f))?;
        if self.steps.last().is_none_or(|above| above.stat.st_dev != stat.st_dev) {
            if let Some(uid) =
                fuse::mounted_by(fd)?.filter(|uid| ![0, self.asker.uid].contains(uid))
            {
                return Err(self.refuse(name, Fault::Mount { uid }));
            }
        }
        Ok(standing)
    }

    /// What is here, when it is what is wanted.
    fn end(mut self) -> io::Result<TrustedPath> {
        let path: PathBuf = self.steps.iter().map(|s| s.name.as_os_str()).collect();
        let Some(Step { fd, stat, standing, .. }) = self.steps.pop() else {
            return Err(Errno::ENOENT.into());
        };
        let above = self.steps.pop().map(|step| step.fd);
        match policy::wanted(self.kind, &Component::of(&stat, || false), standing) {
            Ok(()) => Ok(TrustedPath { fd, path, above }),
            Err(fault) => Err(Untrusted::new(path, fault, self.asker).into()),
        }
    }
}

/// Whether a file has an access control list beyond its mode.
fn has_list(fd: BorrowedFd<'_>, path: &Path) -> bool {
    const NAME: &str = "system.posix_acl_access";
    let list = match xattr::get_deref(by_fd(fd), NAME) {
        // A root without /proc.
        Err(e) if e.kind() == io::ErrorKind::NotFound => xattr::get(path, NAME),
        list => list,
    };
    match list {
        Ok(list) => list.is_some(),
        // The file system has none.
        Err(e) => e.raw_os_error() != Some(Errno::EOPNOTSUPP as i32),
    }
}
