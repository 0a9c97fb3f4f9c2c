//! Users by name, from the container's own /etc/passwd and /etc/group.
//!
//! Called after the container's root was entered. Reads the plain files and
//! no name service: a static binary in a foreign root has none.

use std::fs;

use super::failure::{Failure, Outcome};

/// A line of /etc/passwd or /etc/group whose first field or id matches.
fn line<'a>(text: &'a str, key: &str) -> Option<Vec<&'a str>> {
    text.lines()
        .map(|l| l.split(':').collect::<Vec<_>>())
        .find(|f| f.len() >= 3 && (f[0] == key || f[2] == key))
}

/// Uid and gid of `user[:group]`, names or numbers; adds the groups that list
/// the user when no group was given.
pub fn look_up(wanted: &str, groups: &mut Vec<u32>) -> Outcome<(u32, u32)> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    resolve(wanted, &passwd, &group, groups)
}

fn resolve(wanted: &str, passwd: &str, group: &str, more: &mut Vec<u32>) -> Outcome<(u32, u32)> {
    let (user, given_group) = match wanted.split_once(':') {
        Some((u, g)) => (u, Some(g)),
        None => (wanted, None),
    };
    let entry = line(passwd, user);
    let unknown =
        |what: &str, name: &str| Failure::invalid(format!("no {what} {name:?} in this guest"));
    let uid = match (&entry, user.parse()) {
        (Some(f), _) => f[2].parse().map_err(|_| unknown("user", user))?,
        (None, Ok(number)) => number,
        (None, Err(_)) => return Err(unknown("user", user)),
    };
    if let Some(name) = given_group {
        let gid = match (line(group, name), name.parse()) {
            (Some(f), _) => f[2].parse().map_err(|_| unknown("group", name))?,
            (None, Ok(number)) => number,
            (None, Err(_)) => return Err(unknown("group", name)),
        };
        return Ok((uid, gid));
    }
    let gid = entry.as_ref().and_then(|f| f.get(3)).and_then(|g| g.parse().ok()).unwrap_or(0);
    if let Some(f) = entry {
        let lists = |l: &str| l.split(',').any(|m| m == f[0]);
        more.extend(group.lines().filter_map(|l| {
            let g: Vec<&str> = l.split(':').collect();
            (g.len() >= 4 && lists(g[3])).then(|| g[2].parse::<u32>().ok()).flatten()
        }));
    }
    Ok((uid, gid))
}

/// Home directory of a user, `/` when it is not known.
pub fn home(uid: u32) -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let home = line(&passwd, &uid.to_string()).and_then(|f| f.get(5).map(|h| h.to_string()));
    home.filter(|h| !h.is_empty()).unwrap_or_else(|| "/".to_string())
}

#[cfg(test)]
mod tests {
    use super::resolve;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001::/home/ann:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nann:x:1001:\nwheel:x:10:root,ann\n";

    #[test]
    fn names_and_numbers_are_found_and_strangers_refused() {
        let mut more = Vec::new();
        assert_eq!(resolve("ann", PASSWD, GROUP, &mut more).unwrap(), (1000, 1001));
        assert_eq!(more, [10]);
        let mut none = Vec::new();
        assert_eq!(resolve("ann:wheel", PASSWD, GROUP, &mut none).unwrap(), (1000, 10));
        assert_eq!(resolve("77:88", PASSWD, GROUP, &mut none).unwrap(), (77, 88));
        assert!(resolve("bob", PASSWD, GROUP, &mut none).is_err());
        assert!(resolve("ann:staff", PASSWD, GROUP, &mut none).is_err());
    }
}
