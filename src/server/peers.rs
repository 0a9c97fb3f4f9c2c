//! Who is at the other end of each connection, and how many there may be.
//!
//! Invariants: an entry is replaced when its fd is used again, and one whose connection
//! has ended counts for nothing; no user but root can take all of the connections, and
//! none of a user's newer ones waits for its older ones that say nothing.

use std::collections::HashMap;
use std::fs;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::sys::rpc::copy_of;

/// Connections that a user may have open.
pub const MAX_OF_USER: usize = 512;
/// Connections of all users but root, who can always look.
pub const MAX_CONNECTIONS: usize = 2048;
/// Refusals are told this often at most.
const TELL: Duration = Duration::from_secs(1);

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its pid when it connected.
    pub pid: i32,
    /// Its start time, clock ticks after boot.
    pub start_time: u64,
    /// Its user.
    pub uid: u32,
    /// Whether it may claim VMs.
    pub may_claim: bool,
}

#[derive(Debug)]
struct Connection {
    peer: Peer,
    /// Which socket the fd was.
    socket: Option<PathBuf>,
    /// Until it makes its first call: since when.
    silent: Option<Instant>,
}

#[derive(Debug, Default)]
struct Known {
    /// By the fd's number.
    connections: HashMap<i32, Connection>,
    told: Option<Instant>,
}

/// Peers by the number of their connection's fd, under which gRPC names them.
#[derive(Clone, Debug, Default)]
pub struct Peers(Arc<Mutex<Known>>);

/// Which socket an fd is, in the kernel's words.
fn socket(fd: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{fd}")).ok()
}

impl Known {
    fn of_user(&self, uid: u32) -> usize {
        self.connections.values().filter(|c| c.peer.uid == uid).count()
    }

    fn full_for(&self, uid: u32) -> bool {
        uid != 0 && (self.of_user(uid) >= MAX_OF_USER || self.connections.len() >= MAX_CONNECTIONS)
    }

    /// Some may have ended: nothing else tells.
    fn forget_ended(&mut self) {
        self.connections.retain(|fd, c| socket(*fd) == c.socket);
    }

    /// Shuts the connection of a user that has said nothing for longest; whether there
    /// was one.
    fn shut_silent(&mut self, uid: u32) -> bool {
        let of_user = self.connections.iter().filter(|(_, c)| c.peer.uid == uid);
        let silent = of_user.filter_map(|(fd, c)| c.silent.map(|at| (at, *fd)));
        let Some((_, fd)) = silent.min() else { return false };
        let was = self.connections.remove(&fd).and_then(|c| c.socket);
        // First copied, then looked at: its number may be another's meanwhile.
        if let Some(copy) = copy_of(fd).ok().filter(|copy| socket(copy.as_raw_fd()) == was) {
            let _ = copy.shutdown(Shutdown::Both);
        }
        true
    }

    /// The user who has most connections.
    fn greediest(&self) -> Option<u32> {
        let mut counts = HashMap::<u32, usize>::new();
        for connection in self.connections.values().filter(|c| c.peer.uid != 0) {
            *counts.entry(connection.peer.uid).or_default() += 1;
        }
        counts.into_iter().max_by_key(|(_, n)| *n).map(|(uid, _)| uid)
    }
}

impl Peers {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The peer that gRPC calls `fd:N`, which has made a call.
    pub fn find(&self, name: &str) -> Option<Peer> {
        let fd: i32 = name.rsplit(':').next()?.parse().ok()?;
        self.lock().connections.get_mut(&fd).map(|c| {
            c.silent = None;
            c.peer
        })
    }

    /// Remembers a connection; false when its user, or all together, have too many that
    /// are in use.
    pub fn admit(&self, stream: &UnixStream, peer: Peer) -> bool {
        let mut known = self.lock();
        if known.full_for(peer.uid) {
            known.forget_ended();
        }
        while known.full_for(peer.uid) {
            // One that only takes a place gives it to who comes: first among its own.
            let shut = known.shut_silent(peer.uid)
                || (known.of_user(peer.uid) < MAX_OF_USER
                    && known.greediest().is_some_and(|uid| known.shut_silent(uid)));
            known.tell(&peer, shut);
            if !shut {
                return false;
            }
        }
        let (fd, silent) = (stream.as_raw_fd(), Some(Instant::now()));
        known.connections.insert(fd, Connection { peer, socket: socket(fd), silent });
        true
    }
}

impl Known {
    fn tell(&mut self, peer: &Peer, shut: bool) {
        if self.told.is_some_and(|at| at.elapsed() < TELL) {
            return;
        }
        self.told = Some(Instant::now());
        let (own, all) = (self.of_user(peer.uid), self.connections.len());
        let what = match shut {
            true => "connections-shut: the oldest that say nothing:",
            false => "connection-refused:",
        };
        log::warn!(
            "{what} uid {} (pid {}) has {own} connections, all users {all}; a user may have \
             {MAX_OF_USER}, all {MAX_CONNECTIONS}",
            peer.uid,
            peer.pid
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn peer(uid: u32) -> Peer {
        Peer { pid: 1, start_time: 0, uid, may_claim: true }
    }

    #[test]
    fn who_says_nothing_gives_way_and_who_is_served_stays() {
        let peers = Peers::default();
        let (theirs, ours): (Vec<_>, Vec<_>) =
            (0..MAX_OF_USER + 1).map(|_| UnixStream::pair().unwrap()).unzip();
        for stream in &ours[..MAX_OF_USER] {
            assert!(peers.admit(stream, peer(7)));
        }
        let call = |n: usize| peers.find(&format!("fd:{}", ours[n].as_raw_fd())).is_some();
        // All but the second have made a call.
        assert!((0..MAX_OF_USER).filter(|n| *n != 1).all(call));
        assert!(peers.admit(&ours[MAX_OF_USER], peer(7)));
        assert_eq!((&theirs[1]).read(&mut [0]).unwrap(), 0, "it was shut");
        assert!(call(MAX_OF_USER) && !call(1));
        let (_far, near) = UnixStream::pair().unwrap();
        assert!(!peers.admit(&near, peer(7)), "all are in use");
        assert!(peers.admit(&near, peer(8)), "of one user");
        drop(ours);
        assert!(peers.admit(&near, peer(7)), "none is open any more");
    }
}
