//! VmConfig: what a VM is to be, in the JSON that goes over the wire.
//!
//! The names are those of Kata's Go structures (1.13's; later versions' keys
//! are kept as they came). A Kata client compares a server's VmConfig with its
//! own, so unknown keys are kept and sent on unchanged.
//!
//! Source: messages captured from Kata 1.13 and 3.20 (tests/fixtures).

mod derive;
pub mod import;
mod kata1;
mod kata3;

use serde_derive::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

use crate::agent::hyperstart::HyperConfig;
use crate::agent::Kind;
use crate::config::options::OURS;
use crate::config::Config;
use crate::hypervisor::qemu::argv::HUGEPAGES;
use crate::hypervisor::qemu::hotplug::Backend;

/// Our own part, which Kata's clients skip.
const OWN: &str = "Vmcache";

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
    /// The VmConfig of a configuration file: the one that it imports, or one in the
    /// shape that its `wire` names.
    /// What of a VM Kata has no word for stands in `Vmcache`.
    pub fn of(c: &Config) -> VmConfig {
        if let Some(served) = &c.served {
            // It was read as one when the configuration was.
            if let Ok(config) = VmConfig::parse(served.data.as_bytes()) {
                return config;
            }
        }
        let wire3 = c.text(OURS, "wire") == "kata-3";
        let (hypervisor, agent) = match wire3 {
            true => (kata3::hypervisor(c), kata3::agent(c)),
            false => (kata1::hypervisor(c), kata1::agent(c)),
        };
        let agent = match c.agent_kind {
            Kind::Kata | Kind::Kata1 => agent,
            Kind::Hyperstart => json!(HyperConfig::default()),
            Kind::Noop => Value::Null,
        };
        let mut rest = if wire3 { Map::new() } else { kata1::proxy(c) };
        let protocol = if c.agent_kind == Kind::Kata1 { "grpc" } else { "ttrpc" };
        let own = json!({
            "Accel": c.text(OURS, "accel"), "Protocol": protocol,
            "SharedMemory": c.shared_memory(), "MaxVCPUs": c.max_cpus(),
        });
        rest.insert(OWN.into(), own);
        VmConfig {
            hypervisor_type: "qemu".into(),
            hypervisor,
            agent_type: (!wire3).then(|| c.agent_kind.type_name().into()),
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

    /// Whether a server of ours said it. One that serves another's word to the letter
    /// looks like that other; its VMs tell of themselves.
    pub fn is_ours(&self) -> bool {
        self.rest.contains_key(OWN)
    }

    /// Most CPUs that such a VM can have; 0 when its server does not say. Ours can
    /// have more than the host has, which Kata's can not.
    pub fn max_cpus(&self) -> u64 {
        let own = self.rest.get(OWN).and_then(|own| own["MaxVCPUs"].as_u64());
        own.unwrap_or_else(|| self.number("DefaultMaxVCPUs"))
    }

    /// Where memory that is added to such a VM comes from: from where it has its own.
    pub fn memory_backend(&self) -> Backend {
        let flag = |k: &str| self.hypervisor.get(k).and_then(Value::as_bool).unwrap_or(false);
        let files = self.hypervisor.get("FileBackedMemRootDir").and_then(Value::as_str);
        let huge = flag("HugePages").then_some(HUGEPAGES);
        let shared = self.rest.get(OWN).is_some_and(|own| own["SharedMemory"] == true);
        match huge.or(files.filter(|f| !f.is_empty())) {
            None if shared => Backend::Shared,
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
        // A server of Kata's says nothing of it.
        if let (Some(have), Some(want)) = (self.rest.get(OWN), wanted.rest.get(OWN)) {
            for key in ["Accel", "Protocol", "SharedMemory", "MaxVCPUs"] {
                if have[key] != want[key] {
                    return Some(format!("{key} is {}, wanted {}", have[key], want[key]));
                }
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
        include_bytes!("../../../tests/fixtures/kata-1.13/config.Data.json"),
        include_bytes!("../../../tests/fixtures/kata-3.20/config.Data.json"),
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

    /// The same file in, the same messages out, but for what this host decides.
    #[test]
    fn what_is_derived_from_katas_files_is_what_kata_sent() {
        let files = [("kata-1.13", "protocol = \"grpc\"\n"), ("kata-3.20", "")];
        let hosts = [&["DefaultMaxVCPUs"][..], &["DefaultMaxVCPUs", "DefaultMaxMemorySize"]];
        let known = [json!(null), json!("")];
        for (i, (name, ours)) in files.into_iter().enumerate() {
            let path = format!("tests/fixtures/{name}");
            let mut text = std::fs::read_to_string(format!("{path}/configuration.toml")).unwrap();
            text = text.replace("[agent.kata]\n", &format!("[agent.kata]\n{ours}"));
            let wire = ["kata-1", "kata-3"][i];
            text.push_str(&format!("[vmcache]\nwire = {wire:?}\n"));
            let config = Config::parse(Path::new("c.toml"), &text).unwrap();
            let mut derived = VmConfig::of(&config);
            let mut sent = VmConfig::parse(DATA[i]).unwrap();
            assert!(derived.rest.remove(OWN).is_some());
            for key in hosts[i] {
                assert!(derived.number(key) > 0 && sent.number(key) > 0);
                derived.hypervisor.remove(*key);
                sent.hypervisor.remove(*key);
            }
            // Ours tells where VMs are, which Kata's 3.x leaves out; not compared.
            for key in ["VMStorePath", "RunStorePath"] {
                if let (Some(have), Some(theirs)) =
                    (derived.hypervisor.remove(key), sent.hypervisor.remove(key))
                {
                    assert!(have.as_str().unwrap().starts_with('/') && known.contains(&theirs));
                }
            }
            let [have, want] = [&derived, &sent].map(|c| serde_json::to_value(c).unwrap());
            assert_eq!(have, want, "{name}");
            let agent = std::fs::read(format!("{path}/config.AgentConfig.json")).unwrap();
            assert_eq!(derived.agent, serde_json::from_slice::<Value>(&agent).unwrap());
        }
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
