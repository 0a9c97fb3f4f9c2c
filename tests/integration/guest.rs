//! Every call of the agent, and its serial ports under bad manners.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmcache::agent::{Error, ListFormat, ProcessId, Stream};
use vmcache::config::Config;
use vmcache::factory::{direct, Wanted};
use vmcache::proto::agent::{CopyFileRequest, CreateContainerRequest, CreateSandboxRequest};
use vmcache::proto::oci::{
    Linux, LinuxCPU, LinuxCapabilities, LinuxMemory, LinuxNamespace, LinuxPids, LinuxResources,
    Mount, POSIXRlimit, Process, Root, Spec,
};
use vmcache::proto::types::{IPAddress, Interface, Route};
use vmcache::transport::serial::socket;
use vmcache::workload::{Command, Guest};

use crate::daemon::{assert_nothing_left, prepared, qemus, wait_for, Dir, Options, LONG};
use crate::require_qemu;

/// A VM of the test's own, without a server.
pub fn boot(dir: &Dir) -> Guest {
    let options = Options::pool(&prepared().unwrap(), 1);
    let config = Config::parse(Path::new("test.toml"), &options.text(&dir.0)).unwrap();
    let (vm, agent) = direct::cold(&config, &Wanted::default(), true, &|_| {}).unwrap();
    Guest::new(vm, agent)
}

pub fn output(guest: &Guest, script: &str) -> String {
    let running = guest.exec(&Command::new("sh").arg("-c").arg(script)).unwrap();
    let mut text = String::new();
    running.stdout().read_to_string(&mut text).unwrap();
    running.stderr().read_to_string(&mut text).unwrap();
    running.wait().unwrap();
    if running.id().exec.is_empty() {
        guest.remove(&running.id().container).unwrap();
    }
    text.trim().to_string()
}

const SHORT: Duration = Duration::from_millis(100);

fn resources(memory: i64, pids: i64) -> LinuxResources {
    LinuxResources {
        Memory: Some(LinuxMemory { Limit: memory, ..Default::default() }).into(),
        Pids: Some(LinuxPids { Limit: pids, ..Default::default() }).into(),
        CPU: Some(LinuxCPU { Shares: 512, Quota: 50_000, Period: 100_000, ..Default::default() })
            .into(),
        ..Default::default()
    }
}

fn container_spec(args: &[&str]) -> Spec {
    let namespace = |t: &str| LinuxNamespace { Type: t.into(), ..Default::default() };
    let caps = vec!["CAP_CHOWN".to_string(), "CAP_KILL".to_string()];
    Spec {
        Hostname: "inside".into(),
        Root: Some(Root { Path: "/".into(), Readonly: true, ..Default::default() }).into(),
        Process: Some(Process {
            Args: args.iter().map(|a| a.to_string()).collect(),
            Env: vec!["PATH=/bin:/usr/bin:/sbin".into()],
            Cwd: "/tmp".into(),
            NoNewPrivileges: true,
            Capabilities: Some(LinuxCapabilities {
                Bounding: caps.clone(),
                Effective: caps.clone(),
                Permitted: caps,
                ..Default::default()
            })
            .into(),
            Rlimits: vec![POSIXRlimit {
                Type: "RLIMIT_NOFILE".into(),
                Hard: 99,
                Soft: 88,
                ..Default::default()
            }],
            ..Default::default()
        })
        .into(),
        Mounts: vec![Mount {
            destination: "/proc".into(),
            source: "proc".into(),
            type_: "proc".into(),
            ..Default::default()
        }],
        Linux: Some(Linux {
            Namespaces: ["pid", "mount", "uts", "ipc"].into_iter().map(namespace).collect(),
            Resources: Some(resources(64 << 20, 50)).into(),
            MaskedPaths: vec!["/proc/kcore".into()],
            ReadonlyPaths: vec!["/proc/sys".into()],
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

#[test]
fn a_container_has_what_its_spec_says() {
    let _prepared = require_qemu!();
    let dir = Dir::new();
    let guest = boot(&dir);
    let agent = guest.agent();
    agent
        .start_sandbox(CreateSandboxRequest { sandbox_id: "s".into(), ..Default::default() })
        .unwrap();
    let script = "hostname; pwd; ulimit -n; echo $$; grep CapEff /proc/self/status | cut -f2; \
                  grep NoNewPrivs /proc/self/status | cut -f2; touch /x 2>&1 | grep -c Read-only; \
                  head -c1 /proc/kcore | wc -c; echo 1 2>/dev/null > /proc/sys/kernel/pid_max || echo ro; \
                  exec sleep 1000";
    let request = CreateContainerRequest {
        container_id: "c".into(),
        exec_id: "c".into(),
        OCI: Some(container_spec(&["sh", "-c", script])).into(),
        ..Default::default()
    };
    agent.create_container(request.clone()).unwrap();
    assert!(agent.create_container(request).is_err(), "twice");
    let c = ProcessId { container: "c".into(), exec: String::new() };
    agent.start_container("c").unwrap();
    let mut seen = String::new();
    while !seen.contains("ro\n") {
        let bytes = agent.read_stream(&c, Stream::Out, 4096).unwrap();
        assert!(!bytes.is_empty(), "{seen}");
        seen.push_str(&String::from_utf8_lossy(&bytes));
    }
    let want = "inside\n/tmp\n88\n1\n0000000000000021\n1\n1\n0\nro\n";
    assert_eq!(seen, want);

    // The cgroup, its changes and its numbers.
    let group = "/sys/fs/cgroup/vmcache/c";
    let read = |f: &str| output(&guest, &format!("cat {group}/{f}"));
    assert_eq!((read("memory.max").as_str(), read("pids.max").as_str()), ("67108864", "50"));
    assert_eq!((read("cpu.max").as_str(), read("cpu.weight").as_str()), ("50000 100000", "20"));
    agent.update_container("c", resources(96 << 20, 60)).unwrap();
    assert_eq!((read("memory.max").as_str(), read("pids.max").as_str()), ("100663296", "60"));
    let stats = agent.stats_container("c").unwrap();
    assert_eq!(stats.cgroup_stats.memory_stats.usage.limit, 96 << 20);
    assert_eq!(stats.cgroup_stats.pids_stats.current, 1);
    agent.pause_container("c").unwrap();
    wait_for("a frozen container", || read("cgroup.events").contains("frozen 1"));
    agent.resume_container("c").unwrap();
    wait_for("a thawed container", || read("cgroup.events").contains("frozen 0"));

    // A further process, its input, a signal.
    let e = ProcessId { container: "c".into(), exec: "e".into() };
    let process = container_spec(&["sh", "-c", "read a; echo $a; read b; echo end"]).Process;
    agent.exec(&e, process.unwrap()).unwrap();
    assert_eq!(agent.write_process_stdin(&e, b"hello\n".to_vec()).unwrap(), 6);
    assert_eq!(agent.read_stream(&e, Stream::Out, 100).unwrap(), b"hello\n");
    agent.close_process_stdin(&e).unwrap();
    assert_eq!(agent.read_stream(&e, Stream::Out, 100).unwrap(), b"end\n");
    assert_eq!(agent.read_stream(&e, Stream::Err, 100).unwrap(), b"");
    assert_eq!(agent.wait_process(&e, None).unwrap(), 0);
    let pids: Vec<i32> =
        serde_json::from_slice(&agent.process_list_container("c", ListFormat::Json, &[]).unwrap())
            .unwrap();
    assert_eq!(pids.len(), 1);
    agent.signal_process(&c, 9).unwrap();
    assert_eq!(agent.wait_process(&c, None).unwrap(), 137);
    agent.stop_container("c", Duration::from_secs(5)).unwrap();
    assert!(matches!(agent.stats_container("c"), Err(Error::Refused { .. })));
    assert!(output(&guest, &format!("ls -d {group} 2>&1")).contains("No such file"));
    agent.stop_sandbox().unwrap();
    guest.stop(LONG).unwrap();
    assert_nothing_left(&dir.0);
}

#[test]
fn clock_random_files_network_and_details() {
    let _prepared = require_qemu!();
    let dir = Dir::new();
    let guest = boot(&dir);
    let agent = guest.agent();
    assert_eq!(agent.version().unwrap(), ("0.0.1".into(), env!("CARGO_PKG_VERSION").into()));
    let details = agent.guest_details().unwrap();
    assert_eq!(details.mem_block_size_bytes, 128 << 20);
    assert!(details.agent_details.init_daemon);

    // What runs in the guest inherits no signal that the agent blocks.
    assert_eq!(output(&guest, "grep SigBlk /proc/self/status"), "SigBlk:\t0000000000000000");

    agent.set_guest_date_time(Duration::from_secs(1_000_000_000)).unwrap();
    assert_eq!(&output(&guest, "date -u +%s")[..8], "10000000");
    agent.reseed_rng(&[7; 512]).unwrap();
    assert!(agent.reseed_rng(&[]).is_err());
    assert!(agent.reseed_rng(&[0; 5000]).is_err());
    agent.online_cpu_mem(0, false).unwrap();

    // A file in two pieces, a directory, a link; half a file is nowhere.
    let piece = |offset: i64, data: &[u8]| CopyFileRequest {
        path: "/root/dir/file".into(),
        file_size: 10,
        file_mode: 0o100_640,
        dir_mode: 0o750,
        uid: 3,
        gid: 4,
        offset,
        data: data.to_vec(),
        ..Default::default()
    };
    agent.copy_file(piece(0, b"12345")).unwrap();
    assert!(output(&guest, "cat /root/dir/file 2>&1").contains("No such file"));
    agent.copy_file(piece(5, b"67890")).unwrap();
    let seen = output(&guest, "cat /root/dir/file; stat -c ' %a %u %g' /root/dir/file /root/dir");
    assert_eq!(seen, "1234567890 640 3 4\n 750 0 0");
    let mut bad = piece(0, b"x");
    bad.path = "/root/../etc/passwd".into();
    assert!(agent.copy_file(bad).is_err());

    // The loopback interface is the one network that every guest has.
    let lo = agent.list_interfaces().unwrap();
    let lo = lo.iter().find(|i| i.name == "lo").unwrap();
    assert!(lo.IPAddresses.iter().any(|a| a.address == "127.0.0.1" && a.mask == "8"));
    let address =
        |a: &str, m: &str| IPAddress { address: a.into(), mask: m.into(), ..Default::default() };
    let wanted = Interface {
        name: "lo".into(),
        mtu: 9000,
        IPAddresses: vec![address("127.0.0.1", "8"), address("10.9.8.7", "24")],
        ..Default::default()
    };
    agent.update_interface(wanted).unwrap();
    let lo = agent.list_interfaces().unwrap().into_iter().find(|i| i.name == "lo").unwrap();
    assert_eq!(lo.mtu, 9000);
    assert!(lo.IPAddresses.iter().any(|a| a.address == "10.9.8.7" && a.mask == "24"), "{lo}");
    let route = |dest: &str, gateway: &str| Route {
        dest: dest.into(),
        gateway: gateway.into(),
        device: "lo".into(),
        ..Default::default()
    };
    let routes = agent.update_routes(vec![route("192.0.2.0/24", "10.9.8.1")]).unwrap();
    let found = routes.iter().find(|r| r.dest == "192.0.2.0/24").unwrap();
    assert_eq!((found.gateway.as_str(), found.device.as_str()), ("10.9.8.1", "lo"));
    agent.update_routes(Vec::new()).unwrap();
    assert!(!agent.list_routes().unwrap().iter().any(|r| r.dest == "192.0.2.0/24"));
    assert!(agent.update_routes(vec![route("nonsense", "")]).is_err());
    guest.stop(LONG).unwrap();
    assert_nothing_left(&dir.0);
}

/// Connects, writes, and is gone; not at all when QEMU accepts nobody there.
fn die_in_the_middle(port: &Path, bytes: &[u8]) {
    use nix::sys::socket::{connect, socket, AddressFamily, SockFlag, SockType, UnixAddr};
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
    let address = UnixAddr::new(port).unwrap();
    if connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &address).is_ok() {
        UnixStream::from(fd).write_all(bytes).unwrap();
    }
}

#[test]
fn four_clients_at_once_and_one_that_dies_in_the_middle() {
    let _prepared = require_qemu!();
    let dir = Dir::new();
    let guest = boot(&dir);
    let vm = guest.vm();
    // This one and three more, all asked at the same time.
    let others: Vec<_> = (0..3).map(|_| vm.connect_agent().unwrap()).collect();
    std::thread::scope(|scope| {
        for agent in &others {
            scope.spawn(move || {
                for _ in 0..50 {
                    agent.check(Duration::from_secs(20)).unwrap();
                }
            });
        }
        for _ in 0..50 {
            guest.agent().check(Duration::from_secs(20)).unwrap();
        }
    });
    // A fifth waits for a port, in vain, and says so.
    let full = vmcache::transport::serial::open(vm.dir(), Duration::from_millis(200), SHORT);
    assert!(full.unwrap_err().to_string().contains("all 4 agent connections"));
    drop(others);

    // Clients that die at any point of a frame, on a port that is then used again.
    wait_for("a free port", || vmcache::transport::serial::open(vm.dir(), SHORT, SHORT).is_ok());
    let mut frame = Vec::new();
    vmcache::transport::frame::write_frame(
        &mut frame,
        vmcache::transport::frame::Kind::Hello,
        77,
        &[],
    )
    .unwrap();
    vmcache::transport::frame::write_frame(
        &mut frame,
        vmcache::transport::frame::Kind::Data,
        77,
        &[0xff; 9000],
    )
    .unwrap();
    for cut in [1, 8, 15, 16, 20, 31, 40, 5000, frame.len()] {
        for port in 1..4 {
            die_in_the_middle(&socket(vm.dir(), port), &frame[..cut]);
        }
        for _ in 0..3 {
            let agent = vm.connect_agent().unwrap();
            agent.check(Duration::from_secs(20)).unwrap();
        }
    }
    guest.agent().check(Duration::from_secs(20)).unwrap();
    assert_eq!(qemus(&dir.0).len(), 1);
    guest.stop(LONG).unwrap();
    assert_nothing_left(&dir.0);
}
