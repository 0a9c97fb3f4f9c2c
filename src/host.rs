//! What this host has: processors and memory.

/// Processors that this process may use.
pub fn cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// Processors that there are; those that this process may use where /proc does
/// not tell.
pub fn processors() -> u32 {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match text.lines().filter(|l| l.starts_with("processor")).count() as u32 {
        0 => cpus(),
        n => n,
    }
}

/// Memory, MiB; 0 where /proc does not tell.
pub fn memory_mib() -> u64 {
    meminfo("MemTotal:")
}

/// Memory that can be had without swapping, MiB, as the kernel estimates it; 0
/// where /proc does not tell.
pub fn available_mib() -> u64 {
    meminfo("MemAvailable:")
}

fn meminfo(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key));
    let kib: u64 = line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    kib / 1024
}
