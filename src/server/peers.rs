//! Who is at the other end of each connection, and how many there may be.
//!
//! Invariants: an entry is replaced when its fd is used again, and one whose connection
//! has ended counts for nothing; no user but root can take all of the connections.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

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
}

#[derive(Debug, Default)]
struct Known {
    /// By the fd's number; with the socket that it was then.
    peers: HashMap<i32, (Peer, Option<PathBuf>)>,
    told: Option<Instant>,
}

/// Peers by the number of their connection's fd, under which gRPC names them.
#[derive(Clone, Debug, Default)]
pub struct Peers(Arc<Mutex<Known>>);

/// Which socket an fd is, in the kernel's words.
fn socket(fd: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/self/fd/{fd}")).ok()
}

impl Peers {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The peer that gRPC calls `fd:N`.
    pub fn find(&self, name: &str) -> Option<Peer> {
        let fd: i32 = name.rsplit(':').next()?.parse().ok()?;
        self.lock().peers.get(&fd).map(|(peer, _)| *peer)
    }

    /// Remembers a connection; false when its user, or all together, have too many.
    pub fn admit(&self, fd: i32, peer: Peer) -> bool {
        let mut known = self.lock();
        let of_user =
            |known: &Known| known.peers.values().filter(|(other, _)| other.uid == peer.uid).count();
        if peer.uid != 0 && (of_user(&known) >= MAX_OF_USER || known.peers.len() >= MAX_CONNECTIONS)
        {
            // Some may have ended: nothing else tells.
            known.peers.retain(|fd, (_, was)| socket(*fd) == *was);
            let (own, all) = (of_user(&known), known.peers.len());
            if own >= MAX_OF_USER || all >= MAX_CONNECTIONS {
                if known.told.is_none_or(|at| at.elapsed() >= TELL) {
                    known.told = Some(Instant::now());
                    log::warn!(
                        "connection-refused: uid {} (pid {}) has {own} connections open, all \
                         users {all}; a user may have {MAX_OF_USER}, all {MAX_CONNECTIONS}",
                        peer.uid,
                        peer.pid
                    );
                }
                return false;
            }
        }
        known.peers.insert(fd, (peer, socket(fd)));
        true
    }
}
