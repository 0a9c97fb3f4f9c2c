//! VMs that the server before made from an older configuration: they are handed out
//! while there are no others, and each goes when a new one stands in its place, or when
//! a new one can be made of its memory.

use super::super::pool::Ready;
use super::{event, Driver};

/// VMs of an older configuration that go for one new one: with more the pool would be
/// small for as long as that takes.
const MOST_FOR_ONE: usize = 4;

impl Driver {
    /// Of the VMs in the pool, or on their way out of it, those of an older configuration.
    pub(super) fn outdated(&self) -> usize {
        self.outdated.len()
    }

    /// Claims take the first: new ones before older ones, those at rest before those
    /// that are not.
    pub(super) fn best_first(&mut self) {
        let mut all: Vec<_> = self.pool.ready.try_iter().collect();
        all.sort_by_key(|r| (self.outdated.contains(&r.vm.pid()), !r.at_rest));
        all.into_iter().for_each(|ready| self.publish(ready));
    }

    /// There is no room for a new VM: as many older ones make room as that takes, for one
    /// new one at a time, and not while new ones fail. Where it would take more than there
    /// are, or than [`MOST_FOR_ONE`], they stay: an older VM is better than none. Whether any
    /// did.
    pub(super) fn give_way(&mut self) -> bool {
        if self.outdated.is_empty() || !self.booting.is_empty() || self.policy.failures() > 0 {
            return false;
        }
        let ready = self.pool.board.ready().into_iter().map(|(pid, ..)| pid);
        let older: Vec<i32> =
            ready.filter(|pid| self.outdated.contains(pid)).take(MOST_FOR_ONE).collect();
        let going = &older[..self.room.without(&older).unwrap_or(0)];
        if going.is_empty() {
            return false;
        }
        for ready in self.pool.ready.try_iter().collect::<Vec<_>>() {
            match going.contains(&ready.vm.pid()) {
                true => self.retire(*ready),
                false => self.publish(ready),
            }
        }
        true
    }

    /// Ends a VM that stands ready.
    pub(super) fn retire(&mut self, ready: Ready) {
        let (id, pid) = (ready.vm.id(), ready.vm.pid());
        let why = match self.outdated.contains(&pid) {
            true => "it is of an older configuration, and gives way to a new one",
            false => "the pool has more than it shall keep",
        };
        event!(RETIRED, vm = id, qemu = pid; "VM {id} (QEMU pid {pid}): {why}");
        // Whoever waits until it is not seen any more finds it gone.
        ready.vm.destroy();
        self.forget(pid);
    }
}
