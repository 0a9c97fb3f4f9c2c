//! Confinement: what the processes of a VM may do on the host, in which each is
//! started, and what the server itself keeps.
//!
//! | file           | what it limits |
//! |----------------|----------------|
//! | `user`         | whose a VM's processes are |
//! | `ranges`       | which users are nobody's |
//! | `calls`        | which system calls QEMU may make (seccomp) |
//! | `network`      | an empty network namespace |
//! | `mounts`       | what a QEMU that is root sees of the host's files |
//! | `files`        | what they may open (Landlock) |
//! | `capabilities` | what root is left with, theirs and the server's |
//! | `cgroup`       | memory, processes and CPU time |
//! | `label`        | AppArmor's profile, SELinux's label |
//! | `admission`    | who may claim a VM |
//! | `isolation`    | how much all of it is, in a word |
//! | `images`       | kernel and initramfs: whose, and with which digest |
//!
//! Invariants: everything is decided before a process is forked; what was asked for
//! and can not be had is an error, never a weaker start. What a kernel does not have
//! that was not asked for by name (Landlock) is told once, by the server.
//!
//! What each child inherits and what is reset whoever it is, [`crate::sys::child`] lists.
//!
//! Does not: confine virtiofsd, which does so itself, and proxies.

pub mod admission;
pub mod calls;
pub mod capabilities;
pub mod cgroup;
pub mod files;
pub mod images;
pub mod isolation;
pub mod label;
pub mod mounts;
pub mod network;
pub mod ranges;
pub mod user;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::config::options::OURS;
use crate::config::Config;
use crate::sys::cage::{Account, Cage};
use crate::walls::Wall;
use files::Needs;

/// A user without files.
const NOBODY: u32 = 65_534;

/// The options that say how VMs are confined: one that was made under others is of
/// another shape.
const OPTIONS: [&str; 8] = [
    "user",
    "confine",
    "confine_paths",
    "cgroup",
    "apparmor_profile",
    "selinux_label",
    "kernel_sha256",
    "initrd_sha256",
];

/// Changes when a VM that another version of this program has started lacks walls that this
/// one's have: one that waits is then replaced, whatever its options.
const WALLS: u32 = 2;

/// How a configuration confines, to be compared.
pub fn shape(config: &Config) -> String {
    let options = OPTIONS.iter().map(|key| format!("{key}={}\n", config.literal(OURS, key)));
    format!("walls={WALLS}\n{}", options.collect::<String>())
}

/// A VM for whose processes there is a cage each.
pub struct Confinement<'a> {
    config: &'a Config,
    /// The VM's directory.
    pub dir: &'a Path,
    /// Whose they are, when not the server's.
    pub account: Option<Account>,
}

impl<'a> Confinement<'a> {
    /// For a VM whose directory has just been made, and is its user's from now on.
    ///
    /// # Errors
    /// As chown(2), and when what is asked for can not be had.
    pub fn of(config: &'a Config, id: &'a str, dir: &'a Path) -> io::Result<Confinement<'a>> {
        images::check(config).map_err(|(_, why)| io::Error::other(why))?;
        let account = user::settle(config, dir)?;
        cgroup::make(config, id, dir)?;
        Ok(Confinement { config, dir, account })
    }

    /// A file is to be the VM's user's.
    ///
    /// # Errors
    /// As fchown(2).
    pub fn own(&self, file: &File) -> io::Result<()> {
        match &self.account {
            Some(account) => std::os::unix::fs::fchown(file, Some(account.uid), None),
            None => Ok(()),
        }
    }

    /// For its QEMU, which opens `file` anew: a template's memory.
    ///
    /// # Errors
    /// When what is asked for can not be had.
    pub fn qemu(&self, file: Option<&File>) -> io::Result<Cage> {
        let needs = files::qemu(self.config, self.dir, file)?;
        let view = needs.view();
        let mut cage = self.cage(needs)?;
        if !self.config.flag(OURS, "confine") {
            return Ok(cage);
        }
        if Wall::Seccomp.stands() {
            cage.calls = Some(calls::of_qemu(self.config.shares_9p())?);
        }
        if Wall::Network.stands() {
            cage.network = network::empty();
        }
        let root = self.account.as_ref().is_some_and(|a| a.uid == 0);
        if root && Wall::Mounts.stands() {
            cage.mounts = Some(mounts::namespace(view, self.dir)?);
        }
        Ok(cage)
    }

    /// For the process that carries its vsock, whose sockets are in this directory of the
    /// VM's.
    ///
    /// # Errors
    /// When what is asked for can not be had.
    pub fn vsock_device(&self, program: &Path, sockets: &str) -> io::Result<Cage> {
        user::sockets(self.dir, sockets, self.account.as_ref())?;
        let mut cage = self.cage(files::vsock_device(program, &self.dir.join(sockets)))?;
        if self.config.flag(OURS, "confine") {
            cage.calls = Some(calls::of_vsock_device()?);
            cage.network = network::empty();
        }
        Ok(cage)
    }

    fn cage(&self, needs: Needs) -> io::Result<Cage> {
        let mut cage = Cage {
            cgroups: cgroup::join(self.dir)?,
            label: label::of(self.config)?,
            own_keyring: Wall::Keyring.stands(),
            account: self.account.clone(),
            ..Cage::default()
        };
        if self.config.flag(OURS, "confine") {
            cage.capabilities = capabilities::of_qemu(self.config);
            // A label may only be changed by who could get more; others than root need
            // the promise for Landlock.
            cage.no_new_privileges = cage.label.is_none() || !nix::unistd::geteuid().is_root();
            if Wall::Landlock.stands() {
                cage.files = files::ruleset(&needs)?;
            }
        }
        Ok(cage)
    }
}

/// For a process that speaks for the guest of the VM in this directory on this process's own
/// network: it has no capabilities, and where this process is root, the VM's own user or
/// nobody.
///
/// # Errors
/// As the system's.
pub fn user_network(program: &Path, dir: &Path) -> io::Result<Cage> {
    let root = nix::unistd::geteuid().is_root();
    let account = match root.then(|| std::fs::symlink_metadata(dir)).transpose()?.map(|m| m.gid()) {
        None => None,
        Some(0) => Some(Account { uid: NOBODY, gid: NOBODY, groups: Vec::new() }),
        Some(id) => Some(Account { uid: id, gid: id, groups: Vec::new() }),
    };
    Ok(Cage {
        account,
        capabilities: capabilities::none(),
        no_new_privileges: true,
        files: files::ruleset_with_network(&files::user_network(program))?,
        calls: Some(calls::of_user_network()?),
        ..Cage::default()
    })
}

/// In an error: as what a program could not be started.
pub fn described(cage: &Cage) -> String {
    let mut words = Vec::new();
    if let Some(Account { uid, gid, .. }) = &cage.account {
        words.push(format!("as uid {uid}, gid {gid}"));
    }
    if let Some((_, label)) = &cage.label {
        words.push(format!("labelled {}", String::from_utf8_lossy(label)));
    }
    if !cage.cgroups.is_empty() {
        words.push("in a cgroup of its own".to_string());
    }
    match words.is_empty() {
        true => String::new(),
        false => format!(" ({})", words.join(", ")),
    }
}
