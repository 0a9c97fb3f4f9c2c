//! A directory of the host that a running VM gets to see: a virtiofsd serves it,
//! and the VM gets a device for it.
//!
//! Invariants: the virtiofsd is an attendant of the VM, confined by itself to that
//! directory (its namespaces and system call filter), and goes with the VM; QEMU's
//! memory must be shared with it, so this is for VMs made with `shared_fs =
//! "virtio-fs"` only.
//!
//! Does not: keep the guest from writing there: who mounts it in the guest does.

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::after;

use super::super::Vm;
use super::Error;
use crate::hypervisor::qemu::devices;
use crate::process::attendant::{Attendant, Role};

/// Pause between looks for its socket.
const RETRY: Duration = Duration::from_millis(5);
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
    Attendant::start(Role::Virtiofsd, program, &args, &[listener.as_fd()], leased)
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
    /// Lets the guest see a directory, under [`TAG`]; `leased`, its server ends with
    /// the calling thread.
    ///
    /// # Errors
    /// [`Error::Share`] and [`Error::Device`]; the VM must then be destroyed.
    pub fn share(
        &mut self,
        directory: &Path,
        daemon: &Path,
        cache: &str,
        leased: bool,
    ) -> Result<(), Error> {
        let failed = |why: String| Error::Share { path: directory.to_path_buf(), why };
        let socket: PathBuf = self.dir.path().join("root.sock");
        let real = directory.canonicalize().map_err(|e| failed(e.to_string()))?;
        let server = virtiofsd(daemon, &socket, &real, cache, leased).map_err(failed)?;
        let record = server.record();
        self.attendants.push(server);
        self.ledger.serve(self.dir.path(), record).map_err(|e| failed(e.to_string()))?;
        let what = || format!("directory {}", directory.display());
        self.plug(&what, |qmp| devices::add_share(qmp, &socket, TAG)).map(|_| ())
    }
}
