//! Why a boot failed: which phase did not come, after how long, and what QEMU
//! and the guest wrote.

use std::error;
use std::fmt;
use std::time::Duration;

use crate::vm::Vm;

/// What a boot was waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The template that it is to be a clone of.
    Template,
    /// The VM's directory, sockets and addresses.
    Directory,
    /// A process beside QEMU that the VM needs.
    Attendant,
    /// What QEMU may do on this host, and its images.
    Confinement,
    /// QEMU's process.
    Spawn,
    /// The greeting of QEMU's monitor.
    Monitor,
    /// The guest's kernel and agent.
    Guest,
    /// A template's state, into a file or out of it.
    State,
    /// Random numbers, clock and names.
    Identity,
    /// Pausing, and the ledger.
    Ready,
}

impl Phase {
    /// A word for it, which stays.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Template => "template",
            Phase::Directory => "directory",
            Phase::Attendant => "attendant",
            Phase::Confinement => "confinement",
            Phase::Spawn => "spawn",
            Phase::Monitor => "monitor",
            Phase::Guest => "guest",
            Phase::State => "state",
            Phase::Identity => "identity",
            Phase::Ready => "ready",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Template => "there is no template to clone",
            Phase::Directory => "its directory could not be made",
            Phase::Attendant => "a process beside QEMU could not be had",
            Phase::Confinement => "it could not be confined as configured",
            Phase::Spawn => "QEMU could not be started",
            Phase::Monitor => "QEMU's monitor did not answer",
            Phase::Guest => "the guest's agent did not answer",
            Phase::State => "the template's state could not be moved",
            Phase::Identity => "the guest could not be given its identity",
            Phase::Ready => "it could not be made ready",
        })
    }
}

/// Why a VM did not come up.
#[derive(Debug)]
pub struct BootError {
    /// The VM's id.
    pub id: String,
    /// QEMU's pid; 0 when it was not started.
    pub pid: i32,
    /// What was waited for.
    pub phase: Phase,
    /// How long the boot took until it failed.
    pub after: Duration,
    /// What QEMU wrote, and the guest's console.
    pub words: String,
    pub(super) source: Box<dyn error::Error + Send + Sync>,
}

impl BootError {
    /// There is no template to make a clone of.
    pub fn no_template(why: Box<dyn error::Error + Send + Sync>) -> BootError {
        let (id, after, words) = (String::new(), Duration::ZERO, String::new());
        BootError { id, pid: 0, phase: Phase::Template, after, words, source: why }
    }

    /// A VM that came up, but could not be published; it is destroyed.
    pub fn after_boot(vm: Vm, why: std::io::Error) -> BootError {
        let (id, pid) = (vm.id().to_string(), vm.pid());
        vm.destroy();
        let (after, words) = (Duration::ZERO, String::new());
        BootError { id, pid, phase: Phase::Ready, after, words, source: why.into() }
    }
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.phase == Phase::Template {
            return self.phase.fmt(f);
        }
        write!(f, "boot of VM {}", self.id)?;
        if self.pid != 0 {
            write!(f, " (QEMU pid {})", self.pid)?;
        }
        write!(f, " failed after {:.1} s: {}", self.after.as_secs_f64(), self.phase)?;
        if !self.words.is_empty() {
            write!(f, "; {}", self.words)?;
        }
        Ok(())
    }
}

impl error::Error for BootError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&*self.source)
    }
}
