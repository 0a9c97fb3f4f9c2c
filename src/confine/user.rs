//! Whose a VM's processes are: the server's user, one that the configuration names,
//! or one of a range, another for each VM.
//!
//! Invariants: who a VM's user is stands in the group of its directory, so that all
//! servers and clients of a store agree; the directory stays the server's, and what it
//! writes there is not the user's to change (mode 1770).

use std::fs;
use std::io;
use std::os::unix::fs::{chown, MetadataExt, PermissionsExt};
use std::path::Path;

use nix::unistd::{geteuid, User};

use crate::config::options::OURS;
use crate::config::{Accel, Config};
use crate::sys::cage::Account;

/// Most users of a range that are looked at for a free one.
const TRIES: u32 = 8192;

/// What the option says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The server's.
    Server,
    /// This user's.
    One(String),
    /// One of these, ends included.
    Range(u32, u32),
}

impl Whose {
    /// Reads the option.
    ///
    /// # Errors
    /// What it must be.
    pub fn parse(text: &str) -> Result<Whose, &'static str> {
        const MUST: &str = "must be a user's name or number, or a range of numbers from 1 on, \
                            such as \"200000-265535\"";
        match text.split_once('-') {
            _ if text.is_empty() => Ok(Whose::Server),
            Some((first, last)) if first.chars().all(|c| c.is_ascii_digit()) => {
                let (first, last) = (first.parse().map_err(|_| MUST)?, last.parse());
                let last: u32 = last.map_err(|_| MUST)?;
                let sane = 1 <= first && first <= last && last < u32::MAX;
                sane.then_some(Whose::Range(first, last)).ok_or(MUST)
            }
            _ if text == "0" || text == "root" => Err("must be another user than root"),
            _ => Ok(Whose::One(text.to_string())),
        }
    }

    /// Finds the user.
    ///
    /// # Errors
    /// When this host has none of that name, or this process could not become it.
    pub fn check(&self) -> Result<(), String> {
        if *self == Whose::Server {
            return Ok(());
        }
        if !geteuid().is_root() {
            return Err("only root can start QEMU as another user: leave it out".into());
        }
        match self {
            Whose::One(name) => account(name).map(|_| ()),
            _ => Ok(()),
        }
    }
}

fn account(name: &str) -> Result<Account, String> {
    if let Ok(uid) = name.parse() {
        if uid == 0 || uid == u32::MAX {
            return Err("must be another user than root".into());
        }
        return Ok(Account { uid, gid: uid, groups: Vec::new() });
    }
    let found = User::from_name(name).map_err(|e| e.to_string())?;
    let user = found.ok_or_else(|| format!("this host has no user {name:?}"))?;
    if user.uid.is_root() {
        return Err("must be another user than root".into());
    }
    Ok(Account { uid: user.uid.as_raw(), gid: user.gid.as_raw(), groups: Vec::new() })
}

/// Makes a VM's directory its user's to bind sockets in; `None` when that is the
/// server's.
///
/// # Errors
/// As chown(2), and when all users of a range have a VM.
pub fn settle(config: &Config, dir: &Path) -> io::Result<Option<Account>> {
    let whose = Whose::parse(config.text(OURS, "user")).map_err(io::Error::other)?;
    let mut account = match &whose {
        Whose::Server => return Ok(None),
        Whose::One(name) => account(name).map_err(io::Error::other)?,
        Whose::Range(first, last) => {
            let id = free(dir, *first, *last)?;
            Account { uid: id, gid: id, groups: Vec::new() }
        }
    };
    give(dir, account.gid)?;
    if config.accel == Accel::Kvm {
        // Where only members of a group may use it.
        account.groups.extend(fs::metadata("/dev/kvm").ok().map(|m| m.gid()).filter(|g| *g != 0));
    }
    let store = dir.parent().unwrap_or(dir);
    let mode = fs::metadata(store)?.mode() & 0o7777;
    // To be passed through, not to be looked at.
    if mode & 0o001 == 0 {
        fs::set_permissions(store, fs::Permissions::from_mode(mode | 0o011))?;
    }
    Ok(Some(account))
}

/// Lets a VM's user connect to a socket in its directory.
///
/// # Errors
/// As chown(2).
pub fn let_in(dir: &Path, socket: &Path) -> io::Result<()> {
    let m = fs::metadata(dir)?;
    if m.mode() & 0o070 == 0 {
        return Ok(());
    }
    // Made by the server, in a directory in which nobody replaces what is the server's.
    chown(socket, None, Some(m.gid()))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o770))
}

/// The group binds and connects sockets there; what is root's it can not replace.
fn give(dir: &Path, gid: u32) -> io::Result<()> {
    chown(dir, None, Some(gid))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o1770))
}

/// A user that no other VM of the store has; the directory is its group's then.
fn free(dir: &Path, first: u32, last: u32) -> io::Result<u32> {
    let store = dir.parent().unwrap_or(dir);
    let size = last - first + 1;
    let mut random = [0; 4];
    crate::sys::process::random(&mut random)?;
    let start = u32::from_ne_bytes(random) % size;
    for n in 0..size.min(TRIES) {
        let id = first + (start + n) % size;
        // First taken, then looked: of two that take it at once, at least one sees it.
        give(dir, id)?;
        let others = fs::read_dir(store)?.flatten().filter(|e| e.path() != dir);
        let mut others = others.map(|e| e.metadata());
        // One that can not be looked at may have any.
        let taken = others.any(|m| match m {
            Ok(m) => m.gid() == id,
            Err(e) => e.kind() != io::ErrorKind::NotFound,
        });
        if !taken {
            return Ok(id);
        }
    }
    let text =
        format!("all of the users {first}-{last} have a VM: make the range of `user` larger");
    Err(io::Error::other(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_named_numbered_or_one_of_a_range() {
        assert_eq!(Whose::parse(""), Ok(Whose::Server));
        assert_eq!(Whose::parse("vm-user"), Ok(Whose::One("vm-user".into())));
        assert_eq!(Whose::parse("107"), Ok(Whose::One("107".into())));
        assert_eq!(Whose::parse("5-9"), Ok(Whose::Range(5, 9)));
        for bad in ["0", "root", "0-9", "9-5", "5-", "5-x", "1-4294967295"] {
            assert!(Whose::parse(bad).is_err(), "{bad}");
        }
        assert!(Whose::One("no such user".into()).check().is_err());
    }

    #[test]
    fn each_vm_has_a_user_of_its_own_until_there_are_no_more() {
        if !geteuid().is_root() {
            panic!("this test gives directories to others: run it as root");
        }
        let store = std::env::temp_dir().join(format!("vmcache-users-{}", std::process::id()));
        let mut seen = std::collections::HashSet::new();
        for n in 0..3 {
            let dir = store.join(n.to_string());
            fs::create_dir_all(&dir).unwrap();
            assert!(seen.insert(free(&dir, 300_000, 300_002).unwrap()));
            let m = fs::metadata(&dir).unwrap();
            assert_eq!((m.uid(), m.mode() & 0o7777), (0, 0o1770));
        }
        let dir = store.join("one too many");
        fs::create_dir(&dir).unwrap();
        let e = free(&dir, 300_000, 300_002).unwrap_err().to_string();
        assert!(e.contains("make the range of `user` larger"), "{e}");
        fs::remove_dir_all(&store).unwrap();
    }
}
