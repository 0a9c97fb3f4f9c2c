//! Kernel, initramfs and firmware, which every VM of a pool boots: nobody but root and this
//! process's user can change them ([`crate::trusted_path`]), and they are what their digests
//! say.
//!
//! Invariant: looked at before each boot, read again only when a file was replaced or
//! written since (its [`Stamp`]).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::user::Whose;
use crate::config::options::{OURS, QEMU};
use crate::config::Config;
use crate::digest::sha256;
use crate::trusted_path::{refused, TrustedPath};
use crate::vm::shape::Stamp;

/// Files whose digest is remembered: a process boots of one or two configurations.
const REMEMBERED: usize = 64;

/// What files were when they were read last.
static KNOWN: Mutex<Option<HashMap<PathBuf, (Stamp, String)>>> = Mutex::new(None);

/// Checks the images that a configuration names.
///
/// # Errors
/// The option that names it, and a sentence with path and remedy.
pub fn check(config: &Config) -> Result<(), (&'static str, String)> {
    let others = !matches!(Whose::of(config), Ok(Whose::Server | Whose::Root));
    if others {
        let path = config.qemu();
        executable(&path).map_err(|why| ("path", format!("{}: {why}", path.display())))?;
    }
    let firmware: PathBuf = config.text(QEMU, "firmware").into();
    let all = [
        ("kernel", config.kernel(), "kernel_sha256"),
        ("initrd", config.initrd(), "initrd_sha256"),
        ("firmware", firmware, ""),
    ];
    for (name, path, key) in all {
        if name == "firmware" && path.as_os_str().is_empty() {
            continue;
        }
        let wanted = if key.is_empty() { "" } else { config.text(OURS, key) };
        one(&path, key, wanted)
            .and_then(|image| if others { readable(image.path()) } else { Ok(()) })
            .map_err(|why| match refused(&why) {
                Some(why) => (name, why.to_string()),
                None => (name, format!("{}: {why}", path.display())),
            })?;
    }
    Ok(())
}

/// Whether a user who has no rights can read it, to whom it is given open.
fn readable(path: &Path) -> io::Result<()> {
    match fs::metadata(path)?.mode() & 0o004 {
        0 => Err(io::Error::other("a VM's user can not read it: `chmod o+r` it")),
        _ => Ok(()),
    }
}

/// Whether a user who has no rights can execute it.
///
/// # Errors
/// With the remedy.
pub fn executable(path: &Path) -> io::Result<()> {
    let path = fs::canonicalize(path)?;
    let closed = |p: &Path| Ok::<_, io::Error>(fs::metadata(p)?.mode() & 0o001 == 0);
    if closed(&path)? {
        return Err(io::Error::other("a VM's user can not execute it: `chmod o+rx` it"));
    }
    for above in path.ancestors().skip(1) {
        if closed(above)? {
            let text = format!(
                "a VM's user can not reach it: `chmod o+x {}`, or put it elsewhere",
                above.display()
            );
            return Err(io::Error::other(text));
        }
    }
    Ok(())
}

fn one(path: &Path, key: &str, wanted: &str) -> io::Result<TrustedPath> {
    let image = TrustedPath::file(path)?;
    if wanted.is_empty() {
        return Ok(image);
    }
    let digest = digest(path, image.open()?)?;
    match digest.eq_ignore_ascii_case(wanted) {
        true => Ok(image),
        false => Err(io::Error::other(format!(
            "its SHA-256 is {digest}, and {key} says {wanted}: put the right file there, or \
             change {key}"
        ))),
    }
}

fn digest(path: &Path, file: File) -> io::Result<String> {
    let stamp = Stamp::of(&file.metadata()?);
    let mut known = KNOWN.lock().unwrap_or_else(|e| e.into_inner());
    let known = known.get_or_insert_default();
    if let Some((_, digest)) = known.get(path).filter(|(was, _)| *was == stamp) {
        return Ok(digest.clone());
    }
    let digest = sha256(file)?;
    if known.len() >= REMEMBERED {
        known.clear();
    }
    known.insert(path.to_path_buf(), (stamp, digest.clone()));
    Ok(digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_image_that_others_may_write_or_that_is_another_is_refused() {
        let path = std::env::temp_dir().join(format!("vmcache-image-{}", std::process::id()));
        let chmod = |mode| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        fs::write(&path, "abc").unwrap();
        chmod(0o666);
        let why = one(&path, "k", "").unwrap_err().to_string();
        assert!(why.contains("chmod o-w"), "{why}");
        chmod(0o644);
        one(&path, "k", "").unwrap();
        let abc = "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD";
        one(&path, "k", abc).unwrap();
        one(&path, "k", abc).unwrap();
        fs::write(&path, "abd").unwrap();
        let why = one(&path, "k", abc).unwrap_err().to_string();
        assert!(why.contains("and k says BA78"), "{why}");
        fs::remove_file(&path).unwrap();
    }
}
