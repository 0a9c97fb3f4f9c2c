//! What a server that was killed left behind, put in order by the next one.
//!
//! Of this endpoint's VMs, those that a client has are given back, so that the
//! new server follows them as the old one did: they end with the process that
//! leases them, and their directories go when they end. Those that stood ready are
//! given back, too, for the new pool ([`super::adopt`]). All others (half made, of
//! another size, or handed to a process that is gone before it can have
//! used them) are killed and their directories removed. Of other owners' VMs, only
//! directories of client-booted ones whose QEMU is gone are removed.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::adopt::{adopt, Age, Made};
use crate::agent::address::PROXY_SOCKET;
use crate::agent::kata::VHOST_SOCKET;
use crate::config::Config;
use crate::events::event;
use crate::factory::cache::pool::Ready;
use crate::hypervisor::qemu::argv::SHARED;
use crate::process::Process;
use crate::sys::process::start_time;
use crate::vm::dir::{self, VmDir};
use crate::vm::ledger::{Ledger, State};
use crate::vm::{wire, Vm};

/// After so many seconds a VM without a QEMU is nobody's: one is started at once.
const UNSTARTED: u64 = 60;

/// What is kept of what was found.
#[derive(Default)]
pub struct Kept {
    /// VMs that clients have.
    pub handed: Vec<Vm>,
    /// VMs that nobody has had.
    pub ready: Vec<Ready>,
    /// Likewise, made from an older configuration: to be replaced.
    pub outdated: Vec<Ready>,
}

/// Makes the store when it is missing, and sweeps it.
///
/// # Errors
/// When the store cannot be made or written, or is not only root's and this user's.
pub fn sweep(config: &Config) -> io::Result<Kept> {
    let (store, endpoint) = (&config.store(), config.endpoint());
    dir::make_store(store)?;
    nix::unistd::access(store, nix::unistd::AccessFlags::W_OK)?;
    let own = endpoint.display().to_string();
    let now = Made::of(config);
    let mut kept = Kept::default();
    dir::forsaken(store).iter().for_each(|path| drop(VmDir::adopt(path)));
    for (path, ledger) in Ledger::all(store) {
        let dead = !ledger.adopt_qemu().is_ok_and(|qemu| {
            let alive = qemu.alive();
            qemu.let_go();
            alive
        });
        if ledger.endpoint == own {
            if ledger.state == State::Ready && !dead {
                match adopt(&path, ledger.clone(), &now, config) {
                    Ok((ready, Age::Current)) => {
                        kept.ready.push(ready);
                        continue;
                    }
                    Ok((ready, Age::Outdated)) => {
                        kept.outdated.push(ready);
                        continue;
                    }
                    Err(why) => {
                        event!(RETIRED, vm = ledger.id, qemu = ledger.pid; "VM {} of the pool before: {why}", ledger.id)
                    }
                }
            }
            kept.handed.extend(settle(&path, ledger, dead));
        } else if ledger.endpoint.is_empty()
            && (dead && (ledger.pid != 0 || old(&ledger)) || forsaken(&ledger))
        {
            event!(SWEPT, vm = ledger.id; "VM {} was left by a client that was killed", ledger.id);
            match ledger.pid {
                0 => drop(unrecorded(&ledger.id)),
                pid => drop(Process::adopt(pid, ledger.start_time)),
            }
            drop(ledger.adopt_attendants());
            drop(unrecorded_attendants(&path));
            drop(VmDir::adopt(&path));
        }
    }
    Ok(kept)
}

/// Ends the VMs that a server has left to the next one, when there shall be none.
pub fn end_ready(config: &Config) {
    let own = config.endpoint().display().to_string();
    for (path, ledger) in Ledger::all(&config.store()) {
        if ledger.endpoint == own && ledger.state == State::Ready {
            drop(ledger.adopt_qemu());
            drop(ledger.adopt_attendants());
            drop(VmDir::adopt(&path));
        }
    }
}

/// Whether whoever leased it from nobody has gone: the kernel ends it then, but where its
/// program changed its label.
fn forsaken(ledger: &Ledger) -> bool {
    ledger.owner.is_some_and(|owner| owner.lease && !owner.runs())
}

/// Whether it was made so long ago that its QEMU, if there were one, had a pid by now.
fn old(ledger: &Ledger) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    now.saturating_sub(ledger.created) > UNSTARTED
}

/// The VM when a client has it; otherwise nothing of it stays.
fn settle(path: &Path, ledger: Ledger, dead: bool) -> Option<Vm> {
    let claimed = match (ledger.state, &ledger.owner) {
        (State::Handed, Some(owner)) if owner.lease || owner.unconfirmed => owner.runs(),
        (State::Handed, _) => true,
        // Its answer may have arrived; who is gone has no more use for it.
        (State::Handing, Some(owner)) => owner.runs(),
        _ => false,
    };
    let id = ledger.id.clone();
    let attendants = if dead { ledger.adopt_attendants() } else { Vec::new() };
    drop(attendants);
    if claimed && !dead {
        if let Ok(mut vm) = wire::from_directory(path, ledger) {
            event!(KEPT, vm = id, qemu = vm.pid(); "VM {id} (QEMU pid {}) is a client's", vm.pid());
            if vm.ledger().state != State::Handed {
                if let Err(e) = vm.record(|l| l.state = State::Handed) {
                    log::warn!("record that VM {id} was handed out: {e}");
                }
            }
            return Some(vm);
        }
        drop(Ledger::read(path).map(|ledger| ledger.adopt_attendants()));
        drop(unrecorded_attendants(path));
        drop(VmDir::adopt(path));
        return None;
    }
    event!(
        SWEPT, vm = id, qemu = ledger.pid;
        "VM {id} ({}, QEMU pid {}{}) was left by a server that was killed",
        ledger.state.name(),
        ledger.pid,
        if dead { ", dead" } else { "" }
    );
    // QEMU first, then what served it, then its directory.
    match ledger.pid {
        0 => drop(unrecorded(&id)),
        pid => drop(Process::adopt(pid, ledger.start_time)),
    }
    drop(ledger.adopt_attendants());
    drop(unrecorded_attendants(path));
    drop(VmDir::adopt(path));
    None
}

/// The QEMU of a server that was killed between starting it and writing its pid
/// down: known by its name, which only one process has.
fn unrecorded(id: &str) -> Option<Process> {
    let name = format!("sandbox-{id}");
    let named = |line: &[u8]| {
        let mut words = line.split(|b| *b == 0).skip_while(|w| *w != b"-name");
        words.nth(1).is_some_and(|w| w.split(|b| *b == b',').next() == Some(name.as_bytes()))
    };
    running(&named).pop()
}

/// What served a VM, likewise: known by what it was told to serve or to listen on,
/// which lies in that VM's directory.
fn unrecorded_attendants(dir: &Path) -> Vec<Process> {
    let dir = dir.display();
    let sockets = [
        format!("{dir}/{VHOST_SOCKET}"),
        format!("source={dir}/{SHARED}"),
        format!("unix://{dir}/{PROXY_SOCKET}"),
    ];
    running(&|line| line.split(|b| *b == 0).any(|w| sockets.iter().any(|s| s.as_bytes() == w)))
}

/// The processes with such a command line.
fn running(wanted: &dyn Fn(&[u8]) -> bool) -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = entries.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let started = start_time(pid)?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        wanted(&line).then(|| Process::adopt(pid, started).ok()).flatten()
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process that stands in for QEMU: found, killed and reaped by its name.
    #[test]
    #[allow(clippy::disallowed_methods)] // No VM is needed to be named like one.
    fn a_qemu_whose_pid_was_never_written_is_found_by_its_name() {
        let id = format!("sweep-test-{}", std::process::id());
        let script = "sleep 60; :";
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", script, "-name", &format!("sandbox-{id},debug-threads=on")])
            .spawn()
            .unwrap();
        // Until the child has executed its program, it looks like this test.
        let found = (0..100).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            unrecorded(&id)
        });
        assert!(unrecorded("sweep-test").is_none());
        let found = found.unwrap();
        assert_eq!(found.pid(), child.id() as i32);
        drop(found);
        let reaped = child.wait().unwrap_err();
        assert_eq!(reaped.raw_os_error(), Some(nix::errno::Errno::ECHILD as i32));
    }

    /// One that stands in for a virtiofsd, likewise.
    #[test]
    #[allow(clippy::disallowed_methods)] // No VM is needed to be served like one.
    fn what_served_a_vm_is_found_by_its_socket() {
        let dir = std::path::PathBuf::from(format!("/nonexistent/{}", std::process::id()));
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "sleep 60; :", "x"])
            .arg(format!("source={}/shared", dir.display()))
            .spawn()
            .unwrap();
        let found = (0..100).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let mut all = unrecorded_attendants(&dir);
            all.retain(|p| p.pid() == child.id() as i32);
            all.pop()
        });
        assert!(unrecorded_attendants(&dir.join("other")).is_empty());
        drop(found.unwrap());
        let reaped = child.wait().unwrap_err();
        assert_eq!(reaped.raw_os_error(), Some(nix::errno::Errno::ECHILD as i32));
    }
}
