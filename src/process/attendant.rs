//! Processes that stand beside a VM's QEMU and serve it alone: a proxy to its
//! agent, a vsock device, a file server.
//!
//! Invariants: whoever owns the VM owns its attendants; they are recorded in its
//! ledger by pid and start time, so that whoever finds the VM later finds them,
//! too; dropping one kills it unless it was let go.

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

use serde_derive::{Deserialize, Serialize};

use super::{Process, SpawnError};
use crate::sys::cage::Cage;

/// What it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Carries connections to an agent on a serial port.
    Proxy,
    /// Carries a guest's vsock.
    Vsock,
    /// Serves a directory to a guest.
    Virtiofsd,
    /// Carries a guest's packets, as a program of this host.
    Network,
}

impl Role {
    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Role::Proxy => "proxy",
            Role::Vsock => "vsock device",
            Role::Virtiofsd => "virtiofsd",
            Role::Network => "user network",
        }
    }
}

/// What a ledger says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What it is for.
    pub role: Role,
    /// Its pid.
    pub pid: i32,
    /// Its start time, clock ticks after boot.
    pub start_time: u64,
    /// Whose it has to be, when it is not root or the server's user who has named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
}

/// One that runs, or did.
#[derive(Debug)]
pub struct Attendant {
    role: Role,
    process: Process,
}

impl Attendant {
    /// Starts one, which inherits `inherited`. With `leased`, the kernel kills it when the calling thread ends.
    ///
    /// # Errors
    /// When the executable can not be started.
    pub fn start(
        role: Role,
        program: &Path,
        args: &[OsString],
        inherited: &[BorrowedFd<'_>],
        leased: bool,
        cage: Cage,
    ) -> Result<Attendant, SpawnError> {
        Ok(Attendant { role, process: Process::spawn(program, args, inherited, leased, cage)? })
    }

    /// Takes over one that a ledger names; `None` when it has ended, or is somebody else's now.
    pub fn adopt(record: &Record) -> Option<Attendant> {
        let process = Process::adopt_of(record.pid, record.start_time, record.uid).ok()?;
        Some(Attendant { role: record.role, process })
    }

    /// For the ledger.
    pub fn record(&self) -> Record {
        let (pid, start_time) = (self.process.pid(), self.process.start_time());
        Record { role: self.role, pid, start_time, uid: None }
    }

    /// What it is for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Whether it runs.
    pub fn alive(&self) -> bool {
        self.process.alive()
    }

    /// Another fd for it, to watch it.
    ///
    /// # Errors
    /// As dup(2).
    pub fn watch(&self) -> io::Result<OwnedFd> {
        self.process.watch()
    }

    /// Whether it bears such a name: an argument that is, or begins with it and a
    /// comma.
    pub fn is_named(&self, name: &str) -> bool {
        self.process.is_named(name)
    }

    /// How it ended and what it wrote last; only when it has ended.
    pub fn last_words(&mut self) -> String {
        self.process.last_words()
    }

    /// Gives ownership up: it runs on when this is dropped.
    pub fn let_go(self) {
        self.process.let_go();
    }
}
