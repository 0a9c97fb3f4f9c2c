//! A server of a test's own: its directory, its log, its clients; and the
//! counting of what is left when it is gone.

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{self, SigHandler, Signal};
use serde_json::Value;

#[path = "overdue.rs"]
mod overdue;

/// A boot under TCG on a busy machine, and then some.
pub const LONG: Duration = Duration::from_secs(120);

/// Where `tests/run` put kernel and initramfs; `None` when the tests are to be
/// skipped, loudly.
pub fn prepared() -> Option<PathBuf> {
    overdue::begin();
    let dir = std::env::var_os("VMCACHE_TEST_DIR").map(PathBuf::from);
    match dir.filter(|d| d.join("configuration.toml").exists()) {
        Some(dir) => Some(dir),
        None if std::env::var_os("VMCACHE_REQUIRE_QEMU").is_some() => {
            panic!("VMCACHE_TEST_DIR names no prepared directory: use tests/run")
        }
        None => {
            eprintln!("SKIPPED: no VMCACHE_TEST_DIR: use tests/run");
            None
        }
    }
}

/// Prepares or leaves the test, saying so.
#[macro_export]
macro_rules! require_qemu {
    () => {
        match $crate::daemon::prepared() {
            Some(dir) => dir,
            None => return,
        }
    };
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A directory of a test's own, in memory; removed when dropped.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new() -> Dir {
        let n = NEXT.fetch_add(1, Ordering::SeqCst);
        let path = PathBuf::from(format!("/dev/shm/vmct-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Dir(path)
    }
}

impl Dir {
    /// One on a disk, as far as /var/tmp is on one.
    pub fn on_disk() -> Dir {
        let n = NEXT.fetch_add(1, Ordering::SeqCst);
        let path = PathBuf::from(format!("/var/tmp/vmct-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Dir(path)
    }
}

/// Where file systems are mounted, at a path or below it.
pub fn mounts(path: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let places = table.lines().filter_map(|l| l.split(' ').nth(1)).map(PathBuf::from);
    places.filter(|place| place.starts_with(path)).collect()
}

impl Drop for Dir {
    fn drop(&mut self) {
        for place in mounts(&self.0) {
            let _ = Command::new("umount").arg("-l").arg(place).status();
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A program where every user can execute it: VMs' users reach nothing below /root. Kept, as
/// all is that `tests/run` prepares.
pub fn for_all_users(program: &Path) -> PathBuf {
    assert!(program.exists(), "no {}: use tests/run", program.display());
    let dir = PathBuf::from("/var/tmp/vmct-programs");
    let copy = dir.join(program.file_name().unwrap());
    let same = |a: &Path, b: &Path| fs::read(a).ok() == fs::read(b).ok();
    // Two tests of this process would write one file.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    if !same(program, &copy) {
        fs::create_dir_all(&dir).unwrap();
        let new = dir.join(format!("{}.new", std::process::id()));
        // By a process of its own: a child of another test's, which inherits a file that is
        // being written, keeps it from being executed.
        assert!(Command::new("cp").arg(program).arg(&new).status().unwrap().success());
        fs::rename(new, &copy).unwrap();
    }
    copy
}

/// What a configuration says; changed by tests.
pub struct Options {
    pub pool: usize,
    pub memory: u32,
    pub timeout: u32,
    pub qemu: String,
    pub kernel: String,
    pub initrd: String,
    pub more_qemu: String,
    pub more_ours: String,
    pub more_factory: String,
    /// Whose the server is, with a program that this user can execute; else this process'.
    pub server: Option<(u32, PathBuf)>,
}

impl Options {
    /// A pool of `n`, all else as prepared.
    pub fn pool(prepared: &Path, n: usize) -> Options {
        let text = fs::read_to_string(prepared.join("configuration.toml")).unwrap();
        let value = |key: &str| {
            let line = text.lines().find(|l| l.starts_with(key)).unwrap();
            line.split_once('=').unwrap().1.trim().trim_matches('"').to_string()
        };
        Options {
            pool: n,
            memory: 256,
            timeout: 100,
            qemu: value("path"),
            kernel: value("kernel"),
            initrd: value("initrd"),
            more_qemu: String::new(),
            more_ours: format!("accel = \"{}\"\n", value("accel")),
            more_factory: String::new(),
            server: None,
        }
    }

    pub fn text(&self, dir: &Path) -> String {
        format!(
            "[hypervisor.qemu]\npath = {:?}\nkernel = {:?}\ninitrd = {:?}\ndefault_memory = {}\n\
             default_maxvcpus = 4\n{}\n[factory]\nvm_cache_number = {}\n\
             vm_cache_endpoint = {:?}\n{}[vmcache]\nboot_timeout = {}\nvm_store_path = {:?}\n{}\n",
            self.qemu,
            self.kernel,
            self.initrd,
            self.memory,
            self.more_qemu,
            self.pool,
            dir.join("s"),
            self.more_factory,
            self.timeout,
            dir.join("vm"),
            self.more_ours,
        )
    }
}

/// A command of ours with a configuration and nothing else around.
pub fn vmcache(config: &Path) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_vmcache"));
    c.env_clear().env("PATH", "/usr/bin:/bin").env("VMCACHE_CONFIG", config);
    c.stdin(Stdio::null());
    c
}

/// The same for the user whose the server is.
fn of_user(server: &Option<(u32, PathBuf)>, config: &Path) -> Command {
    let Some((uid, program)) = server else { return vmcache(config) };
    let mut c = Command::new(program);
    c.env_clear().env("PATH", "/usr/bin:/bin").env("VMCACHE_CONFIG", config);
    c.stdin(Stdio::null()).uid(*uid).gid(*uid);
    c
}

/// Runs to its end with some input.
pub fn feed(mut command: Command, input: &[u8]) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    output
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    news: Condvar,
}

/// A running server.
pub struct Daemon {
    pub dir: Dir,
    pub config: PathBuf,
    /// Whose it is, as in [`Options`].
    server: Option<(u32, PathBuf)>,
    child: Child,
    log: Arc<Log>,
}

impl Daemon {
    /// Starts one and waits until its pool is full.
    pub fn start(options: &Options) -> Daemon {
        let daemon = Daemon::launch(options, Dir::new());
        daemon.wait_ready(options.pool);
        daemon
    }

    /// Starts one and waits for nothing but its socket.
    pub fn launch(options: &Options, dir: Dir) -> Daemon {
        Daemon::launch_with(options, dir, &[])
    }

    /// The same, with more in its environment.
    pub fn launch_with(options: &Options, dir: Dir, environment: &[(&str, &str)]) -> Daemon {
        let config = dir.0.join("c.toml");
        fs::write(&config, options.text(&dir.0)).unwrap();
        let mut command = of_user(&options.server, &config);
        command.args(["serve", "--log", "stderr"]).stderr(Stdio::piped());
        command.envs(environment.iter().copied());
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Log::default());
        let (shared, stderr) = (Arc::clone(&log), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                shared.lines.lock().unwrap().push(line);
                shared.news.notify_all();
            }
        });
        let server = options.server.clone();
        let daemon = Daemon { dir, config, server, child, log };
        daemon.wait_log("server-started", 1);
        daemon
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.0.join("s")
    }

    pub fn store(&self) -> PathBuf {
        self.dir.0.join("vm")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        // As the server's user: a configuration and a store of that user's are not root's to use.
        let mut c = of_user(&self.server, &self.config);
        c.args(args);
        // Whoever runs the tests may have them ignore some: nohup, a shell's `&`.
        // SAFETY: a system call for each signal, and nothing else.
        unsafe {
            c.pre_exec(|| {
                for signal in Signal::iterator() {
                    let _ = signal::signal(signal, SigHandler::SigDfl);
                }
                Ok(())
            });
        }
        c
    }

    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must succeed; what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.output(args);
        assert!(out.status.success(), "{args:?}: {}{}", text(&out.stderr), self.log());
        text(&out.stdout)
    }

    pub fn status(&self) -> Value {
        serde_json::from_str(&self.ok(&["status", "--json"])).unwrap()
    }

    pub fn log(&self) -> String {
        format!("\n--- server log\n{}", self.log.lines.lock().unwrap().join("\n"))
    }

    pub fn log_lines(&self, needle: &str) -> Vec<String> {
        let lines = self.log.lines.lock().unwrap();
        lines.iter().filter(|l| l.contains(needle)).cloned().collect()
    }

    /// Waits until so many lines of the log have `needle`.
    pub fn wait_log(&self, needle: &str, n: usize) {
        let guard = self.log.lines.lock().unwrap();
        let few = |lines: &mut Vec<String>| lines.iter().filter(|l| l.contains(needle)).count() < n;
        let (guard, result) = self.log.news.wait_timeout_while(guard, LONG, few).unwrap();
        drop(guard);
        assert!(!result.timed_out(), "{n} times {needle:?}{}", self.log());
    }

    /// Waits until the pool has `n` VMs and nothing boots.
    pub fn wait_ready(&self, n: usize) {
        wait_for(&format!("{n} VMs ready{}", self.log()), || {
            let pool = &self.status()["pool"];
            pool["ready"] == n && pool["booting"] == 0
        });
    }

    /// The same, and all of them have had their rehearsal and are paused.
    pub fn wait_rest(&self, n: usize) {
        wait_for(&format!("{n} VMs at rest{}", self.log()), || {
            let pool = &self.status()["pool"];
            pool["ready"] == n && pool["booting"] == 0 && pool["awake"] == 0
        });
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        wait_child(&mut self.child)
    }

    /// The directory of one that was killed, as that left it.
    pub fn forsake(mut self) -> Dir {
        std::mem::replace(&mut self.dir, Dir(PathBuf::from("/nonexistent")))
    }

    /// Stops it by Quit; nothing of it must be left but VMs that were handed out.
    pub fn quit(mut self) -> Dir {
        self.ok(&["quit"]);
        let status = self.wait();
        assert!(status.success(), "{status}{}", self.log());
        assert!(!self.socket().exists(), "the socket is left");
        // Taken apart by hand: Drop would kill a process that is gone.
        let dir = std::mem::replace(&mut self.dir, Dir(PathBuf::from("/nonexistent")));
        drop(self);
        dir
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in qemus(&self.dir.0) {
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(pid),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }
}

/// Waits for a child's end, with a limit.
pub fn wait_child(child: &mut Child) -> ExitStatus {
    let mut status = None;
    wait_for("a process's end", || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    status.unwrap()
}

/// Looks again and again at what has no event to wait for.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// QEMUs that have a socket open which was made below a directory, from /proc; zombies have
/// none. Their command lines name no directory: all that they need they are given open.
pub fn qemus(dir: &Path) -> Vec<i32> {
    let below = format!("{}/", dir.display());
    let table = fs::read_to_string("/proc/net/unix").unwrap();
    // Num RefCount Protocol Flags Type St Inode Path
    let sockets: HashSet<String> = table
        .lines()
        .filter_map(|l| {
            let mut words = l.split_whitespace().skip(6);
            let (inode, path) = (words.next()?, words.next()?);
            path.starts_with(&below).then(|| format!("socket:[{inode}]"))
        })
        .collect();
    let mut out = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if !text(&line).contains("-chardev") {
            continue;
        }
        let fds = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
        let mut links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
        if links.any(|link| sockets.contains(&*link.to_string_lossy())) {
            out.push(pid);
        }
    }
    out
}

/// Directories of VMs below a store.
pub fn directories(store: &Path) -> Vec<PathBuf> {
    fs::read_dir(store).into_iter().flatten().flatten().map(|e| e.path()).collect()
}

/// No process and no directory must be left.
pub fn assert_nothing_left(dir: &Path) {
    wait_for("QEMUs' ends", || qemus(dir).is_empty());
    assert_eq!(directories(&dir.join("vm")), Vec::<PathBuf>::new());
    let left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with("s.") || n == "s")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
