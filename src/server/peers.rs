//! Who is at the other end of each connection, by the number under which gRPC names it.
//!
//! Invariants: a number stands for the peer whose connection has it now, or for nobody: a
//! relayed connection is forgotten when it ends, before its number can be another's; of a
//! direct one, which gRPC alone has, the number counts only while it is the same socket. A
//! number of one class never stands for a peer of another ([`super::numbers`]).

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use super::numbers::Ranges;
use crate::sys::rpc::socket_of;

/// What a peer may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Root, or the server's own user: all. Its connections are gRPC's alone.
    Direct,
    /// One who may claim.
    Claimer,
    /// One who may connect, and look.
    Stranger,
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Class::Direct => "direct",
            Class::Claimer => "claimer",
            Class::Stranger => "stranger",
        })
    }
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Its pid when it connected.
    pub pid: i32,
    /// Its start time, clock ticks after boot.
    pub start_time: u64,
    /// Its user.
    pub uid: u32,
    /// What it may do.
    pub class: Class,
}

impl Peer {
    /// Whether it may claim VMs.
    pub fn may_claim(&self) -> bool {
        self.class != Class::Stranger
    }
}

/// Entries of direct connections beyond which those that have ended are looked for.
const MANY: usize = 256;

#[derive(Debug)]
struct Known {
    ranges: Ranges,
    /// With the inode of the socket that the number was.
    direct: HashMap<i32, (Peer, u64)>,
    relayed: HashMap<i32, Peer>,
    /// When there are as many direct ones, the ended ones go.
    look_at: usize,
}

/// Peers by the number of their connection's fd, under which gRPC names them.
#[derive(Clone, Debug)]
pub struct Peers(Arc<Mutex<Known>>);

impl Peers {
    /// None yet.
    pub fn new(ranges: Ranges) -> Peers {
        let (direct, relayed) = (HashMap::new(), HashMap::new());
        Peers(Arc::new(Mutex::new(Known { ranges, direct, relayed, look_at: MANY })))
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Which numbers are whose.
    pub fn ranges(&self) -> Ranges {
        self.lock().ranges.clone()
    }

    /// The peer of the connection that gRPC calls `fd:N`; `None` when it has ended.
    pub fn find(&self, name: &str) -> Option<Peer> {
        let number: i32 = name.rsplit(':').next()?.parse().ok()?;
        let mut known = self.lock();
        if known.ranges.class_of(number)? != Class::Direct {
            return known.relayed.get(&number).copied();
        }
        let (peer, socket) = *known.direct.get(&number)?;
        if socket_of(number) == Some(socket) {
            return Some(peer);
        }
        known.direct.remove(&number);
        None
    }

    /// Remembers a direct connection, whose number is one of its class.
    pub fn add_direct(&self, number: i32, peer: Peer) {
        let mut known = self.lock();
        // Of an end that is gRPC's alone nothing tells.
        if known.direct.len() >= known.look_at {
            known.direct.retain(|number, (_, socket)| socket_of(*number) == Some(*socket));
            known.look_at = (2 * known.direct.len()).max(MANY);
        }
        if let Some(socket) = socket_of(number) {
            known.direct.insert(number, (peer, socket));
        }
    }

    /// Remembers a relayed connection.
    pub fn add_relayed(&self, number: i32, peer: Peer) {
        let mut known = self.lock();
        debug_assert_eq!(known.ranges.class_of(number), Some(peer.class));
        known.relayed.insert(number, peer);
    }

    /// A relayed connection has ended.
    pub fn remove_relayed(&self, number: i32) {
        self.lock().relayed.remove(&number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::rpc::within;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    fn peer(uid: u32, class: Class) -> Peer {
        Peer { pid: 1, start_time: 0, uid, class }
    }

    #[test]
    fn a_number_that_is_used_again_is_not_the_one_before() {
        let peers = Peers::new(Ranges::within(1024));
        let range = peers.ranges().of(Class::Direct);
        let (one, _far) = UnixStream::pair().unwrap();
        let one = within(one, &range).unwrap();
        let number = one.as_raw_fd();
        assert!(range.contains(&number));
        peers.add_direct(number, peer(0, Class::Direct));
        let name = format!("unix:fd:{number}");
        assert_eq!(peers.find(&name).unwrap().uid, 0);
        drop(one);
        assert!(peers.find(&name).is_none(), "it has ended");

        // Another socket under the same number, which nobody has told of yet.
        let (one, _far) = UnixStream::pair().unwrap();
        let one = within(one, &(number..number + 1)).unwrap();
        peers.add_direct(number, peer(0, Class::Direct));
        drop(one);
        let (other, _far) = UnixStream::pair().unwrap();
        let other = within(other, &(number..number + 1)).unwrap();
        assert_eq!(other.as_raw_fd(), number);
        assert!(peers.find(&name).is_none(), "it is another socket");
    }

    #[test]
    fn a_relayed_one_is_known_until_it_ends_and_only_in_its_class() {
        let peers = Peers::new(Ranges::within(1024));
        let ranges = peers.ranges();
        let (claimer, stranger) =
            (ranges.of(Class::Claimer).start, ranges.of(Class::Stranger).start);
        peers.add_relayed(claimer, peer(7, Class::Claimer));
        peers.add_relayed(stranger, peer(8, Class::Stranger));
        let find = |n: i32| peers.find(&format!("fd:{n}")).map(|p| (p.uid, p.may_claim()));
        assert_eq!(find(claimer), Some((7, true)));
        assert_eq!(find(stranger), Some((8, false)));
        peers.remove_relayed(claimer);
        assert_eq!(find(claimer), None);
        for name in ["", "fd:", "fd:x", "fd:-1", "fd:99999999999", "fd:5", "fd:100000"] {
            assert!(peers.find(name).is_none(), "{name}");
        }
    }

    #[test]
    fn direct_ones_that_have_ended_are_not_kept_for_ever() {
        let peers = Peers::new(Ranges::within(20_000));
        let range = peers.ranges().of(Class::Direct);
        for _ in 0..3 * MANY {
            let (near, _far) = UnixStream::pair().unwrap();
            let near = within(near, &range).unwrap();
            peers.add_direct(near.as_raw_fd(), peer(0, Class::Direct));
        }
        assert!(peers.lock().direct.len() <= MANY);
    }
}
