//! A VM as it goes over the wire: Kata's GrpcVM, its JSON a superset of every
//! Kata version's.
//!
//! Go's decoder ignores keys that it does not know, so `Vmcache` carries what
//! our client needs and Kata's never sent: where the agent is, QEMU's pid and
//! start time, how the VM was made.
//!
//! Source: messages captured from Kata 1.13 and 3.20 (tests/fixtures).

use std::path::{Path, PathBuf};

use serde_derive::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::dir::VmDir;
use super::ledger::Ledger;
use super::{Error, Vm};
use crate::agent::address::Address;
use crate::config::Config;
use crate::hypervisor::qemu::process::Process;
use crate::proto::cache::GrpcVM;

/// Longest `hypervisor` JSON taken from a server, in bytes.
const MAX_JSON: usize = 256 * 1024;

/// Our part of the JSON.
#[derive(Debug, Serialize, Deserialize)]
struct Ours {
    #[serde(rename = "AgentURL")]
    agent_url: String,
    #[serde(rename = "Pid")]
    pid: i32,
    #[serde(rename = "StartTime")]
    start_time: u64,
    #[serde(rename = "Source")]
    source: String,
    #[serde(rename = "Paused")]
    paused: bool,
}

/// The part of the JSON that a client of ours reads.
#[derive(Debug, Deserialize)]
struct Read {
    #[serde(rename = "QmpChannelpath")]
    monitor: PathBuf,
    #[serde(rename = "Vmcache")]
    ours: Option<Ours>,
}

/// What a server sends when it hands `vm` out.
pub fn to_wire(vm: &Vm, config: &Config) -> GrpcVM {
    let bridges: Vec<Value> = (0..config.number("hypervisor.qemu", "default_bridges"))
        .map(|i| {
            json!({"Devices": {}, "ID": format!("pci-bridge-{i}"), "Type": "pci",
                   "Addr": 2 + i, "MaxCapacity": 30})
        })
        .collect();
    let most = config.max_cpus();
    let ours = Ours {
        agent_url: vm.agent.to_string(),
        pid: vm.pid(),
        start_time: vm.process.start_time(),
        source: vm.source().to_string(),
        paused: vm.paused,
    };
    let hypervisor = json!({
        "ID": vm.id(),
        "QmpChannelpath": vm.monitor(),
        "State": {
            "Bridges": bridges,
            "HotpluggedVCPUs": null,
            "HotpluggedMemory": 0,
            "UUID": vm.ledger.uuid,
            "HotplugVFIOOnRootBus": false,
            "VirtiofsdPid": 0,
            "VirtiofsDaemonPid": 0,
            "PCIeRootPort": 0,
        },
        "NvdimmCount": 0,
        "QemuSMP": {
            "CPUs": vm.cpus(), "Cores": 1, "Threads": 1, "Sockets": most, "MaxCPUs": most,
        },
        "ContextID": vm.agent.cid().unwrap_or(0),
        "Vmcache": ours,
    });
    GrpcVM {
        id: vm.id().to_string(),
        hypervisor: hypervisor.to_string().into_bytes(),
        cpu: vm.cpus(),
        memory: vm.memory_mib(),
        ..GrpcVM::default()
    }
}

/// A VM again, on the client's side, which owns it from here on.
///
/// # Errors
/// [`Error::Adopt`] when the message makes no sense or QEMU is gone.
pub fn from_wire(message: &GrpcVM) -> Result<Vm, Error> {
    let id: String = message.id.chars().take(64).collect();
    let bad = |why: String| Error::Adopt { id: id.clone(), why };
    if message.hypervisor.len() > MAX_JSON {
        return Err(bad(format!("{} bytes of JSON, over {MAX_JSON}", message.hypervisor.len())));
    }
    let read: Read = serde_json::from_slice(&message.hypervisor)
        .map_err(|e| bad(format!("its hypervisor JSON: {e}")))?;
    let ours = read.ours.ok_or_else(|| {
        bad("the server told neither QEMU's pid nor the agent's address; a stock Kata \
             server's VMs are for Kata's own client"
            .to_string())
    })?;
    let dir = read.monitor.parent().filter(|d| d.is_absolute()).map(Path::to_path_buf);
    let dir = dir
        .filter(|d| d.file_name().is_some_and(|n| n == message.id.as_str()))
        .ok_or_else(|| bad(format!("monitor {:?} is not in its directory", read.monitor)))?;
    let agent = Address::parse(&ours.agent_url).map_err(|e| bad(e.to_string()))?;
    // Read before the pid is trusted: the ledger is root's, the message a peer's.
    let ledger =
        Ledger::read(&dir).map_err(|e| bad(format!("its ledger in {}: {e}", dir.display())))?;
    if (ledger.pid, ledger.start_time) != (ours.pid, ours.start_time) {
        return Err(bad(format!("its ledger names pid {}, the server {}", ledger.pid, ours.pid)));
    }
    let process = Process::adopt(ours.pid, ours.start_time)
        .map_err(|_| Error::Dead { id: id.clone(), pid: ours.pid })?;
    Ok(Vm { process, dir: VmDir::adopt(&dir), ledger, agent, paused: ours.paused })
}

/// A VM of this host by its directory, for commands on VMs that were claimed.
///
/// # Errors
/// [`Error::Adopt`] or [`Error::Dead`].
pub fn from_directory(dir: &Path, ledger: Ledger) -> Result<Vm, Error> {
    let process = Process::adopt(ledger.pid, ledger.start_time)
        .map_err(|_| Error::Dead { id: ledger.id.clone(), pid: ledger.pid })?;
    let agent = Address::of(ledger.agent, dir, ledger.cid);
    Ok(Vm { process, dir: VmDir::adopt(dir), ledger, agent, paused: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message;

    /// Messages of real Kata servers are understood, and refused for what they lack.
    #[test]
    fn katas_own_vms_are_refused_with_the_reason() {
        let captured: [&[u8]; 2] = [
            include_bytes!("../../tests/fixtures/kata-1.13/vm.pb"),
            include_bytes!("../../tests/fixtures/kata-3.20/vm.pb"),
        ];
        for bytes in captured {
            let message = GrpcVM::parse_from_bytes(bytes).unwrap();
            assert_eq!(message.id.len(), 36);
            let e = from_wire(&message).unwrap_err().to_string();
            assert!(e.contains("stock Kata"), "{e}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let make = |json: &str| GrpcVM {
            id: "x".into(),
            hypervisor: json.as_bytes().to_vec(),
            ..GrpcVM::default()
        };
        let ours = r#""Vmcache":{"AgentURL":"serial:///v/x","Pid":1,"StartTime":2,"Source":"direct","Paused":true}"#;
        for (json, word) in [
            ("{".to_string(), "EOF"),
            (format!(r#"{{"QmpChannelpath":"/v/y/qmp.sock",{ours}}}"#), "not in its directory"),
            (format!(r#"{{"QmpChannelpath":"x/qmp.sock",{ours}}}"#), "not in its directory"),
            (format!(r#"{{"QmpChannelpath":"/v/x/qmp.sock",{ours}}}"#), "ledger"),
        ] {
            let e = from_wire(&make(&json)).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        }
        let e = from_wire(&make(&" ".repeat(MAX_JSON + 1))).unwrap_err().to_string();
        assert!(e.contains("over"), "{e}");
    }
}
