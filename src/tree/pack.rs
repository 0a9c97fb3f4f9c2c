//! A tree becomes a tar stream.
//!
//! Invariants: the tree is walked by open directories, and no link is followed, whoever
//! changes it meanwhile ([`walk`]); an entry has exactly the bytes that its header says: a
//! file that becomes shorter ends the stream with an error, one that becomes longer is
//! told; holes stay holes.
//!
//! Does not: hold the tree still. A file that is written while it is read comes with some
//! of both.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::sys::stat::{fstat, major, minor, FileStat, SFlag};
use nix::sys::statfs::{fstatfs, FsType};
use tar::{Builder, EntryType, Header};
use xattr::FileExt as _;

use super::{holes, io_at, walk, Error, MAX_DEPTH};

/// The file system of the kernel's objects (linux/magic.h).
const SYSFS_MAGIC: FsType = FsType(0x6265_6572);

/// Bytes of what a link says that a header has place for.
const MAX_LINK: usize = 100;

/// What becomes of sockets, which no tar has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sockets {
    /// They are left out: a root file system loses nothing by it.
    Skip,
    /// [`Error::Socket`].
    Refuse,
}

/// What is to be told of a tree that was packed.
#[derive(Debug, Default)]
pub struct Packed {
    /// The first file that had more bytes than its size said, of which as many were taken
    /// as that.
    pub grown: Option<PathBuf>,
}

impl Packed {
    /// That in a sentence, if there is anything.
    pub fn complaint(&self) -> Option<String> {
        let path = self.grown.as_ref()?.display();
        Some(format!(
            "pack {path}: it has more bytes than its size said when it was opened, and only as \
             many as that were copied: it became longer meanwhile"
        ))
    }
}

/// Writes a file or directory as a tar stream, named `name` in it (empty: its contents
/// alone, and `source` may then be a link to a directory).
///
/// # Errors
/// [`Error`]; the stream is then incomplete.
pub fn pack(
    source: &Path,
    name: &Path,
    sockets: Sockets,
    out: &mut dyn Write,
) -> Result<Packed, Error> {
    let failed = io_at("pack", source);
    // Dropping one writes an end mark, as if all were well.
    let builder = ManuallyDrop::new(Builder::new(out));
    let mut packer = Packer { builder, links: HashMap::new(), sockets, packed: Packed::default() };
    if name.as_os_str().is_empty() {
        let dir = walk::open_named(source).map_err(&failed)?;
        packer.contents(dir.as_fd(), source, name, 0)?;
    } else {
        let base = source.file_name().ok_or_else(|| failed(io::Error::other("it has no name")))?;
        let parent = source.parent().unwrap_or(Path::new("/"));
        let dir = walk::open_named(parent).map_err(io_at("open", parent))?;
        // One that is asked for by its name is not left out without a word.
        let seen = walk::look(dir.as_fd(), base).map_err(&failed)?;
        if walk::kind(&seen) == SFlag::S_IFSOCK {
            return Err(Error::Socket { path: source.to_path_buf() });
        }
        packer.add(dir.as_fd(), base, source, name, 0)?;
    }
    packer.builder.finish().map_err(&failed)?;
    Ok(packer.packed)
}

/// Writes a directory as a root file system: what it has, and itself, as `./`.
///
/// # Errors
/// As [`pack`].
pub fn pack_root(source: &Path, sockets: Sockets, out: &mut dyn Write) -> Result<Packed, Error> {
    let failed = io_at("pack", source);
    let mut builder = ManuallyDrop::new(Builder::new(&mut *out));
    let dir = walk::open_named(source).map_err(&failed)?;
    let seen = fstat(&dir).map_err(|e| failed(e.into()))?;
    let mut header = header(&seen, EntryType::Directory);
    builder.append_data(&mut header, "./", io::empty()).map_err(&failed)?;
    pack(source, Path::new(""), sockets, out)
}

struct Packer<'a> {
    builder: ManuallyDrop<Builder<&'a mut dyn Write>>,
    /// Names of files with several, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    sockets: Sockets,
    packed: Packed,
}

impl Packer<'_> {
    /// Adds `base` of an open directory; `path` is its name for messages.
    fn add(
        &mut self,
        dir: BorrowedFd<'_>,
        base: &OsStr,
        path: &Path,
        name: &Path,
        depth: usize,
    ) -> Result<(), Error> {
        let failed = io_at("pack", path);
        let seen = walk::look(dir, base).map_err(&failed)?;
        match walk::kind(&seen) {
            SFlag::S_IFSOCK if self.sockets == Sockets::Skip => Ok(()),
            SFlag::S_IFSOCK => Err(Error::Socket { path: path.to_path_buf() }),
            SFlag::S_IFDIR => {
                let opened = walk::open_directory(dir, base, &seen).map_err(&failed)?;
                let opened = File::from(opened);
                self.records(&seen, || opened.list_xattr(), |n| opened.get_xattr(n))
                    .map_err(&failed)?;
                let mut header = header(&seen, EntryType::Directory);
                self.builder.append_data(&mut header, name, io::empty()).map_err(&failed)?;
                self.contents(opened.as_fd(), path, name, depth + 1)
            }
            SFlag::S_IFREG => {
                let (file, stat) = walk::open_file(dir, base, &seen).map_err(&failed)?;
                self.file(file, &stat, path, name)
            }
            kind => {
                if self.linked(&seen, name).map_err(&failed)? {
                    return Ok(());
                }
                let by_proc = walk::by_proc(dir, base);
                let link = match kind {
                    SFlag::S_IFLNK => Some(walk::read_link(dir, base).map_err(&failed)?),
                    _ => None,
                };
                self.records_of(
                    &seen,
                    link.as_deref(),
                    || xattr::list(&by_proc),
                    |n| xattr::get(&by_proc, n),
                )
                .map_err(&failed)?;
                self.special(kind, &seen, link.as_deref(), name).map_err(&failed)
            }
        }
    }

    fn contents(
        &mut self,
        dir: BorrowedFd<'_>,
        path: &Path,
        name: &Path,
        depth: usize,
    ) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::Deep { path: path.to_path_buf() });
        }
        for base in walk::names(dir).map_err(io_at("pack", path))? {
            self.add(dir, &base, &path.join(&base), &name.join(&base), depth)?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        mut file: File,
        stat: &FileStat,
        path: &Path,
        name: &Path,
    ) -> Result<(), Error> {
        let failed = io_at("pack", path);
        if self.linked(stat, name).map_err(&failed)? {
            return Ok(());
        }
        let sizeless = sizeless(&mut file, stat).map_err(&failed)?;
        self.records(stat, || file.list_xattr(), |n| file.get_xattr(n)).map_err(&failed)?;
        if let Some(bytes) = sizeless {
            let mut header = header(stat, EntryType::Regular);
            header.set_size(bytes.len() as u64);
            return self.builder.append_data(&mut header, name, bytes.as_slice()).map_err(&failed);
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        let pieces = (allocated < size).then(|| holes::pieces(&file, size)).flatten();
        let mut header = header(stat, EntryType::Regular);
        match pieces {
            Some(pieces) => {
                let out = self.builder.get_mut();
                holes::write_header(out, header, name, size, &pieces).map_err(&failed)?;
                for (offset, length) in pieces {
                    file.seek(SeekFrom::Start(offset)).map_err(&failed)?;
                    let mut piece = Exactly { file: &mut file, left: length };
                    let copied = io::copy(&mut piece, out);
                    let left = piece.left;
                    copied.map_err(|e| short(e, path, size, offset + length - left))?;
                    let fill = length.next_multiple_of(512) - length;
                    out.write_all(&[0; 512][..fill as usize]).map_err(&failed)?;
                }
            }
            None => {
                header.set_size(size);
                file.rewind().map_err(&failed)?;
                let mut whole = Exactly { file: &mut file, left: size };
                let added = self.builder.append_data(&mut header, name, &mut whole);
                let left = whole.left;
                added.map_err(|e| short(e, path, size, size - left))?;
            }
        }
        if file.read_at(&mut [0], size).is_ok_and(|n| n > 0) {
            self.packed.grown.get_or_insert_with(|| path.to_path_buf());
        }
        Ok(())
    }

    /// A link, a device, a FIFO.
    fn special(
        &mut self,
        kind: SFlag,
        stat: &FileStat,
        link: Option<&OsStr>,
        name: &Path,
    ) -> io::Result<()> {
        if let Some(link) = link {
            let mut header = header(stat, EntryType::Symlink);
            let bytes = link.as_bytes();
            // To the letter: "a//b" stays so. A longer one is in the records.
            header.set_link_name_literal(&bytes[..bytes.len().min(MAX_LINK)])?;
            return self.builder.append_data(&mut header, name, io::empty());
        }
        let mut header = header(
            stat,
            match kind {
                SFlag::S_IFCHR => EntryType::Char,
                SFlag::S_IFBLK => EntryType::Block,
                _ => EntryType::Fifo,
            },
        );
        if kind != SFlag::S_IFIFO {
            header.set_device_major(major(stat.st_rdev) as u32)?;
            header.set_device_minor(minor(stat.st_rdev) as u32)?;
        }
        self.builder.append_data(&mut header, name, io::empty())
    }

    /// Adds one more name of what was packed before, of any kind; false for what was not.
    fn linked(&mut self, stat: &FileStat, name: &Path) -> io::Result<bool> {
        if stat.st_nlink < 2 {
            return Ok(false);
        }
        let Some(first) = self.links.get(&walk::identity(stat)) else {
            self.links.insert(walk::identity(stat), name.to_path_buf());
            return Ok(false);
        };
        let mut header = header(stat, EntryType::Link);
        self.builder.append_link(&mut header, name, first).map(|()| true)
    }

    /// What a header has no place for goes before the entry, as records of its own:
    /// extended attributes, and of the time parts of a second, and what was before 1970.
    fn records(
        &mut self,
        stat: &FileStat,
        list: impl FnOnce() -> io::Result<xattr::XAttrs>,
        get: impl Fn(&OsStr) -> io::Result<Option<Vec<u8>>>,
    ) -> io::Result<()> {
        self.records_of(stat, None, list, get)
    }

    /// The same of a link, which may say more than a header has place for.
    fn records_of(
        &mut self,
        stat: &FileStat,
        link: Option<&OsStr>,
        list: impl FnOnce() -> io::Result<xattr::XAttrs>,
        get: impl Fn(&OsStr) -> io::Result<Option<Vec<u8>>>,
    ) -> io::Result<()> {
        let mut records = Vec::new();
        if let Some(link) = link.filter(|link| link.len() > MAX_LINK) {
            records.push(("linkpath".to_string(), link.as_bytes().to_vec()));
        }
        for name in list().into_iter().flatten() {
            let Ok(Some(value)) = get(&name) else { continue };
            // As GNU tar writes it: a record's name ends at its first "=".
            let name = name.to_string_lossy().replace('%', "%25").replace('=', "%3D");
            records.push((format!("SCHILY.xattr.{name}"), value));
        }
        if stat.st_mtime < 0 || stat.st_mtime_nsec != 0 {
            let time = pax_time(stat.st_mtime, stat.st_mtime_nsec);
            records.push(("mtime".to_string(), time.into_bytes()));
        }
        if records.is_empty() {
            return Ok(());
        }
        let records = records.iter().map(|(k, v)| (k.as_str(), v.as_slice()));
        self.builder.append_pax_extensions(records)
    }
}

/// A time as PAX writes it: a decimal number, the sign before all of it.
pub(super) fn pax_time(seconds: i64, billionths: i64) -> String {
    match (seconds < 0, billionths) {
        (_, 0) => seconds.to_string(),
        (false, n) => format!("{seconds}.{n:09}"),
        (true, n) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - n),
    }
}

/// Most bytes of a file that has no size.
const MAX_SIZELESS: u64 = 64 << 20;

/// All of a file whose size does not say how much there is to read: the kernel's own in
/// /proc have none, those in /sys a page.
fn sizeless(file: &mut File, stat: &FileStat) -> io::Result<Option<Vec<u8>>> {
    let sys = || fstatfs(&*file).is_ok_and(|s| s.filesystem_type() == SYSFS_MAGIC);
    if stat.st_size != 0 && !sys() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    Read::take(&mut *file, MAX_SIZELESS + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 {
        n if n > MAX_SIZELESS => {
            let text = format!("it has no size, and over {MAX_SIZELESS} bytes to read");
            Err(io::Error::other(text))
        }
        _ => Ok(Some(bytes)),
    }
}

fn header(stat: &FileStat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}

/// Reads just so many bytes; fewer are an error.
struct Exactly<'a> {
    file: &'a mut File,
    left: u64,
}

impl Read for Exactly<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n = self.file.read(&mut buffer[..most])?;
        if n == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

fn short(source: io::Error, path: &Path, size: u64, read: u64) -> Error {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => Error::Shrunk { path: path.to_path_buf(), size, read },
        _ => Error::Io { during: "pack", path: path.to_path_buf(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::pax_time;

    #[test]
    fn times_are_written_as_pax_reads_them() {
        assert_eq!(pax_time(12, 500_000_000), "12.500000000");
        assert_eq!(pax_time(-2, 750_000_000), "-1.250000000");
        assert_eq!(pax_time(-1, 750_000_000), "-0.250000000");
        assert_eq!(pax_time(-7, 0), "-7");
    }
}
