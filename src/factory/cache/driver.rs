//! The pool's driver: one thread, one `select!`, every change of the pool.
//!
//! Invariants: only this thread starts boots, serves the line, and decides
//! that a VM is dead; it never waits for a client, a guest or a boot. When it
//! has returned, no VM that was not handed out is left, unless it was told to leave
//! them to the next server.

mod confirm;
mod ending;
mod handed;
mod line;
mod outdated;
mod refill;
mod rest;
mod supervised;
mod target;

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{after, at, bounded, never, select, Sender};

use super::board::Seen;
use super::line::Line;
use super::making::Source;
use super::policy::{Policy, View};
use super::pool::{Ends, Event, Job, Pool, Ready, Stop, Then};
use super::quota::Share;
use super::room::Room;
use super::watch::Watch;
use crate::config::options::OURS;
use crate::config::Config;
use crate::confine::isolation::isolation;
use crate::events::event;
use crate::process::attendant::Role;
use crate::stuck;
use crate::sys::process::stand_back;
use crate::vm::dir;
use crate::vm::ledger::{Ledger, State};
use crate::vm::Vm;
use crate::worker::{self, Worker};

/// How often, while claims wait, their clients are looked after.
const LOOK: Duration = Duration::from_millis(500);
/// Between two tries to remove what could not be removed.
const TIDY: Duration = Duration::from_secs(5);
/// The driver's nice value.
const NICE: i32 = 10;
/// SIGKILL.
const KILL: i32 = 9;

/// What a watched process is to the pool.
enum Watched {
    /// QEMU of a VM, by pid.
    Qemu(i32),
    /// The process that leases a VM, by QEMU's pid.
    Owner(i32),
    /// What serves a VM beside QEMU, by QEMU's pid.
    Attendant(i32, Role),
}

/// A VM being made.
struct Booting {
    since: Instant,
    /// QEMU, once there is one.
    qemu: Option<(i32, OwnedFd)>,
}

/// Longest that the driver may take for one event: a QEMU that it kills has seconds.
const EVENT: Duration = Duration::from_secs(30);

/// A VM that was handed out; kept to reap it, and to end it with its owner.
struct Handed {
    pidfd: OwnedFd,
    attendants: Vec<OwnedFd>,
    dir: PathBuf,
    /// What is on disk about it.
    ledger: Ledger,
    /// The watch on its owner, when it is leased.
    lease: Option<u64>,
    /// When it is ended, unless its owner confirms it before.
    until: Option<Instant>,
    /// Its part of what its owner's user may have; none where it has no owner.
    _share: Option<Share>,
}

/// The driver's state; lives on its thread.
pub struct Driver {
    pool: Arc<Pool>,
    ends: Ends,
    policy: Policy,
    source: &'static str,
    jobs: Option<Sender<Job>>,
    workers: Vec<Worker<()>>,
    watch: Watch,
    watched: HashMap<u64, Watched>,
    tokens: HashMap<i32, u64>,
    line: Line,
    booting: HashMap<u64, Booting>,
    handed: HashMap<i32, Handed>,
    /// What served VMs that have ended, and was slower to end than they.
    dying: Vec<OwnedFd>,
    /// When VMs have to be confirmed, by QEMU's pid; the earliest first.
    graces: VecDeque<(Instant, i32)>,
    /// Whether VMs that users but root claim by Kata's call have no limit of memory.
    lifts_limits: bool,
    rest: rest::Rest,
    next_job: u64,
    room: Room,
    /// When to look again whether there is room for another VM, while there is none.
    held: Option<Instant>,
    /// When to try again to remove what could not be removed.
    tidy: Option<Instant>,
    /// VMs of the pool, by QEMU's pid, that are of an older configuration.
    outdated: HashSet<i32>,
    supervised: supervised::Supervised,
    /// Stopping, with VMs left to the next server.
    leaving: bool,
}

impl Driver {
    /// Starts the boot workers; the pool begins to fill when [`Driver::run`] does.
    ///
    /// # Errors
    /// When threads or epoll are not to be had.
    pub fn new(
        config: &Arc<Config>,
        pool: &Arc<Pool>,
        ends: Ends,
    ) -> Result<Driver, worker::Error> {
        // A rendezvous: a job is given only to a worker that is free, which the
        // policy's bound ensures, so the driver never waits here.
        let (jobs, jobs_out) = bounded::<Job>(0);
        let mut workers = Vec::new();
        let source = Arc::new(Source::of(config));
        // All that there may ever be: a thread that this one starts later, when it has
        // lowered its priority, would be as low for good, and so would the QEMUs it starts.
        for n in 0..config.boot_parallel {
            let (source, pool, jobs) = (Arc::clone(&source), Arc::clone(pool), jobs_out.clone());
            let name = format!("vmc-boot-{n}");
            workers.push(Worker::spawn(&name, move || source.work(&pool, &jobs))?);
        }
        let watch = Watch::start(pool.events.clone())
            .map_err(|source| worker::Error::Start { name: "vmc-watch".into(), source })?;
        {
            let mut facts = pool.board.facts();
            facts.target = config.pool;
            facts.parallel = config.boot_parallel;
            facts.isolation = isolation(config);
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            facts.started = now.map_or(0, |d| d.as_nanos() as u64);
        }
        Ok(Driver {
            pool: Arc::clone(pool),
            ends,
            policy: Policy::new(config.pool, config.boot_parallel.min(config.pool.max(1))),
            source: source.name(),
            jobs: Some(jobs),
            workers,
            watch,
            watched: HashMap::new(),
            tokens: HashMap::new(),
            line: Line::default(),
            booting: HashMap::new(),
            handed: HashMap::new(),
            dying: Vec::new(),
            graces: VecDeque::new(),
            lifts_limits: config.flag(OURS, "lift_memory_limit"),
            rest: rest::Rest::new(config, pool)?,
            next_job: 1,
            room: Room::new(config),
            held: None,
            tidy: None,
            outdated: HashSet::new(),
            supervised: supervised::Supervised::new(),
            leaving: false,
        })
    }

    /// Runs until it is told to stop, and cleans up; why it stopped.
    pub fn run(mut self) -> Stop {
        // What it does after a claim can wait; the client that has just been
        // answered, perhaps on the same processor, can not.
        stand_back(NICE);
        loop {
            // One moment for both: a pause that ends between them would find no alarm.
            let now = Instant::now();
            self.start_boots(now);
            self.rest_next(now);
            self.end_unconfirmed(now);
            let held = self.held.filter(|until| now < *until);
            let refill = self.policy.wake_at(self.view(), now);
            let (rest, tidy) = (self.rest_at(now), self.tidy_at(now));
            let wake = [refill, held, rest, self.grace_at(), tidy, self.supervisor_at(now)];
            let alarm = wake.into_iter().flatten().min().map_or_else(never, at);
            let look = if self.line.is_empty() { never() } else { after(LOOK) };
            let event = select! {
                recv(self.ends.events) -> event => event.ok(),
                recv(alarm) -> _ => continue,
                recv(look) -> _ => {
                    self.line.iter().for_each(|place| place.nudge());
                    continue;
                }
            };
            match event {
                Some(Event::Stop(stop)) => {
                    self.leaving = stop.then != Then::End;
                    self.stop();
                    return stop;
                }
                Some(event) => self.handle(event),
                // Impossible while the pool, which has a sender, is ours.
                None => return Stop { why: "the event channel closed".into(), then: Then::End },
            }
        }
    }

    /// Removes directories that could not be removed before; when to try again.
    fn tidy_at(&mut self, now: Instant) -> Option<Instant> {
        if self.tidy.is_some_and(|at| at <= now) {
            dir::remove_left();
            self.tidy = None;
        }
        if dir::any_left() {
            self.tidy.get_or_insert(now + TIDY);
        }
        self.tidy
    }

    fn view(&self) -> View {
        // What is in hands may come back, and an event tells when it does not.
        let all = self.pool.ready.len() + self.pool.in_hands();
        // Those of an older configuration are to be replaced.
        let ready = all.saturating_sub(self.outdated());
        View { ready, booting: self.booting.len(), waiting: self.line.len() }
    }

    fn handle(&mut self, event: Event) {
        let _doing = stuck::begin("an event of the pool", EVENT);
        #[cfg(feature = "faults")]
        crate::faults::point("pool");
        match event {
            Event::Claim(place) => self.claim(place),
            Event::Gone(place) => self.gone(&place),
            Event::Returned(ready) => self.returned(ready),
            Event::Dead(ready) => self.died(*ready, "is dead: QEMU has ended"),
            Event::Delivered { vm, waited, took } => self.delivered(vm, waited, took),
            Event::Undelivered { vm, why } => self.undelivered(*vm, &why),
            Event::Started { job, pid, id, pidfd } => self.started(job, pid, id, pidfd),
            Event::Booted { job, result } => self.booted(job, result),
            Event::Rehearsed { pid, silent } => self.rehearsed(pid, silent),
            Event::Rested { ready, failed } => self.rested(ready, failed),
            Event::Ended(token) => self.ended(token),
            Event::Confirm(asked) => self.confirm(asked, false),
            Event::Keep(asked) => self.confirm(asked, true),
            Event::Release(asked) => self.release(asked),
            Event::Note { asked, kind, text } => self.note(asked, kind, &text),
            Event::Target { target, by } => self.set_target(target, &by),
            // Only while it stops already.
            Event::Stop(stop) => self.leaving &= stop.then != Then::End,
        }
    }

    fn ready(&mut self, ready: Box<Ready>, since: Instant) {
        self.policy.succeeded();
        let vm = &ready.vm;
        let pid = vm.pid();
        self.watch_qemu(vm);
        // It will come to rest.
        let seen = Seen { awake: self.rest.wanted(), ..Seen::of(vm, State::Ready, since) };
        {
            let mut facts = self.pool.board.facts();
            facts.counters.boots += 1;
            let clone = usize::from(self.source == "template");
            facts.made[clone].add(since.elapsed());
            facts.vms.insert(pid, seen);
        }
        event!(
            VM_READY, vm = vm.id(), qemu = pid, seconds = format_args!("{:.3}", since.elapsed().as_secs_f64());
            "VM {} (QEMU pid {pid}) after {:.1} s; {} of {} in the pool",
            vm.id(),
            since.elapsed().as_secs_f64(),
            self.pool.ready.len() + 1,
            self.policy.target()
        );
        self.publish(ready);
        if self.outdated() > 0 {
            self.best_first();
        }
    }

    /// Has the watch tell of the end of its QEMU.
    fn watch_qemu(&mut self, vm: &Vm) {
        match vm.watch().and_then(|fd| self.watch.add(fd)) {
            Ok(token) => {
                self.watched.insert(token, Watched::Qemu(vm.pid()));
                self.tokens.insert(vm.pid(), token);
            }
            Err(e) => log::warn!("watch VM {}: {e}", vm.id()),
        }
        for attendant in vm.attendants() {
            match attendant.watch().and_then(|fd| self.watch.add(fd)) {
                Ok(token) => {
                    let watched = Watched::Attendant(vm.pid(), attendant.role());
                    self.watched.insert(token, watched);
                }
                Err(e) => log::warn!("watch VM {}: {e}", vm.id()),
            }
        }
    }

    fn ended(&mut self, token: u64) {
        self.watch.remove(token);
        match self.watched.remove(&token) {
            Some(Watched::Owner(pid)) => self.end_lease(pid),
            Some(Watched::Qemu(pid)) if self.handed.contains_key(&pid) => self.handed_ended(pid),
            Some(Watched::Qemu(_)) => self.sweep_ready(),
            Some(Watched::Attendant(pid, role)) => self.attendant_ended(pid, role),
            None => {}
        }
    }

    /// Takes dead VMs out of the ready channel.
    fn sweep_ready(&mut self) {
        let all: Vec<_> = self.pool.ready.try_iter().collect();
        for ready in all {
            if ready.vm.alive() {
                let _ = self.ends.ready.try_send(ready);
            } else {
                let lost = ready.vm.lost();
                self.died(*ready, &format!("is dead: {lost}"));
            }
        }
    }

    /// A VM of the pool that nobody can use any more.
    fn died(&mut self, ready: Ready, what: &str) {
        let (id, pid) = (ready.vm.id(), ready.vm.pid());
        let text = format!("VM {id} (QEMU pid {pid}), which stood ready, {what}");
        self.forget(ready.vm.pid());
        {
            let mut facts = self.pool.board.facts();
            facts.counters.died_ready += 1;
            facts.last_error = Some(text.clone());
        }
        event!(VM_DIED, vm = id, qemu = pid; "{text}; replacing it");
    }

    /// No word of it in status, and no watch.
    fn forget(&mut self, pid: i32) {
        self.pool.board.facts().vms.remove(&pid);
        self.outdated.remove(&pid);
        if let Some(token) = self.tokens.remove(&pid) {
            self.watch.remove(token);
            self.watched.remove(&token);
        }
    }
}
