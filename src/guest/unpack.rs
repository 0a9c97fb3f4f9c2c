//! `vmcache-agent unpack DIR`: a tar stream on stdin becomes a directory.
//!
//! Runs as a container's program, so the host needs no other call than
//! WriteStdin for a whole root file system.
//!
//! Invariants: owners, modes, times, links and extended attributes are kept;
//! a name that leaves the directory ends it with an error.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::{chown, FileTypeExt};
use std::path::Path;

use nix::sys::stat::{makedev, mknod, Mode, SFlag};
use tar::{Archive, EntryType};

use super::failure::{Attempt, Failure, Outcome};

/// Unpacks until the stream's end.
pub fn run(target: &str) -> Outcome<()> {
    let target = Path::new(target);
    fs::create_dir_all(target).during(|| format!("create {}", target.display()))?;
    let mut archive = Archive::new(io::stdin().lock());
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_unpack_xattrs(true);
    archive.set_preserve_mtime(true);
    let mut directories = Vec::new();
    for entry in archive.entries().during(|| "read the tar stream")? {
        let mut entry = entry.during(|| "read the tar stream")?;
        let name = entry.path().during(|| "read a name")?.into_owned();
        let attempt = || format!("unpack {}", name.display());
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::Char | EntryType::Block | EntryType::Fifo) {
            special(target, &name, kind, entry.header())?;
            continue;
        }
        // Directories keep their times and modes only when nothing follows.
        if kind == EntryType::Directory {
            let header = entry.header();
            let mode = header.mode().during(attempt)?;
            let owner = header.uid().during(attempt)?.min(u32::MAX.into()) as u32;
            let group = header.gid().during(attempt)?.min(u32::MAX.into()) as u32;
            directories.push((name.clone(), mode, owner, group));
        }
        if !entry.unpack_in(target).during(attempt)? {
            return Err(Failure::invalid(format!("{}: the name leaves the target", attempt())));
        }
    }
    for (name, mode, owner, group) in directories.iter().rev() {
        let path = target.join(name);
        let attempt = || format!("set owner and mode of {}", name.display());
        chown(&path, Some(*owner), Some(*group)).during(attempt)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(*mode);
        fs::set_permissions(&path, mode).during(attempt)?;
    }
    // What follows the end mark, so that the sender is not stopped by a closed pipe.
    let mut rest = [0; 4096];
    let mut input = archive.into_inner();
    while input.read(&mut rest).is_ok_and(|n| n > 0) {}
    Ok(())
}

/// Devices and pipes, which the tar library leaves out.
fn special(target: &Path, name: &Path, kind: EntryType, header: &tar::Header) -> Outcome<()> {
    let attempt = || format!("make {}", name.display());
    let plain = name.components().all(|c| {
        matches!(c, std::path::Component::Normal(_) | std::path::Component::CurDir)
    });
    let parent = name.parent().unwrap_or(Path::new(""));
    let real = fs::canonicalize(target.join(parent)).during(attempt)?;
    let root = fs::canonicalize(target).during(attempt)?;
    if !plain || !real.starts_with(&root) {
        return Err(Failure::invalid(format!("{}: the name leaves the target", attempt())));
    }
    let path = real.join(name.file_name().unwrap_or_default());
    if fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_char_device()) {
        return Ok(());
    }
    let flag = match kind {
        EntryType::Char => SFlag::S_IFCHR,
        EntryType::Block => SFlag::S_IFBLK,
        _ => SFlag::S_IFIFO,
    };
    let number = |n: io::Result<Option<u32>>| n.ok().flatten().unwrap_or(0).into();
    let device = makedev(number(header.device_major()), number(header.device_minor()));
    let mode = header.mode().during(attempt)?;
    mknod(&path, flag, Mode::from_bits_truncate(mode), device).during(attempt)?;
    let owner = header.uid().during(attempt)?.min(u32::MAX.into()) as u32;
    let group = header.gid().during(attempt)?.min(u32::MAX.into()) as u32;
    chown(&path, Some(owner), Some(group)).during(attempt)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
    fs::set_permissions(&path, mode).during(attempt)
}
