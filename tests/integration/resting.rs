//! Coming to rest: a VM of the pool runs a command that does nothing and is
//! paused, and can be claimed at any moment of that.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use vmcache::hypervisor::qemu::qmp::Qmp;

use crate::daemon::{assert_nothing_left, wait_for, Daemon, Dir, Options, LONG};
use crate::require_qemu;

/// Processor time that a process has taken, in clock ticks.
fn ticks(pid: i64) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// Whether the pool's only VM runs, by its monitor.
fn runs(d: &Daemon) -> bool {
    let id = d.status()["vms"][0]["id"].as_str().unwrap().to_string();
    let monitor = d.store().join(id).join("qmp.sock");
    Qmp::connect(&monitor, LONG).unwrap().running().unwrap()
}

/// Stops the QEMU of a VM that stands ready and has not come to rest; its pid.
fn stop_one_awake(d: &Daemon) -> i64 {
    let mut still = 0;
    wait_for("a VM awake", || {
        let status = d.status();
        let awake = status["vms"].as_array().unwrap().iter().find(|vm| vm["state"] == "ready");
        still = awake.map_or(0, |vm| vm["pid"].as_i64().unwrap());
        still > 0
    });
    kill(Pid::from_raw(still as i32), Signal::SIGSTOP).unwrap();
    still
}

/// The pause itself hangs: the server still leaves nothing.
#[test]
fn a_vm_that_can_not_be_paused_is_not_left_behind_by_a_stop() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 2);
    options.more_ours.push_str("boot_parallel = 1\nrehearse = false\n");
    let d = Daemon::launch(&options, Dir::new());
    stop_one_awake(&d);
    // The second one is ready, and so the first one's turn has come.
    d.wait_log("vm-ready", 2);
    std::thread::sleep(Duration::from_millis(200));
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_pool_comes_to_rest_and_takes_no_time() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    d.wait_rest(2);
    let pids: Vec<i64> = d.status()["vms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vm| vm["pid"].as_i64().unwrap())
        .collect();
    let before: Vec<u64> = pids.iter().map(|pid| ticks(*pid)).collect();
    std::thread::sleep(Duration::from_secs(3));
    let after: Vec<u64> = pids.iter().map(|pid| ticks(*pid)).collect();
    // Of 300: QEMU's own threads may wake once for what they had put off.
    for (before, after) in before.iter().zip(&after) {
        assert!(after - before <= 1, "ticks of {pids:?}: {before}, then {after}");
    }
    // Nothing of the rehearsal is left in the guest.
    let shown = d.ok(&["run", "--", "sh", "-c", "ls /run/vmcache/containers; hostname"]);
    let mut lines = shown.lines();
    assert_eq!(lines.next(), Some("main"), "{shown}");
    assert!(lines.next().unwrap().starts_with("vm-"), "{shown}");
    assert_nothing_left(&d.quit().0);
}

#[test]
fn without_rehearsal_and_pause_a_vm_is_left_as_it_is() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 1);
    options.more_ours.push_str("rehearse = false\npause_idle = false\n");
    let d = Daemon::start(&options);
    assert_eq!(d.status()["pool"]["awake"], 0);
    assert!(runs(&d), "it is paused");
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_vm_that_is_not_paused_is_rehearsed_once() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 1);
    options.more_ours.push_str("pause_idle = false\n");
    let d = Daemon::start(&options);
    d.wait_rest(1);
    let pid = d.status()["vms"][0]["pid"].as_i64().unwrap();
    let before = ticks(pid);
    std::thread::sleep(Duration::from_secs(3));
    // A guest that idles, but runs: a rehearsal after the other would take half of it.
    let taken = ticks(pid) - before;
    assert!(taken < 90, "{taken} of 300 ticks");
    assert!(runs(&d), "it is paused");
    assert_eq!(d.status()["pool"]["awake"], 0);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_vm_can_be_claimed_before_it_has_come_to_rest() {
    let prepared = require_qemu!();
    // While the second one boots, the first is awake.
    let mut options = Options::pool(&prepared, 2);
    options.more_ours.push_str("boot_parallel = 1\n");
    let d = Daemon::launch(&options, Dir::new());
    wait_for("a VM awake", || d.status()["pool"]["awake"] == 1);
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    // One that comes while VMs are rehearsed or paused, whatever the moment.
    d.wait_ready(2);
    for _ in 0..6 {
        assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    }
    d.wait_rest(2);
    assert_eq!(d.status()["counters"]["died_ready"], 0);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_vm_that_stands_still_before_it_rests_is_replaced() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 2);
    options.more_ours.push_str("boot_parallel = 1\n");
    let d = Daemon::launch(&options, Dir::new());
    let still = stop_one_awake(&d);
    d.wait_log("no longer answers", 1);
    d.wait_rest(2);
    let status = d.status();
    assert_eq!(status["counters"]["died_ready"], 1, "{status}");
    assert!(status["vms"].as_array().unwrap().iter().all(|vm| vm["pid"] != still), "{status}");
    assert_nothing_left(&d.quit().0);
}
