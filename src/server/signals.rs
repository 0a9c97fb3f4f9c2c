//! SIGTERM and SIGINT stop the server, SIGHUP and SIGUSR2 restart it in place, SIGUSR1 ends it and
//! leaves its VMs to the next one: events of the driver.

use std::io;
use std::sync::Arc;

use nix::sys::signal::Signal::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use nix::sys::signal::{SigSet, Signal};

use super::Again;
use crate::factory::cache::pool::{Pool, Then};
use crate::worker::{self, Worker};

/// The signals that are waited for.
pub struct Signals(SigSet);

/// Blocks them in this thread and those it will start.
///
/// # Errors
/// As pthread_sigmask(3).
pub fn block() -> io::Result<Signals> {
    let mut set = SigSet::empty();
    for signal in [SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(Signals(set))
}

impl Signals {
    /// Starts the thread that waits for them. It ends with the process.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn forward(self, pool: &Arc<Pool>, again: Arc<Again>) -> Result<(), worker::Error> {
        let pool = Arc::clone(pool);
        Worker::spawn("vmc-signals", move || loop {
            match self.0.wait() {
                // A configuration is taken up by a restart in place, if it is good.
                Ok(signal @ (Signal::SIGHUP | Signal::SIGUSR2)) => {
                    if let Err(why) = super::restart(&pool, &*again, signal.as_str()) {
                        log::error!("restart-refused: {why}; this server goes on");
                    }
                }
                // A supervisor's restart: the process that it starts then has the VMs.
                Ok(Signal::SIGUSR1) => super::leave(&pool, "SIGUSR1", Then::Next),
                Ok(signal) => super::stop(&pool, signal.as_str()),
                Err(e) => log::warn!("wait for signals: {e}"),
            }
        })
        .map(|_| ())
    }
}
