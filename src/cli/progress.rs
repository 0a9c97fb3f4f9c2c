//! A line that tells a person what is being waited for; silent in a pipe.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, RecvTimeoutError, Sender};

use super::print;
use crate::worker::Worker;

/// Until something takes long.
const QUIET: Duration = Duration::from_secs(2);
/// Between two changes of the line.
const STEP: Duration = Duration::from_millis(500);

/// Shows what is waited for, until it is dropped.
pub struct Progress {
    thread: Option<(Sender<()>, Worker<()>)>,
}

impl Progress {
    /// Shows `what` with the seconds that passed, from the second on.
    pub fn start(what: &str) -> Progress {
        if !io::stderr().is_terminal() {
            return Progress { thread: None };
        }
        let what = what.to_string();
        // Never filled: closing it is what ends the thread.
        let (stop, stopped) = bounded::<()>(1);
        let thread = Worker::spawn("vmc-progress", move || {
            let since = Instant::now();
            let mut wait = QUIET;
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(wait) {
                print::progress(&format!("{what} … {:.0} s", since.elapsed().as_secs_f64()));
                wait = STEP;
            }
            if wait == STEP {
                print::progress("");
            }
        });
        Progress { thread: thread.ok().map(|t| (stop, t)) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            let _ = thread.join(Duration::from_secs(1));
        }
    }
}
