//! Mounts by fd, which no path can lead astray (Linux 5.12 and later).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::{open, OFlag};
use nix::sys::stat::Mode;

/// What a mount does not allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Denies {
    /// Writing.
    pub writes: bool,
    /// Opening device files.
    pub devices: bool,
    /// Executing programs.
    pub programs: bool,
    /// Set-user-id bits and file capabilities.
    pub set_ids: bool,
    /// Mounts below it are part of it (and denied the same).
    pub whole: bool,
}

impl Denies {
    fn attributes(self) -> u64 {
        let bits = [
            (self.writes, libc::MOUNT_ATTR_RDONLY),
            (self.devices, libc::MOUNT_ATTR_NODEV),
            (self.programs, libc::MOUNT_ATTR_NOEXEC),
            (self.set_ids, libc::MOUNT_ATTR_NOSUID),
        ];
        bits.into_iter().filter(|(set, _)| *set).fold(0, |all, (_, bit)| all | bit)
    }
}

/// A directory as a mount of its own, read-only, without what is mounted in it, and
/// nowhere yet.
///
/// # Errors
/// As [`tree`].
pub fn read_only(directory: &Path) -> io::Result<OwnedFd> {
    tree(directory, Denies { writes: true, ..Denies::default() })
}

/// A file or directory as a mount of its own, nowhere yet.
///
/// # Errors
/// As open_tree(2) and mount_setattr(2).
pub fn tree(path: &Path, denies: Denies) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let below = if denies.whole { libc::AT_RECURSIVE as u32 } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | below;
    // SAFETY: the path is a C string that outlives the call; the rest are integers.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this fd, and nothing else owns it.
    let tree = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let attributes = libc::mount_attr {
        attr_set: denies.attributes(),
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: an empty C string, and a struct of the size that is told, for the call only.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH as u32 | below,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tree)
}

/// Puts it on a directory, which is no link: whatever becomes of that name, it leads nowhere else.
///
/// # Errors
/// As open(2) and [`attach`].
pub fn put(tree: BorrowedFd<'_>, place: &Path) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let spot = open(place, flags, Mode::empty())?;
    attach(tree, spot.as_fd())
}

/// Puts it on a file or directory.
///
/// # Errors
/// As move_mount(2).
pub fn attach(tree: BorrowedFd<'_>, place: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: two empty C strings and integers.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            place.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
