//! Tar's formats: v7, ustar, GNU's, PAX, read from a guest, or from a host by its guest.
//!
//! Invariants: of a guest, what two readers may take for different things is an error (data of what
//! is no file, two long names, a global header that names something); an entry's headers
//! are at most [`MAX_NAMES`] bytes, all of them at most [`MAX_HEADERS`], and nothing else
//! is kept.
//!
//! Does not: decide what is written; that is `extract`.
//!
//! Source: POSIX.1-2017, pax; GNU tar's manual, "Basic Tar Format".

use std::io::{self, Read};
use std::path::PathBuf;

use super::pax::{record, Records};
use super::sparse::{self, in_pax, InPax, Listed, Piece, BLOCK, MAX_PIECES};
use super::{Error, Why, MAX_NAMES};

/// Most bytes of all headers of a stream: four KiB for each of a million entries.
const MAX_HEADERS: u64 = 4 << 30;
/// Most bytes behind the end mark that are read and dropped: writers fill a record.
const MAX_TRAILER: u64 = 1024 * 1024;
/// Bytes of a block.
const SIZE: usize = BLOCK as usize;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Another name of a file.
    Link,
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A FIFO.
    Fifo,
}

/// An entry, whose data comes next.
#[derive(Debug)]
pub struct Entry {
    /// Its name, with all directories.
    pub name: Vec<u8>,
    /// What a link says.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Its permissions, with set-id and sticky bits.
    pub mode: u32,
    /// User and group.
    pub owner: (u64, u64),
    /// When it was changed: seconds since 1970, and billionths.
    pub changed: (i64, u32),
    /// A device's numbers.
    pub device: (u64, u64),
    /// The records, with extended attributes.
    pub records: Records,
    /// The size of the file, holes included.
    pub size: u64,
    /// Its data.
    pub pieces: Vec<Piece>,
}

/// Reads entries one after the other.
pub struct Reader<'a> {
    stream: &'a mut dyn Read,
    /// Data of the entry that was not read, and what fills its last block.
    left: u64,
    fill: u64,
    /// Bytes of headers so far; of them, those of this entry.
    headers: (u64, u64),
    ended: bool,
    /// Whether what is odd, and has one meaning for GNU tar, is read as that.
    trusting: bool,
    /// What the last global header says of all entries behind it; of a guest, nothing.
    global: Vec<u8>,
}

/// What comes before an entry and is about it.
#[derive(Default)]
struct Before {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Option<Records>,
}

impl Before {
    fn is_empty(&self) -> bool {
        self.name.is_none() && self.link.is_none() && self.records.is_none()
    }
}

fn broken(source: io::Error) -> Error {
    Error::Stream { source }
}

fn cut() -> Error {
    broken(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends in the middle of an entry"))
}

/// A tar that is not understood, where `name` is.
fn malformed(name: &[u8], why: impl Into<String>) -> Error {
    Error::Refused { name: path(name), why: Why::Malformed(why.into()) }
}

/// A name for messages.
pub fn path(name: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    // A name of a megabyte says no more than its beginning.
    PathBuf::from(std::ffi::OsStr::from_bytes(&name[..name.len().min(1024)]))
}

impl<'a> Reader<'a> {
    /// Of this stream.
    pub fn new(stream: &'a mut dyn Read) -> Reader<'a> {
        Reader {
            stream,
            left: 0,
            fill: 0,
            headers: (0, 0),
            ended: false,
            trusting: false,
            global: Vec::new(),
        }
    }

    /// Of this stream, whose writer is trusted: data of what is no file is dropped, a volume's
    /// name, too; a kind of entry that is not known is a file, as POSIX says; anything may
    /// follow the end.
    pub fn trusting(stream: &'a mut dyn Read) -> Reader<'a> {
        Reader { trusting: true, ..Reader::new(stream) }
    }

    /// The next entry, `None` at the end.
    ///
    /// # Errors
    /// [`Error::Stream`], [`Why::Malformed`].
    pub fn next(&mut self) -> Result<Option<Entry>, Error> {
        self.skip()?;
        self.headers.1 = 0;
        let mut before = Before::default();
        while !self.ended {
            let Some(block) = self.block()? else {
                // No end mark: the exit code of whoever wrote it tells whether it is whole.
                self.ended = true;
                break;
            };
            if block.iter().all(|b| *b == 0) {
                self.ended = true;
                self.trailer()?;
                break;
            }
            let header = Header { block: &block };
            header.check()?;
            let twice = |there: bool| match there {
                true => Err(malformed(header.name(), "two headers for one entry")),
                false => Ok(()),
            };
            match block[156] {
                b'L' => {
                    twice(before.name.is_some())?;
                    before.name = Some(without_end(self.text(header.size()?)?));
                }
                b'K' => {
                    twice(before.link.is_some())?;
                    before.link = Some(without_end(self.text(header.size()?)?));
                }
                // Solaris's name of the same.
                b'X' if !self.trusting => return self.entry(&block, before).map(Some),
                b'x' | b'X' => {
                    twice(before.records.is_some())?;
                    let records = Records::parse(self.text(header.size()?)?);
                    before.records = Some(records.map_err(|why| malformed(header.name(), why))?);
                }
                b'g' => self.global(header.size()?)?,
                // GNU's name of a volume.
                b'V' if self.trusting => {
                    let size = header.size()?;
                    (self.left, self.fill) = (size, fill_of(size));
                    self.skip()?;
                }
                _ => return self.entry(&block, before).map(Some),
            }
        }
        match before.is_empty() {
            true => Ok(None),
            false => Err(cut()),
        }
    }

    /// Reads data of the entry; nothing at its end.
    ///
    /// # Errors
    /// [`Error::Stream`].
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if most == 0 {
            return Ok(0);
        }
        let n = self.fill_from(&mut buffer[..most])?;
        if n == 0 {
            return Err(cut());
        }
        self.left -= n as u64;
        Ok(n)
    }

    fn fill_from(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        loop {
            match self.stream.read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map_err(broken),
            }
        }
    }

    /// Drops what is left of the entry's data.
    fn skip(&mut self) -> Result<(), Error> {
        let mut chunk = [0; 4096];
        self.left = self.left.saturating_add(std::mem::take(&mut self.fill));
        while self.left > 0 {
            self.read(&mut chunk)?;
        }
        Ok(())
    }

    /// What follows the end mark, so that a writer that is well meets no closed pipe.
    fn trailer(&mut self) -> Result<(), Error> {
        let mut chunk = [0; 4096];
        let mut seen = 0;
        loop {
            match self.fill_from(&mut chunk)? {
                0 => return Ok(()),
                n => seen += n as u64,
            }
            if seen > MAX_TRAILER && !self.trusting {
                let why = format!("over {MAX_TRAILER} bytes follow its end");
                return Err(malformed(b"", why));
            }
        }
    }

    /// Counts bytes of headers.
    fn count(&mut self, bytes: u64) -> Result<(), Error> {
        let add = |n: u64| n.saturating_add(bytes);
        self.headers = (add(self.headers.0), add(self.headers.1));
        if self.headers.1 > MAX_NAMES + 4 * BLOCK {
            return Err(malformed(b"", format!("names and attributes of over {MAX_NAMES} bytes")));
        }
        if self.headers.0 > MAX_HEADERS {
            return Err(malformed(b"", format!("headers of over {MAX_HEADERS} bytes")));
        }
        Ok(())
    }

    /// A block of a header; `None` at the stream's end.
    fn block(&mut self) -> Result<Option<[u8; SIZE]>, Error> {
        self.count(BLOCK)?;
        let (mut block, mut have) = ([0; SIZE], 0);
        while have < SIZE {
            match self.fill_from(&mut block[have..])? {
                0 if have == 0 => return Ok(None),
                0 => return Err(cut()),
                n => have += n,
            }
        }
        Ok(Some(block))
    }

    /// The text of a header.
    fn text(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        // Counted before it is read: a size is a guest's word.
        self.count(size)?;
        (self.left, self.fill) = (size, fill_of(size));
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match self.read(&mut chunk)? {
                0 => break,
                n => text.extend_from_slice(&chunk[..n]),
            }
        }
        self.skip()?;
        Ok(text)
    }

    /// A guest's global header may tell, but not change what follows: what it changes is
    /// read in more than one way. Of who is trusted it gives owners and times, until the next
    /// one, as to GNU tar; one name or size for all is nobody's wish.
    fn global(&mut self, size: u64) -> Result<(), Error> {
        let text = self.text(size)?;
        let records = Records::parse(text).map_err(|why| malformed(b"", why))?;
        let trusting = self.trusting;
        let changes = |key: &[u8]| {
            let of_each = matches!(key, b"path" | b"linkpath" | b"size");
            let of_all = matches!(key, b"uid" | b"gid" | b"mtime")
                || key.starts_with(b"SCHILY.")
                || key.starts_with(b"SUN.");
            of_each || key.starts_with(b"GNU.sparse.") || (of_all && !trusting)
        };
        if trusting {
            let of_all = ["uid", "gid", "mtime"].map(|key| Some((key, records.last(key)?)));
            let of_all = of_all.into_iter().flatten();
            self.global = of_all.flat_map(|(key, value)| record(key, value)).collect();
        }
        let found = records.all().find(|(key, _)| changes(key));
        match found {
            None => Ok(()),
            Some((key, _)) => {
                let key = String::from_utf8_lossy(key);
                Err(malformed(b"", format!("a global header that sets {key}")))
            }
        }
    }

    fn entry(&mut self, block: &[u8; SIZE], before: Before) -> Result<Entry, Error> {
        let header = Header { block };
        let mut records = before.records.unwrap_or_default();
        if !self.global.is_empty() {
            let all = [&self.global, records.text()].concat();
            records = Records::parse(all).map_err(|why| malformed(header.name(), why))?;
        }
        let in_records = |key: &str| records.last(key).map(<[u8]>::to_vec);
        let name = in_records("GNU.sparse.name").or_else(|| in_records("path"));
        let name = name.or(before.name).unwrap_or_else(|| header.whole_name());
        let link = in_records("linkpath").or(before.link);
        let link = link.unwrap_or_else(|| until_nul(&block[157..257]).to_vec());
        let bad = |why: String| malformed(&name, why);
        let stored = records.number("size").map_err(bad)?;
        let stored = stored.map_or_else(|| header.size(), Ok)?;
        let kind = match header.kind(&name, stored) {
            Err(_) if self.trusting => match block[156] {
                // GNU's list of what was in a directory.
                b'D' => Kind::Directory,
                // The rest of a file that began in another archive.
                b'M' => return Err(bad("a file that began on another volume".into())),
                _ => Kind::File,
            },
            kind => kind?,
        };
        if kind != Kind::File && stored > 0 && !self.trusting {
            return Err(bad(format!("{stored} bytes of data of what is no file")));
        }
        // As GNU tar reads it, these have no data, whatever size they say.
        let stored = match self.trusting && kind != Kind::File && block[156] != b'D' {
            true => 0,
            false => stored,
        };
        // What is added to it later fits, whatever it is.
        if stored > i64::MAX as u64 {
            return Err(bad(format!("a file of {stored} bytes")));
        }
        (self.left, self.fill) = (stored, fill_of(stored));
        let (size, pieces) = match (block[156], in_pax(&records).map_err(bad)?) {
            (b'S', InPax::None) => self.old_sparse(&header, &name)?,
            (b'S', _) => return Err(bad("holes in two forms at once".into())),
            (_, InPax::None) => (stored, vec![Piece { offset: 0, length: stored }]),
            (_, InPax::Pieces(size, pieces)) => (size, pieces),
            (_, InPax::Before(size)) => (size, self.listed(&name)?),
        };
        if kind == Kind::File {
            sparse::check(&pieces, self.left, size).map_err(bad)?;
        }
        let field = |key: &str, field: &[u8]| {
            number(field).ok_or_else(|| bad(format!("its {key} is no number")))
        };
        let owner = |key: &str, bytes: &[u8]| match records.number(key).map_err(bad)? {
            Some(n) => Ok(n),
            None => field(key, bytes),
        };
        let changed = match records.time("mtime").map_err(bad)? {
            Some(time) => time,
            None => (signed(&block[136..148]).ok_or_else(|| bad("its time is none".into()))?, 0),
        };
        let mode = field("mode", &block[100..108])?;
        Ok(Entry {
            kind,
            mode: (mode & 0o7777) as u32,
            owner: (owner("uid", &block[108..116])?, owner("gid", &block[116..124])?),
            changed,
            device: match kind {
                Kind::Character | Kind::Block => {
                    (field("major", &block[329..337])?, field("minor", &block[337..345])?)
                }
                _ => (0, 0),
            },
            size,
            pieces,
            name,
            link,
            records,
        })
    }

    /// GNU's old format: pieces in the header and in blocks behind it.
    fn old_sparse(&mut self, header: &Header<'_>, name: &[u8]) -> Result<(u64, Vec<Piece>), Error> {
        let bad = || malformed(name, "a list of holes with a number that is none");
        let mut pieces = Vec::new();
        let mut add = |slots: &[u8]| -> Result<(), Error> {
            for slot in slots.chunks_exact(24).filter(|slot| slot[0] != 0) {
                let offset = number(&slot[..12]).ok_or_else(bad)?;
                let length = number(&slot[12..]).ok_or_else(bad)?;
                pieces.push(Piece { offset, length });
            }
            Ok(())
        };
        add(&header.block[386..482])?;
        let size = number(&header.block[483..495]).ok_or_else(bad)?;
        let mut more = header.block[482] != 0;
        while more {
            let block = self.block()?.ok_or_else(cut)?;
            add(&block[..504])?;
            more = block[504] != 0;
        }
        match pieces.len() <= MAX_PIECES {
            true => Ok((size, pieces)),
            false => Err(malformed(name, format!("over {MAX_PIECES} pieces of data"))),
        }
    }

    /// PAX 1.0: the list is the beginning of the data.
    fn listed(&mut self, name: &[u8]) -> Result<Vec<Piece>, Error> {
        let mut list = Listed::default();
        loop {
            if self.left < BLOCK {
                return Err(malformed(name, "a list of holes that does not end"));
            }
            let block = self.block()?.ok_or_else(cut)?;
            self.left -= BLOCK;
            if let Some(pieces) = list.push(&block).map_err(|why| malformed(name, why))? {
                return Ok(pieces);
            }
        }
    }
}

/// Whether a block is an entry's, by its sum.
#[cfg(feature = "host")]
pub fn is_header(block: &[u8]) -> bool {
    let block: Option<&[u8; SIZE]> = block.get(..SIZE).and_then(|b| b.try_into().ok());
    block.is_some_and(|block| block[0] != 0 && Header { block }.check().is_ok())
}

/// The header's own fields.
struct Header<'a> {
    block: &'a [u8; SIZE],
}

impl Header<'_> {
    fn name(&self) -> &[u8] {
        until_nul(&self.block[..100])
    }

    /// With ustar's prefix; GNU has other things there.
    fn whole_name(&self) -> Vec<u8> {
        let prefix = match &self.block[257..263] {
            b"ustar\0" => until_nul(&self.block[345..500]),
            _ => b"",
        };
        match prefix.is_empty() {
            true => self.name().to_vec(),
            false => [prefix, b"/", self.name()].concat(),
        }
    }

    /// Whether its sum is right, as bytes or as the signed ones of old writers.
    fn check(&self) -> Result<(), Error> {
        let bytes = self.block[..148].iter().chain(&[b' '; 8]).chain(&self.block[156..]);
        let sum: u64 = bytes.clone().map(|b| u64::from(*b)).sum();
        let signed: i64 = bytes.map(|b| i64::from(*b as i8)).sum();
        let told = number(&self.block[148..156]);
        match told.is_some_and(|n| n == sum || i64::try_from(n) == Ok(signed)) {
            true => Ok(()),
            false => Err(malformed(self.name(), "a header whose sum is wrong")),
        }
    }

    fn size(&self) -> Result<u64, Error> {
        number(&self.block[124..136]).ok_or_else(|| malformed(self.name(), "its size is no number"))
    }

    fn kind(&self, name: &[u8], stored: u64) -> Result<Kind, Error> {
        Ok(match self.block[156] {
            // Before there were types, a directory was a name that ends so.
            b'0' | 0 if name.ends_with(b"/") && stored == 0 => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'S' if &self.block[257..265] == b"ustar  \0" => Kind::File,
            b'1' => Kind::Link,
            b'2' => Kind::Symlink,
            b'3' => Kind::Character,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                let why = format!("an entry of kind {:?}", char::from(other));
                return Err(malformed(name, why));
            }
        })
    }
}

fn fill_of(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

/// Without the NULs that end GNU's long names.
fn without_end(mut text: Vec<u8>) -> Vec<u8> {
    while text.last() == Some(&0) {
        text.pop();
    }
    text
}

/// Octal, or GNU's base-256 when the first bit is set. Nothing is zero.
fn number(field: &[u8]) -> Option<u64> {
    match field.first()? {
        0x80 => base_256(&field[1..]),
        0x81.. => None,
        _ => {
            let text = until_nul(field).trim_ascii();
            text.iter().try_fold(0u64, |sum, b| {
                let digit = b.checked_sub(b'0').filter(|d| *d < 8)?;
                sum.checked_mul(8)?.checked_add(digit.into())
            })
        }
    }
}

fn base_256(bytes: &[u8]) -> Option<u64> {
    bytes.iter().try_fold(0u64, |sum, b| sum.checked_mul(256)?.checked_add((*b).into()))
}

/// The same, perhaps below zero.
fn signed(field: &[u8]) -> Option<i64> {
    match field.first()? {
        0xff => {
            // Two's complement.
            let inverted: Vec<u8> = field[1..].iter().map(|b| !b).collect();
            let n = i64::try_from(base_256(&inverted)?).ok()?;
            Some(-n - 1)
        }
        _ => i64::try_from(number(field)?).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_of_base_256() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b" 644 \0\0"), Some(0o644));
        assert_eq!(number(b"\0\0\0"), Some(0));
        assert_eq!(number(b"77777777777\0"), Some((1 << 33) - 1));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x02\0\0\0\0"), Some(1 << 33));
        assert_eq!(number(b"\x80\x01\0\0\0\0\0\0\0\0\0\0"), None);
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff"), None);
        assert_eq!(number(b"0000648\0"), None);
        assert_eq!(number(b"-1\0"), None);
        assert_eq!(signed(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(signed(b"0000010\0"), Some(8));
        assert_eq!((fill_of(0), fill_of(1), fill_of(512), fill_of(513)), (0, 511, 0, 511));
    }
}
