//! Access control lists of directories: one more user may pass through one, and nobody else.
//!
//! A mode has room for an owner, a group and everybody; the owner of a directory may write in
//! it. So a user to whom a VM was handed is let in by an entry of its own.
//!
//! Source: acl(5); the attribute's form is that of Linux's include/uapi/linux/posix_acl_xattr.h.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The attribute.
const NAME: &str = "system.posix_acl_access";
const VERSION: u32 = 2;
/// Whom an entry is for.
const OWNER: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHERS: u16 = 0x20;
/// The id of an entry that needs none.
const NO_ID: u32 = u32::MAX;
/// What it allows: to pass through.
const PASS: u16 = 0o1;

/// Lets a user pass through a directory, beside whom its mode lets in already.
///
/// # Errors
/// As setxattr(2): `EOPNOTSUPP` where the file system has no such lists.
pub fn admit(dir: &Path, uid: u32) -> io::Result<()> {
    let mode = fs::symlink_metadata(dir)?.mode();
    let bits = |shift: u32| (mode >> shift & 0o7) as u16;
    let entries = [
        (OWNER, bits(6), NO_ID),
        (USER, PASS, uid),
        (GROUP, bits(3) & PASS, NO_ID),
        (MASK, PASS, NO_ID),
        (OTHERS, bits(0), NO_ID),
    ];
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (whom, may, id) in entries {
        bytes.extend(whom.to_le_bytes());
        bytes.extend(may.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    xattr::set(dir, NAME, &bytes).map_err(|e| match e.raw_os_error() {
        Some(n) if n == nix::errno::Errno::EOPNOTSUPP as i32 => io::Error::new(
            e.kind(),
            format!(
                "{}: its file system has no access control lists, by which one user alone is let \
                 in: choose a vm_store_path on a tmpfs",
                dir.display()
            ),
        ),
        _ => e,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    #[test]
    #[allow(clippy::disallowed_methods)] // Somebody else has to try.
    fn one_user_is_let_in_and_can_make_nothing() {
        let dir = Path::new("/dev/shm").join(format!("vmcache-acl-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("file"), "for one").unwrap();
        fs::set_permissions(dir.join("file"), fs::Permissions::from_mode(0o644)).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).unwrap();
        admit(&dir, 231_999).unwrap();
        let tries = |uid: u32, script: &str| {
            let mut shell = std::process::Command::new("/bin/sh");
            let script = format!("cd {} && {script}", dir.display());
            shell.args(["-c", &script]).uid(uid).gid(uid).stderr(std::process::Stdio::null());
            shell.output().unwrap()
        };
        assert_eq!(tries(231_999, "cat file").stdout, b"for one");
        assert!(!tries(231_999, "touch new").status.success());
        assert!(!tries(231_999, "ls .").status.success());
        assert!(!tries(231_998, "cat file").status.success());
        fs::remove_dir_all(&dir).unwrap();
    }
}
