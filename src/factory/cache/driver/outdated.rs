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
    /// are, or than [`MOST_FOR_ONE`], they stay: an older VM is better than none. The last of
    /// several stays until a new one has come up. Whether any did.
    pub(super) fn give_way(&mut self) -> bool {
        if self.outdated.is_empty() || !self.booting.is_empty() || self.policy.failures() > 0 {
            return false;
        }
        let all: Vec<_> = self.pool.ready.try_iter().collect();
        let most = match self.pool.board.facts().counters.boots {
            0 => MOST_FOR_ONE.min(all.len().saturating_sub(1).max(1)),
            _ => MOST_FOR_ONE,
        };
        let older = all.iter().map(|ready| &ready.vm);
        let older: Vec<_> =
            older.filter(|vm| self.outdated.contains(&vm.pid())).take(most).collect();
        let enough = self.room.without(&older).unwrap_or(0);
        let going: Vec<i32> = older[..enough].iter().map(|vm| vm.pid()).collect();
        let (going, staying): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|ready| going.contains(&ready.vm.pid()));
        // Claims find those while these end.
        staying.into_iter().for_each(|ready| self.publish(ready));
        going.into_iter().for_each(|ready| self.retire(*ready));
        enough > 0
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
