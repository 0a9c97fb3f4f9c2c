//! HTTP/2 frames, as far as their nine-byte headers tell.
//!
//! [`FrameReader`] follows a stream of bytes from frame to frame. It looks at the preface and
//! at headers only, keeps no payload and allocates nothing. Invariants: the same bytes give the
//! same headers however they are split; every byte that it is given is consumed, or is an error.
//! It decides nothing: what a frame may be is the meter's to say ([`super::meter`]).
//!
//! Source: RFC 9113, sections 3.4 (preface), 4.1 (frame header), 6 (kinds), 6.8 (GOAWAY).

use std::fmt;

/// What a client sends first.
pub const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length of a frame's header, bytes.
pub const HEADER: usize = 9;
/// Largest payload of a frame, bytes: what gRPC's core announces, which is HTTP/2's default.
/// It changes that only with its bandwidth probe, which the server switches off.
pub const MAX_FRAME: u32 = 16_384;
/// A SETTINGS frame that sets nothing: the least that a server's first frame can be.
pub const EMPTY_SETTINGS: [u8; HEADER] = [0, 0, 0, kind::SETTINGS, 0, 0, 0, 0, 0];
/// Longest text in a GOAWAY frame, bytes.
pub const MAX_DEBUG: usize = 400;

/// Kinds of frames.
#[allow(missing_docs)] // They have RFC 9113's names.
pub mod kind {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PUSH_PROMISE: u8 = 5;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const CONTINUATION: u8 = 9;
}

/// Flags of frames.
#[allow(missing_docs)] // They have RFC 9113's names.
pub mod flag {
    pub const END_STREAM: u8 = 1;
    pub const ACK: u8 = 1;
    pub const END_HEADERS: u8 = 4;
}

/// Error codes, section 7.
#[allow(missing_docs)] // They have RFC 9113's names.
pub mod code {
    pub const NO_ERROR: u32 = 0;
    pub const PROTOCOL_ERROR: u32 = 1;
    pub const FRAME_SIZE_ERROR: u32 = 6;
    pub const ENHANCE_YOUR_CALM: u32 = 0xb;
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Of the payload, bytes.
    pub length: u32,
    /// See [`kind`].
    pub kind: u8,
    /// See [`flag`].
    pub flags: u8,
    /// 0 for the whole connection.
    pub stream: u32,
}

impl Header {
    fn of(bytes: [u8; HEADER]) -> Header {
        let [a, b, c, kind, flags, stream @ ..] = bytes;
        // The highest bit is reserved.
        let stream = u32::from_be_bytes(stream) & 0x7fff_ffff;
        Header { length: u32::from_be_bytes([0, a, b, c]), kind, flags, stream }
    }

    /// Whether it has this flag.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// The bytes do not begin as a client's do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoPreface;

impl fmt::Display for NoPreface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the first bytes are not HTTP/2's preface")
    }
}

/// Where a stream of bytes is between its frames.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameReader {
    /// Bytes of the preface that are still to come.
    preface: usize,
    /// The beginning of a header.
    header: [u8; HEADER],
    /// How much of it there is.
    have: usize,
    /// Bytes of the payload that are still to come.
    rest: u32,
    frames: u64,
}

impl FrameReader {
    /// Of what a client sends: the preface, then frames.
    pub const fn client() -> FrameReader {
        FrameReader { preface: PREFACE.len(), header: [0; HEADER], have: 0, rest: 0, frames: 0 }
    }

    /// Of what a server sends: frames.
    pub const fn server() -> FrameReader {
        FrameReader { preface: 0, ..FrameReader::client() }
    }

    /// Goes on to the end of the next header, or to the end of the bytes: how many were
    /// consumed, and the header if one is complete.
    ///
    /// # Errors
    /// [`NoPreface`].
    pub fn read(&mut self, bytes: &[u8]) -> Result<(usize, Option<Header>), NoPreface> {
        let mut at = 0;
        while at < bytes.len() {
            let left = &bytes[at..];
            if self.preface > 0 {
                let n = left.len().min(self.preface);
                let wanted = &PREFACE[PREFACE.len() - self.preface..][..n];
                if left[..n] != *wanted {
                    return Err(NoPreface);
                }
                self.preface -= n;
                at += n;
            } else if self.rest > 0 {
                let n = left.len().min(self.rest as usize);
                self.rest -= n as u32;
                at += n;
            } else {
                let n = left.len().min(HEADER - self.have);
                self.header[self.have..self.have + n].copy_from_slice(&left[..n]);
                self.have += n;
                at += n;
                if self.have == HEADER {
                    let header = Header::of(self.header);
                    (self.have, self.rest) = (0, header.length);
                    self.frames += 1;
                    return Ok((at, Some(header)));
                }
            }
        }
        Ok((at, None))
    }

    /// Headers that were read.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// The number of the frame that has begun, or would begin now; the first is 1.
    pub fn current(&self) -> u64 {
        self.frames + u64::from(self.rest == 0)
    }

    /// Whether something has begun and is not complete: the preface, a header, a payload.
    pub fn unfinished(&self) -> bool {
        self.have > 0 || self.rest > 0 || (1..PREFACE.len()).contains(&self.preface)
    }

    /// Of that, how many bytes are certain to come.
    pub fn wanted(&self) -> usize {
        match (self.preface, self.have) {
            (0, 0) => self.rest as usize,
            (0, have) => HEADER - have,
            (preface, _) => preface,
        }
    }
}

/// A GOAWAY frame: streams up to `last` may have been looked at, and why no more are.
pub fn goaway(last: u32, code: u32, text: &str) -> Vec<u8> {
    let end = (0..=text.len().min(MAX_DEBUG)).rev().find(|n| text.is_char_boundary(*n));
    let text = &text.as_bytes()[..end.unwrap_or(0)];
    let length = 8 + text.len() as u32;
    let mut out = Vec::with_capacity(HEADER + length as usize);
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[kind::GOAWAY, 0, 0, 0, 0, 0]);
    out.extend_from_slice(&last.to_be_bytes());
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(text);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        out.extend([kind, flags]);
        out.extend(stream.to_be_bytes());
        out.extend(payload);
        out
    }

    fn headers(mut reader: FrameReader, pieces: &[&[u8]]) -> (Vec<Header>, FrameReader) {
        let mut all = Vec::new();
        for piece in pieces {
            let mut rest = *piece;
            while !rest.is_empty() {
                let (n, header) = reader.read(rest).unwrap();
                assert!(n > 0, "it goes on");
                rest = &rest[n..];
                all.extend(header);
            }
        }
        (all, reader)
    }

    fn session() -> Vec<u8> {
        [
            PREFACE.to_vec(),
            frame(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 9]),
            frame(kind::HEADERS, flag::END_HEADERS, 1, &[0x82; 40]),
            frame(kind::DATA, flag::END_STREAM, 1, &[]),
            frame(0xee, 0xff, u32::MAX, &[7; 300]),
            frame(kind::SETTINGS, flag::ACK, 0, &[]),
        ]
        .concat()
    }

    #[test]
    fn all_splits_of_the_same_bytes_give_the_same_headers() {
        let bytes = session();
        let whole = headers(FrameReader::client(), &[&bytes]);
        assert_eq!(whole.0.len(), 5);
        assert_eq!(whole.0[1], Header { length: 40, kind: 1, flags: 4, stream: 1 });
        assert_eq!(whole.0[3].stream, 0x7fff_ffff, "without the reserved bit");
        assert!(!whole.1.unfinished() && whole.1.frames() == 5);
        for at in 0..=bytes.len() {
            let (first, second) = bytes.split_at(at);
            assert_eq!(headers(FrameReader::client(), &[first, second]), whole, "{at}");
        }
        for size in 1..70 {
            let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
            assert_eq!(headers(FrameReader::client(), &pieces), whole, "{size}");
        }
    }

    #[test]
    fn it_knows_where_a_frame_ends() {
        let bytes = session();
        let mut ends = vec![0, PREFACE.len()];
        for length in [6, 40, 0, 300, 0] {
            ends.push(ends[ends.len() - 1] + HEADER + length);
        }
        for at in 0..=bytes.len() {
            let (_, reader) = headers(FrameReader::client(), &[&bytes[..at]]);
            assert_eq!(reader.unfinished(), !ends.contains(&at), "{at}");
            if reader.unfinished() {
                let (_, later) = headers(reader.clone(), &[&bytes[at..at + reader.wanted()]]);
                let header_done = later.frames() > reader.frames();
                assert!(header_done || !later.unfinished(), "{at}");
            }
        }
    }

    #[test]
    fn other_first_bytes_are_no_preface() {
        for (at, _) in PREFACE.iter().enumerate() {
            let mut bytes = PREFACE.to_vec();
            bytes[at] ^= 1;
            for size in [1, 7, 24] {
                let mut reader = FrameReader::client();
                let read = bytes.chunks(size).try_for_each(|c| reader.read(c).map(|_| ()));
                assert_eq!(read, Err(NoPreface), "{at} {size}");
            }
        }
    }

    #[test]
    fn a_goaway_is_one_frame_of_a_bounded_length() {
        let frame = goaway(5, code::ENHANCE_YOUR_CALM, "too many");
        let (all, reader) = headers(FrameReader::server(), &[&frame]);
        assert_eq!(all, [Header { length: 16, kind: kind::GOAWAY, flags: 0, stream: 0 }]);
        assert!(!reader.unfinished());
        assert_eq!(frame[9..17], [0, 0, 0, 5, 0, 0, 0, 0xb]);
        assert_eq!(&frame[17..], b"too many");
        let long = goaway(0, 0, &"é".repeat(MAX_DEBUG));
        assert!(long.len() <= HEADER + 8 + MAX_DEBUG);
        assert!(std::str::from_utf8(&long[17..]).is_ok());
    }
}
