//! Which VM comes to rest next: one at a time, and only while nothing boots and
//! nobody waits, since both matter more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;

use super::super::pool::{Pool, Ready};
use super::super::resting::{self, Task};
use super::Driver;
use crate::agent::address::Address;
use crate::agent::Kind;
use crate::config::options::OURS;
use crate::config::Config;
use crate::vm::ledger::State;
use crate::worker::{self, Worker};

/// What the driver knows of it.
pub(super) struct Rest {
    /// None once the driver stops.
    tasks: Option<Sender<Task>>,
    thread: Option<Worker<()>>,
    rehearse: bool,
    pause: bool,
    /// VMs that stand ready and run, by QEMU's pid, the oldest first; with where
    /// their agents are, when they can rehearse.
    awake: VecDeque<(i32, Option<Address>)>,
    /// The one whose task is under way.
    busy: Option<i32>,
}

impl Rest {
    pub(super) fn new(config: &Arc<Config>, pool: &Arc<Pool>) -> Result<Rest, worker::Error> {
        let (tasks, thread) = resting::start(config, pool)?;
        Ok(Rest {
            tasks: Some(tasks),
            thread: Some(thread),
            rehearse: config.flag(OURS, "rehearse") && config.agent_kind != Kind::Noop,
            pause: config.pause_idle(),
            awake: VecDeque::new(),
            busy: None,
        })
    }

    /// No further task is begun; the thread, to be joined.
    pub(super) fn stop(&mut self) -> Option<Worker<()>> {
        self.tasks = None;
        self.thread.take()
    }

    /// Whether anything is done for VMs that wait.
    pub(super) fn wanted(&self) -> bool {
        self.rehearse || self.pause
    }

    fn begin(&mut self, task: Task) -> bool {
        self.tasks.as_ref().is_some_and(|tasks| tasks.try_send(task).is_ok())
    }
}

impl Driver {
    /// A VM stands ready and runs: its turn will come.
    pub(super) fn let_rest(&mut self, ready: &Ready) {
        let pid = ready.vm.pid();
        let known = self.rest.busy == Some(pid) || self.rest.awake.iter().any(|(p, _)| *p == pid);
        if known || ready.at_rest || !self.rest.wanted() {
            return;
        }
        let rehearses = self.rest.rehearse && ready.vm.own_agent();
        let agent = rehearses.then(|| ready.vm.agent_address().clone());
        self.rest.awake.push_back((pid, agent));
        if let Some(seen) = self.pool.board.facts().vms.get_mut(&pid) {
            seen.awake = true;
        }
    }

    /// When to look again whether one can begin, if nothing else happens.
    pub(super) fn rest_at(&self, now: Instant) -> Option<Instant> {
        let waits = self.rest.busy.is_none() && !self.rest.awake.is_empty();
        self.policy.calm_until(self.view(), now).filter(|_| waits)
    }

    /// Begins with the next one, if this is the time.
    pub(super) fn rest_next(&mut self, now: Instant) {
        let view = self.view();
        let calm =
            view.waiting == 0 && view.booting == 0 && self.policy.calm_until(view, now).is_none();
        while calm && self.rest.busy.is_none() {
            let Some((pid, agent)) = self.rest.awake.pop_front() else { return };
            let ready =
                self.pool.board.facts().vms.get(&pid).is_some_and(|v| v.state == State::Ready);
            if !ready {
                continue;
            }
            self.rest.busy = Some(pid);
            let Some(agent) = agent else {
                self.rehearsed(pid, None);
                continue;
            };
            if !self.rest.begin(Task::Rehearse { pid, agent }) {
                // Its thread is gone: VMs stay as they are.
                log::error!("the thread by which VMs come to rest has ended");
                (self.rest.rehearse, self.rest.pause, self.rest.busy) = (false, false, None);
                return;
            }
        }
    }

    /// It is paused, unless somebody has taken it meanwhile.
    pub(super) fn rehearsed(&mut self, pid: i32, silent: Option<String>) {
        self.rest.busy = None;
        let Some(ready) = self.take_out(pid) else { return };
        if let Some(why) = silent {
            return self.unfit(*ready, &format!("no longer answers: {why}"));
        }
        if !self.rest.pause {
            return self.at_rest(ready);
        }
        self.pool.into_hands();
        if self.rest.begin(Task::Pause(ready)) {
            self.rest.busy = Some(pid);
        } else {
            // Only when the thread is gone, and with it the VM: it was in the task.
            self.pool.out_of_hands();
            self.forget(pid);
        }
    }

    pub(super) fn rested(&mut self, ready: Box<Ready>, failed: Option<String>) {
        self.rest.busy = None;
        self.pool.out_of_hands();
        if let Some(why) = failed {
            return self.unfit(*ready, &format!("can not be paused: {why}"));
        }
        self.at_rest(ready);
        self.retire_surplus();
    }

    /// It goes, as one that failed to boot: if the host is to blame, the next ones
    /// would go the same way, and are not made at once.
    fn unfit(&mut self, ready: Ready, what: &str) {
        let now = Instant::now();
        self.policy.failed(now, now, 0.5);
        self.died(ready, what);
    }

    fn at_rest(&mut self, mut ready: Box<Ready>) {
        if let Some(seen) = self.pool.board.facts().vms.get_mut(&ready.vm.pid()) {
            seen.awake = false;
        }
        ready.at_rest = true;
        self.publish(ready);
        self.best_first();
    }

    /// A VM out of the ready channel, if it is there.
    fn take_out(&mut self, pid: i32) -> Option<Box<Ready>> {
        let all: Vec<_> = self.pool.ready.try_iter().collect();
        let mut found = None;
        for ready in all {
            match ready.vm.pid() == pid {
                true => found = Some(ready),
                false => self.publish(ready),
            }
        }
        found
    }
}
