//! One thread reaps every child, ours or adopted, and remembers how it ended.
//!
//! Invariants: nobody else calls wait; a status is delivered once, to whoever
//! asks for that pid, before or after the child's death, and never that of an earlier
//! process with the same pid ([`Child::of`]). Statuses that nobody asked for are kept
//! up to a bound, oldest dropped first.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::sys::signal::{kill, SigSet, Signal};
use nix::unistd::Pid;

use super::failure::{Attempt, Outcome};
use crate::sys::process::reap;

/// Unclaimed statuses kept; a guest's adopted orphans are more than anyone asks for.
const KEPT: usize = 65_536;

type Statuses = VecDeque<(i32, i32)>;

static ENDED: Mutex<Statuses> = Mutex::new(VecDeque::new());
static NEWS: Condvar = Condvar::new();

fn ended() -> MutexGuard<'static, Statuses> {
    ENDED.lock().unwrap_or_else(|e| e.into_inner())
}

/// The reaper's loop, on the main thread.
pub fn run() -> Outcome<()> {
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    loop {
        // Under the lock from the child's disappearance until its status is told:
        // Child::of looks at both.
        let mut list = ended();
        while let Ok(Some(status)) = reap(-1) {
            record(&mut list, status);
        }
        NEWS.notify_all();
        drop(list);
        child.wait().during(|| "wait for SIGCHLD")?;
    }
}

fn record(list: &mut Statuses, status: (i32, i32)) {
    if list.len() == KEPT {
        list.pop_front();
    }
    list.push_back(status);
}

/// Drops the statuses of earlier processes with that pid: all of them, if the one
/// that has it now is there still (a zombie is), else all but the last.
fn forget_earlier(list: &mut Statuses, pid: i32, there: bool) {
    let mut keep = usize::from(!there);
    for at in (0..list.len()).rev() {
        if list[at].0 != pid {
            continue;
        }
        match keep {
            0 => drop(list.remove(at)),
            _ => keep -= 1,
        }
    }
}

/// A child whose status somebody will ask for.
pub struct Child {
    pid: i32,
}

impl Child {
    /// The child that has this pid now, or has had it as the last one.
    pub fn of(pid: i32) -> Child {
        let mut list = ended();
        let there = kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH);
        forget_earlier(&mut list, pid, there);
        Child { pid }
    }

    /// Waits for its end: its exit code, 128 + n when signal n ended it.
    pub fn wait(self) -> i32 {
        let mut list = ended();
        loop {
            if let Some(at) = list.iter().position(|(p, _)| *p == self.pid) {
                return list.remove(at).map_or(255, |(_, code)| code);
            }
            list = NEWS.wait(list).unwrap_or_else(|e| e.into_inner());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_earlier_status_of_the_same_pid_is_not_delivered() {
        let of = |list: &Statuses| list.iter().map(|s| s.1).collect::<Vec<_>>();
        let all = [(5, 1), (6, 2), (5, 3), (7, 4), (5, 5)];
        let mut alive = Statuses::from(all);
        forget_earlier(&mut alive, 5, true);
        assert_eq!(of(&alive), [2, 4]);
        let mut gone = Statuses::from(all);
        forget_earlier(&mut gone, 5, false);
        assert_eq!(of(&gone), [2, 4, 5]);
    }

    #[test]
    fn statuses_are_bounded() {
        let mut list = Statuses::new();
        for pid in 0..KEPT as i32 + 5 {
            record(&mut list, (pid, 0));
        }
        assert_eq!((list.len(), list[0].0), (KEPT, 5));
    }
}
