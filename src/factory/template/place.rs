//! Where a template lives: a private directory in memory, with room for it.
//!
//! Invariants: nobody but root and this process's user can put another directory into its place,
//! or files into it ([`crate::trusted_path`]); a tmpfs is mounted only where none is mounted, by one process at
//! a time, so never a second one on top of a busy one; it is found too small
//! before anything is booted; whoever changes what is there holds the lock; no
//! wait for that is endless.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::after;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::statfs::{fstatfs, TMPFS_MAGIC};
use nix::sys::statvfs::statvfs;
use nix::unistd::geteuid;

use crate::trusted_path::{Destination, Kind, TrustedPath};

/// Name by which a tmpfs of ours is known in the mount table.
const SOURCE: &str = "vmcache-template";
/// What a template needs beside its memory: device state and manifest, MiB.
const BESIDE: u64 = 16;
/// The lock's name.
const LOCK: &str = "lock";
/// Pause between tries to have it.
const RETRY: Duration = Duration::from_millis(20);
/// How a tmpfs of ours is mounted.
const FLAGS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Why a template can not live there.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The file system refused.
    Io { during: &'static str, path: PathBuf, source: io::Error },
    /// It is on a disk, and only root can mount.
    NotMemory { path: PathBuf },
    /// There is not enough room.
    Full { path: PathBuf, needed: u64, free: u64 },
    /// Another process works on it for too long.
    Busy { path: PathBuf, holder: String, after: Duration },
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
            Error::Full { path, needed, free } => write!(
                f,
                "template_path {} has room for {free} MiB, a template needs {needed} MiB (an older \
                 one keeps its room until its clones have ended): make that tmpfs larger \
                 (`mount -o remount,size=…`), or default_memory smaller",
                path.display()
            ),
            Error::Busy { path, holder, after } => write!(
                f,
                "template_path {} has been locked by {holder} for {:.0} s: end it, or give it \
                 another template_path",
                path.display(),
                after.as_secs_f64()
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
    /// Makes the directory for a template of so much memory, in MiB, and waits
    /// for the lock, but not for longer than `within`.
    ///
    /// For root, a tmpfs of its own is mounted there: what else fills a shared
    /// one would end clones that touch memory nobody has touched before.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(path: &Path, memory: u32, within: Duration) -> Result<Place, Error> {
        let failed = |during, source: io::Error| Error::Io { during, path: path.into(), source };
        let made = TrustedPath::make_directory(path, 0o700, Kind::Directory)
            .map_err(|e| failed("make", e))?;
        // As the mount table has it.
        let path = made.path().to_path_buf();
        // Whoever mounts has the lock of what is below the mount.
        let below = made.open().map_err(|e| failed("open", e))?;
        let below = locked(below, &path, within)?;
        let in_memory = in_memory(&path).map_err(|e| failed("look at", e))?;
        // One that is mounted there is ours, or an administrator's for this.
        if !(in_memory && is_mount(&path)) {
            let mounted = match geteuid().is_root() {
                true => mount_own(&path, memory),
                false => Err(Errno::EPERM),
            };
            match mounted {
                Ok(()) => {}
                Err(Errno::EPERM) if in_memory => {}
                Err(Errno::EPERM) => return Err(Error::NotMemory { path }),
                Err(e) => return Err(failed("mount a tmpfs on", e.into())),
            }
        }
        drop(below);
        Place::lock(&path, within)
    }

    /// The same where there is a directory already; nothing is mounted.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn lock(path: &Path, within: Duration) -> Result<Place, Error> {
        let failed = |during, source: io::Error| Error::Io { during, path: path.into(), source };
        let found = TrustedPath::directory(path).map_err(|e| failed("find", e))?;
        let path = found.path().to_path_buf();
        let name = path.join(LOCK);
        loop {
            let file = Destination::of(&name).and_then(|lock| lock.open_or_create(0o600));
            let file = file.map_err(|e| failed("lock", e))?;
            let lock = locked(file, &name, within)?;
            // Removed by the one who had it, while this one waited.
            let (held, named) = (lock.metadata(), fs::metadata(&name));
            let same =
                |h: &fs::Metadata, n: &fs::Metadata| (h.dev(), h.ino()) == (n.dev(), n.ino());
            if held.is_ok_and(|h| named.is_ok_and(|n| same(&h, &n))) {
                // For the one who waits in vain.
                let _ = lock.set_len(0);
                let _ = lock.write_all_at(std::process::id().to_string().as_bytes(), 0);
                return Ok(Place { path, _lock: lock });
            }
        }
    }

    /// Its path, without symbolic links.
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
            mount(none, &self.path, none, FLAGS | MsFlags::MS_REMOUNT, Some(size.as_str()))
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
        match ours {
            // The lock goes with it.
            true => umount2(&self.path, MntFlags::MNT_DETACH)
                .map_err(|e| failed("unmount", e.into()))?,
            false => drop(fs::remove_file(self.path.join(LOCK))),
        }
        match fs::remove_dir(&self.path) {
            // Something of somebody else's is there, or it is an administrator's mount.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => Ok(()),
            other => other.map_err(|e| failed("remove", e)),
        }
    }
}

/// Waits for a lock.
fn locked(mut file: File, path: &Path, within: Duration) -> Result<Flock<File>, Error> {
    let deadline = Instant::now() + within;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < deadline => {
                file = back;
            }
            Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) => {
                let mut holder = String::new();
                let _ = back.take(16).read_to_string(&mut holder);
                let holder = match holder.trim() {
                    "" => "another process".into(),
                    pid => format!("pid {pid}"),
                };
                return Err(Error::Busy { path: path.into(), holder, after: within });
            }
            Err((_, e)) => {
                return Err(Error::Io { during: "lock", path: path.into(), source: e.into() })
            }
        }
        // flock has no wait with a deadline.
        let _ = after(RETRY).recv();
    }
}

fn mount_own(path: &Path, memory: u32) -> nix::Result<()> {
    let size = format!("mode=0700,size={}M", u64::from(memory) + BESIDE);
    mount(Some(SOURCE), path, Some("tmpfs"), FLAGS, Some(size.as_str()))
}

/// Whether files there are in memory.
fn in_memory(path: &Path) -> io::Result<bool> {
    Ok(fstatfs(File::open(path)?)?.filesystem_type() == TMPFS_MAGIC)
}

/// Whether something is mounted just there.
fn is_mount(path: &Path) -> bool {
    let device = |p: &Path| fs::metadata(p).map(|m| m.dev()).ok();
    path.parent().is_some_and(|parent| device(parent) != device(path))
}

/// Whether a tmpfs of ours is mounted just there; the path without links.
fn mounted_by_us(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let path = as_in_table(path);
    table.lines().any(|line| {
        let mut words = line.split(' ');
        words.next() == Some(SOURCE) && words.next() == Some(&path)
    })
}

/// A path as the mount table has it, see proc(5): what would end a word is octal.
fn as_in_table(path: &Path) -> String {
    let escaped = |c: char| match c {
        ' ' | '\t' | '\n' | '\\' => format!("\\{:03o}", c as u32),
        other => other.to_string(),
    };
    path.to_string_lossy().chars().map(escaped).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn a_place_is_private_in_memory_and_large_enough() {
        let path = PathBuf::from(format!("/dev/shm/vmcache-place-{}", std::process::id()));
        let place = Place::open(&path, 1, SOON).unwrap();
        place.room(1).unwrap();
        assert_eq!(mounted_by_us(&path), geteuid().is_root());
        drop(place);
        let chmod = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        chmod(0o777);
        let e = crate::report::chain(&Place::lock(&path, SOON).unwrap_err());
        assert!(e.contains("is writable for everybody (mode 0777)"), "{e}");
        chmod(0o700);
        let place = Place::lock(&path, SOON).unwrap();
        let e = Place::lock(&path, Duration::ZERO).unwrap_err().to_string();
        assert!(e.contains(&format!("locked by pid {}", std::process::id())), "{e}");
        place.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_lock_that_was_removed_while_one_waited_is_taken_anew() {
        let path = PathBuf::from(format!("/dev/shm/vmcache-lock-{}", std::process::id()));
        let first = Place::open(&path, 1, SOON).unwrap();
        let waiting = {
            let path = path.clone();
            crate::worker::Worker::spawn("vmc-waits", move || Place::lock(&path, SOON)).unwrap()
        };
        let _ = after(Duration::from_millis(100)).recv();
        fs::remove_file(path.join(LOCK)).unwrap();
        drop(first);
        let second = waiting.join(SOON).unwrap().unwrap();
        assert!(matches!(Place::lock(&path, Duration::ZERO), Err(Error::Busy { .. })));
        second.remove().unwrap();
    }

    #[test]
    fn the_file_systems_kinds_are_known() {
        assert!(in_memory(Path::new("/dev/shm")).unwrap());
        assert!(!in_memory(Path::new("/proc")).unwrap());
        assert_eq!(as_in_table(Path::new("/a b\\c")), "/a\\040b\\134c");
    }
}
