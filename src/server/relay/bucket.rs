//! Rates: so many at once, and so many a second.
//!
//! A bucket is one number, the time at which it is full again (the generic cell rate
//! algorithm): nothing runs to fill it, and one that nobody used for a while is as good as new.

/// A time, nanoseconds after the relay's start.
pub type Nanos = u64;

/// A second.
pub const SECOND: Nanos = 1_000_000_000;

/// How often something may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// So often at once.
    pub burst: u32,
    /// And so often a second, lastingly.
    pub per_second: u32,
}

impl Rate {
    /// As often as it comes.
    pub const ANY: Rate = Rate { burst: u32::MAX, per_second: u32::MAX };

    /// A rate.
    pub const fn new(burst: u32, per_second: u32) -> Rate {
        Rate { burst, per_second }
    }

    /// Nanoseconds that one takes to be given back.
    const fn each(self) -> Nanos {
        SECOND / if self.per_second == 0 { 1 } else { self.per_second as Nanos }
    }

    /// When a bucket that is full at `full` gives `n`: at the latest when it is full.
    fn gives_at(self, full: Nanos, n: u32, now: Nanos) -> Nanos {
        let after = full.max(now).saturating_add(self.each().saturating_mul(n.into()));
        after.saturating_sub(self.each().saturating_mul(self.burst.max(n).into()))
    }
}

/// What is left of a [`Rate`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When all is given back.
    full: Nanos,
}

impl Bucket {
    /// Takes `n`, or tells when there will be as many; then nothing is taken.
    ///
    /// # Errors
    /// The time.
    pub fn take(&mut self, rate: Rate, n: u32, now: Nanos) -> Result<(), Nanos> {
        if rate == Rate::ANY {
            return Ok(());
        }
        let at = rate.gives_at(self.full, n, now);
        if at > now {
            return Err(at);
        }
        self.full = self.full.max(now).saturating_add(rate.each().saturating_mul(n.into()));
        Ok(())
    }

    /// Whether all has been given back.
    pub fn is_full(&self, now: Nanos) -> bool {
        self.full <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_given_at_once_and_then_the_rate() {
        let rate = Rate::new(10, 5);
        let mut bucket = Bucket::default();
        let now = 7 * SECOND;
        for n in 0..10 {
            assert_eq!(bucket.take(rate, 1, now), Ok(()), "{n}");
        }
        let at = bucket.take(rate, 1, now).unwrap_err();
        assert_eq!(at, now + SECOND / 5);
        assert!(bucket.take(rate, 1, at - 1).is_err());
        assert_eq!(bucket.take(rate, 1, at), Ok(()));
        // In a minute, five a second and no more.
        let taken =
            (0..60_000).filter(|ms| bucket.take(rate, 1, at + ms * SECOND / 1000).is_ok()).count();
        assert!((299..=300).contains(&taken), "{taken}");
        assert!(!bucket.is_full(at + 60 * SECOND));
        assert!(bucket.is_full(at + 63 * SECOND));
    }

    #[test]
    fn what_costs_more_is_taken_whole_or_not_at_all() {
        let rate = Rate::new(10, 1);
        let mut bucket = Bucket::default();
        assert_eq!(bucket.take(rate, 7, 0), Ok(()));
        assert_eq!(bucket.take(rate, 7, 0), Err(4 * SECOND));
        assert_eq!(bucket.take(rate, 3, 0), Ok(()));
        // More than a burst: once it is full.
        assert_eq!(bucket.take(rate, 11, 9 * SECOND), Err(10 * SECOND));
        assert_eq!(bucket.take(rate, 11, 10 * SECOND), Ok(()));
        assert_eq!(Bucket::default().take(Rate::ANY, u32::MAX, 0), Ok(()));
        assert_eq!(Bucket::default().take(Rate::new(1, 0), 1, 0), Ok(()));
    }
}
