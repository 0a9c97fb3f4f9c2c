//! What the handlers of claims and the driver share.
//!
//! Invariants: the ready channel holds VMs only while no claim is in line;
//! `waiting` counts the claims in line, the ones on their way to it too, so
//! that a newcomer never overtakes them; `in_hands` counts VMs between the
//! channel and the driver's knowing what became of them.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crossbeam_channel::{bounded, Receiver, Sender};
use futures_channel::oneshot;

use super::board::Board;
use super::claim::Place;
use super::quota::{Limits, Quotas, Share};
use crate::config::MAX_POOL;
use crate::proto::cache::GrpcVM;
use crate::vm::boot::BootError;
use crate::vm::ledger::{ClaimNote, Owner, State};
use crate::vm::{notes, Vm};

/// Events that may lie before the driver: each of its sources (handlers,
/// workers, the watch) waits when it is behind by so many.
const EVENTS: usize = 1024;

/// Claims that may wait at once; and those of one user but root.
pub const MAX_WAITING: usize = 4096;
/// See [`MAX_WAITING`].
pub const MAX_WAITING_OF_USER: usize = 1024;

/// Told to claims when the server ends.
pub const STOPPING: &str = "the server is stopping";
/// Told to claims when another takes its place at once: to be asked again.
pub const RESTARTING: &str = "the server is restarting: ask again";

/// Told to claims while the pool is drained.
pub const DRAINED: &str = "the pool is drained: `vmcache resize N` fills it again";

/// How long a VM that was claimed may be unconfirmed.
pub const GRACE: Duration = Duration::from_secs(10);

/// A VM that can be handed out, its message made already.
pub struct Ready {
    /// The VM.
    pub vm: Vm,
    /// Its form on the wire.
    pub message: GrpcVM,
    /// Where its claimer will stand.
    pub note: ClaimNote,
    /// Whether all that is done for a VM that waits has been done.
    pub at_rest: bool,
}

/// What the driver is told.
#[allow(missing_docs)] // The fields are what the text names.
pub enum Event {
    /// A claim found nothing ready and stands in line.
    Claim(Arc<Place>),
    /// A claim in line has gone.
    Gone(Arc<Place>),
    /// A claim in line had gone when its VM came; nobody has seen the VM.
    Returned(Box<Ready>),
    /// A handler found this VM dead as it took it.
    Dead(Box<Ready>),
    /// The client has the VM, after so long; `waited` when it had stood in line for it.
    Delivered { vm: Delivered, waited: bool, took: Duration },
    /// The client may or may not have it: it must be destroyed.
    Undelivered { vm: Box<Vm>, why: String },
    /// A worker started QEMU.
    Started { job: u64, pid: i32, id: String, pidfd: std::os::fd::OwnedFd },
    /// A worker is done.
    Booted { job: u64, result: Result<Box<Ready>, Box<BootError>> },
    /// This VM has had its rehearsal; with the reason, if its agent did not answer.
    Rehearsed { pid: i32, silent: Option<String> },
    /// This VM has been paused; with the reason, if it could not be.
    Rested { ready: Box<Ready>, failed: Option<String> },
    /// A watched process has ended.
    Ended(u64),
    /// A client says that it has a VM.
    Confirm(Asked),
    /// A client's VM is to outlive it.
    Keep(Asked),
    /// A client does not want its VM any more.
    Release(Asked),
    /// A client notes something about its VM, which has been looked at.
    Note { asked: Asked, kind: notes::Kind, text: Vec<u8> },
    /// Be this from now on.
    Target { target: Target, by: String },
    /// Hand nothing out any more, clean up.
    Stop(Stop),
}

/// What a client asks of a VM that it claimed.
pub struct Asked {
    /// The VM's id.
    pub id: String,
    /// Who asks.
    pub by: Owner,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Result<(), Refusal>>,
}

/// Why it is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No VM of that name was handed out, or it has ended.
    NoSuchVm,
    /// Another process claimed it.
    NotYours,
    /// It could not be written down.
    NotNoted,
}

/// Why the pool ends, and what becomes of its VMs.
#[derive(Clone, Debug)]
pub struct Stop {
    /// A few words.
    pub why: String,
    /// What comes after.
    pub then: Then,
}

/// What comes after a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing: the VMs that stand ready are ended.
    End,
    /// The same process's program anew, which takes them over.
    Again,
    /// Another process, likewise, that a supervisor starts.
    Next,
}

/// What a pool has been told to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// So many VMs are kept ready.
    Keep(usize),
    /// None is handed out any more.
    Drained,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Keep(n) => n.fmt(f),
            Target::Drained => f.write_str("drained"),
        }
    }
}

impl FromStr for Target {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Target, Self::Err> {
        match text {
            "drained" => Ok(Target::Drained),
            n => n.parse().map(Target::Keep),
        }
    }
}

/// A VM that its client has. It is the client's whatever becomes of this: when
/// nobody takes the VM out, since the driver has ended, dropping this records
/// whose it is and leaves it running.
pub struct Delivered {
    vm: Option<Box<Vm>>,
    owner: Owner,
    label: String,
    share: Option<Share>,
}

impl Delivered {
    /// `owner` has this VM, as a share of what its user may have.
    pub fn new(vm: Vm, owner: Owner, label: String, share: Share) -> Delivered {
        Delivered { vm: Some(Box::new(vm)), owner, label, share: Some(share) }
    }

    /// The VM and who has it, recorded; whoever takes it must let it go.
    pub fn take(mut self) -> Option<(Vm, Owner, Share)> {
        let (vm, share) = (self.vm.take()?, self.share.take()?);
        Some((recorded(*vm, self.owner, &self.label), self.owner, share))
    }
}

impl Drop for Delivered {
    fn drop(&mut self) {
        if let Some(vm) = self.vm.take() {
            recorded(*vm, self.owner, &self.label).let_go();
        }
    }
}

/// Writes down whose it is. Nothing depends on that when it can not be written:
/// its owner may have ended it and removed the directory already, and the claim
/// note names the owner as well.
fn recorded(mut vm: Vm, owner: Owner, label: &str) -> Vm {
    let written = vm.record(|l| {
        l.state = State::Handed;
        l.owner = Some(owner);
        l.label = label.to_string();
    });
    if let Err(e) = written {
        log::debug!("record that VM {} was handed out: {e}", vm.id());
    }
    vm
}

/// The handlers' side of the pool.
pub struct Pool {
    /// VMs that stand ready.
    pub ready: Receiver<Box<Ready>>,
    /// The driver's ear.
    pub events: Sender<Event>,
    /// Facts for status.
    pub board: Board,
    /// What users have of it.
    pub quotas: Arc<Quotas>,
    waiting: AtomicUsize,
    /// Likewise, by user.
    waiting_of: Mutex<HashMap<u32, usize>>,
    in_hands: AtomicUsize,
    closing: AtomicBool,
    leaving: AtomicBool,
    drained: AtomicBool,
    ending: AtomicBool,
}

/// What the driver holds of the channels.
pub struct Ends {
    /// Where ready VMs go in.
    pub ready: Sender<Box<Ready>>,
    /// Where events come out.
    pub events: Receiver<Event>,
}

impl Pool {
    /// An empty pool, of which users may have so much.
    pub fn new(limits: Limits) -> (Arc<Pool>, Ends) {
        // More than the pool's target can be ready at once when claims in line
        // had more booted for them and then went away.
        let (ready_in, ready) = bounded(2 * MAX_POOL as usize);
        let (events, events_out) = bounded(EVENTS);
        let pool = Pool {
            ready,
            events,
            board: Board::default(),
            quotas: Quotas::new(limits),
            waiting: AtomicUsize::new(0),
            waiting_of: Mutex::default(),
            in_hands: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            drained: AtomicBool::new(false),
            ending: AtomicBool::new(false),
        };
        (Arc::new(pool), Ends { ready: ready_in, events: events_out })
    }

    /// A ready VM, when there is one and nobody is in line for it.
    pub fn take(&self) -> Option<Box<Ready>> {
        loop {
            if self.waiting.load(Ordering::SeqCst) > 0 {
                return None;
            }
            // Counted first, and asked after: a driver that stops must not miss a
            // VM in hand.
            self.into_hands();
            if self.closing() {
                self.out_of_hands();
                return None;
            }
            let Ok(ready) = self.ready.try_recv() else {
                self.out_of_hands();
                return None;
            };
            if ready.vm.alive() {
                return Some(ready);
            }
            self.out_of_hands();
            self.tell(Event::Dead(ready));
        }
    }

    /// A VM is on its way to a client.
    pub fn into_hands(&self) {
        self.in_hands.fetch_add(1, Ordering::SeqCst);
    }

    /// The driver knows what became of it.
    pub fn out_of_hands(&self) {
        self.in_hands.fetch_sub(1, Ordering::SeqCst);
    }

    /// VMs on their way to clients.
    pub fn in_hands(&self) -> usize {
        self.in_hands.load(Ordering::SeqCst)
    }

    /// Claims in line.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    fn waiting_of(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.waiting_of.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Stands in line, a claim of this user's.
    ///
    /// # Errors
    /// A sentence, when too many wait already.
    pub fn stand_in_line(&self, uid: u32) -> Result<Arc<Place>, String> {
        {
            let mut waiting = self.waiting_of();
            if self.waiting() >= MAX_WAITING {
                return Err(format!("{MAX_WAITING} claims wait already"));
            }
            let own = waiting.entry(uid).or_default();
            if uid != 0 && *own >= MAX_WAITING_OF_USER {
                return Err(format!("{MAX_WAITING_OF_USER} claims of uid {uid} wait already"));
            }
            *own += 1;
            self.waiting.fetch_add(1, Ordering::SeqCst);
        }
        let place = Arc::new(Place::of(uid));
        self.tell(Event::Claim(Arc::clone(&place)));
        Ok(place)
    }

    /// The driver has dealt with a claim in line.
    pub fn left_line(&self, place: &Place) {
        let mut waiting = self.waiting_of();
        if let Some(own) = waiting.get_mut(&place.uid) {
            *own -= 1;
            if *own == 0 {
                waiting.remove(&place.uid);
            }
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Tells the driver; an event after its end is dropped, and with it the VM
    /// that it holds is destroyed, unless a client has it.
    pub fn tell(&self, event: Event) {
        let _ = self.events.send(event);
    }

    /// What claims are told that can not be served any more.
    pub fn farewell(&self) -> &'static str {
        match () {
            () if self.leaving.load(Ordering::SeqCst) => RESTARTING,
            () if self.closing.load(Ordering::SeqCst) => STOPPING,
            () => DRAINED,
        }
    }

    /// From now on nothing is handed out here, but by the next server it will.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::SeqCst);
    }

    /// The server is to end, whatever else is under way.
    pub fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// Whether it is.
    pub fn ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Whether nothing is handed out any more.
    pub fn closing(&self) -> bool {
        self.closing.load(Ordering::SeqCst) || self.drained.load(Ordering::SeqCst)
    }

    /// From now on, nothing is handed out, or it is again.
    pub fn drain(&self, drained: bool) {
        self.drained.store(drained, Ordering::SeqCst);
    }

    /// What it has been told to be.
    pub fn target(&self) -> Target {
        match self.drained.load(Ordering::SeqCst) {
            true => Target::Drained,
            false => Target::Keep(self.board.facts().target),
        }
    }

    /// From now on, nothing is handed out.
    pub fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
    }
}

/// A boot to do.
pub struct Job {
    /// Its number.
    pub number: u64,
}
