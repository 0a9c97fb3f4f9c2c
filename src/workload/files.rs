//! Files into a guest and out of it, as tar streams through its agent's own
//! `unpack` and `pack`.
//!
//! Invariant: what comes out of a guest is written by `tree::extract`, which does not
//! trust it; a guest's side that does nothing any more is given up.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use crossbeam_channel::{bounded, Receiver};

use super::running::CHUNK;
use super::{stock, Command, Error, Guest, Running, GUEST_ROOT};
use crate::tree::{self, Extracted, Policy, Sockets, Stop, SKIP_SOCKETS};
use crate::vm::identity;
use crate::walls::Wall;
use crate::worker::Worker;

/// The agent in its own guest.
pub(super) const AGENT: &str = "/sbin/vmcache-agent";
/// Most bytes of the guest's complaint that are kept.
const COMPLAINT: u64 = 4096;
/// How long that complaint may take once its writer has ended.
const JOIN: Duration = Duration::from_secs(10);
/// How long the guest's side may do nothing: it reads or writes files of its own.
const STALLED: Duration = Duration::from_secs(120);
/// How long the guest's side may take to end once all bytes have gone.
const ENDING: Duration = Duration::from_secs(60);

/// What may come out of a guest.
#[derive(Clone, Debug)]
pub struct CopyPolicy {
    /// Owners, all modes, times, extended attributes, devices and FIFOs, too: for guests
    /// that are trusted, and for root only.
    pub archive: bool,
    /// Most bytes of all files together, holes included.
    pub max_bytes: u64,
    /// Most files, directories and links.
    pub max_entries: u64,
}

impl Default for CopyPolicy {
    fn default() -> CopyPolicy {
        let usual = Policy::of("");
        CopyPolicy { archive: false, max_bytes: usual.bytes, max_entries: usual.entries }
    }
}

/// Brings a root file system into the guest, from a directory or a tar file.
///
/// # Errors
/// When files cannot be read here or written there.
pub fn send_root(guest: &Guest, source: &Path) -> Result<(), Error> {
    if !guest.vm().own_agent() {
        return stock::send_root(guest, source);
    }
    send(guest, GUEST_ROOT, &mut |out| {
        let meta = std::fs::metadata(source).map_err(|e| Error::Io {
            during: "read",
            path: source.into(),
            source: e,
        })?;
        if meta.is_dir() {
            let packed = tree::pack(source, Path::new(""), Sockets::Skip, out);
            if let Some(text) = packed.map_err(Error::Tree)?.complaint() {
                log::warn!("{text}");
            }
            return Ok(());
        }
        let failed =
            |source_error| Error::Io { during: "send", path: source.into(), source: source_error };
        let mut file = File::open(source).map_err(failed)?;
        io::copy(&mut file, out).map(|_| ()).map_err(failed)
    })
}

/// Copies a file or directory of this host to a directory of the guest, under
/// `name`.
///
/// # Errors
/// As [`send_root`]; [`Error::Interrupted`].
pub fn copy_in(
    guest: &Guest,
    source: &Path,
    directory: &str,
    name: &Path,
    stop: &Stop,
) -> Result<(), Error> {
    let mut longer = None;
    let sent = send(guest, directory, &mut |out| {
        let mut out = Stoppable { out, stop };
        let packed = tree::pack(source, name, Sockets::Skip, &mut out).map_err(Error::Tree)?;
        longer = packed.complaint();
        Ok(())
    });
    stop.check().map_err(|_| Error::Interrupted)?;
    sent?;
    match longer {
        None => Ok(()),
        Some(text) => Err(Error::Copy { text }),
    }
}

/// A stream that ends when somebody asks for it.
struct Stoppable<'a> {
    out: &'a mut dyn Write,
    stop: &'a Stop,
}

impl Write for Stoppable<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stop.check().map_err(io::Error::other)?;
        self.out.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Copies a file or directory of the guest into a directory of this host, as `policy`
/// allows: see `tree::extract`.
///
/// # Errors
/// As [`send_root`]; [`Error::Interrupted`]. What came until then stays.
pub fn copy_out(
    guest: &Guest,
    source: &str,
    target: &Path,
    policy: &CopyPolicy,
    stop: &Stop,
) -> Result<Extracted, Error> {
    let base = Path::new(source).file_name();
    let base = base.ok_or_else(|| Error::Copy { text: format!("{source}: has no name") })?;
    let mut command = Command::new(AGENT).arg("pack").arg(source);
    if policy.archive {
        command = command.env(SKIP_SOCKETS, "1");
    }
    let (running, name) = start(guest, &command)?;
    let running = running.limited(STALLED);
    let complaint = complaints(&running)?;
    drop(running.stdin());
    let what = Policy {
        name: base.as_bytes().to_vec(),
        archive: policy.archive,
        bytes: policy.max_bytes,
        entries: policy.max_entries,
    };
    let extracted = match Wall::Copies.stands() {
        true => tree::extract(&mut running.stdout(), target, &what, stop),
        false => {
            let owners = nix::unistd::geteuid().is_root();
            tree::unpack(&mut running.stdout(), target, owners).map(|_| Extracted::default())
        }
    };
    if extracted.is_err() {
        let _ = running.signal(9);
    }
    let guest_side = finish(guest, &running, &name, &complaint);
    stop.check().map_err(|_| Error::Interrupted)?;
    match (extracted, guest_side) {
        // Given up, for one.
        (Err(tree::Error::Stream { .. }), Err(e)) => Err(e),
        // The stream broke off because of what the guest's side says, if it says something.
        (Err(tree::Error::Stream { .. }), Ok(Ended { text, .. })) if !text.is_empty() => {
            Err(Error::Copy { text })
        }
        (Err(e), _) => Err(Error::Tree(e)),
        (Ok(_), Err(e)) => Err(e),
        (Ok(extracted), Ok(ended)) => ended.result().map(|()| extracted),
    }
}

/// How the guest's side of a copy ended.
struct Ended {
    code: i32,
    text: String,
}

impl Ended {
    fn result(self) -> Result<(), Error> {
        match self.code {
            0 => {
                if !self.text.is_empty() {
                    log::warn!("the guest's side of the copy: {}", self.text);
                }
                Ok(())
            }
            code if self.text.is_empty() => {
                Err(Error::Copy { text: format!("the guest's side ended with code {code}") })
            }
            _ => Err(Error::Copy { text: self.text }),
        }
    }
}

fn start(guest: &Guest, command: &Command) -> Result<(Running, String), Error> {
    let fresh = identity::uuid().map_err(|source| Error::Io {
        during: "take",
        path: "random bytes".into(),
        source,
    })?;
    let name = format!("copy-{}", &fresh[..8]);
    // Always in the guest's own root: that is where the agent is.
    guest.launch_beside(command, &name).map(|running| (running, name))
}

/// What the guest's side complains of, once: when it ends, or has said enough.
fn complaints(running: &Running) -> Result<Receiver<String>, Error> {
    let mut stderr = running.stderr();
    let (tell, complaint) = bounded(1);
    Worker::spawn("vmc-stderr", move || {
        let mut text = Vec::new();
        let _ = (&mut stderr).take(COMPLAINT).read_to_end(&mut text);
        let _ = tell.send(String::from_utf8_lossy(&text).trim().to_string());
        // One that never ends holds up nobody but its writer.
        while stderr.next_chunk().is_ok_and(|c| !c.is_empty()) {}
    })
    .map(|_| complaint)
    .map_err(|e| Error::Copy { text: e.to_string() })
}

/// Waits for the end of the guest's side; one that does not end is killed.
fn finish(
    guest: &Guest,
    running: &Running,
    name: &str,
    complaint: &Receiver<String>,
) -> Result<Ended, Error> {
    let ended = running.wait_within(ENDING);
    if let (Err(_), None) = (&ended, running.given_up()) {
        let _ = running.signal(9);
    }
    let code = ended?;
    let text = complaint.recv_timeout(JOIN).unwrap_or_default();
    let _ = guest.remove(name);
    Ok(Ended { code, text })
}

fn send(
    guest: &Guest,
    directory: &str,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<(), Error>,
) -> Result<(), Error> {
    let command = Command::new(AGENT).arg("unpack").arg(directory);
    let (running, name) = start(guest, &command)?;
    let running = running.limited(STALLED);
    let complaint = complaints(&running)?;
    let mut out = BufWriter::with_capacity(CHUNK, running.stdin());
    let written = write(&mut out);
    let flushed = match written {
        Ok(()) => out.flush().map_err(|source| Error::Io {
            during: "write to",
            path: "the guest".into(),
            source,
        }),
        Err(e) => Err(e),
    };
    if flushed.is_err() {
        let _ = running.signal(9);
    }
    // Its drop closes the guest's standard input.
    drop(out.into_parts());
    let ended = finish(guest, &running, &name, &complaint).and_then(Ended::result);
    if let Some(why) = running.given_up() {
        return Err(why);
    }
    match (flushed, ended) {
        (Ok(()), ended) => ended,
        // A broken pipe here is the guest's refusal there.
        (Err(Error::Io { path, .. }), Err(e)) if path == Path::new("the guest") => Err(e),
        (Err(e), _) => Err(e),
    }
}
