//! A configuration file that boots the VMs of another server's VmConfig.
//!
//! Source: the names of Kata's configuration files and of its HypervisorConfig.

use serde_json::Value;

use super::VmConfig;

/// Keys of HypervisorConfig and the options of `[hypervisor.qemu]` that they came
/// from.
const OPTIONS: [(&str, &str); 23] = [
    ("HypervisorPath", "path"),
    ("KernelPath", "kernel"),
    ("InitrdPath", "initrd"),
    ("ImagePath", "image"),
    ("FirmwarePath", "firmware"),
    ("HypervisorMachineType", "machine_type"),
    ("MachineAccelerators", "machine_accelerators"),
    ("CPUFeatures", "cpu_features"),
    ("NumVCPUs", "default_vcpus"),
    ("NumVCPUsF", "default_vcpus"),
    ("DefaultMaxVCPUs", "default_maxvcpus"),
    ("MemorySize", "default_memory"),
    ("DefaultBridges", "default_bridges"),
    ("MemSlots", "memory_slots"),
    ("BlockDeviceDriver", "block_device_driver"),
    ("EntropySource", "entropy_source"),
    ("SharedFS", "shared_fs"),
    ("FileBackedMemRootDir", "file_mem_backend"),
    ("Debug", "enable_debug"),
    ("MemPrealloc", "enable_mem_prealloc"),
    ("HugePages", "enable_hugepages"),
    ("DisableVhostNet", "disable_vhost_net"),
    ("EnableIOThreads", "enable_iothreads"),
];

/// What of another's VmConfig decides what a VM is: it must be as it says.
const DECIDE: [&str; 10] = [
    "HypervisorPath",
    "KernelPath",
    "InitrdPath",
    "HypervisorMachineType",
    "CPUFeatures",
    "MemorySize",
    "DefaultMaxVCPUs",
    "DefaultBridges",
    "MemSlots",
    "BlockDeviceDriver",
];

/// Added by every server, as by ours.
const ADDED: &str = "scsi_mod.scan";

/// The configuration file; `served` is the file with the messages themselves.
pub fn to_toml(config: &VmConfig, served: &str, endpoint: &str, pool: usize) -> String {
    let mut out = format!("# Imported from the server at {endpoint}.\n[hypervisor.qemu]\n");
    for (key, option) in OPTIONS {
        match config.hypervisor.get(key) {
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => out.push_str(&format!("{option} = {text:?}\n")),
            Some(Value::Number(n)) => out.push_str(&format!("{option} = {n}\n")),
            Some(Value::Bool(true)) => out.push_str(&format!("{option} = true\n")),
            _ => {}
        }
    }
    let params = params(config);
    if !params.is_empty() {
        out.push_str(&format!("kernel_params = {params:?}\n"));
    }
    let version_1 = config.agent_type.is_some();
    let vsock = match version_1 {
        true => config.hypervisor.get("UseVSock") == Some(&Value::Bool(true)),
        false => true,
    };
    if version_1 {
        out.push_str("\n[agent.kata]\nprotocol = \"grpc\"\n");
    }
    out.push_str(&format!(
        "\n[factory]\nvm_cache_number = {pool}\nvm_cache_endpoint = {endpoint:?}\n\n[vmcache]\n\
         served_config = {served:?}\ntransport = {:?}\n",
        if vsock { "vsock" } else { "serial" }
    ));
    out
}

fn params(config: &VmConfig) -> String {
    let list = config.hypervisor.get("KernelParams").and_then(Value::as_array);
    let words = list.into_iter().flatten().filter_map(|param| {
        let (key, value) = (param["Key"].as_str()?, param["Value"].as_str()?);
        (key != ADDED).then(|| match value {
            "" => key.to_string(),
            value => format!("{key}={value}"),
        })
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The first thing in which the VMs that are booted are not what clients would be
/// told.
pub fn contradiction(told: &VmConfig, booted: &VmConfig) -> Option<String> {
    DECIDE.into_iter().find_map(|key| {
        let (told, booted) = (told.hypervisor.get(key)?, booted.hypervisor.get(key)?);
        (told != booted).then(|| format!("it says {key} {told}, but VMs have {booted}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::served::Served;
    use crate::config::Config;
    use std::path::Path;

    /// What servers of two versions of Kata told becomes a configuration, which
    /// tells the same to the letter; and one that boots other VMs is refused.
    #[test]
    fn another_servers_word_is_kept_to_the_letter() {
        let dir = std::env::temp_dir().join(format!("vmcache-import-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for (version, transport) in [("kata-1.13", "serial"), ("kata-3.20", "vsock")] {
            let read = |name: &str| {
                std::fs::read_to_string(format!("tests/fixtures/{version}/{name}")).unwrap()
            };
            let served =
                Served { data: read("config.Data.json"), agent: read("config.AgentConfig.json") };
            let file = dir.join(format!("{version}.served.json"));
            std::fs::write(&file, serde_json::to_string(&served).unwrap()).unwrap();
            let told = VmConfig::parse(served.data.as_bytes()).unwrap();
            let toml = to_toml(&told, &file.display().to_string(), "/run/s", 2);
            let config = Config::parse(Path::new("c.toml"), &toml).unwrap();
            assert_eq!(config.served.as_deref(), Some(&served));
            assert_eq!(VmConfig::of(&config), told);
            assert_eq!((config.pool, config.cpus()), (2, 1));
            assert!(toml.contains(&format!("transport = {transport:?}")), "{toml}");
            assert!(!toml.contains("scsi_mod"), "{toml}");
            let other = toml.replace("default_memory = ", "default_memory = 1");
            let e = Config::parse(Path::new("c.toml"), &other).unwrap_err().to_string();
            assert!(e.contains("it says MemorySize") && e.contains("c.toml:"), "{e}");
        }
        std::fs::write(dir.join("x"), "{}").unwrap();
        let e = Served::read(&dir.join("x")).unwrap_err();
        assert!(e.contains("config import"), "{e}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
