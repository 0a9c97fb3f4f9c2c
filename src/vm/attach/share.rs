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
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::after;

use super::super::Vm;
use super::Error;
use crate::hypervisor::qemu::devices;
use crate::process::attendant::{Attendant, Role};

/// How long a virtiofsd may take to listen.
const LISTENING: Duration = Duration::from_secs(10);
/// Pause between looks for its socket.
const RETRY: Duration = Duration::from_millis(5);
/// The tag by which the guest finds the directory.
pub const TAG: &str = "vmcacheRoot";

/// A virtiofsd's arguments: those that the one in C and the one in Rust share.
pub fn virtiofsd(socket: &Path, directory: &Path, cache: &str) -> Vec<OsString> {
    let mut path = OsString::from("--socket-path=");
    path.push(socket);
    let mut source = OsString::from("source=");
    source.push(directory);
    vec![path, "-o".into(), source, "-o".into(), format!("cache={cache}").into()]
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
        let args = virtiofsd(&socket, &real, cache);
        let mut server = Attendant::start(Role::Virtiofsd, daemon, &args, leased)
            .map_err(|e| failed(crate::report::chain(&e)))?;
        listening(&mut server, &socket, LISTENING).map_err(failed)?;
        self.attendants.push(server);
        let all: Vec<_> = self.attendants.iter().map(Attendant::record).collect();
        self.record(|ledger| ledger.attendants = all).map_err(|e| failed(e.to_string()))?;
        let what = || format!("directory {}", directory.display());
        self.plug(&what, |qmp| devices::add_share(qmp, &socket, TAG)).map(|_| ())
    }
}
