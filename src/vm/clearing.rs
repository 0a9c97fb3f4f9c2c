//! Removing a directory that a guest, or another user, may have filled: however deep,
//! and a bounded number of files at a time.
//!
//! Invariants: the directory above it passes [`crate::trusted_path`] and is held open, so that
//! nobody has another tree removed by giving it that name; nothing recurses, and a few fds are open whatever the depth (a directory
//! in a directory is moved up first); no link is followed; what is mounted there stops it.
//! Two processes may remove the same directory: each returns when it is gone.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::fcntl::{openat, renameat, OFlag};
use nix::sys::stat::{fstatat, Mode, SFlag};
use nix::unistd::{unlinkat, UnlinkatFlags};

use crate::trusted_path::Destination;

/// Files and directories that one try removes: a moment's work.
const MOST: usize = 50_000;

/// Removes it.
///
/// # Errors
/// As the system calls'; [`io::ErrorKind::QuotaExceeded`] when there is more to be
/// removed, by trying again.
pub fn remove(path: &Path) -> io::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let place = Destination::of(path)?;
    let top = openat(place.directory(), place.name(), flags, Mode::empty())?;
    let mut left = MOST;
    let mut moved = 0u64;
    loop {
        let names = entries(top.as_fd(), MOST)?;
        if names.is_empty() {
            match unlinkat(place.directory(), place.name(), UnlinkatFlags::RemoveDir) {
                // Something has been moved up there meanwhile, or added: a port's lock, by who
                // is just connecting to the agent.
                Err(e @ (Errno::ENOTEMPTY | Errno::EEXIST)) => {
                    left = left.checked_sub(1).ok_or(e)?;
                    continue;
                }
                done => return Ok(done?),
            }
        }
        for (name, directory) in names {
            left = left.checked_sub(1).ok_or(io::ErrorKind::QuotaExceeded)?;
            if !directory {
                there(unlinkat(&top, name.as_c_str(), UnlinkatFlags::NoRemoveDir))?;
                continue;
            }
            let Some(inner) = there(openat(&top, name.as_c_str(), flags, Mode::empty()))? else {
                continue;
            };
            for (below, directory) in there(entries(inner.as_fd(), left + 1))?.unwrap_or_default() {
                left = left.checked_sub(1).ok_or(io::ErrorKind::QuotaExceeded)?;
                if !directory {
                    there(unlinkat(&inner, below.as_c_str(), UnlinkatFlags::NoRemoveDir))?;
                    continue;
                }
                loop {
                    let up = CString::new(format!(".moved-{moved}"))?;
                    moved += 1;
                    // One of that name may be left of an earlier try.
                    if there(fstatat(&top, up.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW))?.is_some()
                    {
                        continue;
                    }
                    match renameat(&inner, below.as_c_str(), &top, up.as_c_str()) {
                        // There is one now.
                        Err(Errno::ENOTEMPTY | Errno::EEXIST) => continue,
                        done => drop(there(done)?),
                    }
                    break;
                }
            }
            match unlinkat(&top, name.as_c_str(), UnlinkatFlags::RemoveDir) {
                // Its name is another's that was moved up: the next round's.
                Err(Errno::ENOTEMPTY) => {}
                done => drop(there(done)?),
            }
        }
    }
}

/// What came of doing something with an entry; `None` where another process has removed it.
fn there<T>(done: nix::Result<T>) -> nix::Result<Option<T>> {
    match done {
        Err(Errno::ENOENT) => Ok(None),
        other => other.map(Some),
    }
}

/// Names, and whether they are directories; at most so many.
fn entries(dir: std::os::fd::BorrowedFd<'_>, most: usize) -> nix::Result<Vec<(CString, bool)>> {
    let own =
        openat(dir, c".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut found = Vec::new();
    for entry in Dir::from_fd(own)?.iter() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let directory = match entry.file_type() {
            Some(kind) => kind == Type::Directory,
            None => {
                let Some(stat) = there(fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW))? else {
                    continue;
                };
                SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFDIR
            }
        };
        found.push((name.to_owned(), directory));
        if found.len() >= most {
            break;
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::open;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn two_at_once_both_find_it_gone() {
        let tree = std::env::temp_dir().join(format!("vmcache-both-{}", std::process::id()));
        for _ in 0..50 {
            for n in 0..20 {
                fs::create_dir_all(tree.join(format!("d{n}/e/f"))).unwrap();
                fs::write(tree.join(format!("d{n}/file")), "").unwrap();
                fs::write(tree.join(format!("file{n}")), "").unwrap();
            }
            let path = tree.clone();
            let other = crate::worker::Worker::spawn("vmc-other", move || remove(&path)).unwrap();
            let mine = remove(&tree);
            let gone = !tree.exists();
            let others = other.join(std::time::Duration::from_secs(60)).unwrap();
            for removed in [mine, others] {
                let missing = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
                assert!(removed.as_ref().err().is_none_or(missing), "{removed:?}");
            }
            assert!(gone);
        }
    }

    #[test]
    fn deep_and_wide_trees_go_and_links_are_not_followed() {
        let base = std::env::temp_dir().join(format!("vmcache-clearing-{}", std::process::id()));
        let (tree, kept) = (base.join("tree"), base.join("kept"));
        fs::create_dir_all(&kept).unwrap();
        fs::write(kept.join("file"), "").unwrap();
        fs::create_dir(&tree).unwrap();
        symlink(&kept, tree.join("link")).unwrap();
        fs::write(tree.join(".moved-0"), "").unwrap();
        // Deeper than any path can be.
        let mut inner = open(&tree, OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..6000 {
            nix::sys::stat::mkdirat(&inner, "d", Mode::S_IRWXU).unwrap();
            inner = openat(&inner, "d", OFlag::O_DIRECTORY, Mode::empty()).unwrap();
        }
        drop(inner);
        // On a small stack, as threads here have.
        let path = tree.clone();
        let removed = crate::worker::Worker::spawn("vmc-removes", move || remove(&path)).unwrap();
        removed.join(std::time::Duration::from_secs(60)).unwrap().unwrap();
        assert!(!tree.exists() && kept.join("file").exists());

        fs::create_dir(&tree).unwrap();
        for n in 0..MOST + 10 {
            fs::write(tree.join(n.to_string()), "").unwrap();
        }
        assert_eq!(remove(&tree).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        remove(&tree).unwrap();
        fs::remove_dir_all(&base).unwrap();
    }
}
