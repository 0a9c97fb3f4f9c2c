//! What QEMU may do, and who may have a VM: each is tried, and refused by the real thing.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{json, Value};

use crate::daemon::{assert_nothing_left, qemus, text, vmcache, wait_for, Daemon, Dir, Options};
use crate::require_qemu;

/// Users that VMs get in these tests.
const USERS: std::ops::RangeInclusive<u32> = 231_000..=231_063;
/// A user who has nothing to do with it.
const NOBODY: u32 = 65_534;

/// A pool whose QEMUs are other users', with images that those can read.
pub fn pool(prepared: &Path, n: usize) -> (Options, Dir) {
    let dir = Dir::new();
    let mut options = Options::pool(prepared, n);
    for (image, name) in [(&mut options.kernel, "kernel"), (&mut options.initrd, "initrd")] {
        let copy = dir.0.join(name);
        fs::copy(&image, &copy).unwrap();
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).unwrap();
        *image = copy.display().to_string();
    }
    options.more_ours += &format!("user = \"{}-{}\"\n", USERS.start(), USERS.end());
    (options, dir)
}

/// QEMU's monitor, as whoever has the VM can use it.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn of(dir: &Path) -> Monitor {
        let stream = UnixStream::connect(dir.join("qmp.sock")).unwrap();
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        let mut monitor = Monitor(BufReader::new(stream));
        monitor.line().unwrap();
        monitor.execute("qmp_capabilities", json!({})).unwrap().unwrap();
        monitor
    }

    fn line(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.0.read_line(&mut line).ok().filter(|n| *n > 0)?;
        serde_json::from_str(&line).ok()
    }

    /// What came of it; `None` when QEMU has ended over it.
    fn execute(&mut self, command: &str, arguments: Value) -> Option<Result<Value, String>> {
        let line = json!({"execute": command, "arguments": arguments}).to_string();
        self.0.get_mut().write_all(line.as_bytes()).ok()?;
        loop {
            let answer = self.line()?;
            if let Some(why) = answer["error"]["desc"].as_str() {
                return Some(Err(why.to_string()));
            }
            if answer.get("return").is_some() {
                return Some(Ok(answer["return"].clone()));
            }
        }
    }

    fn open(&mut self, path: &Path) -> Result<Value, String> {
        let node = format!("n{}", path.display().to_string().len());
        let file =
            json!({"driver": "file", "node-name": node, "filename": path, "read-only": true});
        self.execute("blockdev-add", file).unwrap()
    }
}

fn status_of(pid: i64, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|l| l.starts_with(&format!("{key}:"))).unwrap();
    line.split_once(':').unwrap().1.trim().to_string()
}

fn get(daemon: &Daemon) -> (PathBuf, i64) {
    let vm: Value = serde_json::from_str(&daemon.ok(&["get", "--json"])).unwrap();
    (daemon.store().join(vm["id"].as_str().unwrap()), vm["pid"].as_i64().unwrap())
}

/// Whoever has taken QEMU over has its monitor, too: what it opens then.
fn what_qemu_can_not_do(daemon: &Daemon) {
    let ((one, pid), (other, _)) = (get(daemon), get(daemon));
    assert_eq!(status_of(pid, "NoNewPrivs"), "1");
    assert_eq!(status_of(pid, "Seccomp"), "2");
    // No more than locking memory.
    let capabilities = u64::from_str_radix(&status_of(pid, "CapBnd"), 16).unwrap();
    assert_eq!(capabilities & !(1 << 14), 0, "{capabilities:x}");
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert_eq!(text(&environment), "");

    // The server itself: no modules, no raw devices, no clock, no reboot.
    let servers = u64::from_str_radix(&status_of(daemon.pid().into(), "CapBnd"), 16).unwrap();
    for gone in [16, 17, 22, 25, 13, 39] {
        assert_eq!(servers & (1 << gone), 0, "{servers:x}");
    }

    let mut monitor = Monitor::of(&one);
    for path in [
        other.join("vm.json"),
        other.join("pid"),
        one.join("vm.json"),
        "/etc/passwd".into(),
        "/proc/1/environ".into(),
        daemon.config.clone(),
    ] {
        let why = monitor.open(&path).unwrap_err();
        assert!(why.contains("Permission denied"), "{}: {why}", path.display());
    }
    // Not because it could open nothing at all.
    monitor.open(Path::new("/usr/bin/qemu-system-x86_64")).unwrap();

    let mark = daemon.dir.0.join("a shell was here");
    let exec = format!("exec:touch '{}'", mark.display());
    let done = monitor.execute("migrate", json!({"uri": exec}));
    // Refused, or dead for having tried.
    assert!(!matches!(done, Some(Ok(_))) || monitor.execute("query-migrate", json!({})).is_none());
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(!mark.exists());
    for dir in [&one, &other] {
        let id = dir.file_name().unwrap().to_str().unwrap();
        let _ = daemon.output(&["stop", id]);
    }
}

#[test]
fn a_qemu_that_was_taken_over_opens_no_other_vms_files_and_starts_no_shell() {
    let prepared = require_qemu!();
    let daemon = Daemon::start(&Options::pool(&prepared, 2));
    what_qemu_can_not_do(&daemon);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn vms_of_users_of_their_own_work_and_know_nothing_of_each_other() {
    let prepared = require_qemu!();
    let (options, dir) = pool(&prepared, 2);
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(2);
    let users: Vec<u32> = qemus(&daemon.dir.0)
        .iter()
        .map(|pid| fs::metadata(format!("/proc/{pid}")).unwrap().uid())
        .collect();
    assert!(users.iter().all(|uid| USERS.contains(uid)), "{users:?}");
    assert_ne!(users[0], users[1]);
    let groups = status_of(i64::from(qemus(&daemon.dir.0)[0]), "Groups");
    assert_eq!(groups, "");
    assert_eq!(daemon.ok(&["run", "--", "echo", "as ever"]), "as ever\n");
    assert_eq!(daemon.ok(&["run", "--memory", "512", "--", "echo", "larger"]), "larger\n");
    daemon.wait_ready(2);
    what_qemu_can_not_do(&daemon);
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn clones_of_other_users_share_a_template_that_none_of_them_can_change() {
    let prepared = require_qemu!();
    let (mut options, dir) = pool(&prepared, 2);
    let template = dir.0.join("template");
    options.more_factory = format!("enable_template = true\ntemplate_path = {template:?}\n");
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(2);
    for pid in qemus(&daemon.dir.0) {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let memory: Vec<_> =
            maps.lines().filter(|l| l.contains("/memfd:vmcache-template")).collect();
        assert!(!memory.is_empty());
        // Private: what one writes none else sees.
        assert!(memory.iter().all(|l| l.split(' ').nth(1) == Some("rw-p")), "{memory:?}");
        assert!(!maps.contains("template/memory"));
    }
    assert_eq!(daemon.ok(&["run", "--", "echo", "a clone"]), "a clone\n");
    what_qemu_can_not_do(&daemon);
    let memory = fs::metadata(template.join("memory")).unwrap();
    assert_eq!((memory.uid(), memory.mode() & 0o777), (0, 0o600));
    let dir = daemon.quit();
    assert!(template.join("memory").exists());

    // Somebody has written into what all clones would be made of.
    let file = fs::OpenOptions::new().read(true).write(true).open(template.join("memory")).unwrap();
    let mut byte = [0];
    let somewhere = 64 << 20;
    file.read_exact_at(&mut byte, somewhere).unwrap();
    file.write_all_at(&[!byte[0]], somewhere).unwrap();
    drop(file);
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(2);
    let told = daemon.log_lines("template-missing");
    assert!(told[0].contains("its files are not what its manifest says"), "{told:?}");
    daemon.wait_log("template-ready", 1);
    assert_eq!(daemon.ok(&["run", "--", "echo", "a new one"]), "a new one\n");
    assert_nothing_left(&daemon.quit().0);
}

#[test]
fn what_was_asked_for_and_can_not_be_had_is_no_start() {
    let prepared = require_qemu!();
    for (line, words) in [
        ("kernel_sha256 = \"00\"".to_string(), "must be 64 hexadecimal digits"),
        (format!("kernel_sha256 = \"{}\"", "0".repeat(64)), "its SHA-256 is "),
        ("user = \"daemon\"".into(), "one user for all VMs would own them all"),
        ("user = \"5-\"".into(), "must be a range of numbers"),
        ("selinux_label = \"a:b:c:s0\"".into(), "this host has no SELinux"),
        ("apparmor_profile = \"vmcache-qemu\"".into(), "this host has no AppArmor"),
        ("user = \"root\"\nclaim_users = [\"daemon\"]".into(), "where QEMU is root"),
        ("user = \"231000-231009\"\nclaim_groups = [\"no such\"]".into(), "this host has no group"),
        (
            "user = \"231000-231009\"\nclaim_users = [\"231005\"]".into(),
            "uid 231005 is one that VMs' QEMUs run as",
        ),
        ("cgroup = \"../x\"".into(), "must be a path below"),
    ] {
        let dir = Dir::new();
        let mut options = Options::pool(&prepared, 1);
        options.more_ours += &line;
        let config = dir.0.join("c.toml");
        fs::write(&config, options.text(&dir.0)).unwrap();
        let out = vmcache(&config).args(["serve", "--log", "stderr"]).output().unwrap();
        let err = text(&out.stderr);
        assert!(out.status.code().is_some_and(|c| c == 2 || c == 5), "{line}: {err}");
        assert!(err.contains(words) && err.contains("c.toml:"), "{line}: {err}");
    }
}

#[test]
fn each_vm_has_a_cgroup_with_limits_that_goes_with_it() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let mut options = Options::pool(&prepared, 1);
    let name = dir.0.file_name().unwrap().to_str().unwrap().to_string();
    options.more_ours += &format!("cgroup = {name:?}\n");
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(1);
    let (vm, pid) = get(&daemon);
    let id = vm.file_name().unwrap().to_str().unwrap();
    let groups: Vec<PathBuf> =
        fs::read_to_string(vm.join("cgroups")).unwrap().lines().map(PathBuf::from).collect();
    assert!(!groups.is_empty());
    let joined = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(joined.contains(&format!("/{name}/vm-{id}")), "{joined}");
    let limit = |files: [&str; 2]| -> u64 {
        let found = groups.iter().flat_map(|g| files.map(|f| g.join(f))).find(|p| p.exists());
        let text = fs::read_to_string(found.unwrap()).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    };
    let memory = ["memory.max", "memory.limit_in_bytes"];
    let before = limit(memory);
    assert!((256 << 20..4 << 30).contains(&before), "{before}");
    assert!((5..1000).contains(&limit(["pids.max", "pids.max"])));
    assert_eq!(limit(["cpu.max", "cpu.cfs_quota_us"]), 500_000);
    assert_eq!(daemon.ok(&["run", "--memory", "512", "--", "echo", "larger"]), "larger\n");
    daemon.ok(&["stop", id]);
    assert!(groups.iter().all(|g| !g.exists()));
    assert_nothing_left(&daemon.quit().0);
    no_cgroups(&name);
}

/// Our program, where everybody may execute it.
pub fn command_as(daemon: &Daemon, uid: u32, args: &[&str]) -> Command {
    let program = daemon.dir.0.join("vmcache");
    if !program.exists() {
        // By a process of its own: a child of another test's, which inherits a file that is
        // being written, keeps it from being executed.
        let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_vmcache")).arg(&program).status();
        assert!(copied.unwrap().success());
    }
    let mut command = Command::new(program);
    command.env_clear().env("VMCACHE_CONFIG", &daemon.config).uid(uid).gid(uid);
    command.args(args);
    command
}

fn as_user(daemon: &Daemon, uid: u32, args: &[&str]) -> Output {
    command_as(daemon, uid, args).output().unwrap()
}

#[test]
fn processes_of_other_users_are_refused_or_have_a_vm_that_is_theirs() {
    let prepared = require_qemu!();
    // As it is by default: root's.
    let daemon = Daemon::start(&Options::pool(&prepared, 1));
    let out = as_user(&daemon, NOBODY, &["status"]);
    assert!(!out.status.success() && text(&out.stderr).contains("Permission denied"), "{out:?}");
    drop(daemon.quit());

    let (mut options, dir) = pool(&prepared, 1);
    options.more_ours += "socket_mode = \"0666\"\nclaim_users = [\"232000\"]\n";
    let group = dir.0.file_name().unwrap().to_str().unwrap().to_string();
    options.more_ours += &format!("cgroup = {group:?}\n");
    let daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(1);
    let refused = |uid: u32, args: &[&str], words: &str| {
        let out = as_user(&daemon, uid, args);
        let err = text(&out.stderr);
        assert!(!out.status.success() && err.contains(words), "{args:?} {:?}: {err}", out.status);
    };
    assert!(as_user(&daemon, NOBODY, &["status"]).status.success(), "may look");
    refused(NOBODY, &["get"], "uid 65534 may not claim VMs");
    refused(NOBODY, &["run", "--", "true"], "uid 65534 may not claim VMs");
    daemon.wait_log("claim-refused: pid", 2);
    for call in [&["quit"][..], &["drain"], &["resize", "9"], &["restart"]] {
        refused(NOBODY, call, "for root and the server's own user");
        refused(232_000, call, "for root and the server's own user");
    }
    let out = as_user(&daemon, 232_000, &["run", "--", "echo", "mine"]);
    assert_eq!(text(&out.stdout), "mine\n", "{}{}", text(&out.stderr), daemon.log());
    daemon.wait_ready(1);
    // Larger, with a limit of memory that only the server can raise.
    let out = as_user(&daemon, 232_000, &["run", "--memory", "3000", "--", "echo", "large"]);
    assert_eq!(text(&out.stdout), "large\n", "{}{}", text(&out.stderr), daemon.log());
    daemon.wait_ready(1);

    let out = as_user(&daemon, 232_000, &["get"]);
    let id = text(&out.stdout).trim().to_string();
    assert!(out.status.success(), "{}", text(&out.stderr));
    daemon.wait_log(&format!("vm-claimed: VM {id}"), 1);
    let line = daemon.log_lines(&format!("vm-claimed: VM {id}")).remove(0);
    assert!(line.contains("of uid 232000"), "{line}");
    let out = as_user(&daemon, 232_000, &["exec", &id, "--", "echo", "still mine"]);
    assert_eq!(text(&out.stdout), "still mine\n", "{}", text(&out.stderr));
    let out = as_user(&daemon, NOBODY, &["exec", &id, "--", "true"]);
    assert!(!out.status.success(), "another's");
    let out = as_user(&daemon, 232_000, &["stop", &id]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    wait_for("its end", || !daemon.store().join(&id).exists());
    assert_nothing_left(&daemon.quit().0);
    no_cgroups(&group);
}

/// The empty cgroup in which VMs had theirs goes, and it is empty.
fn no_cgroups(name: &str) {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let base = hierarchy.path().join(name);
        let _ = fs::remove_dir(&base);
        assert!(!base.exists(), "a VM's cgroup is left in {}", base.display());
    }
}

#[test]
fn a_claimer_changes_nothing_in_its_vms_directory() {
    let prepared = require_qemu!();
    let (mut options, dir) = pool(&prepared, 1);
    options.more_ours += "socket_mode = \"0666\"\nclaim_users = [\"232001\"]\n";
    let mut daemon = Daemon::launch(&options, dir);
    daemon.wait_ready(1);
    let out = as_user(&daemon, 232_001, &["get"]);
    let id = text(&out.stdout).trim().to_string();
    let vm = daemon.store().join(&id);
    wait_for("the ledger to say so", || {
        fs::read_to_string(vm.join("vm.json")).is_ok_and(|t| t.contains("\"handed\""))
    });
    // A process of root's, named as one that serves the VM; a ledger of before, or a link.
    let mut bystander = Command::new("sleep").arg("600").spawn().unwrap();
    let serves = format!("[{{\"role\":\"proxy\",\"pid\":{},\"start_time\":0}}]", bystander.id());
    for attempt in [
        format!("echo '{serves}' >served"),
        "mv vm.json kept".into(),
        "rm -f claim && test ! -e claim".into(),
        "rm -f cgroups vm.json; test ! -e vm.json".into(),
        format!("ln -s {} vm.json.new", daemon.config.display()),
        "chgrp 232001 .".into(),
        "mkdir deep".into(),
        "chmod 777 .".into(),
    ] {
        let script = format!("cd {} && {attempt}", vm.display());
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &script]).uid(232_001).gid(232_001).stderr(std::process::Stdio::null());
        assert!(!shell.status().unwrap().success(), "{attempt}");
    }
    let config = fs::read(&daemon.config).unwrap();
    // Found by the next server, and ended.
    daemon.signal(nix::sys::signal::Signal::SIGKILL);
    daemon.wait();
    let daemon = Daemon::launch(&options, daemon.forsake());
    daemon.wait_ready(1);
    daemon.ok(&["stop", &id]);
    wait_for("its end", || !vm.exists());
    assert!(bystander.try_wait().unwrap().is_none(), "it lives");
    assert_eq!(fs::read(&daemon.config).unwrap(), config);
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert_nothing_left(&daemon.quit().0);
}
