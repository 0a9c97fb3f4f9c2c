//! What a server tells syslog: over a Unix socket and by UDP, in both forms, and how much.

use std::fs;
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use crate::daemon::{assert_nothing_left, vmcache, wait_child, Dir, Options, LONG};
use crate::require_qemu;

const SOON: Duration = Duration::from_millis(300);

/// Messages until one has this, that one last.
fn until(needle: &str, mut next: impl FnMut() -> Option<String>) -> Vec<String> {
    let mut all = Vec::new();
    loop {
        let message = next().unwrap_or_else(|| panic!("no {needle:?} after {all:#?}"));
        all.push(message);
        if all[all.len() - 1].contains(needle) {
            return all;
        }
    }
}

fn serve(options: &Options, dir: &Dir, level: Option<&str>) -> Child {
    let config = dir.0.join("c.toml");
    fs::write(&config, options.text(&dir.0)).unwrap();
    let mut command = vmcache(&config);
    command.arg("serve").envs(level.map(|l| ("VMCACHE_LOG_LEVEL", l)));
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn signal(server: &Child, signal: Signal) {
    kill(Pid::from_raw(server.id() as i32), signal).unwrap();
}

#[test]
fn a_claim_is_a_story_in_the_newer_form_and_a_reload_says_how_much() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let log = UnixDatagram::bind(dir.0.join("log")).unwrap();
    let next = || {
        let mut bytes = [0; 16 * 1024];
        let n = log.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..n].to_vec()).unwrap())
    };
    log.set_read_timeout(Some(LONG)).unwrap();
    let mut options = Options::pool(&prepared, 1);
    let to = format!("log = \"unix:{}\"\n", dir.0.join("log").display());
    options.more_ours.push_str(&to);
    let mut server = serve(&options, &dir, None);
    let ready = until("vm-ready", next).pop().unwrap();
    // <priority>version time host name pid event data text
    let words: Vec<_> = ready.splitn(8, ' ').collect();
    assert_eq!((words[0], words[3]), ("<30>1", "vmcache"), "{ready}");
    assert_eq!((words[4], words[5]), (&*server.id().to_string(), "vm-ready"), "{ready}");
    assert_eq!(words[6], "[vmcache@32473", "{ready}");
    let id = ready.split_once("vm=\"").unwrap().1.split('"').next().unwrap();
    let out = vmcache(&dir.0.join("c.toml")).args(["run", "--", "true"]).status().unwrap();
    assert!(out.success());
    let story = until("vm-ended", next);
    let claimed = story.iter().find(|m| m.contains(" vm-claimed ")).unwrap();
    assert!(claimed.contains(&format!("vm=\"{id}\"")), "{claimed}");
    let uid = format!("uid=\"{}\"", nix::unistd::getuid());
    assert!(claimed.contains(" pid=\"") && claimed.contains(&uid), "{claimed}");
    assert!(story[story.len() - 1].contains(&format!("vm=\"{id}\"")), "{story:#?}");
    if !story.iter().any(|m| m.contains(" vm-ready ")) {
        until("vm-ready", next);
    }

    options.more_ours.push_str("log_level = \"error\"\n");
    fs::write(dir.0.join("c.toml"), options.text(&dir.0)).unwrap();
    signal(&server, Signal::SIGHUP);
    until("server-restarting", next);
    signal(&server, Signal::SIGTERM);
    wait_child(&mut server);
    log.set_read_timeout(Some(SOON)).unwrap();
    // Nothing of the next program, which had only good to tell.
    assert_eq!(next(), None);
    fs::remove_file(dir.0.join("log")).unwrap();
    assert_nothing_left(&dir.0);
}

#[test]
fn messages_go_by_udp_in_the_classic_form_and_the_environment_says_how_much() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let log = UdpSocket::bind("127.0.0.1:0").unwrap();
    let next = || {
        let mut bytes = [0; 16 * 1024];
        let n = log.recv(&mut bytes).ok()?;
        Some(String::from_utf8(bytes[..n].to_vec()).unwrap())
    };
    log.set_read_timeout(Some(LONG)).unwrap();
    let mut options = Options::pool(&prepared, 1);
    options.qemu = "/bin/false".into();
    let to = format!("log = \"udp:{}\"\nlog_format = \"rfc3164\"\n", log.local_addr().unwrap());
    options.more_ours.push_str(&to);
    let mut server = serve(&options, &dir, Some("warn"));
    let failed = until("boot-failed", next);
    // The first of all: what is only of interest was left out.
    assert_eq!(failed.len(), 1, "{failed:#?}");
    let line = &failed[0];
    let pid = format!(" vmcache[{}]: boot-failed: boot of VM ", server.id());
    assert!(line.starts_with("<27>") && line.contains(&pid), "{line}");
    assert!(line.contains(" [vmcache@32473 vm=\"") && line.contains("phase=\"monitor\""), "{line}");
    signal(&server, Signal::SIGTERM);
    wait_child(&mut server);
    assert_nothing_left(&dir.0);
}
