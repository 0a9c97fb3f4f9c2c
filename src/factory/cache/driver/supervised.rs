//! What a supervisor is told by the pool's own loop: that it turns, and what it holds.

use std::time::{Duration, Instant};

use super::Driver;
use crate::notify;
use crate::vm::ledger::State;

/// Between two words on what the pool holds.
const WORDS: Duration = Duration::from_secs(1);

/// What it has been told, and when that was last looked at.
pub(super) struct Supervised {
    /// How often the loop has to turn; none when nobody asked.
    watchdog: Option<Duration>,
    beat: Instant,
    words: bool,
    told: (String, Option<Instant>),
}

impl Supervised {
    pub(super) fn new() -> Supervised {
        let (watchdog, words) = (notify::watchdog(), notify::wanted());
        Supervised { watchdog, beat: Instant::now(), words, told: (String::new(), None) }
    }

    /// Says that the loop turns, when it is time; when it is next.
    fn beat_at(&mut self, now: Instant) -> Option<Instant> {
        let every = self.watchdog?;
        if self.beat <= now {
            notify::state("WATCHDOG=1");
            self.beat = now + every;
        }
        Some(self.beat)
    }
}

impl Driver {
    /// Tells what there is to be told; when there is more.
    pub(super) fn supervisor_at(&mut self, now: Instant) -> Option<Instant> {
        let beat = self.supervised.beat_at(now);
        if !self.supervised.words {
            return beat;
        }
        let sooner = |due: Instant| Some(beat.map_or(due, |beat| beat.min(due)));
        let due = self.supervised.told.1.map_or(now, |at| at + WORDS);
        if due > now {
            return sooner(due);
        }
        // Put together once a second at most: this is asked after each event.
        let text = self.in_words();
        let (told, at) = &mut self.supervised.told;
        *at = Some(now);
        if *told != text {
            if !notify::state(&format!("STATUS={text}")) {
                return sooner(now + WORDS);
            }
            *told = text;
        }
        beat
    }

    /// A line for `systemctl status`.
    fn in_words(&self) -> String {
        let facts = self.pool.board.facts();
        let count = |s: State| facts.vms.values().filter(|v| v.state == s).count();
        let mut text = format!("{} of {} VMs ready", count(State::Ready), facts.target);
        let mut also = |n: usize, what: &str| {
            if n > 0 {
                text.push_str(&format!(", {n} {what}"));
            }
        };
        also(facts.making, "being made");
        also(count(State::Handed), "handed out");
        also(self.outdated(), "of an older configuration");
        also(facts.waiting, "claims waiting");
        if let Some(held) = &facts.held {
            text.push_str(&format!("; {held}"));
        } else if self.policy.failures() > 0 {
            text.push_str("; the last boot failed, see the log");
        }
        text
    }
}
