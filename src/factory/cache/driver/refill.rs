//! Boots: begun when VMs are missing and the host has room, and what comes of them.

use std::os::fd::OwnedFd;
use std::time::Instant;

use super::super::board::Seen;
use super::super::pool::{Job, Ready};
use super::super::room;
use super::{Booting, Driver};
use crate::events::event;
use crate::report::chain;
use crate::sys::process::random;
use crate::vm::boot::BootError;
use crate::vm::ledger::State;

impl Driver {
    /// Begins as many boots as are wanted and there is room for.
    pub(super) fn start_boots(&mut self, now: Instant) {
        let Some(jobs) = self.jobs.clone() else { return };
        let wanted = self.policy.to_start(self.view(), now);
        if wanted == 0 {
            // Nothing is missing any more, or it is not the time: no word of memory.
            self.held = None;
            self.pool.board.facts().held = None;
            return;
        }
        if self.held.is_some_and(|until| now < until) {
            return;
        }
        for _ in 0..wanted {
            let room = self.room.look(self.booting.len())
                || self.give_way() && self.room.look(self.booting.len());
            self.held = (!room).then(|| now + room::LOOK);
            self.pool.board.facts().held = self.room.short().map(str::to_string);
            if !room {
                return;
            }
            let number = self.next_job;
            if jobs.send(Job { number }).is_err() {
                return;
            }
            self.next_job += 1;
            self.policy.started();
            self.booting.insert(number, Booting { since: now, qemu: None });
            self.pool.board.facts().making = self.booting.len();
        }
    }

    pub(super) fn started(&mut self, job: u64, pid: i32, id: String, pidfd: OwnedFd) {
        let Some(booting) = self.booting.get_mut(&job) else { return };
        let seen = Seen {
            id,
            state: State::Booting,
            source: self.source.into(),
            cpus: 0,
            memory_mib: 0,
            since: booting.since,
            awake: false,
            adopted: false,
            outdated: false,
            label: String::new(),
            owner: 0,
            used: false,
        };
        let before = booting.qemu.replace((pid, pidfd));
        let mut facts = self.pool.board.facts();
        if let Some((template, _)) = before {
            // It has been saved and is gone.
            facts.vms.remove(&template);
        }
        facts.vms.insert(pid, seen);
    }

    pub(super) fn booted(&mut self, job: u64, result: Result<Box<Ready>, Box<BootError>>) {
        let booting = self.booting.remove(&job);
        let since = booting.as_ref().map_or_else(Instant::now, |b| b.since);
        match result {
            Ok(ready) => {
                self.ready(ready, since);
                self.retire_surplus();
            }
            Err(e) => {
                if let Some((pid, _)) = booting.and_then(|b| b.qemu) {
                    self.forget(pid);
                }
                let mut byte = [0];
                let jitter = random(&mut byte).map_or(0.5, |()| f64::from(byte[0]) / 255.0);
                let pause = self.policy.failed(since, Instant::now(), jitter);
                let text = chain(&*e);
                {
                    // Before the log: who reads of it finds it in status.
                    let mut facts = self.pool.board.facts();
                    facts.counters.boots_failed += 1;
                    *facts.failures.entry(e.phase.name()).or_default() += 1;
                    facts.last_error = Some(text.clone());
                }
                event!(
                    BOOT_FAILED, vm = e.id, qemu = e.pid, phase = e.phase.name();
                    "{text}; failure {} in a row, next try in {:.1} s",
                    self.policy.failures(),
                    pause.as_secs_f64()
                );
            }
        }
        // Last: whoever waits until none is made any more finds what has become of it.
        self.pool.board.facts().making = self.booting.len();
    }
}
