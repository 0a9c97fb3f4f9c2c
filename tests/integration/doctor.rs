//! What a host has and lacks, and what a server counts, in the words of others' tools.

use std::fs;

use serde_json::Value;

use crate::daemon::{assert_nothing_left, qemus, text, vmcache, Daemon, Dir, Options};
use crate::require_qemu;

fn doctor(options: &Options, dir: &Dir, args: &[&str]) -> (Option<i32>, Value, String) {
    let config = dir.0.join("c.toml");
    fs::write(&config, options.text(&dir.0)).unwrap();
    let out = vmcache(&config).args(["doctor", "--json"]).args(args).output().unwrap();
    let said = text(&out.stdout);
    let json = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
    (out.status.code(), json, text(&out.stderr))
}

fn finding<'a>(json: &'a Value, name: &str) -> &'a Value {
    let all = json["findings"].as_array().unwrap();
    all.iter().find(|f| f["name"] == name).unwrap_or_else(|| panic!("no {name} in {json}"))
}

#[test]
fn doctor_boots_a_guest_and_says_what_is_missing() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let options = Options::pool(&prepared, 1);
    let (code, json, err) = doctor(&options, &dir, &[]);
    assert_eq!((code, &json["good"]), (Some(0), &true.into()), "{json}{err}");
    let boot = finding(&json, "boot");
    assert_eq!(boot["state"], "good", "{boot}");
    assert!(boot["evidence"].as_str().unwrap().contains("agent answered after"));
    assert_eq!(finding(&json, "qemu")["state"], "good");
    assert_eq!(finding(&json, "landlock")["state"], "good");
    let versions = finding(&json, "versions");
    assert_eq!(versions["state"], "good", "{versions}");
    assert!(qemus(&dir.0).is_empty());

    let mut options = Options::pool(&prepared, 1);
    options.kernel = "/nonexistent/vmlinuz".into();
    let (code, json, _) = doctor(&options, &dir, &[]);
    assert_eq!((code, &json["good"]), (Some(5), &false.into()));
    assert_eq!(finding(&json, "images")["state"], "missing");
    // What can not be is not tried.
    assert_eq!(finding(&json, "boot")["state"], "note");

    // KVM is proven by a guest: on these machines its device opens, and none runs.
    let mut options = Options::pool(&prepared, 1);
    options.more_ours = "accel = \"kvm\"\n".into();
    options.timeout = 20;
    let (code, json, _) = doctor(&options, &dir, &[]);
    let (kvm, boot) = (finding(&json, "kvm"), finding(&json, "boot"));
    match (kvm["state"].as_str(), boot["state"].as_str()) {
        (Some("good"), Some("good")) => assert_eq!(code, Some(0)),
        (Some("good"), Some("missing")) => {
            assert_eq!(code, Some(5));
            assert!(boot["remedy"].as_str().unwrap().contains("accel = \"tcg\""), "{boot}");
        }
        (Some("missing"), Some("note")) => assert_eq!(code, Some(5)),
        other => panic!("{other:?}: {json}"),
    }
    assert!(qemus(&dir.0).is_empty());
}

#[test]
fn what_a_server_counts_is_open_metrics() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    daemon.ok(&["run", "--", "true"]);
    daemon.wait_ready(1);
    let file = daemon.dir.0.join("vmcache.prom");
    daemon.ok(&["status", "--openmetrics", "--output", file.to_str().unwrap()]);
    let said = fs::read_to_string(&file).unwrap();
    assert_eq!(
        fs::read_dir(&daemon.dir.0)
            .unwrap()
            .flatten()
            .filter(|e| { e.file_name().to_string_lossy().contains(".prom") })
            .count(),
        1
    );
    // What node_exporter reads is the form before OpenMetrics (tests/fleet has its parser).
    assert!(said.contains("# TYPE vmcache_claims_total counter\n"), "{said}");
    assert!(!said.contains("# EOF"), "{said}");
    let said = daemon.ok(&["status", "--openmetrics"]);
    let parsed = openmetrics_parser::openmetrics::parse_openmetrics(&said);
    let parsed = parsed.unwrap_or_else(|e| panic!("{e}: {said}"));
    for family in ["vmcache_claim_seconds", "vmcache_claims", "vmcache_pool_vms", "vmcache_boots"] {
        assert!(parsed.families.contains_key(family), "{family} in {said}");
    }
    assert!(
        said.contains("vmcache_claims_total{outcome=\"from_pool\",source=\"direct\"} 1\n"),
        "{said}"
    );
    assert!(said.contains("vmcache_claim_seconds_count 1\n"), "{said}");
    assert!(said.contains("vmcache_exec_ready_seconds_count 1\n"), "{said}");
    assert!(said.contains("vmcache_claim_seconds_bucket{le=\"0.00005\"}"), "{said}");
    assert!(said.contains("vmcache_pool_vms{state=\"ready\"} 1\n"), "{said}");
    assert_nothing_left(&daemon.quit().0);
}
