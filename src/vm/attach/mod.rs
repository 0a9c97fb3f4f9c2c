//! Disks and network cards for a claimed VM: what is wanted, looked at and
//! opened before a VM is claimed for it, then given to the VM.
//!
//! Invariants: nothing of the host is opened by QEMU itself; what can be known
//! to be wrong costs no VM; a VM that did not get what it was to have must be
//! destroyed.
//!
//! Does not: mount or configure anything in the guest ([`crate::workload`]).

pub mod disk;
pub mod nic;
pub mod share;
pub mod user_net;

use std::error;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

pub use disk::{Disk, Format, Image};
pub use nic::{Network, Nic, OtherSide};

use super::Vm;
use crate::hypervisor::qemu::devices::{self, Drive, Link};
use crate::hypervisor::qemu::qmp::{self, Qmp, QUICK};

/// Why something can not be attached.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The image can not be opened or read.
    Open { path: PathBuf, read_only: bool, source: io::Error },
    /// What the image is makes it unusable.
    Image { path: PathBuf, what: String },
    /// The tap is not there or can not be had.
    Tap { name: String, netns: Option<PathBuf>, what: String, source: Option<io::Error> },
    /// Random bytes or a thread could not be had.
    Host { during: &'static str, source: io::Error },
    /// The network in user space can not be had.
    UserNetwork { why: String },
    /// The directory can not be shared.
    Share { path: PathBuf, why: String },
    /// QEMU did not take it.
    Device { id: String, what: String, source: Box<devices::Error> },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Open { path, read_only, .. } => {
                let how = if *read_only { "reading" } else { "reading and writing" };
                write!(f, "open disk image {} for {how}", path.display())
            }
            Error::Image { path, what } => write!(f, "disk image {}: {what}", path.display()),
            Error::Tap { name, netns, what, .. } => {
                write!(f, "tap {name}")?;
                if let Some(netns) = netns {
                    write!(f, " in network namespace {}", netns.display())?;
                }
                write!(f, ": {what}")
            }
            Error::Host { during, .. } => f.write_str(during),
            Error::UserNetwork { why } => write!(f, "network in user space: {why}"),
            Error::Share { path, why } => write!(f, "share directory {}: {why}", path.display()),
            Error::Device { id, what, .. } => write!(f, "attach {what} to VM {id}"),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Open { source, .. } | Error::Host { source, .. } => Some(source),
            Error::Tap { source, .. } => source.as_ref().map(|e| e as _),
            Error::Device { source, .. } => Some(source),
            Error::Image { .. } | Error::Share { .. } | Error::UserNetwork { .. } => None,
        }
    }
}

impl Vm {
    /// Plugs a disk in; gives its PCI path, by which the guest finds it.
    ///
    /// # Errors
    /// [`Error::Device`]; the VM must then be destroyed.
    pub fn attach_disk(&self, disk: &Disk) -> Result<String, Error> {
        let drive = Drive {
            file: disk.file().as_fd(),
            block_device: disk.block_device(),
            format: disk.format().name(),
            read_only: disk.read_only(),
        };
        let what = || format!("disk image {}", disk.path().display());
        self.plug(&what, |qmp| devices::add_disk(qmp, &drive))
    }

    /// Plugs a network card in; gives its PCI path. `leased`, who carries its packets in user
    /// space ends with the calling thread; with the VM in any case.
    ///
    /// # Errors
    /// [`Error::Device`] and [`Error::UserNetwork`]; the VM must then be destroyed.
    pub fn attach_nic(&mut self, nic: &Nic, leased: bool) -> Result<String, Error> {
        let what = || format!("network card {}", nic.mac());
        let by = match nic.other_side() {
            OtherSide::Tap(fd) => {
                let link = Link::Tap(fd.as_fd());
                return self.plug(&what, |qmp| devices::add_nic(qmp, &link, nic.mac()));
            }
            OtherSide::User(by) => by,
        };
        let failed = |why: String| Error::UserNetwork { why };
        let (qemus, carrier) = by.start(self.dir(), leased).map_err(failed)?;
        let record = carrier.record();
        self.attendants.push(carrier);
        let served = self.ledger.serve(self.dir.path(), record);
        served.map_err(|e| failed(format!("note who carries it: {e}")))?;
        let link = Link::Stream(qemus.as_fd());
        let name = self.plug(&what, |qmp| devices::add_nic(qmp, &link, nic.mac()))?;
        let carrier = self.attendants.iter_mut().find(|a| a.record() == record);
        match carrier.filter(|carrier| !carrier.alive()) {
            Some(dead) => {
                let why = format!("what carries it ended at once, {}", dead.last_words());
                Err(failed(why))
            }
            None => Ok(name),
        }
    }

    fn plug<T>(
        &self,
        what: &dyn Fn() -> String,
        add: impl FnOnce(&mut Qmp) -> Result<T, devices::Error>,
    ) -> Result<T, Error> {
        Qmp::connect(&self.dir.monitor(), QUICK)
            .map_err(|e: qmp::Error| devices::Error::Monitor(e))
            .and_then(|mut qmp| add(&mut qmp))
            .map_err(|e| Error::Device { id: self.id().into(), what: what(), source: Box::new(e) })
    }
}
