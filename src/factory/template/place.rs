//! Where a template lives: a private directory in memory, with room for it.
//!
//! Invariants: a tmpfs is mounted only where there is none, so never a second
//! one on top of a busy one; it is found too small before anything is booted;
//! whoever changes what is there holds the lock.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::statfs::{fstatfs, FsType, HUGETLBFS_MAGIC, TMPFS_MAGIC};
use nix::sys::statvfs::statvfs;
use nix::unistd::geteuid;

/// Name by which a tmpfs of ours is known in the mount table.
const SOURCE: &str = "vmcache-template";
/// What a template needs beside its memory: device state and manifest, MiB.
const BESIDE: u64 = 16;
/// The lock's name.
const LOCK: &str = "lock";

/// Why a template can not live there.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The file system refused.
    Io { during: &'static str, path: PathBuf, source: io::Error },
    /// It is on a disk, and only root can mount.
    NotMemory { path: PathBuf },
    /// Others could change it.
    Shared { path: PathBuf, uid: u32, mode: u32 },
    /// There is not enough room.
    Full { path: PathBuf, needed: u64, free: u64 },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Io { during, path, .. } => {
                write!(f, "{during} template_path {}", path.display())
            }
            Error::NotMemory { path } => write!(
                f,
                "template_path {} is not in memory: choose a directory below /dev/shm, or run as \
                 root, who can mount a tmpfs there",
                path.display()
            ),
            Error::Shared { path, uid, mode } => write!(
                f,
                "template_path {} belongs to uid {uid} with mode {mode:o}: it must be this user's, \
                 and nobody else may write there",
                path.display()
            ),
            Error::Full { path, needed, free } => write!(
                f,
                "template_path {} has room for {free} MiB, a template needs {needed} MiB: make \
                 that tmpfs larger (`mount -o remount,size=…`), or default_memory smaller",
                path.display()
            ),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// The directory, locked against other processes; unlocked when dropped.
#[derive(Debug)]
pub struct Place {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Place {
    /// Makes the directory for a template of so much memory, in MiB, mounts a
    /// tmpfs when it is not in memory, and waits for the lock.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(path: &Path, memory: u32) -> Result<Place, Error> {
        let failed = |during, source: io::Error| Error::Io { during, path: path.into(), source };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|e| failed("make", e))?;
        if !in_memory(path).map_err(|e| failed("look at", e))? {
            if !geteuid().is_root() {
                return Err(Error::NotMemory { path: path.into() });
            }
            let size = format!("mode=0700,size={}M", u64::from(memory) + BESIDE);
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some(SOURCE), path, Some("tmpfs"), flags, Some(size.as_str()))
                .map_err(|e| failed("mount a tmpfs on", e.into()))?;
        }
        Place::lock(path)
    }

    /// The same where there is a directory already; nothing is mounted.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn lock(path: &Path) -> Result<Place, Error> {
        let failed = |during, source: io::Error| Error::Io { during, path: path.into(), source };
        let meta = fs::symlink_metadata(path).map_err(|e| failed("look at", e))?;
        if meta.uid() != geteuid().as_raw() || meta.mode() & 0o022 != 0 {
            let (uid, mode) = (meta.uid(), meta.mode() & 0o7777);
            return Err(Error::Shared { path: path.into(), uid, mode });
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK))
            .map_err(|e| failed("lock", e))?;
        let lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, e)| failed("lock", e.into()))?;
        Ok(Place { path: path.to_path_buf(), _lock: lock })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that there is room for so much memory, in MiB; a tmpfs of ours is
    /// made larger when it has to be.
    ///
    /// # Errors
    /// [`Error::Full`] with the size needed.
    pub fn room(&self, memory: u32) -> Result<(), Error> {
        let needed = u64::from(memory) + BESIDE;
        let failed =
            |during, e: nix::Error| Error::Io { during, path: self.path.clone(), source: e.into() };
        let look = || statvfs(&self.path).map_err(|e| failed("look at", e));
        let mib = |blocks: u64, size: u64| blocks.saturating_mul(size) >> 20;
        let mut there = look()?;
        let free = mib(there.blocks_available(), there.fragment_size());
        if free < needed && mounted_by_us(&self.path) {
            let all = mib(there.blocks(), there.fragment_size());
            let size = format!("size={}M", all + (needed - free));
            let none = None::<&str>;
            mount(none, &self.path, none, MsFlags::MS_REMOUNT, Some(size.as_str()))
                .map_err(|e| failed("enlarge", e))?;
            there = look()?;
        }
        let free = mib(there.blocks_available(), there.fragment_size());
        match free < needed {
            true => Err(Error::Full { path: self.path.clone(), needed, free }),
            false => Ok(()),
        }
    }

    /// Removes the directory and unmounts a tmpfs of ours, at once for everybody
    /// who looks; VMs that use the memory keep it until they end.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn remove(self) -> Result<(), Error> {
        let failed =
            |during, e: io::Error| Error::Io { during, path: self.path.clone(), source: e };
        let ours = mounted_by_us(&self.path);
        let _ = fs::remove_file(self.path.join(LOCK));
        if ours {
            umount2(&self.path, MntFlags::MNT_DETACH).map_err(|e| failed("unmount", e.into()))?;
        }
        match fs::remove_dir(&self.path) {
            // Something of somebody else's is there.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            other => other.map_err(|e| failed("remove", e)),
        }
    }
}

/// Whether files there are in memory.
fn in_memory(path: &Path) -> io::Result<bool> {
    // The libc that this is built with may lack the name.
    const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
    let kind = fstatfs(File::open(path)?)?.filesystem_type();
    Ok([TMPFS_MAGIC, HUGETLBFS_MAGIC, RAMFS_MAGIC].contains(&kind))
}

/// Whether a tmpfs of ours is mounted just there.
fn mounted_by_us(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // A path with blanks is written with octal escapes; such a one is not found,
    // and then neither enlarged nor unmounted.
    let path = path.to_string_lossy();
    table.lines().any(|line| {
        let mut words = line.split(' ');
        words.next() == Some(SOURCE) && words.next() == Some(&path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_private_in_memory_and_large_enough() {
        let path = PathBuf::from(format!("/dev/shm/vmcache-place-{}", std::process::id()));
        let place = Place::open(&path, 1).unwrap();
        place.room(1).unwrap();
        let e = place.room(u32::MAX).unwrap_err().to_string();
        assert!(e.contains(&format!("needs {} MiB", u64::from(u32::MAX) + BESIDE)), "{e}");
        drop(place);
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(Place::lock(&path), Err(Error::Shared { mode: 0o777, .. })));
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        Place::lock(&path).unwrap().remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn the_file_systems_kinds_are_known() {
        assert!(in_memory(Path::new("/dev/shm")).unwrap());
        assert!(!in_memory(Path::new("/proc")).unwrap());
    }
}
