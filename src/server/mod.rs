//! The daemon: a pool, and the socket by which its VMs leave.
//!
//! ```text
//! signals ──► driver ◄── service (gRPC's thread) ◄─┬───────── listener (accepts, knows peers)
//!                                                  └─ relay ◄─┘ all but root and this user
//! ```
//!
//! Order of starting: lock, sweep (which keeps what can be kept), pool, listener,
//! READY. Order of stopping: the driver first (it answers claims and destroys what
//! was not handed out), then the socket goes, then gRPC, then the relay, which passes
//! gRPC's last words on, then the lock. A restart
//! does the same, but leaves VMs, lock and socket to the program that it executes.
//!
//! Invariants: one server for an endpoint; when [`serve`] returns without an error,
//! its socket and all VMs that were not handed out are gone.

pub mod adopt;
pub mod answers;
pub mod claim;
pub mod control;
pub mod handover;
pub mod listener;
pub mod numbers;
pub mod panics;
pub mod peers;
pub mod relay;
pub mod rpc;
pub mod service;
pub mod signals;
pub mod sweep;

use std::error;
use std::fmt;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Duration;

use crate::config::options::OURS;
use crate::config::{self, Config};
use crate::confine::admission::Admission;
use crate::confine::{self, capabilities};
use crate::events::{event, limit};
use crate::factory::cache::driver::Driver;
use crate::factory::cache::pool::{Event, Pool, Stop, Target, Then};
use crate::factory::cache::quota;
use crate::notify;
use crate::process::reap_all;
use crate::stuck;
use crate::sys::process::{file_limit, raise_file_limit};
use crate::worker::{self, Worker};
use handover::{Given, Inherited};
use listener::{Entrance, Lock};
use numbers::Ranges;
use peers::Peers;
use relay::gate::Gate;
use relay::limits::Limits;
use relay::Relay;
use rpc::{Servers, Services};

/// How long the driver may take to stop.
const STOP: Duration = Duration::from_secs(60);
/// How long the other threads may.
const JOIN: Duration = Duration::from_secs(5);
/// How long answers that are on their way may take, and clients with the connections that
/// they have been told to end.
const ANSWERS: Duration = Duration::from_secs(1);
/// Why the server does not run.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The configuration can not work.
    Config(config::Error),
    /// The endpoint can not be had.
    Listen(listener::Error),
    /// No thread.
    Thread(worker::Error),
    /// The run directory can not be used.
    Store { path: std::path::PathBuf, source: io::Error },
    /// gRPC did not start.
    Rpc(String),
    /// The program could not be executed again.
    Restart(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Config(_) => f.write_str("configure the server"),
            Error::Listen(_) => f.write_str("open the server's socket"),
            Error::Thread(_) => f.write_str("start the server"),
            Error::Store { path, .. } => write!(
                f,
                "use vm_store_path {}: it must be a directory that this user can write",
                path.display()
            ),
            Error::Restart(_) => f.write_str(
                "restart: this server has ended, and left its VMs; `vmcache serve` takes them over",
            ),
            Error::Rpc(text) => write!(f, "start gRPC: {text}"),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Config(e) => Some(e),
            Error::Listen(e) => Some(e),
            Error::Thread(e) => Some(e),
            Error::Store { source, .. } | Error::Restart(source) => Some(source),
            Error::Rpc(_) => None,
        }
    }
}

/// Runs a server until a signal or Quit stops it. `again` is asked before a restart,
/// which executes the same program with the same arguments. From here on, a panic of any
/// thread ends the process.
///
/// # Errors
/// When it can not start, with nothing left behind; or not restart, when VMs are left
/// for the next server.
pub fn serve(config: Config, again: Arc<Again>) -> Result<(), Error> {
    let program = handover::program().map_err(Error::Restart)?;
    config.check_host().map_err(Error::Config)?;
    let admission =
        Admission::of(&config).map_err(|(key, why)| Error::Config(config.wrong(OURS, key, why)))?;
    for line in config.warnings.iter().chain(&config.check_user().map_err(Error::Config)?) {
        log::warn!("{line}");
    }
    panics::end_the_process();
    if let Err(e) = raise_file_limit() {
        log::warn!("raise the limit of open files: {e}");
    }
    if let Err(e) = capabilities::keep_the_servers() {
        log::warn!("drop what capabilities a server does not need: {e}");
    }
    if config.flag(OURS, "confine") && !confine::files::possible() {
        log::warn!("this kernel has no Landlock: QEMU may open what its user may");
    }
    // Before any thread, so that all of them leave the signals to one.
    let signals = signals::block().map_err(|e| Error::Rpc(e.to_string()))?;
    let endpoint = config.endpoint();
    let inherited = Inherited::take(&endpoint);
    let mut inherited = inherited.map_err(|why| Error::Listen(listener::Error::Passed { why }))?;
    let lock = match inherited.as_mut().and_then(|i| i.lock.take()) {
        Some(lock) => {
            // Children that ended while nobody looked, and are in no ledger any more.
            reap_all();
            Lock::inherit(&endpoint, lock)
        }
        None => Lock::take(&endpoint),
    };
    let lock = lock.map_err(Error::Listen)?;
    let store = config.store();

    let config = Arc::new(config);
    let (pool, ends) = Pool::new(quota::Limits::of(&config));
    let mut driver = Driver::new(&config, &pool, ends).map_err(Error::Thread)?;
    let changed = inherited.as_ref().and_then(|i| i.target);
    if let Some(target) = changed {
        // Before VMs are taken over: for as many there is room.
        driver.set_target(target, "the server before");
    }
    let kept = sweep::sweep(&config);
    let kept = kept.map_err(|source| Error::Store { path: store, source })?;
    kept.handed.into_iter().for_each(|vm| driver.inherit(vm));
    kept.ready.into_iter().for_each(|ready| driver.adopt(ready, false));
    kept.outdated.into_iter().for_each(|ready| driver.adopt(ready, true));
    let peers = Peers::new(Ranges::within(file_limit()));
    let strangers = Limits::strangers(&config);
    let services = Services { config: &config, pool: &pool, peers: &peers, again: &again };
    let Servers { direct, relayed } = Servers::start(&services, &strangers).map_err(Error::Rpc)?;
    let claimers = Limits::claimers(&config);
    let gate = Gate::new(claimers.connects, strangers.connects);
    let relay = Relay::start(claimers, strangers, &peers, Box::new(relayed.clone()));
    let relay = relay.map_err(Error::Thread)?;
    let entrance = Entrance { direct, door: relay.door(), gate, admission, peers };
    let units = inherited.as_ref().is_some_and(|i| i.units);
    let accepting = socket(&lock, inherited, &config)
        .and_then(|socket| listener::accept(socket, entrance))
        .map_err(Error::Listen)?;
    let listening = signals.forward(&pool, again).map_err(Error::Thread)?;
    let driver = Worker::spawn("vmc-pool", move || driver.run()).map_err(Error::Thread)?;
    event!(
        SERVER_STARTED;
        "{} VMs of {} CPUs and {} MiB will be kept ready at {}",
        config.pool,
        config.cpus(),
        config.memory(),
        endpoint.display()
    );
    // What it holds, the driver tells.
    notify::state("READY=1");

    // The one wait of the main thread: the driver ends by signal, Quit, or a panic.
    stuck::watch(driver.done(), |stuck| pool.board.facts().stuck = stuck);
    pool.close();
    let Stop { why, then } = match driver.join(STOP) {
        Ok(stop) => stop,
        Err(e) => {
            log::error!("{e}; VMs that were not handed out are swept at the next start");
            Stop { why: "a fault".into(), then: Then::End }
        }
    };
    match then {
        Then::Again => notify::reloading(),
        Then::End | Then::Next => notify::state("STOPPING=1"),
    };
    event!(SERVER_STOPPING; "{why}");
    let (direct, socket) = accepting.stop(JOIN);
    relay.close();
    rpc::shut_down(direct, &relayed, ANSWERS, JOIN);
    relay.end(ANSWERS, JOIN);
    if then == Then::Again {
        listening.stop();
    }
    match then {
        Then::End => {}
        _ if pool.ending() => sweep::end_ready(&config),
        Then::Again => {
            limit::say_rest(true);
            event!(SERVER_RESTARTING; "executing {}", program.display());
            let target = Some(pool.target()).filter(|t| *t != Target::Keep(config.pool));
            let (lock, socket) = (lock.file(), &socket.into());
            let given = Given { lock, socket, units, target };
            return Err(Error::Restart(handover::execute(&program, &given)));
        }
        Then::Next => {
            event!(SERVER_STOPPED; "its VMs are the next server's");
            return Ok(());
        }
    }
    notify::forget();
    lock.release(units);
    limit::say_rest(true);
    event!(SERVER_STOPPED; "nothing is left but what clients have");
    Ok(())
}

/// The socket that was passed, or a new one; where it is not a unit's, systemd is to
/// keep it.
fn socket(
    lock: &Lock,
    inherited: Option<Inherited>,
    config: &Config,
) -> Result<UnixListener, listener::Error> {
    match inherited {
        Some(Inherited { socket, units: true, .. }) => Ok(socket),
        // Who passed it keeps it already.
        Some(Inherited { socket, .. }) => lock.permit(config).map(|()| socket),
        None => lock.listen(config).inspect(notify::store),
    }
}

/// Whether a test wants a server such as Kata's, which has no calls of ours.
fn katas_calls_only() -> bool {
    #[cfg(feature = "faults")]
    return crate::faults::asked("katas-calls-only");
    #[cfg(not(feature = "faults"))]
    false
}

/// Tells the driver to stop.
pub fn stop(pool: &Pool, why: &str) {
    // Also when a restart is under way, which then is none.
    pool.end();
    pool.tell(Event::Stop(Stop { why: why.to_string(), then: Then::End }));
}

/// Asked before a restart: whether a server that is started now would come up.
pub type Again = dyn Fn() -> Result<(), String> + Send + Sync;

/// Tells the driver to stop for a restart in place, unless that would fail.
///
/// # Errors
/// Why it would, a sentence; nothing has changed then.
pub fn restart(pool: &Pool, again: &Again, why: &str) -> Result<(), String> {
    again()?;
    leave(pool, why, Then::Again);
    Ok(())
}

/// Tells the driver to stop, and to leave its VMs to what comes then.
fn leave(pool: &Pool, why: &str, then: Then) {
    pool.tell(Event::Stop(Stop { why: format!("restart: {why}"), then }));
}
