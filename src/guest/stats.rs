//! What a container uses, from its cgroup and the guest's network devices.

use std::collections::HashMap;
use std::fs;

use super::cgroup::Cgroup;
use crate::proto::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, MemoryData, MemoryStats,
    NetworkStats, PidsStats, StatsContainerResponse, ThrottlingData,
};

/// Reads everything now.
pub fn read(cgroup: &Cgroup) -> StatsContainerResponse {
    let cpu = fields(&cgroup.read("cpu.stat"));
    let mut memory = fields(&cgroup.read("memory.stat"));
    let get = |m: &HashMap<String, u64>, k: &str| m.get(k).copied().unwrap_or(0);
    let events = fields(&cgroup.read("memory.events"));
    // Who ended a process is asked of no other file.
    memory.insert("oom_kill".into(), get(&events, "oom_kill"));
    let number = |f: &str| -> u64 {
        match cgroup.read(f).trim() {
            "max" => u64::MAX,
            n => n.parse().unwrap_or(0),
        }
    };
    let stats = CgroupStats {
        cpu_stats: Some(CpuStats {
            cpu_usage: Some(CpuUsage {
                total_usage: get(&cpu, "usage_usec") * 1000,
                usage_in_kernelmode: get(&cpu, "system_usec") * 1000,
                usage_in_usermode: get(&cpu, "user_usec") * 1000,
                ..CpuUsage::default()
            })
            .into(),
            throttling_data: Some(ThrottlingData {
                periods: get(&cpu, "nr_periods"),
                throttled_periods: get(&cpu, "nr_throttled"),
                throttled_time: get(&cpu, "throttled_usec") * 1000,
                ..ThrottlingData::default()
            })
            .into(),
            ..CpuStats::default()
        })
        .into(),
        memory_stats: Some(MemoryStats {
            cache: get(&memory, "file"),
            usage: Some(MemoryData {
                usage: number("memory.current"),
                max_usage: number("memory.peak"),
                failcnt: get(&events, "max"),
                limit: number("memory.max"),
                ..MemoryData::default()
            })
            .into(),
            swap_usage: Some(MemoryData {
                usage: number("memory.swap.current"),
                limit: number("memory.swap.max"),
                ..MemoryData::default()
            })
            .into(),
            use_hierarchy: true,
            stats: memory,
            ..MemoryStats::default()
        })
        .into(),
        pids_stats: Some(PidsStats {
            current: number("pids.current"),
            limit: match number("pids.max") {
                u64::MAX => 0,
                n => n,
            },
            ..PidsStats::default()
        })
        .into(),
        blkio_stats: Some(block(&cgroup.read("io.stat"))).into(),
        ..CgroupStats::default()
    };
    StatsContainerResponse {
        cgroup_stats: Some(stats).into(),
        network_stats: network(&fs::read_to_string("/proc/net/dev").unwrap_or_default()),
        ..StatsContainerResponse::default()
    }
}

/// Lines of `key value`.
fn fields(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|l| l.split_once(' '))
        .filter_map(|(k, v)| Some((k.to_string(), v.trim().parse().ok()?)))
        .collect()
}

/// Lines of `major:minor rbytes=N wbytes=N rios=N wios=N …`.
fn block(text: &str) -> BlkioStats {
    let mut out = BlkioStats::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some((major, minor)) = words.next().and_then(|d| d.split_once(':')) else { continue };
        for (key, value) in words.filter_map(|w| w.split_once('=')) {
            let entry = |op: &str| BlkioStatsEntry {
                major: major.parse().unwrap_or(0),
                minor: minor.parse().unwrap_or(0),
                op: op.to_string(),
                value: value.parse().unwrap_or(0),
                ..BlkioStatsEntry::default()
            };
            match key {
                "rbytes" => out.io_service_bytes_recursive.push(entry("Read")),
                "wbytes" => out.io_service_bytes_recursive.push(entry("Write")),
                "rios" => out.io_serviced_recursive.push(entry("Read")),
                "wios" => out.io_serviced_recursive.push(entry("Write")),
                _ => {}
            }
        }
    }
    out
}

/// The table of `/proc/net/dev`.
fn network(text: &str) -> Vec<NetworkStats> {
    let mut out = Vec::new();
    for (name, rest) in text.lines().filter_map(|l| l.split_once(':')) {
        let n: Vec<u64> = rest.split_whitespace().filter_map(|w| w.parse().ok()).collect();
        if n.len() >= 12 {
            out.push(NetworkStats {
                name: name.trim().to_string(),
                rx_bytes: n[0],
                rx_packets: n[1],
                rx_errors: n[2],
                rx_dropped: n[3],
                tx_bytes: n[8],
                tx_packets: n[9],
                tx_errors: n[10],
                tx_dropped: n[11],
                ..NetworkStats::default()
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_and_network_tables_are_read() {
        let b = block("8:0 rbytes=512 wbytes=1024 rios=1 wios=2 dbytes=0 dios=0\n");
        assert_eq!(b.io_service_bytes_recursive[1].value, 1024);
        let n = network("Inter-|x\n face |y\n lo: 10 1 0 0 0 0 0 0 20 2 0 0 0 0 0 0\n");
        assert_eq!((n[0].name.as_str(), n[0].rx_bytes, n[0].tx_bytes), ("lo", 10, 20));
    }
}
