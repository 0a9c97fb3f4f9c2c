//! What a connection through the relay may ask for, by class of its peer, and what it is told
//! when it asks for more.
//!
//! The numbers keep the memory that all strangers together can take below 18 MiB, and that of
//! one claimer below 50 MiB (README, *Who may have a VM*), with room for honest clients: a
//! claimer may make 20,000 calls a second one after the other; pings and window updates are
//! granted in proportion to calls and answers, since gRPC's clients send them so.

use std::fmt;
use std::time::Duration;

use super::bucket::{Nanos, Rate};
use super::frames::code;
use crate::config::options::OURS;
use crate::config::Config;
use crate::server::peers::Class;

/// From accept to the preface and the client's first frame.
pub const PREFACE_WITHIN: Duration = Duration::from_secs(2);
/// From the server's SETTINGS being sent to the client's acknowledging them.
pub const ACK_WITHIN: Duration = Duration::from_secs(2);
/// From a frame's or header block's first byte to its last.
pub const FRAME_WITHIN: Duration = Duration::from_secs(5);
/// From a call's HEADERS to the end of its request, and from the answer's beginning to its
/// end: what of both is the client's to do.
pub const CALL_WITHIN: Duration = Duration::from_secs(10);
/// Longest that bytes for a client may wait for its reading.
pub const READ_WITHIN: Duration = Duration::from_secs(10);
/// Largest SETTINGS frame, bytes: 85 settings, of which HTTP/2 has six.
pub const MAX_SETTINGS: u32 = 512;
/// Of a frame that counts by its size, too, so many bytes count as one more.
const BYTES_A_TOKEN: u32 = 256;
/// Calls, pings and so on that earned credit adds to at most.
pub const MAX_CREDIT: u32 = 4096;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// HEADERS: calls, and their trailers.
    Calls,
    /// RST_STREAM.
    Resets,
    /// PING, acknowledgements as well.
    Pings,
    /// SETTINGS beyond a connection's first, and no acknowledgement.
    Settings,
    /// CONTINUATION.
    Continuations,
    /// DATA with something in it, or at its end.
    Data,
    /// All others: WINDOW_UPDATE, PRIORITY, GOAWAY, unknown kinds, DATA of nothing; by size.
    Others,
}

/// How many kinds there are.
pub const KINDS: usize = 7;

impl Kind {
    /// What one of so many bytes counts as.
    pub fn cost(self, length: u32) -> u32 {
        match self {
            Kind::Others => 1 + length / BYTES_A_TOKEN,
            _ => 1,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Calls => "calls",
            Kind::Resets => "calls that are reset (RST_STREAM)",
            Kind::Pings => "PING frames",
            Kind::Settings => "SETTINGS frames",
            Kind::Continuations => "CONTINUATION frames",
            Kind::Data => "DATA frames",
            Kind::Others => "control frames",
        }
    }
}

/// A rate for each [`Kind`].
pub type Rates = [Rate; KINDS];

/// Of one class of peers.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Whose.
    pub class: Class,
    /// Connections: a user's, and all users' of the class.
    pub user_connections: usize,
    /// See above.
    pub class_connections: usize,
    /// Calls at a time: of a connection, a user, the class.
    pub streams: usize,
    /// See above.
    pub user_streams: usize,
    /// See above.
    pub class_streams: usize,
    /// Bytes of a call's request, and of all open calls of a user.
    pub call_bytes: u32,
    /// See above.
    pub user_bytes: u64,
    /// Bytes and frames of a header block.
    pub block_bytes: u32,
    /// See above.
    pub block_frames: u32,
    /// Bytes of header blocks before the client has acknowledged the server's SETTINGS, with
    /// which gRPC's own limits begin.
    pub early_bytes: u32,
    /// Rates: of a connection, a user, the class. Who exceeds one of the first two is shut,
    /// the third makes all of the class wait.
    pub connection: Rates,
    /// See above.
    pub user: Rates,
    /// See above.
    pub class_rates: Rates,
    /// Connections that become gRPC's, of the class.
    pub opens: Rate,
    /// Connects of a user.
    pub connects: Rate,
}

const fn rate(burst: u32, per_second: u32) -> Rate {
    Rate::new(burst, per_second)
}

/// Calls at a time on a claimer's connection.
pub const CLAIMER_STREAMS: usize = 128;
/// Calls at a time of a claimer, waiting claims included.
pub const CLAIMER_USER_STREAMS: usize = 1024;
/// Calls at a time of all claimers.
pub const CLAIMERS_STREAMS: usize = 4096;
/// Calls at a time of all strangers.
pub const STRANGERS_STREAMS: usize = 256;

impl Limits {
    /// Of those who may claim. The order of rates is that of [`Kind`].
    pub fn claimers(config: &Config) -> Limits {
        Limits {
            class: Class::Claimer,
            user_connections: config.number(OURS, "user_max_connections") as usize,
            class_connections: config.number(OURS, "max_connections") as usize,
            streams: CLAIMER_STREAMS,
            user_streams: CLAIMER_USER_STREAMS,
            class_streams: CLAIMERS_STREAMS,
            // More than gRPC takes, so that gRPC says so.
            call_bytes: 128 * 1024,
            user_bytes: 4 << 20,
            block_bytes: 8192,
            block_frames: 8,
            early_bytes: 4096,
            connection: [
                rate(25_000, 25_000),
                rate(128, 50),
                rate(1000, 100),
                rate(100, 10),
                rate(256, 50),
                rate(2000, 1000),
                rate(10_000, 2000),
            ],
            user: [
                rate(50_000, 50_000),
                rate(1024, 200),
                rate(4000, 400),
                rate(2000, 100),
                rate(1024, 200),
                rate(8000, 4000),
                rate(20_000, 8000),
            ],
            class_rates: [Rate::ANY; KINDS],
            opens: Rate::ANY,
            connects: rate(1024, 500),
        }
    }

    /// Of those who may connect and not claim.
    pub fn strangers(config: &Config) -> Limits {
        let streams = config.number(OURS, "stranger_max_streams") as usize;
        let connections = config.number(OURS, "stranger_max_connections") as usize;
        Limits {
            class: Class::Stranger,
            user_connections: connections,
            class_connections: config.number(OURS, "strangers_max_connections") as usize,
            streams,
            user_streams: connections.saturating_mul(streams),
            class_streams: STRANGERS_STREAMS.max(streams),
            call_bytes: 4096,
            user_bytes: 64 * 1024,
            block_bytes: 4096,
            block_frames: 4,
            early_bytes: 1024,
            connection: [
                rate(200, 100),
                rate(16, 1),
                rate(32, 2),
                rate(16, 1),
                rate(16, 1),
                rate(64, 20),
                rate(256, 50),
            ],
            user: [
                rate(200, 100),
                rate(32, 2),
                rate(64, 4),
                rate(32, 2),
                rate(32, 2),
                rate(128, 40),
                rate(512, 100),
            ],
            class_rates: [
                rate(500, 1000),
                rate(256, 64),
                rate(512, 128),
                rate(256, 64),
                rate(256, 64),
                rate(2000, 2000),
                rate(4096, 2000),
            ],
            opens: rate(256, 400),
            connects: rate(64, 50),
        }
    }
}

/// Whose a limit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The connection's.
    Connection,
    /// Its user's.
    User,
    /// All users' of its class.
    Class,
}

impl Whose {
    fn name(self) -> &'static str {
        match self {
            Whose::Connection => "on a connection",
            Whose::User => "of a user",
            Whose::Class => "of all such users together",
        }
    }
}

/// Why a connection is shut, or not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Excess {
    /// HTTP/2 does not allow that.
    Protocol(&'static str),
    /// A frame larger than the server takes.
    Frame { length: u32, limit: u32 },
    /// A header block that is too large, or comes in too many pieces.
    Block { what: &'static str, limit: u32 },
    /// A request that is too large, or all open ones of the user.
    Request { whose: Whose, limit: u64 },
    /// Too many calls at a time.
    Streams { whose: Whose, limit: usize },
    /// Too many frames of a kind.
    Rate { kind: Kind, whose: Whose, rate: Rate },
    /// Too many connects.
    Connects { rate: Rate },
    /// Too many connections.
    Connections { whose: Whose, limit: usize },
    /// Something took too long.
    Late { what: &'static str, within: Duration },
    /// Another connection needs its place.
    GaveWay { why: &'static str },
    /// What the server itself has not: fds, a thread's time.
    Busy { what: &'static str },
    /// The server ends, or restarts.
    Ending,
}

impl Excess {
    /// HTTP/2's error code.
    pub fn code(&self) -> u32 {
        match self {
            Excess::Protocol(_) => code::PROTOCOL_ERROR,
            Excess::Frame { .. } => code::FRAME_SIZE_ERROR,
            Excess::Ending => code::NO_ERROR,
            _ => code::ENHANCE_YOUR_CALM,
        }
    }

    /// What the peer and the log are told: the limit, and which option it is.
    pub fn told(&self, class: Class) -> String {
        let option = self.option(class).map_or_else(String::new, |o| format!(" ({o})"));
        let who = match class {
            Class::Direct => "root",
            Class::Claimer => "a user who may claim",
            Class::Stranger => "a user who may not claim",
        };
        format!("{self}{option}, for {who}")
    }

    fn option(&self, class: Class) -> Option<&'static str> {
        Some(match (self, class) {
            (Excess::Connections { whose: Whose::User, .. }, Class::Stranger) => {
                "stranger_max_connections"
            }
            (Excess::Connections { .. }, Class::Stranger) => "strangers_max_connections",
            (Excess::Connections { whose: Whose::User, .. }, _) => "user_max_connections",
            (Excess::Connections { .. }, _) => "max_connections",
            (Excess::Streams { whose: Whose::Class, .. }, _) => return None,
            (Excess::Streams { .. }, Class::Stranger) => "stranger_max_streams",
            _ => return None,
        })
    }
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let often =
            |rate: &Rate| format!("{} at once and {} a second", rate.burst, rate.per_second);
        match self {
            Excess::Protocol(what) => f.write_str(what),
            Excess::Frame { length, limit } => {
                write!(f, "a frame of {length} bytes, of at most {limit}")
            }
            Excess::Block { what, limit } => write!(f, "more than {limit} {what}"),
            Excess::Request { whose: Whose::Connection, limit } => {
                write!(f, "a request of more than {limit} bytes")
            }
            Excess::Request { whose, limit } => {
                write!(f, "requests of more than {limit} bytes at a time {}", whose.name())
            }
            Excess::Streams { whose, limit } => {
                write!(f, "more than {limit} calls at a time {}", whose.name())
            }
            Excess::Rate { kind, whose, rate } => {
                write!(f, "more {} {} than {}", kind.name(), whose.name(), often(rate))
            }
            Excess::Connects { rate } => write!(f, "more connects of a user than {}", often(rate)),
            Excess::Connections { whose, limit } => {
                write!(f, "more than {limit} connections {}", whose.name())
            }
            Excess::Late { what, within } => write!(f, "no {what} within {} s", within.as_secs()),
            Excess::GaveWay { why } => {
                write!(f, "another connection takes this one's place: {why}")
            }
            Excess::Busy { what } => write!(f, "the server has no {what} left: try again"),
            Excess::Ending => f.write_str("the server ends or restarts: try again"),
        }
    }
}

/// A duration as the relay counts.
pub const fn nanos(time: Duration) -> Nanos {
    time.as_nanos() as Nanos
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_exceeds_is_told_the_limit_and_its_option() {
        let streams = Excess::Streams { whose: Whose::Connection, limit: 16 };
        assert_eq!(
            streams.told(Class::Stranger),
            "more than 16 calls at a time on a connection (stranger_max_streams), for a user who \
             may not claim"
        );
        let connections = Excess::Connections { whose: Whose::User, limit: 8 };
        assert!(connections.told(Class::Claimer).contains("(user_max_connections)"));
        assert!(connections.told(Class::Stranger).contains("(stranger_max_connections)"));
        let rate = Excess::Rate { kind: Kind::Pings, whose: Whose::User, rate: rate(64, 4) };
        assert_eq!(
            rate.told(Class::Stranger),
            "more PING frames of a user than 64 at once and 4 a second, for a user who may not \
             claim"
        );
        assert_eq!(rate.code(), code::ENHANCE_YOUR_CALM);
    }

    #[test]
    fn all_options_that_are_named_exist() {
        for class in [Class::Claimer, Class::Stranger] {
            for whose in [Whose::Connection, Whose::User, Whose::Class] {
                for excess in
                    [Excess::Streams { whose, limit: 1 }, Excess::Connections { whose, limit: 1 }]
                {
                    let found = excess.option(class);
                    assert!(found.is_none_or(|o| crate::config::options::find(OURS, o).is_some()));
                }
            }
        }
    }
}
