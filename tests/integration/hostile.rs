//! Peers who mean harm: noise on the socket, messages without an end, and users who
//! want all of it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

use crate::confinement::{command_as, pool};
use crate::daemon::{assert_nothing_left, text, wait_child, wait_for, Daemon, Options};
use crate::require_qemu;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

fn resident_kib(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn frame(length: u32, kind: u8, flags: u8, stream: u32) -> Vec<u8> {
    let mut out = length.to_be_bytes()[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out
}

#[test]
fn noise_on_the_socket_costs_no_vm_and_no_memory() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let settings = frame(0, 4, 0, 0);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut noise = |n: usize| -> Vec<u8> {
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as u8
        };
        (0..n).map(|_| next()).collect()
    };
    let connect = || {
        let stream = UnixStream::connect(daemon.socket()).unwrap();
        stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        stream
    };
    let say = |bytes: &[u8]| {
        let mut stream = connect();
        // It may be closed in the middle of it.
        let _ = stream.write_all(bytes);
        let _ = stream.read(&mut [0; 4096]);
        stream
    };
    let calls = |n: u32| -> Vec<u8> {
        // Calls that never say which: headers without an end.
        let open = (0..n).flat_map(|i| [frame(1, 1, 0, 2 * i + 1), vec![0x82]].concat());
        [PREFACE, &settings].concat().into_iter().chain(open).collect()
    };
    let kinds: Vec<Vec<u8>> = vec![
        noise(64 * 1024),
        [PREFACE, &noise(64 * 1024)].concat(),
        PREFACE[..10].to_vec(),
        [PREFACE, &settings, &frame(0xff_ffff, 0, 0, 1)].concat(),
        calls(1),
        // Pings, and streams that are opened and torn down at once.
        [PREFACE, &settings, &[frame(8, 6, 0, 0), vec![0; 8]].concat().repeat(2000)].concat(),
        [
            PREFACE,
            &settings,
            &frame(4, 3, 0, 1).into_iter().chain([0; 4]).collect::<Vec<_>>().repeat(2000),
        ]
        .concat(),
        // A window that overflows.
        [PREFACE, &settings, &frame(4, 8, 0, 0), &[0x7f, 0xff, 0xff, 0xff]].concat(),
    ];
    // Once each, so that what gRPC sets aside is there.
    let mut open: Vec<UnixStream> = kinds.iter().map(|bytes| say(bytes)).collect();
    let before = resident_kib(&daemon);
    for bytes in kinds.iter().cycle().take(200) {
        open.push(say(bytes));
    }
    assert_eq!(daemon.ok(&["run", "--", "echo", "served"]), "served\n");
    let after = resident_kib(&daemon);
    assert!(after < before + 32 * 1024, "{before} KiB, then {after}");
    drop(open);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn a_message_that_is_too_large_is_refused_before_it_is_there() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let before = resident_kib(&daemon);
    // All that a request may be is 64 KiB.
    let out = daemon.output(&["get", "--label", &"x".repeat(100_000)]);
    let err = text(&out.stderr);
    assert!(!out.status.success() && err.to_lowercase().contains("larger than max"), "{err}");
    assert!(resident_kib(&daemon) < before + 32 * 1024);
    assert_eq!(daemon.status()["pool"]["ready"], 1);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn many_claims_of_one_user_make_only_that_user_wait() {
    let prepared = require_qemu!();
    let (mut options, dir) = pool(&prepared, 1);
    options.more_ours += "socket_mode = \"0666\"\n";
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(1);
    // None gets a VM before all stand in line.
    daemon.ok(&["resize", "0"]);
    wait_for("an empty pool", || daemon.status()["pool"]["ready"] == 0);
    let greedy: Vec<_> = (0..12)
        .map(|_| {
            let mut run = command_as(&daemon, 232_002, &["run", "--wait", "100", "--", "true"]);
            run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    wait_for("claims in line", || daemon.status()["pool"]["waiting"].as_u64() >= Some(8));
    let out = daemon.output(&["run", "--wait", "100", "--", "echo", "in turn"]);
    assert_eq!(text(&out.stdout), "in turn\n", "{}{}", text(&out.stderr), daemon.log());
    let still = daemon.status()["pool"]["waiting"].as_u64().unwrap();
    assert!(still >= 4, "{still} of the others still wait{}", daemon.log());
    for mut child in greedy {
        let _ = child.kill();
        wait_child(&mut child);
    }
    // What they had leased goes with them; this server is who ends it.
    wait_for("their VMs' end", || !daemon.status()["vms"].to_string().contains("handed"));
    assert_nothing_left(&daemon.quit().0);
}
