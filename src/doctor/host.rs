//! The host's kernel, memory and limits.

use std::fs;
use std::path::Path;

use nix::sys::resource::{getrlimit, Resource};
use nix::sys::statvfs::statvfs;

use super::{finding, good, Finding, State};
use crate::config::options::{FACTORY, OURS, QEMU};
use crate::config::{Config, Transport};
use crate::confine;
use crate::host;

/// File descriptors for each VM: its pidfd, its claim note, and some.
const FDS_OF_VM: u64 = 4;
/// For each connection of others than root: its own, and both ends of a pair to gRPC.
const FDS_OF_CONNECTION: u64 = 3;
/// And for all else.
const FDS: u64 = 256;
/// Processes and threads of a VM beside its CPUs.
const TASKS_OF_VM: u64 = 16;

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|t| t.trim().to_string())
}

/// What the kernel has.
pub fn kernel(config: &Config) -> Vec<Finding> {
    vec![landlock(config), cgroups(config), modules(), vsock(config), network(), huge_guests()]
}

fn landlock(config: &Config) -> Finding {
    if !config.flag(OURS, "confine") {
        let text = "confine is false: a QEMU that was taken over opens what its user may";
        return finding("landlock", State::Warning, text, "leave confine out, or set it true");
    }
    match confine::files::possible() {
        true => good("landlock", "QEMU opens only its own VM's files"),
        false => finding(
            "landlock",
            State::Warning,
            "this kernel has none, or it is not enabled",
            "Linux 5.13 or later with `landlock` in lsm=; `user` and AppArmor help meanwhile",
        ),
    }
}

fn cgroups(config: &Config) -> Finding {
    let two = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let wanted = config.text(OURS, "cgroup");
    match (two, wanted) {
        (_, "") if config.names_claimers() => finding(
            "cgroup",
            State::Warning,
            "VMs have none of their own: by its VM's monitor, who claims can have QEMU take more \
             memory than user_max_memory",
            "set cgroup = \"vmcache\"",
        ),
        (_, "") => finding(
            "cgroup",
            State::Note,
            "VMs have none of their own: nothing limits one but its size",
            "set cgroup = \"vmcache\"",
        ),
        (true, path) => good("cgroup", format!("version 2, below {path}")),
        (false, path) => finding(
            "cgroup",
            State::Note,
            format!("version 1, below {path}"),
            "version 2 is what distributions have now",
        ),
    }
}

fn modules() -> Finding {
    for (name, file) in
        [("AppArmor", "/sys/kernel/security/apparmor"), ("SELinux", "/sys/fs/selinux")]
    {
        if Path::new(file).exists() {
            return good("lsm", format!("{name}: apparmor_profile or selinux_label can be set"));
        }
    }
    finding("lsm", State::Note, "neither AppArmor nor SELinux", "")
}

fn vsock(config: &Config) -> Finding {
    let there = Path::new(crate::transport::vsock::DEVICE).exists();
    match (config.transport(), there) {
        (Transport::Vsock, false) => finding(
            "vhost-vsock",
            State::Missing,
            "transport is vsock, and /dev/vhost-vsock is not there",
            "`modprobe vhost_vsock`, or set transport = \"serial\"",
        ),
        (Transport::Vsock, true) => finding(
            "vhost-vsock",
            State::Warning,
            "any user of this host can connect to a guest's vsock port; the kernel has no remedy",
            "transport = \"serial\", whose sockets are private",
        ),
        (_, there) => good(
            "vhost-vsock",
            if there { "there, and not used" } else { "not there, and not needed" },
        ),
    }
}

fn network() -> Finding {
    match Path::new("/dev/vhost-net").exists() {
        true => good("vhost-net", "/dev/vhost-net is there"),
        false => {
            finding("vhost-net", State::Note, "/dev/vhost-net is not there", "`modprobe vhost_net`")
        }
    }
}

fn huge_guests() -> Finding {
    match read("/sys/module/kvm/parameters/nx_huge_pages").as_deref() {
        Some("Y" | "force" | "auto") => finding(
            "nx_huge_pages",
            State::Note,
            "kvm splits huge pages of guests that execute from them (iTLB multihit)",
            "on processors that are not affected: kvm.nx_huge_pages=off",
        ),
        _ => good("nx_huge_pages", "off, or no KVM"),
    }
}

/// Memory, and what of it is for what.
pub fn memory(config: &Config) -> Vec<Finding> {
    vec![pool(config), shm(config), template(config), swap(), huge(config), ksm()]
}

fn pool(config: &Config) -> Finding {
    let (all, free) = (host::memory_mib(), host::available_mib());
    let needed = config.pool as u64 * (u64::from(config.memory()) + crate::config::QEMU_MIB);
    let text = format!(
        "{} VMs of {} MiB may take {needed} MiB; {free} of {all} MiB are available",
        config.pool,
        config.memory()
    );
    match needed {
        _ if config.check_room().is_err() => {
            finding("memory", State::Missing, text, "make the pool or its VMs smaller")
        }
        n if n > free && !config.flag(FACTORY, "enable_template") => finding(
            "memory",
            State::Warning,
            text,
            "refill waits when memory is short: make the pool smaller, or free some",
        ),
        _ => good("memory", text),
    }
}

fn shm(config: &Config) -> Finding {
    let free = statvfs("/dev/shm").map_or(0, |s| (s.blocks_available() * s.fragment_size()) >> 20);
    let below = |path: &str| path.starts_with("/dev/shm");
    let files = below(config.text(QEMU, "file_mem_backend"));
    let needed = match files {
        true => config.pool as u64 * u64::from(config.memory()),
        false => 0,
    };
    let text = format!("/dev/shm has {free} MiB free, the pool needs {needed} MiB of it");
    match free < needed {
        true => finding(
            "shm",
            State::Missing,
            text,
            "`mount -o remount,size=… /dev/shm`, or leave file_mem_backend out",
        ),
        false => good("shm", text),
    }
}

fn template(config: &Config) -> Finding {
    if !config.flag(FACTORY, "enable_template") {
        return good("template", "not used");
    }
    let path = config.text(FACTORY, "template_path");
    let there = Path::new(path).ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let mib = statvfs(there).map_or(0, |s| (s.blocks_available() * s.fragment_size()) >> 20);
    let needed = u64::from(config.memory()) + 16;
    let mounted = there == Path::new(path);
    match mib < needed && mounted && !nix::unistd::geteuid().is_root() {
        true => finding(
            "template",
            State::Missing,
            format!("{path} has room for {mib} MiB, a template needs {needed} MiB"),
            "a directory below /dev/shm with room, or a tmpfs of its own",
        ),
        false => good("template", format!("{path}: {mib} MiB free, {needed} MiB needed")),
    }
}

fn swap() -> Finding {
    let used = read("/proc/swaps").is_some_and(|t| t.lines().count() > 1);
    match used {
        false => good("swap", "none: guests' memory stays in memory"),
        true => finding(
            "swap",
            State::Note,
            "this host swaps: a guest that was swapped out answers late, and its memory is on disk",
            "swapoff, or memory.swap.max for VMs, where that matters",
        ),
    }
}

fn huge(config: &Config) -> Finding {
    let (all, free) = (host::huge_mib(), host::free_huge_mib());
    match config.flag(QEMU, "enable_hugepages") {
        false => good("hugepages", format!("not used ({all} MiB are set aside)")),
        true if free == 0 => finding(
            "hugepages",
            State::Missing,
            format!("enable_hugepages, and none of {all} MiB is free"),
            "set vm.nr_hugepages",
        ),
        true => good("hugepages", format!("{free} of {all} MiB free")),
    }
}

fn ksm() -> Finding {
    match read("/sys/kernel/mm/ksm/run").as_deref() {
        Some("1") => finding(
            "ksm",
            State::Warning,
            "the kernel merges equal pages: one guest can measure what another has",
            "`echo 2 >/sys/kernel/mm/ksm/run` between tenants who must not",
        ),
        _ => good("ksm", "off"),
    }
}

/// What this user may have.
pub fn limits(config: &Config) -> Vec<Finding> {
    let pool = config.pool as u64;
    let connections = ["max_connections", "strangers_max_connections"];
    let connections: u64 = connections.iter().map(|key| config.number(OURS, key)).sum();
    let files = FDS + pool * FDS_OF_VM + connections * FDS_OF_CONNECTION;
    let tasks = pool * (TASKS_OF_VM + u64::from(config.max_cpus()));
    let within = |name, resource, needed: u64, remedy: &str| {
        let most = getrlimit(resource).map_or(u64::MAX, |(_, hard)| hard);
        let most_text = if most == u64::MAX { "any number".into() } else { most.to_string() };
        let text = format!("{most_text} allowed, {needed} may be needed");
        match most < needed {
            true => finding(name, State::Warning, text, remedy),
            false => good(name, text),
        }
    };
    vec![
        within("open files", Resource::RLIMIT_NOFILE, files, "LimitNOFILE= of the unit, ulimit -n"),
        locked(config),
        tasks_of_host(tasks),
        within("processes", Resource::RLIMIT_NPROC, tasks, "LimitNPROC=, TasksMax=, ulimit -u"),
    ]
}

/// Devices of the host that clients add (VFIO) lock a guest's memory.
fn locked(config: &Config) -> Finding {
    let most = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(_, hard)| hard) >> 20;
    let memory = u64::from(config.memory());
    let text = format!("{most} MiB allowed; a device of the host wants a guest's {memory} MiB");
    match most < memory {
        true => finding("locked memory", State::Note, text, "with such devices: LimitMEMLOCK="),
        false => good("locked memory", "enough for a guest with devices of the host"),
    }
}

/// What the kernel and this process's cgroup allow of processes and threads.
fn tasks_of_host(needed: u64) -> Finding {
    let number = |path: &str| read(path).and_then(|t| t.parse::<u64>().ok()).unwrap_or(u64::MAX);
    let own = read("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|l| l.strip_prefix("0::")).unwrap_or("/").to_string();
    let most = [
        ("kernel.pid_max", number("/proc/sys/kernel/pid_max")),
        ("kernel.threads-max", number("/proc/sys/kernel/threads-max")),
        ("pids.max of this cgroup", number(&format!("/sys/fs/cgroup{own}/pids.max"))),
    ];
    let (which, most) = most.into_iter().min_by_key(|(_, n)| *n).unwrap_or(("", u64::MAX));
    let text = format!("{which} allows {most}, {needed} may be needed");
    match most < needed {
        true => finding("tasks", State::Warning, text, "TasksMax=infinity, sysctl kernel.pid_max"),
        false => good("tasks", text),
    }
}
