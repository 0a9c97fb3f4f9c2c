//! Numbers of users: those that are somebody's already, and a range that is nobody's.
//!
//! A VM's user must be nobody else's, or who is that user, too, owns the VM: a rootless
//! container whose subordinate users are the same numbers, for example.
//!
//! Invariants: whether a number is taken is read from this host's files; which numbers may be
//! given away later is known by what gives them away. The range that is picked is the same
//! as long as those files are.
//!
//! Sources: subuid(5), login.defs(5), and systemd's "Users, Groups, UIDs and GIDs", whose
//! table sets the ranges of containers and dynamic users apart.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

/// Where ranges are picked: above systemd's containers, below its foreign files.
const FIRST: u32 = 1_900_000_000;
const LAST: u32 = 2_147_352_575;
/// Users in a range that is picked.
pub const SIZE: u32 = 65_536;
/// Largest file that is read, in bytes.
const MAX_FILE: usize = 4 * 1024 * 1024;
/// SUB_UID_MIN and SUB_UID_MAX where login.defs says nothing.
const SUBORDINATE: (u32, u32) = (100_000, 600_100_000);
/// What systemd sets apart.
const SYSTEMD: [(u32, u32, &str); 4] = [
    (61_184, 65_519, "the dynamic users of systemd's services"),
    (65_534, 65_535, "nobody"),
    (524_288, 1_879_048_191, "the users of systemd's containers"),
    (2_147_352_576, 2_147_418_111, "the owners of systemd's foreign files"),
];

/// Users that are not to be had, or may not be for long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Whether they are somebody's now; else somebody may get them.
    pub certain: bool,
    first: u32,
    last: u32,
    whose: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.certain { "are" } else { "may become" };
        write!(f, "{}-{} {verb} {}", self.first, self.last, self.whose)
    }
}

impl Conflict {
    fn meets(&self, first: u32, last: u32) -> bool {
        self.first <= last && first <= self.last
    }
}

/// What these users conflict with on this host; the certain ones first.
pub fn conflicts(first: u32, last: u32) -> Vec<Conflict> {
    let mut all = known(Path::new("/"));
    all.retain(|c| c.meets(first, last));
    all.sort_by_key(|c| !c.certain);
    all
}

/// A range in which nobody has a user, ends included.
///
/// # Errors
/// A sentence.
pub fn pick() -> Result<(u32, u32), String> {
    picked(&known(Path::new("/")))
}

fn picked(known: &[Conflict]) -> Result<(u32, u32), String> {
    let ranges = (FIRST..=LAST - SIZE + 1).step_by(SIZE as usize).map(|n| (n, n + SIZE - 1));
    let free = |(first, last): &(u32, u32)| !known.iter().any(|c| c.meets(*first, *last));
    ranges.into_iter().find(free).ok_or_else(|| {
        format!("all users from {FIRST} to {LAST} are somebody's: name a range that is free")
    })
}

/// All that is known of the host whose root directory this is.
fn known(root: &Path) -> Vec<Conflict> {
    let read = |path: &str| {
        let text = fs::read(root.join(path)).unwrap_or_default();
        String::from_utf8_lossy(&text[..text.len().min(MAX_FILE)]).into_owned()
    };
    let mut all = Vec::new();
    for path in ["etc/subuid", "etc/subgid"] {
        subordinate(&read(path), path, &mut all);
    }
    for path in ["etc/passwd", "etc/group"] {
        accounts(&read(path), path, &mut all);
    }
    let definitions = read("etc/login.defs");
    for (min, max) in [("SUB_UID_MIN", "SUB_UID_MAX"), ("SUB_GID_MIN", "SUB_GID_MAX")] {
        let first = defined(&definitions, min).unwrap_or(SUBORDINATE.0);
        let last = defined(&definitions, max).unwrap_or(SUBORDINATE.1);
        let whose = format!("subordinate users, which useradd gives away ({max})");
        let conflict = Conflict { certain: false, first, last, whose };
        // Users and groups, mostly, have the same.
        if !all.iter().any(|c: &Conflict| !c.certain && (c.first, c.last) == (first, last)) {
            all.push(conflict);
        }
    }
    all.extend(SYSTEMD.map(|(first, last, whose)| Conflict {
        certain: false,
        first,
        last,
        whose: whose.to_string(),
    }));
    all
}

/// Lines of `name:first:count`.
fn subordinate(text: &str, path: &str, all: &mut Vec<Conflict>) {
    for line in text.lines() {
        let mut words = line.trim().split(':');
        let (Some(name), Some(first), Some(count)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let (Ok(first), Ok(count)) = (first.trim().parse::<u32>(), count.trim().parse::<u64>())
        else {
            continue;
        };
        if name.starts_with('#') || count == 0 {
            continue;
        }
        let last = u32::try_from(u64::from(first) + count - 1).unwrap_or(u32::MAX);
        let whose = format!("subordinate users of {name} (/{path})");
        all.push(Conflict { certain: true, first, last, whose });
    }
}

/// Subordinate users of this host: whoever has some can be any of them, without losing a group.
///
/// Invariant: as the file says now, which is read again when it has changed.
#[derive(Debug)]
pub struct Subordinates {
    path: PathBuf,
    read: Mutex<Read>,
}

/// What was read, and of which file: when it was changed, and its length.
#[derive(Debug, Default)]
struct Read {
    of: Option<(SystemTime, u64)>,
    all: Vec<Conflict>,
}

impl Default for Subordinates {
    fn default() -> Subordinates {
        Subordinates::of("/etc/subuid".into())
    }
}

impl Subordinates {
    /// Those that a file names.
    pub fn of(path: PathBuf) -> Subordinates {
        Subordinates { path, read: Mutex::default() }
    }

    /// Whether this user is one.
    pub fn have(&self, uid: u32) -> bool {
        let meta = fs::metadata(&self.path).ok();
        let state = meta.and_then(|m| Some((m.modified().ok()?, m.len())));
        let mut read = self.read.lock().unwrap_or_else(|e| e.into_inner());
        if read.of != state {
            let text = fs::read(&self.path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text[..text.len().min(MAX_FILE)]);
            *read = Read { of: state, all: Vec::new() };
            subordinate(&text, "etc/subuid", &mut read.all);
        }
        read.all.iter().any(|range| range.meets(uid, uid))
    }
}

/// Lines of passwd(5) and group(5): the number is the third word.
fn accounts(text: &str, path: &str, all: &mut Vec<Conflict>) {
    for line in text.lines() {
        let mut words = line.split(':');
        let name = words.next().unwrap_or_default();
        if let Some(Ok(id)) = words.nth(1).map(str::parse::<u32>) {
            let whose = format!("{name}'s (/{path})");
            all.push(Conflict { certain: true, first: id, last: id, whose });
        }
    }
}

/// A number in login.defs.
fn defined(text: &str, key: &str) -> Option<u32> {
    text.lines().rev().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(key)).then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_users_are_known_as_the_file_says_now() {
        let path = std::env::temp_dir().join(format!("vmcache-subuid-{}", std::process::id()));
        let _ = fs::remove_file(&path);
        let users = Subordinates::of(path.clone());
        assert!(!users.have(100_000));
        fs::write(&path, "eve:100000:65536\n").unwrap();
        assert!(users.have(100_000) && users.have(165_535) && !users.have(165_536));
        fs::write(&path, "eve:100000:65536\nbob:200000:1\n").unwrap();
        assert!(users.have(200_000) && !users.have(200_001));
        fs::remove_file(&path).unwrap();
        assert!(!users.have(100_000));
    }

    fn host(files: &[(&str, &str)]) -> Vec<Conflict> {
        let dir = std::env::temp_dir().join(format!("vmcache-ranges-{}", std::process::id()));
        fs::create_dir_all(dir.join("etc")).unwrap();
        for (name, text) in files {
            fs::write(dir.join("etc").join(name), text).unwrap();
        }
        let all = known(&dir);
        fs::remove_dir_all(&dir).unwrap();
        all
    }

    fn certain(all: &[Conflict], first: u32, last: u32) -> usize {
        all.iter().filter(|c| c.certain && c.meets(first, last)).count()
    }

    #[test]
    fn what_is_somebodys_is_read_and_what_is_picked_is_nobodys() {
        let plain = host(&[]);
        assert_eq!(picked(&plain), Ok((FIRST, FIRST + SIZE - 1)));
        let all = host(&[
            ("subuid", "eve:231072:65536\n# off:5:5\nbad:x:1\nnone:7:0\n1000:4294967290:65536\n"),
            ("subgid", "eve:1900000100:1\n"),
            ("passwd", "root:x:0:0:root:/root:/bin/sh\nfar:x:1900065536:1::/:\n"),
            ("login.defs", "#SUB_UID_MAX 1\nSUB_UID_MIN 900000\nSUB_UID_MAX 900009\n"),
        ]);
        for (first, last, n) in [
            (231_071, 231_071, 0),
            (231_071, 231_072, 1),
            (296_607, 296_700, 1),
            (296_608, 296_700, 0),
            (5, 7, 0),
            (4_294_967_294, 4_294_967_294, 1),
            (0, 0, 1),
        ] {
            assert_eq!(certain(&all, first, last), n, "{first}-{last}");
        }
        let subordinate = |c: &&Conflict| !c.certain && c.whose.contains("SUB_UID_MAX");
        let given = all.iter().find(subordinate).unwrap();
        assert_eq!((given.first, given.last), (900_000, 900_009));
        // A group's numbers in the first range, a user's in the second.
        assert_eq!(picked(&all), Ok((FIRST + 2 * SIZE, FIRST + 3 * SIZE - 1)));
    }

    #[test]
    fn ranges_of_before_may_become_somebodys() {
        let all = host(&[]);
        let old = all.iter().find(|c| c.meets(200_000, 265_535)).unwrap();
        let text = "100000-600100000 may become subordinate users, which useradd gives away";
        assert!(old.to_string().starts_with(text), "{old}");
    }
}
