//! A cgroup for each VM, of either version: how much memory, how many processes and
//! how much CPU time QEMU and what stands beside it may take.
//!
//! Where: below the directory that `cgroup` names. Not below the server's own, though
//! systemd may delegate that: a service whose cgroup has limited children left can not be
//! started again.
//!
//! Invariants: where a VM's cgroups are stands in its directory, so that whoever ends
//! it removes them, and who makes it larger raises the limit first; a limit that can
//! not be set is an error.
//!
//! Source: Linux's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::config::options::OURS;
use crate::config::{Accel, Config};
use crate::trusted_path::{check_existing_below, Kind};
use crate::vm::private;

/// In a VM's directory: its cgroups, a line each.
const FILE: &str = "cgroups";
/// Largest such file, in bytes.
const MAX_FILE: u64 = 4096;
/// What QEMU may take beside its guest's memory, MiB; and its translator.
const QEMU_MIB: u64 = 512;
const TRANSLATOR_MIB: u64 = 1024;
/// Threads beside those of CPUs: QEMU's own, and of what stands beside it.
const THREADS: u32 = 128;
/// Period of the limit of CPU time, microseconds.
const PERIOD: u64 = 100_000;
/// Where cgroups are mounted.
const MOUNTED: &str = "/sys/fs/cgroup";

/// The hierarchies of a host that limit what is limited here.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Hierarchy {
    /// One for all.
    Two(PathBuf),
    /// One for each.
    One { memory: PathBuf, pids: PathBuf, cpu: PathBuf },
}

/// Reads the mount table.
fn hierarchy(table: &str) -> Option<Hierarchy> {
    let mut two = None;
    let mut one: [Option<PathBuf>; 3] = [None, None, None];
    for line in table.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, place, kind, options, ..] = words[..] else { continue };
        match kind {
            "cgroup2" => two = two.or(Some(PathBuf::from(place))),
            "cgroup" => {
                for (spot, name) in one.iter_mut().zip(["memory", "pids", "cpu"]) {
                    if options.split(',').any(|o| o == name) && spot.is_none() {
                        *spot = Some(place.into());
                    }
                }
            }
            _ => {}
        }
    }
    let [memory, pids, cpu] = one;
    match (memory, pids, cpu) {
        (Some(memory), Some(pids), Some(cpu)) => Some(Hierarchy::One { memory, pids, cpu }),
        _ => two.map(Hierarchy::Two),
    }
}

fn here() -> io::Result<Hierarchy> {
    let table = fs::read_to_string("/proc/self/mounts")?;
    hierarchy(&table).ok_or_else(|| io::Error::other("no cgroups are mounted on this host"))
}

/// The cgroup below which VMs have theirs, without the mount's path; `None`: nowhere.
fn base(config: &Config) -> Option<PathBuf> {
    match config.text(OURS, "cgroup") {
        "" => None,
        path => Some(path.trim_matches('/').into()),
    }
}

fn made(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(named(dir, &e)),
        _ => Ok(()),
    }
}

fn named(path: &Path, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

fn write(dir: &Path, file: &str, text: &str) -> io::Result<()> {
    let path = dir.join(file);
    let opened = OpenOptions::new().write(true).open(&path);
    opened
        .and_then(|mut f| io::Write::write_all(&mut f, text.as_bytes()))
        .map_err(|e| named(&path, &e))
}

/// Lets what is below a cgroup be limited.
fn enable(mount: &Path, base: &Path) -> io::Result<()> {
    let mut dir = mount.to_path_buf();
    let steps = base.components().map(|c| Some(c.as_os_str())).chain([None]);
    for step in steps {
        let control = "cgroup.subtree_control";
        let has = fs::read_to_string(dir.join(control)).unwrap_or_default();
        // What others have enabled already is theirs, and may not be ours to write.
        if !["memory", "pids", "cpu"].iter().all(|c| has.split_whitespace().any(|h| h == *c)) {
            write(&dir, control, "+memory +pids +cpu")?;
        }
        if let Some(name) = step {
            dir.push(name);
            made(&dir)?;
        }
    }
    Ok(())
}

fn name(id: &str) -> String {
    format!("vm-{id}")
}

/// Most memory that a VM's processes may take, bytes.
fn most(memory_mib: u64, translated: bool) -> u64 {
    (memory_mib + QEMU_MIB + if translated { TRANSLATOR_MIB } else { 0 }) << 20
}

/// Whether those that exist already, below which VMs are to have theirs, are root's or this
/// user's.
///
/// # Errors
/// [`crate::trusted_path::Untrusted`] inside of an [`io::Error`]; as open(2).
pub fn check(config: &Config) -> io::Result<()> {
    let Some(base) = base(config) else { return Ok(()) };
    let mounts = match here()? {
        Hierarchy::Two(mount) => vec![mount],
        Hierarchy::One { memory, pids, cpu } => vec![memory, pids, cpu],
    };
    mounts.iter().try_for_each(|mount| check_existing_below(mount, &base, Kind::Directory))
}

/// Makes the cgroups of a VM and writes down where they are.
///
/// # Errors
/// When a limit can not be set; names the file.
pub fn make(config: &Config, id: &str, dir: &Path) -> io::Result<()> {
    let Some(base) = base(config) else { return Ok(()) };
    check(config)?;
    let name = name(id);
    let memory = most(config.memory().into(), config.accel == Accel::Tcg).to_string();
    let threads = (THREADS + config.max_cpus()).to_string();
    let time = PERIOD * u64::from(config.max_cpus() + 1);
    let all = match here()? {
        Hierarchy::Two(mount) => {
            enable(&mount, &base)?;
            vec![mount.join(&base).join(name)]
        }
        Hierarchy::One { memory, pids, cpu } => {
            let mut all: Vec<PathBuf> =
                [memory, pids, cpu].iter().map(|m| m.join(&base).join(&name)).collect();
            // They may be mounted together.
            all.dedup();
            all
        }
    };
    let lines: String = all.iter().map(|p| format!("{}\n", p.display())).collect();
    private::replace(dir, FILE, lines.as_bytes())?;
    for group in &all {
        fs::create_dir_all(group).map_err(|e| named(group, &e))?;
        let limits = [
            ("memory.max", &memory),
            ("memory.limit_in_bytes", &memory),
            ("pids.max", &threads),
            ("cpu.max", &format!("{time} {PERIOD}")),
            ("cpu.cfs_quota_us", &time.to_string()),
        ];
        // Each has those of its version and kind.
        for (file, limit) in limits.into_iter().filter(|(file, _)| group.join(file).exists()) {
            write(group, file, limit)?;
        }
    }
    Ok(())
}

/// Those of a VM, as its directory says; none that could be somebody else's.
fn of(dir: &Path) -> Vec<PathBuf> {
    let read = private::read(dir, FILE, MAX_FILE);
    let id = dir.file_name().unwrap_or_default().to_string_lossy();
    let mine = |path: &PathBuf| {
        path.starts_with(MOUNTED)
            && path.file_name().is_some_and(|n| *n == *name(&id))
            && !path.components().any(|c| c == std::path::Component::ParentDir)
    };
    match read {
        Ok((bytes, _)) => {
            String::from_utf8_lossy(&bytes).lines().map(PathBuf::from).filter(mine).collect()
        }
        Err(_) => Vec::new(),
    }
}

/// Where a child writes itself in to join them.
///
/// # Errors
/// As open(2).
pub fn join(dir: &Path) -> io::Result<Vec<OwnedFd>> {
    let procs = of(dir).into_iter().map(|group| group.join("cgroup.procs"));
    let open = |path: PathBuf| {
        let file = OpenOptions::new().write(true).open(&path).map_err(|e| named(&path, &e))?;
        Ok(file.into())
    };
    procs.map(open).collect()
}

/// The most memory of a VM, which will be of this size, MiB, or of any.
///
/// # Errors
/// When the limit can not be set; names the file.
pub fn limit_memory(dir: &Path, memory_mib: Option<u32>) -> io::Result<()> {
    for group in of(dir) {
        for (file, any) in [("memory.max", "max"), ("memory.limit_in_bytes", "-1")] {
            let text = memory_mib.map_or(any.into(), |m| most(m.into(), true).to_string());
            if group.join(file).exists() {
                write(&group, file, &text)?;
            }
        }
    }
    Ok(())
}

/// Removes those of a VM that has ended.
///
/// # Errors
/// As rmdir(2): processes are in one, for example.
pub fn remove(dir: &Path) -> io::Result<()> {
    for group in of(dir) {
        match fs::remove_dir(&group) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(named(&group, &e)),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_says_which_cgroups_there_are() {
        let two = "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";
        assert_eq!(hierarchy(two), Some(Hierarchy::Two("/sys/fs/cgroup".into())));
        let one = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                   cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                   cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        // Version 2 has no controllers there, or 1 could not have them.
        assert_eq!(hierarchy(one), Some(Hierarchy::Two("/sys/fs/cgroup/unified".into())));
        let more = format!("{one}cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n");
        assert!(matches!(hierarchy(&more), Some(Hierarchy::One { .. })));
        assert_eq!(hierarchy("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn what_a_directory_names_as_its_cgroups_is_its_own_or_nothing() {
        let dir = std::env::temp_dir().join(format!("vmcache-cgroups-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let id = dir.file_name().unwrap().to_string_lossy().into_owned();
        let own = format!("/sys/fs/cgroup/memory/x/vm-{id}");
        let bad = format!("/home/vm-{id}\n/sys/fs/cgroup/memory/init\n/sys/fs/cgroup/../vm-{id}\n");
        fs::write(dir.join(FILE), format!("{bad}{own}\n")).unwrap();
        assert_eq!(of(&dir), [PathBuf::from(own)]);
        fs::remove_dir_all(&dir).unwrap();
    }
}
