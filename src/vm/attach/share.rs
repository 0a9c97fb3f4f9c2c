//! A directory of the host that a running VM gets to see. With `shared_fs =
//! "virtio-fs"`, a virtiofsd serves it, and the VM gets a device for it; with
//! `"virtio-9p"`, for which QEMU takes no further device while it runs, it is
//! mounted in the directory that QEMU shares already.
//!
//! Invariants: a virtiofsd is an attendant of the VM, confined by itself to that
//! directory (its namespaces and system call filter), and goes with the VM, as the
//! mount does; the directory is read-only, without device files, for who serves it, whatever
//! the guest asks for; who may make no such mount shares nothing.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::after;
use nix::errno::Errno;
use nix::mount::{umount2, MntFlags};
use nix::sched::{setns, unshare, CloneFlags};

use super::super::Vm;
use super::Error;
use crate::confine::mounts::covering;
use crate::hypervisor::qemu::devices;
use crate::process::attendant::{Attendant, Role};
use crate::sys::cage::Cage;
use crate::sys::mount::{put, read_only, Denies};
use crate::worker::Worker;

/// Pause between looks for its socket.
const RETRY: Duration = Duration::from_millis(5);
/// Until a mount is in its place.
const MOUNTING: Duration = Duration::from_secs(10);
/// The tag by which the guest finds the directory.
pub const TAG: &str = "vmcacheRoot";

/// Starts a virtiofsd, by what the one in C and the one in Rust share. It gets a
/// socket that listens already, so nobody waits for it, and the one in C, which else
/// leaves a file for each of its sockets, none.
///
/// # Errors
/// A sentence.
pub fn virtiofsd(
    program: &Path,
    socket: &Path,
    directory: &Path,
    cache: &str,
    leased: bool,
    mounts: Option<OwnedFd>,
) -> Result<Attendant, String> {
    let listener =
        UnixListener::bind(socket).map_err(|e| format!("listen on {}: {e}", socket.display()))?;
    let mut source = OsString::from("source=");
    source.push(directory);
    let args = [
        format!("--fd={}", listener.as_raw_fd()).into(),
        "-o".into(),
        source,
        "-o".into(),
        format!("cache={cache}").into(),
    ];
    let cage = Cage { mounts, ..Cage::default() };
    Attendant::start(Role::Virtiofsd, program, &args, &[listener.as_fd()], leased, cage)
        .map_err(|e| crate::report::chain(&e))
}

/// Waits for a process's socket. To connect would be to be its one client.
///
/// # Errors
/// A sentence.
pub fn listening(attendant: &mut Attendant, socket: &Path, within: Duration) -> Result<(), String> {
    let deadline = Instant::now() + within;
    while !socket.metadata().is_ok_and(|m| m.file_type().is_socket()) {
        let name = attendant.role().name();
        if !attendant.alive() {
            return Err(format!("the {name} ended at once, {}", attendant.last_words()));
        }
        if Instant::now() >= deadline {
            return Err(format!("the {name} did not listen on {}", socket.display()));
        }
        let _ = after(RETRY).recv();
    }
    Ok(())
}

impl Vm {
    /// Lets the guest see a directory, under [`TAG`], read-only and without what is mounted in
    /// it; `leased`, its server ends with the calling thread. False where this process may make
    /// no mount for that.
    ///
    /// # Errors
    /// [`Error::Share`] and [`Error::Device`]; the VM must then be destroyed.
    pub fn share(
        &mut self,
        directory: &Path,
        daemon: &Path,
        cache: &str,
        leased: bool,
    ) -> Result<bool, Error> {
        let failed = |why: String| Error::Share { path: directory.to_path_buf(), why };
        let socket: PathBuf = self.dir.path().join("root.sock");
        let real = directory.canonicalize().map_err(|e| failed(e.to_string()))?;
        let denies =
            Denies { writes: true, devices: true, set_ids: true, programs: true, whole: false };
        let seen = match covering(&real, denies) {
            Ok(seen) => seen,
            Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                Errno::EPERM | Errno::ENOSYS => return Ok(false),
                _ => return Err(failed(format!("mount it for virtiofsd: {e}"))),
            },
        };
        let server = virtiofsd(daemon, &socket, &real, cache, leased, Some(seen));
        let server = server.map_err(failed)?;
        let record = server.record();
        self.attendants.push(server);
        self.ledger.serve(self.dir.path(), record).map_err(|e| failed(e.to_string()))?;
        let what = || format!("directory {}", directory.display());
        let connected = UnixStream::connect(&socket).map_err(|e| failed(e.to_string()))?;
        self.plug(&what, |qmp| devices::add_share(qmp, connected.as_fd(), TAG)).map(|_| true)
    }

    /// Lets the guest see a directory in the one that it has by 9p, read-only and
    /// without what is mounted in it: where, below that; `None` where this process
    /// may not mount, or QEMU would not see it.
    ///
    /// # Errors
    /// [`Error::Share`]; the VM is as it was.
    pub fn bind_share(&mut self, directory: &Path) -> Result<Option<String>, Error> {
        let failed = |why: String| Error::Share { path: directory.to_path_buf(), why };
        let place = self.dir.root();
        let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
        fs::create_dir(&place).map_err(|e| failed(format!("make {}: {e}", place.display())))?;
        // Read-only before it is there, so that whoever removes this VM removes no file.
        let bound = read_only(directory).and_then(|tree| self.mount_for_qemu(tree, &place));
        match bound.map_err(|e| (Errno::from_raw(e.raw_os_error().unwrap_or(0)), e)) {
            Ok(()) => {}
            Err((Errno::EPERM | Errno::ENOSYS, _)) => return Ok(None),
            Err((_, e)) => return Err(failed(format!("mount it on {}: {e}", place.display()))),
        }
        let undo = || umount2(&place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        // QEMU may live among mounts that this process may not enter.
        let qemus = Path::new("/proc").join(self.pid().to_string()).join("root");
        let seen = qemus.join(place.strip_prefix("/").unwrap_or(&place));
        let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
        let both = (fs::metadata(seen), fs::metadata(directory));
        if !matches!(&both, (Ok(a), Ok(b)) if same(a, b)) {
            let _ = undo();
            return Ok(None);
        }
        Ok(Some(name))
    }

    /// Puts a mount where QEMU sees it: among its own mounts, where it has some.
    fn mount_for_qemu(&self, tree: OwnedFd, place: &Path) -> io::Result<()> {
        let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt"));
        let pid = self.pid().to_string();
        if space(&pid)? == space("self")? {
            return put(tree.as_fd(), place);
        }
        let (theirs, place) = (File::open(format!("/proc/{pid}/ns/mnt"))?, place.to_path_buf());
        // Among them for the time of one mount: a thread of its own, which then ends.
        let thread = Worker::spawn("vmc-mounts", move || -> io::Result<()> {
            unshare(CloneFlags::CLONE_FS)?;
            setns(theirs, CloneFlags::CLONE_NEWNS)?;
            put(tree.as_fd(), &place)
        });
        thread.and_then(|t| t.join(MOUNTING)).map_err(io::Error::other)?
    }
}
