//! AppArmor's profile and SELinux's label for QEMU.
//!
//! Invariant: asked for on a host that has no such thing, it is an error: others' VMs
//! have silently run unlabelled.
//!
//! Source: apparmor's `aa_change_onexec(2)` and libselinux's `setexeccon(3)`, which
//! write the same files.

use std::ffi::CString;
use std::io;
use std::path::Path;

use crate::config::options::OURS;
use crate::config::Config;

const APPARMOR: [&str; 2] = ["/proc/self/attr/apparmor/exec", "/proc/self/attr/exec"];
const SELINUX: &str = "/proc/self/attr/exec";
/// There when the kernel has each.
const HAS_APPARMOR: &str = "/sys/kernel/security/apparmor";
const HAS_SELINUX: &str = "/sys/fs/selinux";

/// What a child writes, and where, before it executes QEMU; `None` when nothing is
/// asked for.
///
/// # Errors
/// When this host has no such thing.
pub fn of(config: &Config) -> io::Result<Option<(CString, Vec<u8>)>> {
    let (profile, label) =
        (config.text(OURS, "apparmor_profile"), config.text(OURS, "selinux_label"));
    let (path, text) = match (profile, label) {
        ("", "") => return Ok(None),
        (profile, "") => {
            there(HAS_APPARMOR, "apparmor_profile", "AppArmor")?;
            let path = APPARMOR.into_iter().find(|p| Path::new(p).exists());
            (path.unwrap_or(APPARMOR[1]), format!("exec {profile}"))
        }
        (_, label) => {
            there(HAS_SELINUX, "selinux_label", "SELinux")?;
            (SELINUX, label.to_string())
        }
    };
    Ok(Some((CString::new(path)?, text.into_bytes())))
}

fn there(place: &str, key: &str, what: &str) -> io::Result<()> {
    match Path::new(place).exists() {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "{key} is set, and this host has no {what} ({place} is not there): leave it out"
        ))),
    }
}
