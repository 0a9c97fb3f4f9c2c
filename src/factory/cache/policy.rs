//! The pool's decisions, without clock, threads or VMs: given how things are,
//! how many boots to start, and when to look again.
//!
//! A failed boot costs time, not the pool: each failure doubles the pause
//! before the next try, with jitter, and until one succeeds again only one is
//! tried at a time.

use std::time::{Duration, Instant};

/// Pause after the first failure.
pub const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(30);

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
}

impl Policy {
    /// Keeps `target` VMs ready, makes at most `parallel` at a time.
    pub fn new(target: usize, parallel: usize) -> Policy {
        let parallel = parallel.max(1);
        Policy { target, parallel, failures: 0, not_before: None, last_failure: None }
    }

    /// VMs to keep ready.
    pub fn target(&self) -> usize {
        self.target
    }

    /// Boots to start now.
    pub fn to_start(&self, view: View, now: Instant) -> usize {
        if self.not_before.is_some_and(|t| now < t) {
            return 0;
        }
        let parallel = if self.failures > 0 { 1 } else { self.parallel };
        let missing = (self.target + view.waiting).saturating_sub(view.ready + view.booting);
        missing.min(parallel.saturating_sub(view.booting))
    }

    /// When to ask again, if nothing else happens.
    pub fn wake_at(&self, view: View, now: Instant) -> Option<Instant> {
        let missing = self.target + view.waiting > view.ready + view.booting;
        self.not_before.filter(|t| missing && *t > now)
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
