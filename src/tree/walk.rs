//! Directories and files opened one name after the other, relative to the directory that
//! was opened before.
//!
//! Invariants: no symbolic link is followed; what was opened is what was looked at, or it
//! is an error: a name that somebody swaps in between is never read; nothing here waits
//! for a FIFO's other end, or makes a terminal this process's own.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::dir::Dir;
use nix::fcntl::{openat, readlinkat, AtFlags, OFlag};
use nix::sys::stat::{fstat, fstatat, FileStat, Mode, SFlag};

/// What a file is, without its permissions.
pub fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// By what an inode is known.
pub fn identity(stat: &FileStat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// Looks at a name of a directory; a link is looked at itself.
///
/// # Errors
/// As fstatat(2).
pub fn look(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<FileStat> {
    Ok(fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?)
}

/// Opens what was looked at for reading.
///
/// # Errors
/// As openat(2), and when another thing has that name now.
fn open(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    seen: &FileStat,
    more: OFlag,
) -> io::Result<(OwnedFd, FileStat)> {
    let swapped = || io::Error::other("something else has its name now");
    // Without waiting: a FIFO may have taken the name meanwhile.
    let flags = OFlag::O_RDONLY
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC
        | more;
    let opened = openat(dir, name, flags, Mode::empty()).map_err(|e| match e {
        nix::errno::Errno::ELOOP | nix::errno::Errno::ENXIO => swapped(),
        other => other.into(),
    })?;
    let found = fstat(&opened)?;
    match identity(&found) == identity(seen) && kind(&found) == kind(seen) {
        true => Ok((opened, found)),
        false => Err(swapped()),
    }
}

/// Opens a file that was looked at, and looks at it once more.
///
/// # Errors
/// As openat(2), and when another thing has that name now.
pub fn open_file(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    seen: &FileStat,
) -> io::Result<(File, FileStat)> {
    open(dir, name, seen, OFlag::empty()).map(|(fd, stat)| (fd.into(), stat))
}

/// Opens a directory that was looked at.
///
/// # Errors
/// As openat(2), and when another thing has that name now.
pub fn open_directory(dir: BorrowedFd<'_>, name: &OsStr, seen: &FileStat) -> io::Result<OwnedFd> {
    open(dir, name, seen, OFlag::O_DIRECTORY).map(|(fd, _)| fd)
}

/// The names in a directory, in order.
///
/// # Errors
/// As getdents(2).
pub fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let again =
        openat(dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut out = Vec::new();
    for entry in Dir::from_fd(again)?.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            out.push(OsStr::from_bytes(name).to_os_string());
        }
    }
    out.sort();
    Ok(out)
}

/// What a symbolic link says.
///
/// # Errors
/// As readlinkat(2).
pub fn read_link(dir: BorrowedFd<'_>, name: &OsStr) -> io::Result<OsString> {
    Ok(readlinkat(dir, name)?)
}

/// Opens a directory by its path, whose links are followed: whoever names it means so.
///
/// # Errors
/// As open(2).
pub fn open_named(path: &std::path::Path) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { std::path::Path::new(".") } else { path };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(path, flags, Mode::empty())?)
}

/// A path by which calls reach a name of an open directory that know no directories.
pub fn by_proc(dir: BorrowedFd<'_>, name: &OsStr) -> std::path::PathBuf {
    use std::os::fd::AsRawFd;
    std::path::Path::new("/proc/self/fd").join(dir.as_fd().as_raw_fd().to_string()).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_was_swapped_in_is_not_opened() {
        let path = std::env::temp_dir().join(format!("vmcache-walk-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(path.join("sub")).unwrap();
        fs::write(path.join("file"), b"1").unwrap();
        fs::write(path.join("other"), b"2").unwrap();
        let dir = open_named(&path).unwrap();
        let (file, sub) = (OsStr::new("file"), OsStr::new("sub"));
        let seen = look(dir.as_fd(), file).unwrap();
        let seen_sub = look(dir.as_fd(), sub).unwrap();
        assert!(open_file(dir.as_fd(), file, &seen).is_ok());
        assert_eq!(names(dir.as_fd()).unwrap(), ["file", "other", "sub"]);

        // Another file, a FIFO that nobody writes to, a link: none is read, none waited for.
        fs::rename(path.join("other"), path.join("file")).unwrap();
        assert!(open_file(dir.as_fd(), file, &seen).is_err());
        fs::remove_file(path.join("file")).unwrap();
        nix::unistd::mkfifo(&path.join("file"), Mode::S_IRWXU).unwrap();
        assert!(open_file(dir.as_fd(), file, &seen).is_err());
        fs::remove_file(path.join("file")).unwrap();
        symlink("/etc/passwd", path.join("file")).unwrap();
        let e = open_file(dir.as_fd(), file, &seen).unwrap_err().to_string();
        assert_eq!(e, "something else has its name now");
        fs::remove_dir(path.join("sub")).unwrap();
        symlink("/", path.join("sub")).unwrap();
        assert!(open_directory(dir.as_fd(), sub, &seen_sub).is_err());
        fs::remove_dir_all(&path).unwrap();
    }
}
