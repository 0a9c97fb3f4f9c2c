//! Disks and network cards given to a VM when it is claimed.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::daemon::{assert_nothing_left, text, wait_for, Daemon, Dir, Options};
use crate::require_qemu;
use crate::templates::{cloning, in_memory};

/// Runs a program of the host, which must succeed.
fn host(line: &str) {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    let out = command.args(words).output().unwrap_or_else(|e| panic!("{line}: {e}"));
    assert!(out.status.success(), "{line}: {}", text(&out.stderr));
}

/// An empty ext4 of 16 MiB.
fn disk(dir: &Dir, name: &str) -> String {
    let path = dir.0.join(name).display().to_string();
    host(&format!("mkfs.ext4 -q {path} 16M"));
    path
}

/// `run` with options, a shell's script in the guest; what it printed.
fn run(d: &Daemon, options: &[&str], script: &str) -> String {
    let all: Vec<&str> =
        ["run"].iter().chain(options).chain(&["--", "sh", "-c", script]).copied().collect();
    d.ok(&all)
}

/// A failing `run`: its exit code and message.
fn refused(d: &Daemon, options: &[&str]) -> (Option<i32>, String) {
    let all: Vec<&str> = ["run"].iter().chain(options).chain(&["--", "true"]).copied().collect();
    let out = d.output(&all);
    (out.status.code(), text(&out.stderr))
}

#[test]
fn a_disk_is_mounted_written_and_read_again() {
    let prepared = require_qemu!();
    let dir = in_memory("disk");
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let image = disk(&dir, "data.img");
    let at = ["--image", &image, "--mount", "/srv/data/"];
    // Written last, and not synced by the command.
    let out = run(&d, &at, "head -c 3000000 /dev/urandom > /srv/data/f; sha256sum < /srv/data/f");
    let again = run(&d, &at, "sha256sum < /srv/data/f; cut -d' ' -f2-4 /proc/mounts | grep srv");
    assert_eq!(again, format!("{out}/srv/data ext4 rw,relatime\n"));
    let read_only = format!("{image}:ro");
    let both = ["--image", &read_only, "--mount", "/srv/data"];
    let out = run(&d, &both, "touch /srv/data/g 2>&1; ls /srv/data");
    assert!(out.starts_with("touch: /srv/data/g: Read-only"), "{out}");
    assert!(out.ends_with("f\nlost+found\n"), "{out}");
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_debian_image_is_the_root_raw_or_qcow2() {
    let prepared = require_qemu!();
    let dir = in_memory("root");
    let debian = prepared.join("debian");
    let raw = dir.0.join("debian.img").display().to_string();
    host(&format!("mkfs.ext4 -q -d {} {raw} 600M", debian.display()));
    let qcow2 = dir.0.join("debian.qcow2").display().to_string();
    host(&format!("qemu-img convert -O qcow2 {raw} {qcow2}"));
    let version = fs::read_to_string(debian.join("etc/debian_version")).unwrap();
    let d = Daemon::start(&Options::pool(&prepared, 2));
    for image in [&raw, &qcow2] {
        let out = run(&d, &["--image", image], "cat /etc/debian_version; perl -e 'print 6*7'");
        assert_eq!(out, format!("{version}42"), "{image}");
        run(&d, &["--image", image], "echo kept > /root/f");
        let read_only = format!("{image}:ro");
        assert_eq!(run(&d, &["--image", &read_only], "cat /root/f"), "kept\n", "{image}");
    }
    host(&format!("qemu-img check -q {qcow2}"));

    // A VM that is kept: what comes later sees the same root, and `stop` writes it out.
    let out = d.output(&["run", "--keep", "--image", &raw, "--", "true"]);
    let id = text(&out.stderr).trim().to_string();
    assert_eq!(d.ok(&["exec", &id, "--", "cat", "/root/f"]), "kept\n");
    let file = dir.0.join("file");
    fs::write(&file, "copied\n").unwrap();
    d.ok(&["cp", file.to_str().unwrap(), &format!("{id}:/root")]);
    for options in [vec!["--image", &raw], vec!["--image", &raw, "--mount", "/mnt"]] {
        let (code, error) = refused(&d, &options);
        assert_eq!(code, Some(125), "{error}");
        assert!(error.contains(&raw) && error.contains("uses it"), "{error}");
    }
    d.ok(&["stop", &id]);
    assert_eq!(run(&d, &["--image", &raw], "cat /root/file"), "copied\n");
    assert_nothing_left(&d.quit().0);
}

/// The image's root can not be written: resolvers have no place there, or the one
/// they have.
#[test]
fn a_read_only_root_may_have_a_network() {
    let prepared = require_qemu!();
    let dir = in_memory("ro-net");
    let debian = prepared.join("debian");
    let raw = dir.0.join("debian.img").display().to_string();
    host(&format!("mkfs.ext4 -q -d {} {raw} 600M", debian.display()));
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let options = ["--image", &format!("{raw}:ro"), "--net", "user"];
    assert_eq!(run(&d, &options, "ls /sys/class/net | head -n 1"), "eth0\n");
    assert_nothing_left(&d.quit().0);
}

/// A mount point is found with the links of the command's root, not the guest's.
#[test]
fn a_disk_is_mounted_where_the_roots_own_links_say() {
    let prepared = require_qemu!();
    let dir = in_memory("links");
    let image = disk(&dir, "data.img");
    let root = prepared.join("debian");
    let root = root.to_str().unwrap();
    let mut options = Options::pool(&prepared, 1);
    options.memory = 1024;
    let d = Daemon::start(&options);
    // Debian's /var/run is a link to /run.
    let at = ["--rootfs", root, "--image", &image, "--mount", "/var/run/data"];
    let out = run(&d, &at, "echo kept > /var/run/data/f; cut -d' ' -f2,3 /proc/mounts | grep data");
    assert_eq!(out, "/run/data ext4\n");
    d.wait_ready(1);
    assert_eq!(run(&d, &["--image", &image, "--mount", "/mnt"], "cat /mnt/f"), "kept\n");
    for place in ["/proc/data", "/dev", "/sys/x"] {
        let (code, error) = refused(&d, &["--image", &image, "--mount", place]);
        assert!(code == Some(2) && error.contains("would hide it"), "{error}");
    }
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_paused_vm_writes_its_disk_out_before_it_is_stopped() {
    let prepared = require_qemu!();
    let dir = in_memory("paused");
    let image = disk(&dir, "data.img");
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let at = ["run", "--keep", "--image", &image, "--mount", "/mnt", "--"];
    let all: Vec<&str> = at.into_iter().chain(["sh", "-c", "echo kept > /mnt/f"]).collect();
    let id = text(&d.output(&all).stderr).trim().to_string();
    d.ok(&["pause", &id]);
    d.ok(&["stop", &id]);
    assert_eq!(run(&d, &["--image", &image, "--mount", "/mnt"], "cat /mnt/f"), "kept\n");
    assert_nothing_left(&d.quit().0);
}

/// The command is told that its disk fails; nothing stands still.
#[test]
fn a_full_disk_of_the_host_is_an_error_in_the_guest() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let small = dir.0.join("small");
    fs::create_dir(&small).unwrap();
    host(&format!("mount -t tmpfs -o size=6m vmct-full {}", small.display()));
    let small = Dir(small);
    let image = disk(&small, "data.img");
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let script = "head -c 12000000 /dev/urandom > /mnt/f && sync /mnt/f && echo written";
    let at = ["run", "--image", &image, "--mount", "/mnt", "--", "sh", "-c", script];
    let before = std::time::Instant::now();
    let out = d.output(&at);
    assert!(!out.status.success() && !text(&out.stdout).contains("written"), "{:?}", out);
    assert!(before.elapsed() < std::time::Duration::from_secs(60), "{:?}", before.elapsed());
    drop(small);
    assert_nothing_left(&d.quit().0);
}

fn clone_with(machine: &str) {
    let prepared = require_qemu!();
    let dir = in_memory(&format!("attach-{machine}"));
    let mut options = cloning(Options::pool(&prepared, 1), &dir);
    options.more_qemu = format!("machine_type = \"{machine}\"\n");
    let d = Daemon::start(&options);
    let image = disk(&dir, "data.img");
    let at = ["--image", &image, "--mount", "/mnt", "--net", "user", "--cpus", "2"];
    let out = run(&d, &at, "nproc; df /mnt | tail -n 1 | cut -d' ' -f1; ls /sys/class/net");
    assert_eq!(out, "2\n/dev/vda\neth0\nlo\n");
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_q35_clone_gets_a_disk_a_network_card_and_a_cpu() {
    clone_with("q35");
}

#[test]
fn a_pc_clone_gets_a_disk_a_network_card_and_a_cpu() {
    clone_with("pc");
}

/// Processes that speak for guests on the host's network, as a test's command line names them.
fn speaking(needle: &str) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    let line = |pid: &i32| fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    pids.filter(|pid| text(&line(pid)).contains(needle)).collect()
}

#[test]
fn the_user_network_reaches_the_host_and_is_no_part_of_qemu() {
    let prepared = require_qemu!();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"from the host\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        all
    });
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let script = format!("cat /etc/resolv.conf; echo from the guest | nc 10.0.2.2 {port}");
    assert_eq!(run(&d, &["--net", "user"], &script), "nameserver 10.0.2.3\nfrom the host\n");
    assert_eq!(server.join().unwrap(), "from the guest\n");
    // One that is kept has its own, which is no user with rights, and ends with it.
    d.wait_ready(1);
    let before = speaking("hubport,hubid=0,netdev=vm");
    let out = d.output(&["run", "--keep", "--net", "user", "--", "true"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    let id = text(&out.stderr).trim().to_string();
    let mut own = speaking("hubport,hubid=0,netdev=vm");
    own.retain(|pid| !before.contains(pid));
    let served = fs::read_to_string(d.store().join(&id).join("served")).unwrap();
    let own = own.into_iter().find(|pid| served.contains(&format!("\"pid\":{pid},"))).unwrap();
    let status = fs::read_to_string(format!("/proc/{own}/status")).unwrap();
    let field = |key: &str| status.lines().find(|l| l.starts_with(key)).unwrap().to_string();
    assert!(!field("Uid:").contains("\t0\t"), "{status}");
    assert_eq!(field("CapBnd:"), "CapBnd:\t0000000000000000");
    assert_eq!(field("Seccomp:"), "Seccomp:\t2");
    d.ok(&["stop", &id]);
    wait_for("its end", || !speaking("hubport,hubid=0,netdev=vm").contains(&own));
    assert_nothing_left(&d.quit().0);
}

#[test]
fn passt_carries_the_user_network_where_it_is_asked_for() {
    let prepared = require_qemu!();
    assert!(Path::new("/usr/bin/passt").exists(), "no passt: use tests/run");
    let d = Daemon::start(&Options::pool(&prepared, 1));
    // By an address of the host's that is not its loopback's.
    let outside = UdpSocket::bind("0.0.0.0:0").unwrap();
    outside.connect("192.0.2.1:9").unwrap();
    let host = outside.local_addr().unwrap().ip();
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        listener.incoming().flatten().for_each(|mut stream| {
            let _ = stream.write_all(b"a service of the host's\n");
        });
    });
    // The service ends the connection, not the guest: where both do in one moment, Debian 12's
    // passt (of March 2023) loses the service's end, and the guest waits for it for ever.
    let said = run(
        &d,
        &["--net", "user,by=passt"],
        &format!(
            "cat /etc/resolv.conf; sleep 3 | timeout 20 nc {host} {port}; \
             sleep 3 | timeout 3 nc 10.0.2.2 {port} | sed s/^/loopback:/"
        ),
    );
    assert!(said.starts_with("nameserver 10.0.2.3\n"), "{said}");
    assert!(said.contains("a service of the host's"), "{said}");
    // The host's own services on 127.0.0.1 are not the gateway's.
    assert!(!said.contains("loopback:"), "{said}");
    wait_for("its end", || speaking("/usr/bin/passt\0").is_empty());
    assert_nothing_left(&d.quit().0);
}

/// A network namespace with a tap in it, gone at the end. Needs root.
struct Namespace(String);

impl Namespace {
    fn with_tap(name: &str) -> Namespace {
        let space = Namespace(format!("vmct-{name}-{}", std::process::id()));
        let ns = &space.0;
        host(&format!("ip netns add {ns}"));
        host(&format!("ip -n {ns} tuntap add mode tap name tap0"));
        host(&format!("ip -n {ns} address add 192.0.2.1/24 dev tap0"));
        host(&format!("ip -n {ns} link set tap0 up mtu 1400"));
        space
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        host(&format!("ip netns delete {}", self.0));
    }
}

#[test]
fn a_tap_of_another_network_namespace_is_the_guests() {
    let prepared = require_qemu!();
    let space = Namespace::with_tap("ping");
    let tap = format!("tap=tap0,netns={}", space.path().display());
    let net = format!(
        "{tap},ip=192.0.2.2/24,gateway=192.0.2.1,dns=192.0.2.3,mac=02:00:00:00:00:07,mtu=1400"
    );
    let d = Daemon::start(&Options::pool(&prepared, 2));
    let script = "ping -c 1 -W 5 192.0.2.1 | grep -c ' 0% packet loss'; ip route | head -n 1; \
                  cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu /etc/resolv.conf";
    assert_eq!(
        run(&d, &["--net", &net], script),
        "1\ndefault via 192.0.2.1 dev eth0 \n02:00:00:00:00:07\n1400\nnameserver 192.0.2.3\n"
    );
    // Two cards, one of each kind; the tap is free again.
    let two = ["--net", "user", "--net", &net.replace(",gateway=192.0.2.1", "")];
    let script = "ping -c 1 -W 5 192.0.2.1 | grep -c ' 0% packet loss'; ls /sys/class/net";
    assert_eq!(run(&d, &two, script), "1\neth0\neth1\nlo\n");

    let out = d.output(&["run", "--keep", "--net", &net, "--", "true"]);
    let id = text(&out.stderr).trim().to_string();
    let (code, error) = refused(&d, &["--net", &tap]);
    assert_eq!(code, Some(2), "{error}");
    assert!(error.contains("tap0") && error.contains("another process has it"), "{error}");
    d.ok(&["stop", &id]);
    let (code, error) = refused(&d, &["--net", &tap.replace("tap0", "lo")]);
    assert!(code == Some(2) && error.contains("is no tap"), "{code:?} {error}");
    assert_nothing_left(&d.quit().0);
}

#[test]
fn what_is_wrong_with_a_disk_or_a_tap_is_told_and_costs_no_vm() {
    let prepared = require_qemu!();
    let dir = in_memory("wrong");
    let mut options = Options::pool(&prepared, 1);
    options.more_qemu = "default_bridges = 0\n".into();
    let d = Daemon::start(&options);
    let before = d.status()["vms"][0]["id"].clone();
    let path = |name: &str, bytes: &[u8]| {
        let path = dir.0.join(name);
        fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let raw = disk(&dir, "raw.img");
    let overlay = dir.0.join("overlay.qcow2").display().to_string();
    host(&format!("qemu-img create -q -f qcow2 -F raw -b {raw} {overlay}"));
    let missing = dir.0.join("missing.img").display().to_string();
    for (options, words) in [
        (vec!["--image", &missing], "No such file"),
        (vec!["--image", &overlay], "names a backing file"),
        (vec!["--image", &path("not.qcow2", b"text")], "not qcow2"),
        (vec!["--image", &path("is.img", b"QFI\xfb\0\0\0\x03")], "begins like qcow2"),
        (vec!["--image", &raw, "--image-format", "vmdk"], "must be raw or qcow2"),
        (vec!["--image", &raw, "--mount", "srv"], "absolute path"),
        (vec!["--image", &raw, "--rootfs", "/"], "both name the command's root"),
        (vec!["--mount", "/srv"], "--image"),
        (vec!["--net", "tap=vmc-none0"], "tap vmc-none0: there is none"),
        (vec!["--net", "bridge=br0"], "must be `user`"),
    ] {
        let (code, error) = refused(&d, &options);
        assert!(code == Some(2) && error.contains(words), "{options:?}: {code:?} {error}");
    }
    assert_eq!(d.status()["vms"][0]["id"], before);
    // This one is known only when the VM is there, and costs it.
    let (code, error) = refused(&d, &["--net", "user"]);
    assert!(code == Some(125) && error.contains("default_bridges"), "{code:?} {error}");
    assert_nothing_left(&d.quit().0);
}

#[test]
fn a_disk_that_the_guest_can_not_mount_is_told() {
    let prepared = require_qemu!();
    let dir = in_memory("strange");
    let d = Daemon::start(&Options::pool(&prepared, 1));
    let blank = dir.0.join("blank.img");
    fs::write(&blank, vec![0; 1 << 20]).unwrap();
    let (code, error) = refused(&d, &["--image", blank.to_str().unwrap()]);
    assert_eq!(code, Some(125), "{error}");
    assert!(error.contains("no file system on it that this guest knows (ext4, "), "{error}");
    // One partition, by a table of the oldest kind: type 0x83, from sector 1, 2047 long.
    let mut table = vec![0; 1 << 20];
    table[446..462].copy_from_slice(&[0, 0, 2, 0, 0x83, 0, 3, 0, 1, 0, 0, 0, 0xff, 7, 0, 0]);
    table[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&blank, table).unwrap();
    let (code, error) = refused(&d, &["--image", blank.to_str().unwrap()]);
    assert!(code == Some(125) && error.contains("it has 1 partitions"), "{code:?} {error}");
    assert_nothing_left(&d.quit().0);
}
