//! What a child process inherits from this one, and what is reset: the whole list.
//!
//! | of the parent | in the child |
//! |---|---|
//! | open files | stdin is /dev/null; stdout and stderr are the caller's; those named in `keep`, under their own numbers; no others |
//! | environment, working directory | empty; `/` (by whoever builds the `Command`) |
//! | session, terminal | a session of its own, without a terminal |
//! | signals blocked, ignored | none |
//! | umask | 077 |
//! | nice value, scheduler, CPUs, I/O priority, timer slack, memory policy | those of this process's first thread: a thread that has lowered its own lowers no child's; no real-time policy; I/O priority, slack and policy as a new process has them |
//! | OOM score | 0 where this process is spared |
//! | limit of open files | as high as may be: this process's own is no limit of the child's |
//! | limit of core files | 1 byte: neither a file nor a handler (a pipe) gets a guest's memory |
//! | other limits | inherited: they are the administrator's |
//! | personality | Linux's, with randomised addresses |
//! | keyrings | a new, empty session keyring; whose keys others have, it has not |
//! | cgroups, label, namespaces, capabilities, user, files, calls | as its [`Cage`] says |
//! | parent-death signal | only of one that is leased |
//! | ambient capabilities | none |
//!
//! Invariant: between fork and exec there are system calls only; what needs memory or a look
//! around was done before.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::resource::{getrlimit, setrlimit, Resource};
use nix::sys::signal::SigSet;
use nix::sys::stat::{umask, Mode};

use super::cage::Cage;
use super::process::default_actions;

/// How much a process is spared when memory runs out: the less, the more.
const OOM: &str = "/proc/self/oom_score_adj";
/// RLIMIT_CORE in bytes: below the least core file, and the one value for which the kernel
/// runs no handler either (core(5): 0 still runs it).
const NO_CORE: u64 = 1;
/// Nanoseconds by which the kernel may wake a new process late (prctl(2)).
const TIMER_SLACK: libc::c_ulong = 50_000;
/// "The same as without" (linux/ioprio.h, linux/mempolicy.h, linux/personality.h).
const IOPRIO_NONE: libc::c_int = 0;
const IOPRIO_OF_PROCESS: libc::c_int = 1;
const MPOL_DEFAULT: libc::c_int = 0;
const PER_LINUX: libc::c_ulong = 0;
/// keyctl(2).
const KEYCTL_JOIN_SESSION_KEYRING: libc::c_ulong = 1;

/// What the first thread of this process has, looked at before the fork.
#[derive(Clone, Copy)]
struct Base {
    nice: libc::c_int,
    policy: libc::c_int,
    cpus: libc::cpu_set_t,
    spared: bool,
    /// Highest limit of open files.
    files: Option<u64>,
}

impl Base {
    fn of_this_process() -> Base {
        let first = nix::unistd::getpid().as_raw();
        // SAFETY: a bit mask; all zeros is an empty one.
        let mut cpus: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: integers, and a pointer to a mask of the size that is told.
        let (nice, policy, read) = unsafe {
            (
                libc::getpriority(libc::PRIO_PROCESS, first as libc::id_t),
                libc::sched_getscheduler(first),
                libc::sched_getaffinity(first, size_of_val(&cpus), &raw mut cpus),
            )
        };
        if read != 0 {
            // More CPUs than fit: what is empty is not set.
            cpus = unsafe { std::mem::zeroed() };
        }
        let spared = fs::read_to_string(OOM).ok().and_then(|t| t.trim().parse::<i32>().ok());
        Base {
            nice,
            policy,
            cpus,
            spared: spared.is_some_and(|n| n < 0),
            files: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(_, most)| most),
        }
    }

    /// In the child. Where it may not, as an ordinary user may not raise a nice value, the
    /// child stays as its parent's thread was.
    fn take(&self) {
        let none: libc::sched_param = libc::sched_param { sched_priority: 0 };
        let ordinary = [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE];
        let policy = if ordinary.contains(&self.policy) { self.policy } else { libc::SCHED_OTHER };
        // SAFETY: integers, and pointers to what `self` and this frame hold.
        unsafe {
            libc::sched_setscheduler(0, policy, &raw const none);
            libc::setpriority(libc::PRIO_PROCESS, 0, self.nice);
            if libc::CPU_COUNT(&self.cpus) > 0 {
                libc::sched_setaffinity(0, size_of_val(&self.cpus), &raw const self.cpus);
            }
            libc::syscall(libc::SYS_ioprio_set, IOPRIO_OF_PROCESS, 0, IOPRIO_NONE);
            libc::prctl(libc::PR_SET_TIMERSLACK, TIMER_SLACK, 0, 0, 0);
            libc::syscall(libc::SYS_set_mempolicy, MPOL_DEFAULT, std::ptr::null::<u8>(), 0);
            libc::personality(PER_LINUX);
        }
    }
}

/// Prepares a child as the list above says: it keeps the fds of `keep`, goes into its cage,
/// and with `leased`, is killed when the thread that starts it ends.
pub fn prepare(command: &mut Command, keep: &[BorrowedFd<'_>], leased: bool, mut cage: Cage) {
    let keep: Vec<_> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    let parent = nix::unistd::getpid();
    let base = Base::of_this_process();
    // SAFETY: what runs in the child makes system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            own_session(&base)?;
            cage.enter()?;
            // After that: another user's death is nobody's to be told of.
            if leased {
                die_with(parent)?;
            }
            keep_open(&keep)
        });
    }
}

fn own_session(base: &Base) -> io::Result<()> {
    nix::unistd::setsid()?;
    umask(Mode::from_bits_truncate(0o077));
    default_actions();
    SigSet::empty().thread_set_mask()?;
    base.take();
    if let Some(most) = base.files {
        setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    }
    let (_, most) = getrlimit(Resource::RLIMIT_CORE)?;
    let core = NO_CORE.min(most);
    setrlimit(Resource::RLIMIT_CORE, core, core)?;
    // SAFETY: a C string, and a byte that is told as one.
    unsafe {
        if base.spared {
            let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY);
            if fd < 0 || libc::write(fd, b"0".as_ptr().cast(), 1) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    }
    Ok(())
}

/// Leaves the keyrings of this process's session for a new, empty one.
///
/// # Errors
/// As keyctl(2); none where the kernel has no keys, or this process is refused the call, as
/// in many containers: its children are refused it likewise.
pub(super) fn own_keyring() -> io::Result<()> {
    let name = std::ptr::null::<u8>();
    // SAFETY: a null name asks for a keyring without one.
    let id = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name) };
    let e = io::Error::last_os_error();
    match (id, e.raw_os_error()) {
        (0.., _) | (_, Some(libc::ENOSYS | libc::EPERM)) => Ok(()),
        _ => Err(e),
    }
}

fn die_with(parent: nix::unistd::Pid) -> io::Result<()> {
    // SAFETY: integers only.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // A parent that was gone before the request is never heard of.
    match nix::unistd::getppid() == parent {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

fn keep_open(keep: &[i32]) -> io::Result<()> {
    // CLOEXEC and not close: std's own error pipe must survive until exec.
    let flags = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: integers only; flags of fds are changed, none is closed.
    unsafe {
        if libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, flags) < 0 {
            return Err(io::Error::last_os_error());
        }
        for fd in keep {
            if libc::fcntl(*fd, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::process::Process;
    use crate::worker::Worker;

    /// A thread that is as no child should be: of low priority, on one processor, with signals
    /// blocked and ignored, late timers, a personality and a memory policy of its own.
    fn spoil() {
        let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        let none = libc::sched_param { sched_priority: 0 };
        // SAFETY: integers, and pointers to this frame; all but SIGTTIN's action is the thread's.
        unsafe {
            libc::CPU_SET(0, &mut one);
            assert_eq!(libc::sched_setaffinity(0, size_of_val(&one), &raw const one), 0);
            assert_eq!(libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const none), 0);
            libc::setpriority(libc::PRIO_PROCESS, 0, 10);
            libc::syscall(libc::SYS_ioprio_set, IOPRIO_OF_PROCESS, 0, 3 << 13);
            libc::prctl(libc::PR_SET_TIMERSLACK, 77_000_000_u64, 0, 0, 0);
            libc::signal(libc::SIGTTIN, libc::SIG_IGN);
        }
        SigSet::all().thread_block().unwrap();
    }

    #[test]
    fn a_child_of_a_spoiled_thread_is_as_the_list_says() {
        let says = |spoiled: bool| {
            let spawn = move || {
                if spoiled {
                    spoil();
                }
                let script = "umask; pwd; env; exec cat /proc/self/stat /proc/self/timerslack_ns \
                              /proc/self/status /proc/self/limits";
                let args = ["-c".into(), script.into()];
                let sh = Path::new("/bin/sh");
                let mut child = Process::spawn(sh, &args, &[], false, Cage::default()).unwrap();
                assert!(child.wait(Duration::from_secs(10)));
                child.last_words()
            };
            Worker::spawn("vmc-spoiled", spawn).unwrap().join(Duration::from_secs(20)).unwrap()
        };
        let (spoiled, other) = (says(true), says(false));
        let lines: Vec<&str> = spoiled.trim_start_matches("it wrote: ").lines().collect();
        assert_eq!(lines[..3], ["0077", "/", "PWD=/"], "{spoiled}");
        let stat = lines.iter().find(|l| l.contains(" (cat) ")).unwrap();
        let fields: Vec<&str> = stat.split(' ').collect();
        // pid, session, terminal; priority and nice; policy.
        assert_eq!((fields[0], fields[6]), (fields[5], "0"), "{stat}");
        assert_eq!((fields[17], fields[18], fields[40]), ("20", "0", "0"), "{stat}");
        assert!(lines.contains(&"50000"), "timer slack: {spoiled}");
        let field = |text: &str, key: &str| {
            let line = text.lines().find(|l| l.starts_with(key)).map(str::to_string);
            line.unwrap_or_else(|| panic!("no {key} in {text}"))
        };
        for (key, none) in [("SigBlk:", "0000000000000000"), ("SigIgn:", "0000000000000000")] {
            assert!(field(&spoiled, key).ends_with(none), "{}", field(&spoiled, key));
        }
        for key in ["Cpus_allowed:", "Mems_allowed:", "CapAmb:", "Groups:"] {
            assert_eq!(field(&spoiled, key), field(&other, key));
        }
        let core = field(&spoiled, "Max core file size");
        assert_eq!(core.split_whitespace().collect::<Vec<_>>()[4..6], ["1", "1"], "{core}");
    }
}
