//! A VM as it goes over the wire: Kata's GrpcVM, its JSON a superset of every
//! Kata version's.
//!
//! Go's decoder ignores keys that it does not know, so `Vmcache` carries what
//! our client needs and Kata's never sent: where the agent is, QEMU's pid and
//! start time, how the VM was made.
//!
//! Source: messages captured from Kata 1.13 and 3.20 (tests/fixtures).

mod kata;

use std::path::{Path, PathBuf};

use serde_derive::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::dir::VmDir;
use super::ledger::Ledger;
use super::{Error, Vm, VmConfig};
use crate::agent::address::Address;
use crate::agent::seat::Way;
use crate::config::Config;
use crate::process::attendant::Role;
use crate::process::Process;
use crate::proto::cache::GrpcVM;
use crate::trusted_path::{check_existing, refused, Kind};

/// Where Kata's servers keep what is beside a VM.
const KATA_SANDBOXES: &str = "/run/vc/sbs";
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
    let virtiofsd = vm.attendant(Role::Virtiofsd).unwrap_or(0);
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
            "VirtiofsdPid": virtiofsd,
            "VirtiofsDaemonPid": virtiofsd,
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
        proxyPid: vm.attendant(Role::Proxy).unwrap_or(0).into(),
        proxyURL: vm.agent.to_string(),
        cpu: vm.cpus(),
        memory: vm.memory_mib(),
        ..GrpcVM::default()
    }
}

/// A VM again, on the client's side, which owns it from here on. `served` gives the
/// server's VmConfig, for a VM that does not tell all itself: a stock Kata server's.
///
/// # Errors
/// [`Error::Adopt`] when the message makes no sense or QEMU is gone.
pub fn from_wire(
    message: &GrpcVM,
    served: impl FnOnce() -> Result<VmConfig, String>,
) -> Result<Vm, Error> {
    let id: String = message.id.chars().take(64).collect();
    let bad = |why: String| Error::Adopt { id: id.clone(), why };
    if message.hypervisor.len() > MAX_JSON {
        return Err(bad(format!("{} bytes of JSON, over {MAX_JSON}", message.hypervisor.len())));
    }
    let read: Read = serde_json::from_slice(&message.hypervisor)
        .map_err(|e| bad(format!("its hypervisor JSON: {e}")))?;
    let dir = read.monitor.parent().filter(|d| d.is_absolute()).map(Path::to_path_buf);
    let dir = dir
        .filter(|d| d.file_name().is_some_and(|n| n == message.id.as_str()))
        .ok_or_else(|| bad(format!("monitor {:?} is not in its directory", read.monitor)))?;
    // As root, never where another user decides what stands in a VM's directory.
    if let Err(e) = check_existing(&dir, Kind::SharedDirectory) {
        if let Some(why) = refused(&e) {
            return Err(bad(why.to_string()));
        }
    }
    let Some(ours) = read.ours else {
        let hypervisor: Value = serde_json::from_slice(&message.hypervisor)
            .map_err(|e| bad(format!("its hypervisor JSON: {e}")))?;
        return kata::adopt(message, &hypervisor, &dir, &served().map_err(bad)?);
    };
    // Read before the pid is trusted: the ledger is root's, the message a peer's.
    let ledger =
        Ledger::read(&dir).map_err(|e| bad(format!("its ledger in {}: {e}", dir.display())))?;
    if (ledger.pid, ledger.start_time) != (ours.pid, ours.start_time) {
        return Err(bad(format!("its ledger names pid {}, the server {}", ledger.pid, ours.pid)));
    }
    let agent = Address::parse(ledger.agent, &ours.agent_url).map_err(|e| bad(e.to_string()))?;
    let process = Process::adopt(ours.pid, ours.start_time)
        .map_err(|_| Error::Dead { id: id.clone(), pid: ours.pid })?;
    let attendants = ledger.adopt_attendants();
    Ok(Vm { process, attendants, dir: VmDir::adopt(&dir), ledger, agent, paused: ours.paused })
}

/// Whether a VM of a server can be used, by what the server says of all of them; a
/// VM that is claimed and can not would be nobody's.
///
/// # Errors
/// A sentence.
pub fn check_server(served: &VmConfig) -> Result<(), String> {
    match served.is_ours() {
        true => Ok(()),
        false => kata::check_server(served),
    }
}

/// A VM's directory; with it goes the one in which Kata's servers keep its proxy.
fn directory(dir: &Path, id: &str, agent: &Address) -> VmDir {
    let mut own = VmDir::adopt(dir);
    // Nothing that a peer says names any other directory.
    let uuid = id.len() == 36 && id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if let Address::Proxy(socket) = agent {
        let beside = Path::new(KATA_SANDBOXES).join(id);
        if uuid && socket.parent() == Some(&beside) {
            own.and(&beside);
        }
    }
    own
}

/// A VM of this host by its directory, for commands on VMs that were claimed.
///
/// # Errors
/// [`Error::Adopt`] or [`Error::Dead`].
pub fn from_directory(dir: &Path, ledger: Ledger) -> Result<Vm, Error> {
    let process =
        ledger.adopt_qemu().map_err(|_| Error::Dead { id: ledger.id.clone(), pid: ledger.pid })?;
    let way = ledger.cid.map_or(Way::Serial, Way::Vsock);
    let agent = Address::parse(ledger.agent, &ledger.agent_url)
        .unwrap_or_else(|_| Address::of(ledger.agent, dir, way));
    let attendants = ledger.adopt_attendants();
    let dir = directory(dir, &ledger.id, &agent);
    Ok(Vm { process, attendants, dir, ledger, agent, paused: false })
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message;

    fn nothing() -> Result<VmConfig, String> {
        Err("not asked".into())
    }

    /// Messages of real Kata servers are understood; these VMs are gone, or lack
    /// what nobody can find out.
    #[test]
    fn katas_own_vms_are_refused_with_the_reason() {
        let captured: [(&[u8], &[u8], &str); 2] = [
            (
                include_bytes!("../../tests/fixtures/kata-1.13/vm.pb"),
                include_bytes!("../../tests/fixtures/kata-1.13/config.Data.json"),
                "read /run/vc/vm/79ccfa2e-79b8-4553-8cba-06470cf1b31c/pid",
            ),
            (
                include_bytes!("../../tests/fixtures/kata-3.20/vm.pb"),
                include_bytes!("../../tests/fixtures/kata-3.20/config.Data.json"),
                "not in its directory",
            ),
        ];
        for (bytes, data, why) in captured {
            let message = GrpcVM::parse_from_bytes(bytes).unwrap();
            assert_eq!(message.id.len(), 36);
            let served = || VmConfig::parse(data).map_err(|e| e.to_string());
            let e = from_wire(&message, served).unwrap_err().to_string();
            assert!(e.contains(why), "{e}");
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
            let e = from_wire(&make(&json), nothing).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        }
        let e = from_wire(&make(&" ".repeat(MAX_JSON + 1)), nothing).unwrap_err().to_string();
        assert!(e.contains("over"), "{e}");
    }
}
