//! The ledger: what is on disk about a VM, so that a crash forgets none.
//!
//! One file `vm.json` in each VM's directory, replaced whole (written beside,
//! renamed) at every change of state. A state is written before what it
//! announces happens.
//!
//! One change must cost next to nothing, since a client waits for it: that a
//! ready VM is being handed to somebody. For it a file `claim` stands open and
//! empty, into which one write puts the owner ([`ClaimNote`]); a ready VM with
//! a note is being handed out. A process that is killed has written it whole or
//! not at all; after a crash of the host there are no VMs.

use std::fs;
use std::io;
use std::path::Path;

use serde_derive::{Deserialize, Serialize};

use super::{notes, private};
use crate::agent::Kind;
use crate::process::attendant::{Attendant, Record};
use crate::process::Process;
use crate::sys::process::{real_uid, start_time};

/// The file's name.
pub const FILE: &str = "vm.json";
/// The note's name.
const NOTE: &str = "claim";
/// Largest claim note, in bytes.
const MAX_NOTE: u64 = 256;
/// Largest file read, in bytes.
const MAX_FILE: u64 = 64 * 1024;

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// QEMU runs, the guest is not ready.
    Booting,
    /// In the pool.
    Ready,
    /// Being given to a claim.
    Handing,
    /// A client's.
    Handed,
}

impl State {
    /// Its name in status and ledger.
    pub fn name(self) -> &'static str {
        match self {
            State::Booting => "booting",
            State::Ready => "ready",
            State::Handing => "handing",
            State::Handed => "handed",
        }
    }
}

/// A process that claimed a VM: pid and start time, which name it for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Its pid.
    pub pid: i32,
    /// Its start time, clock ticks after boot.
    pub start_time: u64,
    /// Its user.
    pub uid: u32,
    /// Whether the VM ends when this process does.
    pub lease: bool,
    /// Whether it has yet to say that it has the VM; until then, it is as a lease.
    #[serde(default)]
    pub unconfirmed: bool,
}

impl Owner {
    /// The process that asks.
    pub fn this_process(lease: bool) -> Owner {
        let pid = std::process::id() as i32;
        let start_time = start_time(pid).unwrap_or(0);
        Owner { pid, start_time, uid: nix::unistd::geteuid().as_raw(), lease, unconfirmed: false }
    }

    /// Whether it still runs.
    pub fn runs(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// The VM's id.
    pub id: String,
    /// Where it is in its life.
    pub state: State,
    /// QEMU's pid; 0 before it was started.
    pub pid: i32,
    /// QEMU's start time, clock ticks after boot.
    pub start_time: u64,
    /// Machine UUID.
    pub uuid: String,
    /// `direct` or `template`.
    pub source: String,
    /// CPUs.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Socket of the server whose pool it was made for; empty for a VM that a
    /// client booted itself.
    pub endpoint: String,
    /// When it was made, seconds since the epoch.
    pub created: u64,
    /// Who claimed it.
    pub owner: Option<Owner>,
    /// What its claimer calls it.
    #[serde(default)]
    pub label: String,
    /// Which agent its guest has.
    #[serde(default)]
    pub agent: Kind,
    /// Its guest's vsock address, when it has one.
    #[serde(default)]
    pub cid: Option<u32>,
    /// Where its agent is; empty in ledgers of versions that did not say.
    #[serde(default)]
    pub agent_url: String,
    /// Whether the agent is vmcache's own.
    #[serde(default = "yes")]
    pub own_agent: bool,
    /// Processes that serve it beside QEMU.
    #[serde(default)]
    pub attendants: Vec<Record>,
    /// What it was made from ([`crate::vm::shape`]).
    #[serde(default)]
    pub shape: String,
    /// What clients and servers reckon with ([`crate::vm::shape::build`]).
    #[serde(default)]
    pub build: String,
    /// Who has written it, if that is neither root nor this process's user: what it names has
    /// to be that user's.
    #[serde(skip)]
    pub by: Option<u32>,
}

fn yes() -> bool {
    true
}

impl Ledger {
    /// Writes it into a VM's directory.
    ///
    /// # Errors
    /// As the file system's.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec(self).map_err(io::Error::other)?;
        private::replace(dir, FILE, &bytes)
    }

    /// Records that the VM is larger now, in a note of its own: the server writes the ledger,
    /// perhaps at the same time.
    ///
    /// # Errors
    /// As [`notes::write`]; the old size then stands.
    pub fn resize(&mut self, dir: &Path, cpus: u32, memory_mib: u32) -> io::Result<()> {
        let text = format!("{cpus} {memory_mib}\n");
        notes::write(dir, &self.endpoint, notes::Kind::Size, text.as_bytes())?;
        (self.cpus, self.memory_mib) = (cpus, memory_mib);
        Ok(())
    }

    /// Reads a VM's directory.
    ///
    /// # Errors
    /// When there is no ledger, or it is damaged.
    pub fn read(dir: &Path) -> io::Result<Ledger> {
        let (bytes, uid) = private::read(dir, FILE, MAX_FILE)?;
        let mut ledger: Ledger = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
        ledger.by = named_by(uid);
        ledger.attendants.iter_mut().for_each(|r| r.uid = r.uid.or(ledger.by));
        let others = |by| real_uid(ledger.pid).is_some_and(|owner| owner != by);
        if ledger.pid != 0 && ledger.by.is_some_and(others) {
            let text = format!("uid {uid} wrote it, and pid {} is not that user's", ledger.pid);
            return Err(io::Error::other(text));
        }
        ledger.attendants.extend(read_served(dir));
        if let Some((cpus, memory)) = read_size(dir) {
            (ledger.cpus, ledger.memory_mib) = (cpus, memory);
        }
        if ledger.state == State::Ready {
            if let Some(owner) = ClaimNote::read(dir) {
                (ledger.state, ledger.owner) = (State::Handing, Some(owner));
            }
        }
        if dir.file_name().is_none_or(|n| n != ledger.id.as_str()) {
            return Err(io::Error::other(format!("it is the ledger of VM {:?}", ledger.id)));
        }
        Ok(ledger)
    }

    /// Records that a process serves the VM that was not there when it was made.
    ///
    /// # Errors
    /// As [`notes::write`].
    pub fn serve(&mut self, dir: &Path, record: Record) -> io::Result<()> {
        let mut all = read_served(dir);
        all.retain(|r| start_time(r.pid) == Some(r.start_time));
        all.push(record);
        let text = serde_json::to_vec(&all).map_err(io::Error::other)?;
        notes::write(dir, &self.endpoint, notes::Kind::Served, &text)?;
        self.attendants.push(record);
        Ok(())
    }

    /// Its QEMU, if that runs; whoever calls this owns it.
    ///
    /// # Errors
    /// As [`Process::adopt_of`].
    pub fn adopt_qemu(&self) -> io::Result<Process> {
        Process::adopt_of(self.pid, self.start_time, self.by)
    }

    /// Those of its attendants that run; whoever calls this owns them.
    pub fn adopt_attendants(&self) -> Vec<Attendant> {
        self.attendants.iter().filter_map(Attendant::adopt).collect()
    }

    /// All VMs with a ledger below a store, by directory; damaged ones are left out, and
    /// those whose directories have no name yet.
    pub fn all(store: &Path) -> Vec<(std::path::PathBuf, Ledger)> {
        let entries = fs::read_dir(store).into_iter().flatten().flatten();
        let entries = entries.filter(|e| !e.file_name().as_encoded_bytes().starts_with(b"."));
        let mut found: Vec<_> =
            entries.filter_map(|e| Ledger::read(&e.path()).ok().map(|l| (e.path(), l))).collect();
        found.sort_by_key(|(_, l)| (l.created, l.pid));
        found
    }
}

/// Whose the processes have to be that a file of this user's names: nobody has others' ended
/// by naming them.
fn named_by(uid: u32) -> Option<u32> {
    Some(uid).filter(|uid| *uid != 0 && *uid != nix::unistd::geteuid().as_raw())
}

fn read_served(dir: &Path) -> Vec<Record> {
    let Some((bytes, uid)) = notes::read(dir, notes::Kind::Served) else { return Vec::new() };
    let mut all: Vec<Record> = serde_json::from_slice(&bytes).unwrap_or_default();
    all.iter_mut().for_each(|r| r.uid = r.uid.or(named_by(uid)));
    all
}

fn read_size(dir: &Path) -> Option<(u32, u32)> {
    let (bytes, _) = notes::read(dir, notes::Kind::Size)?;
    notes::size(&bytes)
}

/// The open file that records, in one write, to whom a ready VM is being handed.
#[derive(Debug)]
pub struct ClaimNote(fs::File);

impl ClaimNote {
    /// Opens it, empty, in a VM's directory.
    ///
    /// # Errors
    /// As the file system's.
    pub fn open(dir: &Path) -> io::Result<ClaimNote> {
        private::create(dir, NOTE).map(ClaimNote)
    }

    /// Writes the owner.
    ///
    /// # Errors
    /// As the file system's; nobody is the owner then.
    pub fn write(&self, owner: &Owner) -> io::Result<()> {
        let Owner { pid, start_time, uid, lease, unconfirmed } = owner;
        let flags = u8::from(*lease) | u8::from(*unconfirmed) << 1;
        let line = format!("{pid} {start_time} {uid} {flags}\n");
        io::Write::write_all(&mut &self.0, line.as_bytes())
    }

    /// Takes back what was written of an owner, when that failed.
    ///
    /// # Errors
    /// As the file system's; what the note says is not known then.
    pub fn clear(&self) -> io::Result<()> {
        self.0.set_len(0)?;
        io::Seek::rewind(&mut &self.0)
    }

    /// The owner that stands in a VM's directory; `None` when there is none.
    fn read(dir: &Path) -> Option<Owner> {
        let (bytes, _) = private::read(dir, NOTE, MAX_NOTE).ok()?;
        let text = String::from_utf8(bytes).ok()?;
        let mut words = text.strip_suffix('\n')?.split(' ');
        let (pid, start_time) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let (uid, flags) = (words.next()?.parse().ok()?, words.next()?.parse::<u8>().ok()?);
        let (lease, unconfirmed) = (flags & 1 != 0, flags & 2 != 0);
        words.next().is_none().then_some(Owner { pid, start_time, uid, lease, unconfirmed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::attendant::Role;

    #[test]
    fn a_ledger_comes_back_and_a_damaged_one_is_refused() {
        let dir = std::env::temp_dir().join(format!("vmcache-ledger-{}", std::process::id()));
        let vm = dir.join("a");
        fs::create_dir_all(&vm).unwrap();
        let ledger = Ledger {
            id: "a".into(),
            state: State::Ready,
            pid: 1,
            start_time: 2,
            uuid: "u".into(),
            source: "direct".into(),
            cpus: 1,
            memory_mib: 64,
            endpoint: "/e".into(),
            created: 3,
            owner: Some(Owner { pid: 4, start_time: 5, uid: 6, lease: true, unconfirmed: false }),
            label: "l".into(),
            agent: Kind::Kata,
            cid: Some(7),
            agent_url: "vsock://7:1024".into(),
            own_agent: true,
            attendants: vec![Record { role: Role::Proxy, pid: 8, start_time: 9, uid: None }],
            shape: "s".into(),
            build: "b".into(),
            by: None,
        };
        ledger.write(&vm).unwrap();
        assert_eq!(Ledger::read(&vm).unwrap(), ledger);
        assert_eq!(Ledger::all(&dir).len(), 1);
        let note = ClaimNote::open(&vm).unwrap();
        assert_eq!(Ledger::read(&vm).unwrap().state, State::Ready);
        let owner = Owner { pid: 7, start_time: 8, uid: 9, lease: false, unconfirmed: true };
        note.write(&owner).unwrap();
        let read = Ledger::read(&vm).unwrap();
        assert_eq!((read.state, read.owner), (State::Handing, Some(owner)));
        let mut mine = Ledger::read(&vm).unwrap();
        mine.serve(&vm, Record { role: Role::Virtiofsd, pid: 10, start_time: 11, uid: None })
            .unwrap();
        mine.resize(&vm, 3, 768).unwrap();
        // The server's own copy knows nothing of it, and takes nothing back.
        ledger.write(&vm).unwrap();
        let read = Ledger::read(&vm).unwrap();
        assert_eq!((read.cpus, read.memory_mib), (3, 768));
        assert_eq!(read.attendants.iter().map(|a| a.pid).collect::<Vec<_>>(), [8, 10]);
        fs::rename(&vm, dir.join("b")).unwrap();
        assert!(Ledger::read(&dir.join("b")).is_err());
        fs::write(dir.join("b").join(FILE), b"{").unwrap();
        assert!(Ledger::all(&dir).is_empty());
        fs::remove_dir_all(&dir).unwrap();
    }
}
