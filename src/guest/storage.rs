//! Storages: what CreateSandbox and CreateContainer have mounted in the guest,
//! disks that were plugged in for it among them.
//!
//! Invariants: what was written is on the disk when [`detach_all`] has succeeded;
//! every wait has a deadline. A disk has one file system, not partitions.
//!
//! Source: Kata's agent.proto; a PCI path names a slot on the first bus, then
//! one on the bus behind that, in hexadecimal: `02/01`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::unistd::syncfs;

use super::failure::{Attempt, Failure, Outcome};
use super::mounts::inside;
use crate::proto::agent::Storage;

/// How long a device that was plugged in may take to come.
pub const COMING: Duration = Duration::from_secs(10);
/// Pause between looks for it.
pub const LOOK: Duration = Duration::from_millis(2);
/// Where the first PCI bus is.
const FIRST_BUS: &str = "/sys/devices/pci0000:00";
/// Tried first, of what the kernel knows: the others of its list may take what
/// is not theirs, or are asked in its order.
const USUAL: [&str; 6] = ["ext4", "xfs", "btrfs", "squashfs", "erofs", "iso9660"];

/// Mounts a storage for a container with this root; where. A place below the
/// root is found with the root's links, not the guest's.
pub fn attach(s: &Storage, root: &Path) -> Outcome<PathBuf> {
    let target = match Path::new(&s.mount_point).strip_prefix(root) {
        Ok(below) if root != Path::new("/") && below != Path::new("") => inside(root, below)?,
        _ => PathBuf::from(&s.mount_point),
    };
    let source = match s.driver.as_str() {
        "blk" => device_at(&s.source)?,
        _ => PathBuf::from(&s.source),
    };
    let attempt = || format!("mount {} ({}) on {}", source.display(), s.fstype, s.mount_point);
    fs::create_dir_all(&target).during(attempt)?;
    let (flags, data) = options(&s.options);
    if s.fstype == "overlay" {
        make_layers(&s.options)?;
    }
    if s.fstype == "virtiofs" {
        return mount_plugged(&source, &target, flags, data.as_deref(), &attempt).map(|()| target);
    }
    if s.driver == "blk" && s.fstype.is_empty() {
        return mount_found(&source, &target, flags, data.as_deref()).map(|()| target);
    }
    let kind = (!s.fstype.is_empty()).then_some(s.fstype.as_str());
    mount(Some(&source), &target, kind, flags, data.as_deref()).during(attempt)?;
    Ok(target)
}

/// Kata's names of what can be mounted here, as far as a host has to ask.
pub fn handlers() -> Vec<String> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |kind: &str| known.lines().any(|l| l.split_whitespace().last() == Some(kind));
    let all = [("9p", "9p"), ("virtiofs", "virtio-fs")];
    all.iter().filter(|(kind, _)| has(kind)).map(|(_, name)| name.to_string()).collect()
}

/// Makes the directories that an overlay writes to.
fn make_layers(options: &[String]) -> Outcome<()> {
    for option in options {
        let path = option.strip_prefix("upperdir=").or(option.strip_prefix("workdir="));
        if let Some(path) = path {
            fs::create_dir_all(path).during(|| format!("make the overlay's {path}"))?;
        }
    }
    Ok(())
}

/// Mounts a directory of the host, whose device may just be coming.
fn mount_plugged(
    tag: &Path,
    target: &Path,
    flags: MsFlags,
    data: Option<&str>,
    attempt: &dyn Fn() -> String,
) -> Outcome<()> {
    let deadline = Instant::now() + COMING;
    loop {
        match mount(Some(tag), target, Some("virtiofs"), flags, data) {
            // No such tag, yet.
            Err(Errno::EINVAL) if Instant::now() < deadline => sleep(LOOK),
            other => return other.during(attempt),
        }
    }
}

/// Writes out and unmounts what [`attach`] mounted, the last first. One that does
/// not unmount stays in the list, for the next try; one that could not be written
/// out is an error once all are unmounted.
pub fn detach_all(mounts: &mut Vec<PathBuf>) -> Outcome<()> {
    let mut all = Ok(());
    while let Some(path) = mounts.last() {
        let written = File::open(path).and_then(|f| syncfs(&f).map_err(Into::into));
        let written =
            written.during(|| format!("write out what was mounted on {}", path.display()));
        umount2(path, MntFlags::MNT_DETACH).during(|| format!("unmount {}", path.display()))?;
        all = all.and(written);
        mounts.pop();
    }
    all
}

fn options(list: &[String]) -> (MsFlags, Option<String>) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in list {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "rw" | "defaults" => {}
            other => data.push(other),
        }
    }
    (flags, (!data.is_empty()).then(|| data.join(",")))
}

/// The block device at a PCI path, once it is there.
fn device_at(path: &str) -> Outcome<PathBuf> {
    let bad = || Failure::invalid(format!("PCI path {path:?}: must be like 02/01"));
    let slots = path.split('/').map(|s| u8::from_str_radix(s, 16).map_err(|_| bad()));
    let slots = slots.collect::<Outcome<Vec<u8>>>()?;
    let deadline = Instant::now() + COMING;
    loop {
        let name = pci_device(&slots).and_then(|pci| block_device(&pci));
        let node = name.map(|n| Path::new("/dev").join(n));
        // sysfs shows the disk a moment before it has a node and can be opened.
        if let Some(node) = node.filter(|n| File::open(n).is_ok()) {
            return Ok(node);
        }
        if Instant::now() > deadline {
            return Err(Failure::not_found(format!(
                "no disk came at PCI path {path} within {} s: does the guest's kernel have \
                 PCI hotplug and virtio_blk?",
                COMING.as_secs()
            )));
        }
        sleep(LOOK);
    }
}

/// The directory in sysfs of what is in these slots.
fn pci_device(slots: &[u8]) -> Option<PathBuf> {
    let mut at = PathBuf::from(FIRST_BUS);
    for slot in slots {
        let ending = format!(":{slot:02x}.0");
        at = entries(&at).find(|p| {
            let name = p.file_name().unwrap_or_default().to_string_lossy();
            name.ends_with(&ending)
        })?;
    }
    Some(at)
}

/// The disk of a virtio device on PCI.
fn block_device(pci: &Path) -> Option<String> {
    let is_virtio =
        |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("virtio"));
    let disk = entries(pci).filter(is_virtio).find_map(|v| entries(&v.join("block")).next())?;
    Some(disk.file_name()?.to_string_lossy().into_owned())
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path())
}

/// Mounts a disk whose file system is not told.
fn mount_found(disk: &Path, target: &Path, flags: MsFlags, data: Option<&str>) -> Outcome<()> {
    let text = fs::read_to_string("/proc/filesystems").during(|| "list file systems")?;
    let mut kinds: Vec<&str> =
        text.lines().filter(|l| !l.starts_with("nodev")).map(str::trim).collect();
    kinds.retain(|k| *k != "fuseblk");
    kinds.sort_by_key(|k| USUAL.iter().position(|u| u == k).unwrap_or(USUAL.len()));
    for kind in &kinds {
        match mount(Some(disk), target, Some(*kind), flags, data) {
            Ok(()) => return Ok(()),
            // Not this one's, as file systems say it.
            Err(Errno::EINVAL | Errno::ENODATA | Errno::EUCLEAN) => {}
            Err(Errno::EROFS) => {
                return Err(Failure::invalid(format!(
                    "mount {} ({kind}): it was not unmounted cleanly, and can not be mended \
                     read-only: attach it once without :ro, or run fsck on it",
                    disk.display()
                )));
            }
            Err(e) => {
                return Err(e).during(|| {
                    format!("mount {} ({kind}) on {}", disk.display(), target.display())
                });
            }
        }
    }
    let name = disk.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let parts: Vec<String> = entries(&Path::new("/sys/class/block").join(&name))
        .filter_map(|p| Some(p.file_name()?.to_str()?.to_string()))
        .filter(|n| n.starts_with(&name))
        .collect();
    let why = match parts.len() {
        0 => format!("no file system on it that this guest knows ({})", kinds.join(", ")),
        n => format!("it has {n} partitions; a disk must be one file system"),
    };
    Err(Failure::invalid(format!("mount {} on {}: {why}", disk.display(), target.display())))
}
