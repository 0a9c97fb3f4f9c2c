//! VmConfig: what a VM is to be, in the JSON that goes over the wire.
//!
//! The names are those of Kata's Go structures (1.13's; later versions' keys
//! are kept as they came). A Kata client compares a server's VmConfig with its
//! own, so unknown keys are kept and sent on unchanged.
//!
//! Source: messages captured from Kata 1.13 and 3.20 (tests/fixtures).

use serde_derive::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use crate::config::options::{OURS, PROXY, QEMU};
use crate::config::Config;
use crate::hypervisor::qemu::argv::HUGEPAGES;
use crate::hypervisor::qemu::hotplug::Backend;

/// Keys of HypervisorConfig in which two VMs may differ and still be one
/// another's base: sizes are changed after the claim, the rest names places.
const FREE: [&str; 13] = [
    "NumVCPUs",
    "NumVCPUsF",
    "MemorySize",
    "BootToBeTemplate",
    "BootFromTemplate",
    "MemoryPath",
    "DevicesStatePath",
    "SharedPath",
    "VMStorePath",
    "RunStorePath",
    "VMid",
    "SELinuxProcessLabel",
    "VMID",
];

/// What a VM is to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmConfig {
    /// `qemu`.
    #[serde(rename = "HypervisorType")]
    pub hypervisor_type: String,
    /// The hypervisor's part, by Kata's names.
    #[serde(rename = "HypervisorConfig")]
    pub hypervisor: Map<String, Value>,
    /// `kata` (1.x; later versions have only the one).
    #[serde(rename = "AgentType", default, skip_serializing_if = "Option::is_none")]
    pub agent_type: Option<String>,
    /// The agent's part.
    #[serde(rename = "AgentConfig", default)]
    pub agent: Value,
    /// What else there is.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl VmConfig {
    /// The VmConfig of a configuration file, as Kata 1.13 derives it.
    pub fn of(c: &Config) -> VmConfig {
        let text = |key: &str| Value::from(c.text(QEMU, key));
        let flag = |key: &str| Value::from(c.flag(QEMU, key));
        let number = |key: &str| Value::from(c.number(QEMU, key));
        let mut params: Vec<Value> = Vec::new();
        if c.text(QEMU, "block_device_driver") == "virtio-scsi" {
            params.push(json!({"Key": "scsi_mod.scan", "Value": "none"}));
        }
        params.extend(c.text(QEMU, "kernel_params").split_whitespace().map(|p| {
            let (key, value) = p.split_once('=').unwrap_or((p, ""));
            json!({"Key": key, "Value": value})
        }));
        let list = [
            ("NumVCPUs", number("default_vcpus")),
            ("DefaultMaxVCPUs", c.max_cpus().into()),
            ("MemorySize", number("default_memory")),
            ("DefaultBridges", number("default_bridges")),
            ("MemSlots", number("memory_slots")),
            ("KernelParams", Value::Array(params)),
            ("KernelPath", text("kernel")),
            ("ImagePath", text("image")),
            ("InitrdPath", text("initrd")),
            ("FirmwarePath", text("firmware")),
            ("MachineAccelerators", text("machine_accelerators")),
            ("CPUFeatures", text("cpu_features")),
            ("HypervisorPath", text("path")),
            ("BlockDeviceDriver", text("block_device_driver")),
            ("HypervisorMachineType", text("machine_type")),
            ("EntropySource", text("entropy_source")),
            ("SharedFS", text("shared_fs")),
            ("FileBackedMemRootDir", text("file_mem_backend")),
            ("DisableBlockDeviceUse", flag("disable_block_device_use")),
            ("EnableIOThreads", flag("enable_iothreads")),
            ("Debug", flag("enable_debug")),
            ("MemPrealloc", flag("enable_mem_prealloc")),
            ("HugePages", flag("enable_hugepages")),
            ("Mlock", (!c.flag(QEMU, "enable_swap")).into()),
            ("DisableVhostNet", flag("disable_vhost_net")),
            ("Accel", c.text(OURS, "accel").into()),
        ];
        let hypervisor = list.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        let (debug, modules) = c.agent();
        let agent = json!({
            "LongLiveConn": false, "UseVSock": false, "Debug": debug, "Trace": false,
            "ContainerPipeSize": 0, "TraceMode": "", "TraceType": "", "KernelModules": modules,
        });
        let mut rest = Map::new();
        rest.insert("ProxyType".into(), "noProxy".into());
        rest.insert("ProxyConfig".into(), json!({"Path": c.text(PROXY, "path"), "Debug": false}));
        VmConfig {
            hypervisor_type: "qemu".into(),
            hypervisor,
            agent_type: Some(c.agent_kind.name().into()),
            agent,
            rest,
        }
    }

    /// Parses a server's answer.
    ///
    /// # Errors
    /// As serde_json's.
    pub fn parse(bytes: &[u8]) -> Result<VmConfig, serde_json::Error> {
        serde_json::from_slice(bytes)
    }

    /// The JSON that goes over the wire.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("maps with text keys always become JSON")
    }

    /// The JSON of the agent's part alone.
    pub fn agent_json(&self) -> Vec<u8> {
        serde_json::to_vec(&self.agent).expect("a JSON value always becomes JSON")
    }

    /// CPUs of the base VM.
    pub fn cpus(&self) -> u32 {
        let get = |k: &str| self.hypervisor.get(k).and_then(Value::as_f64);
        get("NumVCPUs").or_else(|| get("NumVCPUsF")).unwrap_or(0.0).ceil() as u32
    }

    /// Memory of the base VM, MiB.
    pub fn memory(&self) -> u32 {
        let size = self.hypervisor.get("MemorySize").and_then(Value::as_u64);
        size.unwrap_or(0).min(u32::MAX.into()) as u32
    }

    /// A number of the hypervisor's part; 0 where it does not stand.
    pub fn number(&self, key: &str) -> u64 {
        self.hypervisor.get(key).and_then(Value::as_u64).unwrap_or(0)
    }

    /// Where memory that is added to such a VM comes from: from where it has its own.
    pub fn memory_backend(&self) -> Backend {
        let flag = |k: &str| self.hypervisor.get(k).and_then(Value::as_bool).unwrap_or(false);
        let files = self.hypervisor.get("FileBackedMemRootDir").and_then(Value::as_str);
        let huge = flag("HugePages").then_some(HUGEPAGES);
        match huge.or(files.filter(|f| !f.is_empty())) {
            None => Backend::Ram,
            Some(directory) => Backend::Files {
                directory: directory.into(),
                prealloc: huge.is_some() || flag("MemPrealloc"),
            },
        }
    }

    /// The first thing in which a VM of `self` can not serve one who wants
    /// `wanted`; `None` when it can. Keys that are missing count as Go's zero.
    pub fn mismatch(&self, wanted: &VmConfig) -> Option<String> {
        if self.hypervisor_type != wanted.hypervisor_type {
            return Some(format!(
                "hypervisor type {:?}, wanted {:?}",
                self.hypervisor_type, wanted.hypervisor_type
            ));
        }
        if self.agent_type != wanted.agent_type {
            return Some(format!("agent {:?}, wanted {:?}", self.agent_type, wanted.agent_type));
        }
        let keys = self.hypervisor.keys().chain(wanted.hypervisor.keys());
        for key in keys.filter(|k| !FREE.contains(&k.as_str())) {
            let (have, want) = (self.hypervisor.get(key), wanted.hypervisor.get(key));
            if !same(have, want) {
                let show = |v: Option<&Value>| v.map_or("nothing".to_string(), Value::to_string);
                return Some(format!("{key} is {}, wanted {}", show(have), show(want)));
            }
        }
        (!same(Some(&self.agent), Some(&wanted.agent)))
            .then(|| format!("agent configuration {}, wanted {}", self.agent, wanted.agent))
    }
}

/// Equal as Go decodes them: absent, null, zero and empty are one.
fn same(a: Option<&Value>, b: Option<&Value>) -> bool {
    fn zero(v: Option<&Value>) -> bool {
        match v {
            None | Some(Value::Null) | Some(Value::Bool(false)) => true,
            Some(Value::Number(n)) => n.as_f64() == Some(0.0),
            Some(Value::String(s)) => s.is_empty(),
            Some(Value::Array(l)) => l.is_empty(),
            Some(Value::Object(m)) => m.is_empty(),
            Some(Value::Bool(true)) => false,
        }
    }
    match (a, b) {
        (Some(Value::Object(x)), Some(Value::Object(y))) => {
            x.keys().chain(y.keys()).all(|k| same(x.get(k), y.get(k)))
        }
        _ => (zero(a) && zero(b)) || a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    const DATA: [&[u8]; 2] = [
        include_bytes!("../../tests/fixtures/kata-1.13/config.Data.json"),
        include_bytes!("../../tests/fixtures/kata-3.20/config.Data.json"),
    ];

    #[test]
    fn katas_own_messages_survive_a_round_trip() {
        for data in DATA {
            let config = VmConfig::parse(data).unwrap();
            let before: Value = serde_json::from_slice(data).unwrap();
            let after: Value = serde_json::from_slice(&config.to_json()).unwrap();
            assert_eq!(before, after);
            assert_eq!(config.cpus(), 1);
            assert!(config.memory() >= 256);
        }
    }

    #[test]
    fn what_is_derived_from_katas_file_agrees_with_kata_where_both_speak() {
        let path = "tests/fixtures/kata-1.13/configuration.toml";
        let config = Config::read(Path::new(path)).unwrap();
        let ours = VmConfig::of(&config);
        let theirs = VmConfig::parse(DATA[0]).unwrap();
        let mut compared = 0;
        for (key, value) in &ours.hypervisor {
            // Derived from this host, and not Kata's.
            if ["DefaultMaxVCPUs", "Accel"].contains(&key.as_str()) {
                continue;
            }
            assert_eq!(Some(value), theirs.hypervisor.get(key), "{key}");
            compared += 1;
        }
        assert_eq!(compared, 24);
        assert_eq!(ours.agent, theirs.agent);
    }

    #[test]
    fn sizes_and_places_may_differ_and_nothing_else() {
        let base = VmConfig::parse(DATA[1]).unwrap();
        let mut wanted = base.clone();
        for (key, value) in
            [("MemorySize", json!(4096)), ("NumVCPUsF", json!(3)), ("VMStorePath", json!("/x"))]
        {
            wanted.hypervisor.insert(key.into(), value);
        }
        wanted.hypervisor.remove("Debugger");
        wanted.hypervisor.insert("NewKey".into(), json!(""));
        assert_eq!(base.mismatch(&wanted), None);
        wanted.hypervisor.insert("KernelPath".into(), json!("/other"));
        let text = base.mismatch(&wanted).unwrap();
        assert!(text.contains("KernelPath") && text.contains("/other"), "{text}");
    }
}
