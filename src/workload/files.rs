//! Files into a guest and out of it, as tar streams through its agent's own
//! `unpack` and `pack`.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use super::running::CHUNK;
use super::{stock, Command, Error, Guest, Running, GUEST_ROOT};
use crate::tree;
use crate::vm::identity;
use crate::worker::Worker;

/// The agent in its own guest.
pub(super) const AGENT: &str = "/sbin/vmcache-agent";
/// Most bytes of the guest's complaint that are kept.
const COMPLAINT: u64 = 4096;
/// How long the reader of that complaint may take once its writer has ended.
const JOIN: std::time::Duration = std::time::Duration::from_secs(10);

/// Brings a root file system into the guest, from a directory or a tar file.
///
/// # Errors
/// When files can not be read here or written there.
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
            return tree::pack(source, Path::new(""), out).map_err(Error::Tree);
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
/// As [`send_root`].
pub fn copy_in(guest: &Guest, source: &Path, directory: &str, name: &Path) -> Result<(), Error> {
    send(guest, directory, &mut |out| tree::pack(source, name, out).map_err(Error::Tree))
}

/// Copies a file or directory of the guest into a directory of this host.
/// Names that would leave it are refused.
///
/// # Errors
/// As [`send_root`].
pub fn copy_out(guest: &Guest, source: &str, target: &Path) -> Result<(), Error> {
    let command = Command::new(AGENT).arg("pack").arg(source);
    let (running, name) = start(guest, &command)?;
    let complaint = complaints(&running)?;
    drop(running.stdin());
    let owners = nix::unistd::geteuid().is_root();
    let unpacked = tree::unpack(&mut running.stdout(), target, owners);
    if unpacked.is_err() {
        let _ = running.signal(9);
    }
    let guest_side = finish(guest, &running, &name, complaint);
    // What the guest says is the cause when both failed.
    guest_side?;
    unpacked.map_err(Error::Tree)
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

fn complaints(running: &Running) -> Result<Worker<String>, Error> {
    let mut stderr = running.stderr();
    Worker::spawn("vmc-stderr", move || {
        let mut text = Vec::new();
        let _ = (&mut stderr).take(COMPLAINT).read_to_end(&mut text);
        while stderr.next_chunk().is_ok_and(|c| !c.is_empty()) {}
        String::from_utf8_lossy(&text).trim().to_string()
    })
    .map_err(|e| Error::Copy { text: e.to_string() })
}

fn finish(
    guest: &Guest,
    running: &Running,
    name: &str,
    complaint: Worker<String>,
) -> Result<(), Error> {
    let code = running.wait()?;
    let text = complaint.join(JOIN).unwrap_or_default();
    let _ = guest.remove(name);
    match code {
        0 => Ok(()),
        _ if text.is_empty() => {
            Err(Error::Copy { text: format!("the guest's side ended with code {code}") })
        }
        _ => Err(Error::Copy { text }),
    }
}

fn send(
    guest: &Guest,
    directory: &str,
    write: &mut dyn FnMut(&mut dyn Write) -> Result<(), Error>,
) -> Result<(), Error> {
    let command = Command::new(AGENT).arg("unpack").arg(directory);
    let (running, name) = start(guest, &command)?;
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
    let ended = finish(guest, &running, &name, complaint);
    match (flushed, ended) {
        (Ok(()), ended) => ended,
        // A broken pipe here is the guest's refusal there.
        (Err(Error::Io { path, .. }), Err(e)) if path == Path::new("the guest") => Err(e),
        (Err(e), _) => Err(e),
    }
}
