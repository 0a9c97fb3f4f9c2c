//! VMs that leave, and what becomes of them: delivered, leased, ended.

use std::os::fd::AsFd;
use std::time::Instant;

use super::{Driver, Handed, Watched, KILL};
use crate::hypervisor::qemu::process::reap;
use crate::sys::process::{pidfd_alive, pidfd_kill, pidfd_open, start_time};
use crate::vm::ledger::{Owner, State};
use crate::vm::Vm;

impl Driver {
    pub(super) fn delivered(&mut self, mut vm: Vm, owner: Owner, waited: bool) {
        self.pool.out_of_hands();
        let pid = vm.pid();
        {
            let counters = &mut self.pool.board.facts().counters;
            match waited {
                true => counters.claims_waited += 1,
                false => counters.claims_from_pool += 1,
            }
        }
        self.policy.claimed(Instant::now());
        log::info!(
            "vm-claimed: VM {} (QEMU pid {pid}) went to pid {} of uid {}{}",
            vm.id(),
            owner.pid,
            owner.uid,
            if owner.lease { ", for as long as it lives" } else { "" }
        );
        if let Err(e) = vm.record(|l| {
            l.state = State::Handed;
            l.owner = Some(owner);
        }) {
            // Its owner may have ended it and removed the directory already.
            log::debug!("record that VM {} was handed out: {e}", vm.id());
        }
        let pidfd = match vm.watch() {
            Ok(pidfd) => pidfd,
            Err(e) => {
                log::warn!("watch VM {}: {e}", vm.id());
                self.forget(pid);
                return vm.let_go();
            }
        };
        let handed = Handed { pidfd, dir: vm.dir().to_path_buf(), id: vm.id().to_string() };
        let alive = vm.alive();
        vm.let_go();
        self.handed.insert(pid, handed);
        if !alive {
            return self.handed_ended(pid);
        }
        if let Some(seen) = self.pool.board.facts().vms.get_mut(&pid) {
            seen.state = State::Handed;
        }
        if owner.lease {
            self.lease(pid, owner);
        }
    }

    /// Watches the process that leases a VM.
    pub(super) fn lease(&mut self, pid: i32, owner: Owner) {
        let watched = pidfd_open(owner.pid)
            .ok()
            .filter(|_| start_time(owner.pid) == Some(owner.start_time))
            .and_then(|fd| self.watch.add(fd).ok());
        match watched {
            Some(token) => {
                self.watched.insert(token, Watched::Owner(pid));
            }
            None => self.end_lease(pid),
        }
    }

    pub(super) fn end_lease(&mut self, pid: i32) {
        let Some(handed) = self.handed.get(&pid) else { return };
        if pidfd_alive(handed.pidfd.as_fd()) {
            log::info!(
                "reclaimed: the process that leased VM {} has ended; ending the VM",
                handed.id
            );
            self.pool.board.facts().counters.leases_ended += 1;
            let _ = pidfd_kill(handed.pidfd.as_fd(), KILL);
        }
    }

    pub(super) fn undelivered(&mut self, vm: Vm, why: &str) {
        self.pool.out_of_hands();
        log::warn!("VM {} was not delivered ({why}): destroying it", vm.id());
        self.forget(vm.pid());
        self.pool.board.facts().counters.deliveries_failed += 1;
        vm.destroy();
    }

    /// A VM that was handed out has ended: no zombie and no directory stays.
    pub(super) fn handed_ended(&mut self, pid: i32) {
        self.forget(pid);
        if let Some(handed) = self.handed.remove(&pid) {
            reap(handed.pidfd.as_fd());
            drop(crate::vm::dir::VmDir::adopt(&handed.dir));
            log::info!("vm-ended: VM {} (QEMU pid {pid}) has ended", handed.id);
        }
    }
}
