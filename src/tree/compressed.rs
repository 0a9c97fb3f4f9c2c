//! Compressed streams, told by their first bytes: gzip, xz, zstd, each with any number of
//! parts one after the other, as their programs take them.
//!
//! Invariants: sums are compared; what follows a part is another one, zeros (or zstd's
//! frames to be skipped), or an error; no part makes this keep more than [`MAX_WINDOW`]
//! bytes of what was decompressed.
//!
//! Sources: RFC 1952; The .xz File Format 1.2.1; RFC 8878.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use super::reader::is_header;
use super::xz_window::Watched;

/// Most bytes that a decompressor looks back: twice as many as `xz -9`, as many as
/// `zstd --long` and `--ultra -22`.
pub const MAX_WINDOW: u64 = 128 << 20;
/// Bytes that are read at once.
const CHUNK: usize = 64 * 1024;
/// Bytes by which a format is known: a tar's first block.
const MAGIC: usize = 512;
/// The longest header of a zstd frame, with its magic number.
const ZSTD_HEADER: usize = 18;

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// It is not.
    Plain,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
}

impl Format {
    /// Those that are read, for messages.
    pub const KNOWN: &'static str = "gzip, xz or zstd";

    /// By the first bytes.
    ///
    /// # Errors
    /// A sentence on a format that is known by name alone.
    fn of(first: &[u8]) -> Result<Format, String> {
        let other = |name: &str, with: &str| {
            Err(format!(
                "it is compressed with {name}, which is not read here: {with} and give the \
                 result, or use {}",
                Format::KNOWN
            ))
        };
        match first {
            // Its first name may begin as anything.
            _ if is_header(first) => Ok(Format::Plain),
            [0x1f, 0x8b, ..] => Ok(Format::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Ok(Format::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Format::Zstd),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => other("bzip2", "decompress it with bunzip2"),
            [b'L', b'Z', b'I', b'P', ..] => other("lzip", "decompress it with lzip -d"),
            [0x04, 0x22, 0x4d, 0x18, ..] => other("lz4", "decompress it with lz4 -d"),
            [0x5d, 0, 0, ..] => other("lzma", "decompress it with unlzma"),
            [0x1f, 0x9d, ..] => other("compress", "decompress it with uncompress"),
            [0x89, b'L', b'Z', b'O', ..] => other("lzop", "decompress it with lzop -d"),
            [b'P', b'K', 3, 4, ..] => Err("it is a ZIP archive, and no tar".into()),
            [b'Q', b'F', b'I', 0xfb, ..] => {
                Err("it is an image of a disk (qcow2), and no tar: use --image".into())
            }
            _ => Ok(Format::Plain),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Plain => "plain bytes",
            Format::Gzip => "gzip",
            Format::Xz => "xz",
            Format::Zstd => "zstd",
        })
    }
}

/// What is read, with the first bytes that were looked at.
type Source<'a> = BufReader<io::Chain<io::Cursor<Vec<u8>>, Box<dyn Read + 'a>>>;

/// A part that is being decompressed.
enum Part<'a> {
    Plain(Source<'a>),
    Gzip(GzDecoder<Source<'a>>),
    Xz(Box<XzReader<Watched<Source<'a>>>>),
    Zstd(Box<StreamingDecoder<Source<'a>, FrameDecoder>>),
    /// All of them were.
    End,
}

/// What is in a stream, decompressed if it is compressed.
///
/// # Errors
/// As [`Decompressed::new`].
pub fn plain<'a>(stream: impl Read + 'a) -> io::Result<Decompressed<'a>> {
    Decompressed::new(Box::new(stream))
}

/// A stream without its compression.
pub struct Decompressed<'a> {
    format: Format,
    part: Part<'a>,
    /// Bytes that came out.
    seen: u64,
    /// What was wrong: a decompressor that has met an error may do anything afterwards.
    broken: Option<(io::ErrorKind, String)>,
}

impl<'a> Decompressed<'a> {
    /// Looks at the first bytes.
    ///
    /// # Errors
    /// As the stream's; for a format that is not read.
    pub fn new(mut stream: Box<dyn Read + 'a>) -> io::Result<Decompressed<'a>> {
        let mut first = Vec::new();
        (&mut stream).take(MAGIC as u64).read_to_end(&mut first)?;
        let format = Format::of(&first).map_err(io::Error::other)?;
        let source = BufReader::with_capacity(CHUNK, io::Cursor::new(first).chain(stream));
        let mut this = Decompressed { format, part: Part::End, seen: 0, broken: None };
        this.begin(source).map_err(|e| this.damaged(e))?;
        Ok(this)
    }

    /// How it was compressed.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Begins the next part, if there is one.
    fn begin(&mut self, mut source: Source<'a>) -> io::Result<()> {
        self.part = match self.format {
            Format::Plain => Part::Plain(source),
            Format::Gzip => match more(&mut source, &[0x1f, 0x8b])? {
                true => Part::Gzip(GzDecoder::new(source)),
                false => Part::End,
            },
            Format::Xz => match more(&mut source, &[0xfd, b'7'])? {
                true => Part::Xz(Box::new(XzReader::new(Watched::new(source), false))),
                false => Part::End,
            },
            Format::Zstd => match frame(source)? {
                Some(decoder) => Part::Zstd(Box::new(decoder)),
                None => Part::End,
            },
        };
        Ok(())
    }

    /// Reads of this part; nothing at its end.
    fn read_part(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.part {
            Part::Plain(source) => source.read(buffer),
            Part::Gzip(decoder) => decoder.read(buffer),
            Part::Xz(decoder) => decoder.read(buffer),
            Part::Zstd(decoder) => decoder.read(buffer),
            Part::End => Ok(0),
        }
    }

    /// Ends this part, and begins the next one.
    fn next_part(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.part, Part::End) {
            Part::Plain(_) | Part::End => Ok(()),
            Part::Gzip(decoder) => self.begin(decoder.into_inner()),
            Part::Xz(decoder) => self.begin(decoder.into_inner().into_inner()),
            Part::Zstd(decoder) => {
                let (source, decoder) = decoder.into_parts();
                let told = decoder.get_checksum_from_data();
                if told.is_some() && told != decoder.get_calculated_checksum() {
                    return Err(io::Error::other("a checksum is wrong"));
                }
                self.begin(source)
            }
        }
    }

    fn damaged(&mut self, source: io::Error) -> io::Error {
        if self.format == Format::Plain {
            return source;
        }
        // Of zstd's errors, none tells.
        let ended = match &mut self.part {
            Part::Zstd(decoder) => decoder.get_mut().fill_buf().is_ok_and(<[u8]>::is_empty),
            _ => false,
        };
        let text = match source.kind() {
            io::ErrorKind::UnexpectedEof => "it is cut off".to_string(),
            _ if ended => format!("it is cut off ({source})"),
            _ => source.to_string(),
        };
        let text = format!(
            "its {} does not decompress, after {} bytes of what is in it: {text}",
            self.format, self.seen
        );
        io::Error::new(source.kind(), text)
    }
}

impl Read for Decompressed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if let Some((kind, text)) = &self.broken {
            return Err(io::Error::new(*kind, text.clone()));
        }
        let read = loop {
            match self.read_part(buffer) {
                Ok(0) if !matches!(self.part, Part::End) => {
                    if let Err(e) = self.next_part() {
                        break Err(e);
                    }
                }
                other => break other,
            }
        };
        match read {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Err(e),
            Err(e) => {
                let e = self.damaged(e);
                self.broken = Some((e.kind(), e.to_string()));
                Err(e)
            }
            Ok(n) => {
                self.seen += n as u64;
                Ok(n)
            }
        }
    }
}

/// Whether another part follows; zeros before it, or at the end, are what fills a medium's
/// last block.
fn more(source: &mut Source<'_>, magic: &[u8]) -> io::Result<bool> {
    match skip_zeros(source)? {
        None => Ok(false),
        Some(first) if first == magic[0] => Ok(true),
        Some(_) => Err(io::Error::other("something else follows its end")),
    }
}

/// The first byte that is none, if there is one; it is not taken.
fn skip_zeros(source: &mut Source<'_>) -> io::Result<Option<u8>> {
    loop {
        let bytes = match source.fill_buf() {
            // Once a part has ended, nobody could begin here again.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if bytes.is_empty() {
            return Ok(None);
        }
        let zeros = bytes.iter().take_while(|b| **b == 0).count();
        if let Some(first) = bytes.get(zeros) {
            let first = *first;
            source.consume(zeros);
            return Ok(Some(first));
        }
        source.consume(zeros);
    }
}

/// The next frame of zstd's that is none to be skipped.
fn frame(mut source: Source<'_>) -> io::Result<Option<StreamingDecoder<Source<'_>, FrameDecoder>>> {
    while skip_zeros(&mut source)?.is_some() {
        let mut header = Vec::new();
        (&mut source).take(4).read_to_end(&mut header)?;
        let magic = match header[..] {
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        };
        match magic {
            0xfd2f_b528 => {
                (&mut source).take(ZSTD_HEADER as u64 - 4).read_to_end(&mut header)?;
                let window = zstd_window(&header).ok_or(io::ErrorKind::UnexpectedEof)?;
                if window > MAX_WINDOW {
                    return Err(too_large(window));
                }
                // What was looked at comes again.
                let source = put_back(source, header);
                let decoder = StreamingDecoder::new(source).map_err(io::Error::other)?;
                return Ok(Some(decoder));
            }
            0x184d_2a50..=0x184d_2a5f => {
                let mut size = [0; 4];
                source.read_exact(&mut size)?;
                let size = u64::from(u32::from_le_bytes(size));
                if io::copy(&mut (&mut source).take(size), &mut io::sink())? < size {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            _ => return Err(io::Error::other("something else follows its end")),
        }
    }
    Ok(None)
}

/// A source with bytes before what it still has.
fn put_back(source: Source<'_>, bytes: Vec<u8>) -> Source<'_> {
    let mut all = bytes;
    all.extend_from_slice(source.buffer());
    let (cursor, stream) = source.into_inner().into_inner();
    // What the source has not read itself yet: at its beginning, if at all.
    let at = usize::try_from(cursor.position()).unwrap_or(usize::MAX);
    all.extend_from_slice(cursor.get_ref().get(at..).unwrap_or_default());
    BufReader::with_capacity(CHUNK, io::Cursor::new(all).chain(stream))
}

/// How many bytes a frame looks back (RFC 8878, 3.1.1.1); `None` when it is cut off.
fn zstd_window(header: &[u8]) -> Option<u64> {
    let descriptor = *header.get(4)?;
    let (sizes, single, dictionary) = (descriptor >> 6, descriptor & 0x20 != 0, descriptor & 3);
    if !single {
        let window = *header.get(5)?;
        let base = 1u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // The whole of it, whose size follows the dictionary's number.
    let at = 5 + [0, 1, 2, 4][usize::from(dictionary)];
    let bytes = header.get(at..at + [1, 2, 4, 8][usize::from(sizes)])?;
    let size = bytes.iter().rev().fold(0, |sum, b| sum << 8 | u64::from(*b));
    Some(if sizes == 1 { size + 256 } else { size })
}

/// That it looks back too far.
pub fn too_large(window: u64) -> io::Error {
    io::Error::other(format!(
        "it has to be decompressed with {window} bytes of memory, of at most {MAX_WINDOW} \
         here: compress it with a smaller dictionary or window, or give the tar as it is"
    ))
}

#[cfg(test)]
mod tests;
