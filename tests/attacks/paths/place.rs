//! Where these attacks happen: a configuration of root's with all that it names, and a directory
//! of Eve's beside it.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{chown, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::daemon::{vmcache, wait_child, Dir};

/// Somebody else.
pub const EVE: u32 = 233_101;
/// A group of others.
pub const STAFF: u32 = 50;
/// What takes the wall down.
pub const DOWN: [(&str, &str); 1] = [("VMCACHE_WALLS_DOWN", "paths")];
/// What another server told its clients, as far as it must be there.
const SERVED: &str = r#"{
    "Data": "{\"HypervisorType\":\"qemu\",\"HypervisorConfig\":{}}", "AgentConfig": "{}"
}"#;
/// How long a command may take that refuses, and a server to start.
const SOON: Duration = Duration::from_secs(30);

/// What an option names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Target {
    File,
    Directory,
    Socket,
}

/// An option, the path that it names, and what else a configuration with it says.
pub struct Case {
    /// The option, with its table.
    pub name: &'static str,
    /// The path, below the place.
    pub target: &'static str,
    pub kind: Target,
    pub qemu: &'static str,
    pub factory: &'static str,
    pub ours: &'static str,
    pub tables: &'static str,
}

impl Case {
    /// A configuration without more.
    pub const NONE: Case = Case {
        name: "",
        target: "",
        kind: Target::File,
        qemu: "",
        factory: "",
        ours: "",
        tables: "",
    };

    pub fn with_ours(self, text: String) -> Case {
        Case { ours: text.leak(), ..self }
    }
}

/// All options that name a path; `@` is the place.
pub const CASES: &[Case] = &[
    Case { name: "hypervisor.qemu.path", target: "bin/qemu", ..Case::NONE },
    Case { name: "hypervisor.qemu.kernel", target: "img/kernel", ..Case::NONE },
    Case { name: "hypervisor.qemu.initrd", target: "img/initrd", ..Case::NONE },
    Case {
        name: "hypervisor.qemu.firmware",
        target: "img/firmware",
        qemu: "firmware = \"@/img/firmware\"\n",
        ..Case::NONE
    },
    Case {
        name: "hypervisor.qemu.virtio_fs_daemon",
        target: "bin/virtiofsd",
        qemu: "shared_fs = \"virtio-fs\"\nvirtio_fs_daemon = \"@/bin/virtiofsd\"\n",
        ..Case::NONE
    },
    Case {
        name: "proxy.kata.path",
        target: "bin/proxy",
        tables: "[agent.kata]\nprotocol = \"grpc\"\n[proxy.kata]\npath = \"@/bin/proxy\"\n",
        ..Case::NONE
    },
    Case {
        name: "vmcache.vsock_device",
        target: "bin/vsock",
        ours: "transport = \"vhost-user-vsock\"\nvsock_device = \"@/bin/vsock\"\n",
        ..Case::NONE
    },
    Case {
        name: "vmcache.vsock_sockets",
        target: "socks/q",
        kind: Target::Socket,
        ours: "transport = \"vhost-user-vsock\"\nvsock_sockets = \"@/socks/q,@/socks/h\"\n",
        ..Case::NONE
    },
    Case {
        name: "hypervisor.qemu.entropy_source",
        target: "img/random",
        qemu: "entropy_source = \"@/img/random\"\n",
        ..Case::NONE
    },
    Case {
        name: "hypervisor.qemu.file_mem_backend",
        target: "mem/files",
        kind: Target::Directory,
        qemu: "file_mem_backend = \"@/mem/files\"\n",
        ..Case::NONE
    },
    Case {
        name: "factory.template_path",
        target: "mem/template",
        kind: Target::Directory,
        factory: "enable_template = true\ntemplate_path = \"@/mem/template\"\n",
        ..Case::NONE
    },
    Case {
        name: "factory.vm_cache_endpoint",
        target: "run",
        kind: Target::Directory,
        ..Case::NONE
    },
    Case {
        name: "vmcache.vm_store_path",
        target: "state/vm",
        kind: Target::Directory,
        ..Case::NONE
    },
    Case {
        name: "vmcache.confine_paths",
        target: "disks/more",
        kind: Target::Directory,
        ours: "confine_paths = [\"@/disks/more\", \"@/nothing\"]\n",
        ..Case::NONE
    },
    Case {
        name: "vmcache.served_config",
        target: "etc/served.json",
        ours: "served_config = \"@/etc/served.json\"\n",
        ..Case::NONE
    },
    Case {
        name: "vmcache.log",
        target: "socks/log",
        kind: Target::Socket,
        ours: "log = \"unix:@/socks/log\"\n",
        ..Case::NONE
    },
];

/// Options of text that name no path, and two that are tried elsewhere or refused.
pub const NO_PATHS: &[&str] = &[
    "hypervisor.qemu.image",
    "hypervisor.qemu.machine_type",
    "hypervisor.qemu.machine_accelerators",
    "hypervisor.qemu.cpu_features",
    "hypervisor.qemu.kernel_params",
    "hypervisor.qemu.shared_fs",
    "hypervisor.qemu.virtio_fs_cache",
    "hypervisor.qemu.block_device_driver",
    "agent.kata.kernel_modules",
    "agent.kata.protocol",
    "vmcache.accel",
    "vmcache.agent",
    "vmcache.transport",
    "vmcache.user",
    "vmcache.cgroup",
    "vmcache.apparmor_profile",
    "vmcache.selinux_label",
    "vmcache.kernel_sha256",
    "vmcache.initrd_sha256",
    "vmcache.claim_users",
    "vmcache.claim_groups",
    "vmcache.socket_mode",
    "vmcache.socket_group",
    "vmcache.wire",
    "vmcache.log_format",
    "vmcache.log_level",
];

pub fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

pub fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

/// Looks again and again at what has no event to wait for; whether it came.
fn waited(mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + SOON;
    while !done() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    true
}

/// The same, of what must come.
pub fn until(what: &str, done: impl FnMut() -> bool) {
    assert!(waited(done), "waited in vain for {what}");
}

fn said(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    })
}

/// The place.
pub struct Place {
    pub dir: Dir,
    _sockets: Vec<UnixListener>,
}

impl Place {
    pub fn new() -> Place {
        let dir = Dir::new();
        for name in
            ["etc/conf.d", "bin", "img", "socks", "mem/files", "mem/template", "run", "state/vm"]
        {
            fs::create_dir_all(dir.0.join(name)).unwrap();
        }
        for name in ["disks/more", "eves", "marks"] {
            fs::create_dir_all(dir.0.join(name)).unwrap();
        }
        chmod(&dir.0.join("marks"), 0o777);
        chown(dir.0.join("eves"), Some(EVE), Some(EVE)).unwrap();
        for (name, text) in [
            ("img/kernel", "\x7fELF of a kernel"),
            ("img/initrd", "070701 of an archive"),
            ("img/firmware", "firmware"),
            ("img/random", "random"),
            ("etc/served.json", SERVED),
            ("etc/conf.d/10.toml", "[hypervisor.qemu]\ndefault_vcpus = 1\n"),
        ] {
            fs::write(dir.0.join(name), text).unwrap();
        }
        let bind = |name| UnixListener::bind(dir.0.join(name)).unwrap();
        let sockets = ["socks/q", "socks/h", "socks/log"].map(bind).into();
        let place = Place { dir, _sockets: sockets };
        for name in ["qemu", "virtiofsd", "proxy", "vsock"] {
            place.program(&format!("bin/{name}"), name);
        }
        place.configure(&Case::NONE);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.0.join(name)
    }

    /// A program that says who has executed it, in a file and in words.
    pub fn program(&self, name: &str, mark: &str) -> PathBuf {
        let path = self.path(name);
        let mark = self.path("marks").join(mark);
        let script = format!("#!/bin/sh\necho \"uid $(id -u)\" > {}\nexit 1\n", mark.display());
        fs::write(&path, script).unwrap();
        chmod(&path, 0o755);
        path
    }

    pub fn assert_unmarked(&self) {
        let marks: Vec<_> = fs::read_dir(self.path("marks")).unwrap().flatten().collect();
        assert!(marks.is_empty(), "{marks:?}");
    }

    /// A file of root's that nothing here is about.
    pub fn witness(&self) -> PathBuf {
        let path = self.path("witness");
        fs::write(&path, "root's").unwrap();
        path
    }

    pub fn read_witness(&self) -> String {
        fs::read_to_string(self.path("witness")).unwrap()
    }

    /// What a server's ledger says of a VM that it has begun to make.
    pub fn ledger(&self, id: &str) -> String {
        serde_json::json!({
            "id": id, "state": "booting", "pid": 0, "start_time": 0, "uuid": "", "source": "direct",
            "cpus": 1, "memory_mib": 256, "endpoint": self.path("run/s"), "created": 1,
            "owner": null,
        })
        .to_string()
    }

    /// Writes root's configuration.
    pub fn configure(&self, case: &Case) {
        let text = format!(
            "[hypervisor.qemu]\npath = \"@/bin/qemu\"\nkernel = \"@/img/kernel\"\n\
             initrd = \"@/img/initrd\"\ndefault_memory = 256\ndefault_maxvcpus = 2\n{}\n\
             [factory]\nvm_cache_number = 1\nvm_cache_endpoint = \"@/run/s\"\n{}\n{}\n\
             [vmcache]\naccel = \"tcg\"\nvm_store_path = \"@/state/vm\"\n{}\n",
            case.qemu, case.factory, case.tables, case.ours
        );
        let text = text.replace('@', &self.dir.0.display().to_string());
        fs::write(self.path("etc/c.toml"), text).unwrap();
    }

    /// A command of root's: its exit code, `None` when a signal ended it, and what it said.
    pub fn run(&self, args: &[&str]) -> (Option<i32>, String) {
        self.run_with(args, &[])
    }

    /// The same, with more in its environment.
    pub fn run_with(&self, args: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String) {
        let mut command = vmcache(&self.path("etc/c.toml"));
        command.args(args).envs(environment.iter().copied());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (out, err) = (said(out), said(err));
        let mut status = None;
        // What refuses ends by itself; what does not must not hold the test up.
        let ended = waited(|| {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        if !ended {
            child.kill().unwrap();
            status = Some(child.wait().unwrap());
        }
        let text = out.join().unwrap() + &err.join().unwrap();
        (status.and_then(|s| s.code()), text)
    }

    /// The same, without any wall of this kind.
    pub fn run_unwalled(&self, args: &[&str]) -> (Option<i32>, String) {
        self.run_with(args, &DOWN)
    }

    /// All that is there: names, whose, permissions, contents.
    pub fn picture(&self) -> Vec<String> {
        let mut all = Vec::new();
        let mut left = vec![self.dir.0.clone()];
        while let Some(path) = left.pop() {
            let m = fs::symlink_metadata(&path).unwrap();
            let what = match (m.is_dir(), m.is_file(), m.is_symlink()) {
                (true, ..) => {
                    left.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
                    String::new()
                }
                // What each case says in it is another.
                (_, true, _) if path.ends_with("c.toml") => String::new(),
                (_, true, _) => String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned(),
                (.., true) => fs::read_link(&path).unwrap().display().to_string(),
                _ => String::new(),
            };
            let (uid, gid, mode) = (m.uid(), m.gid(), m.mode());
            all.push(format!("{} {uid} {gid} {mode:o} {what}", path.display()));
        }
        all.sort();
        all
    }
}

/// A server that runs.
pub struct Serving(Child);

impl Serving {
    /// Starts one, without any wall of this kind.
    pub fn unwalled(place: &Place) -> Serving {
        Serving::start(place, Path::new(env!("CARGO_BIN_EXE_vmcache")), &DOWN)
    }

    /// Starts a program as one.
    pub fn start(place: &Place, program: &Path, environment: &[(&str, &str)]) -> Serving {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", "/usr/bin:/bin");
        command.env("VMCACHE_CONFIG", place.path("etc/c.toml"));
        command.args(["serve", "--log", "stderr"]).envs(environment.iter().copied());
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (tell, told) = channel();
        // Read to its end, so that it never waits for that.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let serving = Serving(child);
        let mut all = Vec::new();
        while let Ok(line) = told.recv_timeout(SOON) {
            if line.contains("server-started") {
                return serving;
            }
            all.push(line);
        }
        panic!("it did not start: {all:#?}");
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Asks it to end, and waits for that.
    pub fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        wait_child(&mut self.0);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
