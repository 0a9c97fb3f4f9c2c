//! One thread reaps every child, ours or adopted, and remembers how it ended.
//!
//! Invariants: nobody else calls wait; a status is delivered once, to whoever
//! asks for that pid, before or after the child's death. Statuses that nobody
//! asked for are kept up to a bound, oldest dropped first.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;

use super::failure::{Attempt, Outcome};

/// Unclaimed statuses kept; a guest's adopted orphans are more than anyone asks for.
const KEPT: usize = 4096;

static ENDED: Mutex<VecDeque<(i32, i32)>> = Mutex::new(VecDeque::new());
static NEWS: Condvar = Condvar::new();

/// The reaper's loop, on the main thread.
pub fn run() -> Outcome<()> {
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    loop {
        reap();
        child.wait().during(|| "wait for SIGCHLD")?;
    }
}

fn reap() {
    loop {
        let ended = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), code),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), 128 + signal as i32),
            Ok(WaitStatus::StillAlive) | Err(_) => return,
            Ok(_) => continue,
        };
        let mut list = ENDED.lock().unwrap_or_else(|e| e.into_inner());
        if list.len() == KEPT {
            list.pop_front();
        }
        list.push_back(ended);
        NEWS.notify_all();
    }
}

/// Waits for a child and tells its exit code, 128 + n when signal n ended it.
pub fn wait(pid: i32) -> i32 {
    let mut list = ENDED.lock().unwrap_or_else(|e| e.into_inner());
    loop {
        if let Some(at) = list.iter().position(|(p, _)| *p == pid) {
            return list.remove(at).map_or(255, |(_, code)| code);
        }
        list = NEWS.wait(list).unwrap_or_else(|e| e.into_inner());
    }
}
