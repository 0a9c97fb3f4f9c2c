//! Where a guest's tree is written: a directory of this host that nothing leads out of.
//!
//! Invariants: every name is opened or made relative to the directory that was opened
//! before, and no link is followed, whether the guest made it or another user of this
//! host; what is written to is new: whatever had its name is removed first, a directory
//! never.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{openat, AtFlags, OFlag};
use nix::sys::stat::{fchmod, fstat, mkdirat, FileStat, Mode, SFlag};
use nix::unistd::{geteuid, linkat, symlinkat, unlinkat, UnlinkatFlags};

use super::budget::room;
use super::walk::{identity, kind, look, open_directory, open_named};
use super::{io_at, Error, Why, MAX_DEPTH};

/// Longest name of a file, in bytes: Linux's own.
const MAX_NAME: usize = 255;

/// The parts of a name, none of which leads up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    parts: Vec<OsString>,
}

impl Name {
    /// Takes a name apart.
    ///
    /// # Errors
    /// A refusal, for a name that is absolute, leads up, or cannot be one on this host.
    pub fn parse(bytes: &[u8]) -> Result<Name, Why> {
        if bytes.first() == Some(&b'/') {
            return Err(Why::Leaves);
        }
        if bytes.contains(&0) {
            return Err(Why::Nameless);
        }
        let mut parts = Vec::new();
        for part in bytes.split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".") {
            match part {
                b".." => return Err(Why::Leaves),
                long if long.len() > MAX_NAME => return Err(Why::LongName { bytes: long.len() }),
                part => parts.push(OsStr::from_bytes(part).to_os_string()),
            }
            if parts.len() > MAX_DEPTH {
                return Err(Why::Deep);
            }
        }
        match parts.is_empty() {
            true => Err(Why::Nameless),
            false => Ok(Name { parts }),
        }
    }

    /// Its first part.
    pub fn first(&self) -> &OsStr {
        &self.parts[0]
    }

    /// Its last part.
    pub fn base(&self) -> &OsStr {
        &self.parts[self.parts.len() - 1]
    }

    /// The directories before that.
    fn parents(&self) -> &[OsString] {
        &self.parts[..self.parts.len() - 1]
    }

    /// The name as a path.
    pub fn path(&self) -> PathBuf {
        self.parts.iter().collect()
    }
}

/// The directory, and what was made in it.
pub struct Target {
    root: OwnedFd,
    /// The directory that was used last: most entries are in the one before's.
    at: Vec<OsString>,
    here: Option<OwnedFd>,
    /// Inodes of files, links and directories made so far.
    made: HashSet<(u64, u64)>,
}

impl Target {
    /// Opens a directory, which is made when it is not there. Links in its own path are
    /// followed: whoever names it means them.
    ///
    /// # Errors
    /// As the file system's.
    pub fn open(path: &Path) -> Result<Target, Error> {
        std::fs::create_dir_all(path).map_err(io_at("create", path))?;
        let root = open_named(path).map_err(io_at("open", path))?;
        room(&root, path, 0)?;
        Ok(Target { root, at: Vec::new(), here: None, made: HashSet::new() })
    }

    /// Whether this made it.
    pub fn is_ours(&self, stat: &FileStat) -> bool {
        self.made.contains(&identity(stat))
    }

    /// The directory that a name is in, duplicated; `make` makes those that are missing.
    pub fn parent(
        &mut self,
        name: &Name,
        mut make: impl FnMut() -> Result<(), Error>,
    ) -> Result<OwnedFd, Error> {
        let failed = |e: io::Error| io_at("open the directory of", &name.path())(e);
        let parents = name.parents();
        if !parents.starts_with(&self.at) {
            (self.at, self.here) = (Vec::new(), None);
        }
        for part in &parents[self.at.len()..] {
            let dir = self.here.as_ref().unwrap_or(&self.root).as_fd();
            let next = match enter(dir, part) {
                Err(Errno::ENOENT) => {
                    make()?;
                    let (next, stat) = new_directory(dir, part).map_err(failed)?;
                    // Nobody said what it may be.
                    fchmod(&next, Mode::from_bits_truncate(0o755)).map_err(|e| failed(e.into()))?;
                    self.made.insert(identity(&stat));
                    next
                }
                Err(Errno::ENOTDIR | Errno::ELOOP) => {
                    let part = part.to_string_lossy().into_owned();
                    return Err(Error::Refused {
                        name: name.path(),
                        why: Why::NoDirectory { part },
                    });
                }
                Err(e) => return Err(failed(e.into())),
                Ok(next) => next,
            };
            self.here = Some(next);
            self.at.push(part.clone());
        }
        let dir = self.here.as_ref().unwrap_or(&self.root);
        dir.try_clone().map_err(failed)
    }

    /// Opens a directory by its name; nothing is made.
    ///
    /// # Errors
    /// As openat(2).
    pub fn find(&self, name: &Name) -> io::Result<OwnedFd> {
        let mut here = self.root.try_clone()?;
        for part in &name.parts {
            here = enter(here.as_fd(), part)?;
        }
        Ok(here)
    }

    /// Makes a directory, or takes the one that is there: `None` for one that this did not
    /// make, unless `all` are wanted. Tells whether it is new.
    ///
    /// # Errors
    /// As the file system's.
    pub fn directory(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &Name,
        all: bool,
    ) -> Result<Option<(OwnedFd, FileStat, bool)>, Error> {
        let path = name.path();
        let failed = |e: io::Error| io_at("make the directory", &path)(e);
        match look(dir, name.base()) {
            Ok(stat) if kind(&stat) == SFlag::S_IFDIR => {
                if !all && !self.is_ours(&stat) {
                    return Ok(None);
                }
                let opened = open_directory(dir, name.base(), &stat).map_err(failed)?;
                return Ok(Some((opened, stat, false)));
            }
            Ok(stat) if self.is_ours(&stat) => remove(dir, name.base()).map_err(failed)?,
            // The caller's own file, which no directory takes the place of.
            Ok(_) => {
                let part = name.base().to_string_lossy().into_owned();
                return Err(Error::Refused { name: path, why: Why::NoDirectory { part } });
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
        }
        let (opened, stat) = new_directory(dir, name.base()).map_err(failed)?;
        self.made.insert(identity(&stat));
        Ok(Some((opened, stat, true)))
    }

    /// Removes what has a name; a directory stays, and is an error.
    ///
    /// # Errors
    /// [`Why::OverDirectory`], and as the file system's.
    pub fn clear(&mut self, dir: BorrowedFd<'_>, name: &Name) -> Result<(), Error> {
        let failed = |e: io::Error| io_at("replace", &name.path())(e);
        match look(dir, name.base()) {
            Ok(stat) if kind(&stat) == SFlag::S_IFDIR => {
                Err(Error::Refused { name: name.path(), why: Why::OverDirectory })
            }
            Ok(stat) => {
                remove(dir, name.base()).map_err(failed)?;
                if stat.st_nlink <= 1 {
                    // Its inode may become another file's.
                    self.made.remove(&identity(&stat));
                }
                Ok(())
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(failed(e)),
        }
    }

    /// Makes a file, which nobody else has open; mode 0600.
    ///
    /// # Errors
    /// As openat(2).
    pub fn file(&mut self, dir: BorrowedFd<'_>, base: &OsStr) -> io::Result<(File, FileStat)> {
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(dir, base, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let stat = fstat(&file)?;
        self.made.insert(identity(&stat));
        Ok((file.into(), stat))
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// As symlinkat(2).
    pub fn symlink(&mut self, dir: BorrowedFd<'_>, base: &OsStr, to: &[u8]) -> io::Result<()> {
        symlinkat(OsStr::from_bytes(to), dir, base)?;
        self.remember(dir, base)
    }

    /// Remembers what was just made.
    pub fn remember(&mut self, dir: BorrowedFd<'_>, base: &OsStr) -> io::Result<()> {
        let stat = look(dir, base)?;
        self.made.insert(identity(&stat));
        Ok(())
    }

    /// Gives a file or link that this made another name.
    ///
    /// # Errors
    /// A refusal when it is anything else; as linkat(2).
    pub fn link(&mut self, dir: BorrowedFd<'_>, name: &Name, to: &Name) -> Result<(), Error> {
        let text = to.path().to_string_lossy().into_owned();
        let refuse = |why| {
            let why = Why::Link { to: text.clone(), why };
            Error::Refused { name: name.path(), why }
        };
        let nothing = || refuse("which is not among what was copied");
        let mut there = self.root.try_clone().map_err(io_at("open", &to.path()))?;
        for part in to.parents() {
            there = enter(there.as_fd(), part).map_err(|_| nothing())?;
        }
        let seen = look(there.as_fd(), to.base()).map_err(|_| nothing())?;
        if !self.is_ours(&seen) || kind(&seen) == SFlag::S_IFDIR {
            return Err(nothing());
        }
        let failed = |e: io::Error| io_at("link", &name.path())(e);
        if look(dir, name.base()).is_ok_and(|stat| identity(&stat) == identity(&seen)) {
            // It has that name already; its last one may be this.
            return Ok(());
        }
        self.clear(dir, name)?;
        linkat(there.as_fd(), to.base(), dir, name.base(), AtFlags::empty())
            .map_err(|e| failed(e.into()))?;
        let made = look(dir, name.base()).map_err(failed)?;
        if identity(&made) != identity(&seen) {
            // Another user of this host was quick.
            let _ = remove(dir, name.base());
            return Err(refuse("in whose place is something else now"));
        }
        Ok(())
    }
}

/// Opens a directory of a directory; a link to one is none.
fn enter(dir: BorrowedFd<'_>, part: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(dir, part, flags, Mode::empty())
}

/// Makes a directory with mode 0700 and opens it.
fn new_directory(dir: BorrowedFd<'_>, part: &OsStr) -> io::Result<(OwnedFd, FileStat)> {
    mkdirat(dir, part, Mode::S_IRWXU)?;
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let opened = openat(dir, part, flags, Mode::empty())?;
    let stat = fstat(&opened)?;
    // Whoever may write here could have put a directory of theirs in its place.
    match stat.st_uid == geteuid().as_raw() {
        true => Ok((opened, stat)),
        false => Err(io::Error::other("another user's directory has its name now")),
    }
}

fn remove(dir: BorrowedFd<'_>, base: &OsStr) -> io::Result<()> {
    Ok(unlinkat(dir, base, UnlinkatFlags::NoRemoveDir)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let parts = |name: &[u8]| Name::parse(name).map(|n| n.path());
        assert_eq!(parts(b"a/b").unwrap(), Path::new("a/b"));
        assert_eq!(parts(b"./a//b/./").unwrap(), Path::new("a/b"));
        assert_eq!(parts(b"a\x1b[2J\n").unwrap().as_os_str().len(), 6);
        for name in [&b"/a"[..], b"..", b"a/../b", b"../a", b"a/.."] {
            assert_eq!(parts(name), Err(Why::Leaves), "{name:?}");
        }
        for name in [&b""[..], b".", b"./", b"a\0b"] {
            assert_eq!(parts(name), Err(Why::Nameless), "{name:?}");
        }
        assert_eq!(parts(&[b'a'; 256]), Err(Why::LongName { bytes: 256 }));
        assert!(parts(&[b'a'; 255]).is_ok());
        assert!(parts("a/".repeat(MAX_DEPTH).as_bytes()).is_ok());
        assert_eq!(parts("a/".repeat(MAX_DEPTH + 1).as_bytes()), Err(Why::Deep));
    }
}
