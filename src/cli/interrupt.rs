//! A copy's end by a signal: what is half written goes, the guest's side is told, and this
//! process ends with the signal's exit code.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::after;
use nix::sys::signal::{SigSet, Signal};

use super::output::{Failure, FAILED};
use crate::sys::signal::is_ignored;
use crate::tree::Stop;
use crate::worker::Worker;

/// Signals by which a user means: end.
const ENDING: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
/// How long the guest may be waited for after one.
const GUEST: Duration = Duration::from_secs(3);

/// Signals of this process, taken over.
pub struct Interrupt {
    /// What a signal ends.
    pub stop: Arc<Stop>,
    came: Arc<OnceLock<Signal>>,
}

impl Interrupt {
    /// Takes the signals over; before any other thread is started.
    pub fn take() -> Result<Interrupt, Failure> {
        let failed = |e: String| Failure::new(FAILED, format!("take signals: {e}"));
        // What is ignored stays so, as by any program.
        let caught = ENDING.into_iter().filter(|signal| !is_ignored(*signal as i32));
        let signals: SigSet = caught.collect();
        signals.thread_block().map_err(|e| failed(e.to_string()))?;
        let taken = Interrupt { stop: Arc::default(), came: Arc::default() };
        let (stop, came) = (Arc::clone(&taken.stop), Arc::clone(&taken.came));
        Worker::spawn("vmc-signals", move || {
            let Ok(signal) = signals.wait() else { return };
            let _ = came.set(signal);
            stop.ask();
            // A guest that answers lets the copy end by itself before.
            let _ = after(GUEST).recv();
            std::process::exit(code(signal).into());
        })
        .map_err(|e| failed(e.to_string()))?;
        Ok(taken)
    }

    /// The exit code of the signal that came, if one did.
    pub fn code(&self) -> Option<u8> {
        self.came.get().map(|signal| code(*signal))
    }
}

fn code(signal: Signal) -> u8 {
    128u8.saturating_add(signal as u8)
}
