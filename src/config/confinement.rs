//! Whether VMs can be confined as the configuration says, and who may claim them.

use super::options::{OURS, QEMU};
use super::{Config, Error};
use crate::confine::admission::Admission;
use crate::confine::{self, user::Whose};
use crate::walls::Wall;

impl Config {
    pub(super) fn check_confinement(&self) -> Result<(), Error> {
        let whose = Whose::parse(self.text(OURS, "user"));
        let whose = whose.map_err(|why| self.wrong(OURS, "user", why))?;
        let roots = matches!(whose, None | Some(Whose::Root));
        if !roots && self.shares_9p() {
            let why = "can not be used with shared_fs = \"virtio-9p\", for which QEMU must be \
                       root: use \"virtio-fs\" or \"none\"";
            return Err(self.wrong(OURS, "user", why));
        }
        let one = matches!(whose, Some(Whose::One(_))) && Wall::Users.stands();
        if one && (self.pool > 0 || self.names_claimers()) {
            let why = "one user for all VMs would own them all, so that who has one VM has \
                       them all: leave it out, and a server that is root gives each VM a user of \
                       its own (or name a range)";
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
            if whose == Some(Whose::Root) || self.shares_9p() {
                let why = "can not be used where QEMU is root: whoever has a VM can do what its \
                           QEMU can. Leave `user` out, and shared_fs = \"virtio-9p\"";
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
        self.check_user()?;
        let label = match self.text(OURS, "selinux_label") {
            "" => "apparmor_profile",
            _ => "selinux_label",
        };
        confine::label::of(self).map_err(|e| self.wrong(OURS, label, e.to_string()))?;
        let admission = Admission::of(self).map_err(|(key, why)| self.wrong(OURS, key, why))?;
        if self.names_claimers() && !admission.gives() {
            let why = "only a server that is root can give VMs to others: it gives each VM's \
                       QEMU a user of its own";
            let keys = ["claim_users", "claim_groups"];
            let key = keys.into_iter().find(|k| !self.list(OURS, k).is_empty());
            return Err(self.wrong(OURS, key.unwrap_or(keys[0]), why));
        }
        confine::images::check(self).map_err(|(key, why)| self.wrong(QEMU, key, why))
    }

    /// Whether VMs' users are to be had, and nobody else's; with warnings.
    ///
    /// # Errors
    /// With the remedy.
    pub fn check_user(&self) -> Result<Vec<String>, Error> {
        let checked = Whose::of(self).and_then(|whose| whose.check());
        let warnings = checked.map_err(|why| self.wrong(OURS, "user", why))?;
        let place = self.place(OURS, "user");
        Ok(warnings.into_iter().map(|why| format!("{place}: user: {why}")).collect())
    }

    /// Whether it names others than root and the server's user who may claim.
    pub fn names_claimers(&self) -> bool {
        ["claim_users", "claim_groups"].iter().any(|key| !self.list(OURS, key).is_empty())
    }
}
