//! One relayed connection: its peer's socket, the socketpair whose far end is gRPC's, a pipe
//! each way, and what is left to say when it is shut.
//!
//! ```text
//! arriving ── preface, first frame ──► open ──► the peer or gRPC ends it
//!    └──────────── too much, too late ──┴──► leaving: the frame under way, GOAWAY, closed
//! ```
//!
//! Invariants: gRPC knows nothing of a connection before the client's first frame; nothing is
//! waited for here; a turn moves at most [`TURN`] bytes each way, then others have theirs.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use nix::sys::socket::{setsockopt, sockopt::SndBuf};

use super::bucket::Nanos;
use super::client::Client;
use super::frames::{goaway, FrameReader, EMPTY_SETTINGS};
use super::limits::{nanos, Excess, FRAME_WITHIN, PREFACE_WITHIN, READ_WITHIN};
use super::meter::{Books, Meter, Pass};
use super::pipe::{Filled, Looked, Pipe};
use super::places::Place;
use crate::server::peers::Peer;

/// Bytes of one connection that are moved in a turn, each way.
pub const TURN: usize = 64 * 1024;
/// From a connection's being shut to its end, GOAWAY said or not.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);
/// From gRPC's being told that the client has ended to its ending the connection.
const HALF_WITHIN: Duration = Duration::from_secs(10);
/// Size of the kernel's buffer before a peer that does not read, bytes: the kernel takes twice
/// that.
const SOCKET_BUFFER: usize = 64 * 1024;

/// The relay's end of a socketpair whose other end is gRPC's.
#[derive(Debug)]
pub struct Grpc {
    /// That end, non-blocking.
    pub pair: UnixStream,
    /// The number under which gRPC names the connection.
    pub number: i32,
}

/// What a connection needs of others to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nothing.
    Nothing,
    /// A [`Grpc`] of its own.
    Opening,
    /// That another call of its class ends.
    Room,
}

/// It has come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// By its peer, or by gRPC.
    Gone,
    /// By the relay; the peer has been told, if it could be.
    Shut(Excess),
}

#[derive(Debug)]
struct Leaving {
    why: Excess,
    until: Nanos,
    said: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// Who is at its other end.
    pub peer: Peer,
    /// What it has asked for.
    pub meter: Meter,
    accepted: Nanos,
    client: Client,
    grpc: Option<Grpc>,
    up: Pipe,
    down: Pipe,
    /// Nothing is asked again before that; 0: nothing is put off.
    put_off: Nanos,
    /// Since when gRPC knows that the client has ended; 0: it has not.
    half: Nanos,
    leaving: Option<Leaving>,
    /// What the two sockets are watched for.
    pub watched: [Option<EpollFlags>; 2],
}

impl Connection {
    /// One that was accepted.
    ///
    /// # Errors
    /// As setting the socket non-blocking.
    pub fn new(client: Client, peer: Peer, now: Nanos) -> io::Result<Connection> {
        client.set_nonblocking(true)?;
        // Where that is refused, the kernel's own limit holds.
        let _ = setsockopt(&*client, SndBuf, &SOCKET_BUFFER);
        Ok(Connection {
            peer,
            meter: Meter::default(),
            accepted: now,
            client,
            grpc: None,
            up: Pipe::new(FrameReader::client()),
            down: Pipe::new(FrameReader::server()),
            put_off: 0,
            half: 0,
            leaving: None,
            watched: [None; 2],
        })
    }

    /// The peer's socket, and the pair's.
    pub fn sockets(&self) -> [Option<impl AsFd + '_>; 2] {
        [Some(&*self.client), self.grpc.as_ref().map(|g| &g.pair)]
    }

    /// What is told of it when places are few.
    pub fn place(&self, serial: u64) -> Place {
        let silent = self.meter.calls == 0;
        let since = self.meter.last_end.max(self.accepted);
        let (open, served) = (self.meter.streams.open_calls(), self.meter.last_end > 0);
        Place { serial, uid: self.peer.uid, silent, open, since, served }
    }

    /// Whether it is being shut.
    pub fn is_leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Whether gRPC has never known it.
    pub fn is_arriving(&self) -> bool {
        self.grpc.is_none()
    }

    /// gRPC has the other end.
    pub fn opened(&mut self, grpc: Grpc) {
        self.grpc = Some(grpc);
        self.put_off = 0;
    }

    /// Nothing is asked again before that.
    pub fn put_off(&mut self, until: Nanos) {
        self.put_off = until.max(1);
    }

    /// What is left of it: what gRPC has still to let go of, unless it has, and what it had open.
    pub fn into_rest(self) -> (Option<Grpc>, Meter, bool) {
        (self.grpc, self.meter, self.down.ended)
    }

    /// From the client to gRPC.
    ///
    /// # Errors
    /// Its end.
    pub fn up(&mut self, books: &mut Books<'_>, scratch: &mut [u8]) -> Result<Need, End> {
        if self.leaving.is_some() || self.put_off > books.now {
            return Ok(Need::Nothing);
        }
        self.put_off = 0;
        match self.move_up(books, scratch) {
            Ok(need) => Ok(need),
            Err(End::Shut(why)) => {
                self.leave(why, books.now);
                self.down(books, scratch).map(|()| Need::Nothing)
            }
            Err(gone) => Err(gone),
        }
    }

    fn move_up(&mut self, books: &mut Books<'_>, scratch: &mut [u8]) -> Result<Need, End> {
        let (mut left, mut more) = (TURN, true);
        loop {
            if self.up.is_put_off() {
                let meter = &mut self.meter;
                let now = books.now;
                let looked = self.up.again(now, &mut |h| meter.client(h, books));
                if let Some(need) = self.later(looked.map_err(End::Shut)?) {
                    self.flush_up(now);
                    return Ok(need);
                }
            }
            if self.grpc.is_none() && self.up.reader().frames() > 0 {
                return Ok(Need::Opening);
            }
            self.flush_up(books.now);
            if self.up.closed || self.grpc.is_some() && !self.up.is_empty() {
                return Ok(Need::Nothing);
            }
            if self.up.ended {
                return self.half_close(books.now);
            }
            if !more || left == 0 {
                return Ok(Need::Nothing);
            }
            let most = scratch.len().min(left);
            let seen = Pipe::look_in(&self.client, &mut scratch[..most]);
            let n = match seen {
                Ok(Filled::Some(n, again) | Filled::There(n, again)) => {
                    more = again;
                    n
                }
                Ok(Filled::Nothing) => return Ok(Need::Nothing),
                Ok(Filled::End) => {
                    self.up.ended = true;
                    continue;
                }
                Err(_) => return Err(End::Gone),
            };
            left -= n;
            let (meter, to) = (&mut self.meter, self.grpc.as_ref().map(|g| &g.pair));
            let now = books.now;
            let looked = self.up.take(&scratch[..n], to, now, &mut |h| meter.client(h, books));
            let there = matches!(seen, Ok(Filled::There(..)));
            if there && !Pipe::take_out(&self.client, &mut scratch[..n]) {
                return Err(End::Shut(Excess::Protocol(
                    "urgent bytes, or open files that are passed",
                )));
            }
            if let Some(need) = self.later(looked.map_err(End::Shut)?) {
                return Ok(need);
            }
        }
    }

    fn flush_up(&mut self, now: Nanos) {
        if let Some(grpc) = &self.grpc {
            self.up.flush(&grpc.pair, now);
        }
    }

    fn later(&mut self, looked: Looked) -> Option<Need> {
        match looked {
            Looked::All | Looked::Until(Pass::Go) => None,
            Looked::Until(Pass::At(at)) => {
                self.put_off(at);
                // One that is not gRPC's yet has to become so all the same.
                Some(if self.grpc.is_none() { Need::Opening } else { Need::Nothing })
            }
            Looked::Until(Pass::Crowded) => Some(Need::Room),
        }
    }

    /// The client sends no more, and gRPC is told.
    fn half_close(&mut self, now: Nanos) -> Result<Need, End> {
        let Some(grpc) = &self.grpc else { return Err(End::Gone) };
        if self.half == 0 {
            let _ = grpc.pair.shutdown(Shutdown::Write);
            (self.half, self.up.closed) = (now.max(1), true);
        }
        Ok(Need::Nothing)
    }

    /// From gRPC to the client.
    ///
    /// # Errors
    /// Its end.
    pub fn down(&mut self, books: &mut Books<'_>, scratch: &mut [u8]) -> Result<(), End> {
        let (mut left, mut more) = (TURN, true);
        loop {
            self.down.flush(&self.client, books.now);
            if self.down.closed {
                return Err(self.end());
            }
            if !self.down.is_empty() {
                return Ok(());
            }
            let most = match &self.leaving {
                // The frame that is under way, and no more.
                Some(_) => self.down.reader().wanted().min(scratch.len()),
                None => scratch.len().min(left),
            };
            if self.leaving.is_some() && (most == 0 || self.grpc.is_none()) {
                if self.last_words() {
                    return Err(self.end());
                }
                continue;
            }
            if self.down.ended {
                return Err(self.end());
            }
            let Some(grpc) = self.grpc.as_ref().filter(|_| more && left > 0) else {
                return Ok(());
            };
            let seen = Pipe::look_in(&grpc.pair, &mut scratch[..most]);
            let n = match seen {
                Ok(Filled::Some(n, again) | Filled::There(n, again)) => {
                    more = again;
                    n
                }
                Ok(Filled::Nothing) => return Ok(()),
                Ok(Filled::End) | Err(_) => {
                    self.down.ended = true;
                    continue;
                }
            };
            left = left.saturating_sub(n);
            let meter = &mut self.meter;
            let (now, to) = (books.now, Some(&*self.client));
            let mut look = |h: &super::frames::Header| {
                meter.server(h, books);
                Ok(Pass::Go)
            };
            // The server's frames are all let through.
            let _ = self.down.take(&scratch[..n], to, now, &mut look);
            let there = matches!(seen, Ok(Filled::There(..)));
            if there && !Pipe::take_out(&grpc.pair, &mut scratch[..n]) {
                self.down.ended = true;
            }
        }
    }

    /// Says GOAWAY, once; whether all is said.
    fn last_words(&mut self) -> bool {
        let Some(leaving) = self.leaving.as_mut().filter(|l| !l.said) else { return true };
        leaving.said = true;
        let text = leaving.why.told(self.peer.class);
        let frame = goaway(self.meter.streams.last(), leaving.why.code(), &text);
        if self.down.reader().frames() == 0 {
            self.down.append(&EMPTY_SETTINGS);
        }
        self.down.append(&frame);
        false
    }

    fn end(&mut self) -> End {
        self.leaving.take().map_or(End::Gone, |l| End::Shut(l.why))
    }

    /// It is to end, by no fault of gRPC's; [`Connection::down`] says so to the client.
    pub fn leave(&mut self, why: Excess, now: Nanos) {
        if self.leaving.is_none() {
            self.up.clear();
            let until = now + nanos(LEAVE_WITHIN);
            self.leaving = Some(Leaving { why, until, said: false });
        }
    }

    /// What its sockets are to be watched for: the peer's, and the pair's.
    pub fn wants(&self) -> [EpollFlags; 2] {
        let mut wants = [EpollFlags::empty(); 2];
        let reads = match self.grpc {
            Some(_) => self.up.is_empty(),
            None => self.up.reader().frames() == 0,
        };
        let put_off = self.put_off > 0 || self.up.is_put_off();
        if reads && !(put_off || self.up.ended || self.up.closed || self.leaving.is_some()) {
            wants[0] |= EpollFlags::EPOLLIN;
        }
        if self.down.may_go() {
            wants[0] |= EpollFlags::EPOLLOUT;
        }
        if self.down.is_empty() && !self.down.ended {
            wants[1] |= EpollFlags::EPOLLIN;
        }
        if self.up.may_go() {
            wants[1] |= EpollFlags::EPOLLOUT;
        }
        wants
    }

    /// When it has to be looked at, whatever its sockets do.
    pub fn next_look(&self) -> Nanos {
        let put_off = if self.put_off > 0 { self.put_off } else { Nanos::MAX };
        self.due().map_or(Nanos::MAX, |(at, _)| at).min(put_off)
    }

    /// Until when something has to have happened; else it ends, for that reason.
    fn due(&self) -> Option<(Nanos, End)> {
        let late =
            |since, within, what| (since + nanos(within), End::Shut(Excess::Late { what, within }));
        if let Some(leaving) = &self.leaving {
            return Some((leaving.until, End::Shut(leaving.why.clone())));
        }
        let arriving = self.grpc.is_none().then(|| match self.up.reader().frames() {
            0 => late(self.accepted, PREFACE_WITHIN, "HTTP/2 preface and SETTINGS"),
            _ => {
                let busy = Excess::Busy { what: "room for another connection" };
                (self.accepted + nanos(PREFACE_WITHIN), End::Shut(busy))
            }
        });
        // Where gRPC does not take what there is, or all of a class wait, it is not the client
        // who is late.
        let asked = self.up.is_empty().then(|| {
            let meter = self.meter.due().map(|(at, why)| (at, End::Shut(why)));
            let begun = self.up.unfinished_since().filter(|_| self.grpc.is_some());
            [meter, begun.map(|since| late(since, FRAME_WITHIN, "end of a frame"))]
        });
        let stuck = (self.down.stuck_since > 0)
            .then(|| late(self.down.stuck_since, READ_WITHIN, "reading of what is sent"));
        let half = (self.half > 0).then(|| (self.half + nanos(HALF_WITHIN), End::Gone));
        let all = [arriving, stuck, half].into_iter().chain(asked.into_iter().flatten());
        all.flatten().min_by_key(|(at, _)| *at)
    }

    /// Looks at it because it is time; what it has to say is read first.
    ///
    /// # Errors
    /// Its end.
    pub fn look(&mut self, books: &mut Books<'_>, scratch: &mut [u8]) -> Result<Need, End> {
        let need = self.up(books, scratch)?;
        self.down(books, scratch)?;
        match self.due().filter(|(at, _)| *at <= books.now) {
            Some((_, End::Gone)) => Err(End::Gone),
            Some((_, late)) if self.leaving.is_some() => Err(late),
            Some((_, End::Shut(why))) => {
                self.leave(why, books.now);
                self.down(books, scratch)?;
                Ok(Need::Nothing)
            }
            None => Ok(need),
        }
    }
}
