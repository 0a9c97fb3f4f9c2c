//! The driver's end: what is on its way arrives, and no VM is forgotten.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::super::claim::Answer;
use super::super::pool::{Event, Ready};
use super::{Driver, KILL};
use crate::sys::process::pidfd_kill;
use crate::vm::ledger::State;

/// How long a stopping driver waits for answers that are on their way to clients.
const DELIVERY: Duration = Duration::from_secs(3);
/// How long it waits for its boot workers, whose QEMUs it has killed.
const WORKERS: Duration = Duration::from_secs(15);

impl Driver {
    /// What was told too late to be waited for: nobody reads the channel after this,
    /// and a VM that lies in it would be nobody's.
    fn last_events(&mut self) {
        while let Ok(event) = self.ends.events.try_recv() {
            match event {
                Event::Delivered { vm, waited, took } => self.delivered(vm, waited, took),
                Event::Started { pidfd, .. } => {
                    let _ = pidfd_kill(pidfd.as_fd(), KILL);
                }
                Event::Rested { ready, failed: None } | Event::Returned(ready) => self.part(ready),
                Event::Booted { result: Ok(ready), .. } => self.part(ready),
                Event::Confirm(asked) => self.confirm(asked, false),
                Event::Keep(asked) => self.confirm(asked, true),
                Event::Release(asked) => self.release(asked),
                Event::Note { asked, kind, text } => self.note(asked, kind, &text),
                Event::Claim(place) => {
                    self.pool.left_line(&place);
                    let _ = place.give(Answer::Closing);
                }
                // Dropped, and with it the VM.
                _ => {}
            }
        }
        self.part_all();
    }

    /// A VM that is not handed out here any more.
    pub(super) fn part(&self, ready: Box<Ready>) {
        match self.leaving {
            true => ready.vm.let_go(),
            false => ready.vm.destroy(),
        }
    }

    fn part_all(&self) {
        self.pool.ready.try_iter().for_each(|ready| self.part(ready));
    }

    /// Nothing is handed out any more; what was not handed out is destroyed.
    pub(super) fn stop(&mut self) {
        if self.leaving {
            self.pool.leave();
        }
        self.pool.close();
        self.jobs = None;
        while let Some(place) = self.line.pop() {
            self.pool.left_line(&place);
            let _ = place.give(Answer::Closing);
        }
        for booting in self.booting.values() {
            if let Some((_, pidfd)) = &booting.qemu {
                let _ = pidfd_kill(pidfd.as_fd(), KILL);
            }
        }
        let delivery = Instant::now() + DELIVERY;
        let workers = Instant::now() + WORKERS;
        while self.pool.in_hands() > 0 || !self.booting.is_empty() {
            self.part_all();
            let until = if self.booting.is_empty() { delivery } else { workers };
            let event = match self.ends.events.recv_deadline(until) {
                Ok(event) => event,
                Err(_) => break,
            };
            match event {
                Event::Claim(place) => {
                    self.pool.left_line(&place);
                    let _ = place.give(Answer::Closing);
                }
                Event::Started { pidfd, .. } => {
                    let _ = pidfd_kill(pidfd.as_fd(), KILL);
                }
                Event::Booted { job, result } => {
                    self.booting.remove(&job);
                    if let Ok(ready) = result {
                        self.part(ready);
                    }
                }
                other => self.handle(other),
            }
        }
        self.part_all();
        let resting = self.rest.stop();
        for worker in self.workers.drain(..).chain(resting) {
            if let Err(e) = worker.join(workers.saturating_duration_since(Instant::now())) {
                log::error!("stop: {e}");
            }
        }
        self.last_events();
        self.pool.board.facts().vms.retain(|_, vm| vm.state == State::Handed);
    }
}
