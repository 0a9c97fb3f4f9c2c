//! A server's status as OpenMetrics, for Prometheus by way of node_exporter's textfile
//! collector.
//!
//! Invariants: names and labels are only ever added; a file is whole or is the one before.
//!
//! Source: the OpenMetrics specification, 1.0.

use std::io;
use std::path::Path;

use serde_json::Value;

use super::escape;
use crate::trusted_path::Destination;

/// All families: name, kind, meaning. What is counted counts from the server's start.
pub const FAMILIES: &[(&str, &str, &str)] = &[
    ("vmcache_up", "gauge", "Whether the server answered."),
    ("vmcache_pool_target", "gauge", "VMs that are to stand ready."),
    ("vmcache_pool_vms", "gauge", "VMs by their state."),
    ("vmcache_claims_waiting", "gauge", "Claims in line."),
    ("vmcache_refill_held", "gauge", "Whether no VM is made though some are missing."),
    ("vmcache_threads_stuck", "gauge", "Threads that take longer than they may."),
    ("vmcache_memory_bytes", "gauge", "Memory of the server, resident."),
    (
        "vmcache_isolation_info",
        "gauge",
        "How guests are executed, and how far they are isolated: vm, weak or none.",
    ),
    ("vmcache_claims", "counter", "Claims by what came of them, and by the VM's source."),
    ("vmcache_boots", "counter", "VMs made."),
    ("vmcache_boots_failed", "counter", "VMs that could not be made."),
    ("vmcache_adopted", "counter", "VMs taken over from a server before."),
    ("vmcache_died_ready", "counter", "VMs that died while they stood ready."),
    ("vmcache_leases_ended", "counter", "VMs ended with the process that leased them."),
    ("vmcache_failures", "counter", "Boots that failed, by what did not come."),
    ("vmcache_claim_seconds", "histogram", "From a claim's coming to its client's having the VM."),
    (
        "vmcache_exec_ready_seconds",
        "histogram",
        "From a client's asking until its VM could run a command, as clients tell.",
    ),
    ("vmcache_boot_seconds", "histogram", "Until a VM is ready that was booted."),
    ("vmcache_clone_seconds", "histogram", "Until a VM is ready that was cloned."),
];

/// For whom the text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// OpenMetrics, 1.0.
    Open,
    /// Prometheus' own form before that, which node_exporter reads from files: there a
    /// counter's family has its samples' name, and nothing ends the text.
    Textfile,
}

/// The text of a server that does not answer.
pub fn down(form: Form) -> String {
    let mut out = Text::of(form);
    out.family("vmcache_up");
    out.sample("vmcache_up", &[], 0.0);
    out.end()
}

/// The text, with its end.
pub fn openmetrics(status: &Value, form: Form) -> String {
    let mut out = Text::of(form);
    out.family("vmcache_up");
    out.sample("vmcache_up", &[], 1.0);
    let pool = &status["pool"];
    out.family("vmcache_pool_target");
    out.sample("vmcache_pool_target", &[], number(&pool["target"]));
    out.family("vmcache_pool_vms");
    for state in ["ready", "awake", "booting", "outdated"] {
        out.sample("vmcache_pool_vms", &[("state", state)], number(&pool[state]));
    }
    let handed = status["vms"].as_array().into_iter().flatten();
    let handed = handed.filter(|vm| vm["state"] == "handed").count();
    out.sample("vmcache_pool_vms", &[("state", "handed")], handed as f64);
    out.family("vmcache_claims_waiting");
    out.sample("vmcache_claims_waiting", &[], number(&pool["waiting"]));
    out.family("vmcache_refill_held");
    out.sample("vmcache_refill_held", &[], f64::from(u8::from(!pool["held"].is_null())));
    let stuck = status["stuck"].as_array().map_or(0, Vec::len);
    out.family("vmcache_threads_stuck");
    out.sample("vmcache_threads_stuck", &[], stuck as f64);
    out.family("vmcache_memory_bytes");
    out.sample("vmcache_memory_bytes", &[], number(&status["memory_bytes"]));
    if let Some(isolation) = status["isolation"]["isolation"].as_str() {
        out.family("vmcache_isolation_info");
        let accel = status["isolation"]["accel"].as_str().unwrap_or_default();
        out.sample("vmcache_isolation_info", &[("accel", accel), ("isolation", isolation)], 1.0);
    }
    counters(&mut out, &status["counters"], &status["claims"]);
    let failures = status["failures"].as_object().filter(|all| !all.is_empty());
    if failures.is_some() {
        // A family without a sample is none.
        out.family("vmcache_failures");
    }
    for (reason, n) in failures.into_iter().flatten() {
        out.sample("vmcache_failures_total", &[("reason", reason)], number(n));
    }
    histograms(&mut out, &status["latency"]);
    out.end()
}

fn counters(out: &mut Text, counters: &Value, claims: &Value) {
    out.family("vmcache_claims");
    for (source, by) in claims.as_object().into_iter().flatten() {
        for outcome in ["from_pool", "waited"] {
            let labels = [("outcome", outcome), ("source", source)];
            out.sample("vmcache_claims_total", &labels, number(&by[outcome]));
        }
    }
    for (key, outcome) in [
        ("claims_cancelled", "cancelled"),
        ("deliveries_failed", "delivery_failed"),
        ("claims_unconfirmed", "unconfirmed"),
    ] {
        let labels = [("outcome", outcome), ("source", "none")];
        out.sample("vmcache_claims_total", &labels, number(&counters[key]));
    }
    for key in ["boots", "boots_failed", "adopted", "died_ready", "leases_ended"] {
        let name = format!("vmcache_{key}");
        out.family(&name);
        out.sample(&format!("{name}_total"), &[], number(&counters[key]));
    }
}

fn histograms(out: &mut Text, latency: &Value) {
    for (key, name) in [
        ("claim", "vmcache_claim_seconds"),
        ("exec_ready", "vmcache_exec_ready_seconds"),
        ("direct", "vmcache_boot_seconds"),
        ("template", "vmcache_clone_seconds"),
    ] {
        let histogram = &latency[key];
        if histogram.is_null() {
            continue;
        }
        out.family(name);
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

struct Text {
    form: Form,
    text: String,
}

impl Text {
    fn of(form: Form) -> Text {
        Text { form, text: String::new() }
    }

    fn end(mut self) -> String {
        if self.form == Form::Open {
            self.text.push_str("# EOF\n");
        }
        self.text
    }

    fn family(&mut self, name: &str) {
        if let Some((_, kind, help)) = FAMILIES.iter().find(|(n, ..)| *n == name) {
            let total =
                if self.form == Form::Textfile && *kind == "counter" { "_total" } else { "" };
            let lines = format!("# TYPE {name}{total} {kind}\n# HELP {name}{total} {help}\n");
            self.text.push_str(&lines);
        }
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        // Harmless first: what that adds is then escaped as the format wants it.
        let escaped = |v: &str| escape::line(v).replace('\\', "\\\\").replace('"', "\\\"");
        let labels: Vec<_> =
            labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escaped(v))).collect();
        let labels = match labels.is_empty() {
            true => String::new(),
            false => format!("{{{}}}", labels.join(",")),
        };
        self.text.push_str(&format!("{name}{labels} {value}\n"));
    }
}

/// Puts the text into a file's place.
///
/// # Errors
/// As the file system's, and when the place is not this user's; the file before then stands.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    // Until it is whole it has no name with `.prom`, which is what the collector reads.
    Destination::named(path)?.replace(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The names in a text that look like ours.
    fn names(text: &str) -> Vec<&str> {
        let part = |c: char| c.is_ascii_lowercase() || c == '_';
        let words = text.split(|c| !part(c));
        words.filter(|w| w.starts_with("vmcache_")).collect()
    }

    #[test]
    fn dashboard_and_alerts_use_these_names() {
        let files = [
            include_str!("../../packaging/metrics/dashboard.json"),
            include_str!("../../packaging/metrics/alerts.yml"),
        ];
        let known = |word: &str| {
            FAMILIES.iter().any(|(name, kind, _)| match *kind {
                "gauge" => word == *name,
                "counter" => word == format!("{name}_total"),
                _ => word == format!("{name}_bucket"),
            })
        };
        for file in files {
            let used = names(file);
            assert!(used.len() > 8);
            for word in used {
                assert!(known(word), "{word} is no measure of ours");
            }
        }
        // And the dashboard shows all there is.
        for (name, ..) in FAMILIES {
            let shown = names(files[0]).iter().any(|word| word.starts_with(name));
            assert!(shown, "the dashboard does not show {name}");
        }
    }
}
