//! What an idle server and its paused VMs cost: memory, wake-ups, CPU.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use serde_json::{json, Value};

use crate::cli::output::{Failure, FAILED};
use crate::sys::process::ticks_per_second;

/// Threads that are ours, by their names; all others are gRPC's.
fn is_ours(name: &str) -> bool {
    name == "vmcache" || (name.starts_with("vmc-") && !name.starts_with("vmc-rpc"))
}

/// A field of a /proc status file that counts.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix(name));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Voluntary context switches by thread.
fn wake_ups(pid: u64) -> HashMap<String, (bool, u64)> {
    let mut out = HashMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let id = task.file_name().to_string_lossy().into_owned();
        out.insert(id, (is_ours(name.trim()), field(&status, "voluntary_ctxt_switches:")));
    }
    out
}

/// CPU time of a process, in ticks.
fn cpu(pid: u64) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    fields.split_whitespace().skip(11).take(2).filter_map(|f| f.parse::<u64>().ok()).sum()
}

/// Watches for `time`, in which nobody should call the server.
pub fn watch(status: &Value, time: Duration) -> Result<Value, Failure> {
    let pid = status["pid"].as_u64().unwrap_or(0);
    let vms: Vec<u64> = status["vms"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|vm| vm["pid"].as_u64())
        .collect();
    let text = fs::read_to_string(format!("/proc/{pid}/status"))
        .map_err(|e| Failure::new(FAILED, format!("look at the server, pid {pid}: {e}")))?;
    let before = wake_ups(pid);
    let cpu_before: u64 = vms.iter().map(|p| cpu(*p)).sum();
    pause(time);
    let after = wake_ups(pid);
    let cpu_after: u64 = vms.iter().map(|p| cpu(*p)).sum();
    let count = |ours: bool| {
        let grown = after
            .iter()
            .filter(|(_, (o, _))| *o == ours)
            .map(|(id, (_, n))| n.saturating_sub(before.get(id).map_or(0, |(_, b)| *b)));
        grown.sum::<u64>() as f64 / time.as_secs_f64()
    };
    let seconds = cpu_after.saturating_sub(cpu_before) as f64 / ticks_per_second() as f64;
    Ok(json!({
        "seconds": time.as_secs(),
        "vms": vms.len(),
        "rss_kib": field(&text, "VmRSS:"),
        "own_wakeups_per_s": count(true),
        "grpc_wakeups_per_s": count(false),
        "vms_cpu_percent": 100.0 * seconds / time.as_secs_f64(),
    }))
}

#[allow(clippy::disallowed_methods)] // Doing nothing is what is measured.
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Lines for people.
pub fn render(v: &Value) -> String {
    let n = |k: &str| v[k].as_f64().unwrap_or(f64::NAN);
    let verdict = |good: bool| if good { "met" } else { "NOT met" };
    let rss = n("rss_kib") / 1024.0;
    format!(
        "S5  memory of the server with {} VMs: {rss:.1} MiB (at most 16: {})\n\
         S6  idle for {} s: own threads wake {:.2} times a second (0: {}), gRPC's {:.2} \
         (at most 6: {}), all VMs take {:.2} % CPU (under 0.5: {})\n",
        v["vms"],
        verdict(rss <= 16.0),
        v["seconds"],
        n("own_wakeups_per_s"),
        verdict(n("own_wakeups_per_s") < 0.05),
        n("grpc_wakeups_per_s"),
        verdict(n("grpc_wakeups_per_s") <= 6.0),
        n("vms_cpu_percent"),
        verdict(n("vms_cpu_percent") < 0.5),
    )
}
