//! A cold boot, phase by phase; each phase consumes the one before.
//!
//! Invariants: one deadline for all of it; a failure at any point leaves
//! neither process nor directory, and says which phase did not come, after how
//! long, and what QEMU and the guest's console wrote.

mod attend;
mod failure;
mod guest;
mod open;

use std::error;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use attend::Seated;
pub use failure::{BootError, Phase};
use open::Opened;

use super::birth::{Birth, Watch};
use super::dir::VmDir;
use super::ledger::{Ledger, Owner, State};
use super::Vm;
use super::{identity, private, shape};
use crate::agent::Agent;
use crate::config::options::QEMU;
use crate::config::Config;
use crate::confine::Confinement;
use crate::host;
use crate::hypervisor::qemu::argv::{argv, Memory, Names};
use crate::hypervisor::qemu::balloon;
use crate::hypervisor::qemu::migrate;
use crate::hypervisor::qemu::qmp::Qmp;
use crate::process::attendant::Attendant;
use crate::process::Process;

/// How long a QEMU that has gone silent may take to be dead of itself.
const LAST_BREATH: Duration = Duration::from_millis(300);

/// How long a template's guest comes to rest before it is saved: Linux measures
/// its clock for one second before it trusts it.
const SETTLE: Duration = Duration::from_millis(1500);

/// Who will own a VM.
#[derive(Clone, Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Purpose {
    /// The pool at this endpoint, in which it will wait.
    Pool { endpoint: String },
    /// This process; with `leased`, the kernel ends QEMU when the thread that
    /// booted it ends; with `waits`, it is made as for a pool.
    Own { leased: bool, waits: bool },
}

impl Purpose {
    fn waits(&self) -> bool {
        matches!(self, Purpose::Pool { .. } | Purpose::Own { waits: true, .. })
    }
}

/// Boots a VM, which runs when this returns.
///
/// `watch` is told as it comes to be, so that another thread can watch or kill it.
/// Blocks up to the boot deadline.
///
/// # Errors
/// [`BootError`], with nothing left behind.
pub fn boot(config: &Config, purpose: &Purpose, watch: Watch<'_>) -> Result<Vm, BootError> {
    let connected = Spawned::start(config, purpose, Base::None, watch)?.connect()?;
    let mut guest = connected.await_guest(config)?;
    if purpose.waits() && config.flag(QEMU, "reclaim_guest_freed_memory") {
        guest = guest.give_back()?;
    }
    guest.settle()
}

/// Boots a VM to be a template: its memory in the file `memory`, its device
/// state written into `state`, and itself gone when this returns.
///
/// It has no identity: each clone gets its own. `warm` is what its guest does
/// before, so that no clone needs to; it is told whether the agent is vmcache's own.
/// Gives QEMU's version.
///
/// # Errors
/// [`BootError`]; the files are then of no use.
pub fn boot_template(
    config: &Config,
    memory: &File,
    state: &File,
    warm: &dyn Fn(&dyn Agent, bool),
    watch: Watch<'_>,
) -> Result<String, BootError> {
    let purpose = Purpose::Own { leased: true, waits: false };
    let base = Base::Template(memory);
    let guest = Spawned::start(config, &purpose, base, watch)?.connect()?.await_guest(config)?;
    let spawned = &guest.connected.spawned;
    warm(&*spawned.agent, spawned.ledger.own_agent);
    guest.save(state)
}

/// What a clone starts from.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// The template's memory, shared until it is written to.
    pub memory: &'a File,
    /// The kernel's head, where it has one ([`crate::hypervisor::qemu::bzimage`]).
    pub head: Option<&'a File>,
    /// Read from its beginning, says where the template stood.
    pub state: &'a File,
}

/// Starts a clone of a template, which runs when this returns.
///
/// # Errors
/// [`BootError`], with nothing left behind.
pub fn boot_clone(
    config: &Config,
    purpose: &Purpose,
    origin: Origin<'_>,
    watch: Watch<'_>,
) -> Result<Vm, BootError> {
    let spawned = Spawned::start(config, purpose, Base::Clone(origin), watch)?;
    spawned.connect()?.load(origin.state)?.await_guest(config)?.settle()
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

/// What a VM starts from.
#[derive(Clone, Copy)]
enum Base<'a> {
    /// Nothing: it boots.
    None,
    /// Nothing, but its memory will be a template's: this file.
    Template(&'a File),
    /// A template.
    Clone(Origin<'a>),
}

/// QEMU runs.
struct Spawned {
    process: Process,
    attendants: Vec<Attendant>,
    dir: VmDir,
    ledger: Ledger,
    clock: Clock,
    agent: Box<dyn Agent>,
}

/// QEMU's monitor has answered.
struct Connected {
    spawned: Spawned,
    monitor: Qmp,
}

/// The guest's agent has answered.
struct Booted {
    connected: Connected,
}

impl Spawned {
    fn start(
        config: &Config,
        purpose: &Purpose,
        base: Base<'_>,
        watch: Watch<'_>,
    ) -> Result<Spawned, BootError> {
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
        watch(Birth::Begins);
        let (endpoint, leased) = match purpose {
            Purpose::Pool { endpoint } => (endpoint.clone(), false),
            Purpose::Own { leased, .. } => (String::new(), *leased),
        };
        let mut ledger = Ledger {
            id: id.clone(),
            state: State::Booting,
            pid: 0,
            start_time: 0,
            uuid,
            source: if matches!(base, Base::Clone(_)) { "template" } else { "direct" }.into(),
            cpus: config.cpus(),
            memory_mib: config.memory(),
            endpoint,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            owner: match purpose {
                Purpose::Pool { .. } => None,
                Purpose::Own { leased, .. } => Some(Owner::this_process(*leased)),
            },
            label: String::new(),
            agent: config.agent_kind,
            cid: None,
            agent_url: String::new(),
            own_agent: true,
            attendants: Vec::new(),
            shape: shape::shape(config),
            build: shape::build(config),
            by: None,
        };
        let dir = VmDir::create(&config.store(), &id, |dir| ledger.write(dir));
        let dir = dir.map_err(directory)?;
        let confinement = Confinement::of(config, &id, dir.path())
            .map_err(|e| early(&id, Phase::Confinement, e.into()))?;
        if config.shares_9p() || config.shares_virtiofs() {
            dir.share().map_err(directory)?;
        }
        let seated = Seated::take(config, dir.path());
        let Seated { agent, channels, vsock } =
            seated.map_err(|e| early(&id, Phase::Directory, e))?;
        ledger.cid = vsock.as_ref().map(|(cid, _)| *cid);
        ledger.agent_url = agent.agent_url();
        ledger.write(dir.path()).map_err(directory)?;
        let attendants = attend::before_qemu(config, &channels, &confinement, leased, clock.left());
        let attendants = attendants.map_err(|e| early(&id, Phase::Attendant, e))?;
        ledger.attendants = attendants.iter().map(Attendant::record).collect();
        if !attendants.is_empty() {
            ledger.write(dir.path()).map_err(directory)?;
        }
        let opened = Opened::of(config, &dir, &channels, &base, vsock.map(|(_, file)| file));
        let opened = opened.map_err(|e| early(&id, Phase::Directory, e))?;
        let names = Names {
            id: &id,
            uuid: &ledger.uuid,
            dir: dir.path(),
            passed: opened.passed(),
            host_memory: host::memory_mib(),
            memory: match base {
                Base::None => Memory::Own,
                Base::Template(file) => Memory::Template(file.as_raw_fd()),
                Base::Clone(o) => Memory::Clone {
                    memory: o.memory.as_raw_fd(),
                    head: o.head.map(File::as_raw_fd),
                },
            },
            channels: &channels,
        };
        let args = argv(config, &names);
        let mut inherited = opened.fds();
        match base {
            Base::None => {}
            Base::Template(file) => inherited.push(file.as_fd()),
            Base::Clone(o) => {
                inherited.extend(o.head.into_iter().chain([o.memory]).map(File::as_fd))
            }
        }
        let cage = match base {
            Base::None => confinement.qemu(None),
            Base::Template(file) => {
                confinement.own(file).and_then(|()| confinement.qemu(Some(file)))
            }
            Base::Clone(o) => confinement.qemu(Some(o.memory)),
        };
        let cage = cage.map_err(|e| early(&id, Phase::Confinement, e.into()))?;
        let process = Process::spawn(&config.qemu(), &args, &inherited, leased, cage)
            .map_err(|e| early(&id, Phase::Spawn, e.into()))?;
        (ledger.pid, ledger.start_time) = (process.pid(), process.start_time());
        let written = ledger.write(dir.path()).and_then(|()| {
            private::replace(dir.path(), "pid", format!("{}\n", process.pid()).as_bytes())
        });
        let spawned = Spawned { process, attendants, dir, ledger, clock, agent };
        let Spawned { ledger, dir, process, .. } = &spawned;
        watch(Birth::Runs { id: &ledger.id, dir: dir.path(), qemu: process });
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
    fn load(mut self, state: &File) -> Result<Connected, BootError> {
        let within = self.spawned.clock.left();
        let loaded = migrate::load(&mut self.monitor, state.as_fd(), within);
        match loaded.and_then(|()| self.monitor.resume()) {
            Ok(()) => Ok(self),
            Err(e) => Err(self.spawned.failed(Phase::State, e.into(), "")),
        }
    }
}

/// Lets a guest come to rest. Nothing tells when a kernel has done what it put off
/// at boot; that it has is no more than a matter of speed.
fn settle_down(monitor: &mut Qmp) {
    let until = Instant::now() + SETTLE;
    while monitor.next_event("nothing", until, SETTLE).is_ok() {}
}

impl Booted {
    fn save(self, state: &File) -> Result<String, BootError> {
        let Booted { connected: Connected { mut spawned, mut monitor } } = self;
        // A session that is open now would be open in every clone, and what the guest
        // still has to do, for its end and for its boot, each of them would do.
        spawned.agent.disconnect();
        spawned.attendants.clear();
        settle_down(&mut monitor);
        let within = spawned.clock.left();
        let saved =
            monitor.pause().and_then(|()| migrate::save(&mut monitor, state.as_fd(), within));
        match saved {
            Ok(()) => Ok(monitor.version().to_string()),
            Err(e) => Err(spawned.failed(Phase::State, e.into(), "")),
        }
    }

    fn give_back(mut self) -> Result<Booted, BootError> {
        let within = self.connected.spawned.clock.left();
        match balloon::give_back(&mut self.connected.monitor, within) {
            Ok(bytes) => {
                let id = &self.connected.spawned.ledger.id;
                log::debug!("VM {id} gave {} MiB back to the host", bytes >> 20);
                Ok(self)
            }
            Err(e) => Err(self.connected.spawned.failed(Phase::Ready, e.into(), "")),
        }
    }

    fn settle(self) -> Result<Vm, BootError> {
        let Booted { connected: Connected { mut spawned, monitor } } = self;
        if let Err(e) = identity::give(&*spawned.agent, &spawned.ledger) {
            return Err(spawned.failed(Phase::Identity, e.into(), ""));
        }
        spawned.agent.disconnect();
        drop(monitor);
        spawned.ledger.state = State::Ready;
        if let Err(e) = spawned.ledger.write(spawned.dir.path()) {
            return Err(spawned.failed(Phase::Ready, e.into(), ""));
        }
        let Spawned { process, attendants, dir, ledger, agent, .. } = spawned;
        let address = agent.address().clone();
        Ok(Vm { process, attendants, dir, ledger, agent: address, paused: false })
    }
}
