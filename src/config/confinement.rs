//! Whether VMs can be confined as the configuration says, and who may claim them.

use super::options::{OURS, QEMU};
use super::{Config, Error};
use crate::confine::admission::Admission;
use crate::confine::{self, user::Whose};

impl Config {
    pub(super) fn check_confinement(&self) -> Result<(), Error> {
        let whose = Whose::parse(self.text(OURS, "user"));
        let whose = whose.map_err(|why| self.wrong(OURS, "user", why))?;
        if whose != Whose::Server && self.shares_9p() {
            let why = "can not be used with shared_fs = \"virtio-9p\", for which QEMU must be \
                       root: use \"virtio-fs\" or \"none\"";
            return Err(self.wrong(OURS, "user", why));
        }
        for key in ["kernel_sha256", "initrd_sha256"] {
            let digest = self.text(OURS, key);
            let is_one = digest.len() == 64 && digest.chars().all(|c| c.is_ascii_hexdigit());
            if !digest.is_empty() && !is_one {
                let why = "must be 64 hexadecimal digits, as sha256sum prints them";
                return Err(self.wrong(OURS, key, why));
            }
        }
        for key in ["claim_users", "claim_groups"] {
            if self.list(OURS, key).is_empty() {
                continue;
            }
            if whose == Whose::Server {
                let why = "needs `user`: whoever has a VM can do what its QEMU can";
                return Err(self.wrong(OURS, key, why));
            }
            if self.shares_virtiofs() {
                let why = "can not be used with shared_fs = \"virtio-fs\", in whose directory a \
                           guest makes files as the host's root: use \"none\"";
                return Err(self.wrong(OURS, key, why));
            }
        }
        let cgroup = self.text(OURS, "cgroup");
        if cgroup.split('/').any(|part| part == "." || part == "..") {
            return Err(self.wrong(OURS, "cgroup", "must be a path below /sys/fs/cgroup"));
        }
        if !self.text(OURS, "apparmor_profile").is_empty()
            && !self.text(OURS, "selinux_label").is_empty()
        {
            let why = "can not be used with apparmor_profile: a host has the one or the other";
            return Err(self.wrong(OURS, "selinux_label", why));
        }
        if let Some(path) = self.list(OURS, "confine_paths").iter().find(|p| !p.starts_with('/')) {
            let why = format!("{path:?} is no absolute path");
            return Err(self.wrong(OURS, "confine_paths", why));
        }
        Ok(())
    }

    /// Whether this host can confine VMs as it is asked to.
    ///
    /// # Errors
    /// With the remedy.
    pub(super) fn check_confinable(&self) -> Result<(), Error> {
        let user = Whose::parse(self.text(OURS, "user")).map_err(str::to_string);
        user.and_then(|u| u.check()).map_err(|why| self.wrong(OURS, "user", why))?;
        let label = match self.text(OURS, "selinux_label") {
            "" => "apparmor_profile",
            _ => "selinux_label",
        };
        confine::label::of(self).map_err(|e| self.wrong(OURS, label, e.to_string()))?;
        Admission::of(self).map_err(|(key, why)| self.wrong(OURS, key, why))?;
        confine::images::check(self).map_err(|(key, why)| self.wrong(QEMU, key, why))
    }
}
