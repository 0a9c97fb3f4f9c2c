//! System calls that a VM's QEMU is refused, beside those that QEMU's own `-sandbox` refuses
//! once it has started: what would lead out of its VM and is needed for none.
//!
//! This is the wall that stands on every kernel and for every user, and the only one against
//! some things: Landlock does not stop connect(2) to a Unix socket by its path at any
//! version, nor chmod(2); truncate(2) only since Linux 6.2, signals only since 6.12, TCP only
//! since 6.7. Where QEMUs share a user with each other or with their server, no file mode
//! and no uid stands between them.
//!
//! Invariants: QEMU makes sockets of the Unix stream kind only, and connects none: all that it
//! talks to is passed to it open. It signals itself only, and starts no
//! process. What is refused is answered with
//! EPERM; what a library tries before it takes another way, with ENOSYS.
//!
//! Does not: filter by the contents of memory (a path, a structure): paths are Landlock's.

use std::io;

use nix::errno::Errno;

use crate::sys::seccomp::{Filter, Refusals, When};

/// Other processes: their memory, their fds, their limits and priority.
const PROCESSES: [&str; 11] = [
    "kcmp",
    "migrate_pages",
    "move_pages",
    "pidfd_getfd",
    "pidfd_open",
    "pidfd_send_signal",
    "process_madvise",
    "process_mrelease",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
];
/// The kernel's own machinery.
const KERNEL: [&str; 27] = [
    "acct",
    "adjtimex",
    "bpf",
    "clock_adjtime",
    "clock_settime",
    "delete_module",
    "execveat",
    "fanotify_init",
    "fanotify_mark",
    "finit_module",
    "init_module",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "lookup_dcookie",
    "perf_event_open",
    "quotactl",
    "quotactl_fd",
    "reboot",
    "setdomainname",
    "sethostname",
    "settimeofday",
    "swapoff",
    "swapon",
    "syslog",
    "userfaultfd",
];
/// Other views of the host: namespaces, mounts, files by handle.
const VIEWS: [&str; 15] = [
    "chroot",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "mount",
    "mount_setattr",
    "move_mount",
    "name_to_handle_at",
    "open_by_handle_at",
    "open_tree",
    "pivot_root",
    "setns",
    "umount2",
    "unshare",
];
/// What processes of one user share beside files: keys, System V's objects, queues.
const SHARED: [&str; 18] = [
    "add_key",
    "keyctl",
    "mq_open",
    "mq_unlink",
    "msgctl",
    "msgget",
    "msgrcv",
    "msgsnd",
    "request_key",
    "semctl",
    "semget",
    "semop",
    "semtimedop",
    "shmat",
    "shmctl",
    "shmget",
    "uselib",
    "vhangup",
];
/// Sockets that are not passed open.
const SOCKETS: [&str; 2] = ["bind", "connect"];
/// Watches on files that it could not open.
const WATCHES: [&str; 2] = ["inotify_init", "inotify_init1"];
/// What a file is, beside its contents: Landlock says nothing of these.
const ATTRIBUTES: [&str; 23] = [
    "chmod",
    "chown",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "fchown",
    "fchownat",
    "fremovexattr",
    "fsetxattr",
    "futimesat",
    "lchown",
    "lremovexattr",
    "lsetxattr",
    "mknod",
    "mknodat",
    "removexattr",
    "setxattr",
    "truncate",
    "utime",
    "utimensat",
    "utimes",
    "tkill",
    "rt_sigqueueinfo",
];
/// Tried first by libraries, which take another way where the kernel lacks it. The first three
/// do what is refused here by another door; the fourth takes of what the whole host has a number
/// of (aio-max-nr); the arguments of the last lie in memory.
const OTHER_DOORS: [&str; 5] =
    ["io_uring_enter", "io_uring_register", "io_uring_setup", "io_setup", "clone3"];

const AF_UNIX: u32 = 1;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
/// Kinds of sockets but streams (1), without their flags.
const NO_STREAMS: [u64; 5] = [2, 3, 4, 5, 10];
const KIND: u64 = 0xf;
/// clone(2)'s flags for namespaces: time, mount, cgroup, UTS, IPC, user, pid, network.
const NAMESPACES: [u64; 8] = [
    0x0000_0080,
    0x0002_0000,
    0x0200_0000,
    0x0400_0000,
    0x0800_0000,
    0x1000_0000,
    0x2000_0000,
    0x4000_0000,
];
/// clone(2): in the same process.
const CLONE_THREAD: u64 = 0x0001_0000;
/// fcntl(2): F_SETOWN, F_SETSIG, F_SETOWN_EX, by which the kernel signals others for it;
/// F_SETLEASE and F_NOTIFY, which hold up and watch who uses a file.
const FCNTL: [u32; 5] = [8, 10, 15, 1024, 1026];
/// ioctl(2): TIOCSTI and TIOCLINUX (a terminal's input).
const IOCTL: [u32; 2] = [0x5412, 0x541c];
/// And all of sockets': a socket that is passed is of the host's network, and tells of it.
/// FIOSETOWN and SIOCSPGRP, of fcntl's kind, are among them.
const SOCKETS_IOCTL: (u64, u64) = (0xffff_ff00, 0x8900);
/// Device files, of stat(2)'s kinds.
const FORMAT: u64 = 0o170_000;
const DEVICES: [u64; 2] = [0o020_000, 0o060_000];

/// For a QEMU; `serves_files`, it serves a directory to its guest and gives files there the
/// owners and modes that the guest asks for, but makes no devices.
///
/// # Errors
/// When it cannot be put together for this architecture.
pub fn of_qemu(serves_files: bool) -> io::Result<Filter> {
    let mut refused = Refusals::new(Errno::EPERM);
    let lists: [&[&str]; 6] = [&PROCESSES, &KERNEL, &VIEWS, &SHARED, &SOCKETS, &WATCHES];
    lists.into_iter().flatten().for_each(|call| refused.always(call));
    match serves_files {
        false => ATTRIBUTES.iter().for_each(|call| refused.always(call)),
        true => {
            for kind in DEVICES {
                refused.when("mknod", &[(1, When::Masked(FORMAT, kind))])?;
                refused.when("mknodat", &[(2, When::Masked(FORMAT, kind))])?;
            }
            ["tkill", "rt_sigqueueinfo"].iter().for_each(|call| refused.always(call));
        }
    }
    process_itself_only(&mut refused)?;
    streams_only(&mut refused)?;
    Filter::of(vec![refused, other_doors()])
}

/// Unix sockets that carry streams, which no address can be sent to.
fn streams_only(refused: &mut Refusals) -> io::Result<()> {
    for call in ["socket", "socketpair"] {
        refused.when(call, &[(0, When::IsNot(AF_UNIX))])?;
        for kind in NO_STREAMS {
            refused.when(call, &[(1, When::Masked(KIND, kind))])?;
        }
    }
    refused.when("sendto", &[(4, When::NotNull)])
}

fn other_doors() -> Refusals {
    let mut absent = Refusals::new(Errno::ENOSYS);
    OTHER_DOORS.iter().for_each(|call| absent.always(call));
    absent
}

/// Signals, limits and priority of this process alone; no namespaces, no signals that the
/// kernel would send for it.
fn process_itself_only(refused: &mut Refusals) -> io::Result<()> {
    for call in ["kill", "tgkill", "rt_tgsigqueueinfo"] {
        refused.when(call, &[(0, When::IsNotOwnPid)])?;
    }
    refused.when("prlimit64", &[(0, When::IsNot(0)), (0, When::IsNotOwnPid)])?;
    // Of the calling thread only.
    for call in ["sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler"] {
        refused.when(call, &[(0, When::IsNot(0))])?;
    }
    for (call, process) in [("setpriority", 0), ("ioprio_set", 1)] {
        refused.when(call, &[(0, When::IsNot(process))])?;
        refused.when(call, &[(1, When::IsNot(0))])?;
    }
    // Threads, and no processes, which would outlive the VM.
    ["fork", "vfork"].iter().for_each(|call| refused.always(call));
    refused.when("clone", &[(0, When::Masked(CLONE_THREAD, 0))])?;
    for flag in NAMESPACES {
        refused.when("clone", &[(0, When::Masked(flag, flag))])?;
    }
    for command in FCNTL {
        refused.when("fcntl", &[(1, When::Is(command))])?;
    }
    for request in IOCTL {
        refused.when("ioctl", &[(1, When::Is(request))])?;
    }
    let (mask, kind) = SOCKETS_IOCTL;
    refused.when("ioctl", &[(1, When::Masked(mask, kind))])?;
    Ok(())
}

/// For who carries a guest's vsock: it listens on Unix sockets, and connects none.
///
/// # Errors
/// As [`of_qemu`].
pub fn of_vsock_device() -> io::Result<Filter> {
    let mut refused = Refusals::new(Errno::EPERM);
    let lists: [&[&str]; 6] = [&PROCESSES, &KERNEL, &VIEWS, &SHARED, &WATCHES, &ATTRIBUTES];
    lists.into_iter().flatten().for_each(|call| refused.always(call));
    refused.always("connect");
    process_itself_only(&mut refused)?;
    streams_only(&mut refused)?;
    Filter::of(vec![refused, other_doors()])
}

/// For who speaks for a guest on the host's network: TCP, UDP and ICMP of either version, and
/// no other sockets; else as QEMU.
///
/// # Errors
/// As [`of_qemu`].
pub fn of_user_network() -> io::Result<Filter> {
    let mut refused = Refusals::new(Errno::EPERM);
    let lists: [&[&str]; 6] = [&PROCESSES, &KERNEL, &VIEWS, &SHARED, &WATCHES, &ATTRIBUTES];
    lists.into_iter().flatten().for_each(|call| refused.always(call));
    process_itself_only(&mut refused)?;
    refused.when("socket", &[(0, When::IsNot(AF_INET)), (0, When::IsNot(AF_INET6))])?;
    refused.when("socketpair", &[(0, When::IsNot(AF_UNIX))])?;
    Filter::of(vec![refused, other_doors()])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::seccomp::number;

    /// A name that is misspelt would refuse nothing.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn every_call_that_is_named_is_known() {
        let lists: [&[&str]; 8] =
            [&PROCESSES, &KERNEL, &VIEWS, &SHARED, &SOCKETS, &WATCHES, &ATTRIBUTES, &OTHER_DOORS];
        for call in lists.into_iter().flatten() {
            assert!(number(call).is_some(), "{call}");
        }
        for serves_files in [false, true] {
            of_qemu(serves_files).unwrap();
        }
        of_user_network().unwrap();
        of_vsock_device().unwrap();
    }
}
