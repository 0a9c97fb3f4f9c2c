//! What an inode is beside its content: owner, mode, time, extended attributes; as an
//! entry of a tar says it, and as it is given to what was made.
//!
//! Invariants: no link is followed; what is given later takes nothing back that was given
//! before (an owner drops set-id bits and capabilities, content changes the time).

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{fchmod, fchmodat, futimens, utimensat, FchmodatFlags, Mode, UtimensatFlags};
use nix::sys::time::TimeSpec;
use nix::unistd::{fchown, fchownat, Gid, Uid};
use xattr::FileExt as _;

use super::reader::Entry;
use super::walk::by_proc;
use super::{io_at, Error, Why};

/// Extended attributes that a file system does not take: the first one's file and name,
/// and how many.
pub type Lost = Option<(PathBuf, String, u64)>;

/// What an inode is to be beside its content.
#[derive(Clone)]
pub struct Meta {
    /// Permissions, with set-id and sticky bits.
    pub mode: u32,
    /// User and group; `None`: whose process this is.
    pub owner: Option<(Uid, Gid)>,
    /// When it was changed.
    pub changed: TimeSpec,
    /// Extended attributes: names and values.
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Meta {
    /// All that an entry says.
    ///
    /// # Errors
    /// [`Why::Malformed`].
    pub fn of(entry: &Entry) -> Result<Meta, Why> {
        let narrow = |n: u64| {
            // The largest one means: leave it.
            let id = u32::try_from(n).ok().filter(|id| *id != u32::MAX);
            id.ok_or_else(|| Why::Malformed(format!("owner {n}")))
        };
        let (user, group) = (narrow(entry.owner.0)?, narrow(entry.owner.1)?);
        Ok(Meta {
            mode: entry.mode,
            owner: Some((Uid::from_raw(user), Gid::from_raw(group))),
            changed: TimeSpec::new(entry.changed.0, entry.changed.1.into()),
            attributes: attributes(entry),
        })
    }

    /// Bytes of its attributes.
    pub fn bytes(&self) -> usize {
        self.attributes.iter().map(|(k, v)| k.len() + v.len()).sum()
    }

    /// Gives it to what is open.
    ///
    /// # Errors
    /// The system's; an attribute that the file system does not have is counted in `lost`.
    pub fn give(&self, file: &File, path: &Path, lost: &mut Lost) -> Result<(), Error> {
        let failed = |e: nix::Error| io_at("set owner, mode and time of", path)(e.into());
        if let Some((user, group)) = self.owner {
            fchown(file, Some(user), Some(group)).map_err(failed)?;
        }
        fchmod(file, Mode::from_bits_truncate(self.mode)).map_err(failed)?;
        for (key, value) in &self.attributes {
            let set = file.set_xattr(OsStr::from_bytes(key), value);
            attribute(set, path, key, lost)?;
        }
        futimens(file, &self.changed, &self.changed).map_err(failed)
    }

    /// Gives it to a name of a directory, which is not opened: a link, a device.
    ///
    /// # Errors
    /// As [`Meta::give`].
    pub fn give_at(
        &self,
        (dir, base): (BorrowedFd<'_>, &OsStr),
        path: &Path,
        link: bool,
        lost: &mut Lost,
    ) -> Result<(), Error> {
        let failed = |e: nix::Error| io_at("set owner, mode and time of", path)(e.into());
        if let Some((user, group)) = self.owner {
            fchownat(dir, base, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_err(failed)?;
        }
        if !link {
            let mode = Mode::from_bits_truncate(self.mode);
            fchmodat(dir, base, mode, FchmodatFlags::NoFollowSymlink).map_err(failed)?;
        }
        for (key, value) in &self.attributes {
            let set = xattr::set(by_proc(dir, base), OsStr::from_bytes(key), value);
            attribute(set, path, key, lost)?;
        }
        let flags = UtimensatFlags::NoFollowSymlink;
        match utimensat(dir, base, &self.changed, &self.changed, flags) {
            // Some file systems have no times of links.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) if link => Ok(()),
            done => done.map_err(failed),
        }
    }
}

/// A file system that has no such attributes is no reason to copy nothing, but one to
/// be told. Links and devices have no `user.` ones anywhere.
fn attribute(set: io::Result<()>, path: &Path, key: &[u8], lost: &mut Lost) -> Result<(), Error> {
    match set {
        Ok(()) => Ok(()),
        Err(e)
            if e.kind() == io::ErrorKind::Unsupported
                || (key.starts_with(b"user.") && e.kind() == io::ErrorKind::PermissionDenied) =>
        {
            let name = String::from_utf8_lossy(key).into_owned();
            lost.get_or_insert((path.to_path_buf(), name, 0)).2 += 1;
            Ok(())
        }
        Err(e) => Err(io_at("set an extended attribute of", path)(e)),
    }
}

/// Names and values; bsdtar's form counts where the other one is missing.
fn attributes(entry: &Entry) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut found: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut put = |name: Vec<u8>, value: Vec<u8>, again: bool| match found
        .iter_mut()
        .find(|(n, _)| *n == name)
    {
        Some(old) if again => old.1 = value,
        Some(_) => {}
        None => found.push((name, value)),
    };
    for (key, value) in entry.records.all() {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            // GNU tar's way to write a name that has a "=".
            let name = percent(name).unwrap_or_else(|| name.to_vec());
            put(name, value.to_vec(), true);
        }
    }
    for (key, value) in entry.records.all() {
        let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") else { continue };
        if let (Some(name), Some(value)) = (percent(name), base64(value)) {
            put(name, value, false);
        }
    }
    found
}

/// A name in which bytes are written as %XX.
fn percent(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = text;
    while let Some((first, more)) = rest.split_first() {
        rest = more;
        if *first != b'%' {
            out.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(more.get(..2)?).ok()?;
        out.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &more[2..];
    }
    Some(out)
}

/// Base 64, with its padding or without.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut bits, mut have) = (0u32, 0);
    for byte in text.iter().take_while(|b| **b != b'=') {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        have += 6;
        if have >= 8 {
            have -= 8;
            out.push((bits >> have) as u8);
            bits &= (1 << have) - 1;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bsdtars_attributes_are_decoded() {
        assert_eq!(base64(b"AQAAAg").unwrap(), [1, 0, 0, 2]);
        assert_eq!(base64(b"cmVk").unwrap(), b"red");
        assert_eq!(base64(b"cg==").unwrap(), b"r");
        assert_eq!(base64(b"").unwrap(), b"");
        assert!(base64(b"a b").is_none());
        assert_eq!(percent(b"user.a%20b").unwrap(), b"user.a b");
        assert!(percent(b"user.%2").is_none() && percent(b"%zz").is_none());
    }
}
