//! A QEMU that a guest has taken over. The server starts a program of ours in QEMU's place
//! (`taken_over/main.rs`), with all that a QEMU gets and is refused, and that program tries what
//! leads out of its VM.
//!
//! For each way in which QEMU can run (a user of a range, as packages have it; root; an ordinary
//! user's server, whose QEMUs share its user; serving files by 9p), with all that Landlock can do
//! here and held to version 2, as Debian 12 has. With all walls down, each attempt must succeed.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{chown, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};

use serde_json::{json, Value};

use crate::daemon::{for_all_users, qemus, text, Daemon, Dir, Options};
use crate::require_qemu;

/// Attempts that are no use on some kernels, whatever walls there are.
const MAY_LACK: [&str; 6] = ["vsock", "x32", "newer", "userfaultfd", "io-uring", "mounts"];
/// What a user without rights is refused by the kernel itself, so that a server of such a user
/// shows nothing by it, walls or not.
const TAKES_RIGHTS: [&str; 13] = [
    "chmod-device",
    "chown-device",
    "packet",
    "chown",
    "device",
    "unshare",
    "mount",
    "bpf",
    "user-namespace",
    "abstract",
    "read-secret",
    "write-secret",
    "link",
];
/// What is refused, or is not so, whatever walls are down: of each child that is started.
const ALWAYS: [&str; 2] = ["core", "environment"];

/// Who runs the server, and how its QEMUs run.
struct Case {
    name: &'static str,
    server: u32,
    ours: &'static str,
    qemu: &'static str,
    template: bool,
    environment: &'static [(&'static str, &'static str)],
}

const LANDLOCK_2: &[(&str, &str)] = &[("VMCACHE_LANDLOCK_ABI", "2")];
const DOWN: &[(&str, &str)] = &[("VMCACHE_WALLS_DOWN", "all")];

fn case(name: &'static str) -> Case {
    Case { name, server: 0, ours: "", qemu: "", template: true, environment: &[] }
}

/// What lies around on the host, to be had by who gets out.
struct Witnesses {
    dir: PathBuf,
    tcp: TcpListener,
    _abstract: UnixListener,
    _datagram: UnixDatagram,
    shm: i32,
    key: i32,
}

/// A key for each test's shared memory.
static NEXT_KEY: AtomicI32 = AtomicI32::new(1);

impl Witnesses {
    fn new(dir: &Path, uid: u32) -> Witnesses {
        let dir = dir.join("host");
        fs::create_dir(&dir).unwrap();
        for (file, mode) in [("secret", 0o600), ("witness", 0o644)] {
            fs::write(dir.join(file), "a secret\n").unwrap();
            fs::set_permissions(dir.join(file), fs::Permissions::from_mode(mode)).unwrap();
            chown(dir.join(file), Some(uid), None).unwrap();
        }
        chown(&dir, Some(uid), None).unwrap();
        let name = SocketAddr::from_abstract_name(abstract_name(&dir)).unwrap();
        let datagram = UnixDatagram::bind(dir.join("datagram")).unwrap();
        let open = fs::Permissions::from_mode(0o777);
        fs::set_permissions(dir.join("datagram"), open).unwrap();
        let key = std::process::id() as i32 * 64 + NEXT_KEY.fetch_add(1, Ordering::SeqCst);
        // SAFETY: integers only.
        let shm = unsafe { libc::shmget(key, 4096, 0o1666) };
        assert!(shm >= 0, "{}", std::io::Error::last_os_error());
        Witnesses {
            tcp: TcpListener::bind("127.0.0.1:0").unwrap(),
            _abstract: UnixListener::bind_addr(&name).unwrap(),
            _datagram: datagram,
            shm,
            key,
            dir,
        }
    }
}

impl Drop for Witnesses {
    fn drop(&mut self) {
        // SAFETY: integers, and a null pointer that is allowed.
        unsafe { libc::shmctl(self.shm, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

fn abstract_name(dir: &Path) -> String {
    format!("vmcache-witness{}", dir.display())
}

/// A key in a session keyring of this thread's, which a server that it starts inherits.
fn plant_a_key() {
    // SAFETY: C strings and integers.
    unsafe {
        libc::syscall(libc::SYS_keyctl, 1, std::ptr::null::<u8>());
        let (kind, name) = (c"user".as_ptr(), c"vmcache-witness".as_ptr());
        let key = libc::syscall(libc::SYS_add_key, kind, name, b"secret".as_ptr(), 6, -3);
        assert!(key > 0, "{}", std::io::Error::last_os_error());
        // For whoever has the keyring, and for its user: to be read.
        libc::syscall(libc::SYS_keyctl, 5, key, 0x3f3f_0000);
    }
}

/// What the program in QEMU's place does from now on.
fn order(program: &Path, orders: &Value) {
    xattr::set(program, "user.vmcache.orders", orders.to_string().as_bytes()).unwrap();
}

/// A server whose VMs wait, in one of which QEMU is then taken over: what came of its attempts.
fn attempts(case: &Case) -> BTreeMap<String, String> {
    let prepared = crate::daemon::prepared().unwrap();
    let dir = Dir::new();
    // On a disk, whose files have attributes whatever the kernel.
    let programs = Dir::on_disk();
    let path = programs.0.join("qemu");
    let program = for_all_users(Path::new(env!("CARGO_BIN_EXE_taken-over-qemu")));
    // By a process of its own, as in `for_all_users`.
    assert!(Command::new("cp").arg(program).arg(&path).status().unwrap().success());
    let real = json!({"exec": "/usr/bin/qemu-system-x86_64"});
    order(&path, &real);
    let mut options = Options::pool(&prepared, 2);
    options.qemu = path.display().to_string();
    options.more_ours += case.ours;
    options.more_qemu += case.qemu;
    let template = dir.0.join("template");
    if case.template {
        options.more_factory = format!("enable_template = true\ntemplate_path = {template:?}\n");
    }
    if case.server != 0 {
        for (image, name) in [(&mut options.kernel, "kernel"), (&mut options.initrd, "initrd")] {
            let copy = dir.0.join(name);
            fs::copy(&image, &copy).unwrap();
            *image = copy.display().to_string();
        }
        let program = for_all_users(Path::new(env!("CARGO_BIN_EXE_vmcache")));
        options.server = Some((case.server, program));
        chown(&dir.0, Some(case.server), Some(case.server)).unwrap();
    }
    let host = Witnesses::new(&dir.0, case.server);
    plant_a_key();
    let daemon = Daemon::launch_with(&options, dir, case.environment);
    daemon.wait_rest(2);
    let victim = qemus(&daemon.dir.0)[0];
    let maps = fs::read_to_string(format!("/proc/{victim}/maps")).unwrap();
    let address = i64::from_str_radix(maps.split('-').next().unwrap(), 16).unwrap();
    let vms = crate::daemon::directories(&daemon.store());
    let of = |name: &str| vms[0].join(name);
    let at = |name: &str| host.dir.join(name);
    let orders = json!({
        "template": case.template,
        "server": daemon.socket(), "qmp": of("qmp.sock"), "console": of("console.sock"),
        "agent": of(if case.template { "agent.3.sock" } else { "qmp.sock" }),
        "datagram": at("datagram"), "abstract": abstract_name(&host.dir),
        "port": host.tcp.local_addr().unwrap().port(),
        "victim": victim, "address": address, "ledger": of("vm.json"), "store": daemon.store(),
        "own-ledger": of("pid"), "secret": at("secret"), "witness": at("witness"),
        // Of its view's devices, one that nobody misses.
        "host-device": "/dev/urandom", "moved": at("moved"), "new-file": at("new"), "own": daemon.store(),
        "template-memory": template.join("memory"), "template-state": template.join("state"),
        "shm": host.key,
    });
    order(&path, &orders);
    // One of them goes, and what is made in its place is the attacker.
    let id = as_server(&daemon, case.server, &["get"]);
    daemon.wait_log("boot-failed", 1);
    let told = daemon.log_lines("boot-failed").remove(0);
    order(&path, &real);
    let said = told.split("@@").nth(1).unwrap_or_else(|| panic!("{}: {told}", case.name));
    let alive = Path::new(&format!("/proc/{victim}/fd")).read_dir().is_ok_and(|d| d.count() > 0);
    assert!(alive || case.environment == DOWN, "{}: {}", case.name, daemon.log());
    let came = said.split(';').filter_map(|one| one.split_once('='));
    let came: BTreeMap<String, String> =
        came.map(|(name, result)| (name.to_string(), result.to_string())).collect();
    if case.environment == DOWN {
        assert_ne!(came["qmp"], "ENOENT", "{}: its VM is gone{}", case.name, daemon.log());
    } else {
        // What was attacked is as well as ever.
        let said = as_server(&daemon, case.server, &["list"]);
        assert!(said.contains(id.trim()) && qemus(&daemon.dir.0).contains(&victim), "{said}");
    }
    came
}

/// A command by the user whose the server is.
fn as_server(daemon: &Daemon, uid: u32, args: &[&str]) -> String {
    let mut command = daemon.command(args);
    if uid != 0 {
        command = Command::new(for_all_users(Path::new(env!("CARGO_BIN_EXE_vmcache"))));
        command.env_clear().env("VMCACHE_CONFIG", &daemon.config).args(args).uid(uid).gid(uid);
    }
    let out = command.output().unwrap();
    assert!(out.status.success(), "{args:?}: {}{}", text(&out.stderr), daemon.log());
    text(&out.stdout)
}

fn refused(case: &Case) {
    let came = attempts(case);
    assert!(came.len() > 60, "{}: {came:?}", case.name);
    let ok: Vec<_> = came.iter().filter(|(_, result)| *result == "ok").collect();
    assert!(ok.is_empty(), "{}: {ok:?} of {came:?}", case.name);
}

/// All but what this kernel lacks, or what takes rights that a user has not.
fn succeeds(case: &Case, but: &[&str]) {
    let came = attempts(case);
    let lacks = |name: &str| MAY_LACK.contains(&name) || ALWAYS.contains(&name);
    let failed: Vec<_> = came
        .iter()
        .filter(|(name, result)| *result != "ok" && !lacks(name) && !but.contains(&name.as_str()))
        .collect();
    assert!(failed.is_empty(), "{}: {failed:?} of {came:?}", case.name);
}

#[test]
fn as_packages_run_it_a_user_of_a_range() {
    require_qemu!();
    refused(&case("range"));
    refused(&Case { environment: LANDLOCK_2, ..case("range, Landlock 2") });
}

#[test]
fn as_root() {
    require_qemu!();
    let root = Case { ours: "user = \"root\"\n", ..case("root") };
    refused(&root);
    refused(&Case { environment: LANDLOCK_2, name: "root, Landlock 2", ..root });
}

#[test]
fn as_the_user_of_an_ordinary_users_server() {
    require_qemu!();
    let own = Case { server: 232_100, ..case("ordinary") };
    refused(&own);
    refused(&Case { environment: LANDLOCK_2, name: "ordinary, Landlock 2", ..own });
}

#[test]
fn as_root_that_serves_files_by_9p() {
    require_qemu!();
    let qemu = "shared_fs = \"virtio-9p\"\n";
    let serves = Case { template: false, ours: "agent = \"noop\"\n", qemu, ..case("9p") };
    refused(&serves);
    refused(&Case { environment: LANDLOCK_2, name: "9p, Landlock 2", ..serves });
}

#[test]
fn without_walls_all_of_it_succeeds() {
    require_qemu!();
    let root =
        Case { ours: "confine = false\nuser = \"root\"\n", environment: DOWN, ..case("no walls") };
    // Of raw packets, the server itself has no right.
    succeeds(&root, &["packet"]);
    let own = Case { server: 232_101, environment: DOWN, ..case("ordinary, no walls") };
    succeeds(&own, &TAKES_RIGHTS);
}
