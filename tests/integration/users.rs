//! Users, their streams and environment, and the guest's own memory and agent: what a
//! command finds, whoever it runs as.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::Output;
use std::time::Duration;

use vmcache::agent::{Error, ProcessId};
use vmcache::proto::agent::{CreateContainerRequest, CreateSandboxRequest};
use vmcache::proto::oci::{LinuxNamespace, Process, Root, Spec, User};
use vmcache::workload::{Command, Guest};

use crate::daemon::{assert_nothing_left, text, Daemon, Dir, Options};
use crate::guest::{boot, output};
use crate::require_qemu;

fn code(out: &Output) -> i32 {
    out.status.code().unwrap()
}

#[test]
fn users_in_all_forms_of_docker_run_u() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get"]).trim().to_string();
    let passwd = r"root:x:0:0:root:/root:/bin/sh\n\377\376:x:9:9::/:\nbroken\nann:x:oops:1::/:\nhuge:x:4294967295:0::/:\nann:x:1000:1001:Ann \351:/tmp:/bin/sh\n1000:x:2000:2000::/number:\n";
    let group = r"root:x:0:\nann:x:1001:\nwheel:x:10:root,ann\n\377:x:11:ann\n";
    let long =
        "head -c 1000000 /dev/zero | tr '\\0' x >> /etc/passwd; echo ':x:7:8::/:' >> /etc/passwd; \
                echo 'last:x:77:88::/last:' >> /etc/passwd";
    let make = format!("printf '{passwd}' > /etc/passwd; printf '{group}' > /etc/group; {long}");
    d.ok(&["exec", &id, "--", "sh", "-c", &make]);
    let who = "echo $(id -u) $(id -g) $(grep Groups /proc/self/status | cut -f2) $HOME";
    let run = |user: &str| d.output(&["exec", "-u", user, &id, "--", "sh", "-c", who]);
    for (user, is) in [
        ("ann", "1000 1001 10 11 1001 /tmp"),
        ("1000", "1000 1001 10 11 1001 /tmp"),
        ("ann:wheel", "1000 10 10 /tmp"),
        ("ann:4321", "1000 4321 4321 /tmp"),
        ("5:6", "5 6 6 /"),
        ("5", "5 0 0 /"),
        (":10", "0 10 10 /root"),
        ("last", "77 88 88 /last"),
        ("root", "0 0 0 10 /root"),
        ("2147483647:2147483647", "2147483647 2147483647 2147483647 /"),
    ] {
        let out = run(user);
        let found = text(&out.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!((code(&out), found.as_str()), (0, is), "{user}: {}", text(&out.stderr));
    }
    let out = d.output(&["exec", &id, "--", "sh", "-c", who]);
    assert_eq!(text(&out.stdout), "0 0 0 10 /root\n", "who names nobody is root, with its groups");
    for (user, ends, says) in [
        ("4294967295", 2, "user 4294967295: a number of a user is 0 to 2147483647"),
        ("2147483648", 2, "2147483648"),
        ("-1", 2, "user -1"),
        ("0:-1", 2, "group -1"),
        ("0:4294967295", 2, "group 4294967295"),
        ("99999999999999999999", 2, "99999999999999999999"),
        ("bob", 125, "no user \"bob\" in the guest's /etc/passwd"),
        ("huge", 125, "no sound numbers"),
        ("ann:staff", 125, "no group \"staff\""),
    ] {
        let out = run(user);
        let err = text(&out.stderr);
        assert!(code(&out) == ends && err.contains(says), "{user}: {} {err}", code(&out));
    }
    // The streams are the user's own to open anew, in a pipe and in a terminal.
    let open = "echo out > /dev/stdout; echo err > /dev/stderr; cat /dev/stdin";
    let mut command = d.command(&["exec", "-u", "5:6", &id, "--", "sh", "-c", open]);
    let out = crate::daemon::feed(
        std::mem::replace(&mut command, std::process::Command::new("true")),
        b"in\n",
    );
    assert_eq!((text(&out.stdout).as_str(), text(&out.stderr).as_str()), ("out\nin\n", "err\n"));
    // Its environment, as docker's.
    let mut command = d.command(&[
        "exec",
        "-e",
        "A=1",
        "-e",
        "HERE",
        "-e",
        "NOT_HERE=1",
        "-e",
        "NOT_HERE",
        "-e",
        "A=2",
    ]);
    command.args(["-e", "EMPTY=", &id, "--", "sh", "-c", "env | grep -v ^PWD | sort"]);
    let out = command.env("HERE", "of the caller").env_remove("NOT_HERE").output().unwrap();
    let env = text(&out.stdout);
    let env: Vec<&str> = env.lines().filter(|l| !l.starts_with("PATH=")).collect();
    assert_eq!(env[..4], ["A=2", "EMPTY=", "HERE=of the caller", "HOME=/root"], "{env:?}");
    assert!(!env.iter().any(|e| e.starts_with("NOT_HERE")), "{env:?}");
    let out = d.output(&["exec", "-e", "=x", &id, "--", "true"]);
    assert!(code(&out) == 2 && text(&out.stderr).contains("has no name"));
    // An argument that is no text is told.
    let mut command = d.command(&["exec", &id, "--", "echo"]);
    let out = command.arg(OsStr::from_bytes(b"a\xff")).output().unwrap();
    assert!(code(&out) == 2 && text(&out.stderr).contains("\"a\\xFF\", is no"), "{out:?}");
    // Its own name.
    let name =
        "h=$(hostname); grep -qw $h /etc/hosts && ping -c 1 -W 5 $h >/dev/null && echo found";
    assert_eq!(d.ok(&["exec", &id, "--", "sh", "-c", name]), "found\n");
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_full_guest_is_enospc_and_lives() {
    let prepared = require_qemu!();
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let id = d.ok(&["get", "--memory", "512"]).trim().to_string();
    let sh = |script: &str| {
        let out = d.output(&["exec", &id, "--", "sh", "-c", script]);
        (code(&out), text(&out.stdout).trim().to_string(), text(&out.stderr))
    };
    let mib = |script: &str| sh(script).1.parse::<u64>().unwrap() / 1024;
    let half = mib("awk '/^MemTotal/ { print $2 }' /proc/meminfo") / 2;
    for path in ["/", "/run", "/tmp", "/dev/shm"] {
        let size = mib(&format!("df -k {path} | awk 'END {{ print $2 }}'"));
        assert!(size.abs_diff(half) <= 1, "{path}: {size} of {half} MiB, grown with the VM");
    }
    for path in ["/fill", "/tmp/fill", "/run/fill", "/dev/shm/fill", "/dev/fill"] {
        let (ends, _, err) = sh(&format!("dd if=/dev/zero of={path} bs=1M"));
        assert!(ends == 1 && err.contains("No space left on device"), "{path}: {ends} {err}");
    }
    assert_eq!(sh("echo alive").1, "alive");
    sh("rm -f /fill /tmp/fill /run/fill /dev/shm/fill /dev/fill");
    // A great many small files fit; tests/soak makes as many as there can be.
    let (_, inodes, _) = sh("df -i / | awk 'END { print $2 }'");
    assert!(inodes.parse::<u64>().unwrap() > 100_000, "{inodes}");
    if std::env::var_os("VMCACHE_SOAK").is_some() {
        let many = "mkdir /many; cd /many; seq 1 400000 | xargs mkdir 2>&1 | tail -n 1";
        let (_, out, _) = sh(many);
        assert!(out.contains("No space left on device"), "{out}");
        sh("rm -rf /many");
    }
    let (ends, _, err) = sh("dd if=/dev/zero of=/fill bs=1M; rm /fill; echo back > /f");
    assert_eq!(ends, 0, "{err}");
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

/// Runs a script in the agent's own namespace of processes, where the agent takes
/// orphans over; its exit code.
fn beside_the_agent(guest: &Guest, script: &str) -> i32 {
    let mut request = request("beside", process(&["sh", "-c", script]));
    request.OCI.as_mut().unwrap().Linux.as_mut().unwrap().Namespaces.remove(0);
    let agent = guest.agent();
    agent.create_container(request).unwrap();
    agent.start_container("beside").unwrap();
    let id = ProcessId { container: "beside".into(), exec: String::new() };
    let code = agent.wait_process(&id, None).unwrap();
    agent.stop_container("beside", Duration::from_secs(5)).unwrap();
    code
}

fn request(id: &str, process: Process) -> CreateContainerRequest {
    let namespace = |t: &str| LinuxNamespace { Type: t.into(), ..Default::default() };
    let linux = vmcache::proto::oci::Linux {
        Namespaces: ["pid", "mount"].into_iter().map(namespace).collect(),
        ..Default::default()
    };
    CreateContainerRequest {
        container_id: id.into(),
        exec_id: id.into(),
        OCI: Some(Spec {
            Root: Some(Root { Path: "/".into(), ..Default::default() }).into(),
            Process: Some(process).into(),
            Linux: Some(linux).into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn process(args: &[&str]) -> Process {
    let args = args.iter().map(|a| a.to_string()).collect();
    Process { Args: args, Cwd: "/".into(), Env: vec!["PATH=/bin".into()], ..Default::default() }
}

fn refused(e: Result<(), Error>) -> String {
    match e {
        Err(Error::Refused { text, .. }) => text,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn the_agent_alone_is_right_or_refuses() {
    let _prepared = require_qemu!();
    let dir = Dir::new();
    let guest = boot(&dir);
    let agent = guest.agent();
    let sandbox = || CreateSandboxRequest { sandbox_id: "s".into(), ..Default::default() };
    agent.start_sandbox(sandbox()).unwrap();

    // Two creates of one id at once: one container, whole.
    for round in 0..8 {
        let id = format!("twin-{round}");
        let made: Vec<bool> = std::thread::scope(|s| {
            let twins: Vec<_> = (0..4)
                .map(|_| s.spawn(|| agent.create_container(request(&id, process(&["true"])))))
                .collect();
            twins.into_iter().map(|t| t.join().unwrap().is_ok()).collect()
        });
        assert_eq!(made.iter().filter(|m| **m).count(), 1, "{made:?}");
        agent.start_container(&id).unwrap();
        let all = ProcessId { container: id.clone(), exec: String::new() };
        assert_eq!(agent.wait_process(&all, None).unwrap(), 0);
        agent.stop_container(&id, Duration::from_secs(5)).unwrap();
    }

    // What no system call takes, wherever it stands; nothing is left of it.
    let mut odd = vec![process(&["echo", "a\0b"]), process(&["true\0"])];
    odd.push(Process { Env: vec!["A=\0".into()], ..process(&["true"]) });
    odd.push(Process { Cwd: "/\0".into(), ..process(&["true"]) });
    let user = |u: User| Process { User: Some(u).into(), ..process(&["true"]) };
    odd.push(user(User { Username: "a\0".into(), ..Default::default() }));
    for process in odd {
        let text = refused(agent.create_container(request("odd", process)));
        assert!(text.contains("contains a NUL"), "{text}");
    }
    for odd in [
        User { UID: u32::MAX, ..Default::default() },
        User { GID: u32::MAX, ..Default::default() },
        User { AdditionalGids: vec![1, u32::MAX], ..Default::default() },
        User { Username: "4294967295".into(), ..Default::default() },
        User { Username: "0:4294967295".into(), ..Default::default() },
    ] {
        let text = refused(agent.create_container(request("odd", user(odd))));
        assert!(text.contains("0 to 2147483647"), "{text}");
    }

    // One container that can not be removed keeps none of the others.
    for id in ["stays", "goes-1", "goes-2", "goes-3"] {
        agent.create_container(request(id, process(&["sleep", "1000"]))).unwrap();
        agent.start_container(id).unwrap();
    }
    let busy = "/run/vmcache/containers/stays/busy";
    let mount = format!("mkdir {busy} && nsenter -t 1 -m mount -t tmpfs none {busy}");
    assert_eq!(beside_the_agent(&guest, &mount), 0);
    let text = refused(agent.stop_sandbox());
    assert!(text.contains("remove container stays"), "{text}");
    assert_eq!(output(&guest, "ls /sys/fs/cgroup/vmcache | grep goes"), "", "the others are gone");
    assert_eq!(beside_the_agent(&guest, &format!("nsenter -t 1 -m umount {busy}")), 0);
    agent.stop_sandbox().unwrap();
    agent.start_sandbox(sandbox()).unwrap();
}

#[test]
fn an_exit_status_is_its_own_whatever_had_its_pid() {
    let _prepared = require_qemu!();
    let dir = Dir::new();
    let guest = boot(&dir);
    // Few pids, which orphans use up with a status of their own, one after the other.
    assert_eq!(beside_the_agent(&guest, "echo 400 > /proc/sys/kernel/pid_max"), 0);
    let main = guest.spawn(&Command::new("sleep").arg("1000")).unwrap();
    let orphans = "i=0; while [ $i -lt 250 ]; do (sh -c 'exit 77' &); i=$((i+1)); done; exit 3";
    for _ in 0..4 {
        assert_eq!(beside_the_agent(&guest, orphans), 3);
        // Together more than the agent could have, if each kept its files.
        for _ in 0..75 {
            let running = guest.exec(&Command::new("sh").args(["-c", "exit 5"])).unwrap();
            assert_eq!(running.wait().unwrap(), 5);
        }
    }
    main.signal(9).unwrap();
    assert_eq!(main.wait().unwrap(), 137);
}
