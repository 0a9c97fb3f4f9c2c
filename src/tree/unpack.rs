//! A stream becomes a tree, with owners, modes, times, links, devices and extended
//! attributes: in a guest, from its host, which it trusts.
//!
//! Invariants: nothing is written outside the target: a name that leaves it ends it with
//! an error; no more of a stream is kept in memory than [`MAX_NAMES`] bytes, and the names
//! of the directories that it makes.
//!
//! Does not: defend the host against a guest; that is `extract`.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{chown, PermissionsExt};
use std::path::{Component, Path};

use nix::sys::stat::{makedev, mknod, Mode, SFlag};
use tar::{Archive, EntryType, Header};

use super::{io_at, Error, MAX_NAMES};

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
