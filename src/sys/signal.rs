//! Signals by their numbers, the real-time ones included, for which Rust's crates
//! have no names.

use std::io;
use std::ops::RangeInclusive;

pub use libc::{
    SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGPIPE, SIGQUIT, SIGSTOP, SIGTERM, SIGTSTP,
    SIGTTIN, SIGTTOU, SIGURG, SIGWINCH,
};

/// A set of signals.
pub struct Set(libc::sigset_t);

impl Set {
    /// The set of these; a number that is no signal is left out.
    pub fn of(numbers: impl IntoIterator<Item = i32>) -> Set {
        let mut set = std::mem::MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises what the pointer names.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        // SAFETY: it was initialised just now.
        let mut set = unsafe { set.assume_init() };
        for number in numbers {
            // SAFETY: the set is ours; a number out of range is refused with EINVAL.
            unsafe { libc::sigaddset(&raw mut set, number) };
        }
        Set(set)
    }

    /// Blocks them in the calling thread and in those that it starts from now on.
    ///
    /// # Errors
    /// As pthread_sigmask(3).
    pub fn block(&self) -> io::Result<()> {
        // SAFETY: reads our set; no old one is asked for.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &self.0, std::ptr::null_mut()) } {
            0 => Ok(()),
            e => Err(io::Error::from_raw_os_error(e)),
        }
    }

    /// Waits for one of them, all of which must be blocked: its number.
    ///
    /// # Errors
    /// As sigwait(3).
    pub fn wait(&self) -> io::Result<i32> {
        let mut number = 0;
        // SAFETY: reads our set, writes one int of ours.
        match unsafe { libc::sigwait(&self.0, &raw mut number) } {
            0 => Ok(number),
            e => Err(io::Error::from_raw_os_error(e)),
        }
    }
}

/// Whether this process ignores a signal, as whoever started it said: nohup, a shell's `&`.
pub fn is_ignored(number: i32) -> bool {
    let mut now = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: changes nothing, and writes the action through the pointer, which is ours.
    let known = unsafe { libc::sigaction(number, std::ptr::null(), now.as_mut_ptr()) } == 0;
    // SAFETY: where the call succeeded, the kernel has written it.
    known && unsafe { now.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Numbers of the real-time signals that programs may use.
pub fn real_time() -> RangeInclusive<i32> {
    libc::SIGRTMIN()..=libc::SIGRTMAX()
}
