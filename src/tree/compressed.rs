//! Archives as people have them: plain, or compressed by gzip, xz or zstd, which their first
//! bytes tell.
//!
//! Invariants: a stream is read to its end, with all of its members, streams or frames, and
//! what is damaged, or follows and is none, is an error; memory is bounded by
//! `MAX_WINDOW`.
//!
//! Sources: RFC 1952 (gzip); the .xz file format, 1.1; RFC 8878 (zstd).

use std::io::{self, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

/// Most bytes of what was written before that a decompressor keeps: what the one for zstd
/// takes at most; `xz -9` has 64 MiB. Of xz the first block is looked at.
const MAX_WINDOW: u64 = 100 << 20;
/// Bytes that tell a form, with its first block's or frame's header.
const HEAD: usize = 64;

/// Forms that are not read, by their first bytes: name and what undoes them.
const OTHERS: [(&[u8], &str, &str); 5] = [
    (b"BZh", "bzip2", "bunzip2"),
    (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
    (b"LZIP", "lzip", "lzip -d"),
    (b"\x1f\x9d", "compress", "uncompress"),
    (b"\x5d\0\0", "lzma", "unlzma"),
];
const GZIP: &[u8] = b"\x1f\x8b";
const XZ: &[u8] = b"\xfd7zXZ\0";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
/// Bytes 2 to 4 of a frame that is to be skipped; the first one is 0x50 to 0x5f.
const SKIPPABLE: &[u8] = b"\x2a\x4d\x18";

/// A stream of which bytes can be given back.
struct Input<'a> {
    back: Vec<u8>,
    stream: BufReader<Box<dyn Read + 'a>>,
}

impl Input<'_> {
    /// The next bytes, which stay; fewer than `n` at the end.
    fn peek(&mut self, n: usize) -> io::Result<&[u8]> {
        while self.back.len() < n {
            let mut more = [0; HEAD];
            let most = (n - self.back.len()).min(HEAD);
            match self.stream.read(&mut more[..most]) {
                Ok(0) => break,
                Ok(got) => self.back.extend_from_slice(&more[..got]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(&self.back[..self.back.len().min(n)])
    }
}

impl Read for Input<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.back.is_empty() {
            return self.stream.read(buffer);
        }
        let n = buffer.len().min(self.back.len());
        buffer[..n].copy_from_slice(&self.back[..n]);
        self.back.drain(..n);
        Ok(n)
    }
}

fn bad(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// What is in an archive, decompressed.
///
/// # Errors
/// The stream's; a form that is not read, and one that wants too much memory.
pub fn plain<'a>(stream: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut input = Input { back: Vec::new(), stream: BufReader::new(Box::new(stream)) };
    let head = input.peek(HEAD)?.to_vec();
    if let Some((_, name, undo)) = OTHERS.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return Err(bad(format!(
            "compressed by {name}, which is not read here: gzip, xz and zstd are; `{undo}` it first"
        )));
    }
    if head.starts_with(GZIP) {
        return Ok(Box::new(MultiGzDecoder::new(BufReader::new(input))));
    }
    if head.starts_with(XZ) {
        bounded("xz", xz_window(&head))?;
        return Ok(Box::new(XzReader::new(input, true)));
    }
    if zstd_frame(&head) {
        return Ok(Box::new(Zstd::Between(input)));
    }
    Ok(Box::new(input))
}

fn bounded(name: &str, window: Option<u64>) -> io::Result<()> {
    match window {
        Some(n) if n <= MAX_WINDOW => Ok(()),
        Some(n) => Err(bad(format!(
            "{name}: it wants {n} bytes of memory, of at most {MAX_WINDOW}: decompress it first"
        ))),
        None => Err(bad(format!("{name}: its header is damaged"))),
    }
}

/// The dictionary of the first block: after the stream's header of 12 bytes, the block's
/// size and flags, sizes that may be there, and its filters, of which LZMA2's is the last.
fn xz_window(head: &[u8]) -> Option<u64> {
    let block = head.get(12..)?;
    if *block.first()? == 0 {
        // An index: a stream without a block.
        return Some(0);
    }
    let size = (usize::from(*block.first()?) + 1) * 4;
    let flags = *block.get(1)?;
    let mut at = 2;
    for _ in 0..(flags >> 6 & 1) + (flags >> 7) {
        while *block.get(at)? & 0x80 != 0 {
            at += 1;
        }
        at += 1;
    }
    // The last filter: its number 0x21, one byte of properties, the dictionary.
    let rest = block.get(at..size.min(block.len()))?;
    let found = rest.windows(3).find(|w| w[0] == 0x21 && w[1] == 1)?;
    match u32::from(found[2]) {
        40 => Some(u64::from(u32::MAX)),
        d if d < 40 => Some(u64::from(2 | d & 1) << (d / 2 + 11)),
        _ => None,
    }
}

fn zstd_frame(head: &[u8]) -> bool {
    let skippable =
        head.first().is_some_and(|b| b & 0xf0 == 0x50) && head[1..].starts_with(SKIPPABLE);
    head.starts_with(ZSTD) || skippable
}

/// What a frame keeps of what was written before.
fn zstd_window(head: &[u8]) -> Option<u64> {
    let descriptor = *head.get(4)?;
    let single = descriptor & 0x20 != 0;
    if !single {
        let window = *head.get(5)?;
        let base = 1u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // The whole content: its size follows, and a dictionary's number before it.
    let at = 5 + [0, 1, 2, 4][usize::from(descriptor & 3)];
    let bytes = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    let field = head.get(at..at + bytes)?;
    let n = field.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
    Some(if bytes == 2 { n + 256 } else { n })
}

/// Frames, one after the other.
enum Zstd<'a> {
    Between(Input<'a>),
    Frame(Box<StreamingDecoder<Input<'a>, FrameDecoder>>),
    Ended,
}

impl<'a> Zstd<'a> {
    /// Takes a frame up; the end is no error where a frame may begin.
    fn begin(mut input: Input<'a>) -> io::Result<Zstd<'a>> {
        loop {
            let head = input.peek(HEAD)?.to_vec();
            if head.is_empty() {
                return Ok(Zstd::Ended);
            }
            if !zstd_frame(&head) {
                return Err(bad("zstd: something else follows the last frame"));
            }
            if head.starts_with(ZSTD) {
                bounded("zstd", zstd_window(&head))?;
                let decoder =
                    StreamingDecoder::new(input).map_err(|e| bad(format!("zstd: {e}")))?;
                return Ok(Zstd::Frame(Box::new(decoder)));
            }
            let size = head.get(4..8).and_then(|b| <[u8; 4]>::try_from(b).ok());
            let size = u64::from(u32::from_le_bytes(size.ok_or_else(|| bad("zstd: cut off"))?));
            let skipped = io::copy(&mut (&mut input).take(8 + size), &mut io::sink())?;
            if skipped < 8 + size {
                return Err(bad("zstd: cut off"));
            }
        }
    }
}

impl Read for Zstd<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            *self = match std::mem::replace(self, Zstd::Ended) {
                Zstd::Ended => return Ok(0),
                Zstd::Between(input) => Zstd::begin(input)?,
                Zstd::Frame(mut frame) => {
                    let n = frame.read(buffer)?;
                    if n > 0 || buffer.is_empty() {
                        *self = Zstd::Frame(frame);
                        return Ok(n);
                    }
                    let (input, decoder) = frame.into_parts();
                    if decoder.get_checksum_from_data().is_some()
                        && decoder.get_checksum_from_data() != decoder.get_calculated_checksum()
                    {
                        return Err(bad("zstd: its checksum is wrong"));
                    }
                    Zstd::Between(input)
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        plain(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn what_is_not_compressed_is_as_it_is() {
        assert_eq!(read(b"").unwrap(), b"");
        assert_eq!(read(b"x").unwrap(), b"x");
        assert_eq!(read(&[7; 1000]).unwrap(), [7; 1000]);
    }

    #[test]
    fn other_forms_are_named_with_what_undoes_them() {
        let e = read(b"BZh91AY").unwrap_err().to_string();
        assert!(e.contains("bzip2") && e.contains("`bunzip2` it first"), "{e}");
    }

    #[test]
    fn memory_is_bounded_before_it_is_taken() {
        // A window of 2^41 bytes, a dictionary of 4 GiB.
        let e = read(b"\x28\xb5\x2f\xfd\0\xf8aaaaaaaa").unwrap_err().to_string();
        assert!(e.contains("bytes of memory"), "{e}");
        let e = read(b"\xfd7zXZ\0\0\x04\xe6\xd6\xb4\x46\x02\0\x21\x01\x28aaaaaaaaa").unwrap_err();
        assert!(e.to_string().contains("4294967295 bytes of memory"), "{e}");
        assert!(read(b"\x28\xb5\x2f\xfd").is_err());
        assert!(read(XZ).is_err() && read(GZIP).is_err());
    }
}
