//! How much of the pool one user may have: VMs, their memory, and claims that it leaves
//! unconfirmed. Root and the server's own user may have all of it.
//!
//! Invariants: a [`Share`] is taken before a claim takes a VM or waits for one, goes with the VM
//! and ends with it, so that what is counted is what is there; VMs of a server before this one
//! count as well, but are never taken away.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use crate::config::options::OURS;
use crate::config::Config;
use crate::host;
use crate::walls::Wall;

/// Unconfirmed claims are counted for so long.
const MINUTE: Duration = Duration::from_secs(60);
/// Users about whom something is remembered that have nothing now.
const REMEMBERED: usize = 4096;

/// The most that one user may have; `None`: any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// VMs, claims that wait included.
    pub vms: Option<u64>,
    /// Their memory, MiB.
    pub memory_mib: Option<u64>,
    /// Claims left unconfirmed in a minute.
    pub unconfirmed: Option<u64>,
}

impl Limits {
    /// What the configuration says.
    pub fn of(config: &Config) -> Limits {
        let limit = |key| Some(config.number(OURS, key)).filter(|n| *n > 0);
        let half = Some(host::memory_mib() / 2).filter(|n| *n > 0);
        match Wall::Quotas.stands() {
            true => Limits {
                vms: limit("user_max_vms"),
                memory_mib: limit("user_max_memory").or(half),
                unconfirmed: limit("user_unconfirmed_per_minute"),
            },
            false => Limits::default(),
        }
    }
}

#[derive(Debug, Default)]
struct Use {
    vms: u64,
    memory_mib: u64,
    unconfirmed: VecDeque<Instant>,
}

/// What users have.
#[derive(Debug, Default)]
pub struct Quotas {
    limits: Limits,
    users: Mutex<HashMap<u32, Use>>,
}

/// One VM's part of what its user may have; given back when dropped.
#[derive(Debug)]
pub struct Share {
    quotas: Arc<Quotas>,
    uid: u32,
    memory_mib: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut users = self.quotas.users();
        if let Some(user) = users.get_mut(&self.uid) {
            user.vms -= 1;
            user.memory_mib -= self.memory_mib;
        }
    }
}

impl Quotas {
    /// Nobody has anything.
    pub fn new(limits: Limits) -> Arc<Quotas> {
        Arc::new(Quotas { limits, users: Mutex::default() })
    }

    fn users(&self) -> MutexGuard<'_, HashMap<u32, Use>> {
        self.users.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A share for a claim of a VM of so much memory.
    ///
    /// # Errors
    /// A sentence: what the user has, and which option allows no more.
    pub fn claim(self: &Arc<Quotas>, uid: u32, memory_mib: u32) -> Result<Share, String> {
        self.claim_at(uid, memory_mib.into(), Instant::now())
    }

    fn claim_at(
        self: &Arc<Quotas>,
        uid: u32,
        memory_mib: u64,
        now: Instant,
    ) -> Result<Share, String> {
        {
            let mut users = self.users();
            forget(&mut users, now);
            let user = users.entry(uid).or_default();
            if uid != 0 && uid != geteuid().as_raw() {
                refuse(uid, user, memory_mib, &self.limits)?;
            }
            user.vms += 1;
            user.memory_mib += memory_mib;
        }
        Ok(Share { quotas: Arc::clone(self), uid, memory_mib })
    }

    /// The same for a VM that the user has already, whatever else it has.
    pub fn inherit(self: &Arc<Quotas>, uid: u32, memory_mib: u32) -> Share {
        let memory_mib = u64::from(memory_mib);
        {
            let mut users = self.users();
            let user = users.entry(uid).or_default();
            user.vms += 1;
            user.memory_mib += memory_mib;
        }
        Share { quotas: Arc::clone(self), uid, memory_mib }
    }

    /// A VM was ended because its claim was not confirmed, or could not be delivered.
    pub fn unconfirmed(&self, uid: u32) {
        let most = self.limits.unconfirmed.unwrap_or(0);
        let mut users = self.users();
        let user = users.entry(uid).or_default();
        // No more than are looked at.
        while user.unconfirmed.len() as u64 >= most.max(1) {
            user.unconfirmed.pop_front();
        }
        user.unconfirmed.push_back(Instant::now());
    }
}

/// Drops what is over, and users who have nothing.
fn forget(users: &mut HashMap<u32, Use>, now: Instant) {
    for user in users.values_mut() {
        user.unconfirmed.retain(|at| now.saturating_duration_since(*at) < MINUTE);
    }
    if users.len() > REMEMBERED {
        users.retain(|_, user| user.vms > 0 || !user.unconfirmed.is_empty());
    }
}

fn refuse(uid: u32, user: &Use, memory_mib: u64, limits: &Limits) -> Result<(), String> {
    const REMEDY: &str = "end some, or ask the administrator";
    if let Some(most) = limits.vms.filter(|most| user.vms >= *most) {
        return Err(format!(
            "uid {uid} has {} VMs (claims that wait included), and user_max_vms allows {most}: \
             {REMEDY}",
            user.vms
        ));
    }
    if let Some(most) = limits.memory_mib.filter(|most| user.memory_mib + memory_mib > *most) {
        return Err(format!(
            "uid {uid} has VMs of {} MiB (claims that wait included) and claims one of \
             {memory_mib}, and user_max_memory allows {most} MiB: {REMEDY}",
            user.memory_mib
        ));
    }
    match limits.unconfirmed.filter(|most| user.unconfirmed.len() as u64 >= *most) {
        Some(most) => Err(format!(
            "uid {uid} left {} claims unconfirmed within a minute, each of which cost a VM, and \
             user_unconfirmed_per_minute allows {most}: claim again in a minute",
            user.unconfirmed.len()
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quotas(vms: u64, memory_mib: u64, unconfirmed: u64) -> Arc<Quotas> {
        let some = |n| Some(n).filter(|n| *n > 0);
        Quotas::new(Limits {
            vms: some(vms),
            memory_mib: some(memory_mib),
            unconfirmed: some(unconfirmed),
        })
    }

    #[test]
    fn a_user_has_so_many_and_gives_them_back() {
        let quotas = quotas(2, 1000, 0);
        let one = quotas.claim(7, 256).unwrap();
        let two = quotas.claim(7, 256).unwrap();
        let why = quotas.claim(7, 256).unwrap_err();
        assert!(why.contains("uid 7 has 2 VMs") && why.contains("user_max_vms allows 2"), "{why}");
        drop(quotas.claim(8, 1000).unwrap());
        drop(one);
        let why = quotas.claim(7, 745).unwrap_err();
        assert!(why.contains("user_max_memory allows 1000 MiB"), "{why}");
        drop(quotas.claim(7, 744).unwrap());
        drop(two);
        assert!(quotas.users().values().all(|u| (u.vms, u.memory_mib) == (0, 0)));
    }

    #[test]
    fn root_has_all_and_what_was_there_before_counts() {
        let quotas = quotas(1, 1, 1);
        let many: Vec<_> = (0..9).map(|_| quotas.claim(0, 999).unwrap()).collect();
        let before = [quotas.inherit(7, 512), quotas.inherit(7, 512)];
        assert!(quotas.claim(7, 1).is_err());
        drop((many, before));
        assert!(quotas.claim(7, 1).is_ok());
    }

    #[test]
    fn who_leaves_claims_unconfirmed_waits_a_minute() {
        let quotas = quotas(0, 0, 3);
        for _ in 0..5 {
            quotas.unconfirmed(7);
        }
        let now = Instant::now();
        let why = quotas.claim_at(7, 1, now).unwrap_err();
        assert!(why.contains("left 3 claims unconfirmed"), "{why}");
        assert!(quotas.claim_at(8, 1, now).is_ok());
        assert!(quotas.claim_at(7, 1, now + MINUTE).is_ok());
    }
}
