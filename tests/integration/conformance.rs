//! One walk through all that agents can do, the same for each of them, with what
//! each is expected to answer. Our own agent walks it in `transports`; stock ones where
//! `tests/interop/run` names them.

use std::path::Path;
use std::time::Duration;

use vmcache::agent::{Agent, Error, ListFormat, Outcome, ProcessId};
use vmcache::config::Config;
use vmcache::factory::{direct, Wanted};
use vmcache::proto::agent::{CopyFileRequest, CreateContainerRequest, CreateSandboxRequest};
use vmcache::proto::oci::{
    Box as Size, Linux, LinuxCPU, LinuxCapabilities, LinuxNamespace, LinuxResources, Mount,
    Process, Root, Spec,
};
use vmcache::proto::types::{IPAddress, IPFamily, Interface, Route};
use vmcache::vm::attach::Network;
use vmcache::vm::VmConfig;

use crate::daemon::{assert_nothing_left, wait_for, Dir, Options, LONG};

/// Where the container's root is in the guest: below where Kata's agents let files
/// be copied to.
const ROOT: &str = "/run/kata-containers/conf/rootfs";
/// The container; Kata 3.x wants two letters at least.
const CONTAINER: &str = "conf";
/// A static program with a shell and all that the walk needs.
const BUSYBOX: &str = "/bin/busybox";
/// Bytes of a file in one call.
const PIECE: usize = 512 * 1024;

/// What was called, and what came of it.
#[derive(Default)]
pub struct Steps(Vec<(&'static str, String)>);

impl Steps {
    fn push(&mut self, step: (&'static str, String)) {
        // Seen when the test fails, or hangs with --nocapture.
        eprintln!("{:<16} {:?}", step.0, step.1);
        self.0.push(step);
    }
}

fn said<T>(outcome: Outcome<T>) -> String {
    match outcome {
        Ok(_) => "ok".into(),
        Err(Error::Unsupported { .. }) => "unsupported".into(),
        Err(Error::Refused { text, .. }) => {
            eprintln!("                 {text}");
            "refused".into()
        }
        Err(e) => format!("FAILED: {}", vmcache::report::chain(&e)),
    }
}

fn text(outcome: Outcome<Vec<u8>>) -> String {
    match outcome {
        Ok(bytes) => String::from_utf8_lossy(&bytes).replace('\r', ""),
        Err(e) => said::<()>(Err(e)),
    }
}

fn process(args: &[&str]) -> Process {
    Process {
        Args: [BUSYBOX].iter().chain(args).map(|a| a.to_string()).collect(),
        Env: vec!["PATH=/bin".into()],
        Cwd: "/".into(),
        User: Some(Default::default()).into(),
        // Kata's agents take a process without them for a mistake, or end.
        Capabilities: Some(capabilities()).into(),
        ..Default::default()
    }
}

fn capabilities() -> LinuxCapabilities {
    let all = ["CHOWN", "KILL", "SETUID", "SETGID", "SETPCAP", "SYS_ADMIN", "DAC_OVERRIDE"];
    let all: Vec<String> = all.iter().map(|c| format!("CAP_{c}")).collect();
    LinuxCapabilities {
        Bounding: all.clone(),
        Effective: all.clone(),
        Permitted: all,
        ..Default::default()
    }
}

fn spec() -> Spec {
    let namespace = |t: &str| LinuxNamespace { Type: t.into(), ..Default::default() };
    let mount = |what: &str, at: &str| Mount {
        destination: at.into(),
        source: what.into(),
        type_: what.into(),
        ..Default::default()
    };
    let script = "echo out; echo err >&2; read a; echo got $a; exec /bin/busybox sleep 1000";
    Spec {
        Version: "1.0.2".into(),
        Process: Some(process(&["sh", "-c", script])).into(),
        Root: Some(Root { Path: ROOT.into(), ..Default::default() }).into(),
        Mounts: vec![
            mount("proc", "/proc"),
            mount("tmpfs", "/dev"),
            mount("devpts", "/dev/pts"),
            // Without it, agents of 1.x can start no further process.
            mount("sysfs", "/sys"),
        ],
        Linux: Some(Linux {
            Namespaces: ["pid", "mount", "uts", "ipc"].into_iter().map(namespace).collect(),
            Resources: Some(shares(512)).into(),
            CgroupsPath: "/conformance/c".into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn shares(n: u64) -> LinuxResources {
    LinuxResources {
        CPU: Some(LinuxCPU { Shares: n, ..Default::default() }).into(),
        ..Default::default()
    }
}

/// Brings a file into the guest, piece by piece.
fn copy(agent: &dyn Agent, path: &str, data: &[u8], mode: u32) -> Outcome<()> {
    for (i, piece) in data.chunks(PIECE).enumerate() {
        agent.copy_file(CopyFileRequest {
            path: path.into(),
            file_size: data.len() as i64,
            file_mode: 0o100_000 | mode,
            dir_mode: 0o755,
            offset: (i * PIECE) as i64,
            data: piece.to_vec(),
            ..Default::default()
        })?;
    }
    Ok(())
}

/// Reads until something is there.
fn read_until(agent: &dyn Agent, id: &ProcessId, what: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(what) {
        match agent.read_process_stdout(id, 4096) {
            Ok(bytes) if !bytes.is_empty() => seen.push_str(&String::from_utf8_lossy(&bytes)),
            other => return format!("{seen:?}, and then {:?}", other.map(|_| "the end")),
        }
    }
    what.to_string()
}

fn in_container(exec: &str) -> ProcessId {
    ProcessId { container: CONTAINER.into(), exec: exec.into() }
}

fn containers(agent: &dyn Agent, steps: &mut Steps) {
    let sandbox = || CreateSandboxRequest {
        sandbox_id: "s".into(),
        hostname: "conformant".into(),
        ..Default::default()
    };
    steps.push(("sandbox", said(agent.start_sandbox(sandbox()))));
    steps.push(("sandbox twice", said(agent.start_sandbox(sandbox()))));
    let busybox = std::fs::read(BUSYBOX).unwrap();
    let path = format!("{ROOT}{BUSYBOX}");
    steps.push(("copy", said(copy(agent, &path, &busybox, 0o755))));
    steps.push(("copy more", said(copy(agent, &format!("{ROOT}/etc/x"), b"copied\n", 0o640))));
    let request = CreateContainerRequest {
        container_id: CONTAINER.into(),
        exec_id: CONTAINER.into(),
        OCI: Some(spec()).into(),
        ..Default::default()
    };
    steps.push(("create", said(agent.create_container(request))));
    steps.push(("start", said(agent.start_container(CONTAINER))));
    let main = in_container("");
    steps.push(("stdout", text(agent.read_process_stdout(&main, 4096))));
    steps.push(("stderr", text(agent.read_process_stderr(&main, 4096))));
    let written = agent.write_process_stdin(&main, b"hello\n".to_vec());
    steps.push(("stdin", written.map_or_else(|e| e.to_string(), |n| n.to_string())));
    steps.push(("stdout again", text(agent.read_process_stdout(&main, 4096))));
    let listed = agent.process_list_container(CONTAINER, ListFormat::Json, &[]);
    let pids = listed.map(|j| serde_json::from_slice::<Vec<i32>>(&j).map_or(0, |l| l.len()));
    steps.push(("pids", pids.map_or_else(|e| said::<()>(Err(e)), |n| n.to_string())));
    let listed = agent.process_list_container(CONTAINER, ListFormat::Table, &[]);
    let table = listed.map(|t| {
        let t = String::from_utf8_lossy(&t).into_owned();
        let headed = t.lines().next().is_some_and(|l| l.contains("PID"));
        format!("{headed} {}", t.lines().count())
    });
    steps.push(("table", table.unwrap_or_else(|e| said::<()>(Err(e)))));
    let stats = agent.stats_container(CONTAINER);
    let counted = stats.map(|s| s.cgroup_stats.pids_stats.current);
    steps.push(("stats", counted.map_or_else(|e| said::<()>(Err(e)), |n| n.to_string())));
}

fn limits(agent: &dyn Agent, steps: &mut Steps) {
    steps.push(("pause", said(agent.pause_container(CONTAINER))));
    steps.push(("resume", said(agent.resume_container(CONTAINER))));
    steps.push(("update", said(agent.update_container(CONTAINER, shares(256)))));
}

fn processes(agent: &dyn Agent, steps: &mut Steps) {
    let seven = in_container("seven");
    steps.push(("exec", said(agent.exec(&seven, process(&["sh", "-c", "cat /etc/x; exit 7"])))));
    let code = |outcome: Outcome<i32>| outcome.map_or_else(|e| e.to_string(), |c| c.to_string());
    steps.push(("what was copied", text(agent.read_process_stdout(&seven, 4096))));
    steps.push(("end of stdout", text(agent.read_process_stdout(&seven, 4096))));
    steps.push(("exit code", code(agent.wait_process(&seven, Some(LONG)))));

    let cat = in_container("cat");
    steps.push(("exec cat", said(agent.exec(&cat, process(&["cat"])))));
    steps.push(("its stdin", said(agent.write_process_stdin(&cat, b"meow".to_vec()))));
    steps.push(("its stdout", text(agent.read_process_stdout(&cat, 4096))));
    steps.push(("its stdin's end", said(agent.close_process_stdin(&cat))));
    steps.push(("its end", code(agent.wait_process(&cat, Some(LONG)))));

    let mut shell = process(&["sh"]);
    shell.Terminal = true;
    shell.ConsoleSize = Some(Size { Height: 24, Width: 80, ..Default::default() }).into();
    let tty = in_container("tty");
    steps.push(("exec tty", said(agent.exec(&tty, shell))));
    steps.push(("window", said(agent.winsize_process(&tty, 33, 99))));
    let asked = agent.write_process_stdin(&tty, b"busybox stty size\n".to_vec());
    steps.push(("ask its size", said(asked)));
    steps.push(("its size", read_until(agent, &tty, "33 99")));
    steps.push(("leave", said(agent.write_process_stdin(&tty, b"exit 4\n".to_vec()))));
    steps.push(("its code", code(agent.wait_process(&tty, Some(LONG)))));
}

fn ending(agent: &dyn Agent, steps: &mut Steps) {
    let code = |outcome: Outcome<i32>| outcome.map_or_else(|e| e.to_string(), |c| c.to_string());
    let sleep = in_container("sleep");
    steps.push(("exec sleep", said(agent.exec(&sleep, process(&["sleep", "1000"])))));
    steps.push(("kill", said(agent.signal_process(&sleep, 9))));
    steps.push(("killed", code(agent.wait_process(&sleep, Some(LONG)))));
    let main = in_container("");
    steps.push(("kill all", said(agent.signal_process(&main, 9))));
    steps.push(("main killed", code(agent.wait_process(&main, Some(LONG)))));
    steps.push(("remove", said(agent.stop_container(CONTAINER, Duration::from_secs(10)))));
    steps.push(("stats of none", said(agent.stats_container(CONTAINER))));
}

fn network(agent: &dyn Agent, mac: &str, steps: &mut Steps) {
    let address = IPAddress {
        family: IPFamily::v4.into(),
        address: "10.0.2.15".into(),
        mask: "24".into(),
        ..Default::default()
    };
    let wanted = Interface {
        device: "eth0".into(),
        name: "eth0".into(),
        IPAddresses: vec![address],
        mtu: 1400,
        hwAddr: mac.into(),
        ..Default::default()
    };
    steps.push(("interface", said(agent.update_interface(wanted))));
    let listed = agent.list_interfaces().unwrap();
    let found = listed.iter().find(|i| i.hwAddr.eq_ignore_ascii_case(mac)).unwrap();
    let its: Vec<_> =
        found.IPAddresses.iter().map(|a| format!("{}/{}", a.address, a.mask)).collect();
    assert!(its.contains(&"10.0.2.15/24".to_string()), "{its:?}");
    steps.push(("its name and mtu", format!("{} {}", found.name, found.mtu)));
    let route = Route {
        gateway: "10.0.2.2".into(),
        device: "eth0".into(),
        family: IPFamily::v4.into(),
        ..Default::default()
    };
    steps.push(("routes", said(agent.update_routes(vec![route]))));
    let routes = agent.list_routes().unwrap();
    let default = routes.iter().any(|r| r.gateway == "10.0.2.2" && r.device == "eth0");
    steps.push(("default route", default.to_string()));
}

/// The walk, in a VM of these options.
pub fn walk(options: &Options, dir: &Dir) -> Steps {
    let config = Config::parse(Path::new("test.toml"), &options.text(&dir.0)).unwrap();
    let (mut vm, agent) = direct::cold(&config, &Wanted::default(), true, &|_| {}).unwrap();
    let mut steps = Steps::default();
    let agent = &*agent;
    steps.push(("check", said(agent.check(LONG))));
    steps.push(("protocol", agent.version().unwrap().0));
    let block = agent.guest_details().unwrap().mem_block_size_bytes;
    steps.push(("memory block", block.to_string()));
    steps.push(("seed", said(agent.reseed_rng(&[7; 512]))));
    steps.push(("clock", said(agent.set_guest_date_time(Duration::from_secs(1 << 30)))));
    let nic = "user".parse::<Network>().unwrap().open().unwrap();
    vm.attach_nic(&nic, true).unwrap();
    wait_for("the network card", || {
        let listed = agent.list_interfaces().unwrap();
        listed.iter().any(|i| i.hwAddr.eq_ignore_ascii_case(nic.mac()))
    });
    network(agent, nic.mac(), &mut steps);
    let grown = vm.grow(agent, &VmConfig::of(&config), Some(2), None);
    let grown = grown.map_or_else(|e| vmcache::report::chain(&e), |()| "ok".into());
    steps.push(("grow", grown));
    // Its kernel hears of memory by ACPI, and has no file to be told by.
    steps.push(("probe nothing", said(agent.mem_hotplug_by_probe(&[]))));
    steps.push(("probe memory", said(agent.mem_hotplug_by_probe(&[1 << 30]))));
    containers(agent, &mut steps);
    processes(agent, &mut steps);
    limits(agent, &mut steps);
    ending(agent, &mut steps);
    steps.push(("sandbox's end", said(agent.stop_sandbox())));
    agent.disconnect();
    vm.destroy();
    assert_nothing_left(&dir.0);
    steps
}

/// What our own agent answers, and Kata's but for what is named.
const EXPECTED: [(&str, &str); 51] = [
    ("check", "ok"),
    ("protocol", "0.0.1"),
    ("memory block", "134217728"),
    ("seed", "ok"),
    ("clock", "ok"),
    ("interface", "ok"),
    ("its name and mtu", "eth0 1400"),
    ("routes", "ok"),
    ("default route", "true"),
    ("grow", "ok"),
    ("probe nothing", "ok"),
    ("probe memory", "refused"),
    ("sandbox", "ok"),
    ("sandbox twice", "refused"),
    ("copy", "ok"),
    ("copy more", "ok"),
    ("create", "ok"),
    ("start", "ok"),
    ("stdout", "out\n"),
    ("stderr", "err\n"),
    ("stdin", "6"),
    ("stdout again", "got hello\n"),
    ("pids", "1"),
    ("table", "true 2"),
    ("stats", "1"),
    ("exec", "ok"),
    ("what was copied", "copied\n"),
    ("end of stdout", ""),
    ("exit code", "7"),
    ("exec cat", "ok"),
    ("its stdin", "ok"),
    ("its stdout", "meow"),
    ("its stdin's end", "ok"),
    ("its end", "0"),
    ("exec tty", "ok"),
    ("window", "ok"),
    ("ask its size", "ok"),
    ("its size", "33 99"),
    ("leave", "ok"),
    ("its code", "4"),
    ("pause", "ok"),
    ("resume", "ok"),
    ("update", "ok"),
    ("exec sleep", "ok"),
    ("kill", "ok"),
    ("killed", "137"),
    ("kill all", "ok"),
    ("main killed", "137"),
    ("remove", "ok"),
    ("stats of none", "refused"),
    ("sandbox's end", "ok"),
];

/// Compares; `but` is where this agent is known to differ.
pub fn assert_walked(steps: &Steps, but: &[(&str, &str)]) {
    let names: Vec<_> = steps.0.iter().map(|(step, _)| *step).collect();
    let wanted: Vec<_> = EXPECTED.iter().map(|(step, _)| *step).collect();
    assert_eq!(names, wanted);
    let mut differ = Vec::new();
    for ((step, got), (_, usual)) in steps.0.iter().zip(&EXPECTED) {
        let want = but.iter().find(|(s, _)| s == step).map_or(*usual, |(_, w)| *w);
        if got != want {
            differ.push(format!("{step}: {got:?}, not {want:?}"));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}
