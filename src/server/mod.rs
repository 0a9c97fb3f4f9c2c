//! The daemon: a pool, and the socket by which its VMs leave.
//!
//! ```text
//! signals ──► driver ◄── service (gRPC threads) ◄── listener (accepts, knows peers)
//! ```
//!
//! Order of starting: lock, sweep, pool, listener, READY. Order of stopping:
//! the driver first (it answers claims and destroys what was not handed out),
//! then the socket goes, then gRPC, then the lock.
//!
//! Invariants: one server for an endpoint; when [`serve`] returns, its socket
//! and all VMs that were not handed out are gone.

pub mod listener;
pub mod notify;
pub mod service;
pub mod signals;
pub mod sweep;

use std::error;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use grpcio::{ChannelBuilder, EnvBuilder, ResourceQuota, ServerBuilder};

use crate::config::{self, Config};
use crate::factory::cache::driver::Driver;
use crate::factory::cache::pool::{Event, Pool};
use crate::worker::{self, Worker};
use listener::{Lock, Peers};

/// How long the driver may take to stop.
const STOP: Duration = Duration::from_secs(60);
/// How long the other threads may.
const JOIN: Duration = Duration::from_secs(5);
/// Memory that gRPC may take for connections' buffers, in bytes.
const RPC_MEMORY: usize = 8 * 1024 * 1024;
/// Largest request taken, in bytes: all of Kata's are empty.
const MAX_REQUEST: i32 = 64 * 1024;

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
            Error::Store { source, .. } => Some(source),
            Error::Rpc(_) => None,
        }
    }
}

/// Runs a server until a signal or Quit stops it.
///
/// # Errors
/// When it can not start; nothing is then left behind.
pub fn serve(config: Config) -> Result<(), Error> {
    config.check_files().map_err(Error::Config)?;
    for line in &config.warnings {
        log::warn!("{line}");
    }
    // Before any thread, so that all of them leave the signals to one.
    let signals = signals::block().map_err(|e| Error::Rpc(e.to_string()))?;
    let endpoint = config.endpoint();
    let lock = Lock::take(&endpoint).map_err(Error::Listen)?;
    let store = config.store();

    let config = Arc::new(config);
    let (pool, ends) = Pool::new();
    let mut driver = Driver::new(&config, &pool, ends).map_err(Error::Thread)?;
    let handed = sweep::sweep(&store, &endpoint);
    let handed = handed.map_err(|source| Error::Store { path: store, source })?;
    handed.into_iter().for_each(|vm| driver.inherit(vm));
    let peers = Peers::default();
    let environment = Arc::new(EnvBuilder::new().cq_count(1).name_prefix("vmc-rpc").build());
    let arguments = ChannelBuilder::new(Arc::clone(&environment))
        .set_resource_quota(ResourceQuota::new(Some("vmcache")).resize_memory(RPC_MEMORY))
        .max_receive_message_len(MAX_REQUEST)
        .http2_bdp_probe(false)
        .build_args();
    let server = ServerBuilder::new(Arc::clone(&environment))
        .channel_args(arguments)
        .register_service(service::cache(&config, &pool, &peers))
        .register_service(service::control(&config, &pool))
        .build()
        .map_err(|e| Error::Rpc(e.to_string()))?;
    let accepting = lock
        .listen(&config)
        .and_then(|socket| listener::accept(socket, server, peers))
        .map_err(Error::Listen)?;
    signals.forward(&pool).map_err(Error::Thread)?;
    let driver = Worker::spawn("vmc-pool", move || driver.run()).map_err(Error::Thread)?;
    log::info!(
        "server-started: {} VMs of {} CPUs and {} MiB will be kept ready at {}",
        config.pool,
        config.cpus(),
        config.memory(),
        endpoint.display()
    );
    notify::state(&format!("READY=1\nSTATUS=filling a pool of {} VMs", config.pool));

    // The one wait of the main thread: the driver ends by signal, Quit, or a panic.
    let _ = driver.done().recv();
    notify::state("STOPPING=1");
    pool.close();
    let why = match driver.join(STOP) {
        Ok(why) => why,
        Err(e) => {
            log::error!("{e}; VMs that were not handed out are swept at the next start");
            "a fault".into()
        }
    };
    log::info!("server-stopping: {why}");
    let served = accepting.stop(JOIN);
    if let Some(mut server) = served {
        // Answers that are on their way arrive; calls that still wait are cancelled.
        let finished = server.shutdown();
        server.cancel_all_calls();
        let _ = Worker::spawn("vmc-shutdown", move || futures_executor::block_on(finished))
            .and_then(|w| w.join(JOIN).map(|_| ()));
        drop(server);
    }
    lock.release();
    log::info!("server-stopped");
    Ok(())
}

/// Tells the driver to stop.
pub fn stop(pool: &Pool, why: &str) {
    pool.tell(Event::Stop { why: why.to_string() });
}
