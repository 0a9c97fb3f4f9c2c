//! Commands on VMs that were claimed.

use std::fs;
use std::os::unix::fs::{symlink, PermissionsExt};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::daemon::{assert_nothing_left, text, wait_child, wait_for, Daemon, Options};
use crate::require_qemu;

#[test]
fn exec_cp_ps_stats_pause_resume_list_stop() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let id = d.ok(&["get"]).trim().to_string();
    let short = &id[..8];
    let list: serde_json::Value = serde_json::from_str(&d.ok(&["list", "--json"])).unwrap();
    assert_eq!(list[0]["id"], id.as_str());
    assert_eq!(list[0]["state"], "running");
    assert!(d.ok(&["list"]).contains(&id));

    // What one command leaves, the next one finds.
    d.ok(&["exec", short, "--", "sh", "-c", "echo kept > /root/note"]);
    assert_eq!(d.ok(&["exec", short, "--", "cat", "/root/note"]), "kept\n");
    let out = d.output(&["exec", short, "--", "sh", "-c", "exit 3"]);
    assert_eq!(out.status.code(), Some(3));
    assert_eq!(d.output(&["exec", short, "--", "nosuch"]).status.code(), Some(127));

    // Files and trees, there and back.
    let from = d.dir.0.join("tree");
    fs::create_dir_all(from.join("sub")).unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n * 7 % 251) as u8).collect();
    fs::write(from.join("sub/data"), &bytes).unwrap();
    fs::set_permissions(from.join("sub/data"), fs::Permissions::from_mode(0o640)).unwrap();
    symlink("sub/data", from.join("link")).unwrap();
    d.ok(&["cp", from.to_str().unwrap(), &format!("{short}:/root")]);
    let seen = d.ok(&["exec", short, "--", "stat", "-c", "%a %s", "/root/tree/sub/data"]);
    assert_eq!(seen, "640 3000000\n");
    let back = d.dir.0.join("back");
    d.ok(&["cp", &format!("{short}:/root/tree"), back.to_str().unwrap()]);
    assert!(fs::read(back.join("sub/data")).unwrap() == bytes);
    assert_eq!(fs::read_link(back.join("link")).unwrap().to_str(), Some("sub/data"));
    let out = d.output(&["cp", &format!("{short}:/nosuch"), back.to_str().unwrap()]);
    assert!(text(&out.stderr).contains("/nosuch"), "{}", text(&out.stderr));
    assert_eq!(out.status.code(), Some(1));

    let ps = d.ok(&["ps", short]);
    assert!(ps.contains("/init") || ps.contains("vmcache-agent"), "{ps}");
    let stats: serde_json::Value =
        serde_json::from_str(&d.ok(&["stats", short, "--json"])).unwrap();
    assert!(stats["cpu_ns"].as_u64().unwrap() > 0, "{stats}");

    d.ok(&["pause", short]);
    d.ok(&["resume", short]);
    assert_eq!(d.ok(&["exec", short, "--", "echo", "back"]), "back\n");

    let pool = d.status()["vms"].as_array().unwrap().clone();
    let ready = pool.iter().find(|v| v["state"] == "ready").unwrap();
    let out = d.output(&["stop", ready["id"].as_str().unwrap()]);
    assert!(text(&out.stderr).contains("belongs to the pool"), "{}", text(&out.stderr));
    let out = d.output(&["stop", "zzzz"]);
    assert!(text(&out.stderr).contains("no VM \"zzzz\""), "{}", text(&out.stderr));
    assert_eq!(d.ok(&["stop", short]).trim(), id);
    assert_eq!(d.ok(&["list", "--json"]).trim(), "[]");
    assert_nothing_left(&d.quit().0);
}

#[test]
fn exec_joins_the_command_that_runs_and_keep_keeps() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let mut command = d.command(&["run", "--", "sh", "-c", "echo up; sleep 1000"]);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut up = [0; 3];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
    let list: serde_json::Value = serde_json::from_str(&d.ok(&["list", "--json"])).unwrap();
    let id = list[0]["id"].as_str().unwrap();
    assert_eq!(list[0]["leased"], true);
    // The same pid namespace: the other command is there to be seen.
    let seen = d.ok(&["exec", id, "--", "ps"]);
    assert!(seen.contains("sleep 1000") && !seen.contains("/init\n"), "{seen}");
    child.kill().unwrap();
    child.wait().unwrap();

    let out = d.output(&["run", "--keep", "--", "touch", "/root/here"]);
    let id = text(&out.stderr).trim().to_string();
    assert_eq!(d.ok(&["exec", &id, "--", "ls", "/root"]), "here\n");
    d.ok(&["stop", &id]);
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_guest_that_stands_still_does_not_hold_its_caller() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let start = |options: &[&str]| {
        let mut args = vec!["exec"];
        args.extend_from_slice(options);
        args.extend_from_slice(&[&id, "--", "sh", "-c", "echo up; sleep 1000"]);
        let mut child = d.command(&args).stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut up = [0; 3];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut up).unwrap();
        child
    };
    let mut limited = start(&["--timeout", "15"]);
    let mut signalled = start(&[]);
    d.ok(&["pause", &id]);
    assert_eq!(wait_child(&mut limited).code(), Some(124));
    // The first one waits for the guest; the second one does not.
    let pid = Pid::from_raw(signalled.id() as i32);
    kill(pid, Signal::SIGTERM).unwrap();
    wait_for("the first signal to be taken", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.contains("ShdPnd:\t0000000000000000")
    });
    assert!(signalled.try_wait().unwrap().is_none());
    kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(wait_child(&mut signalled).code(), Some(143));
    d.ok(&["resume", &id]);
    assert_eq!(d.ok(&["exec", &id, "--", "echo", "well"]), "well\n");
    d.ok(&["stop", &id]);
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}
