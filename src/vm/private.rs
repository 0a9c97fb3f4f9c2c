//! Small files in a VM's directory: read and written so that nobody who may write
//! there can mislead whoever does.
//!
//! Whose word counts: root's, and this process's user's; not that of QEMU's user, who may
//! bind sockets there, nor anybody's where the store is another user's
//! ([`crate::trusted_path`]). Invariants: no link is followed, nothing but a regular file is
//! opened, nothing is waited for; a file that another user wrote, or may write, is none; one
//! that is replaced is a new one, never the old one's contents.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use crate::trusted_path::Destination;

/// Permissions of such a file: whoever may pass through the directory reads it.
const MODE: u32 = 0o644;

/// What a file says, and the user who wrote it.
///
/// # Errors
/// As open(2) and read(2); when it is longer than `most` bytes, or not to be trusted.
pub fn read(dir: &Path, name: &str, most: u64) -> io::Result<(Vec<u8>, u32)> {
    let file = Destination::inside(dir, name)?.open(false)?;
    let uid = file.metadata()?.uid();
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > most {
        true => Err(io::Error::other(format!("{name} has more than {most} bytes"))),
        false => Ok((bytes, uid)),
    }
}

/// A new file, empty, in the place of what bears its name.
///
/// # Errors
/// As unlink(2) and open(2).
pub fn create(dir: &Path, name: &str) -> io::Result<File> {
    made(&Destination::inside(dir, name)?)
}

fn made(place: &Destination) -> io::Result<File> {
    let file = place.create(MODE)?;
    // Whatever this process's umask: who may enter the directory may read what is there.
    file.set_permissions(Permissions::from_mode(MODE))?;
    Ok(file)
}

/// Writes a file whole, in the place of what bears its name.
///
/// # Errors
/// As the file system's; the old one then stands.
pub fn replace(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = Destination::inside(dir, &format!("{name}.new"))?;
    made(&new)?.write_all(bytes)?;
    new.rename(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use nix::unistd::geteuid;
    use std::fs;
    use std::os::unix::fs::{chown, symlink};

    #[test]
    fn what_others_have_changed_is_not_believed_and_nothing_of_theirs_is_overwritten() {
        assert!(geteuid().is_root(), "this test gives files to others: run it as root");
        let store = std::env::temp_dir().join(format!("vmcache-private-{}", std::process::id()));
        let dir = store.join("vm");
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("f");
        let said = || read(&dir, "f", 8);
        replace(&dir, "f", b"word").unwrap();
        assert_eq!(said().unwrap(), (b"word".to_vec(), 0));
        replace(&dir, "f", b"nine bytes").unwrap();
        assert!(said().is_err(), "too long");

        replace(&dir, "f", b"word").unwrap();
        fs::hard_link(&path, dir.join("g")).unwrap();
        assert!(said().is_err(), "it has another name");
        fs::remove_file(dir.join("g")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(said().is_err(), "all may write it");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        chown(&path, Some(1234), None).unwrap();
        assert!(said().is_err(), "it is another's");
        chown(&dir, Some(1234), None).unwrap();
        assert!(said().is_err(), "who has the directory");
        chown(&store, Some(1234), None).unwrap();
        assert!(said().is_err(), "who has the store");
        chown(&path, Some(0), None).unwrap();
        let why = said().unwrap_err().to_string();
        assert!(why.contains(&format!("{} is uid 1234's", store.display())), "{why}");
        chown(&store, Some(0), None).unwrap();

        let theirs = dir.join("theirs");
        fs::write(&theirs, "kept").unwrap();
        for name in ["f", "f.new"] {
            let _ = fs::remove_file(dir.join(name));
            symlink(&theirs, dir.join(name)).unwrap();
        }
        assert!(said().is_err(), "a link");
        replace(&dir, "f", b"word").unwrap();
        assert_eq!(fs::read(&theirs).unwrap(), b"kept");
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        assert!(said().is_err(), "nobody writes into it, and nobody waits for that");
        fs::remove_dir_all(&store).unwrap();
    }
}
