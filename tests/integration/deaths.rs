//! SIGKILL of clients and of VMs.

use std::io::Read;
use std::process::Stdio;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::daemon::{
    assert_nothing_left, directories, qemus, wait_child, wait_for, Daemon, Dir, Options,
};
use crate::faults::held;
use crate::require_qemu;

#[test]
fn a_client_killed_while_it_waits_takes_nothing() {
    let prepared = require_qemu!();
    let (mut options, dir) = (Options::pool(&prepared, 1), Dir::new());
    let switch = held(&mut options, &dir);
    let daemon = Daemon::launch(&options, dir);
    // They are gone before the first VM boots.
    let get = || daemon.command(&["get"]).stdout(Stdio::null()).spawn().unwrap();
    let mut children: Vec<_> = (0..5).map(|_| get()).collect();
    wait_for("five claims in line", || daemon.status()["pool"]["waiting"] == 5);
    children.iter_mut().for_each(|child| child.kill().unwrap());
    for child in &mut children {
        wait_child(child);
    }
    wait_for("an empty line", || daemon.status()["pool"]["waiting"] == 0);
    std::fs::write(switch, "").unwrap();
    daemon.wait_ready(1);
    let status = daemon.status();
    assert_eq!(status["counters"]["boots"], 1, "{status}");
    assert_eq!(status["counters"]["claims_cancelled"], 5, "{status}");
    assert_eq!(qemus(&daemon.dir.0).len(), 1);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_client_killed_while_its_command_runs_leaves_no_vm() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let mut child = daemon
        .command(&["run", "--", "sh", "-c", "echo up; sleep 1000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.take().unwrap().read_exact(&mut up).unwrap();
    child.kill().unwrap();
    wait_child(&mut child);
    daemon.wait_log("reclaimed", 1);
    daemon.wait_log("vm-ended", 1);
    daemon.wait_ready(1);
    assert_eq!((qemus(&daemon.dir.0).len(), directories(&daemon.store()).len()), (1, 1));
    // What `get` claimed is its caller's, and stays when the caller's command ends.
    let id = daemon.ok(&["get"]).trim().to_string();
    daemon.wait_ready(1);
    assert_eq!(daemon.ok(&["exec", &id, "--", "echo", "mine"]), "mine\n");
    daemon.ok(&["stop", &id]);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_vm_that_dies_is_replaced_and_never_handed_out() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 2));
    let victims = qemus(&daemon.dir.0);
    for pid in &victims {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).unwrap();
    }
    daemon.wait_log("vm-died", 2);
    daemon.wait_ready(2);
    let now = qemus(&daemon.dir.0);
    assert!(now.iter().all(|pid| !victims.contains(pid)));
    assert_eq!(daemon.status()["counters"]["died_ready"], 2);
    let got: serde_json::Value = serde_json::from_str(&daemon.ok(&["get", "--json"])).unwrap();
    assert!(!victims.contains(&(got["pid"].as_i64().unwrap() as i32)));
    // A VM that was handed out and dies leaves no zombie and no directory.
    kill(Pid::from_raw(got["pid"].as_i64().unwrap() as i32), Signal::SIGKILL).unwrap();
    daemon.wait_log("vm-ended", 1);
    daemon.wait_ready(2);
    assert_eq!(directories(&daemon.store()).len(), 2);
    assert_nothing_left(&daemon.quit().0);
}
