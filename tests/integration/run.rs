//! Commands in VMs, as a user's shell sees them.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use nix::pty::openpty;
use nix::sys::signal::{kill, Signal};
use nix::sys::termios::{tcgetattr, tcsetattr, SetArg};
use nix::unistd::Pid;

use crate::daemon::{assert_nothing_left, feed, text, wait_child, wait_for, Daemon, Options};
use crate::require_qemu;

#[test]
fn streams_exit_codes_and_environment() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let run = |args: &[&str]| {
        let all: Vec<&str> = ["run"].iter().chain(args).copied().collect();
        let out = d.output(&all);
        (out.status.code().unwrap(), text(&out.stdout), text(&out.stderr))
    };
    let kernel = run(&["--", "cat", "/proc/version"]);
    assert!(kernel.1.starts_with("Linux version "), "{kernel:?}");
    assert_eq!(
        run(&["--", "sh", "-c", "echo o; echo e >&2; exit 7"]),
        (7, "o\n".into(), "e\n".into())
    );
    let (code, _, err) = run(&["--", "nosuch"]);
    assert!(code == 127 && err.contains("nosuch: command not found"), "{code} {err}");
    let (code, _, err) = run(&["--", "/etc/passwd"]);
    assert!(code == 126 && err.contains("not executable"), "{code} {err}");
    assert_eq!(run(&["--", "sh", "-c", "kill -KILL $$"]).0, 137);
    assert_eq!(run(&["--timeout", "1", "--", "sleep", "100"]).0, 124);
    let (_, out, _) = run(&[
        "--env",
        "A=b c",
        "--workdir",
        "/tmp",
        "--user",
        "nobody",
        "--",
        "sh",
        "-c",
        "echo $A; pwd; id -u; id -g; echo $HOME",
    ]);
    assert_eq!(out, "b c\n/tmp\n65534\n65534\n/\n");
    let (code, _, err) = run(&["--user", "stranger", "--", "true"]);
    assert!(code == 125 && err.contains("no user \"stranger\""), "{code} {err}");
    let (code, out, _) = run(&["--cold", "--cpus", "2", "--memory", "300", "--", "nproc"]);
    assert_eq!((code, out.as_str()), (0, "2\n"));
    assert_nothing_left(&d.quit().0);
}

#[test]
fn any_bytes_of_any_length_both_ways() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let mut data = vec![0; 100 * 1024 * 1024];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut data).unwrap();
    let local = feed(Command::new("sha256sum"), &data);
    let out = feed(d.command(&["run", "--", "sha256sum"]), &data);
    assert_eq!(text(&out.stdout), text(&local.stdout), "{}", text(&out.stderr));
    let piece = &data[..8 * 1024 * 1024];
    let out = feed(d.command(&["run", "--", "cat"]), piece);
    assert!(out.stdout == piece, "{} bytes came back: {}", out.stdout.len(), text(&out.stderr));
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_closed_reader_ends_the_command_and_signals_reach_it() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let mut yes = d.command(&["run", "--", "yes"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 2];
    yes.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"y\n");
    assert_eq!(wait_child(&mut yes).code(), Some(128 + 13));

    let script = "trap 'echo caught; exit 9' TERM; echo up; while :; do sleep 0.1; done";
    let mut child =
        d.command(&["run", "--", "sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut up = [0; 3];
    out.read_exact(&mut up).unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), wait_child(&mut child).code()), ("caught\n", Some(9)));

    // A program without a handler dies of it, though it is a container's first.
    let mut child = d
        .command(&["run", "--", "sh", "-c", "echo up; exec sleep 100"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut up).unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(wait_child(&mut child).code(), Some(130));
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_terminal_is_a_terminal_and_is_given_back() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let pty =
        openpty(&nix::pty::Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 }, None)
            .unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    let slave = |fd: &OwnedFd| fd.try_clone().unwrap();
    // For another user than root, whose own it is.
    let script = "tty -s && echo terminal > /dev/tty && stty size > /dev/stdout; read line; \
                  echo got $line > /dev/stderr; exit 5";
    let mut command = d.command(&["run", "--tty", "-u", "5:6", "--", "sh", "-c", script]);
    command.stdin(slave(&pty.slave)).stdout(slave(&pty.slave)).stderr(slave(&pty.slave));
    let mut child = command.spawn().unwrap();
    let mut master = std::fs::File::from(pty.master);
    let mut seen = String::new();
    let mut chunk = [0; 1024];
    while !seen.contains("77\r\n") {
        let n = master.read(&mut chunk).unwrap();
        seen.push_str(&text(&chunk[..n]));
    }
    assert!(seen.contains("terminal\r\n33 77\r\n"), "{seen:?}");
    let raw = tcgetattr(&pty.slave).unwrap();
    assert_ne!(raw.local_flags, before.local_flags, "raw while it runs");
    // Stopped, a shell has its terminal; who goes on has it as before.
    let pid = Pid::from_raw(child.id() as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    tcsetattr(&pty.slave, SetArg::TCSANOW, &before).unwrap();
    kill(pid, Signal::SIGCONT).unwrap();
    wait_for("a raw terminal", || tcgetattr(&pty.slave).unwrap().local_flags == raw.local_flags);
    master.write_all(b"word\n").unwrap();
    while !seen.contains("got word") {
        let n = master.read(&mut chunk).unwrap();
        seen.push_str(&text(&chunk[..n]));
    }
    assert_eq!(wait_child(&mut child).code(), Some(5));
    assert_eq!(tcgetattr(&pty.slave).unwrap().local_flags, before.local_flags);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_cold_run_ends_with_its_caller() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let before = crate::daemon::qemus(&d.dir.0).len();
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        // Once while QEMU boots, once while a command runs.
        let mut child = d.command(&["run", "--cold", "--", "sleep", "1000"]).spawn().unwrap();
        wait_for("a cold VM", || crate::daemon::qemus(&d.dir.0).len() > before);
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        wait_child(&mut child);
        wait_for("its end", || crate::daemon::qemus(&d.dir.0).len() == before);
        if signal == Signal::SIGINT {
            // It takes the directory along; after SIGKILL the next server does.
            assert_eq!(crate::daemon::directories(&d.store()).len(), 1);
        }
    }
    let mut child = d
        .command(&["run", "--cold", "--", "sh", "-c", "echo up; sleep 1000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut up = [0; 3];
    child.stdout.take().unwrap().read_exact(&mut up).unwrap();
    child.kill().unwrap();
    wait_child(&mut child);
    wait_for("its end", || crate::daemon::qemus(&d.dir.0).len() == before);
    let dir = d.quit();
    wait_for("QEMUs' ends", || crate::daemon::qemus(&dir.0).is_empty());
}
