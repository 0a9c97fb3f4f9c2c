//! What the owner of a VM notes about it, for its other commands and for the next server: small
//! files in the VM's directory.
//!
//! Who may write there writes them; any other owner asks the server to, who looks at them
//! first ([`Kind::check`]). So nobody but the server and root fills the host's memory with
//! files, or puts words into the server's mouth.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use grpcio::{CallOption, ChannelBuilder, EnvBuilder};
use nix::unistd::geteuid;

use super::private;
use crate::process::attendant::Record;
use crate::proto::control::note_request;
use crate::proto::control::NoteRequest;
use crate::proto::control_grpc::ControlClient;
use crate::sys::process::{real_uid, start_time};
use crate::sys::rpc::channel_over;

/// Longest note, in bytes.
pub const LONGEST: usize = 4096;
/// Most processes that an owner may have beside a VM's QEMU.
const MAX_SERVED: usize = 16;
/// Deadline of the call.
const CALL: Duration = Duration::from_secs(10);
/// The server's own note of what was claimed.
const CLAIMED: &str = "claimed";
/// Where the owners of VMs of vmcache 0.1.0 wrote them themselves.
const OWNERS: &str = "client";

/// What a note is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The container that later commands join.
    Workload,
    /// What the VM has grown to.
    Size,
    /// Processes that its owner has started to serve it.
    Served,
}

impl Kind {
    /// The file's name.
    pub fn file(self) -> &'static str {
        match self {
            Kind::Workload => "workload.json",
            Kind::Size => "size",
            Kind::Served => "served",
        }
    }

    fn on_wire(self) -> note_request::Kind {
        match self {
            Kind::Workload => note_request::Kind::WORKLOAD,
            Kind::Size => note_request::Kind::SIZE,
            Kind::Served => note_request::Kind::SERVED,
        }
    }

    /// From the wire; `None` of a version that knows more.
    pub fn of(kind: protobuf::EnumOrUnknown<note_request::Kind>) -> Option<Kind> {
        kind.enum_value().ok().map(|kind| match kind {
            note_request::Kind::WORKLOAD => Kind::Workload,
            note_request::Kind::SIZE => Kind::Size,
            note_request::Kind::SERVED => Kind::Served,
        })
    }

    /// What is noted when an owner of this uid asks for it: processes are noted with their user.
    ///
    /// # Errors
    /// A sentence.
    pub fn check(self, text: &[u8], uid: u32) -> Result<Vec<u8>, String> {
        if text.len() > LONGEST {
            return Err(format!("a note of {} bytes, over {LONGEST}", text.len()));
        }
        match self {
            Kind::Workload => serde_json::from_slice::<serde_json::Map<_, _>>(text)
                .map(|_| text.to_vec())
                .map_err(|e| format!("a note of a workload that is no JSON object: {e}")),
            Kind::Size => {
                size(text).map(|_| text.to_vec()).ok_or_else(|| "a size that is no size".into())
            }
            Kind::Served => {
                let mut all: Vec<Record> = serde_json::from_slice(text)
                    .map_err(|e| format!("a note of processes that is none: {e}"))?;
                if all.len() > MAX_SERVED {
                    return Err(format!("{} processes, over {MAX_SERVED}", all.len()));
                }
                for record in &mut all {
                    if !is_users(record, uid) {
                        let text =
                            format!("process {} has ended, or is not uid {uid}'s", record.pid);
                        return Err(text);
                    }
                    record.uid = Some(uid).filter(|uid| *uid != 0);
                }
                serde_json::to_vec(&all).map_err(|e| e.to_string())
            }
        }
    }
}

/// CPUs and MiB.
pub fn size(text: &[u8]) -> Option<(u32, u32)> {
    let (cpus, memory) = std::str::from_utf8(text).ok()?.trim_end().split_once(' ')?;
    Some((cpus.parse().ok()?, memory.parse().ok()?))
}

/// Whether a process runs and is this user's: nobody has others' ended by naming them, nor
/// those that are still to come.
fn is_users(record: &Record, uid: u32) -> bool {
    let runs = || start_time(record.pid) == Some(record.start_time);
    // The pid is still its own when it runs after its user was read.
    runs() && (uid == 0 || real_uid(record.pid) == Some(uid)) && runs()
}

/// Notes what a VM may have grown to, MiB, by its claim: what its owner says of its size is
/// believed only when that is more.
///
/// # Errors
/// As the file system's.
pub fn claimed(dir: &Path, memory_mib: u32) -> io::Result<()> {
    private::replace(dir, CLAIMED, memory_mib.to_string().as_bytes())
}

/// What was noted so; `None` for a VM that was claimed as it was.
pub fn claimed_memory(dir: &Path) -> Option<u32> {
    let (text, _) = private::read(dir, CLAIMED, LONGEST as u64).ok()?;
    std::str::from_utf8(&text).ok()?.parse().ok()
}

/// What is noted in a VM's directory; `None` when nothing is that can be trusted.
pub fn read(dir: &Path, kind: Kind) -> Option<(Vec<u8>, u32)> {
    let owners = dir.join(OWNERS);
    let own = fs::symlink_metadata(&owners).is_ok_and(|m| m.is_dir());
    let theirs = own.then(|| private::read(&owners, kind.file(), LONGEST as u64).ok()).flatten();
    theirs.or_else(|| private::read(dir, kind.file(), LONGEST as u64).ok())
}

/// Notes something about a VM of this process's; `endpoint` is its server's socket, empty
/// where it has none.
///
/// # Errors
/// As the file system's, or the server's refusal.
pub fn write(dir: &Path, endpoint: &str, kind: Kind, text: &[u8]) -> io::Result<()> {
    let owner = fs::symlink_metadata(dir)?.uid();
    let own = owner == geteuid().as_raw() || geteuid().is_root();
    let owners = dir.join(OWNERS);
    if !own && fs::symlink_metadata(&owners).is_ok_and(|m| m.is_dir()) {
        return private::replace(&owners, kind.file(), text);
    }
    match own || endpoint.is_empty() {
        true => private::replace(dir, kind.file(), text),
        false => tell(Path::new(endpoint), dir, kind, text),
    }
}

fn tell(endpoint: &Path, dir: &Path, kind: Kind, text: &[u8]) -> io::Result<()> {
    let failed = |what: &dyn std::fmt::Display| {
        let text = format!("have the server at {} note it: {what}", endpoint.display());
        io::Error::other(text)
    };
    let stream = UnixStream::connect(endpoint).map_err(|e| failed(&e))?;
    let environment = Arc::new(EnvBuilder::new().cq_count(1).name_prefix("vmc-rpc").build());
    let builder = ChannelBuilder::new(Arc::clone(&environment)).http2_bdp_probe(false);
    let client = ControlClient::new(channel_over(builder, "vmcache", stream)?);
    let request = NoteRequest {
        id: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        kind: kind.on_wire().into(),
        text: text.to_vec(),
        ..NoteRequest::default()
    };
    let told = client.note_opt(&request, CallOption::default().timeout(CALL));
    drop(client);
    match told {
        Ok(_) => Ok(()),
        Err(grpcio::Error::RpcFailure(status)) => Err(failed(&status.message())),
        Err(e) => Err(failed(&e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::attendant::Role;

    #[test]
    fn what_an_owner_has_noted_is_looked_at() {
        let pid = std::process::id() as i32;
        let record = |pid, start_time| {
            let record = Record { role: Role::Virtiofsd, pid, start_time, uid: None };
            serde_json::to_vec(&vec![record]).unwrap()
        };
        let own = nix::unistd::geteuid().as_raw();
        let mine = record(pid, start_time(pid).unwrap());
        for (kind, text, uid, good) in [
            (Kind::Size, b"3 768\n".to_vec(), 7, true),
            (Kind::Size, b"3 768 9\n".to_vec(), 7, false),
            (Kind::Size, b"-3 768".to_vec(), 7, false),
            (Kind::Workload, b"{\"container\":\"main\"}".to_vec(), 7, true),
            (Kind::Workload, b"[]".to_vec(), 7, false),
            (Kind::Workload, format!("{{\"a\":\"{}\"}}", "x".repeat(LONGEST)).into(), 7, false),
            (Kind::Served, b"[]".to_vec(), 7, true),
            (Kind::Served, mine.clone(), own, true),
            (Kind::Served, mine, own + 1, false),
            (Kind::Served, record(1, start_time(1).unwrap()), own + 1, false),
            // Some other process has that pid now.
            (Kind::Served, record(1, 0), own + 1, false),
            // Nobody has it yet.
            (Kind::Served, record(i32::MAX, 7), own + 1, false),
            (Kind::Served, record(i32::MAX, 7), own, false),
            (Kind::Served, b"{".to_vec(), own, false),
        ] {
            let told = kind.check(&text, uid);
            assert_eq!(
                told.is_ok(),
                good,
                "{kind:?} {:?} {told:?}",
                String::from_utf8_lossy(&text)
            );
        }
    }
}
