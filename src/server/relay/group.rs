//! All that the relay keeps of one class of peers: their limits, what each user and all of them
//! have, and the numbers of their connections.
//!
//! Invariant: of at most `MOST_USERS` users something is remembered, unless more have
//! connections.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;

use super::bucket::Nanos;
use super::connection::Grpc;
use super::limits::{nanos, Excess, Limits};
use super::meter::{Account, Books, Meter};
use crate::server::numbers::{Free, Ranges};
use crate::sys::rpc::numbered;

/// Users that are remembered beyond those who have connections.
const MOST_USERS: usize = 4096;
/// Numbers that are tried for one connection: some may be other files' for a while.
const TRIES: usize = 16;
/// Pause before gRPC is given a connection where it has to let go of others first.
const FULL_PAUSE: Nanos = nanos(std::time::Duration::from_millis(50));

/// Of one class.
pub struct Group {
    /// What its peers may ask for.
    pub limits: Limits,
    /// What all of them have.
    pub all: Account,
    users: HashMap<u32, Account>,
    free: Free,
}

/// Why there is no pair yet.
#[derive(Debug)]
pub enum NotYet {
    /// It may be tried again then.
    At(Nanos),
    /// The system refuses.
    Failed(io::Error),
}

impl Group {
    /// With nobody in it.
    pub fn new(limits: Limits, ranges: &Ranges) -> Group {
        let free = Free::all(ranges.of(limits.class));
        Group { limits, all: Account::default(), users: HashMap::new(), free }
    }

    /// What a verdict about a connection of this user needs.
    pub fn books(&mut self, uid: u32, now: Nanos) -> Books<'_> {
        if self.users.len() >= MOST_USERS && !self.users.contains_key(&uid) {
            self.users.retain(|_, account| !account.is_idle(now));
            if self.users.len() >= MOST_USERS {
                self.users.retain(|_, account| !account.is_unused());
            }
        }
        let user = self.users.entry(uid).or_default();
        Books { limits: &self.limits, user, class: &mut self.all, now }
    }

    /// Forgets users of whom nothing is worth remembering.
    pub fn tidy(&mut self, now: Nanos) {
        self.users.retain(|_, account| !account.is_idle(now));
        self.users.shrink_to_fit();
    }

    /// A connection more, or fewer.
    pub fn count(&mut self, uid: u32, now: Nanos, more: bool) {
        let books = self.books(uid, now);
        for account in [books.user, books.class] {
            account.connections = match more {
                true => account.connections + 1,
                false => account.connections.saturating_sub(1),
            };
        }
    }

    /// A pair for a connection: the relay's end, and gRPC's under its number.
    ///
    /// # Errors
    /// When there is none now.
    pub fn pair(&mut self, uid: u32, now: Nanos) -> Result<(Grpc, UnixStream), NotYet> {
        if self.all.opened >= 2 * self.limits.class_connections {
            return Err(NotYet::At(now + FULL_PAUSE));
        }
        self.all.opens.take(self.limits.opens, 1, now).map_err(NotYet::At)?;
        let (pair, far) = UnixStream::pair().map_err(NotYet::Failed)?;
        pair.set_nonblocking(true).map_err(NotYet::Failed)?;
        for _ in 0..TRIES {
            let Some(number) = self.free.take(now) else { break };
            match numbered(&far, number) {
                Ok(Some(far)) => {
                    let books = self.books(uid, now);
                    books.user.opened += 1;
                    books.class.opened += 1;
                    return Ok((Grpc { pair, number }, far));
                }
                Ok(None) => self.free.give(number, now),
                Err(e) => {
                    self.free.give(number, now);
                    return Err(NotYet::Failed(e));
                }
            }
        }
        Err(NotYet::At(now + FULL_PAUSE))
    }

    /// gRPC has let go of a connection.
    pub fn closed(&mut self, uid: u32, number: i32, meter: &Meter, now: Nanos) {
        self.free.give(number, now);
        let books = self.books(uid, now);
        books.user.opened = books.user.opened.saturating_sub(1);
        books.class.opened = books.class.opened.saturating_sub(1);
        meter.release(books.user, books.class);
    }

    /// Why a newcomer of this user is not let in, if nothing can be done about it.
    pub fn has(&self, uid: u32) -> (usize, usize) {
        (self.users.get(&uid).map_or(0, |u| u.connections), self.all.connections)
    }

    /// The system has no more of something.
    pub fn busy(e: &io::Error) -> Excess {
        match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EMFILE | Errno::ENFILE) => Excess::Busy { what: "open files" },
            _ => Excess::Busy { what: "sockets" },
        }
    }
}
