//! Calls that are made again: of a server that restarts, or whose connection broke.
//!
//! Invariants: a call is made again only where nothing is lost by making it twice, or
//! where the server said that it did nothing; never after the caller's time is over.

use std::time::{Duration, Instant};

use crossbeam_channel::after;

use super::{Error, GrpcCache};
use crate::factory::cache::pool::{DRAINED, RESTARTING, STOPPING};

/// Pause before a server that is about to restart is asked again: it still has to end
/// what it was making.
const AGAIN: Duration = Duration::from_millis(5);
/// How often a call is made again whose connection broke.
const MOST_TRIES: u32 = 4;
/// Pause before the first of that; each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

impl GrpcCache {
    /// Asks a server that restarts again, as long as there is time. `broken`: also when
    /// the connection broke, since nothing is lost by asking twice.
    pub(super) fn patiently<T>(
        &self,
        within: Option<Duration>,
        broken: bool,
        ask: impl Fn(&GrpcCache, Instant, Option<Duration>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let since = Instant::now();
        let mut answer = ask(self, since, within);
        let mut tries = 0;
        while let Err(Error::Stopping { text, .. }) = &answer {
            let pause = match text.as_str() {
                STOPPING | DRAINED => break,
                RESTARTING => AGAIN,
                // A server may be going, or may not want this client.
                _ if !broken || tries == MOST_TRIES => break,
                _ => {
                    tries += 1;
                    FIRST_PAUSE * (1 << (tries - 1))
                }
            };
            let left = within.map(|w| w.saturating_sub(since.elapsed() + pause));
            if left == Some(Duration::ZERO) {
                break;
            }
            let _ = after(pause).recv();
            // Its socket has stayed: who connects waits for the next one to accept.
            let again = GrpcCache::connect(&self.endpoint)?;
            let again = GrpcCache { lease: self.lease, ..again };
            answer = ask(&again, since, left);
        }
        answer
    }
}
