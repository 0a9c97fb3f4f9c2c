//! The network namespace of all QEMUs of this process: it has nothing in it, and so no TCP,
//! no abstract Unix sockets and no netlink of the host.
//!
//! Invariants: it is made once, when the first VM is, and lives as long as this process and
//! its QEMUs. Taps, vhost devices and sockets come open, and belong to the namespace in which
//! they were opened.
//!
//! Who may not make one (an ordinary user) goes without: then the filter of system calls
//! ([`super::calls`]) stands alone, and `doctor` says so.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sched::{unshare, CloneFlags};

use crate::worker::Worker;

/// Until it is made.
const MAKING: Duration = Duration::from_secs(10);

/// That of this process, or why there is none.
static EMPTY: OnceLock<Result<Arc<OwnedFd>, String>> = OnceLock::new();

/// The empty namespace; `None` where this process may not make one.
pub fn empty() -> Option<Arc<OwnedFd>> {
    made().ok()
}

/// Why there is none; `None` when there is.
pub fn lacking() -> Option<String> {
    made().err()
}

fn made() -> Result<Arc<OwnedFd>, String> {
    EMPTY.get_or_init(|| make().map(Arc::new).map_err(|e| e.to_string())).clone()
}

/// By a thread of its own, which is in it and then ends.
fn make() -> io::Result<OwnedFd> {
    let thread = Worker::spawn("vmc-netns", || -> io::Result<OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    });
    thread.and_then(|t| t.join(MAKING)).map_err(|e| io::Error::other(e.to_string()))?
}
