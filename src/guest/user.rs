//! Users and groups by name, from the container's own /etc/passwd and /etc/group, by
//! the rules of `docker run -u`: a number is always a number, the first sound line
//! that fits counts, and a group that is given replaces those that list the user.
//!
//! Called after the container's root was entered. Reads the plain files and
//! no name service: a static binary in a foreign root has none.
//!
//! Invariants: a file is whatever an image has there: any bytes, any length up to a
//! bound, or no file at all; a line that is broken hides no other. No uid or gid above
//! [`MAX_ID`] comes out of here.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;

use super::failure::{Failure, Outcome};
use crate::ids::{halves, named, Named, MAX_ID};
use crate::proto::oci::User;

/// Bytes of a file that are looked at.
const MAX_FILE: u64 = 16 << 20;
/// Most supplementary groups that the kernel takes (NGROUPS_MAX).
const MAX_GROUPS: usize = 65_536;

/// Who a process runs as.
#[derive(Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory, `/` when it is not known.
    pub home: String,
}

/// Who the specification's user is: its name if it has one, else its numbers.
pub fn identity(user: &User) -> Outcome<Identity> {
    let passwd = database("/etc/passwd");
    if user.Username.is_empty() {
        return by_numbers(user, &passwd);
    }
    let mut found = resolve(&user.Username, &passwd, &database("/etc/group"))?;
    found.groups.extend(in_range("group", &user.AdditionalGids)?);
    // Its own, too, as docker since 20.10.18: a set-group-id program does not take it away,
    // where a file denies that group.
    found.groups.push(found.gid);
    found.groups.sort_unstable();
    found.groups.dedup();
    found.groups.truncate(MAX_GROUPS);
    Ok(found)
}

fn by_numbers(user: &User, passwd: &[u8]) -> Outcome<Identity> {
    in_range("user", &[user.UID])?;
    in_range("group", &[user.GID])?;
    let groups = in_range("group", &user.AdditionalGids)?;
    let home = lines(passwd).filter_map(account).find(|a| a.uid == user.UID).and_then(home_of);
    Ok(Identity { uid: user.UID, gid: user.GID, groups, home: home.unwrap_or_else(|| "/".into()) })
}

fn in_range(what: &str, numbers: &[u32]) -> Outcome<Vec<u32>> {
    match numbers.iter().find(|n| **n > MAX_ID) {
        None => Ok(numbers.to_vec()),
        Some(n) => {
            let text = format!("{what} {n}: a number of a {what} is 0 to {MAX_ID}");
            Err(Failure::invalid(text))
        }
    }
}

/// What is in a file; nothing when it is none, or cannot be read.
fn database(path: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Not to wait for whoever writes to a FIFO.
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    if let Ok(file) = OpenOptions::new().read(true).custom_flags(flags).open(path) {
        if file.metadata().is_ok_and(|m| m.is_file()) {
            let _ = file.take(MAX_FILE).read_to_end(&mut bytes);
        }
    }
    bytes
}

fn lines(text: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    text.split(|b| *b == b'\n').map(|l| l.split(|b| *b == b':').collect())
}

fn number(field: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(field).ok()?.trim();
    text.parse().ok().filter(|n| *n <= MAX_ID)
}

/// A line of /etc/passwd.
struct Account<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

/// A sound one.
fn account(fields: Vec<&[u8]>) -> Option<Account<'_>> {
    let (uid, gid) = (number(fields.get(2)?)?, number(fields.get(3)?)?);
    let home = fields.get(5).copied().unwrap_or_default();
    Some(Account { name: fields.first()?, uid, gid, home })
}

fn home_of(account: Account<'_>) -> Option<String> {
    let home = std::str::from_utf8(account.home).ok()?;
    Some(home).filter(|h| !h.is_empty() && !h.contains('\0')).map(str::to_string)
}

/// A line of /etc/group: name, number, members.
fn group(fields: Vec<&[u8]>) -> Option<(&[u8], u32, &[u8])> {
    let gid = number(fields.get(2)?)?;
    Some((fields.first()?, gid, fields.get(3).copied().unwrap_or_default()))
}

/// Resolves `[user][:group]`, names or numbers.
fn resolve(wanted: &str, passwd: &[u8], groups: &[u8]) -> Outcome<Identity> {
    let (user, given_group) = halves(wanted);
    let user = named("user", user.unwrap_or("0")).map_err(Failure::invalid)?;
    let entry = lines(passwd).filter_map(account).find(|a| match user {
        Named::Number(n) => a.uid == n,
        Named::Name(name) => a.name == name.as_bytes(),
    });
    let (uid, mut gid) = match (&entry, &user) {
        (Some(a), _) => (a.uid, a.gid),
        (None, Named::Number(n)) => (*n, 0),
        (None, Named::Name(name)) => {
            return Err(unknown("user", name, lines(passwd), "/etc/passwd"));
        }
    };
    let mut more = Vec::new();
    if let Some(wanted) = given_group {
        gid = match named("group", wanted).map_err(Failure::invalid)? {
            Named::Number(n) => n,
            Named::Name(name) => lines(groups)
                .filter_map(group)
                .find(|g| g.0 == name.as_bytes())
                .map(|g| g.1)
                .ok_or_else(|| unknown("group", name, lines(groups), "/etc/group"))?,
        };
    } else if let Some(a) = &entry {
        let lists = |members: &[u8]| members.split(|b| *b == b',').any(|m| m == a.name);
        let found = lines(groups).filter_map(group).filter(|g| lists(g.2)).map(|g| g.1);
        more.extend(found.take(MAX_GROUPS));
    }
    let home = entry.and_then(home_of).unwrap_or_else(|| "/".into());
    Ok(Identity { uid, gid, groups: more, home })
}

/// A name without a sound line, told apart from one that has none.
fn unknown<'a>(
    what: &str,
    name: &str,
    mut lines: impl Iterator<Item = Vec<&'a [u8]>>,
    file: &str,
) -> Failure {
    let broken = lines.any(|f| f.first().is_some_and(|n| *n == name.as_bytes()));
    Failure::invalid(match broken {
        true => format!("{what} {name:?}: its line in the guest's {file} has no sound numbers"),
        false => format!("no {what} {name:?} in the guest's {file}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        \xff\xfe:x:5:5::/:\n\
        broken\nann:x:oops:1::/:\nhuge:x:4294967295:0::/:\n\
        ann:x:1000:1001:Ann \xe9:/home/ann:/bin/sh\n\
        ann:x:7:7::/second:\n\
        1000:x:2000:2000::/number:/bin/sh\n\
        toor:x:0:0::/toor:\n\
        minus:x:-1:-1::/:\n";
    const GROUP: &[u8] =
        b"root:x:0:\nann:x:1001:\nwheel:x:10:root,ann\n\xff:x:9:ann\nno:x:zz:ann\naudio:x:29:ann,bob";

    fn found(wanted: &str) -> Outcome<(u32, u32, Vec<u32>, String)> {
        resolve(wanted, PASSWD, GROUP).map(|i| (i.uid, i.gid, i.groups, i.home))
    }

    #[test]
    fn every_form_of_docker_run_u() {
        let ann = (1000, 1001, vec![10, 9, 29], "/home/ann".to_string());
        assert_eq!(found("ann").unwrap(), ann);
        assert_eq!(found("1000").unwrap(), ann, "a number is a number, whatever is called so");
        assert_eq!(found("ann:").unwrap(), ann);
        assert_eq!(found("ann:wheel").unwrap(), (1000, 10, vec![], "/home/ann".into()));
        assert_eq!(found("ann:77").unwrap(), (1000, 77, vec![], "/home/ann".into()));
        assert_eq!(found("77:88").unwrap(), (77, 88, vec![], "/".into()));
        assert_eq!(found("77").unwrap(), (77, 0, vec![], "/".into()));
        assert_eq!(found(":29").unwrap(), (0, 29, vec![], "/root".into()));
        assert_eq!(found(":wheel").unwrap(), (0, 10, vec![], "/root".into()));
        assert_eq!(found("toor").unwrap().3, "/toor");
        assert_eq!(found("0").unwrap(), (0, 0, vec![10], "/root".into()));
    }

    #[test]
    fn strangers_and_broken_lines_are_refused_by_name() {
        for (wanted, says) in [
            ("bob", "no user \"bob\""),
            ("ann:staff", "no group \"staff\""),
            ("huge", "no sound numbers"),
            ("minus", "no sound numbers"),
            ("broken", "no sound numbers"),
            ("0:no", "no sound numbers"),
            ("4294967295", "user 4294967295: a number"),
            ("-1", "user -1: a number"),
            ("0:2147483648", "group 2147483648: a number"),
        ] {
            let e = found(wanted).unwrap_err();
            assert!(e.message.contains(says), "{wanted}: {}", e.message);
        }
        let user = |uid, gid| User { UID: uid, GID: gid, ..User::default() };
        assert!(by_numbers(&user(u32::MAX, 0), b"").is_err());
        assert!(by_numbers(&user(0, u32::MAX), b"").is_err());
        assert_eq!(by_numbers(&user(3, 4), PASSWD).unwrap().home, "/");
    }

    #[test]
    fn long_lines_and_many_are_no_matter() {
        let mut text = b"x".repeat(1 << 20);
        text.extend_from_slice(b":x:1:1\nann:x:5:6::/h:\n");
        let found = resolve("ann", &text, b"").unwrap();
        assert_eq!((found.uid, found.gid, found.home.as_str()), (5, 6, "/h"));
    }
}
