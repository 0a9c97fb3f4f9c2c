//! A virtual machine and its life.
//!
//! ```text
//!            boot.rs                                 (the pool)      (the client)
//! Spawned ─► Connected ─► Booted ─► Ready = a Vm ─► Handing ─► Handed
//!    └───────────┴───────────┴────────┴──────────────┴─► destroyed when dropped
//! ```
//!
//! Invariants: a [`Vm`] has one owner, whoever holds the value; it moves, it is
//! never shared. Dropping it kills QEMU and removes its directory, so every
//! error path cleans up; only [`Vm::let_go`] leaves it running.

mod acl;
pub mod attach;
pub mod birth;
pub mod boot;
mod clearing;
pub mod config;
mod console;
pub mod dir;
pub mod identity;
pub mod ledger;
pub mod notes;
pub mod private;
pub mod resize;
pub mod shape;
pub mod wire;

use std::error;
use std::fmt;
use std::path::Path;
use std::time::Duration;

pub use birth::Birth;
pub use config::VmConfig;
use dir::VmDir;
use ledger::Ledger;

use crate::agent::address::Address;
use crate::agent::{self, Agent};
use crate::confine::cgroup;
use crate::hypervisor::qemu::argv::VSOCK;
use crate::hypervisor::qemu::qmp::{self, Qmp, QUICK};
use crate::hypervisor::qemu::{hotplug, virtio};
use crate::process::attendant::{Attendant, Role};
use crate::process::Process;

/// Until a VM that ran before answers again after it was resumed.
pub const ANSWER: Duration = Duration::from_secs(20);

/// Until the monitor of one that waits greets.
const LOOK: Duration = Duration::from_secs(5);

/// Why something could not be done with a VM.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// Its QEMU is gone.
    Dead { id: String, pid: i32 },
    /// QEMU did not do what it was asked.
    Monitor { id: String, source: qmp::Error },
    /// The agent did not.
    Agent { id: String, source: agent::Error },
    /// It did not get what was to be added.
    Hotplug { id: String, source: Box<hotplug::Error> },
    /// Its ledger could not be written.
    Record { id: String, source: std::io::Error },
    /// It could not be taken over from what came over the wire.
    Adopt { id: String, why: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Dead { id, pid } => {
                write!(f, "VM {id} is dead: its QEMU, pid {pid}, or what serves it has ended")
            }
            Error::Monitor { id, .. } => write!(f, "control VM {id}"),
            Error::Agent { id, .. } => write!(f, "talk to VM {id}"),
            Error::Hotplug { id, .. } => write!(f, "add to VM {id}"),
            Error::Record { id, .. } => write!(f, "write the ledger of VM {id}"),
            Error::Adopt { id, why } => write!(f, "take VM {id} over: {why}"),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Monitor { source, .. } => Some(source),
            Error::Agent { source, .. } => Some(source),
            Error::Hotplug { source, .. } => Some(source),
            Error::Record { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// A virtual machine whose agent has answered; whoever holds it owns it.
#[derive(Debug)]
pub struct Vm {
    // First, so that QEMU is gone before its directory is.
    process: Process,
    // Then what serves it.
    attendants: Vec<Attendant>,
    dir: VmDir,
    ledger: Ledger,
    agent: Address,
    paused: bool,
}

impl Vm {
    /// Its id, a UUID.
    pub fn id(&self) -> &str {
        &self.ledger.id
    }

    /// QEMU's pid.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Its CPUs.
    pub fn cpus(&self) -> u32 {
        self.ledger.cpus
    }

    /// Its memory, MiB.
    pub fn memory_mib(&self) -> u32 {
        self.ledger.memory_mib
    }

    /// How it was made: `direct` or `template`.
    pub fn source(&self) -> &str {
        &self.ledger.source
    }

    /// Its directory on the host.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Path of QEMU's monitor.
    pub fn monitor(&self) -> std::path::PathBuf {
        self.dir.monitor()
    }

    /// Where its agent is.
    pub fn agent_address(&self) -> &Address {
        &self.agent
    }

    /// Whether its virtual CPUs stand still.
    pub fn paused(&self) -> bool {
        self.paused
    }

    /// What is on disk about it.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Changes what is on disk about it.
    ///
    /// # Errors
    /// As the file system's; the old ledger then stands.
    pub fn record(&mut self, change: impl FnOnce(&mut Ledger)) -> std::io::Result<()> {
        let mut new = self.ledger.clone();
        change(&mut new);
        new.write(self.dir.path())?;
        self.ledger = new;
        Ok(())
    }

    /// Whether its QEMU runs, whatever has become of what serves it beside that.
    pub fn runs(&self) -> bool {
        self.process.alive()
    }

    /// Whether QEMU runs, and what serves it.
    pub fn alive(&self) -> bool {
        self.process.alive() && self.attendants.iter().all(Attendant::alive)
    }

    /// What of it has ended, when it is not alive.
    pub fn lost(&self) -> String {
        match self.attendants.iter().find(|a| !a.alive()) {
            Some(a) if self.process.alive() => {
                format!("its {}, pid {}, has ended", a.role().name(), a.pid())
            }
            _ => "QEMU has ended".into(),
        }
    }

    /// What serves it beside QEMU.
    pub fn attendants(&self) -> &[Attendant] {
        &self.attendants
    }

    /// The pid of one of them.
    pub fn attendant(&self, role: Role) -> Option<i32> {
        self.attendants.iter().find(|a| a.role() == role).map(Attendant::pid)
    }

    /// Whether its agent is vmcache's own.
    pub fn own_agent(&self) -> bool {
        self.ledger.own_agent
    }

    /// A pidfd of QEMU, to watch for its end.
    ///
    /// # Errors
    /// As dup(2).
    pub fn watch(&self) -> std::io::Result<std::os::fd::OwnedFd> {
        self.process.watch()
    }

    /// For whoever watches: it is this process's now.
    pub fn birth(&self) -> Birth<'_> {
        Birth::Runs { id: self.id(), dir: self.dir(), qemu: &self.process }
    }

    /// Lets the virtual CPUs run; nothing happens when they do already.
    ///
    /// # Errors
    /// [`Error::Dead`] or [`Error::Monitor`].
    pub fn resume(&mut self) -> Result<(), Error> {
        let vsock = matches!(self.agent, Address::Hybrid { .. });
        self.monitored(|qmp| {
            qmp.resume()?;
            match vsock {
                true => virtio::await_driver(qmp, VSOCK, || true, ANSWER),
                false => Ok(()),
            }
        })?;
        self.paused = false;
        Ok(())
    }

    /// Asks whether its virtual CPUs run, for one that another process had before.
    ///
    /// # Errors
    /// [`Error::Dead`] or [`Error::Monitor`], soon: it has nothing else to do.
    pub fn look(&mut self) -> Result<(), Error> {
        self.paused = !self.monitored_within(LOOK, Qmp::running)?;
        Ok(())
    }

    /// Stops the virtual CPUs.
    ///
    /// # Errors
    /// [`Error::Dead`] or [`Error::Monitor`].
    pub fn pause(&mut self) -> Result<(), Error> {
        if matches!(self.agent, Address::Hybrid { .. }) {
            // The end of a connection must not come after.
            virtio::settle();
        }
        self.monitored(Qmp::pause)?;
        self.paused = true;
        Ok(())
    }

    fn monitored<T>(&self, f: impl FnOnce(&mut Qmp) -> Result<T, qmp::Error>) -> Result<T, Error> {
        self.monitored_within(QUICK, f)
    }

    fn monitored_within<T>(
        &self,
        within: Duration,
        f: impl FnOnce(&mut Qmp) -> Result<T, qmp::Error>,
    ) -> Result<T, Error> {
        if !self.alive() {
            return Err(Error::Dead { id: self.id().into(), pid: self.pid() });
        }
        Qmp::connect(&self.dir.monitor(), within)
            .and_then(|mut q| f(&mut q))
            .map_err(|source| Error::Monitor { id: self.id().into(), source })
    }

    /// Connects to the agent; the VM must run.
    ///
    /// # Errors
    /// [`Error::Dead`] or [`Error::Agent`].
    pub fn connect_agent(&self) -> Result<Box<dyn Agent>, Error> {
        let failed = |source| match self.alive() {
            true => Error::Agent { id: self.id().into(), source },
            false => Error::Dead { id: self.id().into(), pid: self.pid() },
        };
        agent::connect(&self.agent, ANSWER).map_err(failed)
    }

    /// Resumes it and gives the guest fresh random numbers and the time: what
    /// every claim does before the VM is used. Gives a connection to its agent.
    ///
    /// # Errors
    /// Any of [`Error`]; the VM must then be destroyed.
    pub fn wake(&mut self) -> Result<Box<dyn Agent>, Error> {
        if self.paused {
            self.resume()?;
        }
        let agent = self.connect_agent()?;
        identity::refresh(&*agent)
            .map_err(|source| Error::Agent { id: self.id().into(), source })?;
        Ok(agent)
    }

    /// Kills QEMU and removes the directory; the same as dropping it.
    pub fn destroy(self) {}

    /// Lets the user who claims it use it, and make it grow to so much memory, MiB.
    ///
    /// # Errors
    /// As lchown(2) and setxattr(2), and when its cgroup refuses; it must then be destroyed.
    pub fn hand_to(&self, uid: u32, memory_mib: u32) -> std::io::Result<()> {
        if memory_mib > self.memory_mib() {
            let most = resize::grown(self.memory_mib(), memory_mib);
            notes::claimed(self.dir(), most)?;
            cgroup::limit_memory(self.dir(), Some(most))?;
        }
        self.dir.hand_to(uid)
    }

    /// Notes something about it, for its owner's other commands and the next server.
    ///
    /// # Errors
    /// As [`notes::write`].
    pub fn note(&self, kind: notes::Kind, text: &[u8]) -> std::io::Result<()> {
        notes::write(self.dir(), &self.ledger.endpoint, kind, text)
    }

    /// Whether only its server can end it: its processes are not this user's.
    pub fn is_servers(&self) -> bool {
        self.process.is_anothers()
    }

    /// Gives ownership up: VM and directory stay, for whoever owns them now.
    pub fn let_go(self) {
        self.process.let_go();
        self.attendants.into_iter().for_each(Attendant::let_go);
        self.dir.let_go();
    }
}
