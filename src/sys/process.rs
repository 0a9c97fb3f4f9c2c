//! Processes: pidfds, fork, kernel start times.
//!
//! A pid alone can be reused; a pidfd, or a pid with its start time, can not.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::ForkResult;

/// Words of the kernel's struct sigaction, at most.
const SIGACTION: usize = 4;
/// Signals that can have a handler: 1 to 64.
const LAST_SIGNAL: libc::c_int = 64;

/// Opens a pidfd of a process (Linux 5.3 and later).
///
/// # Errors
/// `ESRCH` when there is no such process.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes two integers and returns a new fd or -1.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this fd, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends a signal to the process behind a pidfd.
///
/// # Errors
/// `ESRCH` when it is gone already.
pub fn pidfd_kill(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed; the other arguments are integers.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether the process behind a pidfd still runs (a zombie does not).
pub fn pidfd_alive(pidfd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
}

/// Waits for the end of the process behind a pidfd; false when it still runs
/// after `within`. It may be a zombie then.
pub fn pidfd_wait(pidfd: BorrowedFd<'_>, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            answer => return answer.is_ok_and(|n| n > 0),
        }
    }
}

/// Start time of a process in clock ticks after boot, field 22 of
/// `/proc/<pid>/stat`: with the pid, an identity that is never reused.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold spaces and brackets; fields count after the last one.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// Real uid of a process: whoever is that user may kill it (kill(2)).
pub fn real_uid(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The session that it is in: its leader's pid, which nobody else gets while there is one in it.
pub fn session(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(3)?.parse().ok()
}

/// The process that started it, or whoever took it over.
pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// State letter of a process (`R`, `S`, `T`, `Z` …), field 3 of its stat file.
pub fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// `fork(2)`.
///
/// Only for processes that are still single-threaded: the guest's container
/// stages call it right after their own exec.
///
/// # Errors
/// As fork(2).
pub fn fork() -> io::Result<ForkResult> {
    // SAFETY: the callers are single-threaded (see above), so the child may
    // allocate and take locks.
    unsafe { nix::unistd::fork() }.map_err(io::Error::from)
}

/// Reaps a child that has ended, any for `-1`, without waiting: its pid and exit code,
/// 128 + n when signal n ended it, a real-time one included.
///
/// # Errors
/// `ECHILD` when there is no such child.
pub fn reap(pid: i32) -> io::Result<Option<(i32, i32)>> {
    let mut status = 0;
    // SAFETY: the kernel writes one int through the pointer, which is ours.
    let ended = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
    match ended {
        0 => Ok(None),
        pid if pid > 0 && libc::WIFEXITED(status) => Ok(Some((pid, libc::WEXITSTATUS(status)))),
        // Without WUNTRACED and WCONTINUED there is no third.
        pid if pid > 0 => Ok(Some((pid, 128 + libc::WTERMSIG(status)))),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives every signal its default action, which it keeps across exec. By the system call:
/// the C library keeps two signals to itself, which a parent may have ignored all the same.
pub fn default_actions() {
    let default = [0_u64; SIGACTION];
    let none = std::ptr::null::<u64>();
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: a structure of the kernel's, all zeros: the default action, no flags, no mask.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), none, 8) };
    }
}

/// Clock ticks per second, the unit of [`start_time`].
pub fn ticks_per_second() -> u64 {
    // SAFETY: sysconf takes an integer and touches no memory of ours.
    let n = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(n).unwrap_or(100)
}

/// An fd that this process inherited, by its number; its children do not.
///
/// # Errors
/// When there is no such fd.
#[cfg(feature = "host")]
pub fn owned(number: i32) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: integers only; fails when the fd is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and whoever executed this program left it to this caller.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Ends this process now: nothing is dropped, flushed or unwound.
#[cfg(feature = "host")]
pub fn exit_now(code: i32) -> ! {
    // SAFETY: an integer only; it does not return.
    unsafe { libc::_exit(code) }
}

/// Lets this process have as many files open as it may allow itself.
///
/// # Errors
/// As setrlimit(2).
#[cfg(feature = "host")]
pub fn raise_file_limit() -> io::Result<()> {
    use nix::sys::resource::{getrlimit, setrlimit, Resource::RLIMIT_NOFILE};
    let (_, most) = getrlimit(RLIMIT_NOFILE)?;
    Ok(setrlimit(RLIMIT_NOFILE, most, most)?)
}

/// How many files this process may have open.
#[cfg(feature = "host")]
pub fn file_limit() -> u64 {
    use nix::sys::resource::{getrlimit, Resource::RLIMIT_NOFILE};
    // What every kernel gives, if it does not tell.
    getrlimit(RLIMIT_NOFILE).map_or(1024, |(now, _)| now)
}

/// All fds but 0 to 2 go when this process executes another program.
///
/// # Errors
/// As close_range(2).
#[cfg(feature = "host")]
pub fn close_on_exec() -> io::Result<()> {
    // SAFETY: integers only; it changes a flag of each fd and closes none.
    let rc =
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Except this one.
///
/// # Errors
/// As fcntl(2).
#[cfg(feature = "host")]
pub fn keep_on_exec(fd: BorrowedFd<'_>) -> io::Result<()> {
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
    Ok(())
}

/// Fills a buffer from the kernel's random generator.
///
/// # Errors
/// As getrandom(2).
pub fn random(buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        // SAFETY: pointer and length describe `rest`, which is ours to write.
        let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(n) {
            Ok(n) => done += n,
            Err(_) => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
    Ok(())
}

/// Lets the calling thread stand back behind others that want the processor
/// (0, as they all are, to 19).
pub fn stand_back(nice: i32) {
    // SAFETY: integers only; 0 means the calling thread. A refusal changes nothing.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}
