//! The frames on a serial port, which give a port without connections some.
//!
//! A virtio serial port is one endless stream of bytes, whoever is at its
//! host end. A client that vanishes in the middle of a message would leave the
//! guest waiting for the rest, and take the next client's first bytes for it.
//! So all bytes travel in frames of bounded size, each with the number of the
//! session that it belongs to:
//!
//! ```text
//! +--------+----------------+---------+- - - - - -+
//! | kind 4 | session 8 (LE) | len 4   | payload   |   len <= MAX_PAYLOAD
//! +--------+----------------+---------+- - - - - -+
//!
//! host                                  guest
//!  | FILLER zeros, HELLO(session) ──────► |  ends an older session
//!  | ◄─────────────── WELCOME(session)    |
//!  | ◄──────────────► DATA(session, …)    |
//!  | BYE(session) ──────────────────────► |  either may begin;
//!  | ◄───────────────────── BYE(session)  |  the guest's closes it
//! ```
//!
//! Invariants: the zeros before HELLO are as long as the longest frame, so
//! whatever a dead client left unfinished is full when HELLO comes, and zeros
//! between frames mean nothing. Session numbers are random, so the host finds
//! its WELCOME behind whatever was left of an older session. Nothing is
//! allocated beyond one frame.
//!
//! Source: our own; Kata speaks raw ttrpc on vsock, where connections exist.

use std::io::{self, Read, Write};

/// Longest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 16 * 1024;
/// Length of a frame's header, in bytes.
pub const HEADER: usize = 16;
/// Zeros that a client sends first: the longest frame there can be.
pub const FILLER: usize = HEADER + MAX_PAYLOAD;

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Host to guest: a new session starts, any older one is over.
    Hello,
    /// Guest to host: the session has started.
    Welcome,
    /// Either way: bytes of the session.
    Data,
    /// Guest to host: the session is over.
    Bye,
}

impl Kind {
    fn magic(self) -> [u8; 4] {
        match self {
            Kind::Hello => *b"vmc\x01",
            Kind::Welcome => *b"vmc\x02",
            Kind::Data => *b"vmc\x03",
            Kind::Bye => *b"vmc\x04",
        }
    }

    fn from_magic(magic: &[u8]) -> Option<Kind> {
        [Kind::Hello, Kind::Welcome, Kind::Data, Kind::Bye].into_iter().find(|k| k.magic() == magic)
    }
}

/// One frame's header and payload.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// The session it belongs to.
    pub session: u64,
    /// Its bytes, at most [`MAX_PAYLOAD`].
    pub payload: Vec<u8>,
}

/// The header of a frame with `len` bytes of payload.
pub fn header(kind: Kind, session: u64, len: usize) -> [u8; HEADER] {
    debug_assert!(len <= MAX_PAYLOAD);
    let mut h = [0; HEADER];
    h[..4].copy_from_slice(&kind.magic());
    h[4..12].copy_from_slice(&session.to_le_bytes());
    h[12..].copy_from_slice(&(len as u32).to_le_bytes());
    h
}

/// Writes one frame with a single `write` call where the port takes it whole.
///
/// # Errors
/// As the writer's.
pub fn write_frame(to: &mut impl Write, kind: Kind, session: u64, bytes: &[u8]) -> io::Result<()> {
    let mut whole = Vec::with_capacity(HEADER + bytes.len());
    whole.extend_from_slice(&header(kind, session, bytes.len()));
    whole.extend_from_slice(bytes);
    to.write_all(&whole)
}

/// Finds frames in a stream of bytes, whatever lies between them.
#[derive(Debug, Default)]
pub struct Deframer {
    buffer: Vec<u8>,
    start: usize,
}

impl Deframer {
    /// An empty one.
    pub fn new() -> Deframer {
        Deframer::default()
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` when more bytes are needed. Bytes that
    /// are no frame are skipped.
    pub fn next_frame(&mut self) -> Option<Frame> {
        loop {
            let rest = &self.buffer[self.start..];
            if rest.len() < HEADER {
                // Zeros and noise need not wait for a full header.
                match rest.iter().position(|b| *b == b'v') {
                    Some(p) => self.start += p,
                    None => self.start = self.buffer.len(),
                }
                return None;
            }
            let len = u32::from_le_bytes([rest[12], rest[13], rest[14], rest[15]]) as usize;
            let Some(kind) = Kind::from_magic(&rest[..4]).filter(|_| len <= MAX_PAYLOAD) else {
                let skip = rest[1..].iter().position(|b| *b == b'v').map_or(rest.len(), |p| p + 1);
                self.start += skip;
                continue;
            };
            if rest.len() < HEADER + len {
                return None;
            }
            let mut session = [0; 8];
            session.copy_from_slice(&rest[4..12]);
            let payload = rest[HEADER..HEADER + len].to_vec();
            self.start += HEADER + len;
            return Some(Frame { kind, session: u64::from_le_bytes(session), payload });
        }
    }

    /// Reads until a whole frame is there; `None` at the end of the stream.
    ///
    /// # Errors
    /// As the reader's.
    pub fn read_frame(&mut self, from: &mut impl Read) -> io::Result<Option<Frame>> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(frame) = self.next_frame() {
                return Ok(Some(frame));
            }
            match from.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(n) => self.push(&chunk[..n]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(kind: Kind, session: u64, bytes: &[u8]) -> Vec<u8> {
        let mut v = Vec::new();
        write_frame(&mut v, kind, session, bytes).unwrap();
        v
    }

    #[test]
    fn frames_come_back_whatever_the_chunks() {
        let mut stream = vec![0; FILLER];
        stream.extend(framed(Kind::Hello, 7, b""));
        stream.extend(framed(Kind::Data, 7, &[b'v'; 1000]));
        for chunk in [1, 3, 16, 17, 4096] {
            let mut d = Deframer::new();
            let mut got = Vec::new();
            for c in stream.chunks(chunk) {
                d.push(c);
                while let Some(f) = d.next_frame() {
                    got.push(f);
                }
            }
            assert_eq!(got.len(), 2, "chunks of {chunk}");
            assert_eq!(got[0].kind, Kind::Hello);
            assert_eq!(got[1].payload, [b'v'; 1000]);
        }
    }

    /// Cut a client's stream at every byte: the next client's HELLO is found.
    #[test]
    fn hello_survives_any_cut() {
        let mut dying = framed(Kind::Hello, 1, b"");
        dying.extend(framed(Kind::Data, 1, &[0xff; 300]));
        dying.extend(framed(Kind::Data, 1, &[b'v'; MAX_PAYLOAD]));
        for cut in (0..dying.len()).step_by(1).take(700).chain([dying.len() - 1]) {
            let mut d = Deframer::new();
            d.push(&dying[..cut]);
            d.push(&[0; FILLER]);
            d.push(&framed(Kind::Hello, 2, b""));
            let mut last = None;
            while let Some(f) = d.next_frame() {
                last = Some(f);
            }
            let last = last.unwrap_or_else(|| panic!("cut at {cut}: no frame"));
            assert_eq!((last.kind, last.session), (Kind::Hello, 2), "cut at {cut}");
        }
    }
}
