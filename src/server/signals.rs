//! SIGTERM and SIGINT stop the server, SIGHUP and SIGUSR2 restart it in place, SIGUSR1 ends it and
//! leaves its VMs to the next one: events of the driver.
//!
//! Invariant: a signal that comes while the program is executed anew is the next program's:
//! before that nobody takes signals any more ([`Listening::stop`]), and those that are
//! pending outlive it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use nix::sys::signal::{kill, SigSet, Signal};
use nix::unistd::Pid;

use super::Again;
use crate::events::event;
use crate::factory::cache::pool::{Pool, Then};
use crate::worker::{self, Worker};

/// How long the thread that waits for signals may take to end.
const JOIN: Duration = Duration::from_secs(10);

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
    /// Starts the thread that waits for them. It ends with the process, or when it is
    /// stopped.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn forward(self, pool: &Arc<Pool>, again: Arc<Again>) -> Result<Listening, worker::Error> {
        let pool = Arc::clone(pool);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = Worker::spawn("vmc-signals", move || loop {
            let signal = self.0.wait();
            if stopped.load(Ordering::SeqCst) {
                // Those that came at the same time are the next program's.
                let mut others = Vec::new();
                let mut last = signal;
                while let Some(other) = last.ok().filter(|s| *s != Signal::SIGUSR2) {
                    others.push(other);
                    last = self.0.wait();
                }
                for signal in others {
                    let _ = raise_again(signal);
                }
                return;
            }
            match signal {
                // A configuration is taken up by a restart in place, if it is good.
                Ok(signal @ (Signal::SIGHUP | Signal::SIGUSR2)) => {
                    if let Err(why) = super::restart(&pool, &*again, signal.as_str()) {
                        event!(RESTART_REFUSED; "{why}; this server goes on");
                    }
                }
                // A supervisor's restart: the process that it starts then has the VMs.
                Ok(Signal::SIGUSR1) => super::leave(&pool, "SIGUSR1", Then::Next),
                Ok(signal) => super::stop(&pool, signal.as_str()),
                Err(e) => log::warn!("wait for signals: {e}"),
            }
        })?;
        Ok(Listening { stop, thread })
    }
}

/// It stays pending, since all of this process's threads block it.
fn raise_again(signal: Signal) -> nix::Result<()> {
    kill(Pid::this(), signal)
}

/// The thread that waits for signals.
pub struct Listening {
    stop: Arc<AtomicBool>,
    thread: Worker<()>,
}

impl Listening {
    /// From now on signals stay pending.
    pub fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        let woken = raise_again(Signal::SIGUSR2).map_err(io::Error::from);
        let ended = woken
            .map_err(|e| e.to_string())
            .and_then(|()| self.thread.join(JOIN).map_err(|e| e.to_string()));
        if let Err(e) = ended {
            log::warn!("stop taking signals: {e}");
        }
    }
}
