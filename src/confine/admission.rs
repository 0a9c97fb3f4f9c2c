//! Who may claim: users and groups that the configuration names, beside root and the
//! server's own user; where it names none, whoever the socket's permissions let in.
//!
//! Subordinate users (/etc/subuid) have to be named: one user is as many of them as it likes, in
//! all its groups, and would have as many times what one user may have.
//!
//! Who has the number of a user that VMs' QEMUs run as may claim none: a process of a VM's user
//! is no client, and a client who is one could do with that VM what it likes.
//!
//! Others who may connect can look (Config, Status), and no more. Whoever has a VM has
//! QEMU's monitor, and so can do what QEMU's user can: VMs go to others than root and
//! the server's own user only where QEMU runs as a user of no other rights, as it does when
//! the server is root and `user` says nothing else.

use std::sync::Arc;

use nix::unistd::{geteuid, Group, User};

use super::ranges::Subordinates;
use super::user::Whose;
use crate::config::options::OURS;
use crate::config::Config;
use crate::walls::Wall;

/// Who may claim.
#[derive(Clone, Debug, Default)]
pub struct Admission {
    anybody: bool,
    /// Whether QEMU is another's than the server's, so that its monitor can be given away.
    given: bool,
    /// Whose QEMUs are.
    whose: Whose,
    users: Vec<u32>,
    groups: Vec<u32>,
    subordinates: Arc<Subordinates>,
}

impl Admission {
    /// What the configuration says.
    ///
    /// # Errors
    /// The key, and the name that this host does not know.
    pub fn of(config: &Config) -> Result<Admission, (&'static str, String)> {
        let user = |name: &String| User::from_name(name).ok().flatten().map(|u| u.uid.as_raw());
        let group = |name: &String| Group::from_name(name).ok().flatten().map(|g| g.gid.as_raw());
        let users = found(config, "claim_users", "user", user)?;
        let groups = found(config, "claim_groups", "group", group)?;
        let anybody = users.is_empty() && groups.is_empty();
        let whose = Whose::of(config).map_err(|why| ("user", why))?;
        if let Some(uid) = users.iter().find(|uid| whose.is_vms(**uid)) {
            let text = format!(
                "uid {uid} is one that VMs' QEMUs run as ({}), and could end and read theirs: \
                 set `user` to a range without it",
                whose.described()
            );
            return Err(("claim_users", text));
        }
        // A guest's root writes what it likes into a shared directory, as the host's.
        let given = whose.can_be_given() && !config.shares_virtiofs() || !Wall::Users.stands();
        Ok(Admission { anybody, given, whose, users, groups, subordinates: Arc::default() })
    }

    /// Whether VMs are given to others than root and the server's user at all.
    pub fn gives(&self) -> bool {
        self.given
    }

    /// Whether a process of this user, with these groups, may.
    pub fn allows(&self, uid: u32, groups: &[u32]) -> bool {
        if uid == 0 || uid == geteuid().as_raw() {
            return true;
        }
        let among = || self.anybody || groups.iter().any(|g| self.groups.contains(g));
        let alone = || !self.subordinates.have(uid) || !Wall::Quotas.stands();
        self.given && !self.whose.is_vms(uid) && (self.users.contains(&uid) || among() && alone())
    }
}

fn found(
    config: &Config,
    key: &'static str,
    what: &str,
    by_name: impl Fn(&String) -> Option<u32>,
) -> Result<Vec<u32>, (&'static str, String)> {
    let number = |name: String| {
        let id = name.parse().ok().or_else(|| by_name(&name));
        id.ok_or_else(|| (key, format!("this host has no {what} {name:?}")))
    };
    config.list(OURS, key).into_iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_are_let_in_and_no_others() {
        let config = |text: &str| {
            Config::parse("c".as_ref(), &format!("[vmcache]\nuser = \"500-509\"\n{text}")).unwrap()
        };
        let open = Admission::of(&config("")).unwrap();
        assert!(open.allows(65534, &[65534]) && !open.allows(505, &[65534]));
        let some = config("claim_users = [\"daemon\", \"77\"]\nclaim_groups = [\"78\"]");
        let some = Admission::of(&some).unwrap();
        for (uid, group, may) in [
            (0, 0, true),
            (1, 9, true),
            (77, 9, true),
            (9, 78, true),
            (9, 9, false),
            (505, 78, false),
        ] {
            assert_eq!(some.allows(uid, &[5, group]), may, "{uid} {group}");
        }
        let path = std::env::temp_dir().join(format!("vmcache-admission-{}", std::process::id()));
        std::fs::write(&path, "eve:300:50\n").unwrap();
        let mut all = [open, some, Admission::of(&config("claim_users = [\"310\"]")).unwrap()];
        for one in &mut all {
            one.subordinates = Arc::new(Subordinates::of(path.clone()));
        }
        let [open, some, named] = &all;
        assert!(!open.allows(310, &[]) && !some.allows(310, &[78]) && named.allows(310, &[]));
        assert!(open.allows(350, &[]) && some.allows(350, &[78]));
        std::fs::remove_file(path).unwrap();
        let root = Config::parse("c".as_ref(), "[vmcache]\nuser = \"root\"\n").unwrap();
        assert!(!Admission::of(&root).unwrap().allows(9, &[]), "QEMU is root");
        let (key, why) = Admission::of(&config("claim_users = [\"509\"]")).unwrap_err();
        assert!(key == "claim_users" && why.contains("500-509"), "{key}: {why}");
        let (key, why) = Admission::of(&config("claim_groups = [\"no such\"]")).unwrap_err();
        assert_eq!((key, why.as_str()), ("claim_groups", "this host has no group \"no such\""));
    }
}
