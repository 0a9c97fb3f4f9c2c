//! Holes of a file, written into a tar stream in GNU's old format: what every tar reads,
//! [`unpack`](super::unpack) included.
//!
//! Invariant: a file with more pieces than [`MAX_PIECES`] is no file with holes: it is
//! written whole.
//!
//! Source: GNU tar's manual, "Storing Sparse Files".

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::{lseek64, Whence};
use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

/// Most pieces of data between holes.
const MAX_PIECES: usize = 4096;
/// Bytes of a tar's block.
const BLOCK: u64 = 512;

/// The pieces of data (offset, length) of a file with holes; `None` when it has none, or
/// its file system does not tell.
pub fn pieces(file: &File, size: u64) -> Option<Vec<(u64, u64)>> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size {
        let from = i64::try_from(at).ok()?;
        let start = match lseek64(file, from, Whence::SeekData) {
            Ok(start) => u64::try_from(start).ok()?,
            // Nothing but a hole is left.
            Err(Errno::ENXIO) => break,
            Err(_) => return None,
        };
        let end = lseek64(file, i64::try_from(start).ok()?, Whence::SeekHole).ok()?;
        let end = u64::try_from(end).ok()?.min(size);
        // Pieces begin and end with blocks, but for the end of the file.
        let start = start / BLOCK * BLOCK;
        let end = end.checked_next_multiple_of(BLOCK)?.min(size);
        if start >= end {
            break;
        }
        match out.last_mut() {
            Some((from, length)) if *from + *length >= start => *length = end - *from,
            _ => out.push((start, end - start)),
        }
        if out.len() > MAX_PIECES {
            return None;
        }
        at = end;
    }
    let whole = out == [(0, size)] || size == 0;
    (!whole).then_some(out)
}

/// Writes the headers of a file with holes; the bytes of its pieces follow, one piece
/// after the other, filled up to a whole block.
///
/// # Errors
/// As the stream's.
pub fn write_header(
    out: &mut dyn Write,
    mut header: Header,
    name: &Path,
    size: u64,
    pieces: &[(u64, u64)],
) -> io::Result<()> {
    let bytes = name.as_os_str().as_bytes();
    let short = header.as_old().name.len();
    if bytes.len() > short {
        write_long_name(out, bytes)?;
    }
    let kept = &bytes[..bytes.len().min(short)];
    header.as_old_mut().name = [0; 100];
    header.as_old_mut().name[..kept.len()].copy_from_slice(kept);
    header.set_entry_type(EntryType::GNUSparse);
    header.set_size(pieces.iter().map(|(_, length)| length).sum());

    // The end of the file, as a piece of no length: else a hole there would be lost.
    let mut all: Vec<(u64, u64)> = pieces.to_vec();
    if all.last().is_none_or(|(offset, length)| offset + length < size) {
        all.push((size, 0));
    }
    let gnu = header.as_gnu_mut().ok_or_else(|| io::Error::other("no GNU header"))?;
    let first = gnu.sparse.len();
    let (here, rest) = all.split_at(all.len().min(first));
    fill(&mut gnu.sparse, here);
    number(&mut gnu.realsize, size);
    gnu.isextended[0] = u8::from(!rest.is_empty());
    header.set_cksum();
    out.write_all(header.as_bytes())?;
    let mut left = rest;
    while !left.is_empty() {
        let mut more = GnuExtSparseHeader::new();
        let (here, rest) = left.split_at(left.len().min(more.sparse.len()));
        fill(&mut more.sparse, here);
        more.isextended[0] = u8::from(!rest.is_empty());
        out.write_all(more.as_bytes())?;
        left = rest;
    }
    Ok(())
}

fn fill(slots: &mut [GnuSparseHeader], pieces: &[(u64, u64)]) {
    for (slot, (offset, length)) in slots.iter_mut().zip(pieces) {
        number(&mut slot.offset, *offset);
        number(&mut slot.numbytes, *length);
    }
}

/// Octal where it fits, else GNU's base-256.
fn number(field: &mut [u8; 12], n: u64) {
    let octal = format!("{n:011o}\0");
    match <[u8; 12]>::try_from(octal.as_bytes()) {
        Ok(text) => *field = text,
        Err(_) => {
            *field = [0; 12];
            field[0] = 0x80;
            field[4..].copy_from_slice(&n.to_be_bytes());
        }
    }
}

/// GNU's entry before one whose name does not fit a header.
fn write_long_name(out: &mut dyn Write, name: &[u8]) -> io::Result<()> {
    let mut header = Header::new_gnu();
    let title = b"././@LongLink";
    header.as_old_mut().name[..title.len()].copy_from_slice(title);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    let length = name.len() as u64 + 1;
    header.set_size(length);
    header.set_entry_type(EntryType::GNULongName);
    header.set_cksum();
    out.write_all(header.as_bytes())?;
    out.write_all(name)?;
    let end = usize::try_from(length.next_multiple_of(BLOCK) - name.len() as u64).unwrap_or(1);
    out.write_all(&vec![0; end])
}
