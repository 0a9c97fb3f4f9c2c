//! The pool's decisions, without clock, threads or VMs: given how things are,
//! how many boots to start, and when to look again.
//!
//! A failed boot costs time, not the pool: each failure doubles the pause
//! before the next try, with jitter, and until one succeeds again only one is
//! tried at a time.
//!
//! After a claim, refilling holds its breath for a moment: a burst of claims,
//! and the first use of the VM just claimed, shall not compete with the start
//! of a QEMU. Claims in line are never made to wait for that.

use std::time::{Duration, Instant};

/// Pause after the first failure.
pub const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// After a claim, until refilling begins.
pub const CALM: Duration = Duration::from_millis(10);
/// The most by which claims that keep coming can put refilling off.
pub const LONGEST_CALM: Duration = Duration::from_millis(100);

/// How things are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// VMs in the pool.
    pub ready: usize,
    /// VMs being made.
    pub booting: usize,
    /// Claims in line.
    pub waiting: usize,
}

/// The rules, and the failures so far.
#[derive(Debug)]
pub struct Policy {
    target: usize,
    parallel: usize,
    failures: u32,
    not_before: Option<Instant>,
    last_failure: Option<Instant>,
    /// The first claim since refilling last began, and until when it holds off.
    calm: Option<(Instant, Instant)>,
}

impl Policy {
    /// Keeps `target` VMs ready, makes at most `parallel` at a time.
    pub fn new(target: usize, parallel: usize) -> Policy {
        let parallel = parallel.max(1);
        Policy { target, parallel, failures: 0, not_before: None, last_failure: None, calm: None }
    }

    /// Keeps another number ready, and makes at most `parallel` at a time.
    pub fn set_target(&mut self, target: usize, parallel: usize) {
        (self.target, self.parallel) = (target, parallel.max(1));
    }

    /// VMs to keep ready.
    pub fn target(&self) -> usize {
        self.target
    }

    /// Boots to start now.
    pub fn to_start(&self, view: View, now: Instant) -> usize {
        if self.not_before.is_some_and(|t| now < t) || self.calm_until(view, now).is_some() {
            return 0;
        }
        let parallel = if self.failures > 0 { 1 } else { self.parallel };
        let missing = (self.target + view.waiting).saturating_sub(view.ready + view.booting);
        missing.min(parallel.saturating_sub(view.booting))
    }

    /// When to ask again, if nothing else happens.
    pub fn wake_at(&self, view: View, now: Instant) -> Option<Instant> {
        let missing = self.target + view.waiting > view.ready + view.booting;
        let paused = self.not_before.filter(|t| *t > now);
        paused.max(self.calm_until(view, now)).filter(|_| missing)
    }

    /// A VM of the pool went to a claim.
    pub fn claimed(&mut self, now: Instant) {
        let first = self.calm.map_or(now, |(first, _)| first);
        self.calm = Some((first, (now + CALM).min(first + LONGEST_CALM)));
    }

    /// Boots have been started.
    pub fn started(&mut self) {
        self.calm = None;
    }

    /// Until when refilling holds its breath, if it does.
    pub fn calm_until(&self, view: View, now: Instant) -> Option<Instant> {
        self.calm.map(|(_, until)| until).filter(|until| view.waiting == 0 && *until > now)
    }

    /// A boot that started at `started` failed; `jitter` is 0 to 1. The pause
    /// that follows. Boots that were under way together count as one failure.
    pub fn failed(&mut self, started: Instant, now: Instant, jitter: f64) -> Duration {
        if self.last_failure.is_none_or(|last| started > last) {
            self.failures = self.failures.saturating_add(1);
            self.last_failure = Some(now);
        }
        let doubled = FIRST_PAUSE.saturating_mul(1 << (self.failures.clamp(1, 8) - 1));
        let pause = doubled.min(LONGEST_PAUSE);
        // Half to whole of it, so that many daemons do not try in step.
        let pause = pause.mul_f64(0.5 + 0.5 * jitter.clamp(0.0, 1.0));
        self.not_before = Some(now + pause);
        pause
    }

    /// A boot came through.
    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.not_before = None;
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(ready: usize, booting: usize, waiting: usize) -> View {
        View { ready, booting, waiting }
    }

    #[test]
    fn the_pool_is_filled_and_claims_in_line_count() {
        let now = Instant::now();
        let p = Policy::new(4, 2);
        assert_eq!(p.to_start(view(0, 0, 0), now), 2);
        assert_eq!(p.to_start(view(0, 1, 0), now), 1);
        assert_eq!(p.to_start(view(0, 2, 0), now), 0);
        assert_eq!(p.to_start(view(4, 0, 0), now), 0);
        assert_eq!(p.to_start(view(0, 0, 16), now), 2);
        assert_eq!(p.to_start(view(3, 1, 0), now), 0);
    }

    #[test]
    fn failures_pause_longer_and_longer_and_success_ends_it() {
        let start = Instant::now();
        let mut p = Policy::new(4, 4);
        let mut now = start;
        let mut last = Duration::ZERO;
        for n in 1..12 {
            let pause = p.failed(now, now, 1.0);
            assert!(pause >= last && pause <= LONGEST_PAUSE, "{pause:?}");
            last = pause;
            assert_eq!(p.failures(), n);
            assert_eq!(p.to_start(view(0, 0, 0), now), 0);
            assert_eq!(p.wake_at(view(0, 0, 0), now), Some(now + pause));
            now += pause;
            assert_eq!(p.to_start(view(0, 0, 0), now), 1, "one at a time while failing");
        }
        assert_eq!(last, LONGEST_PAUSE);
        p.succeeded();
        assert_eq!(p.to_start(view(0, 0, 0), now), 4);
    }

    #[test]
    fn refilling_waits_for_a_calm_moment_but_not_for_ever() {
        let start = Instant::now();
        let mut p = Policy::new(4, 2);
        p.claimed(start);
        assert_eq!(p.to_start(view(3, 0, 0), start), 0);
        assert_eq!(p.wake_at(view(3, 0, 0), start), Some(start + CALM));
        assert_eq!(p.to_start(view(0, 0, 1), start), 2, "a claim in line waits for nothing");
        let mut now = start;
        for _ in 0..30 {
            now += Duration::from_millis(5);
            p.claimed(now);
            if p.to_start(view(0, 0, 0), now) > 0 {
                break;
            }
        }
        assert_eq!(now, start + LONGEST_CALM);
        p.started();
        p.claimed(now);
        assert_eq!(p.to_start(view(0, 0, 0), now), 0, "a new calm begins");
    }

    #[test]
    fn boots_that_fail_together_count_once() {
        let start = Instant::now();
        let mut p = Policy::new(8, 4);
        for i in 0..4 {
            p.failed(start, start + Duration::from_millis(i), 0.0);
        }
        assert_eq!(p.failures(), 1);
    }

    /// Random events against a tiny model of a pool: bounds hold throughout,
    /// and when failures stop the pool fills up.
    #[test]
    fn random_lives_keep_the_bounds_and_end_full() {
        let mut seed: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut next = move |n: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % n
        };
        for _ in 0..200 {
            let (target, parallel) = (next(9) as usize, 1 + next(4) as usize);
            let mut p = Policy::new(target, parallel);
            let (mut ready, mut booting, mut waiting) = (0usize, Vec::new(), 0usize);
            let mut now = Instant::now();
            for step in 0..300 {
                now += Duration::from_millis(next(400));
                let calm = step > 200;
                match next(5) {
                    0 if !calm && ready > 0 => ready -= 1,
                    0 if !calm => waiting += 1,
                    1 if !calm && waiting > 0 => waiting -= 1,
                    2 | 3 if !booting.is_empty() => {
                        let started = booting.remove(0);
                        if !calm && next(3) == 0 {
                            p.failed(started, now, next(100) as f64 / 100.0);
                        } else {
                            p.succeeded();
                            if waiting > 0 {
                                waiting -= 1;
                            } else {
                                ready += 1;
                            }
                        }
                    }
                    _ => {}
                }
                let v = view(ready, booting.len(), waiting);
                let start = p.to_start(v, now);
                assert!(booting.len() + start <= parallel.max(booting.len()));
                assert!(start == 0 || ready + booting.len() + start <= target + waiting);
                booting.extend(std::iter::repeat_n(now, start));
            }
            for _ in 0..200 {
                now += LONGEST_PAUSE;
                if let Some(_done) = booting.pop() {
                    p.succeeded();
                    if waiting > 0 {
                        waiting -= 1;
                    } else {
                        ready += 1;
                    }
                }
                let start = p.to_start(view(ready, booting.len(), waiting), now);
                booting.extend(std::iter::repeat_n(now, start));
            }
            assert!(ready >= target && waiting == 0 && booting.is_empty());
        }
    }
}
