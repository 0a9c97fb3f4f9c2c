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
use std::path::Path;
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
    // From here on, whatever goes wrong ends all of the VM.
    let vm_dir = super::directory(dir, &id, &agent);
    let proxy = proxy(message, &agent);
    let process = qemu(dir, &id).map_err(bad)?;
    let (pid, started) = (process.pid(), process.start_time());
    let proxy = proxy.map_err(bad)?;
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
        label: String::new(),
        agent: kind,
        cid: agent.cid(),
        agent_url: agent.to_string(),
        own_agent: false,
        attendants: proxy.iter().map(Attendant::record).collect(),
        shape: String::new(),
        build: String::new(),
        by: None,
    };
    let attendants = proxy.into_iter().collect();
    let vm = Vm { process, attendants, dir: vm_dir, ledger, agent, paused: true };
    vm.ledger.write(dir).map_err(|source| Error::Record { id: id.clone(), source })?;
    Ok(vm)
}

/// QEMU, by the file that it wrote.
fn qemu(dir: &Path, id: &str) -> Result<Process, String> {
    let file = dir.join("pid");
    let mut text = String::new();
    fs::File::open(&file)
        .and_then(|f| f.take(MAX_PID).read_to_string(&mut text))
        .map_err(|e| format!("read {}: {e}", file.display()))?;
    let pid: i32 = text.trim().parse().map_err(|_| format!("{} holds no pid", file.display()))?;
    let gone = || format!("pid {pid} of {} is not its QEMU", file.display());
    let process = start_time(pid).and_then(|s| Process::adopt(pid, s).ok()).ok_or_else(gone)?;
    if !process.is_named(&format!("sandbox-{id}")) {
        process.let_go();
        return Err(gone());
    }
    Ok(process)
}

/// The proxy that its server started; `None` when there is none.
fn proxy(message: &GrpcVM, agent: &Address) -> Result<Option<Attendant>, String> {
    let pid = match i32::try_from(message.proxyPid) {
        Ok(0) => return Ok(None),
        // Anything else that kill(2) takes for more than one process.
        Ok(pid) if pid > 1 => pid,
        _ => return Err(format!("{} is no pid of a proxy", message.proxyPid)),
    };
    let gone = || format!("pid {pid} is not its proxy");
    let record = |start_time| Record { role: Role::Proxy, pid, start_time, uid: None };
    let found = start_time(pid).and_then(|s| Attendant::adopt(&record(s))).ok_or_else(gone)?;
    if !found.is_named(&agent.to_string()) {
        found.let_go();
        return Err(gone());
    }
    Ok(Some(found))
}

/// Whether our client can use the VMs of such a server; asked before one is claimed.
pub(super) fn check_server(served: &VmConfig) -> Result<(), String> {
    let proxy = served.rest.get("ProxyType").and_then(Value::as_str);
    match (served.agent_type.as_deref(), proxy) {
        (Some("kata"), Some("kataProxy" | "noProxy")) => Ok(()),
        (Some("kata"), other) => {
            Err(format!("its VMs have ProxyType {other:?}: only kataProxy and noProxy can be used"))
        }
        (None, _) => Err("it is one of Kata 2.x or 3.x, which can not say where its VMs' agents \
                          are: use vmcache's own server"
            .into()),
        (Some(other), _) => Err(format!("its VMs' agent is a {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_elses_process_is_taken_for_a_proxy() {
        let of = |pid: i64| {
            let message = GrpcVM { proxyPid: pid, ..GrpcVM::default() };
            proxy(&message, &Address::Proxy("/run/vc/sbs/x/proxy.sock".into()))
        };
        assert!(of(0).unwrap().is_none());
        for pid in [-1, 1, i64::from(std::process::id()), i64::MAX] {
            assert!(of(pid).is_err(), "{pid}");
        }
    }
}
