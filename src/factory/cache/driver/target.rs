//! How many VMs are kept ready, changed while the server runs.

use super::super::claim::Answer;
use super::super::pool::Target;
use super::Driver;
use crate::events::event;

impl Driver {
    /// Is this from now on.
    pub fn set_target(&mut self, target: Target, by: &str) {
        let n = match target {
            Target::Keep(n) => {
                event!(POOL_RESIZED; "{n} VMs will be kept ready, asked for by {by}");
                n
            }
            Target::Drained => {
                event!(POOL_DRAINED; "no VM is handed out any more, asked for by {by}");
                0
            }
        };
        let drained = target == Target::Drained;
        self.pool.drain(drained);
        self.policy.set_target(n, self.workers.len().min(n.max(1)));
        self.pool.board.facts().target = n;
        if drained {
            while let Some(place) = self.line.pop() {
                self.pool.left_line(&place);
                let _ = place.give(Answer::Closing);
            }
            self.pool.board.facts().waiting = 0;
        }
        self.retire_surplus();
    }

    /// Ends VMs that stand ready beyond the target, the last to have come first.
    pub(super) fn retire_surplus(&mut self) {
        if self.pool.ready.len() <= self.policy.target() {
            return;
        }
        let all: Vec<_> = self.pool.ready.try_iter().collect();
        for (n, ready) in all.into_iter().enumerate() {
            match n < self.policy.target() || !self.line.is_empty() {
                true => self.publish(ready),
                false => self.retire(*ready),
            }
        }
    }
}
