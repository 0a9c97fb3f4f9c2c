//! Clones of a template: each one unique, and a template that breaks is made anew.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use crate::daemon::{assert_nothing_left, wait_for, Daemon, Dir, Options};
use crate::require_qemu;

/// A directory in memory, removed at the end.
pub fn in_memory(name: &str) -> Dir {
    let path = PathBuf::from(format!("/dev/shm/vmcache-test-{name}-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    Dir(path)
}

pub fn cloning(mut options: Options, dir: &Dir) -> Options {
    options.more_factory =
        format!("enable_template = true\ntemplate_path = {:?}\n", dir.0.join("template"));
    options
}

#[test]
fn every_clone_is_unique() {
    let prepared = require_qemu!();
    let dir = in_memory("unique");
    let d = Daemon::start(&cloning(Options::pool(&prepared, 4), &dir));
    for vm in d.status()["vms"].as_array().unwrap() {
        assert_eq!(vm["source"], "template");
    }
    let script = "head -c 1000 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/uuid \
                  /etc/machine-id /proc/sys/kernel/hostname";
    let mut seen = HashSet::new();
    for _ in 0..32 {
        let out = d.ok(&["run", "--", "sh", "-c", script]);
        assert_eq!(out.lines().count(), 4, "{out}");
        for line in out.lines() {
            assert!(seen.insert(line.to_string()), "twice: {line}");
        }
    }
    assert_eq!(d.log_lines("template-making").len(), 1);
    // What direct VMs can do, clones can.
    let id = d.ok(&["get"]).trim().to_string();
    assert_eq!(d.ok(&["exec", &id, "--", "cat", "/etc/machine-id"]).trim(), id.replace('-', ""));
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_template_that_breaks_is_made_anew_and_the_pool_stays_open() {
    let prepared = require_qemu!();
    let dir = in_memory("breaks");
    let template = dir.0.join("template");
    let d = Daemon::start(&cloning(Options::pool(&prepared, 1), &dir));
    // The same file, which the server holds open: its clones fail from now on.
    fs::OpenOptions::new().write(true).open(template.join("state")).unwrap().set_len(64).unwrap();
    for _ in 0..2 {
        assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    }
    d.wait_log("template-suspect", 1);
    d.wait_log("template-ready", 2);
    d.wait_ready(1);
    assert!(d.status()["counters"]["boots_failed"].as_u64().unwrap() >= 2);
    // Removed by somebody: made again when the next clone is needed.
    fs::remove_file(template.join("manifest.json")).unwrap();
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    d.wait_log("template-ready", 3);
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_template_is_made_once_shown_and_removed() {
    let prepared = require_qemu!();
    let dir = in_memory("once");
    let mut options = cloning(Options::pool(&prepared, 1), &dir);
    let d = Daemon::start(&options);
    let json = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
    let status = json(d.ok(&["template", "status", "--json"]));
    assert_eq!((&status["exists"], &status["fits"]), (&true.into(), &true.into()));
    assert_eq!(json(d.ok(&["template", "create", "--json"]))["made"], false);
    let mut daemon_dir = d.quit();

    // The next server takes the template that is there.
    let d = Daemon::launch(&options, daemon_dir);
    d.wait_ready(1);
    assert_eq!(d.log_lines("template-reused").len(), 1);
    assert_eq!(d.log_lines("template-making").len(), 0);
    daemon_dir = d.quit();

    // With another configuration it does not fit, and is made anew.
    options.more_qemu = "kernel_params = \"vmcache.other=1\"\n".into();
    let d = Daemon::launch(&options, daemon_dir);
    d.wait_ready(1);
    assert_eq!(d.log_lines("template-making").len(), 1);
    assert!(d.ok(&["run", "--", "cat", "/proc/cmdline"]).contains("vmcache.other=1"));
    assert_eq!(json(d.ok(&["template", "destroy", "--json"]))["destroyed"], true);
    assert!(!dir.0.join("template").exists());
    let out = d.output(&["template", "status"]);
    assert_eq!(out.status.code(), Some(1));
    d.wait_ready(1);
    let left = d.quit();
    wait_for("QEMUs' ends", || crate::daemon::qemus(&left.0).is_empty());
    assert_nothing_left(&left.0);
}
