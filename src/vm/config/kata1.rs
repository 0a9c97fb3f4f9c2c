//! The VmConfig of Kata 1.13, key by key.
//!
//! As its command line and its `factory init` server derive it; its containerd
//! shim holds other values (LongLiveConn, ProxyType, no kernel modules), so one
//! server can not be accepted by both.
//!
//! Source: Kata's runtime 1.13: pkg/katautils/config.go, virtcontainers'
//! hypervisor.go and kata_agent.go; tests/fixtures/kata-1.13.

use serde_json::{json, Map, Value};

use super::derive::{words, Keys};
use crate::agent::Kind;
use crate::config::options::{AGENT, PROXY, QEMU, RUNTIME};
use crate::config::{Config, Transport};
use crate::host;

/// Where Kata 1.x has its proxy.
const PROXY_PATH: &str = "/usr/libexec/kata-containers/kata-proxy";

/// Whether its agent is reached over vsock: ours can be, but then it is no agent of
/// 1.x, and its clients are to know.
fn use_vsock(c: &Config) -> bool {
    c.transport() == Transport::Vsock
}

fn agent_params(c: &Config) -> Vec<String> {
    let mut out = Vec::new();
    if c.flag(AGENT, "enable_debug") {
        out.push("agent.log=debug".into());
    }
    if c.flag(AGENT, "enable_tracing") && c.text(AGENT, "trace_mode") == "static" {
        let kind = match c.text(AGENT, "trace_type") {
            "" => "isolated",
            given => given,
        };
        out.push(format!("agent.trace={kind}"));
    }
    out
}

/// HypervisorConfig's 63 keys.
pub fn hypervisor(c: &Config) -> Map<String, Value> {
    let mut keys = Keys::of(c);
    sizes_and_paths(&mut keys);
    files(&mut keys);
    switches(&mut keys);
    keys.done()
}

fn sizes_and_paths(keys: &mut Keys<'_>) {
    let c = keys.config;
    keys.put("NumVCPUs", c.cpus());
    keys.most_cpus(host::cpus().into());
    keys.number("MemorySize", "default_memory", 2048);
    // As our VMs have it: Kata takes 0 for 1 bridge, and for 10 slots.
    keys.put("DefaultBridges", c.number(QEMU, "default_bridges"));
    keys.number("Msize9p", "msize_9p", 8192);
    keys.put("MemSlots", c.number(QEMU, "memory_slots"));
    keys.number("MemOffset", "memory_offset", 0);
    keys.number("VirtioFSCacheSize", "virtio_fs_cache_size", 0);
    keys.kernel_params(&agent_params(c), words);
    keys.put("HypervisorParams", Value::Null);
    keys.path("KernelPath", "kernel");
    keys.path("ImagePath", "image");
    keys.path("InitrdPath", "initrd");
    keys.path("FirmwarePath", "firmware");
    keys.options("MachineAccelerators", "machine_accelerators");
    keys.options("CPUFeatures", "cpu_features");
    keys.path("HypervisorPath", "path");
    keys.list("HypervisorPathList", "valid_hypervisor_paths");
    keys.put("HypervisorCtlPathList", Value::Null);
    keys.put("HypervisorCtlPath", "");
    keys.put("JailerPath", "");
    keys.put("JailerPathList", Value::Null);
    keys.text("BlockDeviceDriver", "block_device_driver", "virtio-scsi");
    keys.text("HypervisorMachineType", "machine_type", "pc");
}

fn files(keys: &mut Keys<'_>) {
    let c = keys.config;
    keys.put("MemoryPath", "");
    keys.put("DevicesStatePath", "");
    keys.text("EntropySource", "entropy_source", "/dev/urandom");
    keys.text("SharedFS", "shared_fs", "virtio-9p");
    keys.text("VirtioFSDaemon", "virtio_fs_daemon", "");
    keys.list("VirtioFSDaemonList", "valid_virtio_fs_daemon_paths");
    keys.text("VirtioFSCache", "virtio_fs_cache", "none");
    keys.list("VirtioFSExtraArgs", "virtio_fs_extra_args");
    keys.text("FileBackedMemRootDir", "file_mem_backend", "");
    // Absent or empty, it is null.
    let flashes = c.list(QEMU, "pflashes");
    keys.put("PFlash", Some(flashes).filter(|f| !f.is_empty()));
    keys.list("FileBackedMemRootList", "valid_file_mem_backends");
}

fn switches(keys: &mut Keys<'_>) {
    let c = keys.config;
    keys.flag("BlockDeviceCacheSet", "block_device_cache_set");
    keys.flag("BlockDeviceCacheDirect", "block_device_cache_direct");
    keys.flag("BlockDeviceCacheNoflush", "block_device_cache_noflush");
    keys.flag("DisableBlockDeviceUse", "disable_block_device_use");
    keys.flag("EnableIOThreads", "enable_iothreads");
    keys.flag("Debug", "enable_debug");
    keys.flag("MemPrealloc", "enable_mem_prealloc");
    keys.flag("HugePages", "enable_hugepages");
    keys.flag("VirtioMem", "enable_virtio_mem");
    keys.flag("IOMMU", "enable_iommu");
    keys.flag("IOMMUPlatform", "enable_iommu_platform");
    keys.put("Realtime", false);
    keys.put("Mlock", !c.flag(QEMU, "enable_swap"));
    keys.flag("DisableNestingChecks", "disable_nesting_checks");
    keys.put("UseVSock", use_vsock(c));
    keys.flag("DisableImageNvdimm", "disable_image_nvdimm");
    keys.flag("HotplugVFIOOnRootBus", "hotplug_vfio_on_root_bus");
    keys.number("PCIeRootPort", "pcie_root_port", 0);
    keys.put("BootToBeTemplate", false);
    keys.put("BootFromTemplate", false);
    keys.flag("DisableVhostNet", "disable_vhost_net");
    keys.flag("EnableVhostUserStore", "enable_vhost_user_store");
    keys.text(
        "VhostUserStorePath",
        "vhost_user_store_path",
        "/var/run/kata-containers/vhost-user/",
    );
    keys.list("VhostUserStorePathList", "valid_vhost_user_store_paths");
    keys.text("GuestHookPath", "guest_hook_path", "");
    keys.put("VMid", "");
    keys.put("SELinuxProcessLabel", "");
    keys.list("EnableAnnotations", "enable_annotations");
}

/// AgentConfig.
pub fn agent(c: &Config) -> Value {
    let modules = c.given(AGENT, "kernel_modules").then(|| c.list(AGENT, "kernel_modules"));
    json!({
        "LongLiveConn": false, "UseVSock": use_vsock(c), "Debug": c.flag(AGENT, "enable_debug"),
        "Trace": c.flag(AGENT, "enable_tracing"), "ContainerPipeSize": 0,
        "TraceMode": c.text(AGENT, "trace_mode"), "TraceType": c.text(AGENT, "trace_type"),
        "KernelModules": modules,
    })
}

/// ProxyType and ProxyConfig. Only a VM that has a proxy may say so: Kata's client
/// signals the proxy's pid, and 0 is its own process group.
pub fn proxy(c: &Config) -> Map<String, Value> {
    let proxied = c.agent_kind == Kind::Kata1 && !use_vsock(c);
    let (kind, config) = match proxied {
        true => {
            let path = match c.text(PROXY, "path") {
                "" => PROXY_PATH,
                given => given,
            };
            ("kataProxy", json!({"Path": path, "Debug": c.flag(PROXY, "enable_debug")}))
        }
        false => ("noProxy", json!({"Path": "", "Debug": c.flag(RUNTIME, "enable_debug")})),
    };
    let mut out = Map::new();
    out.insert("ProxyType".into(), kind.into());
    out.insert("ProxyConfig".into(), config);
    out
}
