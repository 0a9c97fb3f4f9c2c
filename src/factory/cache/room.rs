//! Room for another VM: whether the host can give it the memory that it may need.
//!
//! Invariant: nothing is begun for which there is no room. VMs that stand ready are
//! left alone, but for those of an older configuration whose end makes room. What files in memory take (a template's, whoever left them) the kernel
//! does not count as available.

use std::time::Duration;

use crate::config::options::QEMU;
use crate::config::{Config, QEMU_MIB};
use crate::events::event;
use crate::host;
use crate::vm::Vm;

/// Between two looks while there is none.
pub const LOOK: Duration = Duration::from_secs(1);
/// Of the last ten seconds, the share in hundredths in which some process stood still
/// for want of memory, from which on the host is short of it.
const PRESSURE: f64 = 20.0;

/// What a VM may need, and whether there was room last time.
#[derive(Debug)]
pub struct Room {
    /// All that its guest can touch, and QEMU, MiB.
    need: u64,
    /// Its guest's part of that, in huge pages.
    huge: Option<u64>,
    short: Option<String>,
}

impl Room {
    /// For VMs of this configuration.
    pub fn new(config: &Config) -> Room {
        let guest = u64::from(config.memory());
        let huge = config.flag(QEMU, "enable_hugepages").then_some(guest);
        let need = QEMU_MIB + huge.map_or(guest, |_| 0);
        Room { need, huge, short: None }
    }

    /// Why there is none; the text of status.
    pub fn short(&self) -> Option<&str> {
        self.short.as_deref()
    }

    /// Looks whether there is room beside those that are being made.
    pub fn look(&mut self, making: usize) -> bool {
        let now = self.why_not(making as u64, (0, 0));
        match (&self.short, &now) {
            (None, Some(why)) => event!(MEMORY_SHORT; "{why}; no VM is made until then"),
            (Some(_), None) => event!(MEMORY_ENOUGH; "VMs are made again"),
            _ => {}
        }
        self.short = now;
        self.short.is_none()
    }

    /// How many of these VMs, the first of them first, have to end so that there is room for
    /// one more; `None` where all of them would not do.
    pub fn without(&self, vms: &[&Vm]) -> Option<usize> {
        let mut more = (0, 0);
        let enough = vms.iter().position(|vm| {
            // A clone's template stays.
            let (usual, huge) = host::freed_with_mib(vm.pid(), vm.source() == "template");
            more = (more.0 + usual, more.1 + huge);
            self.why_not(0, more).is_none()
        });
        enough.map(|last| last + 1)
    }

    /// Beside so many that are being made, and with so much more memory, MiB: in pages of the
    /// usual size and in huge ones.
    fn why_not(&self, making: u64, more: (u64, u64)) -> Option<String> {
        let (need, available) = (self.need * (making + 1), host::available_mib());
        // 0 where the kernel does not tell.
        if available > 0 && available + more.0 < need {
            return Some(format!(
                "{} may need {need} MiB, and the host has {available} MiB available",
                vms(making + 1)
            ));
        }
        if let Some(guest) = self.huge {
            let (need, free) = (guest * (making + 1), host::free_huge_mib());
            if free + more.1 < need {
                return Some(format!(
                    "{} need {need} MiB of huge pages, and {free} MiB are free",
                    vms(making + 1)
                ));
            }
        }
        let stalled = host::memory_pressure().filter(|p| *p >= PRESSURE)?;
        Some(format!(
            "the host is short of memory: in {stalled:.0} % of the last ten seconds some process \
             waited for it"
        ))
    }
}

fn vms(n: u64) -> String {
    match n {
        1 => "a VM".into(),
        n => format!("{n} VMs"),
    }
}
