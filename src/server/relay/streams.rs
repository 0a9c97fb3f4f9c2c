//! The open calls of a connection, as frames' headers show them.
//!
//! A call begins with its HEADERS and ends with the server's END_STREAM or a RST_STREAM of
//! either side: gRPC's server resets what a client has not ended when it has answered.
//! Invariant: a client that counts for itself never counts fewer than this table: an end is
//! taken here before the client can have seen it.

use super::bucket::Nanos;

/// An open call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stream {
    id: u32,
    /// Of its request, so far.
    bytes: u32,
    /// Since when the client has something to do: to send the rest of its request, or to take
    /// its answer; 0 while the server has.
    since: Nanos,
}

/// What HEADERS of a client mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begins {
    /// A call.
    Call,
    /// More of one that is open.
    Known,
    /// One that has ended.
    Ended,
    /// Nothing: a client's numbers are odd.
    Nothing,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// By number, which only grows.
    open: Vec<Stream>,
    last: u32,
}

impl Streams {
    fn position(&self, id: u32) -> Option<usize> {
        self.open.binary_search_by_key(&id, |s| s.id).ok()
    }

    /// What HEADERS with this number would be.
    pub fn begins(&self, id: u32) -> Begins {
        match id {
            _ if id % 2 == 0 => Begins::Nothing,
            _ if id > self.last => Begins::Call,
            _ if self.position(id).is_some() => Begins::Known,
            _ => Begins::Ended,
        }
    }

    /// Adds one that [`Streams::begins`] calls a call.
    pub fn open(&mut self, id: u32, now: Nanos) {
        debug_assert!(id > self.last);
        self.last = id;
        self.open.push(Stream { id, bytes: 0, since: now.max(1) });
    }

    /// More of its request: how much that has become. `None` when it has ended.
    pub fn data(&mut self, id: u32, bytes: u32) -> Option<u32> {
        let at = self.position(id)?;
        let stream = &mut self.open[at];
        stream.bytes = stream.bytes.saturating_add(bytes);
        Some(stream.bytes)
    }

    /// Its request is complete.
    pub fn asked(&mut self, id: u32) {
        if let Some(at) = self.position(id) {
            self.open[at].since = 0;
        }
    }

    /// The server has begun to answer.
    pub fn answers(&mut self, id: u32, now: Nanos) {
        if let Some(at) = self.position(id) {
            let stream = &mut self.open[at];
            if stream.since == 0 {
                stream.since = now.max(1);
            }
        }
    }

    /// It has ended: the bytes of its request, if it was open.
    pub fn close(&mut self, id: u32) -> Option<u32> {
        let at = self.position(id)?;
        Some(self.open.remove(at).bytes)
    }

    /// How many are open.
    pub fn open_calls(&self) -> usize {
        self.open.len()
    }

    /// Bytes of their requests.
    pub fn bytes(&self) -> u64 {
        self.open.iter().map(|s| u64::from(s.bytes)).sum()
    }

    /// The highest number there was.
    pub fn last(&self) -> u32 {
        self.last
    }

    /// Since when the client has been at that call at which it has been longest.
    pub fn oldest(&self) -> Option<Nanos> {
        self.open.iter().map(|s| s.since).filter(|at| *at > 0).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_open_from_its_headers_to_its_end() {
        let mut streams = Streams::default();
        assert_eq!(streams.begins(2), Begins::Nothing);
        assert_eq!(streams.begins(0), Begins::Nothing);
        for id in [1, 3, 9] {
            assert_eq!(streams.begins(id), Begins::Call);
            streams.open(id, 1);
            assert_eq!(streams.begins(id), Begins::Known);
        }
        assert_eq!(streams.begins(5), Begins::Ended, "it was passed over");
        assert_eq!((streams.open_calls(), streams.last()), (3, 9));
        assert_eq!(streams.data(3, 5), Some(5));
        assert_eq!(streams.data(3, u32::MAX), Some(u32::MAX));
        assert_eq!(streams.data(9, 7), Some(7));
        assert_eq!(streams.bytes(), u64::from(u32::MAX) + 7);
        assert_eq!(streams.data(5, 5), None);
        assert_eq!(streams.close(3), Some(u32::MAX));
        assert_eq!(streams.close(3), None);
        assert_eq!(streams.begins(3), Begins::Ended);
        assert_eq!((streams.open_calls(), streams.last()), (2, 9));
    }

    #[test]
    fn what_a_client_has_to_do_is_known_by_its_age() {
        let mut streams = Streams::default();
        (0..4).for_each(|n| streams.open(2 * n + 1, 10 * u64::from(n)));
        assert_eq!(streams.oldest(), Some(1), "none is older than the beginning");
        streams.asked(1);
        assert_eq!(streams.oldest(), Some(10));
        for id in [3, 5, 7] {
            streams.asked(id);
        }
        assert_eq!(streams.oldest(), None, "the server has all of it");
        streams.answers(5, 70);
        streams.answers(3, 90);
        streams.answers(5, 99);
        streams.answers(77, 1);
        assert_eq!(streams.oldest(), Some(70));
        streams.close(5);
        assert_eq!(streams.oldest(), Some(90));
    }
}
