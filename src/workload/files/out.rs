//! Out of a guest, which is not trusted: a file or directory by docker cp's rules, or all of
//! it as a tar stream.
//!
//! Invariant: where something goes is decided by what this host has looked at; that a guest
//! says "file" or "directory" decides only whether that is taken or refused.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::geteuid;

use super::super::{Command, Error, Guest};
use super::side::{Ended, Side};
use super::AGENT;
use crate::tree::naming::{decide, from_root, split, without_ending, Allowed, Ending, Onto, There};
use crate::tree::{self, Extracted, Policy, Stop, FOLLOW, ROOT, SKIP_SOCKETS};
use crate::walls::Wall;

/// Most links from one to another in the name of a target: Linux's own bound.
const MAX_LINKS: usize = 40;

/// What may come out of a guest.
#[derive(Clone, Debug)]
pub struct CopyPolicy {
    /// Owners, all modes, extended attributes, devices and FIFOs, too: for guests
    /// that are trusted, and for root only.
    pub archive: bool,
    /// A link that is named itself is followed, in the guest.
    pub follow: bool,
    /// Most bytes of all files together, holes included.
    pub max_bytes: u64,
    /// Most files, directories and links.
    pub max_entries: u64,
}

impl Default for CopyPolicy {
    fn default() -> CopyPolicy {
        let usual = Policy::of("");
        CopyPolicy {
            archive: false,
            follow: false,
            max_bytes: usual.bytes,
            max_entries: usual.entries,
        }
    }
}

impl CopyPolicy {
    fn policy(&self, name: &str) -> Policy {
        Policy {
            archive: self.archive,
            bytes: self.max_bytes,
            entries: self.max_entries,
            ..Policy::of(name)
        }
    }
}

/// Copies a file or directory of the workload's root to `target`, by docker cp's rules, as
/// `policy` allows: see `tree::extract`.
///
/// # Errors
/// When the guest's side fails, or what it sends is refused; [`Error::Interrupted`]. What
/// came until then stays.
pub fn copy_out(
    guest: &Guest,
    source: &str,
    target: &Path,
    policy: &CopyPolicy,
    stop: &Stop,
) -> Result<Extracted, Error> {
    let remote = Remote::of(source);
    let place = Place::find(target, &remote)?;
    // A directory that is made for what is in another is asked for by that one's name.
    let whole = place.called.is_some() && !remote.name.is_empty();
    let what = Policy {
        called: place.called.map(|name| name.as_bytes().to_vec()),
        allowed: place.allowed,
        ..policy.policy(if remote.contents && !whole { "" } else { &remote.name })
    };
    let path = if whole { &remote.whole } else { &remote.path };
    let copied = take(guest, path, policy, stop, &mut |stream| match Wall::Copies.stands() {
        true => tree::extract(stream, &place.directory, &what, stop),
        false => {
            let owners = geteuid().is_root();
            tree::unpack(stream, &place.directory, owners).map(|_| Extracted::default())
        }
    })?;
    something(&copied, &remote, source)?;
    Ok(copied)
}

/// Writes a file or directory of the workload's root as a tar stream: see `tree::forward`.
///
/// # Errors
/// As [`copy_out`]; the stream then has no end.
pub fn stream_out(
    guest: &Guest,
    source: &str,
    out: &mut dyn Write,
    policy: &CopyPolicy,
    stop: &Stop,
) -> Result<Extracted, Error> {
    let remote = Remote::of(source);
    let what = policy.policy(if remote.contents { "" } else { &remote.name });
    let copied =
        take(guest, &remote.path, policy, stop, &mut |stream| match Wall::Copies.stands() {
            true => tree::forward(stream, out, &what, stop),
            false => io::copy(stream, out).map(|_| Extracted::default()).map_err(|source| {
                tree::Error::Io { during: "write", path: "the tar stream".into(), source }
            }),
        })?;
    something(&copied, &remote, source)?;
    tree::finish(out).map_err(Error::Tree)?;
    Ok(copied)
}

/// A guest that was asked for a name and sends nothing has not done what it says.
fn something(copied: &Extracted, remote: &Remote, source: &str) -> Result<(), Error> {
    match copied.entries == 0 && !remote.contents && Wall::Copies.stands() {
        true => Err(Error::Copy { text: format!("{source}: the guest sent nothing") }),
        false => Ok(()),
    }
}

/// Has the guest's side pack a path, and `read` take what it says.
fn take(
    guest: &Guest,
    path: &str,
    policy: &CopyPolicy,
    stop: &Stop,
    read: &mut dyn FnMut(&mut dyn Read) -> Result<Extracted, tree::Error>,
) -> Result<Extracted, Error> {
    let root = guest.root();
    let source = format!("{}{path}", root.trim_end_matches('/'));
    let mut command = Command::new(AGENT).arg("pack").arg(source).env(ROOT, &root);
    for (set, name) in [(policy.archive, SKIP_SOCKETS), (policy.follow, FOLLOW)] {
        if set {
            command = command.env(name, "1");
        }
    }
    let side = Side::start(guest, &command)?;
    drop(side.running.stdin());
    let taken = read(&mut side.running.stdout());
    // One whose stream is at its end ends by itself, and is asked how.
    let at_end = |e: &tree::Error| matches!(e, tree::Error::Stream { source } if source.kind() == io::ErrorKind::UnexpectedEof);
    let killed = taken.as_ref().is_err_and(|e| !at_end(e));
    if killed {
        side.kill();
    }
    let ended = side.finish(true);
    stop.check().map_err(|_| Error::Interrupted)?;
    match (taken, ended) {
        // Given up, for one.
        (Err(tree::Error::Stream { .. }), Err(e)) => Err(e),
        // The stream broke off because of what the guest's side says, if it says something.
        (Err(e @ tree::Error::Stream { .. }), Ok(Ended { code, text, .. })) => {
            match !killed && code != 0 && !text.is_empty() {
                true => Err(Error::Copy { text }),
                false => Err(Error::Tree(e)),
            }
        }
        (Err(e), _) => Err(Error::Tree(e)),
        (Ok(_), Err(e)) => Err(e),
        (Ok(extracted), Ok(Ended { code: 0, .. })) => Ok(extracted),
        (Ok(_), Ok(Ended { text, .. })) => Err(Error::Copy { text }),
    }
}

/// What is to be copied, as it was asked for.
struct Remote {
    path: String,
    /// The same without `/.`: the directory itself.
    whole: String,
    name: String,
    contents: bool,
}

impl Remote {
    fn of(source: &str) -> Remote {
        let mut path = from_root(source);
        let mut contents = path.ends_with("/.");
        let mut whole = path.trim_end_matches('.').to_string();
        if !contents {
            whole.clone_from(&path);
        }
        if path == "/" {
            (path, contents) = ("/.".into(), true);
        }
        let name = whole.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_string();
        Remote { path, whole, name, contents }
    }
}

/// Where a copy goes on this host.
struct Place {
    directory: PathBuf,
    /// Its name there; `None`: its own.
    called: Option<OsString>,
    allowed: Allowed,
}

impl Place {
    fn find(target: &Path, remote: &Remote) -> Result<Place, Error> {
        let failed =
            |path: &Path, source| Error::Io { during: "copy to", path: path.into(), source };
        let refuse =
            |why: &str| Error::Copy { text: format!("copy to {}: {why}", target.display()) };
        let ending = Ending::of(target.as_os_str());
        let plain = Path::new(without_ending(target.as_os_str()));
        let (path, there) = look(plain, ending).map_err(|e| failed(target, e))?;
        let (onto, allowed) = decide(there, ending).map_err(refuse)?;
        if let Some(why) = allowed.refusal(true).filter(|_| remote.contents) {
            return Err(refuse(why));
        }
        if onto == Onto::Inside || (remote.contents && remote.name.is_empty()) {
            let allowed = match (&remote.contents, path.join(&remote.name).symlink_metadata()) {
                // A directory takes the place of no file, nor of a link.
                (false, Ok(meta)) if !meta.is_dir() => Allowed::NotDirectory,
                _ => Allowed::Any,
            };
            return Ok(Place { directory: path, called: None, allowed });
        }
        let (directory, base) = split(&path).ok_or_else(|| refuse("it has no name"))?;
        let parent = |e| failed(&directory, e);
        if !fs::metadata(&directory).map_err(parent)?.is_dir() {
            return Err(parent(Errno::ENOTDIR.into()));
        }
        Ok(Place { called: Some(base), directory, allowed })
    }
}

/// What is at a target: a link is followed, as whoever names it means.
fn look(path: &Path, ending: Ending) -> io::Result<(PathBuf, There)> {
    let mut path = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        // By the kernel's own rules, as far as it goes.
        match fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => return Ok((path, There::Directory)),
            Ok(_) if ending.is_directory() => return Ok((path, There::File)),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        let seen = match path.symlink_metadata() {
            Ok(seen) => seen,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((path, There::Nothing)),
            Err(e) => return Err(e),
        };
        if !seen.is_symlink() {
            return Ok((path, There::File));
        }
        let (parent, _) = split(&path).ok_or(Errno::ELOOP)?;
        let directory = fs::metadata(&parent)?;
        let shared = directory.mode() & 0o1002 == 0o1002;
        let mine = [geteuid().as_raw(), directory.uid()].contains(&seen.uid());
        if shared && !mine {
            // As fs.protected_symlinks has it, which does not see a link that is read.
            let text = "a link of another user's, in a directory where everybody may put one";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        path = parent.join(fs::read_link(&path)?);
    }
    Err(Errno::ELOOP.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{lchown, symlink, PermissionsExt};

    #[test]
    fn a_guests_path_is_asked_for_by_its_own_name() {
        for (source, path, whole, name, contents) in [
            ("/a/b", "/a/b", "/a/b", "b", false),
            ("a/b", "/a/b", "/a/b", "b", false),
            ("/a/b/", "/a/b/", "/a/b/", "b", false),
            ("/a/b/.", "/a/b/.", "/a/b/", "b", true),
            ("/a/../b.", "/b.", "/b.", "b.", false),
            ("/", "/.", "/", "", true),
            ("", "/.", "/", "", true),
        ] {
            let r = Remote::of(source);
            let found = (r.path.as_str(), r.whole.as_str(), r.name.as_str(), r.contents);
            assert_eq!(found, (path, whole, name, contents), "{source}");
        }
    }

    #[test]
    fn a_place_is_found_by_what_this_host_has() {
        let dir = std::env::temp_dir().join(format!("vmcache-out-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("d/taken")).unwrap();
        fs::write(dir.join("f"), "").unwrap();
        fs::write(dir.join("d/file"), "").unwrap();
        symlink("d", dir.join("to-directory")).unwrap();
        symlink("f", dir.join("to-file")).unwrap();
        symlink("later", dir.join("dangling")).unwrap();
        symlink("loop", dir.join("loop")).unwrap();
        let find = |source: &str, target: &str| {
            let place = Place::find(&dir.join(target), &Remote::of(source))
                .map_err(|e| crate::report::chain(&e))?;
            let name = place.called.map(|n| n.to_string_lossy().into_owned());
            Ok::<_, String>((place.directory, name, place.allowed))
        };
        use Allowed::{Any, Directory, NotDirectory};
        for (source, target, directory, called, allowed) in [
            ("/x", "d", "d", None, Any),
            ("/x", "d/", "d", None, Any),
            ("/x", "to-directory", "to-directory", None, Any),
            ("/x/.", "d", "d", None, Any),
            ("/file", "d", "d", None, NotDirectory),
            ("/taken", "d", "d", None, Any),
            ("/x", "f", "", Some("f"), NotDirectory),
            ("/x", "to-file", "", Some("f"), NotDirectory),
            ("/x", "dangling", "", Some("later"), Any),
            ("/x", "new", "", Some("new"), Any),
            ("/x", "new/", "", Some("new"), Directory),
            ("/x/.", "new", "", Some("new"), Any),
            ("/x/.", "new/.", "", Some("new"), Directory),
        ] {
            let want = (dir.join(directory), called.map(String::from), allowed);
            assert_eq!(find(source, target), Ok(want), "{source} to {target}");
        }
        for (source, target, why) in [
            ("/x", "f/", "Not a directory"),
            ("/x", "no/new", "No such file"),
            ("/x", "f/new", "Not a directory"),
            ("/x/.", "f", "cannot be copied onto"),
            ("/x", "loop", "os error 40"),
        ] {
            let e = find(source, target).unwrap_err();
            assert!(e.contains(why) && e.contains("copy to"), "{source} to {target}: {e}");
        }
        if geteuid().is_root() {
            // Somebody waits for root to write to a name of theirs.
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o1777)).unwrap();
            lchown(dir.join("to-file"), Some(4321), Some(4321)).unwrap();
            let e = find("/x", "to-file").unwrap_err();
            assert!(e.contains("another user's") || e.contains("os error 13"), "{e}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
