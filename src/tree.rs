//! Directory trees as tar streams, both ways, with all that a root file system
//! has: owners, modes, times, symbolic and hard links, devices, extended
//! attributes.
//!
//! Used on the host and in the guest. Invariants: [`pack`] never follows a
//! symbolic link; [`unpack`] never writes outside its target: a name that
//! leaves it ends it with an error; and it keeps no more of a stream in memory
//! than [`MAX_NAMES`] bytes, and the names of the directories that it makes.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::error;
use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{chown, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{major, makedev, minor, mknod, Mode, SFlag};
use tar::{Archive, Builder, EntryType, Header};

/// Most bytes of an entry's names and extended attributes.
pub const MAX_NAMES: u64 = 1024 * 1024;

/// Why a tree could not be packed or unpacked.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The system refused.
    Io { during: &'static str, path: PathBuf, source: io::Error },
    /// The stream is no tar, or breaks off.
    Stream { source: io::Error },
    /// A name leads out of the target.
    Escape { name: PathBuf },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Whole in one line: in the guest, this is all that is printed.
            Error::Io { during, path, source } => {
                write!(f, "{during} {}: {source}", path.display())
            }
            Error::Stream { source } => write!(f, "read the tar stream: {source}"),
            Error::Escape { name } => {
                write!(f, "unpack {}: the name leaves the target; refused", name.display())
            }
        }
    }
}

impl error::Error for Error {}

fn io_at<'a>(during: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io { during, path: path.to_path_buf(), source }
}

/// Writes a file or directory as a tar stream, named `name` in it (empty: its
/// contents alone).
///
/// # Errors
/// [`Error`]; the stream is then incomplete.
pub fn pack(source: &Path, name: &Path, out: &mut dyn Write) -> Result<(), Error> {
    let mut builder = Builder::new(out);
    builder.follow_symlinks(false);
    let mut links = HashMap::new();
    add(&mut builder, source, name, &mut links)?;
    builder.finish().map_err(io_at("pack", source))
}

fn add(
    builder: &mut Builder<&mut dyn Write>,
    path: &Path,
    name: &Path,
    links: &mut HashMap<(u64, u64), PathBuf>,
) -> Result<(), Error> {
    let failed = io_at("pack", path);
    let meta = fs::symlink_metadata(path).map_err(&failed)?;
    let kind = meta.file_type();
    if kind.is_socket() {
        return Ok(());
    }
    let top = name.as_os_str().is_empty();
    if !top {
        let mut header = Header::new_gnu();
        header.set_metadata(&meta);
        header.set_mtime(meta.mtime().max(0) as u64);
        header.set_size(0);
        attributes(builder, path).map_err(&failed)?;
        let first = (meta.nlink() > 1 && !kind.is_dir())
            .then(|| links.insert((meta.dev(), meta.ino()), name.to_path_buf()))
            .flatten();
        if let Some(first) = first {
            header.set_entry_type(EntryType::Link);
            builder.append_link(&mut header, name, &first).map_err(&failed)?;
            // The first name stays the one that later ones link to.
            links.insert((meta.dev(), meta.ino()), first);
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(&failed)?;
            builder.append_link(&mut header, name, target).map_err(&failed)?;
        } else if kind.is_file() {
            header.set_size(meta.len());
            // Exactly as long as the header says, whatever happens to the file.
            let file = fs::File::open(path).map_err(&failed)?;
            let exact = file.take(meta.len()).chain(io::repeat(0)).take(meta.len());
            builder.append_data(&mut header, name, exact).map_err(&failed)?;
        } else {
            if kind.is_char_device() || kind.is_block_device() {
                let device = meta.rdev();
                header.set_device_major(major(device) as u32).map_err(&failed)?;
                header.set_device_minor(minor(device) as u32).map_err(&failed)?;
            }
            builder.append_data(&mut header, name, io::empty()).map_err(&failed)?;
        }
    }
    if kind.is_dir() {
        let mut entries: Vec<_> =
            fs::read_dir(path).and_then(Iterator::collect).map_err(&failed)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            add(builder, &entry.path(), &name.join(entry.file_name()), links)?;
        }
    }
    Ok(())
}

/// Extended attributes go before the entry, as records of their own.
fn attributes(builder: &mut Builder<&mut dyn Write>, path: &Path) -> io::Result<()> {
    let Ok(names) = xattr::list(path) else { return Ok(()) };
    let mut records = Vec::new();
    for name in names {
        let Ok(Some(value)) = xattr::get(path, &name) else { continue };
        records.push((format!("SCHILY.xattr.{}", name.to_string_lossy()), value));
    }
    if records.is_empty() {
        return Ok(());
    }
    builder.append_pax_extensions(records.iter().map(|(k, v)| (k.as_str(), v.as_slice())))
}

/// Unpacks a tar stream into `target`, to its end.
///
/// `owners` says whether files get the owners that the stream names, which
/// only root can give.
///
/// # Errors
/// [`Error`]; what was unpacked until then stays.
pub fn unpack(stream: &mut dyn Read, target: &Path, owners: bool) -> Result<(), Error> {
    fs::create_dir_all(target).map_err(io_at("create", target))?;
    let root = fs::canonicalize(target).map_err(io_at("find", target))?;
    let left = Cell::new(None);
    let mut archive = Archive::new(Metered { stream, left: &left });
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(owners);
    archive.set_unpack_xattrs(true);
    archive.set_preserve_mtime(true);
    let mut directories = BTreeMap::new();
    let mut entries = archive.entries().map_err(|source| Error::Stream { source })?;
    loop {
        left.set(Some(MAX_NAMES));
        let Some(entry) = entries.next() else { break };
        left.set(None);
        let mut entry = entry.map_err(|source| Error::Stream { source })?;
        let name = entry.path().map_err(|source| Error::Stream { source })?.into_owned();
        let failed = io_at("unpack", &name);
        if !plain(&name) {
            return Err(Error::Escape { name: name.clone() });
        }
        let kind = entry.header().entry_type();
        match kind {
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                special(&root, &name, entry.header(), owners)?;
                io::copy(&mut entry, &mut io::sink()).map_err(|source| Error::Stream { source })?;
                continue;
            }
            // A directory keeps owner and mode only when nothing follows in it.
            EntryType::Directory => {
                let header = entry.header();
                let mode = header.mode().map_err(&failed)?;
                directories.insert(name.clone(), (mode, owner(header).map_err(&failed)?));
            }
            _ => {}
        }
        let inside = entry.unpack_in(&root).map_err(&failed)?;
        if !inside {
            return Err(Error::Escape { name: name.clone() });
        }
        // What a kind of file has no use for.
        io::copy(&mut entry, &mut io::sink()).map_err(|source| Error::Stream { source })?;
    }
    left.set(None);
    for (name, (mode, (uid, gid))) in directories.iter().rev() {
        // Resolved again: an entry may have put a link in the directory's place.
        let path = match fs::canonicalize(root.join(name)) {
            Ok(path) if path.starts_with(&root) => path,
            _ => return Err(Error::Escape { name: name.clone() }),
        };
        let failed = io_at("set owner and mode of", name);
        if owners {
            chown(&path, Some(*uid), Some(*gid)).map_err(&failed)?;
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).map_err(&failed)?;
    }
    // What follows the end mark, so that the sender meets no closed pipe.
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(|source| Error::Stream { source })?;
    Ok(())
}

/// A stream of which the next entry's names and attributes may have only so much.
struct Metered<'a> {
    stream: &'a mut dyn Read,
    /// Bytes that may still come; `None`: any number, which are written to a file.
    left: &'a Cell<Option<u64>>,
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(left) = self.left.get() else { return self.stream.read(buffer) };
        if left == 0 {
            let text = format!("names and attributes of over {MAX_NAMES} bytes");
            return Err(io::Error::other(text));
        }
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let n = self.stream.read(&mut buffer[..most])?;
        self.left.set(Some(left - n as u64));
        Ok(n)
    }
}

/// Whether a name stays below where it is joined to, links aside.
fn plain(name: &Path) -> bool {
    let good = |c| matches!(c, Component::Normal(_) | Component::CurDir);
    name.components().all(good) && !name.as_os_str().as_bytes().contains(&0)
}

fn owner(header: &Header) -> io::Result<(u32, u32)> {
    let narrow = |n: u64| u32::try_from(n).map_err(io::Error::other);
    Ok((narrow(header.uid()?)?, narrow(header.gid()?)?))
}

/// Devices and pipes, which the tar library leaves out.
fn special(root: &Path, name: &Path, header: &Header, owners: bool) -> Result<(), Error> {
    let failed = io_at("make", name);
    let parent = root.join(name.parent().unwrap_or(Path::new("")));
    let parent = fs::canonicalize(parent).map_err(&failed)?;
    let Some(file) = name.file_name().filter(|_| parent.starts_with(root)) else {
        return Err(Error::Escape { name: name.to_path_buf() });
    };
    let path = parent.join(file);
    let _ = fs::remove_file(&path);
    let kind = match header.entry_type() {
        EntryType::Char => SFlag::S_IFCHR,
        EntryType::Block => SFlag::S_IFBLK,
        _ => SFlag::S_IFIFO,
    };
    let number = |n: io::Result<Option<u32>>| n.ok().flatten().unwrap_or(0).into();
    let device = makedev(number(header.device_major()), number(header.device_minor()));
    let mode = header.mode().map_err(&failed)?;
    mknod(&path, kind, Mode::from_bits_truncate(mode), device).map_err(|e| failed(e.into()))?;
    if owners {
        let (uid, gid) = owner(header).map_err(&failed)?;
        chown(&path, Some(uid), Some(gid)).map_err(&failed)?;
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(&failed)
}

#[cfg(test)]
mod tests;
