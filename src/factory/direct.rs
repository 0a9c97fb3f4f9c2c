//! The direct factory: every VM is booted when it is asked for.

use std::time::Duration;

use super::{BaseFactory, Born, Error, VmStatus, Wanted};
use crate::agent::Agent;
use crate::config::Config;
use crate::vm::boot::{boot, Purpose};
use crate::vm::{Birth, Vm, VmConfig};

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
        boot(&self.config, &Purpose::Own { leased: false, waits: false }, &mut |_| {})
            .map_err(|e| Error::Boot(Box::new(e)))
    }

    fn status(&self) -> Result<Vec<VmStatus>, Error> {
        Ok(Vec::new())
    }

    fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// A VM booted for this one use, of just the size asked for, awake. With
/// `leased`, the kernel ends its QEMU when the calling thread ends.
///
/// # Errors
/// [`Error::Boot`] or [`Error::Vm`].
pub fn cold(
    config: &Config,
    wanted: &Wanted,
    leased: bool,
    born: Born<'_>,
) -> Result<(Vm, Box<dyn Agent>), Error> {
    let sized = config.resized(wanted.cpus, wanted.memory_mib);
    let sized = sized.map_err(|e| Error::Size { what: e.to_string() })?;
    let mut watch = |birth: Birth<'_>| born(birth);
    let mut vm = boot(&sized, &Purpose::Own { leased, waits: false }, &mut watch)
        .map_err(|e| Error::Boot(Box::new(e)))?;
    let agent = vm.wake().map_err(Error::Vm)?;
    Ok((vm, agent))
}
