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
    #[cfg(feature = "faults")]
    if let Some(mib) = crate::faults::number("memory") {
        return mib;
    }
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

/// What the host has again when a process ends, MiB: in pages of the usual size, and in
/// huge ones; 0 for one that is gone. Of files in memory that it has mapped nothing comes
/// back if they stay (`files_stay`), as a template's does.
pub fn freed_with_mib(pid: i32, files_stay: bool) -> (u64, u64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let of = |key| kib(&status, key) / 1024;
    let files = if files_stay { 0 } else { of("RssShmem:") };
    (of("RssAnon:") + files, of("HugetlbPages:"))
}

/// Memory of this process that is in memory, bytes; 0 where /proc does not tell.
pub fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    kib(&text, "VmRSS:") * 1024
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
    kib(&text, key)
}

/// A number of a file of proc's whose lines begin with their key; 0 if it is not there.
fn kib(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(key));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_a_process_has_alone_ends_with_it() {
        let own = std::process::id() as i32;
        let (before, huge) = super::freed_with_mib(own, true);
        let much = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = super::freed_with_mib(own, true).0;
        // Others of these tests come and go in this process.
        assert!(after >= before + 48, "{before} and {after} MiB with {} bytes more", much.len());
        assert_eq!(huge, 0);
        // Nobody's.
        assert_eq!(super::freed_with_mib(i32::MAX, false), (0, 0));
    }

    #[test]
    fn pressure_is_read_as_the_kernel_writes_it() {
        let text = "some avg10=12.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=9.00 total=0\n";
        assert_eq!(super::stalled(text), Some(12.5));
        assert_eq!(super::stalled("nonsense"), None);
        assert_eq!(super::stalled("some avg10=x"), None);
    }
}
