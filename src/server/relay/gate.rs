//! How often a user may connect: asked at accept, before anything else is done for a peer.
//!
//! Invariant: at most `MOST` users are remembered; when there are more, those that have not
//! connected lately are forgotten first.

use std::collections::HashMap;

use super::bucket::{Bucket, Nanos, Rate};
use super::limits::Excess;
use crate::server::peers::Class;

/// Users that are remembered.
const MOST: usize = 4096;

/// Who has connected lately.
#[derive(Debug)]
pub struct Gate {
    claimers: Rate,
    strangers: Rate,
    lately: HashMap<(u32, Class), Bucket>,
}

impl Gate {
    /// With these rates, a user's.
    pub fn new(claimers: Rate, strangers: Rate) -> Gate {
        Gate { claimers, strangers, lately: HashMap::new() }
    }

    /// A user connects.
    ///
    /// # Errors
    /// When that is too often.
    pub fn connect(&mut self, uid: u32, class: Class, now: Nanos) -> Result<(), Excess> {
        let rate = match class {
            Class::Direct => return Ok(()),
            Class::Claimer => self.claimers,
            Class::Stranger => self.strangers,
        };
        if self.lately.len() >= MOST && !self.lately.contains_key(&(uid, class)) {
            self.lately.retain(|_, bucket| !bucket.is_full(now));
            if self.lately.len() >= MOST {
                self.lately.clear();
            }
        }
        let bucket = self.lately.entry((uid, class)).or_default();
        bucket.take(rate, 1, now).map_err(|_| Excess::Connects { rate })
    }
}

#[cfg(test)]
mod tests {
    use super::super::bucket::SECOND;
    use super::*;

    #[test]
    fn each_user_connects_as_often_as_its_class_may() {
        let mut gate = Gate::new(Rate::new(100, 10), Rate::new(3, 1));
        for uid in [7, 8] {
            let connects = |gate: &mut Gate, class, now| {
                (0..1000).take_while(|_| gate.connect(uid, class, now).is_ok()).count()
            };
            assert_eq!(connects(&mut gate, Class::Stranger, SECOND), 3);
            assert_eq!(connects(&mut gate, Class::Claimer, SECOND), 100);
            assert_eq!(connects(&mut gate, Class::Direct, SECOND), 1000);
            assert_eq!(connects(&mut gate, Class::Stranger, 3 * SECOND), 2);
        }
    }

    #[test]
    fn it_remembers_no_more_users_than_it_may() {
        let mut gate = Gate::new(Rate::new(1, 1), Rate::new(1, 1));
        for uid in 0..20_000 {
            assert!(gate.connect(uid, Class::Stranger, 1).is_ok());
            assert!(gate.lately.len() <= MOST);
        }
        assert!(gate.connect(19_999, Class::Stranger, 1).is_err());
    }
}
