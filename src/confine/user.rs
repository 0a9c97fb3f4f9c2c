//! Whose a VM's processes are: one user of a range for each VM, root, the server's user, or
//! one that the configuration names.
//!
//! A server that is root picks a range that is nobody's ([`super::ranges`]) when none is
//! named. A QEMU that is root is for who serves directories by 9p, and for who asks for it by
//! name. One user for all VMs would own them all: that is for a server without a pool.
//!
//! Invariants: who a VM's user is stands in the group of its directory, so that all
//! servers and clients of a store agree; the directory stays the server's, and neither that
//! user nor its group may look into it or make anything there.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{chown, DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

use nix::unistd::{geteuid, User};

use super::ranges;
use crate::config::options::OURS;
use crate::config::{Accel, Config};
use crate::sys::cage::Account;
use crate::walls::Wall;

/// Most users of a range that are looked at for a free one.
const TRIES: u32 = 8192;

/// Whose VMs' processes are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Whose {
    /// The server's, which is not root.
    #[default]
    Server,
    /// Root's.
    Root,
    /// This user's.
    One(String),
    /// One of these, ends included.
    Range(u32, u32),
}

impl Whose {
    /// Reads the option; `None` where it says nothing.
    ///
    /// # Errors
    /// What it must be.
    pub fn parse(text: &str) -> Result<Option<Whose>, &'static str> {
        const MUST: &str = "must be a range of numbers from 1 on, such as \
                            \"1900000000-1900065535\", a user's name or number, or \"root\"";
        match text.split_once('-') {
            _ if text.is_empty() => Ok(None),
            Some((first, last)) if first.chars().all(|c| c.is_ascii_digit()) => {
                let (first, last) = (first.parse().map_err(|_| MUST)?, last.parse());
                let last: u32 = last.map_err(|_| MUST)?;
                let sane = 1 <= first && first <= last && last < u32::MAX;
                sane.then_some(Some(Whose::Range(first, last))).ok_or(MUST)
            }
            _ if text == "0" || text == "root" => Ok(Some(Whose::Root)),
            _ => Ok(Some(Whose::One(text.to_string()))),
        }
    }

    /// Whose they are by a configuration, on this host.
    ///
    /// # Errors
    /// A sentence: what it must be, or that no range is free.
    pub fn of(config: &Config) -> Result<Whose, String> {
        if let Some(named) = Whose::parse(config.text(OURS, "user"))? {
            return Ok(named);
        }
        if !geteuid().is_root() {
            return Ok(Whose::Server);
        }
        // 9p's server has the rights that its guest's root asks for.
        if config.shares_9p() || !Wall::Users.stands() {
            return Ok(Whose::Root);
        }
        ranges::pick().map(|(first, last)| Whose::Range(first, last))
    }

    /// Whether VMs can be given to other users than root and the server's: whoever has a VM
    /// can do what its QEMU's user can.
    pub fn can_be_given(&self) -> bool {
        matches!(self, Whose::Range(..) | Whose::One(_))
    }

    /// Whether this is a user that VMs' QEMUs run as, other than root and the server's.
    pub fn is_vms(&self, uid: u32) -> bool {
        match self {
            Whose::Server | Whose::Root => false,
            Whose::One(name) => account(name).is_ok_and(|a| a.uid == uid),
            Whose::Range(first, last) => (*first..=*last).contains(&uid),
        }
    }

    /// In a sentence.
    pub fn described(&self) -> String {
        match self {
            Whose::Server => "QEMU runs as the server's user, as all VMs' do".into(),
            Whose::Root => "QEMU runs as root, in a view of files of its own".into(),
            Whose::One(name) => format!("QEMU runs as {name}, for whatever VM"),
            Whose::Range(first, last) => {
                format!("each VM's QEMU runs as a user of its own of {first}-{last}")
            }
        }
    }

    /// Finds the user; warnings where others may have it, too.
    ///
    /// # Errors
    /// When this host has none of that name, this process could not become it, or it is
    /// somebody's.
    pub fn check(&self) -> Result<Vec<String>, String> {
        if *self == Whose::Server {
            return Ok(Vec::new());
        }
        if !geteuid().is_root() {
            return Err("only root can start QEMU as another user: leave it out".into());
        }
        let Whose::Range(first, last) = self else {
            return match self {
                Whose::One(name) => account(name).map(|_| Vec::new()),
                _ => Ok(Vec::new()),
            };
        };
        let conflicts = ranges::conflicts(*first, *last);
        const REMEDY: &str = "leave `user` out, and a range that is nobody's is picked";
        match conflicts.first() {
            Some(taken) if taken.certain => {
                Err(format!("{taken}: whoever is that user owns a VM; {REMEDY}"))
            }
            _ => Ok(conflicts.iter().map(|c| format!("{c}; {REMEDY}")).collect()),
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
    Ok(Account { uid: user.uid.as_raw(), gid: user.gid.as_raw(), groups: Vec::new() })
}

/// Who a VM's processes are, whose directory this is: from now on nobody else's; `None` when
/// the server's.
///
/// # Errors
/// As chown(2), and when all users of a range have a VM.
pub fn settle(config: &Config, dir: &Path) -> io::Result<Option<Account>> {
    let mut account = match Whose::of(config).map_err(io::Error::other)? {
        Whose::Server => return Ok(None),
        Whose::Root => Account { uid: 0, gid: 0, groups: Vec::new() },
        Whose::One(name) => account(&name).map_err(io::Error::other)?,
        Whose::Range(first, last) => {
            let id = free(dir, first, last)?;
            Account { uid: id, gid: id, groups: Vec::new() }
        }
    };
    chown(dir, None, Some(account.gid))?;
    if config.accel == Accel::Kvm {
        // Where only members of a group may use it.
        account.groups.extend(fs::metadata("/dev/kvm").ok().map(|m| m.gid()).filter(|g| *g != 0));
    }
    Ok(Some(account))
}

/// A directory in a VM's, in which a process of its user makes sockets.
///
/// # Errors
/// As mkdir(2) and chown(2).
pub fn sockets(dir: &Path, name: &str, account: Option<&Account>) -> io::Result<()> {
    let own = dir.join(name);
    DirBuilder::new().mode(0o700).create(&own)?;
    let Some(Account { uid, gid, .. }) = account else { return Ok(()) };
    chown(&own, Some(*uid), Some(*gid))?;
    // To be passed through, not to be looked at; so with the store.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o710))?;
    let Some(store) = dir.parent() else { return Ok(()) };
    let mode = fs::metadata(store)?.mode() & 0o7777;
    match mode & 0o001 {
        0 => fs::set_permissions(store, fs::Permissions::from_mode(mode | 0o011)),
        _ => Ok(()),
    }
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
        chown(dir, None, Some(id))?;
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
        assert_eq!(Whose::parse(""), Ok(None));
        for (text, whose) in [
            ("root", Whose::Root),
            ("0", Whose::Root),
            ("vm-user", Whose::One("vm-user".into())),
            ("107", Whose::One("107".into())),
            ("5-9", Whose::Range(5, 9)),
        ] {
            assert_eq!(Whose::parse(text), Ok(Some(whose)), "{text}");
        }
        for bad in ["0-9", "9-5", "5-", "5-x", "1-4294967295"] {
            assert!(Whose::parse(bad).is_err(), "{bad}");
        }
        assert!(Whose::One("no such user".into()).check().is_err());
        assert_eq!(account("0"), Err("must be another user than root".into()));
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
            DirBuilder::new().recursive(true).mode(0o700).create(&dir).unwrap();
            assert!(seen.insert(free(&dir, 300_000, 300_002).unwrap()));
            let m = fs::metadata(&dir).unwrap();
            assert_eq!((m.uid(), m.mode() & 0o7777), (0, 0o700));
        }
        let dir = store.join("one too many");
        fs::create_dir(&dir).unwrap();
        let e = free(&dir, 300_000, 300_002).unwrap_err().to_string();
        assert!(e.contains("make the range of `user` larger"), "{e}");
        fs::remove_dir_all(&store).unwrap();
    }
}
