//! Signals of `run`, `exec` and `kill`, starts that fail, and limits of time.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdout, Stdio};
use std::time::{Duration, Instant};

use nix::libc::{self, SIGRTMAX, SIGRTMIN};
use nix::sys::signal::{self, SigHandler, Signal};

use vmcache::workload;

use crate::daemon::{assert_nothing_left, text, wait_child, wait_for, Daemon, Options, LONG};
use crate::guest::boot;
use crate::require_qemu;

/// Those that a process cannot catch, that tell it of its own children and streams, and
/// by which a shell stops it.
const KEPT: [i32; 8] = [
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGCHLD,
    libc::SIGURG,
    libc::SIGPIPE,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

fn line(out: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    line.trim().to_string()
}

fn send(pid: u32, signal: i32) {
    // kill(1): nix has no real-time signals.
    let sent =
        std::process::Command::new("kill").args([format!("-{signal}"), pid.to_string()]).status();
    assert!(sent.unwrap().success(), "{signal}");
}

#[test]
fn every_signal_that_can_be_caught_reaches_the_command() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let all: Vec<i32> = (1..=31).chain([SIGRTMIN(), SIGRTMIN() + 1, SIGRTMAX()]).collect();
    let passed: Vec<i32> = all.iter().copied().filter(|n| !KEPT.contains(n)).collect();
    let traps: String = passed.iter().map(|n| format!("trap 'echo got {n}' {n}; ")).collect();
    let script = format!("{traps} echo up; while :; do sleep 0.02; done");
    for how in [&["run", "--"][..], &["exec", &id, "--"][..]] {
        let mut command = d.command(how);
        let mut child = command.args(["sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        assert_eq!(line(&mut out), "up");
        for n in &passed {
            send(child.id(), *n);
            assert_eq!(line(&mut out), format!("got {n}"));
        }
        // The others are this process's own; none ends it but KILL.
        send(child.id(), libc::SIGURG);
        send(child.id(), libc::SIGCHLD);
        send(child.id(), libc::SIGUSR1);
        assert_eq!(line(&mut out), "got 10");
        if how[0] == "run" {
            child.kill().unwrap();
        } else {
            let listed = d.ok(&["ps", &id]);
            let name = exec_of(&listed, "sleep").expect("the command has a name");
            d.ok(&["kill", "-s", "KILL", &id, "--exec", &name]);
            let mut rest = String::new();
            out.read_to_string(&mut rest).unwrap();
        }
        let status = wait_child(&mut child);
        assert!(how[0] == "run" || status.code() == Some(137), "{status:?}");
    }
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

/// The name, in `vmcache ps`, of the command that started a process.
fn exec_of(listed: &str, command: &str) -> Option<String> {
    let row = listed.lines().find(|l| l.contains(command))?;
    let name = row.split_whitespace().nth(4)?;
    name.starts_with("exec-").then(|| name.to_string())
}

#[test]
fn kill_stops_lets_go_on_and_ends_what_a_killed_exec_left() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let out = d.output(&["run", "--keep", "--", "sh", "-c", "echo main"]);
    assert_eq!(text(&out.stdout), "main\n");
    let id = text(&out.stderr).trim().to_string();
    let mut child = d
        .command(&["exec", &id, "--", "sh", "-c", "echo up; exec sleep 1234"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    assert_eq!(line(&mut out), "up");
    // A client that is killed leaves its command, by its name, until somebody ends it.
    child.kill().unwrap();
    wait_child(&mut child);
    let row = || {
        let listed = d.ok(&["ps", &id]);
        listed.lines().find(|l| l.contains("sleep 1234")).map(str::to_string)
    };
    let name = exec_of(&row().unwrap(), "sleep 1234").unwrap();
    let state = || row().unwrap().split_whitespace().nth(2).map(str::to_string);
    let kill = |signal: &str| d.ok(&["kill", "-s", signal, &id, "--exec", &name]);
    kill("STOP");
    wait_for("its stop", || state().as_deref() == Some("T"));
    kill("SIGCONT");
    wait_for("it to go on", || state().as_deref() == Some("S"));
    kill("term");
    wait_for("its end", || row().is_none());
    // What is not there, and what is no signal.
    let out = d.output(&["kill", &id, "--exec", &name]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(1) && err.contains(&format!("no command {name:?}")), "{err}");
    let out = d.output(&["kill", &id]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(1) && err.contains("no command of `vmcache run`"), "{err}");
    let out = d.output(&["kill", "-s", "NOSUCH", &id]);
    assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
    d.ok(&["stop", &id]);

    // The command of `run` itself, through another terminal.
    let mut child = d
        .command(&["run", "--keep", "--", "sh", "-c", "echo up; exec sleep 1234"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    assert_eq!(line(&mut out), "up");
    let listed = d.ok(&["list", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let id = listed[0]["id"].as_str().unwrap().to_string();
    d.ok(&["kill", "-s", "STOP", &id]);
    wait_for("its stop", || d.ok(&["ps", &id]).lines().any(|l| l.contains(" T ")));
    d.ok(&["kill", "-s", "CONT", &id]);
    d.ok(&["kill", "-s", "RTMIN+2", &id]);
    assert_eq!(wait_child(&mut child).code(), Some(128 + SIGRTMIN() + 2));
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

/// In a running container, where a process that is left is taken over by another's init.
#[test]
fn what_a_joined_exec_leaves_is_listed_by_its_name_and_can_be_ended() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let mut main = d
        .command(&["run", "--keep", "--", "sh", "-c", "echo up; exec sleep 4321"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(line(&mut BufReader::new(main.stdout.take().unwrap())), "up");
    let listed: serde_json::Value = serde_json::from_str(&d.ok(&["list", "--json"])).unwrap();
    let id = listed[0]["id"].as_str().unwrap().to_string();
    // Its time is over, and a child of its has its streams.
    let script = "echo out; sleep 77 & sleep 78";
    let out = d.output(&["exec", "--timeout", "1", &id, "--", "sh", "-c", script]);
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(124), "out\n".into()));
    let rows = || -> Vec<serde_json::Value> {
        serde_json::from_str(&d.ok(&["ps", &id, "--json"])).unwrap()
    };
    let exec = |rows: &[serde_json::Value], command: &str| {
        let row = rows.iter().find(|row| row["command"] == command)?;
        Some(row["exec"].as_str().unwrap().to_string())
    };
    let seen = rows();
    let (name, first) = (exec(&seen, "sleep 77").unwrap(), exec(&seen, "sleep 4321").unwrap());
    assert!(name.starts_with("exec-") && first == "main", "{seen:?}");
    assert_eq!(exec(&seen, "sleep 78"), None);
    d.ok(&["kill", &id, "--exec", &name]);
    wait_for("its end", || exec(&rows(), "sleep 77").is_none());
    let again = d.output(&["kill", &id, "--exec", &name]);
    assert_eq!(again.status.code(), Some(1), "{}", text(&again.stderr));
    // One that has ended in time has its own code: nothing of it was lost.
    let script = "echo out; sleep 79 & exit 3";
    let out = d.output(&["exec", "--timeout", "2", &id, "--", "sh", "-c", script]);
    assert_eq!((out.status.code(), text(&out.stdout)), (Some(3), "out\n".into()));
    // Programs that cannot be executed, where exec joins: its start's errors as well.
    for (program, ends) in [("nosuch", 127), ("/etc/passwd", 126), ("/etc/passwd/x", 126)] {
        let out = d.output(&["exec", &id, "--", program]);
        assert_eq!(out.status.code(), Some(ends), "{program}: {}", text(&out.stderr));
    }
    // Whoever waits for a command hears that the VM has ended.
    d.ok(&["stop", &id]);
    assert_eq!(wait_child(&mut main).code(), Some(125));
    assert_nothing_left(&d.quit().0);
}

/// From before the command is there until it runs: none is lost, and none ends this alone.
#[test]
fn a_signal_at_any_moment_of_the_start_reaches_the_command() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let id = d.ok(&["get"]).trim().to_string();
    for (n, delay) in [0, 2, 5, 10, 15, 20, 30, 40, 60, 80, 100].into_iter().enumerate() {
        let signal = [libc::SIGTERM, libc::SIGUSR1, SIGRTMAX()][n % 3];
        let mut child = d.command(&["exec", &id, "--", "sleep", "300"]).spawn().unwrap();
        // Before its main function a process has no handler for anything.
        let caught = format!("/proc/{}/task", child.id());
        wait_for("its thread for signals", || {
            std::fs::read_dir(&caught).is_ok_and(|tasks| tasks.count() > 1)
        });
        std::thread::sleep(Duration::from_millis(delay));
        send(child.id(), signal);
        assert_eq!(wait_child(&mut child).code(), Some(128 + signal), "after {delay} ms");
    }
    for delay in [0, 30, 100] {
        d.wait_ready(2);
        let mut child = d.command(&["run", "--", "sleep", "300"]).spawn().unwrap();
        let caught = format!("/proc/{}/task", child.id());
        wait_for("its thread for signals", || {
            std::fs::read_dir(&caught).is_ok_and(|tasks| tasks.count() > 1)
        });
        std::thread::sleep(Duration::from_millis(delay));
        send(child.id(), libc::SIGINT);
        assert_eq!(wait_child(&mut child).code(), Some(130), "after {delay} ms");
    }
    assert!(!d.ok(&["ps", &id]).contains("sleep 300"));
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn what_is_ignored_stays_so_and_a_vms_end_is_told() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    // None is ignored in the guest, the C library's own included.
    let ignored = d.ok(&["exec", &id, "--", "grep", "SigIgn", "/proc/self/status"]);
    assert_eq!(ignored, "SigIgn:\t0000000000000000\n");
    let mut command = d.command(&["exec", &id, "--", "sh", "-c", "echo up; read line; exit 3"]);
    // SAFETY: a system call.
    unsafe {
        command.pre_exec(|| {
            let _ = signal::signal(Signal::SIGHUP, SigHandler::SigIgn);
            let _ = signal::signal(Signal::SIGINT, SigHandler::SigIgn);
            Ok(())
        });
    }
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(line(&mut BufReader::new(child.stdout.take().unwrap())), "up");
    send(child.id(), libc::SIGHUP);
    send(child.id(), libc::SIGINT);
    drop(child.stdin.take());
    assert_eq!(wait_child(&mut child).code(), Some(3));

    let mut command = d.command(&["exec", &id, "--", "sh", "-c", "echo up; sleep 1000"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    assert_eq!(line(&mut BufReader::new(child.stdout.take().unwrap())), "up");
    // So does a copy whose standard input says nothing.
    let mut copy = d.command(&["cp", "-", &format!("{id}:/tmp")]);
    let mut copy = copy.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let _held = copy.stdin.take();
    wait_for("the copy's other side", || d.ok(&["ps", &id]).contains(" put "));
    d.ok(&["stop", &id]);
    let out = copy.wait_with_output().unwrap();
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(1) && err.contains("has ended"), "{out:?}");
    let out = child.wait_with_output().unwrap();
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(125) && err.contains(&format!("VM {id} has ended")), "{err}");
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_start_is_answered_after_execve() {
    let _prepared = require_qemu!();
    let dir = crate::daemon::Dir::new();
    let guest = boot(&dir);
    let sleep = workload::Command::new("sleep").arg("1000");
    // Containers of their own, whose program is not their first process.
    for _ in 0..10 {
        let running = guest.exec(&sleep).unwrap();
        running.signal(libc::SIGTERM).unwrap();
        assert_eq!(running.wait().unwrap(), 128 + libc::SIGTERM);
        guest.remove(&running.id().container).unwrap();
    }
    // And in a running one.
    let main = guest.spawn(&sleep).unwrap();
    for signal in [libc::SIGTERM, libc::SIGUSR1, SIGRTMAX()].repeat(5) {
        let running = guest.exec(&sleep).unwrap();
        assert_eq!(running.id().container, "main");
        running.signal(signal).unwrap();
        assert_eq!(running.wait().unwrap(), 128 + signal);
    }
    main.signal(libc::SIGINT).unwrap();
    assert_eq!(main.wait().unwrap(), 128 + libc::SIGINT);
    assert!(main.signal(libc::SIGINT).unwrap_err().to_string().contains("run in the VM"));
}

#[test]
fn what_cannot_be_executed_is_an_error_of_its_start() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let make = "cd /tmp; printf '#!/nosuch/interpreter\\n' > lost; echo garbage > garbage; \
                printf '\\177ELF' > torn; chmod +x *; touch data; mkdir dir; mkdir -m 700 closed; ln -s loop loop; \
                sleep 0";
    d.ok(&["exec", &id, "--", "sh", "-c", make]);
    for (program, ends, says) in [
        ("nosuch", 127, "command not found"),
        ("/tmp/nosuch", 127, "no such file"),
        ("/tmp/lost", 127, "/nosuch/interpreter is not in the guest"),
        ("/tmp/garbage", 126, "neither a program of this machine nor a script"),
        ("/tmp/torn", 126, "os error 8"),
        ("/tmp/data", 126, "not executable"),
        ("/tmp/dir", 126, "not executable"),
        ("/tmp/garbage/x", 126, "os error 20"),
        ("/tmp/loop", 126, "os error 40"),
        ("", 127, "name is empty"),
        (&"a".repeat(70_000), 127, "command not found"),
        (&format!("/{}", "a".repeat(100_000)), 126, "os error 36"),
        ("/tmp/closed/x", 126, "not executable"),
    ] {
        let user = if program.contains("closed") { "5" } else { "0" };
        let out = d.output(&["exec", "-u", user, &id, "--", program]);
        let err = text(&out.stderr);
        let program = program.get(..20).unwrap_or(program);
        assert_eq!(out.status.code(), Some(ends), "{program}: {err}");
        assert!(err.contains(says) && err.trim().lines().count() == 1, "{program}: {err:?}");
        assert!(err.len() < 5000, "{program}: {} bytes", err.len());
    }
    // What is not the program's fault has another code than a program's.
    let out = d.output(&["exec", "-w", "/nosuch", &id, "--", "true"]);
    let err = text(&out.stderr);
    assert!(out.status.code() == Some(125) && err.contains("/nosuch"), "{err}");
    for option in ["-w", "-u"] {
        let long = format!("/{}", "a".repeat(100_000));
        let out = d.output(&["exec", option, &long, &id, "--", "true"]);
        assert_eq!(out.status.code(), Some(125), "{option}: {}", text(&out.stderr));
    }
    let ps = d.ok(&["ps", &id]);
    assert!(!ps.contains(" stage "), "{ps}");
    let out = d.output(&["kill", &id, "--exec", ""]);
    assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
    // None of them leaves a container.
    assert_eq!(d.ok(&["exec", &id, "--", "sh", "-c", "ls /run/vmcache/containers | wc -l"]), "1\n");
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn limits_of_time_hold_and_are_read_alike() {
    let prepared = require_qemu!();
    let mut d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let timed = |args: &[&str]| {
        let started = Instant::now();
        let out = d.output(args);
        (out.status.code().unwrap(), started.elapsed(), text(&out.stderr))
    };
    let (ends, took, err) = timed(&["exec", "--timeout", "2.5", &id, "--", "sleep", "100"]);
    assert!(ends == 124 && took < LONG, "{ends} {took:?} {err}");
    for bad in ["18446744073709551615", "-1", "1e9", "31536001", "0", "x", ""] {
        let option = format!("--timeout={bad}");
        let (ends, _, err) = timed(&["exec", &option, &id, "--", "true"]);
        assert!(ends == 2 && err.contains("a number of seconds"), "{bad}: {ends} {err}");
    }
    for command in [&["get", "--wait=31536001"][..], &["run", "--wait=-1", "--", "true"]] {
        let (ends, _, err) = timed(command);
        assert!(ends == 2 && err.contains("0 to 31536000"), "{command:?}: {err}");
    }
    // The longest there is, and none at all: one VM stands ready for it.
    d.wait_ready(1);
    let (ends, _, err) = timed(&["run", "--timeout", "31536000", "--wait", "0", "--", "true"]);
    assert_eq!(ends, 0, "{err}");
    // A guest that does nothing is not waited for longer than the limit.
    let listed: serde_json::Value = serde_json::from_str(&d.ok(&["list", "--json"])).unwrap();
    let pid = listed[0]["pid"].as_i64().unwrap();
    send(pid as u32, libc::SIGSTOP);
    let (ends, took, err) = timed(&["exec", "--timeout", "2", &id, "--", "true"]);
    send(pid as u32, libc::SIGCONT);
    assert_eq!(ends, 124, "{err}");
    assert!(took < Duration::from_secs(8) && err.contains("did not start"), "{took:?} {err}");
    // A claim that does not want to wait costs no VM.
    d.ok(&["drain"]);
    let before = d.status()["ready"].clone();
    let (ends, took, err) = timed(&["get", "--wait", "0"]);
    assert!(ends != 0 && took < LONG, "{err}");
    assert_eq!(d.status()["ready"], before);
    d.ok(&["stop", &id]);
    d.signal(nix::sys::signal::Signal::SIGTERM);
    d.wait();
}
