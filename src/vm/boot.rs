//! A cold boot, phase by phase; each phase consumes the one before.
//!
//! Invariants: one deadline for all of it; a failure at any point leaves
//! neither process nor directory, and says which phase did not come, after how
//! long, and what QEMU and the guest's console wrote.

use std::error;
use std::fmt;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::dir::VmDir;
use super::identity;
use super::ledger::{Ledger, State};
use super::Vm;
use crate::agent::address::Address;
use crate::agent::kata::KataAgent;
use crate::agent::Agent;
use crate::config::Config;
use crate::hypervisor::qemu::argv::{argv, Names};
use crate::hypervisor::qemu::process::Process;
use crate::hypervisor::qemu::qmp::Qmp;
use crate::worker::Worker;

/// Bytes of the guest's console that an error carries, the last ones.
const KEPT_CONSOLE: usize = 2048;
/// How long a QEMU that has gone silent may take to be dead of itself.
const LAST_BREATH: Duration = Duration::from_millis(300);

/// What a boot was waiting for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The VM's directory and sockets.
    Directory,
    /// QEMU's process.
    Spawn,
    /// The greeting of QEMU's monitor.
    Monitor,
    /// The guest's kernel and agent.
    Guest,
    /// Random numbers and clock.
    Identity,
    /// Pausing, and the ledger.
    Ready,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Directory => "its directory could not be made",
            Phase::Spawn => "QEMU could not be started",
            Phase::Monitor => "QEMU's monitor did not answer",
            Phase::Guest => "the guest's agent did not answer",
            Phase::Identity => "the guest could not be given its identity",
            Phase::Ready => "it could not be made ready",
        })
    }
}

/// Why a VM did not come up.
#[derive(Debug)]
pub struct BootError {
    /// The VM's id.
    pub id: String,
    /// QEMU's pid; 0 when it was not started.
    pub pid: i32,
    /// What was waited for.
    pub phase: Phase,
    /// How long the boot took until it failed.
    pub after: Duration,
    /// What QEMU wrote, and the guest's console.
    pub words: String,
    source: Box<dyn error::Error + Send + Sync>,
}

impl BootError {
    /// A VM that came up, but could not be published; it is destroyed.
    pub fn after_boot(vm: Vm, why: std::io::Error) -> BootError {
        let (id, pid) = (vm.id().to_string(), vm.pid());
        vm.destroy();
        let (after, words) = (Duration::ZERO, String::new());
        BootError { id, pid, phase: Phase::Ready, after, words, source: why.into() }
    }
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "boot of VM {}", self.id)?;
        if self.pid != 0 {
            write!(f, " (QEMU pid {})", self.pid)?;
        }
        write!(f, " failed after {:.1} s: {}", self.after.as_secs_f64(), self.phase)?;
        if !self.words.is_empty() {
            write!(f, "; {}", self.words)?;
        }
        Ok(())
    }
}

impl error::Error for BootError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&*self.source)
    }
}

/// Who will own a VM.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Purpose {
    /// The pool at this endpoint; it is paused when it is ready, if the
    /// configuration says so.
    Pool { endpoint: String },
    /// This process; with `leased`, the kernel ends QEMU when the thread that
    /// booted it ends.
    Own { leased: bool },
}

/// Boots a VM.
///
/// `started` is told of QEMU's process as soon as there is one, so that
/// another thread can watch or kill it. Blocks up to the boot deadline.
///
/// # Errors
/// [`BootError`], with nothing left behind.
pub fn boot(
    config: &Config,
    purpose: &Purpose,
    started: &mut dyn FnMut(&str, &Process),
) -> Result<Vm, BootError> {
    let spawned = Spawned::start(config, purpose)?;
    started(&spawned.ledger.id, &spawned.process);
    let pause = config.pause_idle() && matches!(purpose, Purpose::Pool { .. });
    spawned.connect()?.await_guest()?.settle(pause)
}

/// The clock of one boot.
#[derive(Clone, Copy)]
struct Clock {
    start: Instant,
    deadline: Instant,
}

impl Clock {
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
    }
}

type Source = Box<dyn error::Error + Send + Sync>;

/// QEMU runs.
struct Spawned {
    process: Process,
    dir: VmDir,
    ledger: Ledger,
    clock: Clock,
}

/// QEMU's monitor has answered.
struct Connected {
    spawned: Spawned,
    monitor: Qmp,
}

/// The guest's agent has answered.
struct Booted {
    connected: Connected,
    agent: KataAgent,
    address: Address,
}

impl Spawned {
    fn start(config: &Config, purpose: &Purpose) -> Result<Spawned, BootError> {
        let start = Instant::now();
        let clock = Clock { start, deadline: start + config.boot_timeout };
        let early = |id: &str, phase: Phase, source: Source| BootError {
            id: id.to_string(),
            pid: 0,
            phase,
            after: start.elapsed(),
            words: String::new(),
            source,
        };
        let (id, uuid) = identity::uuid()
            .and_then(|id| Ok((id, identity::uuid()?)))
            .map_err(|e| early("?", Phase::Directory, e.into()))?;
        let directory = |e: std::io::Error| {
            let text = format!("in {}: {e}", config.store().display());
            early(&id, Phase::Directory, text.into())
        };
        let dir = VmDir::create(&config.store(), &id).map_err(directory)?;
        let (endpoint, leased) = match purpose {
            Purpose::Pool { endpoint } => (endpoint.clone(), false),
            Purpose::Own { leased } => (String::new(), *leased),
        };
        let mut ledger = Ledger {
            id: id.clone(),
            state: State::Booting,
            pid: 0,
            start_time: 0,
            uuid,
            source: "direct".into(),
            cpus: config.cpus(),
            memory_mib: config.memory(),
            endpoint,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            owner: None,
        };
        ledger.write(dir.path()).map_err(directory)?;
        // Bound before QEMU starts, so there is no wait for it to appear.
        let monitor = UnixListener::bind(dir.monitor()).map_err(directory)?;
        let names = Names {
            id: &id,
            uuid: &ledger.uuid,
            dir: dir.path(),
            monitor: std::os::fd::AsRawFd::as_raw_fd(&monitor),
            host_memory: host_memory_mib(),
        };
        let args = argv(config, &names);
        let process = Process::spawn(&config.qemu(), &args, monitor.as_fd(), leased)
            .map_err(|e| early(&id, Phase::Spawn, e.into()))?;
        (ledger.pid, ledger.start_time) = (process.pid(), process.start_time());
        let written = ledger
            .write(dir.path())
            .and_then(|()| std::fs::write(dir.path().join("pid"), format!("{}\n", process.pid())));
        let spawned = Spawned { process, dir, ledger, clock };
        match written {
            Ok(()) => Ok(spawned),
            Err(e) => Err(spawned.failed(Phase::Directory, e.into(), "")),
        }
    }

    /// Ends it all and tells why.
    fn failed(mut self, phase: Phase, source: Source, console: &str) -> BootError {
        let after = self.clock.start.elapsed();
        // A QEMU that dies closes its sockets first.
        let died = self.process.wait(LAST_BREATH);
        self.process.kill();
        let mut words = match died {
            true => format!("QEMU ended by itself, {}", self.process.last_words()),
            false => format!("QEMU was still running, {}", self.process.last_words()),
        };
        if !console.trim().is_empty() {
            words.push_str(&format!("; the guest's console ended with: {}", console.trim()));
        }
        BootError {
            id: self.ledger.id.clone(),
            pid: self.process.pid(),
            phase,
            after,
            words,
            source,
        }
    }

    fn connect(self) -> Result<Connected, BootError> {
        match Qmp::connect(&self.dir.monitor(), self.clock.left()) {
            Ok(monitor) => Ok(Connected { spawned: self, monitor }),
            Err(e) => Err(self.failed(Phase::Monitor, e.into(), "")),
        }
    }
}

impl Connected {
    fn await_guest(self) -> Result<Booted, BootError> {
        let console = Console::open(&self.spawned.dir);
        let address = Address::Serial(self.spawned.dir.path().to_path_buf());
        let clock = self.spawned.clock;
        let agent = KataAgent::await_boot(&address, clock.left())
            .and_then(|agent| agent.check(clock.left()).map(|()| agent));
        let console = console.map(Console::close).unwrap_or_default();
        match agent {
            Ok(agent) => Ok(Booted { connected: self, agent, address }),
            Err(e) => Err(self.spawned.failed(Phase::Guest, e.into(), &console)),
        }
    }
}

impl Booted {
    fn settle(self, pause: bool) -> Result<Vm, BootError> {
        let Booted { connected: Connected { spawned, mut monitor }, agent, address } = self;
        if let Err(e) = identity::refresh(&agent) {
            return Err(spawned.failed(Phase::Identity, e.into(), ""));
        }
        // Its session must end before the VM stops, or the guest would hear of
        // that only when it runs again.
        drop(agent);
        if pause {
            if let Err(e) = monitor.pause() {
                return Err(spawned.failed(Phase::Ready, e.into(), ""));
            }
        }
        drop(monitor);
        let Spawned { process, dir, mut ledger, clock } = spawned;
        ledger.state = State::Ready;
        if let Err(e) = ledger.write(dir.path()) {
            let spawned = Spawned { process, dir, ledger, clock };
            return Err(spawned.failed(Phase::Ready, e.into(), ""));
        }
        // The monitor's socket was made by us: as private as QEMU makes its own.
        let private = std::fs::Permissions::from_mode(0o700);
        let _ = std::fs::set_permissions(dir.monitor(), private);
        Ok(Vm { process, dir, ledger, agent: address, paused: pause })
    }
}

/// Keeps the end of what a guest writes to its console while it boots.
struct Console {
    stream: UnixStream,
    tail: Arc<Mutex<Vec<u8>>>,
    reader: Worker<()>,
}

impl Console {
    /// `None` when it can not be had: a boot does not fail for that.
    fn open(dir: &VmDir) -> Option<Console> {
        let stream = UnixStream::connect(dir.console()).ok()?;
        let mut from = stream.try_clone().ok()?;
        let tail = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&tail);
        let reader = Worker::spawn("vmc-console", move || {
            let mut chunk = [0; 1024];
            while let Ok(n) = from.read(&mut chunk) {
                if n == 0 {
                    break;
                }
                let mut kept = kept.lock().unwrap_or_else(|e| e.into_inner());
                kept.extend_from_slice(&chunk[..n]);
                let over = kept.len().saturating_sub(KEPT_CONSOLE);
                kept.drain(..over);
            }
        })
        .ok()?;
        Some(Console { stream, tail, reader })
    }

    fn close(self) -> String {
        let _ = self.stream.shutdown(Shutdown::Both);
        let _ = self.reader.join(Duration::from_secs(1));
        let tail = self.tail.lock().unwrap_or_else(|e| e.into_inner());
        String::from_utf8_lossy(&tail).into_owned()
    }
}

/// The host's memory, MiB.
pub fn host_memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"));
    let kib: u64 = line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    kib / 1024
}
