//! yamux's frames.
//!
//! Source: hashicorp/yamux's spec.md.

use std::error;
use std::fmt;

/// Length of a header, in bytes.
pub const HEADER: usize = 12;

pub const SYN: u16 = 1;
pub const ACK: u16 = 2;
pub const FIN: u16 = 4;
pub const RST: u16 = 8;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of a stream.
    Data,
    /// Leave to send more; and how streams begin and end.
    Window,
    /// Are you there?
    Ping,
    /// No more streams.
    GoAway,
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Bits of SYN 1, ACK 2, FIN 4, RST 8.
    pub flags: u16,
    /// Which stream; 0 for the session.
    pub stream: u32,
    /// Of the data that follow, or of the window; a ping's number.
    pub length: u32,
}

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The carrier did.
    Carrier(String),
    /// The peer broke the protocol.
    Nonsense(String),
    /// We closed it.
    Closed,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Carrier(why) => write!(f, "the serial port ended: {why}"),
            End::Nonsense(what) => write!(f, "the guest broke the yamux protocol: {what}"),
            End::Closed => f.write_str("closed"),
        }
    }
}

impl error::Error for End {}

impl Header {
    /// Its bytes.
    pub fn encode(self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        b[1] = self.kind as u8;
        b[2..4].copy_from_slice(&self.flags.to_be_bytes());
        b[4..8].copy_from_slice(&self.stream.to_be_bytes());
        b[8..].copy_from_slice(&self.length.to_be_bytes());
        b
    }

    /// From its bytes.
    ///
    /// # Errors
    /// [`End::Nonsense`] for another version, or no type.
    pub fn decode(b: &[u8; HEADER]) -> Result<Header, End> {
        if b[0] != 0 {
            return Err(End::Nonsense(format!("version {}", b[0])));
        }
        let kind = match b[1] {
            0 => Kind::Data,
            1 => Kind::Window,
            2 => Kind::Ping,
            3 => Kind::GoAway,
            other => return Err(End::Nonsense(format!("frame type {other}"))),
        };
        let number = |i: usize| u32::from_be_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let flags = u16::from_be_bytes([b[2], b[3]]);
        Ok(Header { kind, flags, stream: number(4), length: number(8) })
    }
}
