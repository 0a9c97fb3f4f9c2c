//! What a child process gives up between fork and exec.
//!
//! Invariants: [`Cage::enter`] makes system calls only: whatever needs memory or a look
//! around was done before the fork. What needs rights comes first, then they go.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use super::child::own_keyring;
use super::seccomp::Filter;

/// Highest number that a capability could have.
const LAST_CAPABILITY: i32 = 63;

/// The user of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Its uid.
    pub uid: u32,
    /// Its gid.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// What a process is left with; by default all that its parent has, but for the list of
/// [`super::child`].
#[derive(Debug)]
pub struct Cage {
    /// `cgroup.procs` of the cgroups that it joins.
    pub cgroups: Vec<OwnedFd>,
    /// A file of its own below /proc and what is written there: the label with which
    /// its program is to run.
    pub label: Option<(CString, Vec<u8>)>,
    /// Whether it gets an empty keyring.
    pub own_keyring: bool,
    /// Its network namespace.
    pub network: Option<Arc<OwnedFd>>,
    /// Its mount namespace.
    pub mounts: Option<OwnedFd>,
    /// The capabilities that it may have, a bit each.
    pub capabilities: Option<u64>,
    /// Who it is.
    pub account: Option<Account>,
    /// Whether no program that it executes gives it more.
    pub no_new_privileges: bool,
    /// A Landlock ruleset.
    pub files: Option<OwnedFd>,
    /// The system calls that it is refused.
    pub calls: Option<Filter>,
}

impl Default for Cage {
    fn default() -> Cage {
        Cage {
            cgroups: Vec::new(),
            label: None,
            own_keyring: true,
            network: None,
            mounts: None,
            capabilities: None,
            account: None,
            no_new_privileges: false,
            files: None,
            calls: None,
        }
    }
}

fn checked(result: i64) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Cage {
    /// Goes in; there is no way back.
    ///
    /// # Errors
    /// As the system calls'; the process must then end.
    pub fn enter(&mut self) -> io::Result<()> {
        self.join()?;
        // SAFETY: system calls with integers, and with pointers to memory that `self`
        // holds and of its length; nothing is allocated or locked.
        unsafe {
            if let Some(kept) = self.capabilities {
                self.drop_capabilities(kept)?;
            }
            if self.no_new_privileges {
                checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into())?;
            }
            // While this is root, who needs no promise for it; so with the calls.
            if let Some(files) = &self.files {
                let fd = files.as_raw_fd();
                checked(libc::syscall(libc::SYS_landlock_restrict_self, fd, 0))?;
            }
        }
        if let Some(calls) = &mut self.calls {
            calls.install()?;
        }
        if let Some(Account { uid, gid, groups }) = &self.account {
            // SAFETY: integers, and a list of so many.
            unsafe {
                checked(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
                checked(libc::syscall(libc::SYS_setresgid, *gid, *gid, *gid))?;
                checked(libc::syscall(libc::SYS_setresuid, *uid, *uid, *uid))?;
            }
        }
        Ok(())
    }

    /// What it takes rights to go into.
    fn join(&self) -> io::Result<()> {
        // SAFETY: as in `enter`.
        unsafe {
            for procs in &self.cgroups {
                checked(libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) as i64)?;
            }
            if let Some((path, text)) = &self.label {
                let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                checked(fd.into())?;
                checked(libc::write(fd, text.as_ptr().cast(), text.len()) as i64)?;
            }
            if self.own_keyring {
                match own_keyring() {
                    // An ordinary user may have few keys. This process will use none.
                    Err(e) if e.raw_os_error() == Some(libc::EDQUOT) && self.calls.is_some() => {}
                    done => done?,
                }
            }
            if let Some(network) = &self.network {
                checked(libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET).into())?;
            }
            if let Some(mounts) = &self.mounts {
                checked(libc::setns(mounts.as_raw_fd(), libc::CLONE_NEWNS).into())?;
            }
        }
        Ok(())
    }

    /// From the set that bounds what a program of root's gets.
    unsafe fn drop_capabilities(&self, kept: u64) -> io::Result<()> {
        for capability in 0..=LAST_CAPABILITY {
            // SAFETY: integers only; a number that the kernel does not know is an error.
            unsafe {
                let has = libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) == 1;
                if has && kept & (1 << capability) == 0 {
                    checked(libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0).into())?;
                }
            }
        }
        Ok(())
    }
}
