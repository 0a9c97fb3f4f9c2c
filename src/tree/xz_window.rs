//! How far an xz stream looks back, and how many blocks it has, watched as it is read: its
//! decompressor takes any stream's word for it.
//!
//! Invariant: a block that names a larger dictionary than [`MAX_WINDOW`] is an error
//! before the decompressor has seen the name, and so is an index of more than
//! `MAX_BLOCKS`; what is not understood is left to it.
//!
//! Source: The .xz File Format 1.2.1, 2.1, 3.1, 4, 5.3.1; LZMA2's chunks as in its
//! reference decompressor.

use std::io::{self, Read};

use super::compressed::{too_large, MAX_WINDOW};

/// Most blocks of a stream: the decompressor keeps 16 bytes of each, and xz makes blocks of
/// 3 MiB and more.
const MAX_BLOCKS: u64 = 4 << 20;
/// The filter LZMA2.
const LZMA2: u64 = 0x21;

/// What is gathered next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// The header of the stream: 12 bytes.
    Stream,
    /// The size of a block's header, or the index.
    Size,
    /// The rest of a block's header.
    Block,
    /// The first byte of a chunk.
    Control,
    /// The sizes of a chunk; and how many bytes follow them beside those.
    Sizes(u64),
    /// How many records the index has: what was read of it, and where the next bits go.
    Records(u64, u32),
    /// The index's records, or what is not understood: nothing is watched any more.
    Rest,
}

/// A stream, of which as many bytes come at once as are asked for, as long as there are:
/// the decompressor counts on that.
pub struct Watched<R> {
    inner: R,
    at: At,
    gathered: Vec<u8>,
    /// Bytes to gather, and to pass over before that.
    wanted: usize,
    pass: u64,
    /// Bytes of the block's chunks so far, and of the sum behind them.
    chunks: u64,
    sum: u64,
}

impl<R: Read> Watched<R> {
    /// From the beginning of an xz stream.
    pub fn new(inner: R) -> Watched<R> {
        let gathered = Vec::new();
        Watched { inner, at: At::Stream, gathered, wanted: 12, pass: 0, chunks: 0, sum: 0 }
    }

    /// The stream.
    pub fn into_inner(self) -> R {
        self.inner
    }

    fn watch(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() && self.at != At::Rest {
            if self.pass > 0 {
                let n = bytes.len().min(usize::try_from(self.pass).unwrap_or(usize::MAX));
                self.pass -= n as u64;
                bytes = &bytes[n..];
                continue;
            }
            let n = bytes.len().min(self.wanted - self.gathered.len());
            self.gathered.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if self.gathered.len() == self.wanted {
                let gathered = std::mem::take(&mut self.gathered);
                (self.at, self.wanted) = self.step(&gathered)?;
            }
        }
        Ok(())
    }

    /// Takes what was gathered; tells what comes next, and how many bytes of it.
    fn step(&mut self, gathered: &[u8]) -> io::Result<(At, usize)> {
        Ok(match self.at {
            At::Stream => {
                self.sum = match gathered[7] & 15 {
                    0 => 0,
                    1..=3 => 4,
                    4..=6 => 8,
                    7..=9 => 16,
                    10..=12 => 32,
                    _ => 64,
                };
                (At::Size, 1)
            }
            At::Size => match gathered[0] {
                0 => (At::Records(0, 0), 1),
                size => (At::Block, usize::from(size) * 4 + 3),
            },
            At::Block => match dictionary(gathered) {
                Some(bytes) if bytes > MAX_WINDOW => return Err(too_large(bytes)),
                Some(_) => {
                    self.chunks = 0;
                    (At::Control, 1)
                }
                // Nobody would watch what the decompressor makes of it.
                None => return Err(io::Error::other("a block whose filters are not understood")),
            },
            At::Control => {
                self.chunks += 1;
                match gathered[0] {
                    0 => {
                        self.pass = self.chunks.wrapping_neg() % 4 + self.sum;
                        (At::Size, 1)
                    }
                    1 | 2 => (At::Sizes(0), 2),
                    // With properties.
                    0xc0.. => (At::Sizes(1), 4),
                    0x80.. => (At::Sizes(0), 4),
                    _ => (At::Rest, 0),
                }
            }
            At::Sizes(more) => {
                // The last two bytes: of a chunk as it is, or compressed.
                let [.., high, low] = *gathered else { return Ok((At::Rest, 0)) };
                self.pass = u64::from(u16::from_be_bytes([high, low])) + 1 + more;
                self.chunks += gathered.len() as u64 + self.pass;
                (At::Control, 1)
            }
            At::Records(low, shift) => {
                let count = low | u64::from(gathered[0] & 0x7f) << shift;
                match gathered[0] & 0x80 {
                    0 if count > MAX_BLOCKS => {
                        return Err(io::Error::other(format!(
                            "it has {count} blocks, of at most {MAX_BLOCKS} here: compress it \
                             in larger ones"
                        )));
                    }
                    // Nine bytes at most.
                    0x80 if shift < 56 => (At::Records(count, shift + 7), 1),
                    _ => (At::Rest, 0),
                }
            }
            At::Rest => (At::Rest, 0),
        })
    }
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut have = 0;
        while have < buffer.len() {
            match self.inner.read(&mut buffer[have..]) {
                Ok(0) => break,
                Ok(n) => have += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.watch(&buffer[..have])?;
        Ok(have)
    }
}

/// The size of the dictionary that a block's header names, without its own size.
fn dictionary(header: &[u8]) -> Option<u64> {
    let (flags, mut rest) = header.split_first()?;
    for sized in [0x40, 0x80] {
        if flags & sized != 0 {
            number(&mut rest)?;
        }
    }
    let last = flags & 3;
    for filter in 0..=last {
        let (id, size) = (number(&mut rest)?, number(&mut rest)?);
        let properties = rest.get(..usize::try_from(size).ok()?)?;
        rest = &rest[properties.len()..];
        // Each would have a window of its own; only the last one may be, as xz has it.
        if id == LZMA2 && filter != last {
            return None;
        }
        if id == LZMA2 {
            let bits = u32::from(*properties.first()?);
            return match bits {
                0..=39 => Some(u64::from(2 | (bits & 1)) << (bits / 2 + 11)),
                40 => Some(u64::from(u32::MAX)),
                _ => None,
            };
        }
    }
    None
}

/// A number of seven bits a byte, the lowest first.
fn number(rest: &mut &[u8]) -> Option<u64> {
    let mut sum = 0;
    for shift in 0..9 {
        let (byte, more) = rest.split_first()?;
        *rest = more;
        sum |= u64::from(byte & 0x7f) << (7 * shift);
        if byte & 0x80 == 0 {
            return Some(sum);
        }
    }
    None
}
