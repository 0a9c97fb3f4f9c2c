//! The boot workers: each makes one VM after the other, by cold boot or as a
//! clone, and tells the driver.
//!
//! Invariant: a worker owns the VM that it makes until the driver has been told.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Receiver;

use super::pool::{Event, Job, Pool, Ready};
use crate::config::options::FACTORY;
use crate::config::Config;
use crate::factory::template::Template;
use crate::stuck;
use crate::vm::birth::Birth;
use crate::vm::boot::{boot, BootError, Purpose};
use crate::vm::ledger::ClaimNote;
use crate::vm::wire;

/// Beyond a boot's own deadlines, until its thread is called stuck.
const MARGIN: Duration = Duration::from_secs(60);

/// Where the pool's VMs come from.
pub struct Source {
    config: Arc<Config>,
    template: Option<Template>,
}

impl Source {
    /// What the configuration says.
    pub fn of(config: &Arc<Config>) -> Source {
        let template = config.flag(FACTORY, "enable_template").then(|| Template::new(config));
        Source { config: Arc::clone(config), template }
    }

    /// `direct` or `template`.
    pub fn name(&self) -> &'static str {
        if self.template.is_some() {
            "template"
        } else {
            "direct"
        }
    }

    /// Makes VMs until there are no more jobs.
    pub fn work(&self, pool: &Pool, jobs: &Receiver<Job>) {
        let purpose = Purpose::Pool { endpoint: self.config.endpoint().display().to_string() };
        for job in jobs {
            // A template may have to be made first, by this thread or another.
            let _doing = stuck::begin("making a VM", 2 * self.config.boot_timeout + MARGIN);
            #[cfg(feature = "faults")]
            crate::faults::point("boot");
            let number = job.number;
            let mut watch = |birth: Birth<'_>| {
                let Birth::Runs { id, qemu, .. } = birth else { return };
                if let Ok(pidfd) = qemu.watch() {
                    let (pid, id) = (qemu.pid(), id.to_string());
                    pool.tell(Event::Started { job: number, pid, id, pidfd });
                }
            };
            let made = match &self.template {
                Some(template) => template.clone_vm(&purpose, &mut watch),
                None => boot(&self.config, &purpose, &mut watch),
            };
            let result = made
                .and_then(|vm| match ClaimNote::open(vm.dir()) {
                    Ok(note) => {
                        let message = wire::to_wire(&vm, &self.config);
                        Ok(Box::new(Ready { vm, message, note, at_rest: false }))
                    }
                    Err(e) => Err(BootError::after_boot(vm, e)),
                })
                .map_err(Box::new);
            pool.tell(Event::Booted { job: number, result });
        }
    }
}
