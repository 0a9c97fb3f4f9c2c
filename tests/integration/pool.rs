//! Life of a pool.

use std::collections::HashSet;
use std::process::Stdio;

use nix::sys::signal::Signal;

use crate::daemon::{
    assert_nothing_left, directories, qemus, text, vmcache, wait_child, wait_for, Daemon, Dir,
    Options,
};
use crate::faults::held;
use crate::require_qemu;

#[test]
fn a_pool_fills_hands_out_refills_and_stops() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 2));
    let status = daemon.status();
    for key in ["pid", "endpoint", "version", "pool", "counters", "vms", "last_error"] {
        assert!(status.get(key).is_some(), "{key} in {status}");
    }
    for key in ["id", "pid", "state", "source", "cpus", "memory_mib", "age_s"] {
        assert!(status["vms"][0].get(key).is_some(), "{key} in {status}");
    }
    assert_eq!(status["vms"][0]["memory_mib"], 256);
    assert_eq!(status["vms"][0]["source"], "direct");

    let got: serde_json::Value = serde_json::from_str(&daemon.ok(&["get", "--json"])).unwrap();
    for key in ["id", "pid", "qmp", "agent_url", "source", "cpus", "memory_mib"] {
        assert!(got.get(key).is_some(), "{key} in {got}");
    }
    let id = got["id"].as_str().unwrap().to_string();
    daemon.wait_ready(2);
    assert_eq!(qemus(&daemon.dir.0).len(), 3);
    assert!(daemon.ok(&["status"]).contains("2 ready of 2"));

    let config = daemon.config.clone();
    let dir = daemon.quit();
    // The pool's VMs are gone, the one that was handed out runs on and answers.
    assert_eq!(qemus(&dir.0), [got["pid"].as_i64().unwrap() as i32]);
    let out = vmcache(&config).args(["exec", &id, "--", "echo", "alive"]).output().unwrap();
    assert_eq!(text(&out.stdout), "alive\n", "{}", text(&out.stderr));
    assert!(vmcache(&config).args(["stop", &id]).status().unwrap().success());
    assert_nothing_left(&dir.0);
}

#[test]
fn twenty_clients_on_a_pool_of_four_get_twenty_vms_in_order() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 4);
    options.memory = 192;
    let daemon = Daemon::start(&options);
    let mut clients = Vec::new();
    for n in 0..20 {
        let mut command = daemon.command(&["get", "--wait", "600"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let pid = child.id();
        clients.push((pid, child));
        // The next comes only when this one has been served or stands in line.
        wait_for("a client's place", || {
            // In this order: one that is served meanwhile is not counted twice.
            let served = daemon.log_lines("vm-claimed").len() as u64;
            let waiting = daemon.status()["pool"]["waiting"].as_u64().unwrap();
            waiting + served > n
        });
    }
    let mut ids = HashSet::new();
    let order: Vec<u32> = clients.iter().map(|(pid, _)| *pid).collect();
    for (_, child) in clients {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}{}", text(&out.stderr), daemon.log());
        let id = text(&out.stdout).trim().to_string();
        assert!(ids.insert(id.clone()), "{id} twice");
        daemon.ok(&["stop", &id]);
    }
    assert_eq!(ids.len(), 20);
    let served: Vec<u32> = daemon
        .log_lines("vm-claimed")
        .iter()
        .map(|l| {
            l.split("went to pid ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
        })
        .collect();
    assert_eq!(served, order, "first come, first served");
    daemon.wait_ready(4);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_claim_that_runs_out_of_time_takes_no_vm_with_it() {
    let prepared = require_qemu!();
    let (mut options, dir) = (Options::pool(&prepared, 1), Dir::new());
    let switch = held(&mut options, &dir);
    let daemon = Daemon::launch(&options, dir);
    // There is none within a second.
    let out = daemon.output(&["get", "--wait", "1"]);
    assert_eq!(out.status.code(), Some(4), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("no VM from"), "{}", text(&out.stderr));
    std::fs::write(switch, "").unwrap();
    daemon.wait_ready(1);
    let status = daemon.status();
    assert_eq!(status["pool"]["waiting"], 0);
    assert_eq!(status["counters"]["deliveries_failed"], 0);
    assert_eq!(qemus(&daemon.dir.0).len(), 1);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_stop_refuses_waiting_claims_and_leaves_nothing() {
    let prepared = require_qemu!();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (mut options, dir) = (Options::pool(&prepared, 2), Dir::new());
        held(&mut options, &dir);
        let mut daemon = Daemon::launch(&options, dir);
        let mut command = daemon.command(&["get"]);
        let mut waiting = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("a claim in line", || daemon.status()["pool"]["waiting"] == 1);
        daemon.signal(signal);
        assert!(daemon.wait().success(), "{}", daemon.log());
        assert_eq!(wait_child(&mut waiting).code(), Some(1));
        let out = waiting.wait_with_output().unwrap();
        assert!(text(&out.stderr).contains("the server is stopping"), "{}", text(&out.stderr));
        assert_nothing_left(&daemon.dir.0);
    }
}

#[test]
fn a_pool_of_zero_is_off() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let config = dir.0.join("c.toml");
    std::fs::write(&config, Options::pool(&prepared, 0).text(&dir.0)).unwrap();
    for command in [&["serve"][..], &["factory", "init"][..]] {
        let out = vmcache(&config).args(command).output().unwrap();
        assert_eq!(out.status.code(), Some(0));
        assert!(text(&out.stdout).contains("VMCache is off"));
    }
}

#[test]
fn the_pc_machine_works_too_and_systemd_is_told() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 1);
    options.more_qemu = "machine_type = \"pc\"\n".into();
    let dir = Dir::new();
    let socket = dir.0.join("notify");
    let notify = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
    notify.set_read_timeout(Some(crate::daemon::LONG)).unwrap();
    // Inherited by the server alone: vmcache() clears the environment.
    let config = dir.0.join("c.toml");
    std::fs::write(&config, options.text(&dir.0)).unwrap();
    let mut server = vmcache(&config)
        .args(["serve", "--log", "stderr"])
        .env("NOTIFY_SOCKET", &socket)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let any = || {
        let mut bytes = [0; 256];
        let n = notify.recv(&mut bytes).unwrap();
        text(&bytes[..n])
    };
    // What the pool holds is told in between.
    let hear = || loop {
        let said = any();
        if !said.starts_with("STATUS=") {
            return said;
        }
    };
    assert_eq!(hear(), "FDSTORE=1\nFDNAME=vmcache-socket");
    assert_eq!(hear(), "READY=1");
    while any() != "STATUS=1 of 1 VMs ready" {}
    let out = vmcache(&config).args(["run", "--", "uname", "-s"]).output().unwrap();
    assert_eq!(text(&out.stdout), "Linux\n", "{}", text(&out.stderr));
    assert!(vmcache(&config).arg("quit").status().unwrap().success());
    assert!(wait_child(&mut server).success());
    assert_eq!(hear(), "STOPPING=1");
    assert_eq!(hear(), "FDSTOREREMOVE=1\nFDNAME=vmcache-socket");
    assert_nothing_left(&dir.0);
}

#[test]
fn a_client_with_another_configuration_gets_a_cold_vm_and_is_told() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let mut other = Options::pool(&prepared, 1);
    other.more_qemu = "kernel_params = \"vmcache.test=1\"\n".into();
    let config = daemon.dir.0.join("other.toml");
    std::fs::write(&config, other.text(&daemon.dir.0)).unwrap();
    let out = vmcache(&config).args(["run", "--", "cat", "/proc/cmdline"]).output().unwrap();
    assert!(text(&out.stdout).contains("vmcache.test=1"), "{}", text(&out.stdout));
    let told = text(&out.stderr);
    assert!(told.contains("booted cold") && told.contains("KernelParams"), "{told}");
    assert_eq!(daemon.status()["pool"]["ready"], 1, "the pool's VM was not touched");
    assert_eq!(directories(&daemon.store()).len(), 1);
    assert_nothing_left(&daemon.quit().0);
}

/// A bare VM: there at once, handed out once, and nobody in it to be asked.
#[test]
fn vms_without_an_agent_are_handed_out_too() {
    let prepared = require_qemu!();
    let mut options = Options::pool(&prepared, 2);
    options.more_ours.push_str("agent = \"noop\"\n");
    let d = Daemon::start(&options);
    d.wait_rest(2);
    let got: serde_json::Value = serde_json::from_str(&d.ok(&["get", "--json"])).unwrap();
    assert_eq!((&got["agent_url"], &got["source"]), (&"noop:".into(), &"direct".into()));
    let id = got["id"].as_str().unwrap();
    let out = d.output(&["exec", id, "--", "true"]);
    assert_eq!(out.status.code(), Some(125));
    assert!(text(&out.stderr).contains("agent has no "), "{}", text(&out.stderr));
    d.ok(&["stop", id]);
    d.wait_ready(2);
    assert_nothing_left(&d.quit().0);
}
