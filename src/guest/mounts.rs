//! A container's file systems, made inside its own mount namespace.
//!
//! Invariants: a destination is resolved inside the container's root, so a
//! symbolic link in an image can not send a mount elsewhere; nothing made here
//! is visible outside the namespace.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::stat::{makedev, mknod, Mode, SFlag};
use nix::unistd::{chdir, chown, pivot_root, Gid, Uid};

use super::failure::{Attempt, Failure, Outcome};
use super::hosts::HOSTS;
use super::stage::REAPER_ANNOTATION;
use crate::proto::oci::{LinuxDevice, Mount, Spec};

/// Symbolic links followed while one path is resolved; as the kernel's limit.
const MAX_LINKS: usize = 40;

/// Devices that every container has, with their numbers.
const DEVICES: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Makes the spec's root, mounts and devices, and changes into the root.
pub fn enter(spec: &Spec, terminal: Option<&Path>) -> Outcome<()> {
    let root = spec.Root.as_ref().map(|r| r.Path.as_str()).unwrap_or_default();
    let root =
        Path::new(root).canonicalize().during(|| format!("find the root file system {root:?}"))?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .during(|| "make mounts private")?;
    // The guest's own root is moved aside first: a directory can not be a bind
    // mount of its own parent's root and hold it too.
    let target =
        if root == Path::new("/") { PathBuf::from("/run/vmcache/own-root") } else { root.clone() };
    fs::create_dir_all(&target).during(|| format!("create {}", target.display()))?;
    mount(Some(&root), &target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .during(|| format!("bind {} on {}", root.display(), target.display()))?;

    for m in &spec.Mounts {
        one(&target, m)?;
    }
    // Another root does not know this guest's name.
    let told = spec.Mounts.iter().any(|m| m.destination == HOSTS);
    if spec.Annotations.contains_key(REAPER_ANNOTATION) && root != Path::new("/") && !told {
        // A root that has no place for it is used without.
        let _ = one(&target, &hosts_mount());
    }
    let fresh_dev = spec.Mounts.iter().any(|m| m.destination == "/dev" && m.type_ == "tmpfs");
    if fresh_dev {
        devices(&target)?;
    }
    for d in spec.Linux.as_ref().map(|l| l.Devices.as_slice()).unwrap_or_default() {
        device(&target, d)?;
    }
    if let Some(terminal) = terminal {
        console(&target, terminal)?;
    }
    pivot(&target)?;
    if let Some(linux) = spec.Linux.as_ref() {
        restrict(&linux.MaskedPaths, &linux.ReadonlyPaths)?;
    }
    if spec.Root.as_ref().is_some_and(|r| r.Readonly) {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
            .during(|| "make the root read-only")?;
    }
    Ok(())
}

/// The guest's own names of hosts, which a command may add to.
fn hosts_mount() -> Mount {
    Mount {
        destination: HOSTS.into(),
        source: HOSTS.into(),
        type_: "bind".into(),
        options: vec!["bind".into()],
        ..Mount::default()
    }
}

fn pivot(root: &Path) -> Outcome<()> {
    chdir(root).during(|| format!("enter {}", root.display()))?;
    // Old and new root on one mount point: the old one is on top, and goes.
    pivot_root(".", ".").during(|| format!("pivot_root to {}", root.display()))?;
    umount2(".", MntFlags::MNT_DETACH).during(|| "let go of the old root")?;
    chdir("/").during(|| "enter the new root")
}

/// Where `path` lies below `root`, links resolved as if `root` were `/`.
pub fn inside(root: &Path, path: &Path) -> Outcome<PathBuf> {
    let mut todo: Vec<PathBuf> = vec![path.to_path_buf()];
    let mut at = PathBuf::new();
    let mut links = 0;
    while let Some(part) = todo.pop() {
        let mut components = part.components();
        let Some(first) = components.next() else { continue };
        let rest = components.as_path().to_path_buf();
        todo.push(rest);
        match first {
            Component::RootDir => at = PathBuf::new(),
            Component::ParentDir => {
                at.pop();
            }
            Component::Normal(name) => {
                let next = at.join(name);
                match fs::read_link(root.join(&next)) {
                    Ok(link) => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(Failure::invalid(format!(
                                "{} has too many symbolic links",
                                path.display()
                            )));
                        }
                        todo.push(link);
                    }
                    Err(_) => at = next,
                }
            }
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(root.join(at))
}

/// Flags and data of OCI mount options.
fn options(list: &[String]) -> (MsFlags, MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut propagation = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in list {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" | "defaults" | "suid" | "dev" | "exec" | "async" | "atime" => {}
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "private" => propagation |= MsFlags::MS_PRIVATE,
            "rprivate" => propagation |= MsFlags::MS_PRIVATE | MsFlags::MS_REC,
            "slave" => propagation |= MsFlags::MS_SLAVE,
            "rslave" => propagation |= MsFlags::MS_SLAVE | MsFlags::MS_REC,
            "shared" => propagation |= MsFlags::MS_SHARED,
            "rshared" => propagation |= MsFlags::MS_SHARED | MsFlags::MS_REC,
            other => data.push(other),
        }
    }
    (flags, propagation, data.join(","))
}

fn one(root: &Path, m: &Mount) -> Outcome<()> {
    let attempt = || format!("mount {} ({}) on {}", m.source, m.type_, m.destination);
    let target = inside(root, Path::new(&m.destination))?;
    let (flags, propagation, data) = options(&m.options);
    let bind = flags.contains(MsFlags::MS_BIND) || m.type_ == "bind";
    if bind && Path::new(&m.source).is_file() {
        match file_at(&target) {
            // A root that can not be written has no place for it, and is used without.
            Err(e) if e.raw_os_error() == Some(Errno::EROFS as i32) => return Ok(()),
            other => other.during(attempt)?,
        }
    } else {
        fs::create_dir_all(&target).during(attempt)?;
    }
    let kind = match m.type_.as_str() {
        "cgroup" => "cgroup2",
        other => other,
    };
    if bind {
        let how = MsFlags::MS_BIND | (flags & MsFlags::MS_REC);
        mount(Some(m.source.as_str()), &target, None::<&str>, how, None::<&str>).during(attempt)?;
        let rest = flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
        if !rest.is_empty() {
            let again = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            mount(None::<&str>, &target, None::<&str>, again, None::<&str>).during(attempt)?;
        }
    } else {
        let data = (!data.is_empty()).then_some(data.as_str());
        mount(Some(m.source.as_str()), &target, Some(kind), flags, data).during(attempt)?;
    }
    if !propagation.is_empty() {
        mount(None::<&str>, &target, None::<&str>, propagation, None::<&str>).during(attempt)?;
    }
    Ok(())
}

fn file_at(path: &Path) -> std::io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::OpenOptions::new().create(true).append(true).open(path).map(|_| ())
}

/// The usual nodes and links of a /dev that is the container's own.
fn devices(root: &Path) -> Outcome<()> {
    for (path, major, minor) in DEVICES {
        node(root, path, SFlag::S_IFCHR, major, minor, 0o666)?;
    }
    for (link, to) in [
        ("dev/fd", "/proc/self/fd"),
        ("dev/stdin", "/proc/self/fd/0"),
        ("dev/stdout", "/proc/self/fd/1"),
        ("dev/stderr", "/proc/self/fd/2"),
        ("dev/ptmx", "pts/ptmx"),
    ] {
        let _ = symlink(to, root.join(link));
    }
    Ok(())
}

fn device(root: &Path, d: &LinuxDevice) -> Outcome<()> {
    let kind = match d.Type.as_str() {
        "c" | "u" => SFlag::S_IFCHR,
        "b" => SFlag::S_IFBLK,
        "p" => SFlag::S_IFIFO,
        other => return Err(Failure::invalid(format!("device {}: type {other:?}", d.Path))),
    };
    let mode = if d.FileMode == 0 { 0o666 } else { d.FileMode };
    let path = node(root, &d.Path, kind, d.Major as u64, d.Minor as u64, mode)?;
    chown(&path, Some(Uid::from_raw(d.UID)), Some(Gid::from_raw(d.GID)))
        .during(|| format!("give device {} its owner", d.Path))
}

fn node(
    root: &Path,
    path: &str,
    kind: SFlag,
    major: u64,
    minor: u64,
    mode: u32,
) -> Outcome<PathBuf> {
    let target = inside(root, Path::new(path))?;
    let _ = fs::remove_file(&target);
    mknod(&target, kind, Mode::from_bits_truncate(mode), makedev(major, minor))
        .and_then(|()| {
            // mknod's mode is subject to the umask.
            nix::sys::stat::fchmodat(
                nix::fcntl::AT_FDCWD,
                &target,
                Mode::from_bits_truncate(mode),
                nix::sys::stat::FchmodatFlags::FollowSymlink,
            )
        })
        .during(|| format!("make device {path}"))?;
    Ok(target)
}

/// Shows the container's terminal as /dev/console, as OCI runtimes do.
fn console(root: &Path, terminal: &Path) -> Outcome<()> {
    let target = inside(root, Path::new("/dev/console"))?;
    file_at(&target).during(|| "create /dev/console")?;
    mount(Some(terminal), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .during(|| format!("bind {} on /dev/console", terminal.display()))
}

fn restrict(masked: &[String], readonly: &[String]) -> Outcome<()> {
    for path in masked.iter().filter(|p| Path::new(p).exists()) {
        let attempt = || format!("mask {path}");
        if Path::new(path).is_dir() {
            let flags = MsFlags::MS_RDONLY;
            mount(Some("tmpfs"), path.as_str(), Some("tmpfs"), flags, None::<&str>)
        } else {
            let flags = MsFlags::MS_BIND;
            mount(Some("/dev/null"), path.as_str(), None::<&str>, flags, None::<&str>)
        }
        .during(attempt)?;
    }
    for path in readonly.iter().filter(|p| Path::new(p).exists()) {
        let attempt = || format!("make {path} read-only");
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(path.as_str()), path.as_str(), None::<&str>, bind, None::<&str>)
            .during(attempt)?;
        let again = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, path.as_str(), None::<&str>, again, None::<&str>).during(attempt)?;
    }
    Ok(())
}
