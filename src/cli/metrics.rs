//! A server's status as OpenMetrics, for Prometheus by way of node_exporter's textfile
//! collector.
//!
//! Invariants: names and labels are only ever added; a file is whole or is the one before.
//!
//! Source: the OpenMetrics specification, 1.0.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

/// The text, with its end.
pub fn openmetrics(status: &Value) -> String {
    let mut out = Text::default();
    out.family("vmcache_up", "gauge", "Whether the server answered.");
    out.sample("vmcache_up", &[], 1.0);
    let pool = &status["pool"];
    out.family("vmcache_pool_target", "gauge", "VMs that are to stand ready.");
    out.sample("vmcache_pool_target", &[], number(&pool["target"]));
    out.family("vmcache_pool_vms", "gauge", "VMs by their state.");
    for state in ["ready", "awake", "booting"] {
        out.sample("vmcache_pool_vms", &[("state", state)], number(&pool[state]));
    }
    let handed = status["vms"].as_array().into_iter().flatten();
    let handed = handed.filter(|vm| vm["state"] == "handed").count();
    out.sample("vmcache_pool_vms", &[("state", "handed")], handed as f64);
    out.family("vmcache_claims_waiting", "gauge", "Claims in line.");
    out.sample("vmcache_claims_waiting", &[], number(&pool["waiting"]));
    out.family("vmcache_refill_held", "gauge", "Whether no VM is made though some are missing.");
    out.sample("vmcache_refill_held", &[], f64::from(u8::from(!pool["held"].is_null())));
    let stuck = status["stuck"].as_array().map_or(0, Vec::len);
    out.family("vmcache_threads_stuck", "gauge", "Threads that take longer than they may.");
    out.sample("vmcache_threads_stuck", &[], stuck as f64);
    out.family("vmcache_memory_bytes", "gauge", "Memory of the server, resident.");
    out.sample("vmcache_memory_bytes", &[], number(&status["memory_bytes"]));
    counters(&mut out, &status["counters"]);
    let failures = status["failures"].as_object().filter(|all| !all.is_empty());
    if failures.is_some() {
        // A family without a sample is none.
        out.family("vmcache_failures", "counter", "Boots that failed, by what did not come.");
    }
    for (reason, n) in failures.into_iter().flatten() {
        out.sample("vmcache_failures_total", &[("reason", reason)], number(n));
    }
    histograms(&mut out, &status["latency"]);
    out.0.push_str("# EOF\n");
    out.0
}

fn counters(out: &mut Text, counters: &Value) {
    out.family("vmcache_claims", "counter", "Claims by what came of them.");
    for (key, outcome) in [
        ("claims_from_pool", "from_pool"),
        ("claims_waited", "waited"),
        ("claims_cancelled", "cancelled"),
        ("deliveries_failed", "delivery_failed"),
        ("claims_unconfirmed", "unconfirmed"),
    ] {
        out.sample("vmcache_claims_total", &[("outcome", outcome)], number(&counters[key]));
    }
    for (key, name, help) in [
        ("boots", "vmcache_boots", "VMs made."),
        ("boots_failed", "vmcache_boots_failed", "VMs that could not be made."),
        ("adopted", "vmcache_adopted", "VMs taken over from a server before."),
        ("died_ready", "vmcache_died_ready", "VMs that died while they stood ready."),
        ("leases_ended", "vmcache_leases_ended", "VMs ended with the process that leased them."),
    ] {
        out.family(name, "counter", help);
        out.sample(&format!("{name}_total"), &[], number(&counters[key]));
    }
}

fn histograms(out: &mut Text, latency: &Value) {
    for (key, name, help) in [
        ("claim", "vmcache_claim_seconds", "From a claim's coming to its client's having the VM."),
        ("direct", "vmcache_boot_seconds", "Until a VM is ready that was booted."),
        ("template", "vmcache_clone_seconds", "Until a VM is ready that was cloned."),
    ] {
        let histogram = &latency[key];
        if histogram.is_null() {
            continue;
        }
        out.family(name, "histogram", help);
        for bucket in histogram["buckets"].as_array().into_iter().flatten() {
            let bound = bucket["le"].as_f64().map_or("+Inf".to_string(), |le| format!("{le}"));
            out.sample(&format!("{name}_bucket"), &[("le", &bound)], number(&bucket["count"]));
        }
        out.sample(&format!("{name}_sum"), &[], number(&histogram["sum"]));
        out.sample(&format!("{name}_count"), &[], number(&histogram["count"]));
    }
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or(0.0)
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.0.push_str(&format!("# TYPE {name} {kind}\n# HELP {name} {help}\n"));
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let escaped = |v: &str| v.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
        let labels: Vec<_> =
            labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escaped(v))).collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        self.0.push_str(&format!("{name}{labels} {value}\n"));
    }
}

/// Puts the text into a file's place.
///
/// # Errors
/// As the file system's; the file before then stands.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut new = path.as_os_str().to_os_string();
    // Not `.prom`, which is what the collector reads.
    new.push(".new");
    fs::write(&new, text)?;
    fs::rename(&new, path)
}
