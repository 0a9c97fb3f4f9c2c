//! A VM's directory: Kata's place and names, mode 0700. It is the server's: QEMU's user has
//! no right there, and who claims the VM may pass through to its sockets, which become
//! theirs, and can make nothing there.
//!
//! Invariants: whoever holds a [`VmDir`] owns the directory; dropping it removes
//! it unless it was let go; what could not be removed is remembered, and a server
//! tries again ([`remove_left`]); a store that others could put another one into the place of
//! is not used, and nothing of it removed. One without a word of whose it is bears its maker's pid
//! in its name ([`forsaken`]), and never a VM's.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::{open, renameat, AtFlags, OFlag};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::stat::{fstat, mkdirat, Mode, SFlag};
use nix::unistd::{fchownat, geteuid, Uid};

use super::{acl, clearing};
use crate::agent::address::VSOCK_DIR;
use crate::confine::cgroup;
use crate::hypervisor::qemu::argv::AGENT_PORTS;
use crate::sys::process::{start_time, state};
use crate::trusted_path::{check_existing, refused, Kind, TrustedPath};

/// Files shared with the guest, and mounts of Kata's runtimes below.
const SHARED: &str = crate::hypervisor::qemu::argv::SHARED;
/// Most that a guest can put there, MiB and files: Kata's clients put names and secrets there.
const SHARED_MIB: u32 = 64;
const SHARED_FILES: u32 = 16_384;
/// A root file system for one command, mounted in what the guest sees.
const ROOT: &str = "vmcache-root";
/// How the names of directories begin that are not a VM's yet: their makers' pid and start
/// time follow.
const NEW: &str = ".new-";

/// The directory of one VM.
#[derive(Debug)]
pub struct VmDir {
    path: PathBuf,
    /// Another one that goes with it.
    more: Option<PathBuf>,
    let_go: bool,
}

impl VmDir {
    /// Makes the directory of a new VM, and the store above it. It has its name once `write`
    /// has put down there whose it is.
    ///
    /// # Errors
    /// As mkdir(2) and rename(2), and those of `write`; no directory stays then.
    pub fn create(
        store: &Path,
        id: &str,
        write: impl FnOnce(&Path) -> io::Result<()>,
    ) -> io::Result<VmDir> {
        let place = make_store(store)?;
        let pid = std::process::id();
        let since = start_time(pid as i32).unwrap_or(0);
        let new = format!("{NEW}{pid}-{since}-{id}");
        mkdirat(&place, new.as_str(), Mode::S_IRWXU)?;
        let mut dir = VmDir { path: store.join(&new), more: None, let_go: false };
        write(&dir.path)?;
        renameat(&place, new.as_str(), &place, id)?;
        dir.path = store.join(id);
        Ok(dir)
    }

    /// Takes over a directory that another process made.
    pub fn adopt(path: &Path) -> VmDir {
        VmDir { path: path.to_path_buf(), more: None, let_go: false }
    }

    /// Another directory is the VM's, too.
    pub fn and(&mut self, more: &Path) {
        self.more = Some(more.to_path_buf());
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// QEMU's monitor.
    pub fn monitor(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    /// The guest's console.
    pub fn console(&self) -> PathBuf {
        self.path.join("console.sock")
    }

    /// Makes the directory that is shared with the guest.
    ///
    /// # Errors
    /// As mkdir(2) and mount(2).
    pub fn share(&self) -> io::Result<()> {
        let shared = self.path.join(SHARED);
        DirBuilder::new().mode(0o700).create(&shared)?;
        // What the guest writes there takes no more of the host's memory than this, and is no
        // device or program of its.
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        let size = format!("mode=0700,size={SHARED_MIB}m,nr_inodes={SHARED_FILES}");
        match mount(Some(SHARED), &shared, Some("tmpfs"), flags, Some(size.as_str())) {
            // An ordinary user's: what is there is its user's, and on its store.
            Err(Errno::EPERM) => Ok(()),
            done => Ok(done?),
        }
    }

    /// Where a root file system is mounted for the guest to see, in the directory
    /// that QEMU itself shares with it; goes with the VM.
    pub fn root(&self) -> PathBuf {
        self.path.join(SHARED).join(ROOT)
    }

    /// Gives the sockets to the user who claims the VM, who may pass through the directory
    /// from now on, and read the locks and the ledger. That stays the server's, so that nothing
    /// in it is ever replaced or filled by others.
    ///
    /// # Errors
    /// As fchownat(2) and setxattr(2).
    pub fn hand_to(&self, uid: u32) -> io::Result<()> {
        for port in 0..AGENT_PORTS {
            let lock = self.path.join(format!("agent.{port}.lock"));
            let mut options = fs::OpenOptions::new();
            let file = options.append(true).create(true).mode(0o644).open(lock)?;
            // Whatever the server's umask.
            file.set_permissions(fs::Permissions::from_mode(0o644))?;
        }
        let beside = self.path.join(VSOCK_DIR);
        let beside = fs::symlink_metadata(&beside).is_ok_and(|m| m.is_dir()).then_some(beside);
        for dir in [&self.path].into_iter().chain(&beside) {
            for entry in fs::read_dir(dir)?.flatten() {
                if entry.file_type().is_ok_and(|t| t.is_socket()) {
                    give_socket(&entry.path(), uid)?;
                }
            }
            acl::admit(dir, uid)?;
        }
        Ok(())
    }

    /// Gives ownership up: the directory stays when this is dropped.
    pub fn let_go(mut self) {
        self.let_go = true;
    }
}

/// Gives a socket to a user; nothing else that may have taken its name.
fn give_socket(path: &Path, uid: u32) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let socket = open(path, flags, Mode::empty())?;
    let seen = fstat(&socket)?;
    if SFlag::from_bits_truncate(seen.st_mode) & SFlag::S_IFMT != SFlag::S_IFSOCK
        || seen.st_nlink != 1
    {
        return Err(io::Error::other(format!("{} is no socket any more", path.display())));
    }
    Ok(fchownat(&socket, c"", Some(Uid::from_raw(uid)), None, AtFlags::AT_EMPTY_PATH)?)
}

/// Makes a store, or what of it is missing.
///
/// # Errors
/// When others could put another one, or another VM's directory, into its place; as mkdir(2).
pub fn make_store(store: &Path) -> io::Result<TrustedPath> {
    // Its VMs' users pass through it.
    TrustedPath::make_directory(store, 0o711, Kind::SharedDirectory)
}

/// Directories in a store whose makers were killed before these had their names.
pub fn forsaken(store: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(store).into_iter().flatten().flatten();
    let gone = |name: &str| {
        let mut words = name.strip_prefix(NEW)?.splitn(3, '-');
        let (pid, since) = (words.next()?.parse().ok()?, words.next()?.parse::<u64>().ok()?);
        Some(start_time(pid) != Some(since) || state(pid) == Some('Z'))
    };
    let names = entries.filter(|e| e.file_name().to_str().and_then(gone) == Some(true));
    // Where others share the store, theirs are none of a server's.
    let ours = |p: &PathBuf| check_existing(p, Kind::SharedDirectory).is_ok();
    names.map(|e| e.path()).filter(ours).collect()
}

/// A mount below a directory; also when it can not be known that there is none.
fn mounted_below(path: &Path, but: &Path) -> Option<PathBuf> {
    let real = match path.canonicalize() {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return None,
        Err(_) => return Some(path.to_path_buf()),
    };
    match fs::read_to_string("/proc/self/mounts") {
        Ok(table) => table
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            // The table writes a blank so.
            .map(|place| PathBuf::from(place.replace("\\040", " ")))
            .find(|place| place.starts_with(&real) && place != but),
        Err(_) => Some(real),
    }
}

/// Directories that could not be removed: their file system takes nothing just now.
static LEFT: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// Most of them that are remembered; those beyond are the next server's to sweep.
const MAX_LEFT: usize = 4096;

fn left() -> MutexGuard<'static, Vec<PathBuf>> {
    LEFT.lock().unwrap_or_else(|e| e.into_inner())
}

/// Whether there are directories of VMs that are gone which could not be removed.
pub fn any_left() -> bool {
    !left().is_empty()
}

/// Tries once more to remove them.
pub fn remove_left() {
    let all = std::mem::take(&mut *left());
    // What can not be removed now, either, is remembered again.
    all.iter().for_each(|path| drop(VmDir::adopt(path)));
}

fn remember(path: &Path) {
    let mut left = left();
    if left.len() < MAX_LEFT && !left.iter().any(|p| p == path) {
        left.push(path.to_path_buf());
    }
}

/// There was nothing to remove.
fn gone(e: io::Error) -> io::Result<()> {
    match e.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(e),
    }
}

impl VmDir {
    /// Another user's server removes what this process may not.
    fn servers(&self, e: io::Error) -> io::Result<()> {
        let store = self.path.parent().and_then(|p| fs::metadata(p).ok());
        let own = store.is_none_or(|m| m.uid() == geteuid().as_raw()) || geteuid().is_root();
        if e.kind() != io::ErrorKind::PermissionDenied || own {
            return Err(e);
        }
        log::debug!("the server removes {}: {e}", self.path.display());
        Ok(())
    }
}

impl Drop for VmDir {
    fn drop(&mut self) {
        if self.let_go {
            return;
        }
        // As root, nothing in another user's store: that is its server's to remove.
        if let Err(e) = check_existing(&self.path, Kind::SharedDirectory) {
            if refused(&e).is_some() {
                log::warn!("the VM directory {} is left: {e}", self.path.display());
                return;
            }
        }
        // Ours, and only one directory of the host seen a second time. What the guest
        // may have put in its place is not followed.
        let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
        let _ = umount2(&self.root(), flags);
        // A runtime may have left a root file system mounted there: what is removed
        // then is somebody's files.
        let all = self.more.iter().chain([&self.path]);
        let shared = self.path.canonicalize().unwrap_or_default().join(SHARED);
        let place = all.into_iter().find_map(|dir| mounted_below(dir, &shared));
        if place.is_none() {
            let _ = umount2(&shared, flags);
        }
        if let Some(place) = place {
            log::error!(
                "the VM directory {} is left: {} is mounted in it",
                self.path.display(),
                place.display()
            );
            return remember(&self.path);
        }
        // Of a QEMU that is still ending: tried again.
        let removed = cgroup::remove(&self.path);
        if let Err(e) = removed.or_else(|e| self.servers(e)) {
            log::warn!("remove the cgroup of the VM directory {}: {e}", self.path.display());
            return remember(&self.path);
        }
        for path in [&self.path].into_iter().chain(&self.more) {
            if let Err(e) = clearing::remove(path).or_else(gone).or_else(|e| self.servers(e)) {
                // Of one that holds very many files, some are gone; the rest is the next try's.
                log::warn!("remove the VM directory {}: {e}", path.display());
                remember(path);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_without_a_name_is_forsaken_once_its_maker_is_gone() {
        let store = std::env::temp_dir().join(format!("vmcache-forsaken-{}", std::process::id()));
        let dir = VmDir::create(&store, "one", |dir| {
            assert!(forsaken(&store).is_empty(), "its maker is here");
            fs::write(dir.join("vm.json"), "")
        });
        let dir = dir.unwrap();
        assert_eq!(dir.path(), store.join("one"));
        assert!(dir.path().join("vm.json").exists());
        let full = || Err(io::Error::from(io::ErrorKind::StorageFull));
        assert!(VmDir::create(&store, "two", |_| full()).is_err());
        // No process is that old, nor has that pid.
        for gone in [format!(".new-{}-0-three", std::process::id()), ".new-0-7-four".into()] {
            fs::create_dir(store.join(gone)).unwrap();
        }
        let others = [".new-", ".new-x-7-five", ".newer-0-7-six"];
        others.iter().for_each(|name| fs::create_dir(store.join(name)).unwrap());
        let found = forsaken(&store);
        assert_eq!(found.len(), 2, "{found:?}");
        found.iter().for_each(|path| drop(VmDir::adopt(path)));
        drop(dir);
        let left: Vec<_> = fs::read_dir(&store).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), others.len(), "{left:?}");
        fs::remove_dir_all(&store).unwrap();
    }
}
