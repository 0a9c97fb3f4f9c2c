//! Who gives way when there are as many connections as there may be.
//!
//! A connection that has made no call yet gives its place to a new one: of the same user when
//! that has as many as it may have, else of the user of the class that has most. Where there is
//! none, a stranger's new connection takes the place of the one whose last call ended longest
//! ago, and a claimer's that of one that has no call open, of a user who has more. Invariant: a
//! claimer's connection with an open call never gives way.

use super::bucket::{Nanos, SECOND};
use super::limits::{Excess, Limits, Whose};

/// A connection is not disturbed for so long after its last call's end.
const UNDISTURBED: Nanos = SECOND;
/// And for so long after its accept, where none of its calls has ended yet: a stranger's are
/// answered at once.
const UNDISTURBED_AT_FIRST: Nanos = SECOND / 10;

/// What there is to know of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Which one it is.
    pub serial: u64,
    /// Its user.
    pub uid: u32,
    /// Whether it has made no call.
    pub silent: bool,
    /// Its open calls.
    pub open: usize,
    /// When its last call ended; if none has, when it was accepted.
    pub since: Nanos,
    /// Whether one has.
    pub served: bool,
}

/// What becomes of a new connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Room {
    /// It has a place.
    Free,
    /// It has that of this one.
    Of(u64),
    /// It has none.
    None(Excess),
}

/// Finds a place for a connection of a user who has `own`, where its class has `all`, which
/// `places` tells more of.
pub fn find(
    limits: &Limits,
    (uid, own, all): (u32, usize, usize),
    now: Nanos,
    places: impl Fn() -> Vec<Place>,
) -> Room {
    let full = own >= limits.user_connections;
    if !full && all < limits.class_connections {
        return Room::Free;
    }
    let (whose, limit) = match full {
        true => (Whose::User, limits.user_connections),
        false => (Whose::Class, limits.class_connections),
    };
    let places = places();
    let found = match full {
        true => oldest(&places, |p| p.uid == uid && p.silent),
        false => of_others(limits, (uid, own), now, &places),
    };
    found.map_or(Room::None(Excess::Connections { whose, limit }), Room::Of)
}

fn of_others(
    limits: &Limits,
    (uid, own): (u32, usize),
    now: Nanos,
    places: &[Place],
) -> Option<u64> {
    let mut users: Vec<u32> = places.iter().map(|p| p.uid).collect();
    users.sort_unstable();
    let of = |uid: u32| users.partition_point(|u| *u <= uid) - users.partition_point(|u| *u < uid);
    let most = places.iter().map(|p| of(p.uid)).max().unwrap_or(0);
    let rests = |p: &Place| {
        let undisturbed = if p.served { UNDISTURBED } else { UNDISTURBED_AT_FIRST };
        p.since.saturating_add(undisturbed) <= now
    };
    oldest(places, |p| p.silent && of(p.uid) == most)
        .or_else(|| oldest(places, |p| p.silent))
        .or_else(|| match limits.class {
            crate::server::peers::Class::Stranger => oldest(places, |p| p.uid != uid && rests(p)),
            _ => oldest(places, |p| p.open == 0 && rests(p) && of(p.uid) > own + 1),
        })
}

fn oldest(places: &[Place], fits: impl Fn(&Place) -> bool) -> Option<u64> {
    places.iter().filter(|p| fits(p)).min_by_key(|p| (p.since, p.serial)).map(|p| p.serial)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn limits() -> [Limits; 2] {
        let text = "[vmcache]\nuser_max_connections = 3\nmax_connections = 4\n\
                    stranger_max_connections = 3\nstrangers_max_connections = 4\n";
        let config = Config::parse("c".as_ref(), text).unwrap();
        [Limits::claimers(&config), Limits::strangers(&config)]
    }

    fn place(serial: u64, uid: u32, silent: bool, open: usize, since: Nanos) -> Place {
        Place { serial, uid, silent, open, since, served: !silent }
    }

    fn room(limits: &Limits, uid: u32, places: &[Place]) -> Room {
        let own = places.iter().filter(|p| p.uid == uid).count();
        find(limits, (uid, own, places.len()), 100 * SECOND, || places.to_vec())
    }

    #[test]
    fn who_says_nothing_gives_way_and_the_others_of_the_user_stay() {
        for limits in limits() {
            let two = [place(1, 7, true, 0, 5), place(2, 7, false, 0, 1)];
            assert_eq!(room(&limits, 7, &two), Room::Free);
            let mut three = [two[0], two[1], place(3, 7, true, 0, 4)];
            assert_eq!(room(&limits, 7, &three), Room::Of(3), "the oldest");
            three.iter_mut().for_each(|p| p.silent = false);
            let full = Excess::Connections { whose: Whose::User, limit: 3 };
            assert_eq!(room(&limits, 7, &three), Room::None(full));
            assert_eq!(room(&limits, 8, &three), Room::Free);
        }
    }

    #[test]
    fn where_all_are_taken_it_is_first_one_of_who_has_most() {
        for limits in limits() {
            let four = [
                place(1, 8, true, 0, 1),
                place(2, 9, true, 0, 4),
                place(3, 9, true, 0, 3),
                place(4, 9, false, 0, 2),
            ];
            assert_eq!(room(&limits, 7, &four), Room::Of(3));
        }
    }

    #[test]
    fn a_strangers_place_is_that_of_the_one_longest_without_a_call_and_a_claimers_open_calls_stay()
    {
        let [claimers, strangers] = limits();
        let four = [
            place(1, 8, false, 1, 1),
            place(2, 9, false, 2, 4),
            place(3, 9, false, 0, 3),
            place(4, 9, false, 1, 2),
        ];
        assert_eq!(room(&strangers, 7, &four), Room::Of(1));
        assert_eq!(room(&claimers, 7, &four), Room::Of(3), "which has no call open");
        let busy = four.map(|p| Place { open: 1, ..p });
        let full = Excess::Connections { whose: Whose::Class, limit: 4 };
        assert_eq!(room(&claimers, 7, &busy), Room::None(full.clone()));
        let fresh = four.map(|p| Place { since: 100 * SECOND - 1, ..p });
        assert_eq!(room(&strangers, 7, &fresh), Room::None(full.clone()));
        let unserved = fresh.map(|p| Place { since: 99 * SECOND + SECOND / 2, served: false, ..p });
        assert_eq!(room(&strangers, 7, &unserved), Room::Of(1), "nothing came of its calls yet");
        let alone = [8, 9, 10, 11].map(|uid| place(uid.into(), uid, false, 0, 1));
        assert_eq!(room(&claimers, 7, &alone), Room::None(full), "they have no more than it");
    }
}
