//! Admission in front of gRPC: all connections but root's and the server's own user's pass
//! through here, byte by byte, and are shut when they ask for more than they may.
//!
//! ```text
//!                    ┌─ direct ───────────────────────────────► gRPC
//! listener ── gate ──┤
//!                    └─ others ──► reactor ── pair ── fd:N ───► gRPC
//!                                   meter: counts frames, per connection, user, class
//! ```
//!
//! gRPC's core has no guard against calls that are opened and reset without end, and believes
//! in a limit of calls only once the client has acknowledged it. The relay reads nine bytes of
//! each frame ([`frames`]), counts ([`meter`]) against limits ([`limits`]), and sends one GOAWAY
//! that names the limit to who exceeds it; the log has a line.
//!
//! Invariants: one thread, `vmc-relay`, which never waits for a peer, for gRPC or for time to
//! pass where nothing is due; a buffer of at most [`pipe::MAX_HELD`] bytes each way; a peer's
//! identity is that of its connect(2), and stands in [`Peers`] under the number that gRPC is
//! given, for as long as the connection lasts. It does not look into calls: who may do what in
//! a call is the services' to say.

pub mod bucket;
pub mod client;
pub mod connection;
pub mod frames;
pub mod gate;
pub mod group;
pub mod limits;
pub mod meter;
pub mod pipe;
pub mod places;
mod reactor;
pub mod streams;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{bounded, Sender};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::peers::{Class, Peer, Peers};
use crate::events::event;
use crate::worker::{self, Worker};
use client::{Client, Closer};
use frames::{goaway, EMPTY_SETTINGS};
use group::Group;
use limits::{Excess, Limits};
use reactor::Reactor;

/// Newcomers of a class that may wait for the relay; those who come then are turned away.
const ARRIVALS: usize = 256;

/// A connection that was accepted, and whose it is.
pub type Arrival = (Client, Peer);

/// Where connections go: gRPC, and in tests another.
pub trait Far: Send {
    /// Takes the other end of a connection. Its fd is the number that the peer is known by.
    ///
    /// # Errors
    /// When none are taken any more.
    fn begin(&mut self, class: Class, end: UnixStream) -> io::Result<()>;
}

/// What the relay is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Stage {
    /// Let connections in.
    Open,
    /// Let none in, and serve those that there are.
    Closed,
    /// The same, and end with the last one, or then.
    Ending(Duration),
}

/// What the relay and who tells it share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) waker: EventFd,
    stage: Mutex<Stage>,
}

impl Shared {
    pub(crate) fn stage(&self) -> Stage {
        *self.stage.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn go_to(&self, stage: Stage) {
        *self.stage.lock().unwrap_or_else(|e| e.into_inner()) = stage;
        let _ = self.waker.write(1);
    }
}

/// The relay.
#[derive(Debug)]
pub struct Relay {
    shared: Arc<Shared>,
    /// Of claimers and of strangers: neither takes the other's places.
    arrivals: [Sender<Arrival>; 2],
    closer: Closer,
    thread: Worker<()>,
}

impl Relay {
    /// Starts it; connections go to `far`.
    ///
    /// # Errors
    /// When there is no thread, or nothing to wait by.
    pub fn start(
        claimers: Limits,
        strangers: Limits,
        peers: &Peers,
        far: Box<dyn Far>,
    ) -> Result<Relay, worker::Error> {
        let name = "vmc-relay";
        let failed = |source| worker::Error::Start { name: name.into(), source };
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let waker = EventFd::from_flags(flags).map_err(|e| failed(e.into()))?;
        let shared = Arc::new(Shared { waker, stage: Mutex::new(Stage::Open) });
        let (a, b) = (bounded(ARRIVALS), bounded(ARRIVALS));
        let ranges = peers.ranges();
        let groups = [claimers, strangers].map(|mut limits| {
            let most = ranges.connections(limits.class);
            if limits.class_connections > most {
                log::warn!(
                    "{} connections of {}s are too many for this process's limit of open files: \
                     {most} there can be (LimitNOFILE= of the unit raises it)",
                    limits.class_connections,
                    limits.class
                );
                limits.class_connections = most;
            }
            Group::new(limits, &ranges)
        });
        let both = [a.1, b.1];
        let reactor = Reactor::new(Arc::clone(&shared), both, groups, peers.clone(), far);
        let reactor = reactor.map_err(failed)?;
        let closer = Closer::start()?;
        let thread = Worker::spawn(name, move || reactor.run())?;
        Ok(Relay { shared, arrivals: [a.0, b.0], closer, thread })
    }

    /// What the accepting thread needs.
    pub fn door(&self) -> Door {
        let (shared, closer) = (Arc::clone(&self.shared), self.closer.clone());
        Door { shared, arrivals: self.arrivals.clone(), closer }
    }

    /// Lets no connection in from now on.
    pub fn close(&self) {
        self.shared.go_to(Stage::Closed);
    }

    /// Ends it when all that gRPC has said has been passed on, or its peers do not take it for
    /// so long.
    pub fn end(self, within: Duration, join: Duration) {
        self.shared.go_to(Stage::Ending(within));
        if let Err(e) = self.thread.join(join) {
            log::error!("stop: {e}");
        }
    }
}

/// Where the accepting thread hands connections in.
#[derive(Debug)]
pub struct Door {
    shared: Arc<Shared>,
    arrivals: [Sender<Arrival>; 2],
    closer: Closer,
}

impl Door {
    /// A connection that was accepted, of a peer that is to be handed in or turned away.
    pub fn client(&self, stream: UnixStream) -> Client {
        Client::new(stream, &self.closer)
    }

    /// Hands one in, or turns it away.
    pub fn hand_in(&self, client: Client, peer: Peer) {
        let at = usize::from(peer.class == Class::Stranger);
        match self.arrivals[at].try_send((client, peer)) {
            Ok(()) => drop(self.shared.waker.write(1)),
            Err(back) => {
                let (client, peer) = back.into_inner();
                turn_away(&client, &peer, &Excess::Busy { what: "time for more connections" });
            }
        }
    }
}

/// Tells a peer why it is not let in, if its socket takes that at once, and the log.
pub fn turn_away(client: &Client, peer: &Peer, why: &Excess) {
    let told = why.told(peer.class);
    let words = [&EMPTY_SETTINGS[..], &goaway(0, why.code(), &told)].concat();
    // It is told more than it has asked: what it does not take is lost.
    let _ = client.set_nonblocking(true).and_then(|()| (&mut &**client).write(&words));
    if *why != Excess::Ending {
        let Peer { pid, uid, class, .. } = peer;
        event!(
            CONNECTION_REFUSED, pid = pid, uid = uid, peer = class;
            "pid {pid} of uid {uid} is not let in: {told}"
        );
    }
}

pub(crate) fn tell_shut(peer: &Peer, why: &Excess) {
    let (told, Peer { pid, uid, class, .. }) = (why.told(peer.class), peer);
    event!(
        PEER_SHUT, pid = pid, uid = uid, peer = class;
        "the connection of pid {pid} of uid {uid} is shut: {told}"
    );
}
