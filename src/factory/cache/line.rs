//! The claims in line, user by user: who asks for many makes only themselves wait.
//!
//! Invariant: among the claims of one user, first come, first served; among users that
//! wait, each in turn.

use std::collections::VecDeque;
use std::sync::Arc;

use super::claim::Place;

/// Whoever waits.
#[derive(Default)]
pub struct Line {
    /// In the order of their turns; none is without a claim.
    users: VecDeque<(u32, VecDeque<Arc<Place>>)>,
}

impl Line {
    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.users.is_empty()
    }

    /// Claims.
    pub fn len(&self) -> usize {
        self.users.iter().map(|(_, places)| places.len()).sum()
    }

    /// Stands at the end of its user's.
    pub fn push(&mut self, place: Arc<Place>) {
        match self.users.iter_mut().find(|(uid, _)| *uid == place.uid) {
            Some((_, places)) => places.push_back(place),
            None => self.users.push_back((place.uid, VecDeque::from([place]))),
        }
    }

    /// Whose turn it is.
    pub fn pop(&mut self) -> Option<Arc<Place>> {
        let (uid, mut places) = self.users.pop_front()?;
        let place = places.pop_front();
        if !places.is_empty() {
            self.users.push_back((uid, places));
        }
        place
    }

    /// Leaves; whether it was there.
    pub fn remove(&mut self, place: &Arc<Place>) -> bool {
        let before = self.len();
        for (_, places) in &mut self.users {
            places.retain(|p| !Arc::ptr_eq(p, place));
        }
        self.users.retain(|(_, places)| !places.is_empty());
        self.len() < before
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Place>> {
        self.users.iter().flat_map(|(_, places)| places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_one_user_holds_up_no_other() {
        let mut line = Line::default();
        let places: Vec<_> = [7, 7, 7, 8, 7, 9].map(|uid| Arc::new(Place::of(uid))).to_vec();
        places.iter().for_each(|p| line.push(Arc::clone(p)));
        assert!(line.remove(&places[1]));
        assert!(!line.remove(&places[1]));
        assert_eq!((line.len(), line.iter().count()), (5, 5));
        let order: Vec<u32> = std::iter::from_fn(|| line.pop()).map(|p| p.uid).collect();
        assert_eq!(order, [7, 8, 9, 7, 7]);
        assert!(line.is_empty());
    }
}
