//! Clones of a template: each one unique, and a template that breaks is made anew.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmcache::agent::{ProcessId, Stream};
use vmcache::factory::grpccache::GrpcCache;
use vmcache::hypervisor::qemu::qmp::Qmp;
use vmcache::proto::agent::CreateContainerRequest;
use vmcache::proto::oci::{Process, Root, Spec};
use vmcache::vm::wire::from_wire;
use vmcache::vm::Vm;

use crate::daemon::{assert_nothing_left, wait_child, wait_for, Daemon, Dir, Options, LONG};
use crate::require_qemu;

/// A directory in memory, removed at the end.
pub fn in_memory(name: &str) -> Dir {
    let path = PathBuf::from(format!("/dev/shm/vmcache-test-{name}-{}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    Dir(path)
}

pub fn cloning(mut options: Options, dir: &Dir) -> Options {
    options.more_factory =
        format!("enable_template = true\ntemplate_path = {:?}\n", dir.0.join("template"));
    options
}

/// What a command prints in a VM as it was published: nothing has woken it but this.
fn first_words(vm: &mut Vm, script: &str) -> String {
    vm.resume().unwrap();
    let agent = vm.connect_agent().unwrap();
    let spec = Spec {
        Root: Some(Root { Path: "/".into(), ..Root::default() }).into(),
        Process: Some(Process {
            Args: ["sh", "-c", script].map(String::from).to_vec(),
            Env: vec!["PATH=/bin:/usr/bin".into()],
            Cwd: "/".into(),
            ..Process::default()
        })
        .into(),
        ..Spec::default()
    };
    let request = CreateContainerRequest {
        container_id: "first".into(),
        OCI: Some(spec).into(),
        ..CreateContainerRequest::default()
    };
    agent.create_container(request).unwrap();
    agent.start_container("first").unwrap();
    let id = ProcessId { container: "first".into(), exec: String::new() };
    let mut out = Vec::new();
    loop {
        let piece = agent.read_stream(&id, Stream::Out, 4096).unwrap();
        if piece.is_empty() {
            break String::from_utf8(out).unwrap();
        }
        out.extend(piece);
    }
}

/// Of 32 clones, as they stand in the pool, nothing that should be their own is
/// another's: what the guest's first command reads, and what QEMU tells.
#[test]
fn every_clone_is_unique() {
    let prepared = require_qemu!();
    let dir = in_memory("unique");
    let d = Daemon::start(&cloning(Options::pool(&prepared, 4), &dir));
    for vm in d.status()["vms"].as_array().unwrap() {
        assert_eq!(vm["source"], "template");
    }
    let client = GrpcCache::connect(&d.socket()).unwrap();
    let script = "head -c 1000 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/uuid \
                  /etc/machine-id /proc/sys/kernel/hostname";
    let mut seen = HashSet::new();
    for _ in 0..32 {
        let mut vm =
            from_wire(&client.claim_raw(Some(LONG)).unwrap(), || Err(String::new())).unwrap();
        let out = first_words(&mut vm, script);
        let mut own: Vec<String> = out.lines().map(str::to_string).collect();
        assert_eq!(own.len(), 4, "{out}");
        assert_eq!(own[2], vm.id().replace('-', ""));
        assert_eq!(own[3], format!("vm-{}", &vm.id()[..8]));
        let mut qmp = Qmp::connect(&vm.monitor(), LONG).unwrap();
        for (command, key) in [("query-uuid", "UUID"), ("query-vm-generation-id", "guid")] {
            let answer = qmp.execute(command, None, LONG).unwrap();
            own.push(format!("{command} {}", answer[key].as_str().unwrap()));
        }
        for one in own {
            assert!(seen.insert(one.clone()), "twice: {one}");
        }
        vm.destroy();
    }
    assert_eq!(d.log_lines("template-making").len(), 1);
    // What direct VMs can do, clones can.
    let id = d.ok(&["get"]).trim().to_string();
    assert_eq!(d.ok(&["exec", &id, "--", "cat", "/etc/machine-id"]).trim(), id.replace('-', ""));
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_clones_clock_is_right_after_a_minutes_pause() {
    let prepared = require_qemu!();
    let dir = in_memory("clock");
    let d = Daemon::start(&cloning(Options::pool(&prepared, 3), &dir));
    // All are paused from here on.
    d.wait_rest(3);
    std::thread::sleep(Duration::from_secs(60));
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let mut exact = false;
    for _ in 0..3 {
        // It reads its clock when it is told to. Of busybox, the one that shows
        // microseconds.
        let script = "echo up; read line; adjtimex";
        let mut command = d.command(&["run", "--", "sh", "-c", script]);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "up");
        let before = now();
        child.stdin.take().unwrap().write_all(b"now\n").unwrap();
        let (mut seconds, mut micro, mut after) = (None, None, None);
        for line in lines.map_while(Result::ok) {
            let value = |name: &str| line.trim().strip_prefix(name)?.trim().parse::<f64>().ok();
            seconds = seconds.or(value("time.tv_sec:"));
            micro = micro.or(value("time.tv_usec:"));
            after = after.or(micro.map(|_| now()));
        }
        wait_child(&mut child);
        let guest = seconds.unwrap() + micro.unwrap() / 1e6;
        // It was read at some instant between, with what setting it may take on a busy
        // host; a clock that had stood still would be a minute behind.
        assert!(
            guest > before - 5.0 && guest < after.unwrap() + 0.1,
            "guest {guest}, host {before} to {after:?}"
        );
        exact |= guest > before - 0.1;
    }
    assert!(exact, "all three were behind by more than a tenth of a second");
    assert_nothing_left(&d.quit().0);
}

/// A fake: the real agent, in whose bytes the path of the random device is
/// another, so that it refuses every reseed, as one on a broken guest would.
#[test]
fn a_clone_that_refuses_its_reseed_is_never_handed_out() {
    let prepared = require_qemu!();
    let dir = in_memory("refuses");
    let mut options = cloning(Options::pool(&prepared, 2), &dir);
    let mut initrd = fs::read(&options.initrd).unwrap();
    let (from, to) = (b"/dev/urandom", b"/dev/missing");
    let places: Vec<usize> =
        (0..initrd.len() - from.len()).filter(|at| initrd[*at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    for at in places {
        initrd[at..at + to.len()].copy_from_slice(to);
    }
    let fake = dir.0.join("initramfs.img");
    fs::write(&fake, initrd).unwrap();
    options.initrd = fake.display().to_string();
    let d = Daemon::launch(&options, Dir::new());
    let out = d.output(&["get", "--wait", "3"]);
    assert_eq!(out.status.code(), Some(4), "{}", String::from_utf8_lossy(&out.stdout));
    d.wait_log("boot-failed", 2);
    let status = d.status();
    assert!(status["counters"]["boots_failed"].as_u64().unwrap() >= 2, "{status}");
    assert_eq!(status["counters"]["boots"], 0, "{status}");
    let error = status["last_error"].as_str().unwrap();
    assert!(error.contains("open /dev/missing"), "{error}");
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_template_that_breaks_is_made_anew_and_the_pool_stays_open() {
    let prepared = require_qemu!();
    let dir = in_memory("breaks");
    let template = dir.0.join("template");
    let options = cloning(Options::pool(&prepared, 1), &dir);
    // What clones share is sealed, and cannot break: here it is the template's own files.
    let walls = [("VMCACHE_WALLS_DOWN", "seals,users")];
    let d = Daemon::launch_with(&options, Dir::new(), &walls);
    d.wait_ready(1);
    // The same file, which the server holds open: its clones fail from now on.
    fs::OpenOptions::new().write(true).open(template.join("state")).unwrap().set_len(64).unwrap();
    for _ in 0..2 {
        assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    }
    d.wait_log("template-suspect", 1);
    d.wait_log("template-ready", 2);
    d.wait_ready(1);
    assert!(d.status()["counters"]["boots_failed"].as_u64().unwrap() >= 2);
    // Removed by somebody: made again when the next clone is needed.
    fs::remove_file(template.join("manifest.json")).unwrap();
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    d.wait_log("template-ready", 3);
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}

/// A new kernel in the old one's place is seen by the next clone.
#[test]
fn a_kernel_that_is_replaced_while_the_server_runs_is_noticed() {
    let prepared = require_qemu!();
    let dir = in_memory("replaced");
    let mut options = cloning(Options::pool(&prepared, 1), &dir);
    let (kernel, new) = (dir.0.join("kernel"), dir.0.join("kernel.new"));
    let mut bytes = fs::read(&options.kernel).unwrap();
    fs::write(&kernel, &bytes).unwrap();
    options.kernel = kernel.display().to_string();
    let d = Daemon::start(&options);
    // The same bytes in another file: looked at, and found to fit.
    fs::write(&new, &bytes).unwrap();
    fs::rename(&new, &kernel).unwrap();
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    d.wait_log("template-reused", 1);
    d.wait_ready(1);
    // Others: whatever is behind a kernel's image, it still boots.
    bytes.extend([0; 16]);
    fs::write(&new, &bytes).unwrap();
    fs::rename(&new, &kernel).unwrap();
    assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
    d.wait_log("template-ready", 2);
    d.wait_ready(1);
    assert_nothing_left(&d.quit().0);
}

/// Two servers with one template_path and different templates do not take turns
/// at making it.
#[test]
fn a_template_that_another_configuration_replaced_is_still_used_by_who_has_it() {
    let prepared = require_qemu!();
    let dir = in_memory("two");
    let first = cloning(Options::pool(&prepared, 1), &dir);
    let mut second = cloning(Options::pool(&prepared, 1), &dir);
    second.more_qemu = "kernel_params = \"vmcache.other=1\"\n".into();
    let (a, b) = (Daemon::start(&first), Daemon::start(&second));
    for _ in 0..2 {
        for d in [&a, &b] {
            assert_eq!(d.ok(&["run", "--", "echo", "served"]), "served\n");
            d.wait_ready(1);
        }
    }
    for d in [a, b] {
        assert_eq!(d.log_lines("template-making").len(), 1, "{}", d.log());
        assert_nothing_left(&d.quit().0);
    }
}

#[test]
fn a_template_is_made_once_shown_and_removed() {
    let prepared = require_qemu!();
    let dir = in_memory("once");
    let mut options = cloning(Options::pool(&prepared, 1), &dir);
    let d = Daemon::start(&options);
    let json = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
    let status = json(d.ok(&["template", "status", "--json"]));
    assert_eq!((&status["exists"], &status["fits"]), (&true.into(), &true.into()));
    assert_eq!(json(d.ok(&["template", "create", "--json"]))["made"], false);
    let mut daemon_dir = d.quit();

    // The next server takes the template that is there.
    let d = Daemon::launch(&options, daemon_dir);
    d.wait_ready(1);
    assert_eq!(d.log_lines("template-reused").len(), 1);
    assert_eq!(d.log_lines("template-making").len(), 0);
    daemon_dir = d.quit();

    // With another configuration it does not fit, and is made anew.
    options.more_qemu = "kernel_params = \"vmcache.other=1\"\n".into();
    let d = Daemon::launch(&options, daemon_dir);
    d.wait_ready(1);
    assert_eq!(d.log_lines("template-making").len(), 1);
    assert!(d.ok(&["run", "--", "cat", "/proc/cmdline"]).contains("vmcache.other=1"));
    // Nobody is about to make it anew.
    d.wait_ready(1);
    assert_eq!(json(d.ok(&["template", "destroy", "--json"]))["destroyed"], true);
    assert!(!dir.0.join("template").exists());
    let out = d.output(&["template", "status"]);
    assert_eq!(out.status.code(), Some(1));
    d.wait_ready(1);
    let left = d.quit();
    wait_for("QEMUs' ends", || crate::daemon::qemus(&left.0).is_empty());
    assert_nothing_left(&left.0);
}
