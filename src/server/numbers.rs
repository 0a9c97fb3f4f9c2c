//! Numbers of connections' fds, by class of their peers.
//!
//! gRPC names the connection of a call by the number of its fd, and may still do so when the
//! connection has ended. Invariants: each class has a range of its own, so that a number never
//! stands for a peer that may do more than the one it stood for; a number of a relayed
//! connection is used again only after gRPC has closed its end and [`QUARANTINE`] is over, the
//! one that was free for longest first.

use std::collections::VecDeque;
use std::ops::Range;

use super::peers::Class;

/// How long a number is not used after gRPC has closed its end: a handler that was called
/// before runs for less.
pub const QUARANTINE: std::time::Duration = std::time::Duration::from_secs(2);
/// Fds beyond these numbers are not used: the kernel keeps a table up to the highest.
const HIGHEST: u64 = 16_384;
/// Fds that a relayed connection has: the peer's, and both ends of the pair.
const FDS: u64 = 3;

/// Which numbers are whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ranges {
    /// A quarter of the numbers; the first is everybody else's.
    quarter: i32,
    limit: u64,
}

impl Ranges {
    /// Where a process may have `limit` fds.
    pub fn within(limit: u64) -> Ranges {
        Ranges { quarter: (limit.min(HIGHEST) / 4) as i32, limit }
    }

    /// Of a class.
    pub fn of(&self, class: Class) -> Range<i32> {
        let from = match class {
            Class::Direct => 1,
            Class::Claimer => 2,
            Class::Stranger => 3,
        };
        from * self.quarter..(from + 1) * self.quarter
    }

    /// Whose a number is; `None` for no connection's.
    pub fn class_of(&self, number: i32) -> Option<Class> {
        let all = [Class::Direct, Class::Claimer, Class::Stranger];
        all.into_iter().find(|class| self.of(*class).contains(&number))
    }

    /// How many relayed connections of a class there can be: of all fds, claimers' take a
    /// quarter, strangers' an eighth.
    pub fn connections(&self, class: Class) -> usize {
        let part = match class {
            Class::Stranger => 8,
            _ => 4,
        };
        (self.limit / part / FDS) as usize
    }
}

/// The numbers of a class that are free.
#[derive(Debug)]
pub struct Free {
    /// Since when, nanoseconds; in that order.
    free: VecDeque<(i32, u64)>,
    never_used: Range<i32>,
}

impl Free {
    /// All of a range.
    pub fn all(range: Range<i32>) -> Free {
        Free { free: VecDeque::new(), never_used: range }
    }

    /// The number that was free for longest; `None` when none was for long enough.
    pub fn take(&mut self, now: u64) -> Option<i32> {
        if let Some(number) = self.never_used.next() {
            return Some(number);
        }
        let (number, since) = *self.free.front()?;
        if now < since + QUARANTINE.as_nanos() as u64 {
            return None;
        }
        self.free.pop_front();
        Some(number)
    }

    /// A number is free from now on.
    pub fn give(&mut self, number: i32, now: u64) {
        self.free.push_back((number, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_disjoint_and_below_the_limit() {
        for limit in [256, 1024, 20_000, 65_536, u64::MAX] {
            let ranges = Ranges::within(limit);
            let [a, b, c] =
                [Class::Direct, Class::Claimer, Class::Stranger].map(|class| ranges.of(class));
            assert!(a.start >= 64 && a.end == b.start && b.end == c.start, "{limit}");
            assert!(c.end as u64 <= limit.min(HIGHEST));
            assert_eq!(ranges.class_of(a.start - 1), None);
            assert_eq!(ranges.class_of(a.end), Some(Class::Claimer));
            assert_eq!(ranges.class_of(c.end - 1), Some(Class::Stranger));
            assert_eq!(ranges.class_of(c.end), None);
            let relayed = ranges.connections(Class::Claimer) + ranges.connections(Class::Stranger);
            assert!(relayed as u64 * FDS <= limit / 2, "{limit}");
        }
        assert!(Ranges::within(65_536).connections(Class::Claimer) >= 1024);
    }

    #[test]
    fn the_longest_free_is_used_first_and_none_too_soon() {
        let mut free = Free::all(100..103);
        let second = 1_000_000_000;
        let taken: Vec<_> = (0..4).map(|_| free.take(0)).collect();
        assert_eq!(taken, [Some(100), Some(101), Some(102), None]);
        free.give(101, 10 * second);
        free.give(100, 11 * second);
        assert_eq!(free.take(12 * second - 1), None);
        assert_eq!(free.take(13 * second), Some(101));
        assert_eq!(free.take(13 * second), Some(100));
        assert_eq!(free.take(99 * second), None);
    }
}
