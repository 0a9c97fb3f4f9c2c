//! The guest's own file systems in memory: one tmpfs, which holds `/`, `/run`, `/tmp`
//! and `/dev/shm`, and with them a root file system that came from the host.
//!
//! Invariants: together they take at most half of the VM's memory, and of its
//! inodes at most one for each page, so that who fills them gets ENOSPC and the VM
//! lives; both bounds grow with the VM. What the agent itself writes down has a small one
//! of its own: a full guest can still be told to make room.
//!
//! Does not: bound what a container mounts for itself, as root of its guest.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use nix::mount::{mount, MsFlags};

use super::failure::{Attempt, Outcome};

/// Directories of the one file system: path, mode.
const DIRECTORIES: [(&str, u32); 3] = [("/run", 0o755), ("/tmp", 0o1777), ("/run/shm", 0o1777)];
/// Kibibytes of memory for which there is one inode: a page, as one takes about a
/// quarter of that of the kernel's own memory.
const KIB_PER_INODE: u64 = 4;

/// Room for the records of 1024 containers, and for the few specifications, of a message's
/// size, that are read at any time.
const RECORDS: &str = "mode=0700,size=32m,nr_inodes=16384";

/// The bounds, for the memory that there is now.
fn bounds() -> String {
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    });
    match total {
        Some(kib) => format!("size=50%,nr_inodes={}", (kib / KIB_PER_INODE).max(1)),
        None => "size=50%".into(),
    }
}

/// Mounts the file system that becomes the root.
pub fn mount_at(target: &str) -> Outcome<()> {
    let options = format!("mode=0755,{}", bounds());
    mount(Some("root"), target, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
        .during(|| format!("mount the new root on {target}"))
}

/// Makes the directories in it that have rules of their own, and /dev/shm.
pub fn directories() -> Outcome<()> {
    for (path, mode) in DIRECTORIES {
        fs::create_dir_all(path).during(|| format!("create {path}"))?;
        fs::set_permissions(path, Permissions::from_mode(mode))
            .during(|| format!("set the mode of {path}"))?;
    }
    let attempt = || "bind /run/shm on /dev/shm";
    fs::create_dir_all("/dev/shm").during(attempt)?;
    let none = None::<&str>;
    mount(Some("/run/shm"), "/dev/shm", none, MsFlags::MS_BIND, none).during(attempt)?;
    let rest = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
    mount(none, "/dev/shm", none, rest, none).during(attempt)?;
    // Before /proc was there, nothing told how much memory there is.
    grow();
    Ok(())
}

/// Mounts the file system for the agent's own records, below the agent's directory.
pub fn records(target: &str) -> Outcome<()> {
    let attempt = || format!("mount a tmpfs on {target}");
    fs::create_dir_all(target).during(attempt)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("records"), target, Some("tmpfs"), flags, Some(RECORDS)).during(attempt)
}

/// Takes memory that has come since into account.
pub fn grow() {
    let options = bounds();
    let again = MsFlags::MS_REMOUNT;
    if let Err(e) = mount(None::<&str>, "/", None::<&str>, again, Some(options.as_str())) {
        eprintln!("vmcache-agent: let the root grow ({options}): {e}");
    }
}
