//! A VM of a stock Kata server, on our client's side.
//!
//! Kata's message says neither QEMU's pid nor who is in the guest: the one stands
//! in the VM's directory, and is believed only of a QEMU that bears the VM's name;
//! the other is what the server's VmConfig says, and the proxy's URL.
//!
//! Invariant: from here on the VM has a ledger, like any other, so that it is found
//! when its owner is gone.
//!
//! Does not: take VMs of Kata 3.x, which say nothing of where their agent is.
//!
//! Source: Kata's runtime 1.13, virtcontainers/vm.go; messages in tests/fixtures.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::super::ledger::{Ledger, Owner, State};
use super::super::VmConfig;
use super::super::{Error, Vm};
use crate::agent::address::Address;
use crate::agent::Kind;
use crate::process::attendant::{Attendant, Record, Role};
use crate::process::Process;
use crate::proto::cache::GrpcVM;
use crate::sys::process::start_time;

/// Longest pid file read, in bytes.
const MAX_PID: u64 = 32;
/// Longest command line looked at, in bytes.
const MAX_LINE: u64 = 64 * 1024;

/// Takes one over. `dir` is its directory, `hypervisor` its JSON, `served` what its
/// server says of all its VMs.
pub(super) fn adopt(
    message: &GrpcVM,
    hypervisor: &Value,
    dir: &Path,
    served: &VmConfig,
) -> Result<Vm, Error> {
    let id = message.id.clone();
    let bad = |why: String| Error::Adopt { id: id.clone(), why };
    let kind = match (served.agent_type.as_deref(), message.proxyURL.as_str()) {
        (Some("kata"), url) if !url.is_empty() => Kind::Kata1,
        (Some("kata"), _) => return Err(bad("its server did not say where its agent is".into())),
        (None, _) => {
            return Err(bad("its server is one of Kata 2.x or 3.x, which can not say where its \
                            agent is: use vmcache's own server"
                .into()));
        }
        (Some(other), _) => return Err(bad(format!("its agent is a {other}"))),
    };
    // Without a proxy process it is QEMU's own socket, where yamux is spoken.
    let agent = match message.proxyURL.starts_with('/') {
        true => return Err(bad("its server leaves the proxy to Kata's shim v2".into())),
        false => Address::parse(kind, &message.proxyURL).map_err(|e| bad(e.to_string()))?,
    };
    let pid = qemu(dir, &id).map_err(bad)?;
    let dead = || Error::Dead { id: id.clone(), pid };
    let started = start_time(pid).ok_or_else(dead)?;
    let process = Process::adopt(pid, started).map_err(|_| dead())?;
    let proxy = proxy(message).map_err(bad)?;
    let ledger = Ledger {
        id: id.clone(),
        state: State::Handed,
        pid,
        start_time: started,
        uuid: hypervisor["State"]["UUID"].as_str().unwrap_or_default().chars().take(64).collect(),
        source: "kata".into(),
        cpus: message.cpu,
        memory_mib: message.memory,
        endpoint: String::new(),
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        owner: Some(Owner::this_process(false)),
        agent: kind,
        cid: agent.cid(),
        agent_url: agent.to_string(),
        own_agent: false,
        attendants: proxy.iter().map(Attendant::record).collect(),
    };
    let vm_dir = super::directory(dir, &id, &agent);
    let attendants = proxy.into_iter().collect();
    let vm = Vm { process, attendants, dir: vm_dir, ledger, agent, paused: true };
    vm.ledger.write(dir).map_err(|source| Error::Record { id: id.clone(), source })?;
    Ok(vm)
}

/// QEMU's pid, from the file that it wrote.
fn qemu(dir: &Path, id: &str) -> Result<i32, String> {
    let file = dir.join("pid");
    let text = read(&file, MAX_PID).map_err(|e| format!("read {}: {e}", file.display()))?;
    let pid: i32 = String::from_utf8_lossy(&text)
        .trim()
        .parse()
        .map_err(|_| format!("{} holds no pid", file.display()))?;
    named(pid, &format!("sandbox-{id}"))
        .then_some(pid)
        .ok_or_else(|| format!("pid {pid} of {} is not its QEMU", file.display()))
}

/// The proxy that its server started; `None` when there is none.
fn proxy(message: &GrpcVM) -> Result<Option<Attendant>, String> {
    let pid = match i32::try_from(message.proxyPid) {
        Ok(0) => return Ok(None),
        // Anything else that kill(2) takes for more than one process.
        Ok(pid) if pid > 1 => pid,
        _ => return Err(format!("{} is no pid of a proxy", message.proxyPid)),
    };
    if !named(pid, &message.id) {
        return Err(format!("pid {pid} is not its proxy"));
    }
    let start_time = start_time(pid).ok_or_else(|| format!("its proxy, pid {pid}, has ended"))?;
    Ok(Attendant::adopt(&Record { role: Role::Proxy, pid, start_time }))
}

/// Whether an argument of a process begins with `name`.
fn named(pid: i32, name: &str) -> bool {
    let line = read(&PathBuf::from(format!("/proc/{pid}/cmdline")), MAX_LINE).unwrap_or_default();
    line.split(|b| *b == 0).any(|word| word.starts_with(name.as_bytes()))
}

fn read(path: &Path, most: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_elses_process_is_taken_for_a_proxy() {
        let of = |pid: i64| {
            let message = GrpcVM { id: "no-such-vm".into(), proxyPid: pid, ..GrpcVM::default() };
            proxy(&message)
        };
        assert!(of(0).unwrap().is_none());
        for pid in [-1, 1, i64::from(std::process::id()), i64::MAX] {
            assert!(of(pid).is_err(), "{pid}");
        }
    }
}
