//! Threads that do not come to an end of what they do: named while the server runs.
//!
//! Each says what it begins and how long that may take ([`begin`]); the main thread,
//! which has nothing else to do, looks ([`look`]). Nothing is ended for it: whoever
//! reads the log decides, and `vmcache restart` or a kill loses no VM.

use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam_channel::{after, bounded, never, select, Receiver, Sender};

use crate::events::{event, limit};

/// Something that a thread does.
struct Task {
    number: u64,
    thread: String,
    what: &'static str,
    since: Instant,
    limit: Duration,
    told: bool,
}

#[derive(Default)]
struct Tasks {
    next: u64,
    /// Whether the watching thread knows that there are some.
    watched: bool,
    all: Vec<Task>,
}

static TASKS: Mutex<Tasks> = Mutex::new(Tasks { next: 0, watched: false, all: Vec::new() });

/// Wakes the thread that watches.
static WAKE: LazyLock<(Sender<()>, Receiver<()>)> = LazyLock::new(|| bounded(1));

/// How often, while something is under way, it is looked at.
const LOOK: Duration = Duration::from_secs(1);

fn tasks() -> MutexGuard<'static, Tasks> {
    TASKS.lock().unwrap_or_else(|e| e.into_inner())
}

/// Done when it is dropped.
#[must_use]
pub struct Doing(u64);

/// This thread begins something that must not take longer than `limit`.
pub fn begin(what: &'static str, limit: Duration) -> Doing {
    let thread = std::thread::current().name().unwrap_or("without a name").to_string();
    let mut tasks = tasks();
    tasks.next += 1;
    let number = tasks.next;
    if !std::mem::replace(&mut tasks.watched, true) {
        // Full when it has been woken already, or nobody watches.
        let _ = WAKE.0.try_send(());
    }
    tasks.all.push(Task { number, thread, what, since: Instant::now(), limit, told: false });
    Doing(number)
}

impl Drop for Doing {
    fn drop(&mut self) {
        let mut tasks = tasks();
        let Some(at) = tasks.all.iter().position(|t| t.number == self.0) else { return };
        let Task { thread, what, since, told, .. } = tasks.all.swap_remove(at);
        if told {
            let took = since.elapsed().as_secs_f64();
            event!(STUCK_NO_MORE, thread = thread; "thread {thread} has done with {what} after {took:.0} s");
        }
    }
}

/// Looks after threads until `done` is told, and passes on what it finds. Where nothing
/// is under way, this does not wake: what begins then wakes it.
pub fn watch<T>(done: &Receiver<T>, mut found: impl FnMut(Vec<String>)) {
    let (mut next, mut rest) = (never(), never());
    loop {
        select! {
            recv(done) -> _ => return,
            // Lines of the log that were counted only: this thread has the time to say so.
            recv(limit::counted()) -> _ => rest = after(limit::SECOND),
            recv(rest) -> _ => {
                rest = if limit::say_rest(false) { after(limit::SECOND) } else { never() };
            }
            recv(WAKE.1) -> _ => next = after(LOOK),
            recv(next) -> _ => {
                found(look());
                let mut tasks = tasks();
                tasks.watched = !tasks.all.is_empty();
                next = if tasks.watched { after(LOOK) } else { never() };
            }
        }
    }
}

/// Tells of those that take too long, once each; all that do now, for status.
pub fn look() -> Vec<String> {
    let now = Instant::now();
    let mut stuck = Vec::new();
    for task in &mut tasks().all {
        let took = now.saturating_duration_since(task.since);
        if took < task.limit {
            continue;
        }
        let text =
            format!("thread {} has been at {} for {} s", task.thread, task.what, took.as_secs());
        if !std::mem::replace(&mut task.told, true) {
            event!(STUCK, thread = task.thread; "{text}; `vmcache restart`, or killing the server, loses no VM");
        }
        stuck.push(text);
    }
    stuck
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_named_and_what_does_not_is_not() {
        let quick = begin("a quick thing", Duration::from_secs(600));
        let slow = begin("a slow thing", Duration::ZERO);
        let own =
            |all: Vec<String>| all.into_iter().filter(|t| t.contains(" thing")).collect::<Vec<_>>();
        let told = own(look());
        assert!(told.len() == 1 && told[0].contains("what_takes_too_long"), "{told:?}");
        assert!(told[0].contains("a slow thing for "), "{told:?}");
        drop(slow);
        assert!(own(look()).is_empty());
        drop(quick);
    }
}
