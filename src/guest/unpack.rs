//! `vmcache-agent unpack DIR`: a tar stream on stdin becomes a directory.
//! `vmcache-agent put ROOT PATH KIND NAME`: the same for a copy, which goes where docker cp's
//! rules say: what is at PATH is known here alone.
//!
//! Runs as a container's program, so the host needs no other call than
//! WriteStdin to bring in a whole root file system. What the host is told comes on stdout, a
//! line each, before anything is read of the stream, and when the file system was full:
//!
//! ```text
//! into                 `put`: it goes into the directory PATH, by its own name
//! as HEX               `put`: it goes there by this name, in hexadecimal digits
//! full KIND B B N N    it does not fit: `memory` or `disk`; bytes free and in all; inodes
//! ```
//!
//! Invariant: nothing is read of a stream that does not fit, or has no place to go to.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::statfs::{statfs, TMPFS_MAGIC};
use nix::sys::statvfs::statvfs;

use super::failure::{Attempt, Failure, Outcome};
use super::scope::{resolve, shown};
use crate::tree::measure::{measure, Needs};
use crate::tree::naming::{decide, from_hex, split, to_hex, Ending, Onto, Source, There};
use crate::tree::{self, NEEDS};

/// Unpacks until the stream's end.
pub fn run(target: &str) -> Outcome<()> {
    let target = Path::new(target);
    let room = Room { at: target, needs: needs(), shown: target.to_path_buf() };
    // Whatever is there stays.
    room.check(&[])?;
    room.unpack(true)
}

/// Unpacks what is copied to `path` of `root`; `name` is its name on the host, in digits.
pub fn put(root: &str, path: &str, kind: &str, name: &str) -> Outcome<()> {
    let root = Path::new(root);
    let kind = Source::parse(kind)
        .ok_or_else(|| Failure::invalid(format!("put into {path}: {kind:?} is no kind")))?;
    let place = Place::find(root, path, kind)?;
    let room = Room { at: &place.directory, needs: needs(), shown: shown(root, &place.directory) };
    let base = place.called.clone().or_else(|| from_hex(name));
    let replaced = match (kind, &base) {
        (Source::File | Source::Directory, Some(base)) => {
            let target = place.directory.join(base);
            fits_there(&target, &shown(root, &target), kind)?;
            vec![target]
        }
        _ => vec![place.directory.clone()],
    };
    room.check(&replaced)?;
    match &place.called {
        None => tell("into"),
        Some(name) => tell(&format!("as {}", to_hex(name))),
    }?;
    room.unpack(false)
}

fn needs() -> Option<Needs> {
    Needs::parse(&std::env::var(NEEDS).ok()?)
}

fn tell(line: &str) -> Outcome<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).during(|| "answer the host")
}

/// Where a copy goes.
struct Place {
    directory: PathBuf,
    /// Its name there; `None`: its own.
    called: Option<OsString>,
}

impl Place {
    fn find(root: &Path, path: &str, kind: Source) -> Outcome<Place> {
        let attempt = || format!("copy to {path}");
        let found = resolve(root, Path::new(path), true)?;
        let there = match std::fs::metadata(&found) {
            Ok(meta) if meta.is_dir() => There::Directory,
            Ok(_) => There::File,
            Err(e) if e.kind() == io::ErrorKind::NotFound => There::Nothing,
            Err(e) => return Err(e).during(attempt),
        };
        if kind == Source::Archive && there != There::Directory {
            let why = if there == There::File { Errno::ENOTDIR } else { Errno::ENOENT };
            return Err(why).during(|| {
                format!("copy to {path}: a tar stream is unpacked in a directory that is there")
            });
        }
        let refuse = |why: &str| Failure::invalid(format!("copy to {path}: {why}"));
        let (onto, allowed) = decide(there, Ending::of(path.as_ref())).map_err(refuse)?;
        let directory = kind != Source::File;
        if let Some(why) = allowed.refusal(directory).filter(|_| kind != Source::Archive) {
            return Err(refuse(why));
        }
        if onto == Onto::Inside {
            return Ok(Place { directory: found, called: None });
        }
        let (parent, base) = split(&found).ok_or_else(|| refuse("it has no name"))?;
        let missing = || {
            format!(
                "copy to {path}: the directory {} must be there",
                shown(root, &parent).display()
            )
        };
        match std::fs::metadata(&parent).during(missing)?.is_dir() {
            true => Ok(Place { directory: parent, called: Some(base) }),
            false => Err(Errno::ENOTDIR).during(missing),
        }
    }
}

/// Neither a directory takes a file's place nor a file a directory's.
fn fits_there(target: &Path, shown: &Path, kind: Source) -> Outcome<()> {
    let Ok(meta) = target.symlink_metadata() else { return Ok(()) };
    let why = match (meta.is_dir(), kind == Source::Directory) {
        (true, false) => "a directory is there, which a file does not replace",
        (false, true) => "what is there is no directory, which a directory does not replace",
        _ => return Ok(()),
    };
    Err(Failure::invalid(format!("copy to {}: {why}", shown.display())))
}

/// The file system of a target, and what is to come into it.
struct Room<'a> {
    at: &'a Path,
    needs: Option<Needs>,
    /// The target as the workload names it.
    shown: PathBuf,
}

impl Room<'_> {
    /// Whether all that comes fits; what is `replaced` gives its room back.
    fn check(&self, replaced: &[PathBuf]) -> Outcome<()> {
        let (Some(needs), Some(room)) = (self.needs, self.look()) else { return Ok(()) };
        let lacks = |needs: Needs| needs.bytes > room.free.bytes || needs.inodes > room.free.inodes;
        if !lacks(needs) {
            return Ok(());
        }
        let mut back = Needs::default();
        for path in replaced {
            let one = measure(path, true);
            back.bytes = back.bytes.saturating_add(one.bytes);
            back.inodes = back.inodes.saturating_add(one.inodes);
        }
        let rest = Needs {
            bytes: needs.bytes.saturating_sub(back.bytes),
            inodes: needs.inodes.saturating_sub(back.inodes),
        };
        if !lacks(rest) {
            return Ok(());
        }
        room.tell()?;
        Err(Failure::internal(format!(
            "copy to {}: {} bytes in {} files do not fit the file system there",
            self.shown.display(),
            needs.bytes,
            needs.inodes
        )))
    }

    /// Unpacks what comes; `root` says whether the target itself comes, too.
    fn unpack(&self, root: bool) -> Outcome<()> {
        let stream = &mut io::stdin().lock();
        let unpacked = match root {
            true => tree::unpack(stream, self.at, true),
            false => tree::unpack_into(stream, self.at),
        };
        let unpacked = unpacked.map_err(|e| {
            let full = e.errno() == Some(Errno::ENOSPC as i32);
            if let Some(room) = self.look().filter(|_| full && self.needs.is_some()) {
                let _ = room.tell();
            }
            Failure::internal(format!("in {}: {e}", self.shown.display()))
        })?;
        // The rest is whole: the host says it, and goes on.
        if let Some(text) = unpacked.complaint() {
            eprintln!("{text}");
        }
        Ok(())
    }

    /// The file system, as it is now; the target need not be there yet.
    fn look(&self) -> Option<Free> {
        let at = self.at.ancestors().find(|path| path.exists())?;
        let all = statvfs(at).ok()?;
        let memory = statfs(at).is_ok_and(|s| s.filesystem_type() == TMPFS_MAGIC);
        let unit = all.fragment_size().max(1);
        let bound = |total: u64, n: u64| if total == 0 { u64::MAX } else { n };
        let (blocks, inodes) = (all.blocks(), all.files());
        Some(Free {
            memory,
            free: Needs {
                bytes: bound(blocks, all.blocks_available().saturating_mul(unit)),
                inodes: bound(inodes, all.files_available()),
            },
            all: Needs {
                bytes: bound(blocks, blocks.saturating_mul(unit)),
                inodes: bound(inodes, inodes),
            },
        })
    }
}

struct Free {
    memory: bool,
    free: Needs,
    all: Needs,
}

impl Free {
    fn tell(&self) -> Outcome<()> {
        let kind = if self.memory { "memory" } else { "disk" };
        let (free, all) = (self.free, self.all);
        tell(&format!("full {kind} {} {} {} {}", free.bytes, all.bytes, free.inodes, all.inodes))
    }
}
