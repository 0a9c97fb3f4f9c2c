//! Confinement: what the processes of a VM may do on the host, in which each is
//! started, and what the server itself keeps.
//!
//! | file           | what it limits |
//! |----------------|----------------|
//! | `user`         | whose a VM's processes are, and its directory |
//! | `files`        | what they may open (Landlock) |
//! | `capabilities` | what root is left with, theirs and the server's |
//! | `cgroup`       | memory, processes and CPU time |
//! | `label`        | AppArmor's profile, SELinux's label |
//! | `admission`    | who may claim a VM |
//! | `images`       | kernel and initramfs: whose, and with which digest |
//!
//! Invariants: everything is decided before a process is forked; what was asked for
//! and can not be had is an error, never a weaker start. What a kernel does not have
//! that was not asked for by name (Landlock) is told once, by the server.
//!
//! Does not: filter system calls, which QEMU does (`-sandbox`); confine virtiofsd,
//! which does so itself, and proxies.

pub mod admission;
pub mod capabilities;
pub mod cgroup;
pub mod files;
pub mod images;
pub mod label;
pub mod user;

use std::fs::File;
use std::io;
use std::path::Path;

use crate::config::options::OURS;
use crate::config::Config;
use crate::sys::cage::{Account, Cage};
use files::Needs;

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

/// How a configuration confines, to be compared.
pub fn shape(config: &Config) -> String {
    OPTIONS.iter().map(|key| format!("{key}={}\n", config.literal(OURS, key))).collect()
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
        self.cage(files::qemu(self.config, self.dir, file)?)
    }

    /// For the process that carries its vsock.
    ///
    /// # Errors
    /// When what is asked for can not be had.
    pub fn vsock_device(&self, program: &Path) -> io::Result<Cage> {
        self.cage(files::vsock_device(program, self.dir))
    }

    fn cage(&self, needs: Needs) -> io::Result<Cage> {
        let mut cage = Cage {
            cgroups: cgroup::join(self.dir)?,
            label: label::of(self.config)?,
            account: self.account.clone(),
            ..Cage::default()
        };
        if self.config.flag(OURS, "confine") {
            cage.capabilities = capabilities::of_qemu(self.config);
            // A label may only be changed by who could get more; others than root need
            // the promise for Landlock.
            cage.no_new_privileges = cage.label.is_none() || !nix::unistd::geteuid().is_root();
            cage.files = files::ruleset(&needs)?;
        }
        Ok(cage)
    }
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
