//! Where something is to be written, created, locked or removed: a directory that is held open,
//! and a name in it.
//!
//! Invariants: the name is never followed where it is a link; a file that is written in its
//! place is root's or this user's, has no other name and no other writer; one that is replaced
//! is whole, or the one before; what is written before it has its name is under a name that
//! nobody can have put there.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{open, openat, renameat, OFlag};
use nix::sys::stat::{fstat, Mode, SFlag};
use nix::unistd::{geteuid, unlinkat, UnlinkatFlags};

use super::policy::{ours, replaceable, writable, Asker, Component, Fault, Untrusted};
use super::{has_list, reopened, Kind, TrustedPath, LOOKED_AT};
use crate::sys::process::random;
use crate::walls::Wall;

/// How often a file is looked for again that appears, or goes, while it is opened.
const TRIES: u32 = 8;
/// Permissions of what a user asks for, less the umask.
const OUTPUT: u32 = 0o666;

/// A place for one file.
#[derive(Debug)]
pub struct Destination {
    directory: OwnedFd,
    path: PathBuf,
    name: OsString,
}

impl Destination {
    /// The place that a path names; its directory passes the check.
    ///
    /// # Errors
    /// [`Untrusted`] inside of an [`io::Error`]; as open(2) when the directory is not there.
    pub fn of(path: &Path) -> io::Result<Destination> {
        let (parent, name) = split(path)?;
        let directory = TrustedPath::of(&parent, Kind::SharedDirectory)?;
        Ok(Destination { path: directory.path().to_path_buf(), directory: directory.fd, name })
    }

    /// A name in a directory that may be anybody's, in one that passes the check: what is
    /// another user's in there is refused when it is opened, and replaced when it is written.
    ///
    /// # Errors
    /// As [`Destination::of`].
    pub fn inside(directory: &Path, name: &str) -> io::Result<Destination> {
        let above = Destination::of(directory)?;
        let mut flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        flags.set(OFlag::O_NOFOLLOW, Wall::Paths.stands());
        let directory = openat(&above.directory, above.name.as_os_str(), flags, Mode::empty())?;
        Ok(Destination { directory, path: above.path(), name: name.into() })
    }

    /// The place that a user names on a command line. Root's passes the check like any other;
    /// who is nobody in particular may write wherever the kernel allows it.
    ///
    /// # Errors
    /// As [`Destination::of`].
    pub fn named(path: &Path) -> io::Result<Destination> {
        if geteuid().is_root() {
            return Destination::of(path);
        }
        let (parent, name) = split(path)?;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(&parent, flags, Mode::empty())?;
        Ok(Destination { directory, path: parent, name })
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.path.join(&self.name)
    }

    /// Its directory.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Its name in there.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// The place in the same directory whose name has more at its end.
    ///
    /// # Errors
    /// As dup(2).
    pub fn with(&self, ending: &str) -> io::Result<Destination> {
        let mut name = self.name.clone();
        name.push(ending);
        Ok(Destination { directory: self.directory.try_clone()?, path: self.path.clone(), name })
    }

    /// What is there now, looked at and not opened.
    fn look(&self) -> io::Result<Option<(OwnedFd, Component)>> {
        match openat(&self.directory, self.name.as_os_str(), LOOKED_AT, Mode::empty()) {
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => Err(e.into()),
            Ok(fd) => {
                let list = || has_list(fd.as_fd(), &self.path());
                let component = Component::of(&fstat(&fd)?, list);
                Ok(Some((fd, component)))
            }
        }
    }

    fn refuse(&self, fault: Fault) -> io::Error {
        Untrusted::new(self.path(), fault, Asker::this_process()).into()
    }

    /// Checks that what is there, if anything, is root's or this user's, whatever it is.
    ///
    /// # Errors
    /// [`Untrusted`] inside of an [`io::Error`].
    pub fn check_owner(&self) -> io::Result<()> {
        let Some((_, component)) = self.look()? else { return Ok(()) };
        match ours(Asker::this_process(), &component) {
            Err(fault) if Wall::Paths.stands() => Err(self.refuse(fault)),
            _ => Ok(()),
        }
    }

    /// Checks that what is there, if anything, is no symbolic link.
    ///
    /// # Errors
    /// [`Untrusted`] inside of an [`io::Error`].
    pub fn check_no_link(&self) -> io::Result<()> {
        match self.look()? {
            Some((_, there)) if there.is(SFlag::S_IFLNK) && Wall::Paths.stands() => {
                Err(self.refuse(Fault::Link))
            }
            _ => Ok(()),
        }
    }

    /// Checks that what is there, if anything, is a file that may be opened to be written.
    ///
    /// # Errors
    /// [`Untrusted`] inside of an [`io::Error`].
    pub fn check_file(&self) -> io::Result<()> {
        self.checked().map(drop)
    }

    /// The file that is there, which may be written.
    fn checked(&self) -> io::Result<Option<OwnedFd>> {
        let Some((fd, component)) = self.look()? else { return Ok(None) };
        match writable(Asker::this_process(), &component) {
            Err(fault) if Wall::Paths.stands() => Err(self.refuse(fault)),
            _ => Ok(Some(fd)),
        }
    }

    /// Opens the file that is there, to be read, and written where `write` says so.
    ///
    /// # Errors
    /// [`Untrusted`] inside of an [`io::Error`]; as open(2).
    pub fn open(&self, write: bool) -> io::Result<File> {
        if !Wall::Paths.stands() {
            return File::options().read(true).write(write).open(self.path());
        }
        let fd = self.checked()?.ok_or(io::ErrorKind::NotFound)?;
        let flags = if write { OFlag::O_RDWR } else { OFlag::O_RDONLY };
        reopened(fd.as_fd(), Some((self.directory(), self.name())), flags)
    }

    /// Opens the file that is there, to be read and written, or an empty one that is made.
    ///
    /// # Errors
    /// As [`Destination::open`].
    pub fn open_or_create(&self, mode: u32) -> io::Result<File> {
        if !Wall::Paths.stands() {
            let mut options = File::options();
            return options.read(true).write(true).create(true).truncate(false).open(self.path());
        }
        for _ in 0..TRIES {
            match self.open(true) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                done => return done,
            }
            match self.created(&self.name, mode) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                done => return done,
            }
        }
        Err(Errno::EAGAIN.into())
    }

    /// A new file that has no name before; empty, to be read and written.
    fn created(&self, name: &OsStr, mode: u32) -> io::Result<File> {
        let flags =
            OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(&self.directory, name, flags, Mode::from_bits_truncate(mode))?.into())
    }

    /// A new file, empty, in the place of whatever is there.
    ///
    /// # Errors
    /// As unlink(2) and open(2).
    pub fn create(&self, mode: u32) -> io::Result<File> {
        self.remove()?;
        self.created(&self.name, mode)
    }

    /// Removes what is there, if anything, and follows nothing.
    ///
    /// # Errors
    /// As unlink(2).
    pub fn remove(&self) -> io::Result<()> {
        match unlinkat(&self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Gives what is there another name in the same directory, in the place of whatever has it.
    ///
    /// # Errors
    /// As rename(2).
    pub fn rename(&self, name: &str) -> io::Result<()> {
        Ok(renameat(&self.directory, self.name.as_os_str(), &self.directory, name)?)
    }

    /// Begins a file that takes the place of the one that is there, once it is whole.
    ///
    /// # Errors
    /// [`Untrusted`] inside of an [`io::Error`], when what is there is a link, no file, or
    /// another user's; as open(2).
    pub fn draft(&self) -> io::Result<Draft<'_>> {
        if !Wall::Paths.stands() {
            let mut name = self.name.clone();
            name.push(".new");
            let file = File::create(self.path.join(&name))?;
            return Ok(Draft { place: self, name, file, done: false });
        }
        self.check_replaceable()?;
        for _ in 0..TRIES {
            let mut bytes = [0; 8];
            random(&mut bytes)?;
            let number = u64::from_ne_bytes(bytes);
            let name = OsString::from(format!(".vmcache-{number:016x}.new"));
            match self.created(&name, OUTPUT) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                made => return Ok(Draft { file: made?, place: self, name, done: false }),
            }
        }
        Err(Errno::EEXIST.into())
    }

    /// Checks that what is there, if anything, is a file whose place another may take.
    ///
    /// # Errors
    /// [`Untrusted`] inside of an [`io::Error`].
    pub fn check_replaceable(&self) -> io::Result<()> {
        let Some((_, component)) = self.look()? else { return Ok(()) };
        match replaceable(Asker::this_process(), &component) {
            Err(fault) if Wall::Paths.stands() => Err(self.refuse(fault)),
            _ => Ok(()),
        }
    }

    /// Puts a file into this place, whole.
    ///
    /// # Errors
    /// As [`Destination::draft`], and write(2); what was there before then stands.
    pub fn replace(&self, bytes: &[u8]) -> io::Result<()> {
        let mut draft = self.draft()?;
        draft.file.write_all(bytes)?;
        draft.commit()
    }
}

/// The directory and the name of a path.
fn split(path: &Path) -> io::Result<(PathBuf, OsString)> {
    let path = std::path::absolute(path)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((parent.to_path_buf(), name.to_os_string())),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "it names no file")),
    }
}

/// A file that is not in its place yet; removed when it is dropped before it is.
#[derive(Debug)]
pub struct Draft<'a> {
    place: &'a Destination,
    name: OsString,
    /// To be written.
    pub file: File,
    done: bool,
}

impl Draft<'_> {
    /// Puts it into its place.
    ///
    /// # Errors
    /// As rename(2); what was there before then stands.
    pub fn commit(mut self) -> io::Result<()> {
        let directory = &self.place.directory;
        renameat(directory, self.name.as_os_str(), directory, self.place.name.as_os_str())?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.done {
            let name = self.name.as_os_str();
            let _ = unlinkat(&self.place.directory, name, UnlinkatFlags::NoRemoveDir);
        }
    }
}
