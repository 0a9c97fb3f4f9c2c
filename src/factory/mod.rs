//! Factories: where base VMs come from, and what turns one into the VM asked for.
//!
//! [`BaseFactory`] is Kata's interface: *direct* boots, *cache* is the server's
//! pool (a daemon's, so its VMs leave by gRPC and not by this trait),
//! *grpccache* is the client of one. [`Factory::get_vm`] stands on top. With
//! `enable_template`, *template* takes direct's place under the pool.

pub mod cache;
pub mod direct;
pub mod grpccache;
pub mod template;

use std::error;
use std::fmt;
use std::time::{Duration, Instant};

use crate::agent::Agent;
use crate::config::Config;
use crate::vm::boot::BootError;
use crate::vm::{self, resize, Birth, Vm, VmConfig};
use crate::workload::Guest;

/// Why there is no VM.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// It could not be booted here.
    Boot(Box<BootError>),
    /// The server gave none.
    Cache(grpccache::Error),
    /// The VM came, but could not be used; it was destroyed.
    Vm(vm::Error),
    /// There can be no VM of the size asked for; none was claimed.
    Size { what: String },
    /// The pool's VMs are not what was asked for, and no cold boot is possible.
    Mismatch { what: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Boot(_) => f.write_str("boot a VM"),
            Error::Cache(_) => f.write_str("get a VM from the pool"),
            Error::Vm(_) => f.write_str("make the VM ready; it was destroyed"),
            Error::Size { what } => f.write_str(what),
            Error::Mismatch { what } => write!(
                f,
                "the pool's VMs differ from what was asked for ({what}), \
                 and there is no configuration to boot another from"
            ),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Boot(e) => Some(e),
            Error::Cache(e) => Some(e),
            Error::Vm(e) => Some(e),
            Error::Size { .. } | Error::Mismatch { .. } => None,
        }
    }
}

/// A VM as a factory counts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmStatus {
    /// QEMU's pid.
    pub pid: i32,
    /// CPUs.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mib: u32,
}

/// A source of base VMs, as in Kata.
pub trait BaseFactory {
    /// What its VMs are.
    ///
    /// # Errors
    /// [`Error`], as with all of these.
    fn config(&self) -> Result<VmConfig, Error>;
    /// One VM, which the caller owns; `None` waits without a deadline.
    fn get_base_vm(&self, within: Option<Duration>) -> Result<Vm, Error>;
    /// The caller has the VM that it got from here: it is kept from now on, whatever
    /// becomes of the caller, unless it was leased.
    fn confirm(&self, vm: &Vm) -> Result<(), Error> {
        let _ = vm;
        Ok(())
    }
    /// A VM that it gave can run a command, so long after it was asked for: for its
    /// measures, without waiting. Lost if the VM ends, or this process does, at once.
    fn used(&self, vm: &Vm, took: Duration) {
        let _ = (vm, took);
    }
    /// The VMs that it holds ready.
    fn status(&self) -> Result<Vec<VmStatus>, Error>;
    /// Ends it; VMs that it handed out stay.
    fn close(&self) -> Result<(), Error>;
}

/// What is asked of [`Factory::get_vm`].
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// CPUs, no fewer than the base VM has; `None` for as many.
    pub cpus: Option<u32>,
    /// Memory, MiB, no less than the base VM has; `None` for as much.
    pub memory_mib: Option<u32>,
    /// How long to wait for a base VM.
    pub within: Option<Duration>,
}

/// A VM that is awake, with a connection to its agent.
pub struct Obtained {
    /// The VM; dropping it destroys it.
    pub vm: Vm,
    /// Its agent, which has answered.
    pub agent: Box<dyn Agent>,
    /// Why it was booted cold instead of taken from the pool, if it was.
    pub fallback: Option<String>,
}

impl From<Obtained> for Guest {
    fn from(o: Obtained) -> Guest {
        Guest::new(o.vm, o.agent).because(o.fallback)
    }
}

/// Told of a VM as soon as it is this process's, before it can be used.
pub type Born<'a> = &'a dyn Fn(Birth<'_>);

/// A base factory, and a configuration to boot from when it does not fit.
pub struct Factory<'a> {
    base: &'a dyn BaseFactory,
    own: Option<&'a Config>,
    leased: bool,
    born: Born<'a>,
}

impl<'a> Factory<'a> {
    /// `own` is this side's configuration: what VMs are wanted to be, and what
    /// a cold one is booted from. Without it, the base's VMs are taken as they are.
    pub fn new(base: &'a dyn BaseFactory, own: Option<&'a Config>) -> Factory<'a> {
        Factory { base, own, leased: false, born: &|_| {} }
    }

    /// A cold VM, too, ends with the thread that calls [`Factory::get_vm`].
    pub fn leased(mut self, leased: bool) -> Factory<'a> {
        self.leased = leased;
        self
    }

    /// Tells of each VM while it is being made ready, so that a signal that
    /// comes then can end it.
    pub fn born(mut self, born: Born<'a>) -> Factory<'a> {
        self.born = born;
        self
    }

    /// A VM that runs, has its own random numbers and the right time.
    ///
    /// # Errors
    /// [`Error`]; any VM that was on its way is destroyed.
    pub fn get_vm(&self, wanted: &Wanted) -> Result<Obtained, Error> {
        let base = self.base.config()?;
        let differs = self.own.and_then(|own| base.mismatch(&VmConfig::of(own)));
        if let Some(what) = differs {
            let own = self.own.ok_or(Error::Mismatch { what: what.clone() })?;
            log::warn!("the pool's VMs differ from the configuration ({what}): booting a cold VM");
            let (vm, agent) = direct::cold(own, wanted, self.leased, self.born)?;
            return Ok(Obtained { vm, agent, fallback: Some(what) });
        }
        resize::check(&base, wanted.cpus, wanted.memory_mib)
            .map_err(|e| Error::Size { what: e.to_string() })?;
        let asked = Instant::now();
        let mut vm = self.base.get_base_vm(wanted.within)?;
        (self.born)(vm.birth());
        self.base.confirm(&vm)?;
        let agent = vm.wake().map_err(Error::Vm)?;
        vm.grow(&*agent, &base, wanted.cpus, wanted.memory_mib).map_err(Error::Vm)?;
        self.base.used(&vm, asked.elapsed());
        Ok(Obtained { vm, agent, fallback: None })
    }
}
