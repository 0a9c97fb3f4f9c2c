//! How many lines of the same kind the log takes: so many a second, and then their number.
//!
//! A kind is an event's name, or the beginning of a text that is none's, and what the peer may
//! do who brought it about: strangers' refusals take no line from anybody else's. Invariants:
//! each line is said or counted, and what was counted is said when its second is over, or with
//! the next of its kind; nothing wakes for it where nothing was counted; at most `MAX_KINDS`
//! kinds are kept apart.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, Receiver, Sender};
use log::Level;

/// Lines of a kind in a [`SECOND`].
pub const LINES: u32 = 10;
/// The time for which they count.
pub const SECOND: Duration = Duration::from_secs(1);
/// Kinds that are kept apart; all others are one.
const MAX_KINDS: usize = 256;
/// Characters of a text that make its kind.
const BEGINNING: usize = 24;
/// The target of what is said here, which counts nowhere.
pub const TARGET: &str = "vmcache::events::limit";

/// A kind of lines.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    /// The event, or the beginning of a text.
    pub name: String,
    /// Whether it is an event.
    pub event: bool,
    /// The peer's class; empty for no peer.
    pub peer: String,
}

impl Kind {
    /// An event's.
    pub fn event(name: &str, peer: &str) -> Kind {
        Kind { name: name.into(), event: true, peer: peer.into() }
    }

    /// A text's: its first words, without what numbers follow.
    pub fn text(text: &str, peer: &str) -> Kind {
        let name = text.chars().take(BEGINNING).take_while(|c| !c.is_ascii_digit()).collect();
        Kind { name, event: false, peer: peer.into() }
    }

    fn other() -> Kind {
        Kind::text("messages of many kinds", "")
    }
}

/// Lines that were counted and not said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Their kind.
    pub kind: Kind,
    /// How many.
    pub lines: u64,
    /// The worst of their levels.
    pub level: Level,
}

/// Whether a line is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is; after this, if there is something.
    Say(Option<Rest>),
    /// It is counted.
    Count,
}

#[derive(Debug)]
struct Window {
    since: Duration,
    said: u32,
    more: u64,
    level: Level,
}

/// Counts.
#[derive(Debug, Default)]
pub struct Limiter {
    windows: HashMap<Kind, Window>,
}

impl Limiter {
    /// A line of this kind comes, at this time after some beginning.
    pub fn ask(&mut self, kind: Kind, level: Level, now: Duration) -> Verdict {
        let over = |w: &Window| now.saturating_sub(w.since) >= SECOND;
        if self.windows.len() >= MAX_KINDS && !self.windows.contains_key(&kind) {
            self.windows.retain(|_, w| !over(w) || w.more > 0);
        }
        let kind = match self.windows.len() >= MAX_KINDS && !self.windows.contains_key(&kind) {
            true => Kind::other(),
            false => kind,
        };
        let new = Window { since: now, said: 0, more: 0, level };
        let window = self.windows.entry(kind.clone()).or_insert_with(|| new);
        let mut rest = None;
        if over(window) {
            let (lines, level_of_rest) = (window.more, window.level);
            rest = (lines > 0).then_some(Rest { kind, lines, level: level_of_rest });
            *window = Window { since: now, said: 0, more: 0, level };
        }
        if window.said < LINES {
            window.said += 1;
            return Verdict::Say(rest);
        }
        // The smaller, the worse.
        window.level = if window.more == 0 { level } else { window.level.min(level) };
        window.more += 1;
        Verdict::Count
    }

    /// What was counted in seconds that are over, or in all; whether something is left.
    pub fn due(&mut self, now: Duration, all: bool) -> (Vec<Rest>, bool) {
        let mut rests = Vec::new();
        self.windows.retain(|kind, w| {
            let over = all || now.saturating_sub(w.since) >= SECOND;
            if over && w.more > 0 {
                rests.push(Rest { kind: kind.clone(), lines: w.more, level: w.level });
            }
            !over
        });
        (rests, self.windows.values().any(|w| w.more > 0))
    }
}

static LIMITER: LazyLock<Mutex<(Instant, Limiter)>> =
    LazyLock::new(|| Mutex::new((Instant::now(), Limiter::default())));

/// Wakes who says what was counted.
static WAKE: LazyLock<(Sender<()>, Receiver<()>)> = LazyLock::new(|| bounded(1));

fn limiter() -> MutexGuard<'static, (Instant, Limiter)> {
    LIMITER.lock().unwrap_or_else(|e| e.into_inner())
}

/// Told when something begins to be counted: a [`SECOND`] later, [`say_rest`] is to be called.
pub fn counted() -> &'static Receiver<()> {
    &WAKE.1
}

/// Whether a line is said now; what was counted before it has been.
pub fn is_said(kind: Kind, level: Level) -> bool {
    let verdict = {
        let (start, limiter) = &mut *limiter();
        let now = start.elapsed();
        limiter.ask(kind, level, now)
    };
    match verdict {
        Verdict::Say(rest) => {
            rest.iter().for_each(say);
            true
        }
        Verdict::Count => {
            // Full when it has been woken already, or nobody waits.
            let _ = WAKE.0.try_send(());
            false
        }
    }
}

/// Says what was counted in seconds that are over, or, at the end, in all; whether there will
/// be more to say.
pub fn say_rest(all: bool) -> bool {
    let (rests, left) = {
        let (start, limiter) = &mut *limiter();
        let now = start.elapsed();
        limiter.due(now, all)
    };
    rests.iter().for_each(say);
    left
}

fn say(rest: &Rest) {
    let Rest { kind, lines, level } = rest;
    let by = if kind.peer.is_empty() { String::new() } else { format!(" (peer: {})", kind.peer) };
    match kind.event {
        true => log::log!(
            target: TARGET, *level, event = kind.name.as_str();
            "{lines} more like this{by}"
        ),
        false => log::log!(target: TARGET, *level, "{}…: {lines} more like this{by}", kind.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn ask(limiter: &mut Limiter, peer: &str, ms: u32) -> Verdict {
        limiter.ask(Kind::event("claim-refused", peer), Level::Warn, MS * ms)
    }

    #[test]
    fn ten_lines_a_second_are_said_and_the_others_counted() {
        let mut limiter = Limiter::default();
        let mut said = 0;
        for n in 0..20_000 {
            // In two seconds and a half.
            match ask(&mut limiter, "stranger", n / 8) {
                Verdict::Say(None) => said += 1,
                Verdict::Say(Some(rest)) => {
                    said += 2;
                    assert_eq!(rest.lines, 8 * 1000 - 10);
                    assert_eq!(rest.kind, Kind::event("claim-refused", "stranger"));
                }
                Verdict::Count => {}
            }
        }
        assert_eq!(said, 3 * 10 + 2);
        assert_eq!(limiter.due(MS * 2600, false), (vec![], true));
        let (rests, left) = limiter.due(MS * 3000, false);
        assert_eq!((rests[0].lines, rests.len(), left), (4000 - 10, 1, false));
        assert!(limiter.windows.is_empty(), "nothing is kept");
    }

    #[test]
    fn who_is_refused_much_takes_no_line_from_others() {
        let mut limiter = Limiter::default();
        for _ in 0..1000 {
            ask(&mut limiter, "stranger", 0);
        }
        for peer in ["claimer", "direct", ""] {
            assert_eq!(ask(&mut limiter, peer, 0), Verdict::Say(None), "{peer}");
        }
        let other = Kind::event("boot-failed", "stranger");
        assert_eq!(limiter.ask(other, Level::Error, MS), Verdict::Say(None));
    }

    #[test]
    fn texts_that_begin_alike_are_one_kind_and_the_worst_level_is_kept() {
        let kind = |n: u32| Kind::text(&format!("serve the connection of pid {n}: no"), "");
        assert_eq!(kind(7), kind(65_000));
        assert_eq!(kind(7).name, "serve the connection of ");
        assert_ne!(kind(7), Kind::text("accept a connection: no", ""));
        let mut limiter = Limiter::default();
        for n in 0..12 {
            let level = if n == 10 { Level::Error } else { Level::Info };
            limiter.ask(kind(n), level, MS);
        }
        let (rests, _) = limiter.due(Duration::ZERO, true);
        assert_eq!((rests[0].lines, rests[0].level), (2, Level::Error));
    }

    #[test]
    fn as_many_kinds_as_there_may_be_are_kept_apart() {
        let mut limiter = Limiter::default();
        for n in 0..10 * MAX_KINDS {
            let kind = Kind::event(&format!("kind-{n}"), "");
            limiter.ask(kind, Level::Info, Duration::ZERO);
            assert!(limiter.windows.len() <= MAX_KINDS + 1);
        }
        let kind = Kind::event("another", "");
        assert_eq!(limiter.ask(kind, Level::Info, SECOND), Verdict::Say(None));
    }
}
