//! A user who may claim, and has a VM of its own: by its QEMU's monitor, by its own processes and
//! by the server's calls it goes for VMs that wait, and for those of others.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Duration;

use serde_json::{json, Value};
use vmcache::factory::grpccache::GrpcCache;
use vmcache::sys::process::start_time;
use vmcache::vm::notes;

use crate::daemon::{directories, for_all_users, qemus, text, Daemon, Dir, Options, LONG};
use crate::require_qemu;

/// Who attacks, and another who may claim.
const EVE: u32 = 232_200;
const BOB: u32 = 232_201;

fn options(prepared: &Path, more: &str) -> Options {
    let mut options = Options::pool(prepared, 3);
    options.more_ours += &format!(
        "socket_mode = \"0666\"\nclaim_users = [\"{EVE}\", \"{BOB}\"]\n\
         user_unconfirmed_per_minute = 2\n{more}"
    );
    options
}

fn as_user(daemon: &Daemon, uid: u32, args: &[&str]) -> Output {
    let mut command = Command::new(for_all_users(Path::new(env!("CARGO_BIN_EXE_vmcache"))));
    command.env_clear().env("VMCACHE_CONFIG", &daemon.config).args(args).uid(uid).gid(uid);
    command.output().unwrap()
}

fn get(daemon: &Daemon, uid: u32) -> String {
    let out = as_user(daemon, uid, &["get"]);
    assert!(out.status.success(), "{}{}", text(&out.stderr), daemon.log());
    text(&out.stdout).trim().to_string()
}

/// QEMU's monitor, as whoever has the VM can use it.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn of(dir: &Path) -> Option<Monitor> {
        let stream = UnixStream::connect(dir.join("qmp.sock")).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut monitor = Monitor(BufReader::new(stream));
        monitor.line()?;
        monitor.execute("qmp_capabilities", &json!({})).ok()?;
        Some(monitor)
    }

    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line).ok().filter(|n| *n > 0)?;
        serde_json::from_str(&line).ok()
    }

    /// What came of it; that QEMU has ended over it is refusal enough.
    fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        let gone = || "QEMU has ended".to_string();
        self.0.get_mut().write_all(line.as_bytes()).map_err(|_| gone())?;
        loop {
            let answer = self.line().ok_or_else(gone)?;
            if let Some(why) = answer["error"]["desc"].as_str() {
                return Err(why.to_string());
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].clone());
            }
        }
    }
}

/// What lies on the host.
struct Host {
    dir: PathBuf,
    port: u16,
    _listener: TcpListener,
}

impl Host {
    fn new(daemon: &Daemon) -> Host {
        let dir = daemon.dir.0.join("host");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("secret"), vec![b's'; 4096]).unwrap();
        fs::set_permissions(dir.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Host { dir, port: listener.local_addr().unwrap().port(), _listener: listener }
    }
}

/// Commands to a QEMU that would lead out of its VM.
fn orders(host: &Host, victim: &Path, template: &Path) -> Vec<(&'static str, &'static str, Value)> {
    let socket = |path: &Path| {
        json!({"type": "socket", "data": {"server": false,
               "addr": {"type": "unix", "data": {"path": path}}}})
    };
    let inet = json!({"type": "socket", "data": {"server": false,
        "addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": host.port.to_string()}}}});
    let file = |path: &Path| json!({"type": "file", "data": {"out": path, "append": true}});
    let node = |name: &str, path: &Path, read_only: bool| json!({"driver": "file", "node-name": name, "filename": path, "read-only": read_only});
    let secret = host.dir.join("secret");
    let backend = |id: &str, path: &Path| {
        json!({"qom-type": "memory-backend-file", "id": id, "size": 4096, "mem-path": path,
               "share": true})
    };
    let chardev = |id: &str, backend: Value| json!({"id": id, "backend": backend});
    let unix = |path: &Path| json!({"uri": format!("unix:{}", path.display())});
    vec![
        ("another's agent", "chardev-add", chardev("c1", socket(&victim.join("agent.3.sock")))),
        ("another's monitor", "chardev-add", chardev("c2", socket(&victim.join("qmp.sock")))),
        ("another's console", "chardev-add", chardev("c3", socket(&victim.join("console.sock")))),
        ("the server", "chardev-add", chardev("c4", socket(&host.dir.join("../s")))),
        ("tcp", "chardev-add", chardev("c5", inet)),
        ("a file's end", "chardev-add", chardev("c6", file(&secret))),
        ("another's ledger", "blockdev-add", node("n1", &victim.join("vm.json"), true)),
        ("a secret", "blockdev-add", node("n2", &secret, true)),
        ("a secret, to write", "blockdev-add", node("n3", &secret, false)),
        ("a template", "blockdev-add", node("n4", &template.join("memory"), false)),
        ("a secret as memory", "object-add", backend("m1", &secret)),
        ("a template as memory", "object-add", backend("m2", &template.join("memory"))),
        (
            "a secret's words",
            "object-add",
            json!({"qom-type": "secret", "id": "s1", "file": secret}),
        ),
        (
            "the host's network",
            "netdev_add",
            json!({"type": "socket", "id": "t1", "connect": format!("127.0.0.1:{}", host.port)}),
        ),
        ("to listen", "netdev_add", json!({"type": "socket", "id": "t2", "listen": "127.0.0.1:0"})),
        (
            "a memory's copy",
            "dump-guest-memory",
            json!({"paging": false, "protocol": format!("file:{}", host.dir.join("dump").display())}),
        ),
        (
            "to be debugged",
            "human-monitor-command",
            json!({"command-line": "gdbserver tcp:127.0.0.1:0"}),
        ),
        (
            "a picture of memory",
            "pmemsave",
            json!({"val": 0, "size": 4096, "filename": host.dir.join("pmem")}),
        ),
        ("to move away", "migrate", unix(&victim.join("qmp.sock"))),
    ]
}

/// What came of each.
fn ordered(daemon: &Daemon, own: &str, host: &Host, victim: &Path) -> Vec<(&'static str, bool)> {
    let dir = daemon.store().join(own);
    let template = daemon.dir.0.join("template");
    let mut came = Vec::new();
    for (name, command, arguments) in orders(host, victim, &template) {
        // One that has ended over an attempt tries no more.
        let Some(mut monitor) = Monitor::of(&dir) else { break };
        let done = monitor.execute(command, &arguments);
        let failed = match (command, &done) {
            // What it prints is its error.
            ("human-monitor-command", Ok(said)) => {
                !said.as_str().is_some_and(|s| s.contains("Waiting for gdb connection"))
            }
            // It fails later.
            ("migrate", Ok(_)) => {
                let mut status = || {
                    std::thread::sleep(Duration::from_millis(50));
                    monitor.execute("query-migrate", &json!({})).ok()
                };
                let told = (0..20).find_map(|_| status().filter(|s| s["status"] != "setup"));
                told.is_none_or(|s| s["status"] == "failed")
            }
            (_, done) => done.is_err(),
        };
        came.push((name, !failed));
    }
    came
}

/// A VM that waits: nobody's, and the next claimer's.
fn waiting(daemon: &Daemon) -> PathBuf {
    let all = daemon.status()["vms"].clone();
    let ready = all.as_array().unwrap().iter().find(|vm| vm["state"] == "ready").unwrap().clone();
    daemon.store().join(ready["id"].as_str().unwrap())
}

fn cloning(prepared: &Path, dir: &Dir, more: &str) -> Options {
    let mut options = options(prepared, more);
    let template = dir.0.join("template");
    options.more_factory = format!("enable_template = true\ntemplate_path = {template:?}\n");
    options
}

#[test]
fn by_its_own_qemu_a_claimer_reaches_nothing() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let options = cloning(&prepared, &dir, "");
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(3);
    let host = Host::new(&daemon);
    let bobs = daemon.store().join(get(&daemon, BOB));
    daemon.wait_ready(3);
    for victim in [waiting(&daemon), bobs] {
        let own = get(&daemon, EVE);
        let came = ordered(&daemon, &own, &host, &victim);
        assert!(came.len() > 15, "{came:?}{}", daemon.log());
        let done: Vec<_> = came.iter().filter(|(_, done)| *done).collect();
        assert!(done.is_empty(), "{done:?}");
        // Whoever claims that VM next, or has it, has it as it was.
        assert!(victim.join("vm.json").exists());
    }
    assert_eq!(fs::read(host.dir.join("secret")).unwrap(), vec![b's'; 4096]);
    let made: Vec<_> = directories(&host.dir);
    assert_eq!(made, [host.dir.join("secret")], "nothing else was made");
    let out = as_user(&daemon, BOB, &["run", "--", "echo", "clean"]);
    assert_eq!(text(&out.stdout), "clean\n", "{}", text(&out.stderr));
}

#[test]
fn without_walls_its_qemu_reaches_all_of_it() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let options = cloning(&prepared, &dir, "confine = false\nsandbox = false\n");
    let daemon = Daemon::launch_with(&options, dir, &[("VMCACHE_WALLS_DOWN", "all")]);
    daemon.wait_ready(3);
    let host = Host::new(&daemon);
    let own = get(&daemon, EVE);
    let came = ordered(&daemon, &own, &host, &waiting(&daemon));
    // QEMU's monitor serves one at a time, and is the server's while its VM waits.
    let failed: Vec<_> = came.iter().filter(|(_, done)| !done).collect();
    assert!(came.len() > 15 && failed.is_empty(), "{failed:?} of {came:?}");
}

/// What a process of the claimer's does, and what it asks the server for.
#[test]
fn by_its_own_processes_and_calls_a_claimer_reaches_nothing() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let options =
        options(&prepared, "user_max_vms = 2\nagent = \"noop\"\nuser_max_memory = 1000\n");
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(3);
    let (bobs, eves) = (get(&daemon, BOB), get(&daemon, EVE));
    daemon.wait_ready(3);
    let victims = [daemon.store().join(&bobs), waiting(&daemon)];
    for victim in &victims {
        let v = victim.display();
        for attempt in [
            format!("cd {v}"),
            format!("cat {v}/vm.json"),
            format!("cat {v}/agent.0.lock"),
            format!("ls {}", daemon.store().display()),
            format!("echo x >{}/../x", daemon.store().join(&eves).display()),
            format!("echo x >{}/x", daemon.store().join(&eves).display()),
            format!("echo x >{}/workload.json", daemon.store().join(&eves).display()),
            format!("chmod 777 {}", daemon.store().join(&eves).display()),
        ] {
            let mut shell = Command::new("/bin/sh");
            shell.args(["-c", &attempt]).uid(EVE).gid(EVE).stderr(std::process::Stdio::null());
            let out = shell.output().unwrap();
            assert!(!out.status.success(), "{attempt}: {}", text(&out.stdout));
        }
    }
    // Its own it may look at, and talk to.
    let own = daemon.store().join(&eves);
    let mut shell = Command::new("/bin/sh");
    let script = format!("cat {}/vm.json && test -w {}/qmp.sock", own.display(), own.display());
    assert!(shell.args(["-c", &script]).uid(EVE).gid(EVE).output().unwrap().status.success());
    for pid in qemus(&daemon.dir.0) {
        let mut shell = Command::new("/bin/sh");
        let script =
            format!("kill -0 {pid} || cat /proc/{pid}/environ /proc/{pid}/maps >/dev/null");
        shell.args(["-c", &script]).uid(EVE).gid(EVE).stderr(std::process::Stdio::null());
        assert!(!shell.status().unwrap().success(), "{pid}");
    }
    for command in [&["stop", &bobs][..], &["exec", &bobs, "--", "true"], &["pause", &bobs]] {
        let out = as_user(&daemon, EVE, command);
        assert!(!out.status.success(), "{command:?}: {}", text(&out.stdout));
    }
    assert!(daemon.ok(&["list"]).contains(&bobs));
    let mut noted = notes(&daemon, &eves);
    quotas(&daemon, &eves);
    // With its VM, what it has named has ended, and nothing else.
    assert_eq!(noted.wait().unwrap().signal(), Some(9));
}

/// Has the server note something of its VM, by its own call.
fn note(daemon: &Daemon, id: &str, kind: notes::Kind, text: &str) -> Result<(), String> {
    let (dir, endpoint) = (daemon.store().join(id), daemon.socket().display().to_string());
    let text = text.to_string();
    let told = std::thread::spawn(move || {
        // SAFETY: integers only; of this thread alone, which ends with it.
        unsafe { libc::syscall(libc::SYS_setresuid, EVE, EVE, EVE) };
        notes::write(&dir, &endpoint, kind, text.as_bytes())
    });
    told.join().unwrap().map_err(|e| e.to_string())
}

/// What it has noted of processes that serve its VM, which end with it: it names what is its
/// own, and runs.
fn notes(daemon: &Daemon, eves: &str) -> Child {
    let noted = |all: Vec<(i32, u64)>| {
        let record =
            |(pid, start_time)| json!({"role": "network", "pid": pid, "start_time": start_time});
        let text = Value::from(all.into_iter().map(record).collect::<Vec<_>>()).to_string();
        note(daemon, eves, notes::Kind::Served, &text)
    };
    let mut sleep = Command::new("/bin/sleep");
    let own = sleep.arg("1000").uid(EVE).gid(EVE).spawn().unwrap();
    let (pid, now) = (own.id() as i32, start_time(own.id() as i32).unwrap());
    noted(vec![(pid, now)]).unwrap();
    // Root's, its own by another name, and who will have a number that nobody has now.
    let free = (300..32_000).rev().find(|pid| start_time(*pid).is_none()).unwrap();
    for other in [(1, start_time(1).unwrap()), (pid, now + 1), (free, now), (free, now + 100)] {
        let told = noted(vec![(pid, now), other]).unwrap_err();
        assert!(told.contains(&format!("process {} has ended, or is not uid", other.0)), "{told}");
    }
    own
}

/// Two VMs, of 1000 MiB together, and two claims in a minute that come to nothing.
fn quotas(daemon: &Daemon, eves: &str) {
    let out = as_user(daemon, EVE, &["get", "--memory", "800"]);
    assert!(text(&out.stderr).contains("user_max_memory allows 1000 MiB"), "{out:?}");
    let more = get(daemon, EVE);
    let out = as_user(daemon, EVE, &["get"]);
    let why = format!("uid {EVE} has 2 VMs (claims that wait included), and user_max_vms allows 2");
    assert!(text(&out.stderr).contains(&why), "{out:?}");
    // Root has what it likes, and others have theirs.
    (0..3).for_each(|_| drop(daemon.ok(&["get"])));
    daemon.wait_ready(3);
    let bobs = get(daemon, BOB);
    assert!(as_user(daemon, BOB, &["stop", &bobs]).status.success());
    for id in [&more, eves] {
        assert!(as_user(daemon, EVE, &["stop", id]).status.success());
        daemon.wait_log(&format!("vm-ended: VM {id}"), 1);
    }
    daemon.wait_ready(3);
    // Claimed and not confirmed: each costs a VM.
    let endpoint = daemon.socket();
    let claims = std::thread::spawn(move || {
        // SAFETY: integers only; of this thread alone, which ends with it.
        unsafe { libc::syscall(libc::SYS_setresuid, EVE, EVE, EVE) };
        let server = GrpcCache::connect(&endpoint).unwrap();
        (0..2).for_each(|_| drop(server.claim(Some(LONG)).unwrap()));
    });
    claims.join().unwrap();
    daemon.wait_log("was not confirmed within", 2);
    daemon.wait_ready(3);
    let out = as_user(daemon, EVE, &["get"]);
    let why = format!("uid {EVE} left 2 claims unconfirmed within a minute");
    assert!(text(&out.stderr).contains(&why), "{out:?}");
    daemon.wait_log("claim-refused: pid", 3);
    get(daemon, BOB);
}

/// What it may grow to counts, in the guest's pieces; over a restart, and whatever its owner says
/// of its size.
#[test]
fn a_claimer_has_no_more_memory_by_growing_a_vm_or_by_a_restart() {
    let prepared = require_qemu!();
    let daemon = Daemon::launch(&options(&prepared, "user_max_memory = 1000\n"), Dir::new());
    daemon.wait_ready(3);
    let out = as_user(&daemon, EVE, &["get", "--memory", "400"]);
    assert!(out.status.success(), "{out:?}");
    let grown = text(&out.stdout).trim().to_string();
    note(&daemon, &grown, notes::Kind::Size, "1 1").unwrap();
    daemon.ok(&["restart"]);
    daemon.wait_log("server-started", 2);
    // 512 of 1000 are its already.
    let out = as_user(&daemon, EVE, &["get", "--memory", "500"]);
    assert!(text(&out.stderr).contains("user_max_memory allows 1000 MiB"), "{out:?}");
    assert!(as_user(&daemon, EVE, &["stop", &grown]).status.success());
    daemon.wait_log(&format!("vm-ended: VM {grown}"), 1);
}

/// Without them, a user has all of the pool.
#[test]
fn without_quotas_a_user_has_as_many_as_there_are() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let options = options(&prepared, "user_max_vms = 1\nagent = \"noop\"\n");
    let daemon = Daemon::launch_with(&options, dir, &[("VMCACHE_WALLS_DOWN", "quotas")]);
    daemon.wait_ready(3);
    for _ in 0..3 {
        get(&daemon, EVE);
    }
}
