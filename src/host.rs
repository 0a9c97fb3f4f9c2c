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

/// Huge pages that are free, MiB.
pub fn free_huge_mib() -> u64 {
    number("HugePages_Free:") * number("Hugepagesize:") / 1024
}

/// All huge pages, MiB.
pub fn huge_mib() -> u64 {
    number("HugePages_Total:") * number("Hugepagesize:") / 1024
}

/// Of the last ten seconds, the share in hundredths in which some process stood still
/// for want of memory; `None` where the kernel does not measure it.
pub fn memory_pressure() -> Option<f64> {
    stalled(&std::fs::read_to_string("/proc/pressure/memory").ok()?)
}

/// Memory of this process that is in memory, bytes; 0 where /proc does not tell.
pub fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib: Option<u64> = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(0) * 1024
}

fn stalled(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|l| l.strip_prefix("some "))?;
    some.split(' ').find_map(|w| w.strip_prefix("avg10="))?.parse().ok()
}

fn meminfo(key: &str) -> u64 {
    number(key) / 1024
}

fn number(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn pressure_is_read_as_the_kernel_writes_it() {
        let text = "some avg10=12.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=9.00 total=0\n";
        assert_eq!(super::stalled(text), Some(12.5));
        assert_eq!(super::stalled("nonsense"), None);
        assert_eq!(super::stalled("some avg10=x"), None);
    }
}
