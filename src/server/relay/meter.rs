//! Counts what a connection's frames ask for, and says when that is too much.
//!
//! Pure: headers and times in, verdicts out. What a user or a class of users has together
//! stands in [`Account`]s, which the caller keeps. Invariants: what is refused or put off is
//! counted nowhere; what a meter has counted in accounts as open, [`Meter::release`] takes out
//! again.

use super::bucket::{Bucket, Nanos, Rate};
use super::frames::{flag, kind, Header, MAX_FRAME};
use super::limits::{
    nanos, Excess, Kind, Limits, Whose, ACK_WITHIN, CALL_WITHIN, FRAME_WITHIN, KINDS, MAX_CREDIT,
    MAX_SETTINGS,
};
use super::streams::{Begins, Streams};

/// Frames of the kinds that calls and answers bring along, for each of them: what gRPC's
/// clients send in proportion.
const CREDIT_OF_A_CALL: [(Kind, u32); 2] = [(Kind::Data, 4), (Kind::Others, 4)];
/// See [`CREDIT_OF_A_CALL`].
const CREDIT_OF_AN_ANSWER: [(Kind, u32); 2] = [(Kind::Pings, 1), (Kind::Others, 4)];

/// What a user has, or all users of a class.
#[derive(Clone, Debug, Default)]
pub struct Account {
    buckets: [Bucket; KINDS],
    /// Open calls, and bytes of their requests.
    pub streams: usize,
    /// See above.
    pub bytes: u64,
    /// Connections.
    pub connections: usize,
    /// Those that gRPC has, or has not let go of yet.
    pub opened: usize,
    /// Connections that became gRPC's.
    pub opens: Bucket,
}

impl Account {
    /// Whether nothing is lost by forgetting it.
    pub fn is_idle(&self, now: Nanos) -> bool {
        let none = self.streams == 0 && self.bytes == 0 && self.connections + self.opened == 0;
        none && self.buckets.iter().all(|b| b.is_full(now)) && self.opens.is_full(now)
    }

    /// Whether it has nothing open.
    pub fn is_unused(&self) -> bool {
        self.connections + self.opened == 0
    }
}

/// What a verdict needs to know beside the connection.
pub struct Books<'a> {
    /// Of the peer's class.
    pub limits: &'a Limits,
    /// The peer's user's.
    pub user: &'a mut Account,
    /// Of all users of the class.
    pub class: &'a mut Account,
    /// The time.
    pub now: Nanos,
}

/// What becomes of a client's frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// It may go on.
    Go,
    /// It may be asked about again then: the class has used up what it may.
    At(Nanos),
    /// As soon as another call of the class has ended.
    Crowded,
}

/// A header block that is not complete.
#[derive(Clone, Copy, Debug)]
struct Block {
    stream: u32,
    bytes: u32,
    frames: u32,
    since: Nanos,
    /// Whether its end is that of the request, too.
    ends: bool,
}

/// Of one connection.
#[derive(Debug, Default)]
pub struct Meter {
    buckets: [Bucket; KINDS],
    credit: [u32; KINDS],
    /// Its open calls.
    pub streams: Streams,
    block: Option<Block>,
    /// The client's first frame has come.
    begun: bool,
    /// SETTINGS of the server that the client has not acknowledged, and since when.
    owed: u32,
    owed_since: Nanos,
    acknowledged: bool,
    /// Bytes of header blocks before that.
    early: u32,
    /// Calls that were made, and when the last one ended.
    pub calls: u64,
    /// See above.
    pub last_end: Nanos,
}

impl Meter {
    /// A frame of the client's.
    ///
    /// # Errors
    /// Why the connection is to be shut.
    pub fn client(&mut self, h: &Header, books: &mut Books<'_>) -> Result<Pass, Excess> {
        if h.length > MAX_FRAME {
            return Err(Excess::Frame { length: h.length, limit: MAX_FRAME });
        }
        if !self.begun {
            if h.kind != kind::SETTINGS || h.has(flag::ACK) {
                return Err(Excess::Protocol("the first frame is not SETTINGS"));
            }
            self.begun = true;
            return settings_size(h);
        }
        if let Some(block) = self.block {
            if h.kind != kind::CONTINUATION || h.stream != block.stream {
                return Err(Excess::Protocol("a header block is not continued"));
            }
        }
        match h.kind {
            kind::HEADERS => self.headers(h, books),
            kind::CONTINUATION => self.continuation(h, books),
            kind::DATA => self.data(h, books),
            kind::RST_STREAM => self.reset(h, books),
            kind::PING => self.count(Kind::Pings, h, books),
            kind::SETTINGS if h.has(flag::ACK) => self.acknowledge(),
            kind::SETTINGS => {
                settings_size(h)?;
                self.count(Kind::Settings, h, books)
            }
            kind::PUSH_PROMISE => Err(Excess::Protocol("a client promises nothing")),
            _ => self.count(Kind::Others, h, books),
        }
    }

    /// Takes one of a kind: from what calls and answers have earned, or from the buckets.
    fn count(&mut self, kind: Kind, h: &Header, books: &mut Books<'_>) -> Result<Pass, Excess> {
        let (at, cost, limits) = (kind as usize, kind.cost(h.length), books.limits);
        if self.credit[at] >= cost {
            self.credit[at] -= cost;
            return Ok(Pass::Go);
        }
        let class = &mut books.class.buckets[at];
        let mut asked = *class;
        if let Err(later) = asked.take(limits.class_rates[at], cost, books.now) {
            return Ok(Pass::At(later));
        }
        let over = |whose, rate: Rate| move |_| Excess::Rate { kind, whose, rate };
        let rate = limits.connection[at];
        self.buckets[at].take(rate, cost, books.now).map_err(over(Whose::Connection, rate))?;
        let rate = limits.user[at];
        books.user.buckets[at].take(rate, cost, books.now).map_err(over(Whose::User, rate))?;
        *class = asked;
        Ok(Pass::Go)
    }

    fn earn(&mut self, credit: [(Kind, u32); 2]) {
        for (kind, n) in credit {
            let earned = &mut self.credit[kind as usize];
            *earned = (*earned + n).min(MAX_CREDIT);
        }
    }

    fn headers(&mut self, h: &Header, books: &mut Books<'_>) -> Result<Pass, Excess> {
        let limits = books.limits;
        let begins = self.streams.begins(h.stream);
        if begins == Begins::Nothing {
            return Err(Excess::Protocol("a call's number is even"));
        }
        self.block_fits(h.length, 1, limits)?;
        let new = begins == Begins::Call;
        if new {
            for (whose, open, limit) in [
                (Whose::Connection, self.streams.open_calls(), limits.streams),
                (Whose::User, books.user.streams, limits.user_streams),
            ] {
                if open >= limit {
                    return Err(Excess::Streams { whose, limit });
                }
            }
            if books.class.streams >= limits.class_streams {
                return Ok(Pass::Crowded);
            }
        }
        match self.count(Kind::Calls, h, books)? {
            Pass::Go => {}
            later => return Ok(later),
        }
        self.early_bytes(h.length);
        if new {
            self.streams.open(h.stream, books.now);
            books.user.streams += 1;
            books.class.streams += 1;
            self.calls += 1;
            self.earn(CREDIT_OF_A_CALL);
        }
        let ends = h.has(flag::END_STREAM);
        match h.has(flag::END_HEADERS) {
            true if ends => self.streams.asked(h.stream),
            true => {}
            false => {
                let (stream, bytes, since) = (h.stream, h.length, books.now);
                self.block = Some(Block { stream, bytes, frames: 1, since, ends });
            }
        }
        Ok(Pass::Go)
    }

    fn continuation(&mut self, h: &Header, books: &mut Books<'_>) -> Result<Pass, Excess> {
        let Some(block) = self.block else {
            return Err(Excess::Protocol("nothing is there to be continued"));
        };
        let (bytes, frames) = (block.bytes + h.length, block.frames + 1);
        self.block_fits(bytes, frames, books.limits)?;
        match self.count(Kind::Continuations, h, books)? {
            Pass::Go => {}
            later => return Ok(later),
        }
        self.early_bytes(h.length);
        self.block = match h.has(flag::END_HEADERS) {
            false => Some(Block { bytes, frames, ..block }),
            true => {
                if block.ends {
                    self.streams.asked(block.stream);
                }
                None
            }
        };
        Ok(Pass::Go)
    }

    /// Whether a header block of so much is allowed.
    fn block_fits(&self, bytes: u32, frames: u32, limits: &Limits) -> Result<(), Excess> {
        let limit = limits.block_bytes;
        if bytes > limit {
            return Err(Excess::Block { what: "bytes of headers in a call", limit });
        }
        let limit = limits.block_frames;
        if frames > limit {
            return Err(Excess::Block { what: "frames for the headers of a call", limit });
        }
        let limit = limits.early_bytes;
        if !self.acknowledged && self.early + bytes > limit {
            let what = "bytes of headers before the server's SETTINGS are acknowledged";
            return Err(Excess::Block { what, limit });
        }
        Ok(())
    }

    fn early_bytes(&mut self, n: u32) {
        if !self.acknowledged {
            self.early += n;
        }
    }

    fn data(&mut self, h: &Header, books: &mut Books<'_>) -> Result<Pass, Excess> {
        let ends = h.has(flag::END_STREAM);
        let kind = if h.length == 0 && !ends { Kind::Others } else { Kind::Data };
        let limits = books.limits;
        let open = self.streams.data(h.stream, 0);
        if let Some(before) = open {
            if before.saturating_add(h.length) > limits.call_bytes {
                let limit = limits.call_bytes.into();
                return Err(Excess::Request { whose: Whose::Connection, limit });
            }
            if books.user.bytes.saturating_add(h.length.into()) > limits.user_bytes {
                let limit = limits.user_bytes;
                return Err(Excess::Request { whose: Whose::User, limit });
            }
        }
        match self.count(kind, h, books)? {
            Pass::Go => {}
            later => return Ok(later),
        }
        // Of a call that has ended, gRPC throws them away.
        if open.is_some() {
            self.streams.data(h.stream, h.length);
            books.user.bytes += u64::from(h.length);
            books.class.bytes += u64::from(h.length);
        }
        if ends {
            self.streams.asked(h.stream);
        }
        Ok(Pass::Go)
    }

    fn reset(&mut self, h: &Header, books: &mut Books<'_>) -> Result<Pass, Excess> {
        let passed = self.count(Kind::Resets, h, books)?;
        if passed == Pass::Go {
            self.close(h.stream, books);
        }
        Ok(passed)
    }

    fn acknowledge(&mut self) -> Result<Pass, Excess> {
        if self.owed == 0 {
            return Err(Excess::Protocol("SETTINGS are acknowledged that were not sent"));
        }
        self.owed -= 1;
        self.acknowledged = true;
        Ok(Pass::Go)
    }

    fn close(&mut self, stream: u32, books: &mut Books<'_>) {
        if let Some(bytes) = self.streams.close(stream) {
            self.last_end = books.now;
            for account in [&mut *books.user, &mut *books.class] {
                account.streams = account.streams.saturating_sub(1);
                account.bytes = account.bytes.saturating_sub(bytes.into());
            }
        }
    }

    /// A frame of the server's, before the client has it.
    pub fn server(&mut self, h: &Header, books: &mut Books<'_>) {
        match h.kind {
            kind::SETTINGS if !h.has(flag::ACK) => {
                if self.owed == 0 {
                    self.owed_since = books.now;
                }
                self.owed += 1;
            }
            kind::RST_STREAM => self.close(h.stream, books),
            kind::HEADERS | kind::DATA => {
                if h.kind == kind::DATA {
                    self.earn(CREDIT_OF_AN_ANSWER);
                }
                match h.has(flag::END_STREAM) {
                    true => self.close(h.stream, books),
                    false => self.streams.answers(h.stream, books.now),
                }
            }
            _ => {}
        }
    }

    /// What the client has to do next, and until when.
    pub fn due(&self) -> Option<(Nanos, Excess)> {
        let late =
            |since: Nanos, within, what| (since + nanos(within), Excess::Late { what, within });
        let owed = (self.owed > 0)
            .then(|| late(self.owed_since, ACK_WITHIN, "acknowledgement of the server's SETTINGS"));
        let block = self.block.map(|b| late(b.since, FRAME_WITHIN, "end of a call's headers"));
        let call = self
            .streams
            .oldest()
            .map(|since| late(since, CALL_WITHIN, "end of a request, or reading of its answer,"));
        [owed, block, call].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// All that it counts as open, which the accounts no longer do.
    pub fn release(&self, user: &mut Account, class: &mut Account) {
        for account in [user, class] {
            account.streams = account.streams.saturating_sub(self.streams.open_calls());
            account.bytes = account.bytes.saturating_sub(self.streams.bytes());
        }
    }
}

fn settings_size(h: &Header) -> Result<Pass, Excess> {
    match h.length > MAX_SETTINGS {
        true => Err(Excess::Frame { length: h.length, limit: MAX_SETTINGS }),
        false => Ok(Pass::Go),
    }
}

#[cfg(test)]
mod tests;
