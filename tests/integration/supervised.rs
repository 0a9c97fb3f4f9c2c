//! Servers under a supervisor: what systemd is told, and what it keeps.

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use crate::daemon::{assert_nothing_left, qemus, text, vmcache, wait_child, Daemon, Dir, Options};
use crate::require_qemu;
use crate::restart::ready;

/// A supervisor's part, in systemd's words: what it is told, and the fds that come along.
struct Supervisor(UnixDatagram);

impl Supervisor {
    /// The next that it is told which has this in it.
    fn told(&self, what: &str) -> Option<OwnedFd> {
        loop {
            let (mut text, mut space) = ([0; 512], nix::cmsg_space!([i32; 4]));
            let mut parts = [IoSliceMut::new(&mut text)];
            let flags = nix::sys::socket::MsgFlags::empty();
            let message = nix::sys::socket::recvmsg::<()>(
                self.0.as_raw_fd(),
                &mut parts,
                Some(&mut space),
                flags,
            )
            .unwrap();
            let mut fd = None;
            for part in message.cmsgs().unwrap() {
                if let nix::sys::socket::ControlMessageOwned::ScmRights(fds) = part {
                    // SAFETY: it has just come, and is nobody else's.
                    fd = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
                }
            }
            let length = message.bytes;
            if String::from_utf8_lossy(&text[..length]).contains(what) {
                return fd;
            }
        }
    }
}

/// A restart by a supervisor that keeps the socket, as packaging/systemd has it done.
#[test]
fn a_supervisors_restart_loses_no_vm_and_no_claim() {
    let prepared = require_qemu!();
    let options = Options::pool(&prepared, 2);
    let dir = Dir::new();
    let place = dir.0.join("notify");
    let supervisor = Supervisor(UnixDatagram::bind(&place).unwrap());
    supervisor.0.set_read_timeout(Some(crate::daemon::LONG)).unwrap();
    let place = place.display().to_string();
    let mut first = Daemon::launch_with(&options, dir, &[("NOTIFY_SOCKET", &place)]);
    let socket = supervisor.told("FDSTORE=1\nFDNAME=vmcache-socket").expect("a socket to keep");
    first.wait_rest(2);
    let before = ready(&first);
    first.signal(Signal::SIGUSR1);
    assert!(first.wait().success(), "{}", first.log());
    supervisor.told("STOPPING=1");
    assert_eq!(qemus(&first.dir.0).len(), 2);
    let config = first.config.clone();
    let dir = first.forsake();

    // Nobody serves; whoever connects waits in the queue.
    let mut client = vmcache(&config);
    let mut client = client.args(["run", "--wait", "60", "--", "true"]).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(client.try_wait().unwrap().is_none());
    let program = env!("CARGO_BIN_EXE_vmcache");
    let script = format!("exec 3<&0 </dev/null; LISTEN_PID=$$ exec {program} serve --log stderr");
    let mut second = Command::new("/bin/sh")
        .args(["-c", &script])
        .env_clear()
        .env("VMCACHE_CONFIG", &config)
        .envs([("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "vmcache-socket")])
        .env("NOTIFY_SOCKET", &place)
        .stdin(socket)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    supervisor.told("READY=1");
    assert!(wait_child(&mut client).success());
    let status: serde_json::Value = serde_json::from_str(&text(
        &vmcache(&config).args(["status", "--json"]).output().unwrap().stdout,
    ))
    .unwrap();
    assert_eq!(status["counters"]["adopted"], 2, "{status}");
    // One of them is the client's, or was.
    let all = status["vms"].as_array().unwrap();
    assert!(before.iter().any(|(id, _)| all.iter().any(|vm| vm["id"] == id.as_str())));
    assert!(vmcache(&config).arg("quit").status().unwrap().success());
    assert!(wait_child(&mut second).success());
    supervisor.told("FDSTOREREMOVE=1");
    assert!(!dir.0.join("s").exists());
    assert_nothing_left(&dir.0);
}

/// The socket of a unit, which is there before the server: served, and left.
#[test]
fn a_units_socket_is_served_and_stays_the_units() {
    let prepared = require_qemu!();
    let dir = Dir::new();
    let options = Options::pool(&prepared, 1);
    let config = dir.0.join("c.toml");
    fs::write(&config, options.text(&dir.0)).unwrap();
    let serve = |at: &std::path::Path| {
        let socket = std::os::unix::net::UnixListener::bind(at).unwrap();
        let program = env!("CARGO_BIN_EXE_vmcache");
        let script =
            format!("exec 3<&0 </dev/null; LISTEN_PID=$$ exec {program} serve --log stderr");
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &script]).env_clear().env("VMCACHE_CONFIG", &config);
        shell.envs([("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "vmcache")]);
        shell.stdin(OwnedFd::from(socket)).stderr(Stdio::piped());
        shell.spawn().unwrap()
    };
    let other = serve(&dir.0.join("other")).wait_with_output().unwrap();
    let told = text(&other.stderr);
    assert!(!other.status.success() && told.contains("make ListenStream= of"), "{told}");

    let mut server = serve(&dir.0.join("s"));
    let run =
        || vmcache(&config).args(["run", "--wait", "60", "--", "echo", "hello"]).output().unwrap();
    assert_eq!(text(&run().stdout), "hello\n");
    assert!(vmcache(&config).arg("restart").status().unwrap().success());
    assert_eq!(text(&run().stdout), "hello\n");
    assert!(vmcache(&config).arg("quit").status().unwrap().success());
    assert!(wait_child(&mut server).success());
    assert!(dir.0.join("s").exists(), "it is the unit's");
    fs::remove_file(dir.0.join("s")).unwrap();
    assert_nothing_left(&dir.0);
}
