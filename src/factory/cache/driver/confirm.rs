//! Claims that their client has to confirm, and VMs that are given back.
//!
//! Invariant: until it is confirmed, a VM is as good as leased: it is ended with its
//! claimer, or when its grace is over.

use std::os::fd::AsFd;
use std::time::Instant;

use super::super::pool::{Asked, Refusal, GRACE};
use super::{Driver, KILL};
use crate::events::event;
use crate::sys::process::pidfd_kill;
use crate::vm::ledger::Owner;
use crate::vm::{notes, private};

impl Driver {
    /// A VM that has to be confirmed; what is told when it is not in time.
    pub(super) fn await_confirmation(&mut self, pid: i32) {
        let until = Instant::now() + GRACE;
        if let Some(handed) = self.handed.get_mut(&pid) {
            handed.until = Some(until);
            self.graces.push_back((until, pid));
        }
    }

    /// When the next grace is over.
    pub(super) fn grace_at(&self) -> Option<Instant> {
        self.graces.front().map(|(until, _)| *until)
    }

    /// Ends what was not confirmed in time.
    pub(super) fn end_unconfirmed(&mut self, now: Instant) {
        while let Some((until, pid)) = self.graces.front().copied().filter(|(t, _)| *t <= now) {
            self.graces.pop_front();
            let due = self.handed.get(&pid).filter(|h| h.until == Some(until));
            if let Some(handed) = due {
                event!(
                    RECLAIMED, vm = handed.ledger.id, qemu = pid;
                    "the claim of VM {} was not confirmed within {} s; ending the VM",
                    handed.ledger.id,
                    GRACE.as_secs()
                );
                self.pool.board.facts().counters.claims_unconfirmed += 1;
                if let Some(owner) = &handed.ledger.owner {
                    self.pool.quotas.unconfirmed(owner.uid);
                }
                let _ = pidfd_kill(handed.pidfd.as_fd(), KILL);
            }
        }
    }

    fn find(&self, id: &str) -> Result<(i32, Option<Owner>), Refusal> {
        let found = self.handed.iter().find(|(_, handed)| handed.ledger.id == id);
        found.map(|(pid, handed)| (*pid, handed.ledger.owner)).ok_or(Refusal::NoSuchVm)
    }

    /// Its claimer has it; with `keep`, for good.
    pub(super) fn confirm(&mut self, asked: Asked, keep: bool) {
        let Asked { id, by, reply } = asked;
        let confirmed = self.find(&id).and_then(|(pid, owner)| match owner {
            Some(o) if (o.pid, o.start_time) == (by.pid, by.start_time) => {
                self.confirmed(pid, keep);
                Ok(())
            }
            _ => Err(Refusal::NotYours),
        });
        // Who has gone meanwhile is watched.
        let _ = reply.send(confirmed);
    }

    fn confirmed(&mut self, pid: i32, keep: bool) {
        let Some(handed) = self.handed.get_mut(&pid) else { return };
        handed.until = None;
        let Some(owner) = handed.ledger.owner.as_mut() else { return };
        owner.unconfirmed = false;
        owner.lease &= !keep;
        let leased = owner.lease;
        // Its owner may have ended it, and its directory, already.
        if let Err(e) = handed.ledger.write(&handed.dir) {
            log::debug!("record that VM {} was confirmed: {e}", handed.ledger.id);
        }
        if let Some(token) = handed.lease.take_if(|_| !leased) {
            self.watch.remove(token);
            self.watched.remove(&token);
        }
    }

    /// Its owner, or who else may, notes something about it.
    pub(super) fn note(&mut self, asked: Asked, kind: notes::Kind, text: &[u8]) {
        let Asked { id, by, reply } = asked;
        let noted = self.find(&id).and_then(|(pid, owner)| {
            if !may(&by, owner) {
                return Err(Refusal::NotYours);
            }
            let Some(handed) = self.handed.get(&pid) else { return Err(Refusal::NoSuchVm) };
            private::replace(&handed.dir, kind.file(), text).map_err(|e| {
                log::warn!("note {} of VM {id}: {e}", kind.file());
                Refusal::NotNoted
            })
        });
        let _ = reply.send(noted);
    }

    /// Its claimer, or who else may, does not want it any more.
    pub(super) fn release(&mut self, asked: Asked) {
        let Asked { id, by, reply } = asked;
        let released = self.find(&id).and_then(|(pid, owner)| {
            if !may(&by, owner) {
                return Err(Refusal::NotYours);
            }
            if let Some(handed) = self.handed.get(&pid) {
                event!(RELEASED, vm = id, pid = by.pid, uid = by.uid; "VM {id} by pid {} of uid {}", by.pid, by.uid);
                let _ = pidfd_kill(handed.pidfd.as_fd(), KILL);
            }
            Ok(())
        });
        let _ = reply.send(released);
    }
}

/// Whether a process may do with a VM as its owner may: the same user's, root's and the
/// server's.
fn may(by: &Owner, owner: Option<Owner>) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    owner.is_some_and(|o| o.uid == by.uid) || by.uid == 0 || by.uid == own
}
