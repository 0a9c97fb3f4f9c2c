//! The direct factory: every VM is booted when it is asked for.

use std::time::Duration;

use super::{BaseFactory, Error, VmStatus, Wanted};
use crate::agent::kata::KataAgent;
use crate::config::Config;
use crate::hypervisor::qemu::process::Process;
use crate::vm::boot::{boot, Purpose};
use crate::vm::{Vm, VmConfig};

/// Boots VMs of one configuration, here and now.
pub struct Direct {
    config: Config,
}

impl Direct {
    /// One that boots what `config` says.
    pub fn new(config: Config) -> Direct {
        Direct { config }
    }
}

impl BaseFactory for Direct {
    fn config(&self) -> Result<VmConfig, Error> {
        Ok(VmConfig::of(&self.config))
    }

    fn get_base_vm(&self, _within: Option<Duration>) -> Result<Vm, Error> {
        boot(&self.config, &Purpose::Own { leased: false }, &mut |_, _| {})
            .map_err(|e| Error::Boot(Box::new(e)))
    }

    fn status(&self) -> Result<Vec<VmStatus>, Error> {
        Ok(Vec::new())
    }

    fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// A VM booted for this one use, of just the size asked for, awake.
///
/// # Errors
/// [`Error::Boot`] or [`Error::Vm`].
pub fn cold(config: &Config, wanted: &Wanted) -> Result<(Vm, KataAgent), Error> {
    cold_watched(config, wanted, false, &mut |_, _| {})
}

/// The same; `started` is told of QEMU's process, and with `leased` the kernel
/// ends QEMU when the calling thread ends.
///
/// # Errors
/// [`Error::Boot`] or [`Error::Vm`].
pub fn cold_watched(
    config: &Config,
    wanted: &Wanted,
    leased: bool,
    started: &mut dyn FnMut(&str, &Process),
) -> Result<(Vm, KataAgent), Error> {
    let sized = config.resized(wanted.cpus, wanted.memory_mib);
    let sized = sized.map_err(|e| Error::Larger { what: e.to_string() })?;
    let mut vm =
        boot(&sized, &Purpose::Own { leased }, started).map_err(|e| Error::Boot(Box::new(e)))?;
    let agent = vm.wake().map_err(Error::Vm)?;
    Ok((vm, agent))
}
