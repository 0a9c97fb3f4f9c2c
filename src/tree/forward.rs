//! A tar stream from a guest becomes a tar stream of this host's own making: `cp ID:PATH -`.
//!
//! What passes is what `extract` would write: files, directories, symbolic links, hard links
//! to what came before, with permissions and without set-id and sticky bits, the caller's
//! own, with their times, no extended attributes; all of it for guests that are trusted. Holes come as zeros, so that any tar reads it.
//!
//! Invariants: no byte of a guest's header is passed on, every header is written here; no
//! name leads up, comes twice, or is below anything but a directory of the same stream, so
//! that who unpacks it follows no link of the guest's; what is allowed is counted as on disk
//! (`Budget`); in memory are at most an entry's names, and 16 bytes or so for each name.
//!
//! Does not: take anything back. A stream that ends with an error has no end mark.

use std::collections::hash_map::RandomState;
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::unistd::{getegid, geteuid};
use tar::{Builder, EntryType, Header};

use super::budget::Budget;
use super::extract::{Extracted, Policy};
use super::pack::pax_time;
use super::reader::{path as shown, Entry, Kind, Reader};
use super::sparse::Piece;
use super::target::Name;
use super::{io_at, Error, Stop, Why};

/// Permissions, without set-id and sticky bits.
const PERMISSIONS: u32 = 0o777;
/// Bytes of a stream's end mark.
const END: usize = 1024;
/// What errors of the writing side name.
const OUTPUT: &str = "the tar stream";

/// Passes a stream on to `out`, to its end.
///
/// # Errors
/// [`Error`].
///
/// What was written has no end mark: [`finish`] writes it, once the guest has said that it
/// was all.
pub fn forward(
    stream: &mut dyn Read,
    out: &mut dyn Write,
    policy: &Policy,
    stop: &Stop,
) -> Result<Extracted, Error> {
    let mut work = Work {
        // Dropping one writes an end mark, as if all were well.
        out: ManuallyDrop::new(Builder::new(out)),
        budget: Budget::new(policy.bytes, policy.entries),
        policy,
        stop,
        names: Names { seen: HashMap::new(), hash: RandomState::new() },
    };
    let mut reader = Reader::new(stream);
    while let Some(entry) = reader.next()? {
        stop.check()?;
        work.entry(&entry, &mut reader)?;
    }
    let written = io_at("write", Path::new(OUTPUT));
    work.out.get_mut().flush().map_err(&written)?;
    let (bytes, entries) = work.budget.spent();
    Ok(Extracted { entries, bytes, lost: None })
}

/// Writes the mark by which a reader knows that a stream is whole.
///
/// # Errors
/// As the stream's.
pub fn finish(out: &mut dyn Write) -> Result<(), Error> {
    let written = io_at("write", Path::new(OUTPUT));
    out.write_all(&[0; END]).and_then(|()| out.flush()).map_err(&written)
}

/// What came so far. By a hash with a key of this process's own: a guest cannot make two
/// names that have the same one, and by chance a million names do in one copy of 37 million.
struct Names {
    seen: HashMap<u64, bool>,
    hash: RandomState,
}

impl Names {
    /// Whether it is a directory, if it came.
    fn directory(&self, name: &Path) -> Option<bool> {
        self.seen.get(&self.hash.hash_one(name)).copied()
    }

    /// Remembers a name.
    ///
    /// # Errors
    /// When it came before, or is in what is no directory.
    fn add(&mut self, name: &Name, top: bool, directory: bool) -> Result<(), Why> {
        let path = name.path();
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        if let Some(parent) = parent.filter(|_| !top) {
            if self.directory(parent) != Some(true) {
                let part = parent.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Err(Why::NoDirectory { part });
            }
        }
        match self.seen.insert(self.hash.hash_one(&path), directory) {
            None => Ok(()),
            Some(_) => Err(Why::Malformed("a name that comes twice".into())),
        }
    }
}

struct Work<'a> {
    out: ManuallyDrop<Builder<&'a mut dyn Write>>,
    budget: Budget,
    policy: &'a Policy,
    stop: &'a Stop,
    names: Names,
}

impl Work<'_> {
    fn entry(&mut self, entry: &Entry, reader: &mut Reader<'_>) -> Result<(), Error> {
        let refuse = |why| Error::Refused { name: shown(&entry.name), why };
        let name = self.policy.place(&entry.name).map_err(refuse)?;
        let directory = entry.kind == Kind::Directory;
        self.policy.admit(&name, directory).map_err(refuse)?;
        let (path, archive) = (name.path(), self.policy.archive);
        let (kind, device) = match entry.kind {
            Kind::File => (EntryType::Regular, None),
            Kind::Directory => (EntryType::Directory, None),
            Kind::Symlink => (EntryType::Symlink, None),
            Kind::Link => (EntryType::Link, None),
            Kind::Character => (EntryType::Char, Some("character device")),
            Kind::Block => (EntryType::Block, Some("block device")),
            Kind::Fifo => (EntryType::Fifo, Some("FIFO")),
        };
        if let Some(device) = device.filter(|_| !archive) {
            return Err(refuse(Why::Kind(device)));
        }
        self.budget.take(&path, if entry.kind == Kind::File { entry.size } else { 0 })?;
        let link = match entry.kind {
            Kind::Link => Some(self.target(&entry.link).map_err(refuse)?),
            Kind::Symlink if entry.link.contains(&0) => return Err(refuse(Why::Nameless)),
            Kind::Symlink => Some(std::ffi::OsStr::from_bytes(&entry.link).into()),
            _ => None,
        };
        self.names.add(&name, path.components().count() == 1, directory).map_err(refuse)?;
        let mut header = self.header(entry, kind).map_err(refuse)?;
        self.records(entry)?;
        let written = io_at("write", Path::new(OUTPUT));
        if let Some(link) = link {
            return self.out.append_link(&mut header, &path, link).map_err(written);
        }
        if entry.kind != Kind::File {
            return self.out.append_data(&mut header, &path, io::empty()).map_err(written);
        }
        header.set_size(entry.size);
        let mut data = Data { reader, stop: self.stop, left: &entry.pieces, at: 0, failed: None };
        let appended = self.out.append_data(&mut header, &path, (&mut data).take(entry.size));
        match (data.failed, appended) {
            (Some(e), _) => Err(e),
            (None, appended) => appended.map_err(written),
        }
    }

    /// What a hard link leads to: something that came, and is no directory.
    fn target(&self, link: &[u8]) -> Result<std::path::PathBuf, Why> {
        let to = || String::from_utf8_lossy(link).chars().take(256).collect();
        let refuse = |why| Why::Link { to: to(), why };
        let leads_out = |_| refuse("which leads out of the target");
        let path = self.policy.place(link).map_err(leads_out)?.path();
        match self.names.directory(&path) {
            Some(false) => Ok(path),
            _ => Err(refuse("which is not among what was copied")),
        }
    }

    fn header(&self, entry: &Entry, kind: EntryType) -> Result<Header, Why> {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mtime(u64::try_from(entry.changed.0).unwrap_or(0));
        let (mode, (user, group)) = match self.policy.archive {
            true => (entry.mode, entry.owner),
            false => {
                (entry.mode & PERMISSIONS, (geteuid().as_raw().into(), getegid().as_raw().into()))
            }
        };
        header.set_mode(mode);
        header.set_uid(user);
        header.set_gid(group);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            let narrow = |n: u64| {
                u32::try_from(n).map_err(|_| Why::Malformed(format!("a device's number {n}")))
            };
            let bad = |e: io::Error| Why::Malformed(e.to_string());
            header.set_device_major(narrow(entry.device.0)?).map_err(bad)?;
            header.set_device_minor(narrow(entry.device.1)?).map_err(bad)?;
        }
        Ok(header)
    }

    /// A time that the header has no place for; extended attributes, of guests that are
    /// trusted.
    fn records(&mut self, entry: &Entry) -> Result<(), Error> {
        let (seconds, part) = entry.changed;
        let time = pax_time(seconds, part.into());
        let mut records: Vec<(String, &[u8])> = Vec::new();
        if seconds < 0 || part != 0 {
            records.push(("mtime".into(), time.as_bytes()));
        }
        if self.policy.archive {
            let attributes = entry.records.all().filter(|(k, _)| k.starts_with(b"SCHILY.xattr."));
            let named = |(k, v): (&[u8], _)| Some((String::from_utf8(k.to_vec()).ok()?, v));
            records.extend(attributes.filter_map(named));
        }
        if records.is_empty() {
            return Ok(());
        }
        let records = records.iter().map(|(key, value)| (key.as_str(), *value));
        let written = io_at("write", Path::new(OUTPUT));
        self.out.append_pax_extensions(records).map_err(written)
    }
}

/// A file's bytes, holes as zeros.
struct Data<'a, 'b> {
    reader: &'a mut Reader<'b>,
    stop: &'a Stop,
    left: &'a [Piece],
    at: u64,
    /// Why the guest's side gave no more.
    failed: Option<Error>,
}

impl Data<'_, '_> {
    fn next(&mut self, buffer: &mut [u8]) -> Result<usize, Error> {
        self.stop.check()?;
        while let [piece, rest @ ..] = self.left {
            if self.at < piece.offset {
                return Ok(zeros(buffer, piece.offset - self.at));
            }
            let left = piece.offset.saturating_add(piece.length).saturating_sub(self.at);
            if left == 0 {
                self.left = rest;
                continue;
            }
            let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            return match self.reader.read(&mut buffer[..most])? {
                0 => Err(Error::Stream { source: io::ErrorKind::UnexpectedEof.into() }),
                n => Ok(n),
            };
        }
        // A hole at the end; whoever reads knows the size.
        Ok(zeros(buffer, u64::MAX))
    }
}

fn zeros(buffer: &mut [u8], most: u64) -> usize {
    let n = buffer.len().min(usize::try_from(most).unwrap_or(usize::MAX));
    buffer[..n].fill(0);
    n
}

impl Read for Data<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.next(buffer) {
            Ok(n) => {
                self.at += n as u64;
                Ok(n)
            }
            Err(e) => {
                self.failed = Some(e);
                Err(io::Error::other("the guest's side gave no more"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{pack, Sockets};
    use super::*;
    use std::fs;
    use std::os::unix::fs::{symlink, PermissionsExt};

    fn entry(name: &str, kind: EntryType, link: &str, data: &[u8]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o6755);
        header.set_size(data.len() as u64);
        header.set_uid(7);
        header.set_gid(7);
        header.set_mtime(99);
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        let field = &mut header.as_old_mut().linkname;
        field[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        builder.append(&header, data).unwrap();
        builder.get_ref().clone()
    }

    fn passed(entries: &[Vec<u8>], policy: &Policy) -> Result<Vec<u8>, String> {
        let stream = [entries.concat(), vec![0; 1024]].concat();
        let mut out = Vec::new();
        forward(&mut stream.as_slice(), &mut out, policy, &Stop::default())
            .map(|_| out)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_tree_passes_as_the_callers_own() {
        let dir = std::env::temp_dir().join(format!("vmcache-forward-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        let long = "n".repeat(200);
        fs::create_dir_all(dir.join("t/sub")).unwrap();
        fs::write(dir.join("t/sub").join(&long), "long").unwrap();
        fs::hard_link(dir.join("t/sub").join(&long), dir.join("t/twin")).unwrap();
        symlink("/etc/shadow", dir.join("t/link")).unwrap();
        fs::set_permissions(dir.join("t/twin"), fs::Permissions::from_mode(0o4755)).unwrap();
        let holes = fs::File::create(dir.join("t/holes")).unwrap();
        holes.set_len(1 << 20).unwrap();
        let mut stream = Vec::new();
        pack(&dir.join("t"), Path::new("t"), Sockets::Skip, &mut stream).unwrap();
        let mut out = Vec::new();
        let policy = Policy { called: Some(b"u".to_vec()), ..Policy::of("t") };
        forward(&mut stream.as_slice(), &mut out, &policy, &Stop::default()).unwrap();
        assert!(out.len() > 1 << 20, "holes come as zeros");
        let into = dir.join("into");
        super::super::unpack(&mut out.as_slice(), &into, false).unwrap();
        let twin = into.join("u/twin");
        assert_eq!(fs::read_to_string(&twin).unwrap(), "long");
        assert_eq!(fs::metadata(&twin).unwrap().permissions().mode() & 0o7777, 0o755);
        assert_eq!(fs::read_link(into.join("u/link")).unwrap(), Path::new("/etc/shadow"));
        assert_eq!(fs::metadata(into.join("u/holes")).unwrap().len(), 1 << 20);
        assert!(into.join("u/sub").join(&long).exists());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_would_harm_who_unpacks_it_does_not_pass() {
        use EntryType::{Char, Directory, Fifo, Link, Regular, Symlink};
        let file = |name: &str| entry(name, Regular, "", b"x");
        let directory = || entry("t", Directory, "", b"");
        let policy = Policy::of("t");
        for (entries, why) in [
            (vec![file("/etc/passwd")], "leaves the target"),
            (vec![directory(), file("t/../x")], "leaves the target"),
            (vec![file("other")], "asked for \"t\" alone"),
            (vec![entry("t", Char, "", b"")], "character device"),
            (vec![entry("t", Fifo, "", b"")], "FIFO"),
            // Through a link of its own, by whatever order.
            (vec![entry("t", Symlink, "/etc", b""), file("t/passwd")], "no directory"),
            (
                vec![directory(), entry("t/l", Symlink, "/etc", b""), file("t/l/passwd")],
                "no directory",
            ),
            (vec![directory(), entry("t", Symlink, "/etc", b""), file("t/p")], "comes twice"),
            (vec![directory(), file("t/nowhere/p")], "no directory"),
            (vec![directory(), entry("t/h", Link, "/etc/passwd", b"")], "leads out"),
            (vec![directory(), entry("t/h", Link, "t/later", b""), file("t/later")], "not among"),
            (vec![directory(), entry("t/h", Link, "t", b"")], "not among"),
        ] {
            let e = passed(&entries, &policy).unwrap_err();
            assert!(e.contains(why), "{why}: {e}");
        }
        let small = Policy { bytes: 10, entries: 2, ..Policy::of("t") };
        let large = entry("t", Regular, "", &[b'x'; 11]);
        assert!(passed(&[large], &small).unwrap_err().contains("--max-size"));
        let many = [directory(), file("t/1"), file("t/2")];
        assert!(passed(&many, &small).unwrap_err().contains("--max-entries"));
    }

    #[test]
    fn owners_and_set_id_bits_pass_of_trusted_guests_alone() {
        let one = [entry("t", EntryType::Regular, "", b"x")];
        let of = |policy: &Policy| {
            let bytes = passed(&one, policy).unwrap();
            let header = Header::from_byte_slice(&bytes[..512]).clone();
            let time = header.mtime().unwrap();
            (header.mode().unwrap(), header.uid().unwrap(), time)
        };
        assert_eq!(of(&Policy::of("t")), (0o755, geteuid().as_raw().into(), 99));
        let trusted = Policy { archive: true, ..Policy::of("t") };
        assert_eq!(of(&trusted), (0o6755, 7, 99));
    }
}
