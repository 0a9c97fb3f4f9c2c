//! Every option there is: table, name, type and default, and what it does.
//!
//! The one list from which files are checked, `config show` prints and the
//! README's table is made. Options of Kata's tables have Kata's names and
//! meanings.

/// Type and default of an option.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fallback {
    /// Text; empty means not set.
    Text(&'static str),
    /// A whole number, at least zero.
    Number(u64),
    /// True or false.
    Flag(bool),
    /// A list of texts.
    List(&'static [&'static str]),
}

impl Fallback {
    /// The type's name in an error.
    pub fn kind(self) -> &'static str {
        match self {
            Fallback::Text(_) => "a string in quotes",
            Fallback::Number(_) => "a whole number",
            Fallback::Flag(_) => "true or false",
            Fallback::List(_) => "a list of strings",
        }
    }
}

/// An option.
#[derive(Debug)]
pub struct Opt {
    /// Its table, such as `hypervisor.qemu`.
    pub table: &'static str,
    /// Its name.
    pub key: &'static str,
    /// Its type and default.
    pub default: Fallback,
    /// What it does.
    pub help: &'static str,
}

const fn opt(table: &'static str, key: &'static str, default: Fallback, help: &'static str) -> Opt {
    Opt { table, key, default, help }
}

mod kata;

use Fallback::{Flag, List, Number, Text};

/// Kata's hypervisor table.
pub const QEMU: &str = "hypervisor.qemu";
/// Kata's factory table.
pub const FACTORY: &str = "factory";
/// Kata's agent table.
pub const AGENT: &str = "agent.kata";
/// Kata's proxy table (1.x).
pub const PROXY: &str = "proxy.kata";
/// Kata's runtime table.
pub const RUNTIME: &str = "runtime";
/// Our own table.
pub const OURS: &str = "vmcache";

/// Options that this version acts on.
pub static OPTIONS: [Opt; 76] = [
    opt(QEMU, "path", Text("/usr/bin/qemu-system-x86_64"), "QEMU's executable"),
    opt(QEMU, "kernel", Text("/usr/share/kata-containers/vmlinuz.container"), "the guest's kernel"),
    opt(QEMU, "initrd", Text(""), "the guest's initramfs, with an agent as its init"),
    opt(QEMU, "image", Text(""), "a disk image instead of an initramfs (not yet supported)"),
    opt(QEMU, "machine_type", Text("q35"), "QEMU's machine: q35 or pc"),
    opt(QEMU, "machine_accelerators", Text(""), "further properties of the machine, as `a=b,c=d`"),
    opt(QEMU, "cpu_features", Text(""), "CPU features after the model, as `pmu=off`"),
    opt(QEMU, "kernel_params", Text(""), "further parameters for the kernel"),
    opt(QEMU, "firmware", Text(""), "a firmware image instead of QEMU's own"),
    opt(QEMU, "default_vcpus", Number(1), "virtual CPUs of a base VM"),
    opt(
        QEMU,
        "default_maxvcpus",
        Number(0),
        "most CPUs a VM can grow to; 0: as many as the host has",
    ),
    opt(QEMU, "default_memory", Number(2048), "memory of a base VM, MiB; at least 64"),
    opt(QEMU, "memory_slots", Number(10), "slots for memory that is added later"),
    opt(QEMU, "default_bridges", Number(1), "PCI bridges for devices that are added later"),
    opt(
        QEMU,
        "shared_fs",
        Text("none"),
        "directories shared with guests: virtio-fs (not with clones) or virtio-9p, with which \
         `run --rootfs DIR` copies nothing, or none",
    ),
    opt(QEMU, "entropy_source", Text("/dev/urandom"), "where the guest's random device reads"),
    opt(QEMU, "file_mem_backend", Text(""), "directory for guest memory in files"),
    opt(QEMU, "enable_hugepages", Flag(false), "guest memory from /dev/hugepages"),
    opt(QEMU, "enable_mem_prealloc", Flag(false), "take all of a guest's memory at its start"),
    opt(
        QEMU,
        "reclaim_guest_freed_memory",
        Flag(false),
        "guests give memory back that they do not use: once before they wait in the pool, and all \
         the time they run (not clones, whose memory is their template's)",
    ),
    opt(
        QEMU,
        "enable_swap",
        Flag(false),
        "let guest memory be swapped (Kata's 1.x; else it is locked where mlock is asked for)",
    ),
    opt(QEMU, "virtio_fs_daemon", Text(""), "virtiofsd, for shared_fs = \"virtio-fs\""),
    opt(QEMU, "virtio_fs_cache", Text(""), "its cache mode; empty: auto"),
    opt(
        QEMU,
        "disable_vhost_net",
        Flag(false),
        "network packets through QEMU instead of the host's kernel",
    ),
    opt(QEMU, "disable_block_device_use", Flag(false), "no block devices for root file systems"),
    opt(
        QEMU,
        "block_device_driver",
        Text("virtio-scsi"),
        "how disks are attached: virtio-scsi or virtio-blk",
    ),
    opt(QEMU, "enable_iothreads", Flag(false), "a thread of their own for disks"),
    opt(QEMU, "enable_debug", Flag(false), "kernel messages on the VM's console, debug parameters"),
    opt(AGENT, "enable_debug", Flag(false), "debug messages of the agent"),
    opt(AGENT, "kernel_modules", List(&[]), "modules that the agent loads"),
    opt(
        AGENT,
        "protocol",
        Text("ttrpc"),
        "what a kata agent speaks: ttrpc (2.x and later, and ours), or grpc (1.x)",
    ),
    opt(PROXY, "path", Text(""), "proxy of agents of 1.x on a serial port; empty: vmcache proxy"),
    opt(PROXY, "enable_debug", Flag(false), "the proxy logs all it can, and the guest's console"),
    opt(
        FACTORY,
        "enable_template",
        Flag(false),
        "fill the pool with clones of a template: quick to make, sharing memory",
    ),
    opt(
        FACTORY,
        "template_path",
        Text("/run/vc/vm/template"),
        "where the template lives: in memory, or a tmpfs is mounted there",
    ),
    opt(FACTORY, "vm_cache_number", Number(0), "VMs kept ready; 0: VMCache is off"),
    opt(
        FACTORY,
        "vm_cache_endpoint",
        Text("/var/run/kata-containers/cache.sock"),
        "the server's socket; at most 107 bytes",
    ),
    opt(OURS, "accel", Text("kvm"), "kvm, or tcg where there is no KVM"),
    opt(
        OURS,
        "agent",
        Text("kata"),
        "which agent guests have: kata (or ours), hyperstart, or noop for bare VMs",
    ),
    opt(
        OURS,
        "transport",
        Text("auto"),
        "how to reach the agent: serial, vsock, vhost-user-vsock, or auto, which is serial",
    ),
    opt(
        OURS,
        "vsock_device",
        Text("/usr/bin/vhost-device-vsock"),
        "the program that carries a guest's vsock for transport = \"vhost-user-vsock\"",
    ),
    opt(
        OURS,
        "vsock_sockets",
        Text(""),
        "instead of starting it: the sockets of one that runs, for QEMU and for the host, with \
         a comma between (one VM only)",
    ),
    opt(OURS, "boot_timeout", Number(30), "seconds until a VM that is not ready has failed"),
    opt(
        OURS,
        "boot_parallel",
        Number(0),
        "VMs made at the same time; 0: one for each two host CPUs, at least two",
    ),
    opt(OURS, "pause_idle", Flag(true), "pause VMs that wait in the pool"),
    opt(
        OURS,
        "rehearse",
        Flag(true),
        "VMs that wait in the pool have run a command that does nothing, so that the first real \
         one finds all warm",
    ),
    opt(OURS, "vm_store_path", Text("/run/vc/vm"), "a directory for each VM is made here"),
    opt(OURS, "sandbox", Flag(true), "QEMU's seccomp sandbox with all its denials"),
    opt(
        OURS,
        "user",
        Text(""),
        "who QEMU runs as: a range of numbers such as \"1900000000-1900065535\", of which each VM \
         has one of its own; one user, for a server without a pool; or \"root\". Empty: a range \
         that the server finds free when it is root, else the server's own user",
    ),
    opt(
        OURS,
        "nested",
        Flag(false),
        "guests see the processor's own virtualisation (vmx, svm), and can run VMs",
    ),
    opt(
        OURS,
        "confine",
        Flag(true),
        "QEMU opens only its own VM's files (Landlock, Linux 5.13), has no capabilities and \
         gets none",
    ),
    opt(
        OURS,
        "confine_paths",
        List(&[]),
        "files and directories that QEMU may open beside: for clients that add disks by path, \
         as Kata's do",
    ),
    opt(
        OURS,
        "cgroup",
        Text(""),
        "where each VM has a cgroup with limits of memory, processes and CPU time, such as \
         \"vmcache\", a path below /sys/fs/cgroup; empty: none",
    ),
    opt(OURS, "apparmor_profile", Text(""), "AppArmor's profile for QEMU, loaded already"),
    opt(OURS, "selinux_label", Text(""), "SELinux's label for QEMU"),
    opt(OURS, "kernel_sha256", Text(""), "what the kernel must be; empty: anything"),
    opt(OURS, "initrd_sha256", Text(""), "what the initramfs must be; empty: anything"),
    opt(
        OURS,
        "claim_users",
        List(&[]),
        "users who may claim VMs, beside root and the server's; with claim_groups empty, too: \
         whoever may connect",
    ),
    opt(OURS, "claim_groups", List(&[]), "groups whose members may claim VMs"),
    opt(
        OURS,
        "kata_calls",
        Flag(true),
        "serve Kata's clients: GetBaseVM, and a SCSI controller in each VM, on which they plug \
         disks. false: GetBaseVM is refused, and VMs have no such controller",
    ),
    opt(OURS, "user_max_vms", Number(64), "VMs that a user but root may have at a time; 0: any"),
    opt(
        OURS,
        "user_max_memory",
        Number(0),
        "memory of the VMs that a user but root may have at a time, MiB; 0: half of the host's",
    ),
    opt(
        OURS,
        "user_unconfirmed_per_minute",
        Number(12),
        "claims a minute that a user but root may leave unconfirmed, each of which costs a VM; \
         0: any",
    ),
    opt(
        OURS,
        "lift_memory_limit",
        Flag(false),
        "the memory limit of a VM that a user but root claims by GetBaseVM is lifted, as root's \
         is: Kata's clients grow their VMs without a word",
    ),
    opt(
        OURS,
        "user_max_connections",
        Number(256),
        "connections that a user who may claim, but root, can have open",
    ),
    opt(OURS, "max_connections", Number(1024), "connections of all users who may claim, but root"),
    opt(
        OURS,
        "stranger_max_connections",
        Number(8),
        "connections that a user who may not claim can have open",
    ),
    opt(
        OURS,
        "strangers_max_connections",
        Number(64),
        "connections of all users who may not claim",
    ),
    opt(
        OURS,
        "stranger_max_streams",
        Number(16),
        "calls at a time on a connection of a user who may not claim",
    ),
    opt(OURS, "socket_mode", Text("0600"), "permissions of the server's socket, octal"),
    opt(OURS, "socket_group", Text(""), "group of the server's socket"),
    opt(
        OURS,
        "wire",
        Text("kata-1"),
        "whose VmConfig clients are told: kata-1 (1.13's), or kata-3 (3.20's)",
    ),
    opt(
        OURS,
        "served_config",
        Text(""),
        "a file made by `vmcache config import`: clients are told what it says, to the letter",
    ),
    opt(
        OURS,
        "log",
        Text("auto"),
        "where a server's messages go: syslog (/dev/log), stderr, unix:/PATH, udp:HOST:PORT, or \
         auto, which is syslog where there is no terminal",
    ),
    opt(
        OURS,
        "log_format",
        Text("auto"),
        "how syslog's are written: rfc3164, rfc5424, or auto, which is rfc3164 for /dev/log",
    ),
    opt(OURS, "log_level", Text("info"), "error, warn, info, debug or trace"),
];

/// The option of that table and name, Kata's included.
pub fn find(table: &str, key: &str) -> Option<&'static Opt> {
    OPTIONS.iter().chain(&kata::OPTIONS).find(|o| o.table == table && o.key == key)
}
