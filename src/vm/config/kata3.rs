//! The VmConfig of Kata 3.20.0 (its Go runtime), key by key.
//!
//! Its stock client can not finish with any server, ours included: it does not
//! read where the agent is. What a server can say, this one does.
//!
//! Source: Kata 3.20.0: src/runtime/pkg/katautils/config.go, virtcontainers'
//! hypervisor.go and kata_agent.go; tests/fixtures/kata-3.20.

use serde_json::{json, Map, Value};

use super::derive::{unquoted_words, Keys};
use crate::config::options::{AGENT, QEMU};
use crate::config::Config;
use crate::host;

fn agent_params(c: &Config) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    if c.flag(AGENT, "enable_debug") {
        out.push("agent.log=debug".into());
    }
    if c.flag(AGENT, "enable_tracing") {
        out.push("agent.trace=true".into());
    }
    if c.flag(AGENT, "debug_console_enabled") {
        out.extend(["agent.debug_console".into(), "agent.debug_console_vport=1026".into()]);
    }
    match c.number(AGENT, "cdh_api_timeout") {
        0 => {}
        seconds => out.push(format!("agent.cdh_api_timeout={seconds}")),
    }
    out
}

/// HypervisorConfig's 114 keys.
pub fn hypervisor(c: &Config) -> Map<String, Value> {
    let mut keys = Keys::of(c);
    paths(&mut keys);
    lists(&mut keys);
    limits(&mut keys);
    switches(&mut keys);
    keys.done()
}

fn paths(keys: &mut Keys<'_>) {
    let c = keys.config;
    keys.put("Groups", Value::Null);
    keys.path("KernelPath", "kernel");
    keys.path("ImagePath", "image");
    keys.path("InitrdPath", "initrd");
    keys.text("RootfsType", "rootfs_type", "ext4");
    keys.path("FirmwarePath", "firmware");
    keys.path("FirmwareVolumePath", "firmware_volume");
    keys.options("MachineAccelerators", "machine_accelerators");
    keys.options("CPUFeatures", "cpu_features");
    keys.path("HypervisorPath", "path");
    keys.put("JailerPath", "");
    keys.text("BlockDeviceDriver", "block_device_driver", "virtio-scsi");
    keys.text("HypervisorMachineType", "machine_type", "q35");
    keys.put("MemoryPath", "");
    keys.put("DevicesStatePath", "");
    keys.text("EntropySource", "entropy_source", "/dev/urandom");
    keys.text("SharedFS", "shared_fs", "virtio-fs");
    keys.put("SharedPath", "");
    keys.text("VirtioFSDaemon", "virtio_fs_daemon", "");
    keys.text("VirtioFSCache", "virtio_fs_cache", "never");
    keys.text("FileBackedMemRootDir", "file_mem_backend", "");
    keys.text(
        "VhostUserStorePath",
        "vhost_user_store_path",
        "/var/run/kata-containers/vhost-user/",
    );
    keys.number("VhostUserDeviceReconnect", "vhost_user_reconnect_timeout_sec", 0);
    keys.text("GuestMemoryDumpPath", "guest_memory_dump_path", "");
    keys.text("GuestHookPath", "guest_hook_path", "");
    keys.put("VMid", "");
    // Where our VMs really are: its own servers say nothing, and its clients look
    // in the working directory.
    keys.put("VMStorePath", c.store().display().to_string());
    keys.put("RunStorePath", c.store().display().to_string());
    keys.put("SELinuxProcessLabel", "");
}

fn lists(keys: &mut Keys<'_>) {
    let c = keys.config;
    keys.list("HypervisorPathList", "valid_hypervisor_paths");
    keys.put("JailerPathList", Value::Null);
    keys.list("EntropySourceList", "valid_entropy_sources");
    keys.list("VirtioFSDaemonList", "valid_virtio_fs_daemon_paths");
    keys.list("VirtioFSExtraArgs", "virtio_fs_extra_args");
    keys.list("EnableAnnotations", "enable_annotations");
    keys.list("FileBackedMemRootList", "valid_file_mem_backends");
    keys.put("PFlash", c.list(QEMU, "pflashes"));
    keys.list("VhostUserStorePathList", "valid_vhost_user_store_paths");
    keys.text("SeccompSandbox", "seccompsandbox", "");
    keys.text("BlockDeviceAIO", "block_device_aio", "io_uring");
    keys.put("RemoteHypervisorSocket", "");
    keys.put("SandboxName", "");
    keys.put("SandboxNamespace", "");
    keys.put("User", "");
    keys.text("SnpIdBlock", "snp_id_block", "");
    keys.text("SnpIdAuth", "snp_id_auth", "");
    let policy = c.given(QEMU, "snp_guest_policy");
    keys.put("SnpGuestPolicy", policy.then(|| c.number(QEMU, "snp_guest_policy")));
    keys.kernel_params(&agent_params(c), unquoted_words);
    keys.put("HypervisorParams", Value::Null);
}

fn limits(keys: &mut Keys<'_>) {
    let c = keys.config;
    keys.put("SGXEPCSize", 0);
    keys.put("DiskRateLimiterBwMaxRate", 0);
    keys.put("DiskRateLimiterBwOneTimeBurst", 0);
    keys.put("DiskRateLimiterOpsMaxRate", 0);
    keys.put("DiskRateLimiterOpsOneTimeBurst", 0);
    keys.number("RxRateLimiterMaxRate", "rx_rate_limiter_max_rate", 0);
    keys.number("TxRateLimiterMaxRate", "tx_rate_limiter_max_rate", 0);
    keys.put("NetRateLimiterBwMaxRate", 0);
    keys.put("NetRateLimiterBwOneTimeBurst", 0);
    keys.put("NetRateLimiterOpsMaxRate", 0);
    keys.put("NetRateLimiterOpsOneTimeBurst", 0);
    keys.number("MemOffset", "memory_offset", 0);
    keys.put("VFIODevices", Value::Null);
    keys.put("VhostUserBlkDevices", Value::Null);
    keys.text("HotPlugVFIO", "hot_plug_vfio", "no-port");
    keys.text("ColdPlugVFIO", "cold_plug_vfio", "no-port");
    keys.number("PCIeRootPort", "pcie_root_port", 0);
    keys.number("PCIeSwitchPort", "pcie_switch_port", 0);
    keys.put("NumVCPUsF", c.cpus());
    keys.most_cpus(host::processors().into());
    keys.put("MemorySize", c.memory());
    let (there, wanted) = (host::memory_mib(), c.number(QEMU, "default_maxmemory"));
    keys.put("DefaultMaxMemorySize", if wanted == 0 { there } else { wanted.min(there) });
    // As our VMs have it: Kata takes 0 for 1 bridge, and for 10 slots.
    keys.put("DefaultBridges", c.number(QEMU, "default_bridges"));
    keys.number("Msize9p", "msize_9p", 8192);
    keys.put("MemSlots", c.number(QEMU, "memory_slots"));
    keys.number("VirtioFSCacheSize", "virtio_fs_cache_size", 0);
    keys.number("VirtioFSQueueSize", "virtio_fs_queue_size", 0);
    keys.put("Uid", 0);
    keys.put("Gid", 0);
    keys.put("RemoteHypervisorTimeout", 0);
}

fn switches(keys: &mut Keys<'_>) {
    let c = keys.config;
    keys.flag("BlockDeviceCacheSet", "block_device_cache_set");
    keys.flag("BlockDeviceCacheDirect", "block_device_cache_direct");
    keys.flag("BlockDeviceCacheNoflush", "block_device_cache_noflush");
    keys.flag("DisableBlockDeviceUse", "disable_block_device_use");
    keys.flag("EnableIOThreads", "enable_iothreads");
    keys.flag("Debug", "enable_debug");
    keys.put("HypervisorLoglevel", c.number(QEMU, "hypervisor_loglevel").clamp(1, 3));
    keys.flag("MemPrealloc", "enable_mem_prealloc");
    keys.put("ReclaimGuestFreedMemory", false);
    keys.flag("HugePages", "enable_hugepages");
    keys.flag("VirtioMem", "enable_virtio_mem");
    keys.flag("IOMMU", "enable_iommu");
    keys.flag("IOMMUPlatform", "enable_iommu_platform");
    keys.flag("DisableNestingChecks", "disable_nesting_checks");
    keys.flag("DisableImageNvdimm", "disable_image_nvdimm");
    keys.flag("GuestMemoryDumpPaging", "guest_memory_dump_paging");
    keys.flag("ConfidentialGuest", "confidential_guest");
    keys.flag("SevSnpGuest", "sev_snp_guest");
    keys.put("BootToBeTemplate", false);
    keys.put("BootFromTemplate", false);
    keys.flag("DisableVhostNet", "disable_vhost_net");
    keys.flag("EnableVhostUserStore", "enable_vhost_user_store");
    keys.flag("GuestSwap", "enable_guest_swap");
    keys.flag("Rootless", "rootless");
    keys.put("DisableSeccomp", false);
    keys.flag("DisableSeLinux", "disable_selinux");
    keys.flag("DisableGuestSeLinux", "disable_guest_selinux");
    keys.flag("LegacySerial", "use_legacy_serial");
    keys.text("ExtraMonitorSocket", "extra_monitor_socket", "");
    keys.number("QgsPort", "tdx_quote_generation_service_socket_port", 4050);
    keys.put("Initdata", "");
    keys.put("InitdataDigest", Value::Null);
    keys.put("InitdataImage", "");
    keys.put("DefaultGPUs", 0);
    keys.put("DefaultGPUModel", "");
}

/// AgentConfig.
pub fn agent(c: &Config) -> Value {
    let modules = c.given(AGENT, "kernel_modules").then(|| c.list(AGENT, "kernel_modules"));
    json!({
        "KernelModules": modules, "ContainerPipeSize": 0,
        "DialTimeout": c.number(AGENT, "dial_timeout"),
        "CdhApiTimeout": c.number(AGENT, "cdh_api_timeout"), "LongLiveConn": true,
        "Debug": c.flag(AGENT, "enable_debug"), "Trace": c.flag(AGENT, "enable_tracing"),
        "EnableDebugConsole": c.flag(AGENT, "debug_console_enabled"), "Policy": "",
    })
}
