//! Serving the claims in line.

use std::sync::Arc;

use super::super::claim::{Answer, Place};
use super::super::pool::Ready;
use super::Driver;
use crate::vm::ledger::State;

impl Driver {
    pub(super) fn claim(&mut self, place: Arc<Place>) {
        if self.pool.closing() {
            self.pool.left_line(&place);
            let _ = place.give(Answer::Closing);
            return;
        }
        self.line.push(place);
        self.serve_line();
        self.pool.board.facts().waiting = self.line.len();
    }

    /// Gives ready VMs to the claims in line.
    pub(super) fn serve_line(&mut self) {
        while !self.line.is_empty() {
            let Ok(ready) = self.pool.ready.try_recv() else { return };
            self.publish(ready);
        }
    }

    /// A VM for whose turn it is, or else for the ready channel.
    pub(super) fn publish(&mut self, ready: Box<Ready>) {
        if !ready.vm.alive() {
            return self.died(*ready, "is dead: QEMU has ended");
        }
        let pid = ready.vm.pid();
        let mut answer = Answer::Vm(ready);
        while let Some(place) = self.line.pop() {
            self.pool.into_hands();
            let given = place.give(answer);
            self.pool.left_line(&place);
            match given {
                Ok(()) => {
                    let mut facts = self.pool.board.facts();
                    facts.waiting = self.line.len();
                    if let Some(seen) = facts.vms.get_mut(&pid) {
                        seen.state = State::Handing;
                    }
                    return;
                }
                Err(back) => {
                    self.pool.out_of_hands();
                    self.pool.board.facts().counters.claims_cancelled += 1;
                    answer = back;
                }
            }
        }
        if let Answer::Vm(ready) = answer {
            self.let_rest(&ready);
            // Full only when thousands of claims had VMs booted for them and left.
            if let Err(over) = self.ends.ready.try_send(ready) {
                self.forget(over.into_inner().vm.pid());
            }
        }
    }

    /// Back in the pool, or to the next in line.
    pub(super) fn returned(&mut self, ready: Box<Ready>) {
        self.pool.out_of_hands();
        {
            let mut facts = self.pool.board.facts();
            facts.counters.claims_cancelled += 1;
            if let Some(seen) = facts.vms.get_mut(&ready.vm.pid()) {
                seen.state = State::Ready;
            }
        }
        self.publish(ready);
        self.retire_surplus();
    }

    pub(super) fn gone(&mut self, place: &Arc<Place>) {
        let was_there = self.line.remove(place);
        let mut facts = self.pool.board.facts();
        if was_there {
            self.pool.left_line(place);
            facts.counters.claims_cancelled += 1;
        }
        facts.waiting = self.line.len();
    }
}
