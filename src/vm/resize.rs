//! The size asked for: CPUs and memory added to a VM that runs.
//!
//! Invariants: what can be known to be impossible is refused before a VM is
//! claimed for it; a VM that could not be brought to its size must be
//! destroyed; its new size is on disk before it is used.
//!
//! Does not: shrink. A guest gives memory back only when it likes to, so what
//! was asked for would not be what one gets.

use std::error;
use std::fmt;

use super::config::VmConfig;
use super::{Error, Vm};
use crate::agent::{self, Agent};
use crate::confine::cgroup;
use crate::host;
use crate::hypervisor::qemu::hotplug;
use crate::hypervisor::qemu::qmp::{Qmp, QUICK};

/// Size of a memory block where the agent does not tell: x86's and arm64's.
const BLOCK_MIB: u32 = 128;

/// Memory of a VM of `have` MiB that has grown to at least `wanted`, which it does in pieces.
pub fn grown(have: u32, wanted: u32) -> u32 {
    let pieces = wanted.saturating_sub(have).div_ceil(BLOCK_MIB);
    have.saturating_add(pieces.saturating_mul(BLOCK_MIB))
}

/// Why a base VM can not have the size asked for.
#[derive(Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Unfit {
    /// Less than it has.
    Smaller { unit: &'static str, wanted: u32, have: u32 },
    /// More than its machine was started for.
    Most { unit: &'static str, wanted: u32, most: u64, option: &'static str },
    /// More memory than the host can give now.
    Host { wanted: u32, more: u64, available: u64 },
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unfit::Smaller { unit, wanted, have } => write!(
                f,
                "{wanted} {unit} asked for, the pool's VMs have {have} and are never made \
                 smaller: ask for {have} or more, or use --cold for a VM of that size"
            ),
            Unfit::Most { unit, wanted, most, option } => {
                write!(f, "{wanted} {unit} asked for, the pool's VMs can grow to {most}: {option}")
            }
            Unfit::Host { wanted, more, available } => write!(
                f,
                "{wanted} MiB of memory asked for, {more} MiB more than the pool's VMs have; \
                 the host has only {available} MiB available: end some VMs, or ask for less"
            ),
        }
    }
}

impl error::Error for Unfit {}

/// Whether VMs of a base can be brought to a size; nothing is done to any.
///
/// # Errors
/// [`Unfit`], the first limit that is in the way.
pub fn check(base: &VmConfig, cpus: Option<u32>, memory: Option<u32>) -> Result<(), Unfit> {
    let (have, most) = (base.cpus(), base.max_cpus());
    if let Some(wanted) = cpus {
        if wanted < have {
            return Err(Unfit::Smaller { unit: "CPUs", wanted, have });
        }
        // 0 in the messages of servers that do not tell: QEMU will.
        if wanted > have && most > 0 && u64::from(wanted) > most {
            let option = "set default_maxvcpus higher and restart the server";
            return Err(Unfit::Most { unit: "CPUs", wanted, most, option });
        }
    }
    let (have, unit) = (base.memory(), "MiB of memory");
    let Some(wanted) = memory else { return Ok(()) };
    if wanted < have {
        return Err(Unfit::Smaller { unit, wanted, have });
    }
    if wanted == have {
        return Ok(());
    }
    let most = host::memory_mib();
    if base.number("MemSlots") == 0 {
        let option = "set memory_slots to 1 or more and restart the server";
        return Err(Unfit::Most { unit, wanted, most: have.into(), option });
    }
    let more = u64::from(grown(have, wanted) - have);
    if most > 0 && u64::from(have) + more > most {
        return Err(Unfit::Most { unit, wanted, most, option: "the host has no more" });
    }
    let available = host::available_mib();
    if available > 0 && more > available {
        return Err(Unfit::Host { wanted, more, available });
    }
    Ok(())
}

impl Vm {
    /// Brings it to a size; memory is rounded up to whole blocks of the guest
    /// (128 MiB, mostly). Nothing happens when it has that already.
    ///
    /// # Errors
    /// [`Error::Hotplug`] or [`Error::Agent`]; the VM must then be destroyed.
    pub fn grow(
        &mut self,
        agent: &dyn Agent,
        base: &VmConfig,
        cpus: Option<u32>,
        memory: Option<u32>,
    ) -> Result<(), Error> {
        let more_cpus = cpus.unwrap_or(0).saturating_sub(self.cpus());
        let more_memory = memory.unwrap_or(0).saturating_sub(self.memory_mib());
        if more_cpus == 0 && more_memory == 0 {
            return Ok(());
        }
        let refused = |source| Error::Agent { id: self.id().into(), source };
        let more_memory = match more_memory {
            0 => 0,
            n => n.next_multiple_of(block_mib(agent).map_err(refused)?),
        };
        let add = |qmp: &mut Qmp| {
            if more_cpus > 0 {
                hotplug::add_cpus(qmp, more_cpus as usize)?;
            }
            if more_memory > 0 {
                hotplug::add_memory(qmp, more_memory, &base.memory_backend())?;
            }
            Ok(())
        };
        // Where the VM's directory is another user's, that user's server has raised it.
        if more_memory > 0 && !self.is_servers() {
            cgroup::limit_memory(self.dir.path(), Some(self.memory_mib() + more_memory))
                .map_err(|source| Error::Record { id: self.id().into(), source })?;
        }
        Qmp::connect(&self.dir.monitor(), QUICK)
            .map_err(hotplug::Error::Monitor)
            .and_then(|mut qmp| add(&mut qmp))
            .map_err(|e| Error::Hotplug { id: self.id().into(), source: Box::new(e) })?;
        agent.online_cpu_mem(more_cpus, more_memory == 0).map_err(refused)?;
        let (cpus, memory) = (self.cpus() + more_cpus, self.memory_mib() + more_memory);
        let noted = self.ledger.resize(self.dir.path(), cpus, memory);
        noted.map_err(|source| Error::Record { id: self.id().into(), source })
    }
}

/// Size of the pieces in which the guest's kernel takes memory, MiB.
fn block_mib(agent: &dyn Agent) -> Result<u32, agent::Error> {
    let mib = match agent.guest_details() {
        Ok(details) => details.mem_block_size_bytes >> 20,
        Err(agent::Error::Unsupported { .. }) => 0,
        Err(e) => return Err(e),
    };
    // A guest's word: what is no sane size is taken as not told.
    let sane = u32::try_from(mib).ok().filter(|m| m.is_power_of_two() && *m <= 2048);
    Ok(sane.unwrap_or(BLOCK_MIB))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(max_cpus: u32, slots: u32) -> VmConfig {
        let text = format!(
            r#"{{"HypervisorType":"qemu","HypervisorConfig":{{"NumVCPUs":2,
               "DefaultMaxVCPUs":{max_cpus},"MemorySize":256,"MemSlots":{slots}}}}}"#
        );
        VmConfig::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn what_can_not_be_is_refused_with_the_remedy() {
        let base4 = base(4, 10);
        assert_eq!(check(&base4, None, None), Ok(()));
        assert_eq!(check(&base4, Some(4), Some(256)), Ok(()));
        for (cpus, memory, words) in [
            (Some(1), None, "1 CPUs asked for, the pool's VMs have 2 and are never made smaller"),
            (None, Some(255), "255 MiB of memory asked for, the pool's VMs have 256"),
            (Some(5), None, "can grow to 4: set default_maxvcpus"),
            (None, Some(u32::MAX), "the host has no more"),
        ] {
            let e = check(&base4, cpus, memory).unwrap_err().to_string();
            assert!(e.contains(words), "{e}");
        }
        let e = check(&base(4, 0), None, Some(257)).unwrap_err().to_string();
        assert!(e.contains("set memory_slots"), "{e}");
        // A server that does not say how many: QEMU will.
        assert_eq!(check(&base(0, 10), Some(64), None), Ok(()));
    }
}
