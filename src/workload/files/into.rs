//! Into a guest: a root file system, a file or directory by docker cp's rules, a tar stream.
//!
//! What is to come is measured before (`tree::measure`), and the guest's side compares that
//! with the room that it has before it reads anything: an error of that says sizes and what
//! to do.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::super::{stock, Command, Error, Guest, GUEST_ROOT};
use super::side::{Ended, Side};
use super::AGENT;
use crate::tree::compressed::plain;
use crate::tree::measure::{measure, measure_tar, Needs};
use crate::tree::naming::{from_hex, from_root, split, to_hex, without_ending, Ending, Source};
use crate::tree::{self, Sockets, Stop, NEEDS};

/// Brings a root file system into the guest, from a directory or a tar file.
///
/// # Errors
/// When files cannot be read here or written there, or do not fit ([`Error::Full`]).
pub fn send_root(guest: &Guest, source: &Path) -> Result<(), Error> {
    if !guest.vm().own_agent() {
        return stock::send_root(guest, source);
    }
    let reads = |e| failed("read", source, e);
    let meta = fs::metadata(source).map_err(reads)?;
    let directory = meta.is_dir();
    let archive = || plain(File::open(source).map_err(reads)?).map_err(reads);
    let needs = match directory {
        true => Some(measure(source, false)),
        // What can be read once only is not looked at before.
        false if !meta.is_file() => None,
        false => {
            let (needs, layers) = measure_tar(&mut archive()?)
                .map_err(|e| Error::Copy { text: format!("{}: {e}", source.display()) })?;
            if layers {
                let text = format!(
                    "{} is an archive of `docker save`, whose files are an image's layers: \
                     `docker export` a container of that image, and take what that writes",
                    source.display()
                );
                return Err(Error::Copy { text });
            }
            Some(needs)
        }
    };
    let mut command = Command::new(AGENT).arg("unpack").arg(GUEST_ROOT);
    if let Some(needs) = needs {
        command = command.env(NEEDS, &needs.text());
    }
    let side = Side::start(guest, &command)?;
    let ended = side.feed(&Stop::default(), &mut |out| {
        if directory {
            let packed = tree::pack_root(source, Sockets::Skip, out);
            if let Some(text) = packed.map_err(Error::Tree)?.complaint() {
                log::warn!("{text}");
            }
            return Ok(());
        }
        let sends = |e| failed("send", source, e);
        io::copy(&mut archive()?, out).map(|_| ()).map_err(sends)
    })?;
    result(guest, ended, needs)
}

/// Copies a file or directory of this host into the workload's root, by docker cp's rules;
/// a link that is `source` itself is followed when `follow` says so.
///
/// # Errors
/// As [`send_root`]; [`Error::Interrupted`].
pub fn copy_in(
    guest: &Guest,
    source: &Path,
    target: &str,
    follow: bool,
    stop: &Stop,
) -> Result<(), Error> {
    let local = Local::find(source, follow)?;
    let needs = measure(&local.path, local.kind != Source::Contents);
    let mut side = Side::start(guest, &put(guest, target, local.kind, &local.name, Some(needs)))?;
    let (mut grown, mut answer) = (None, None);
    let ended = match place(&mut side) {
        None => side.finish(false),
        Some(called) => {
            answer = Some(());
            let name = match (called, local.kind) {
                (Some(called), _) => called,
                (None, Source::Contents) => OsString::new(),
                (None, _) => local.name,
            };
            side.feed(stop, &mut |out| {
                let packed = tree::pack(&local.path, Path::new(&name), Sockets::Skip, out);
                grown = packed.map_err(Error::Tree)?.complaint();
                Ok(())
            })
        }
    };
    stop.check().map_err(|_| Error::Interrupted)?;
    answered(guest, ended?, answer, Some(needs))?;
    match grown {
        None => Ok(()),
        Some(text) => Err(Error::Copy { text }),
    }
}

/// Unpacks a tar stream in a directory of the workload's root, which must be there.
///
/// # Errors
/// As [`copy_in`].
pub fn stream_in(
    guest: &Guest,
    stream: &mut dyn Read,
    target: &str,
    stop: &Stop,
) -> Result<(), Error> {
    let nobody_knows = Some(Needs::default());
    let command = put(guest, target, Source::Archive, OsStr::new("-"), nobody_knows);
    let mut side = Side::start(guest, &command)?;
    let mut answer = None;
    let ended = match place(&mut side) {
        None => side.finish(false),
        Some(_) => {
            answer = Some(());
            side.feed(stop, &mut |out| {
                let mut chunk = vec![0; super::super::running::CHUNK];
                let reads = |e| failed("read", Path::new("the tar stream"), e);
                let mut stream = plain(&mut *stream).map_err(reads)?;
                loop {
                    match stream.read(&mut chunk).map_err(reads)? {
                        0 => return Ok(()),
                        n => out
                            .write_all(&chunk[..n])
                            .map_err(|e| failed("send", Path::new("the tar stream"), e))?,
                    }
                }
            })
        }
    };
    stop.check().map_err(|_| Error::Interrupted)?;
    answered(guest, ended?, answer, None)
}

fn failed(during: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io { during, path: path.into(), source }
}

/// The guest's side of a copy into it.
fn put(guest: &Guest, target: &str, kind: Source, name: &OsStr, needs: Option<Needs>) -> Command {
    let command = Command::new(AGENT).arg("put").arg(guest.root()).arg(from_root(target));
    let command = command.arg(kind.name()).arg(to_hex(name));
    match needs {
        Some(needs) => command.env(NEEDS, &needs.text()),
        None => command,
    }
}

/// What the guest's side says of where it goes: `None` when it does not want it,
/// `Some(None)` into a directory, else by that name.
#[allow(clippy::option_option)]
fn place(side: &mut Side<'_>) -> Option<Option<OsString>> {
    let answer = side.answer()?;
    match answer.split_once(' ') {
        None if answer == "into" => Some(None),
        // A guest's word, for a stream that the guest alone reads.
        Some(("as", digits)) => from_hex(digits).map(Some),
        _ => None,
    }
}

fn answered(
    guest: &Guest,
    ended: Ended,
    answer: Option<()>,
    needs: Option<Needs>,
) -> Result<(), Error> {
    let well = ended.code == 0;
    result(guest, ended, needs)?;
    match (well, answer) {
        (true, None) => Err(Error::Copy {
            text: "the guest's side did not say where the copy goes, and ended: its agent is of \
                   another version than this vmcache"
                .into(),
        }),
        _ => Ok(()),
    }
}

fn result(guest: &Guest, ended: Ended, needs: Option<Needs>) -> Result<(), Error> {
    let Ended { code, text, full } = ended;
    match (code, full) {
        (0, _) => {
            // Its side has told what was lost.
            Ok(())
        }
        (_, Some(full)) => {
            let needs = needs.filter(|n| *n != Needs::default());
            Err(Error::Full { text, needs, full, memory_mib: guest.vm().memory_mib() })
        }
        (_, None) => Err(Error::Copy { text }),
    }
}

/// What is to be copied, as it is on this host.
struct Local {
    path: PathBuf,
    kind: Source,
    name: OsString,
}

impl Local {
    fn find(source: &Path, follow: bool) -> Result<Local, Error> {
        let copies = |e| failed("copy", source, e);
        let ending = Ending::of(source.as_os_str());
        let follow = follow || ending.is_directory();
        let meta = match follow {
            true => fs::metadata(source),
            false => fs::symlink_metadata(source),
        };
        let directory = meta.map_err(copies)?.is_dir();
        let plain = Path::new(without_ending(source.as_os_str()));
        // "..", "." and "/" have no name of their own.
        let named = split(plain);
        let path = match (&named, follow) {
            (Some((parent, base)), false) => parent.canonicalize().map_err(copies)?.join(base),
            _ => source.canonicalize().map_err(copies)?,
        };
        let name = named.map(|(_, base)| base).or_else(|| path.file_name().map(OsStr::to_owned));
        let kind = match (ending, directory) {
            (Ending::Dot, _) => Source::Contents,
            (_, true) if name.is_none() => Source::Contents,
            (_, true) => Source::Directory,
            _ => Source::File,
        };
        Ok(Local { path, kind, name: name.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_source_has_the_name_that_it_was_given() {
        let dir = std::env::temp_dir().join(format!("vmcache-into-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("d")).unwrap();
        fs::write(dir.join("f"), "").unwrap();
        symlink("f", dir.join("to-file")).unwrap();
        symlink("d", dir.join("to-directory")).unwrap();
        let dir = dir.canonicalize().unwrap();
        use Source::{Contents, Directory, File};
        for (source, follow, path, kind, name) in [
            ("f", false, "f", File, "f"),
            ("d", false, "d", Directory, "d"),
            ("d/", false, "d", Directory, "d"),
            ("d/.", false, "d", Contents, "d"),
            // A link keeps its own name, followed or not.
            ("to-file", false, "to-file", File, "to-file"),
            ("to-file", true, "f", File, "to-file"),
            ("to-directory", false, "to-directory", File, "to-directory"),
            ("to-directory", true, "d", Directory, "to-directory"),
            ("to-directory/", false, "d", Directory, "to-directory"),
            ("to-directory/.", false, "d", Contents, "to-directory"),
            ("d/../d", false, "d", Directory, "d"),
        ] {
            let local = Local::find(&dir.join(source), follow).unwrap();
            let found = (local.path, local.kind, local.name);
            assert_eq!(found, (dir.join(path), kind, name.into()), "{source} {follow}");
        }
        let up = Local::find(&dir.join("d/.."), false).unwrap();
        assert_eq!((up.path.as_path(), up.kind), (dir.as_path(), Directory));
        assert_eq!(Local::find(Path::new("/"), false).unwrap().kind, Contents);
        for (source, why) in [("f/", "Not a directory"), ("nothing", "No such file")] {
            let e = Local::find(&dir.join(source), false).err().unwrap();
            assert!(crate::report::chain(&e).contains(why), "{source}: {e}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
