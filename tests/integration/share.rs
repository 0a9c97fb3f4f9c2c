//! Directories of the host in guests: virtio-fs, with Debian's virtiofsd.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use vmcache::factory::grpccache::GrpcCache;
use vmcache::vm::wire::from_wire;

use crate::daemon::{assert_nothing_left, mounts, text, wait_for, Daemon, Options, LONG};
use crate::require_qemu;
use crate::templates::{cloning, in_memory};

/// In Debian 12's qemu-system-common.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

fn options(prepared: &Path, pool: usize) -> Options {
    assert!(Path::new(VIRTIOFSD).exists(), "no {VIRTIOFSD}: use tests/run");
    let mut options = Options::pool(prepared, pool);
    options.more_qemu = format!("shared_fs = \"virtio-fs\"\nvirtio_fs_daemon = {VIRTIOFSD:?}\n");
    options
}

fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
}

/// VMs with Debian's generic kernel, which has 9p, and a directory that QEMU serves.
fn options_9p(prepared: &Path) -> Options {
    let mut options = Options::pool(prepared, 1);
    options.kernel = prepared.join("generic/boot/kernel").display().to_string();
    options.initrd = prepared.join("generic/initramfs.img").display().to_string();
    assert!(Path::new(&options.initrd).exists(), "no {}: use tests/run", options.initrd);
    options.more_qemu = "shared_fs = \"virtio-9p\"\n".into();
    options.memory = 384;
    options
}

/// Processes of a program whose command lines name a directory.
fn serving(dir: &Path) -> Vec<i32> {
    let mut out = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = text(&line);
        if line.starts_with(VIRTIOFSD) && line.contains(&dir.display().to_string()) {
            out.push(pid);
        }
    }
    out
}

#[test]
fn a_root_is_seen_and_not_copied_and_stays_as_it_is() {
    let prepared = require_qemu!();
    let mut options = options(&prepared, 1);
    options.memory = 512;
    let d = Daemon::start(&options);
    a_root_is_as_it_is(&d, &prepared.join("debian"));
    let dir = d.quit();
    let gone = || serving(&dir.0).is_empty() && serving(&prepared.join("debian")).is_empty();
    wait_for("the end of virtiofsd", gone);
    assert_nothing_left(&dir.0);
}

/// Runs a command in this root, which is there whole, and unchanged after.
fn a_root_is_as_it_is(d: &Daemon, root: &Path) {
    let before = fs::metadata(root.join("etc")).unwrap().mtime();
    let script = "grep -c ^Package: /var/lib/dpkg/status; perl -e 'print 6*7, qq(\\n)'; \
                  echo new > /etc/new && cat /etc/new; rm /etc/passwd && echo removed; \
                  grep -c '^overlay / ' /proc/mounts";
    let root_text = root.to_str().unwrap();
    let out =
        d.output(&["run", "--memory", "768", "--rootfs", root_text, "--", "sh", "-c", script]);
    let packages = fs::read_to_string(root.join("var/lib/dpkg/status")).unwrap();
    let packages = packages.lines().filter(|l| l.starts_with("Package: ")).count();
    let want = format!("{packages}\n42\nnew\nremoved\n1\n");
    let said = (out.status.code(), text(&out.stdout));
    assert_eq!(said, (Some(0), want), "{}{}", text(&out.stderr), d.log());
    assert!(root.join("etc/passwd").exists() && !root.join("etc/new").exists());
    assert_eq!(fs::metadata(root.join("etc")).unwrap().mtime(), before);
}

/// Of mounts, the host sees no more than what each VM shares.
fn only_their_own(d: &Daemon) {
    let all = mounts(&d.store());
    assert!(all.iter().all(|place| Path::new(place).ends_with("shared")), "{all:?}");
}

/// By 9p clones see it, too; the mount goes with the VM, however that goes.
#[test]
fn a_root_is_seen_by_9p_and_goes_with_its_vm() {
    let prepared = require_qemu!();
    let root = prepared.join("debian");
    let dir = in_memory("9p");
    let options = cloning(options_9p(&prepared), &dir);
    let d = Daemon::start(&options);
    a_root_is_as_it_is(&d, &root);
    only_their_own(&d);
    let arguments =
        ["run", "--keep", "--rootfs", root.to_str().unwrap(), "--", "cat", "/etc/issue"];
    let out = d.output(&arguments);
    assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stderr), d.log());
    let id = text(&out.stderr).trim().to_string();
    let ledger: Value =
        serde_json::from_slice(&fs::read(d.store().join(&id).join("vm.json")).unwrap()).unwrap();
    let qemu = ledger["pid"].as_i64().unwrap() as i32;
    // QEMU, which is root, sees it among mounts of its own; nobody else does.
    let place = d.store().join(&id).join("shared/vmcache-root");
    let theirs = fs::read_to_string(format!("/proc/{qemu}/mounts")).unwrap();
    assert!(theirs.contains(&format!(" {} ", place.display())), "{theirs}");
    only_their_own(&d);
    // The guest is root there, and the host's files stay as they are.
    let seen = PathBuf::from(format!("/proc/{qemu}/root")).join(place.strip_prefix("/").unwrap());
    let write = fs::write(seen.join("etc/vmcache-was-here"), "");
    assert_eq!(write.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let again = d.output(&["exec", &id, "--", "cat", "/etc/issue"]);
    assert!(again.status.success() && again.stdout == out.stdout, "{}", text(&again.stderr));
    // One that is killed is swept by its server.
    kill(qemu);
    wait_for("its end", || !d.store().join(&id).exists());
    assert!(root.join("etc/issue").exists());
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_vm_goes_with_what_serves_it_and_the_other_way_round() {
    let prepared = require_qemu!();
    let d = Daemon::start(&options(&prepared, 1));
    d.wait_rest(1);
    assert!(!serving(&d.store()).is_empty());
    // One that loses its file server is of no use to anybody.
    for pid in serving(&d.store()) {
        kill(pid);
    }
    d.wait_log("vm-died", 1);
    d.wait_ready(1);
    // A Kata client is told its pid; the VM's end is its own.
    let client = GrpcCache::connect(&d.socket()).unwrap();
    let message = client.claim_raw(Some(LONG)).unwrap();
    let json: Value = serde_json::from_slice(&message.hypervisor).unwrap();
    let told = json["State"]["VirtiofsDaemonPid"].as_i64().unwrap() as i32;
    let vm = from_wire(&message, || Err(String::new())).unwrap();
    let own = serving(vm.dir());
    assert!(own.contains(&told), "{told} of {own:?}");
    let dir = vm.dir().to_path_buf();
    vm.destroy();
    wait_for("the end of its virtiofsd", || serving(&dir).is_empty());
    assert_nothing_left(&d.quit().0);
}

/// What the guest's root does with what it is shown: on the host nothing of it is to be seen, and
/// no more than so much is taken.
#[test]
fn a_guest_writes_nothing_into_a_root_that_it_sees_and_little_into_its_own_directory() {
    let prepared = require_qemu!();
    let d = Daemon::start(&options(&prepared, 1));
    let root = d.dir.0.join("root");
    for name in ["bin", "mnt", "proc", "dev", "sys", "tmp"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    for name in ["sh", "mount", "touch", "cp", "chmod", "mknod", "rm", "echo", "dd"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    let script = "mount -t virtiofs vmcacheRoot /mnt && echo seen; mount -o remount,rw /mnt
         for does in 'touch /mnt/new' 'cp /bin/busybox /mnt/suid' 'mknod /mnt/sda b 8 0' \
             'chmod 777 /mnt/bin' 'rm /mnt/bin/rm' 'chmod 4755 /mnt/bin/busybox'; do
             $does 2>/dev/null && echo \"$does\"; done; true";
    let said = d.ok(&["run", "--rootfs", &root.display().to_string(), "--", "sh", "-c", script]);
    assert_eq!(said, "seen\n", "what is done is told");
    let mode = |name: &str| fs::symlink_metadata(root.join(name)).map(|m| m.mode() & 0o7777);
    assert!(mode("new").is_err() && mode("suid").is_err() && mode("sda").is_err());
    assert!(mode("bin").unwrap() != 0o777 && mode("bin/rm").is_ok());
    d.wait_ready(1);
    let id = d.ok(&["get"]).trim().to_string();
    let script = "mkdir -p /m && mount -t virtiofs kataShared /m && echo seen
         mknod /m/null c 1 3; dd if=/dev/zero of=/m/fill bs=1M count=200 2>/dev/null && echo all
         true";
    assert_eq!(d.ok(&["exec", &id, "--", "sh", "-c", script]), "seen\n");
    let shared = d.store().join(&id).join("shared");
    assert!(fs::metadata(shared.join("fill")).unwrap().len() <= 64 << 20);
    // A device that a guest has made is none on the host.
    let null = shared.join("null");
    assert!(!null.exists() || fs::File::open(null).is_err());
    d.ok(&["stop", &id]);
    assert_nothing_left(&d.quit().0);
}
