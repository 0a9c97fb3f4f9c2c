//! The relay's thread: it waits for sockets and for what is due, and for nothing else.
//!
//! Invariants: where nothing is under way it does not wake; each connection has its turn, and
//! no more than that, before the others have theirs; what is said of a connection is said once.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};

use super::bucket::{Nanos, SECOND};
use super::client::Client;
use super::connection::{Connection, End, Grpc, Need};
use super::group::{Group, NotYet};
use super::limits::{nanos, Excess};
use super::meter::Meter;
use super::pipe::{Filled, Pipe, MAX_HELD};
use super::places::{self, Place, Room};
use super::{tell_shut, Arrival, Far, Shared, Stage};
use crate::server::peers::{Class, Peers};
use crate::sys::heap;
use crate::sys::process::start_time;

/// Events that are taken at once.
const EVENTS: usize = 64;
/// Newcomers of a class that are let in before others have their turn.
const NEWCOMERS: usize = 64;
/// How long gRPC may take to let go of a connection that has ended.
const DRAIN_WITHIN: Duration = Duration::from_secs(10);
/// Pause before a call is asked about again for which others have to end first.
const ROOM_PAUSE: Nanos = nanos(Duration::from_millis(10));
/// How long one that is turned away stays open, and how many of them do.
const LINGER: Nanos = nanos(Duration::from_millis(250));
/// See [`LINGER`].
const LINGERING: usize = 32;
/// From the first reason to give memory back until that is done: by then gRPC has freed it.
const TIDY_AFTER: Nanos = 5 * SECOND;
/// Connections whose end is such a reason.
const MANY_ENDS: usize = 16;
/// Open calls after which there being few is one.
const MANY_CALLS: usize = 64;

/// What is watched, beside the waker.
const WAKER: u64 = 0;

/// A connection that has ended, but for gRPC.
struct Drain {
    grpc: Grpc,
    class: Class,
    uid: u32,
    meter: Meter,
    until: Nanos,
}

/// The thread's own.
pub struct Reactor {
    pub(super) epoll: Epoll,
    pub(super) shared: Arc<Shared>,
    pub(super) arrivals: [Receiver<Arrival>; 2],
    /// Of claimers and of strangers.
    pub(super) groups: [Group; 2],
    pub(super) peers: Peers,
    pub(super) far: Box<dyn Far>,
    connections: HashMap<u64, Connection>,
    drains: HashMap<u64, Drain>,
    /// Connections that were told why they are not let in, and when they end.
    turned_away: VecDeque<(Client, Nanos)>,
    next_serial: u64,
    scratch: Box<[u8; MAX_HELD]>,
    start: Instant,
    /// Nothing is due before that.
    next_look: Nanos,
    /// When memory is given back; `MAX` while there is no reason.
    tidy_at: Nanos,
    ends: usize,
    most_calls: usize,
}

fn group_of(class: Class) -> usize {
    usize::from(class == Class::Stranger)
}

impl Reactor {
    /// Watching its waker.
    ///
    /// # Errors
    /// As epoll's.
    pub fn new(
        shared: Arc<Shared>,
        arrivals: [Receiver<Arrival>; 2],
        groups: [Group; 2],
        peers: Peers,
        far: Box<dyn Far>,
    ) -> io::Result<Reactor> {
        let epoll = Epoll::new(nix::sys::epoll::EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&shared.waker, EpollEvent::new(EpollFlags::EPOLLIN, WAKER))?;
        Ok(Reactor {
            epoll,
            shared,
            arrivals,
            groups,
            peers,
            far,
            connections: HashMap::new(),
            drains: HashMap::new(),
            turned_away: VecDeque::new(),
            next_serial: 1,
            scratch: Box::new([0; MAX_HELD]),
            start: Instant::now(),
            next_look: Nanos::MAX,
            tidy_at: Nanos::MAX,
            ends: 0,
            most_calls: 0,
        })
    }

    fn now(&self) -> Nanos {
        nanos(self.start.elapsed())
    }

    /// Until it is told to end, and nothing is left to be said.
    pub fn run(mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        let mut end_by = Nanos::MAX;
        loop {
            // An error is a signal's, or lasts: then what is due is done all the same.
            let n = self.epoll.wait(&mut events, self.timeout(end_by)).unwrap_or(0);
            let now = self.now();
            for event in &events[..n] {
                match event.data() {
                    WAKER => drop(self.shared.waker.read()),
                    data => self.event(data >> 1, data & 1 == 1, event.events(), now),
                }
            }
            self.newcomers(now);
            if now >= self.next_look {
                self.look(now);
            }
            if now >= self.tidy_at {
                self.tidy(now);
            }
            match self.shared.stage() {
                Stage::Open => {}
                Stage::Closed => self.send_away_arriving(now),
                Stage::Ending(within) => {
                    end_by = end_by.min(now + nanos(within));
                    self.send_away_arriving(now);
                    if self.connections.is_empty() || now >= end_by {
                        return;
                    }
                }
            }
        }
    }

    fn timeout(&self, end_by: Nanos) -> EpollTimeout {
        if self.arrivals.iter().any(|a| !a.is_empty()) {
            return EpollTimeout::ZERO;
        }
        let next = self.next_look.min(self.tidy_at).min(end_by);
        if next == Nanos::MAX {
            return EpollTimeout::NONE;
        }
        let left = next.saturating_sub(self.now()).div_ceil(1_000_000);
        EpollTimeout::try_from(left.min(i32::MAX as u64)).unwrap_or(EpollTimeout::MAX)
    }

    fn event(&mut self, serial: u64, pair: bool, flags: EpollFlags, now: Nanos) {
        if self.drains.contains_key(&serial) {
            return self.drain(serial, now);
        }
        let Some(connection) = self.connections.get_mut(&serial) else { return };
        let gone = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        let reads = flags.intersects(EpollFlags::EPOLLIN | gone);
        let writes = flags.intersects(EpollFlags::EPOLLOUT | gone);
        let (up, down) = if pair { (writes, reads) } else { (reads, writes) };
        let group = &mut self.groups[group_of(connection.peer.class)];
        let mut books = group.books(connection.peer.uid, now);
        let scratch = &mut self.scratch[..];
        let mut went = Ok(Need::Nothing);
        if up {
            went = connection.up(&mut books, scratch);
        }
        if let (Ok(need), true) = (&went, down) {
            went = connection.down(&mut books, scratch).map(|()| *need);
        }
        self.went(serial, went, now);
    }

    /// What a turn has led to.
    fn went(&mut self, serial: u64, went: Result<Need, End>, now: Nanos) {
        let went = match went {
            Ok(Need::Opening) => self.open(serial, now),
            Ok(Need::Room) => {
                self.make_room(serial, now);
                Ok(())
            }
            Ok(Need::Nothing) => Ok(()),
            Err(end) => Err(end),
        };
        match went {
            Ok(()) => self.settle(serial, now),
            Err(end) => self.end(serial, end, now),
        }
    }

    /// Watches a connection's sockets for what it wants now.
    fn settle(&mut self, serial: u64, now: Nanos) {
        let calls = self.groups.iter().map(|g| g.all.streams).sum::<usize>();
        self.most_calls = self.most_calls.max(calls);
        let Some(connection) = self.connections.get_mut(&serial) else { return };
        let (wants, mut watched) = (connection.wants(), connection.watched);
        let mut done = Ok(());
        for (side, socket) in connection.sockets().into_iter().enumerate() {
            let Some(socket) = socket else { continue };
            let (before, flags) = (&mut watched[side], wants[side]);
            done = done.and_then(|()| watch(&self.epoll, &socket, serial, side, before, flags));
        }
        connection.watched = watched;
        self.next_look = self.next_look.min(connection.next_look());
        if let Err(e) = done {
            log::warn!("watch the connection of pid {}: {e}: it is ended", connection.peer.pid);
            self.end(serial, End::Shut(Excess::Busy { what: "room to watch it" }), now);
        }
        self.tidy_soon(now);
    }

    /// Gives a connection's other end to gRPC, and goes on with it.
    fn open(&mut self, serial: u64, now: Nanos) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(&serial) else { return Ok(()) };
        let group = &mut self.groups[group_of(connection.peer.class)];
        let (grpc, far) = match group.pair(connection.peer.uid, now) {
            Ok(pair) => pair,
            Err(NotYet::At(at)) => {
                connection.put_off(at);
                return Ok(());
            }
            Err(NotYet::Failed(e)) => return self.shut(serial, Group::busy(&e), now),
        };
        if connection.peer.start_time == 0 {
            connection.peer.start_time = start_time(connection.peer.pid).unwrap_or(0);
        }
        let (peer, number) = (connection.peer, grpc.number);
        // Known before gRPC can name it.
        self.peers.add_relayed(number, peer);
        connection.opened(grpc);
        if let Err(e) = self.far.begin(peer.class, far) {
            log::debug!("give gRPC the connection of pid {}: {e}", peer.pid);
            return self.shut(serial, Excess::Ending, now);
        }
        let Some(connection) = self.connections.get_mut(&serial) else { return Ok(()) };
        let mut books = self.groups[group_of(peer.class)].books(peer.uid, now);
        match connection.up(&mut books, &mut self.scratch[..])? {
            Need::Room => self.make_room(serial, now),
            Need::Opening | Need::Nothing => {}
        }
        Ok(())
    }

    /// Shuts a connection; what there is to be said is said as it can be.
    fn shut(&mut self, serial: u64, why: Excess, now: Nanos) -> Result<(), End> {
        let Some(connection) = self.connections.get_mut(&serial) else { return Ok(()) };
        connection.leave(why, now);
        let group = &mut self.groups[group_of(connection.peer.class)];
        let mut books = group.books(connection.peer.uid, now);
        connection.down(&mut books, &mut self.scratch[..])
    }

    /// All calls of a class are taken: of strangers, the connection that has most of them ends.
    fn make_room(&mut self, serial: u64, now: Nanos) {
        let Some(connection) = self.connections.get_mut(&serial) else { return };
        connection.put_off(now + ROOM_PAUSE);
        if connection.peer.class != Class::Stranger {
            return;
        }
        let strangers = self.connections.iter().filter(|(_, c)| c.peer.class == Class::Stranger);
        let most = strangers
            .filter(|(_, c)| !c.is_leaving())
            .max_by_key(|(serial, c)| (c.meter.streams.open_calls(), std::cmp::Reverse(**serial)));
        let Some((&most, _)) = most else { return };
        let why = Excess::GaveWay { why: "all such users together have as many calls as they may" };
        if let Err(end) = self.shut(most, why, now) {
            self.end(most, end, now);
        } else if most != serial {
            self.settle(most, now);
        }
    }

    fn newcomers(&mut self, now: Nanos) {
        for group in 0..2 {
            for _ in 0..NEWCOMERS {
                let Ok(arrival) = self.arrivals[group].try_recv() else { break };
                self.newcomer(arrival, now);
            }
        }
    }

    fn newcomer(&mut self, (client, peer): Arrival, now: Nanos) {
        if !matches!(self.shared.stage(), Stage::Open) {
            return super::turn_away(&client, &peer, &Excess::Ending);
        }
        let at = group_of(peer.class);
        let (own, all) = self.groups[at].has(peer.uid);
        let connections = &self.connections;
        let places = || -> Vec<Place> {
            let class = connections.iter().filter(|(_, c)| c.peer.class == peer.class);
            class.filter(|(_, c)| !c.is_leaving()).map(|(serial, c)| c.place(*serial)).collect()
        };
        match places::find(&self.groups[at].limits, (peer.uid, own, all), now, places) {
            Room::Free => {}
            Room::Of(serial) => {
                let why = Excess::GaveWay { why: "there are as many as there may be" };
                self.give_way(serial, why, now);
            }
            Room::None(why) => {
                super::turn_away(&client, &peer, &why);
                return self.linger(client, now);
            }
        }
        let connection = match Connection::new(client, peer, now) {
            Ok(connection) => connection,
            Err(e) => return log::debug!("take the connection of pid {}: {e}", peer.pid),
        };
        let serial = self.next_serial;
        self.next_serial += 1;
        self.groups[at].count(peer.uid, now, true);
        self.connections.insert(serial, connection);
        // What it has said already is read at once.
        self.event(serial, false, EpollFlags::EPOLLIN, now);
    }

    /// Keeps a connection open that was told why it is not let in, for a moment: gRPC's clients
    /// pass that on only to calls that they begin before the end.
    fn linger(&mut self, client: Client, now: Nanos) {
        if self.turned_away.len() >= LINGERING {
            self.turned_away.pop_front();
        }
        let until = now + LINGER;
        self.turned_away.push_back((client, until));
        self.next_look = self.next_look.min(until);
    }

    /// One ends for another, at once: its place is needed.
    fn give_way(&mut self, serial: u64, why: Excess, now: Nanos) {
        let end = self.shut(serial, why.clone(), now).err().unwrap_or(End::Shut(why));
        self.end(serial, end, now);
    }

    /// A connection has ended: it is forgotten but for what gRPC still has of it.
    fn end(&mut self, serial: u64, end: End, now: Nanos) {
        let Some(connection) = self.connections.remove(&serial) else { return };
        let peer = connection.peer;
        self.groups[group_of(peer.class)].count(peer.uid, now, false);
        self.ends += 1;
        if let End::Shut(why) = &end {
            self.ends = self.ends.max(MANY_ENDS);
            if *why != Excess::Ending {
                tell_shut(&peer, why);
            }
        }
        let watched = connection.watched;
        for (side, socket) in connection.sockets().into_iter().enumerate() {
            if let (Some(socket), Some(_)) = (socket, watched[side]) {
                let _ = self.epoll.delete(&socket);
            }
        }
        let (grpc, meter, ended) = connection.into_rest();
        let Some(grpc) = grpc else {
            let books = self.groups[group_of(peer.class)].books(peer.uid, now);
            meter.release(books.user, books.class);
            return self.tidy_soon(now);
        };
        self.peers.remove_relayed(grpc.number);
        let until = now + nanos(DRAIN_WITHIN);
        let drain = Drain { grpc, class: peer.class, uid: peer.uid, meter, until };
        if ended {
            return self.drained(drain, now);
        }
        let _ = drain.grpc.pair.shutdown(Shutdown::Write);
        let (mut before, reads) = (None, EpollFlags::EPOLLIN);
        // Where it is not watched, it is let go of when its time is over.
        let _ = watch(&self.epoll, &drain.grpc.pair, serial, 1, &mut before, reads);
        self.drains.insert(serial, drain);
        self.next_look = self.next_look.min(until);
        self.drain(serial, now);
    }

    /// Throws away what gRPC still says, until it has closed its end.
    fn drain(&mut self, serial: u64, now: Nanos) {
        let Some(drain) = self.drains.get(&serial) else { return };
        for _ in 0..4 {
            match Pipe::fill(&drain.grpc.pair, &mut self.scratch[..]) {
                Ok(Filled::Some(..) | Filled::There(..)) => {}
                Ok(Filled::Nothing) => return,
                Ok(Filled::End) | Err(_) => {
                    if let Some(drain) = self.drains.remove(&serial) {
                        self.drained(drain, now);
                    }
                    return;
                }
            }
        }
    }

    fn drained(&mut self, drain: Drain, now: Nanos) {
        let group = &mut self.groups[group_of(drain.class)];
        group.closed(drain.uid, drain.grpc.number, &drain.meter, now);
        self.tidy_soon(now);
    }

    fn tidy_soon(&mut self, now: Nanos) {
        let calls = self.groups.iter().map(|g| g.all.streams).sum::<usize>();
        let fewer = self.most_calls >= MANY_CALLS && 4 * calls <= self.most_calls;
        if (fewer || self.ends >= MANY_ENDS) && self.tidy_at == Nanos::MAX {
            self.tidy_at = now + TIDY_AFTER;
        }
    }

    /// Gives memory back.
    fn tidy(&mut self, now: Nanos) {
        (self.tidy_at, self.ends, self.most_calls) = (Nanos::MAX, 0, 0);
        self.groups.iter_mut().for_each(|g| g.tidy(now));
        self.connections.shrink_to_fit();
        self.drains.shrink_to_fit();
        heap::give_back();
    }

    /// Looks at all that is due.
    fn look(&mut self, now: Nanos) {
        self.next_look = Nanos::MAX;
        let due = |at: Nanos| at <= now;
        let serials: Vec<u64> = self.connections.keys().copied().collect();
        for serial in serials {
            let Some(connection) = self.connections.get_mut(&serial) else { continue };
            let next = connection.next_look();
            if !due(next) {
                self.next_look = self.next_look.min(next);
                continue;
            }
            let group = &mut self.groups[group_of(connection.peer.class)];
            let mut books = group.books(connection.peer.uid, now);
            let went = connection.look(&mut books, &mut self.scratch[..]);
            self.went(serial, went, now);
        }
        let late: Vec<u64> =
            self.drains.iter().filter(|(_, d)| due(d.until)).map(|(s, _)| *s).collect();
        for serial in late {
            // gRPC still has its end, and with it the number, which nobody else gets.
            if let Some(drain) = self.drains.remove(&serial) {
                self.drained(drain, now);
            }
        }
        while self.turned_away.front().is_some_and(|(_, until)| due(*until)) {
            self.turned_away.pop_front();
        }
        let next = self.turned_away.front().map_or(Nanos::MAX, |(_, until)| *until);
        self.next_look = self.next_look.min(next);
        let next = self.drains.values().map(|d| d.until).min().unwrap_or(Nanos::MAX);
        self.next_look = self.next_look.min(next);
        self.tidy_soon(now);
    }

    /// Those that gRPC does not know yet are not its any more.
    fn send_away_arriving(&mut self, now: Nanos) {
        let arriving = self.connections.iter().filter(|(_, c)| c.is_arriving());
        let arriving: Vec<u64> = arriving.map(|(serial, _)| *serial).collect();
        for serial in arriving {
            self.give_way(serial, Excess::Ending, now);
        }
    }
}

/// Watches a socket for what is wanted, or no more.
fn watch(
    epoll: &Epoll,
    socket: &impl AsFd,
    serial: u64,
    side: usize,
    watched: &mut Option<EpollFlags>,
    wants: EpollFlags,
) -> nix::Result<()> {
    let wants = Some(wants).filter(|w| !w.is_empty());
    if wants == *watched {
        return Ok(());
    }
    let event = |flags| EpollEvent::new(flags, serial << 1 | side as u64);
    match (*watched, wants) {
        (None, Some(flags)) => epoll.add(socket, event(flags))?,
        (Some(_), Some(flags)) => epoll.modify(socket, &mut event(flags))?,
        (_, None) => epoll.delete(socket)?,
    }
    *watched = wants;
    Ok(())
}
