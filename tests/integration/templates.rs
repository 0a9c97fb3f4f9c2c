//! Clones of a template: each one unique, and a template that breaks is made anew.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
fn a_clones_clock_is_right_after_a_minutes_pause() {
    let prepared = require_qemu!();
    let dir = in_memory("clock");
    let d = Daemon::start(&cloning(Options::pool(&prepared, 3), &dir));
    std::thread::sleep(Duration::from_secs(60));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    for _ in 0..3 {
        let before = now();
        // Of busybox, the one that shows microseconds.
        let out = d.ok(&["run", "--", "adjtimex"]);
        let field = |name: &str| -> f64 {
            let line = out.lines().find_map(|l| l.trim().strip_prefix(name)).unwrap();
            line.trim().parse().unwrap()
        };
        let guest = field("time.tv_sec:") + field("time.tv_usec:") / 1e6;
        let after = now();
        // It was read at some instant between.
        assert!(
            guest > before - 0.1 && guest < after + 0.1,
            "guest {guest}, host {before} to {after}"
        );
    }
    assert_nothing_left(&d.quit().0);
}

/// A fake: the real agent, in whose bytes the path of the random device is
/// another, so that it refuses every reseed, as one on a broken guest would.
#[test]
fn a_clone_that_refuses_its_reseed_is_never_handed_out() {
    let prepared = require_qemu!();
    let dir = in_memory("refuses");
    let mut options = cloning(Options::pool(&prepared, 2), &dir);
    let mut initrd = fs::read(&options.initrd).unwrap();
    let (from, to) = (b"/dev/urandom", b"/dev/missing");
    let places: Vec<usize> =
        (0..initrd.len() - from.len()).filter(|at| initrd[*at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    for at in places {
        initrd[at..at + to.len()].copy_from_slice(to);
    }
    let fake = dir.0.join("initramfs.img");
    fs::write(&fake, initrd).unwrap();
    options.initrd = fake.display().to_string();
    let d = Daemon::launch(&options, Dir::new());
    let out = d.output(&["get", "--wait", "12"]);
    assert_eq!(out.status.code(), Some(4), "{}", String::from_utf8_lossy(&out.stdout));
    let status = d.status();
    assert!(status["counters"]["boots_failed"].as_u64().unwrap() >= 2, "{status}");
    assert_eq!(status["counters"]["boots"], 0, "{status}");
    let error = status["last_error"].as_str().unwrap();
    assert!(error.contains("open /dev/missing"), "{error}");
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
