//! VMs that leave, and what becomes of them: delivered, leased, ended.

use std::os::fd::AsFd;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::super::board::Seen;
use super::super::pool::{Delivered, Ready};
use super::super::quota::Share;
use super::{Driver, Handed, Watched, KILL};
use nix::unistd::geteuid;

use crate::confine::cgroup;
use crate::events::event;
use crate::process::attendant::Role;
use crate::process::reap;
use crate::sys::process::{pidfd_alive, pidfd_kill, pidfd_open, pidfd_wait, start_time};
use crate::vm::ledger::{Ledger, Owner, State};
use crate::vm::{notes, Vm};

/// How long a killed attendant may take to be gone.
const DYING: Duration = Duration::from_millis(200);

impl Driver {
    pub(super) fn delivered(&mut self, vm: Delivered, waited: bool, took: Duration) {
        self.pool.out_of_hands();
        let Some((vm, owner, share)) = vm.take() else { return };
        {
            let mut facts = self.pool.board.facts();
            facts.claim.add(took);
            match waited {
                true => facts.counters.claims_waited += 1,
                false => facts.counters.claims_from_pool += 1,
            }
            facts.claims.entry(vm.source().to_string()).or_default()[usize::from(waited)] += 1;
            if let Some(seen) = facts.vms.get_mut(&vm.pid()) {
                seen.outdated = false;
            }
        }
        let roots = owner.uid == 0 || owner.uid == geteuid().as_raw();
        if !owner.unconfirmed && (roots || self.lifts_limits) {
            // Kata's: it makes its VM larger without a word, and moves it into a cgroup of its own.
            if let Err(e) = cgroup::limit_memory(vm.dir(), None) {
                log::warn!("leave the memory of VM {} to its client: {e}", vm.id());
            }
        }
        self.outdated.remove(&vm.pid());
        self.policy.claimed(Instant::now());
        event!(
            VM_CLAIMED, vm = vm.id(), qemu = vm.pid(), pid = owner.pid, uid = owner.uid,
            seconds = format_args!("{:.6}", took.as_secs_f64());
            "VM {} (QEMU pid {}) went to pid {} of uid {}{}",
            vm.id(),
            vm.pid(),
            owner.pid,
            owner.uid,
            if owner.lease { ", for as long as it lives" } else { "" }
        );
        self.follow(vm, Some(owner), Some(share));
    }

    /// Follows a VM that a server before this one handed out.
    ///
    /// Call it before [`Driver::run`].
    pub fn inherit(&mut self, vm: Vm) {
        self.watch_qemu(&vm);
        let seen = Seen::of(&vm, State::Handed, Instant::now());
        self.pool.board.facts().vms.insert(vm.pid(), seen);
        let owner = vm.ledger().owner;
        let memory_mib = notes::claimed_memory(vm.dir()).unwrap_or(0).max(vm.memory_mib());
        let share = owner.map(|o| self.pool.quotas.inherit(o.uid, memory_mib));
        self.follow(vm, owner, share);
    }

    /// A VM that stood ready in the pool of a server before this one is of this pool;
    /// one too many is ended.
    ///
    /// Call it before [`Driver::run`].
    pub fn adopt(&mut self, ready: Ready, outdated: bool) {
        let (id, pid) = (ready.vm.id().to_string(), ready.vm.pid());
        if self.pool.ready.len() >= self.policy.target() {
            event!(RETIRED, vm = id, qemu = pid; "VM {id} (QEMU pid {pid}) of the pool before: this one is full");
            return ready.vm.destroy();
        }
        let age = SystemTime::now()
            .duration_since(UNIX_EPOCH + Duration::from_secs(ready.vm.ledger().created));
        let since = age.ok().and_then(|age| Instant::now().checked_sub(age));
        let since = since.unwrap_or_else(Instant::now);
        self.watch_qemu(&ready.vm);
        let seen = Seen { adopted: true, outdated, ..Seen::of(&ready.vm, State::Ready, since) };
        {
            let mut facts = self.pool.board.facts();
            facts.counters.adopted += 1;
            facts.vms.insert(pid, seen);
        }
        if outdated {
            self.outdated.insert(pid);
        }
        let what = if outdated { ", until a new one can replace it" } else { "" };
        event!(ADOPTED, vm = id, qemu = pid; "VM {id} (QEMU pid {pid}) of the pool before{what}");
        self.publish(Box::new(ready));
    }

    /// A VM that is its owner's: when it ends, no zombie and no directory stays,
    /// and when it is leased, it ends with its owner.
    fn follow(&mut self, vm: Vm, owner: Option<Owner>, share: Option<Share>) {
        let pid = vm.pid();
        let pidfd = match vm.watch() {
            Ok(pidfd) => pidfd,
            Err(e) => {
                log::warn!("watch VM {}: {e}", vm.id());
                self.forget(pid);
                return vm.let_go();
            }
        };
        let dir = vm.dir().to_path_buf();
        // Also when it could not be written.
        let mut ledger = vm.ledger().clone();
        ledger.state = State::Handed;
        ledger.owner = owner.or(ledger.owner);
        let label = ledger.label.clone();
        let alive = pidfd_alive(pidfd.as_fd());
        let attendants = vm.attendants().iter().filter_map(|a| a.watch().ok()).collect();
        vm.let_go();
        self.handed.insert(
            pid,
            Handed { pidfd, attendants, dir, ledger, lease: None, until: None, _share: share },
        );
        if !alive {
            return self.handed_ended(pid);
        }
        if let Some(seen) = self.pool.board.facts().vms.get_mut(&pid) {
            seen.state = State::Handed;
            seen.label = label;
            seen.owner = owner.map_or(0, |o| o.pid);
        }
        let Some(owner) = owner else { return };
        if owner.unconfirmed {
            self.await_confirmation(pid);
        }
        if owner.lease || owner.unconfirmed {
            self.lease(pid, owner);
        }
    }

    /// Watches the process that leases a VM.
    fn lease(&mut self, pid: i32, owner: Owner) {
        let watched = pidfd_open(owner.pid)
            .ok()
            .filter(|_| start_time(owner.pid) == Some(owner.start_time))
            .and_then(|fd| self.watch.add(fd).ok());
        let Some(token) = watched else { return self.end_lease(pid) };
        self.watched.insert(token, Watched::Owner(pid));
        if let Some(handed) = self.handed.get_mut(&pid) {
            handed.lease = Some(token);
        }
    }

    pub(super) fn end_lease(&mut self, pid: i32) {
        let Some(handed) = self.handed.get(&pid) else { return };
        if pidfd_alive(handed.pidfd.as_fd()) {
            event!(
                RECLAIMED, vm = handed.ledger.id, qemu = pid;
                "the process that leased VM {} has ended; ending the VM",
                handed.ledger.id
            );
            self.pool.board.facts().counters.leases_ended += 1;
            if let Some(owner) = handed.ledger.owner.filter(|_| handed.until.is_some()) {
                self.pool.quotas.unconfirmed(owner.uid);
            }
            let _ = pidfd_kill(handed.pidfd.as_fd(), KILL);
        }
    }

    pub(super) fn undelivered(&mut self, vm: Vm, why: &str) {
        self.pool.out_of_hands();
        event!(UNDELIVERED, vm = vm.id(), qemu = vm.pid(); "VM {} was not delivered ({why}): destroying it", vm.id());
        self.forget(vm.pid());
        self.pool.board.facts().counters.deliveries_failed += 1;
        vm.destroy();
    }

    /// What a VM needs has ended: the VM is of no use to anybody.
    pub(super) fn attendant_ended(&mut self, pid: i32, role: Role) {
        self.dying.retain(|attendant| {
            pidfd_alive(attendant.as_fd()) || {
                reap(attendant.as_fd());
                false
            }
        });
        let name = role.name();
        if let Some(handed) = self.handed.get(&pid) {
            // Its owner may have ended it, as Kata's runtime does with a proxy.
            for attendant in &handed.attendants {
                reap(attendant.as_fd());
            }
            event!(
                ATTENDANT_ENDED, vm = handed.ledger.id, qemu = pid;
                "the {name} of VM {} (QEMU pid {pid}) has ended",
                handed.ledger.id
            );
            return;
        }
        if self.pool.board.facts().vms.contains_key(&pid) {
            event!(ATTENDANT_ENDED, qemu = pid; "the {name} of QEMU pid {pid} has ended");
            self.sweep_ready();
        }
    }

    /// A VM that was handed out has ended: no zombie and no directory stays.
    pub(super) fn handed_ended(&mut self, pid: i32) {
        self.forget(pid);
        if let Some(handed) = self.handed.remove(&pid) {
            if let Some(token) = handed.lease {
                self.watch.remove(token);
                self.watched.remove(&token);
            }
            reap(handed.pidfd.as_fd());
            // What its owner has had started for it.
            drop(Ledger::read(&handed.dir).map(|ledger| ledger.adopt_attendants()));
            for attendant in handed.attendants {
                // Some end with their QEMU by themselves, and some do not.
                let _ = pidfd_kill(attendant.as_fd(), KILL);
                match pidfd_wait(attendant.as_fd(), DYING) {
                    true => drop(reap(attendant.as_fd())),
                    false => self.dying.push(attendant),
                }
            }
            drop(crate::vm::dir::VmDir::adopt(&handed.dir));
            event!(VM_ENDED, vm = handed.ledger.id, qemu = pid; "VM {} (QEMU pid {pid}) has ended", handed.ledger.id);
        }
    }
}
