//! From the kernel's first jump to an agent that answers.
//!
//! Two rounds: the first moves the initramfs into a tmpfs and makes that the
//! root (a container's `pivot_root` needs a root that is a mount of its own,
//! and the initramfs is none), then executes itself; the second mounts, loads
//! modules, and serves.
//!
//! Invariants: after [`run`]'s second round nothing here runs again; a module
//! that does not load is reported on the console and no reason to stop.

use std::fs;
use std::os::unix::fs::{lchown, symlink, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::kmod::{finit_module, ModuleInitFlags};
use nix::mount::{mount, MsFlags};
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{chdir, chroot, sethostname};

use super::failure::{Attempt, Failure, Outcome};
use super::{cgroup, channel, memory, network, reaper, CONTAINERS};

/// Files that the agent may have open.
const FILES: u64 = 65_536;
const SECOND_ROUND: &str = "VMCACHE_AGENT_ROUND";
const NEW_ROOT: &str = "/.root";
/// Where `vmcache mkinitrd` lists the modules to load, a path a line, in order.
const MODULE_LIST: &str = "/lib/modules/vmcache.list";

/// PID 1. Returns only with an error, after which the kernel panics and, by
/// its `panic=1`, the VM ends.
pub fn run() -> Outcome<()> {
    if std::env::var_os(SECOND_ROUND).is_none() {
        into_tmpfs()?;
    }
    std::env::remove_var(SECOND_ROUND);
    // Blocked in every thread that follows; the reaper and the channel wait for them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.add(Signal::SIGIO);
    signals.thread_block().during(|| "block signals")?;

    mounts()?;
    load_modules();
    sethostname("vmcache").during(|| "set the host name")?;
    if let Err(e) = network::loopback_up() {
        eprintln!("vmcache-agent: {}", e.message);
    }
    cgroup::prepare()?;
    memory::records(CONTAINERS)?;
    // Processes that ended, and whose output nobody has read, have their pipes still.
    if let Err(e) = setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES) {
        eprintln!("vmcache-agent: allow {FILES} open files: {e}");
    }
    channel::serve()?;
    reaper::run()
}

/// Copies the initramfs into a tmpfs, makes it the root, executes itself there.
fn into_tmpfs() -> Outcome<()> {
    fs::create_dir_all(NEW_ROOT).during(|| "create the new root")?;
    memory::mount_at(NEW_ROOT)?;
    let entries = fs::read_dir("/").during(|| "read the initramfs")?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if Path::new(NEW_ROOT).file_name() == Some(&name) {
            continue;
        }
        move_tree(&entry.path(), &Path::new(NEW_ROOT).join(name))?;
    }
    chdir(NEW_ROOT).during(|| "enter the new root")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .during(|| "move the new root")?;
    chroot(".").during(|| "change to the new root")?;
    chdir("/").during(|| "enter the new root")?;
    let error = Command::new("/init").env(SECOND_ROUND, "2").exec();
    Err(Failure::internal(format!("execute /init in the new root: {error}")))
}

fn move_tree(from: &Path, to: &Path) -> Outcome<()> {
    let attempt = || format!("move {} into the new root", from.display());
    let meta = fs::symlink_metadata(from).during(attempt)?;
    let kind = meta.file_type();
    if kind.is_dir() {
        fs::create_dir(to).during(attempt)?;
        for entry in fs::read_dir(from).during(attempt)?.flatten() {
            move_tree(&entry.path(), &to.join(entry.file_name()))?;
        }
        fs::set_permissions(to, fs::Permissions::from_mode(meta.mode())).during(attempt)?;
    } else if kind.is_symlink() {
        symlink(fs::read_link(from).during(attempt)?, to).during(attempt)?;
        fs::remove_file(from).during(attempt)?;
    } else if kind.is_file() {
        fs::copy(from, to).during(attempt)?;
        fs::remove_file(from).during(attempt)?;
    } else {
        // Device nodes: devtmpfs brings them all.
        return Ok(());
    }
    lchown(to, Some(meta.uid()), Some(meta.gid())).during(attempt)
}

fn mounts() -> Outcome<()> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let table: [(&str, &str, MsFlags, Option<&str>); 5] = [
        ("proc", "/proc", safe, None),
        ("sysfs", "/sys", safe, None),
        // Nodes, and no files: those could take half of the memory once more.
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755,size=4m")),
        (
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            Some("mode=0620,ptmxmode=0666,gid=5"),
        ),
        ("cgroup2", "/sys/fs/cgroup", safe, None),
    ];
    for (kind, target, flags, options) in table {
        let attempt = || format!("mount {kind} on {target}");
        fs::create_dir_all(target).during(attempt)?;
        match mount(Some(kind), target, Some(kind), flags, options) {
            // The kernel may have mounted its devtmpfs already.
            Err(nix::errno::Errno::EBUSY) => {}
            other => other.during(attempt)?,
        }
    }
    memory::directories()?;
    // Shared propagation off, so that a container's mounts stay its own.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .during(|| "make mounts private")?;
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = symlink(target, link);
    }
    Ok(())
}

fn load_modules() {
    let Ok(list) = fs::read_to_string(MODULE_LIST) else { return };
    for path in list.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let loaded =
            fs::File::open(path).and_then(|f| Ok(finit_module(f, c"", ModuleInitFlags::empty())?));
        if let Err(e) = loaded {
            // Built in already, or of a device that this machine lacks.
            if e.raw_os_error() != Some(nix::errno::Errno::EEXIST as i32) {
                eprintln!("vmcache-agent: module {path}: {e}");
            }
        }
    }
}
