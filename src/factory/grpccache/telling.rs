//! Measures that are on their way to the server, which nobody waits for.
//!
//! Invariant: a connection does not go before the answers to them are there, or
//! [`LONGEST`] has passed: its end would take them with it.

use std::time::Duration;

use crossbeam_channel::{bounded, Receiver, Sender};

/// No measure is worth more.
const LONGEST: Duration = Duration::from_secs(5);

/// All of one connection's.
pub struct Telling {
    /// One for each measure that is on its way, and this one; nothing is ever sent.
    on_its_way: Option<Sender<()>>,
    all_told: Receiver<()>,
}

impl Telling {
    pub fn new() -> Telling {
        let (on_its_way, all_told) = bounded(0);
        Telling { on_its_way: Some(on_its_way), all_told }
    }

    /// To be held until a measure is told, or has failed to be.
    pub fn another(&self) -> Option<Sender<()>> {
        self.on_its_way.clone()
    }
}

impl Drop for Telling {
    fn drop(&mut self) {
        drop(self.on_its_way.take());
        // Ends with an error, once the last of them has gone.
        let _ = self.all_told.recv_timeout(LONGEST);
    }
}
