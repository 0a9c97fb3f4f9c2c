//! A panic, of whatever thread, ends the server at once.
//!
//! Invariant: nothing is unwound and nothing dropped: what a panicking thread owned may
//! be half changed, but the VMs are as their ledgers say, and the next server takes
//! over those that stood ready.

use std::panic::PanicHookInfo;
use std::thread;

use crate::events::event;
use crate::sys::process::exit_now;

/// The server's exit code then: Rust's own for a panic.
pub const PANICKED: i32 = 101;

/// From now on, any panic of this process ends it with [`PANICKED`].
pub fn end_the_process() {
    std::panic::set_hook(Box::new(|info| {
        let current = thread::current();
        let thread = current.name().unwrap_or("without a name");
        event!(PANIC, thread = thread; "{}", told(thread, info));
        exit_now(PANICKED);
    }));
}

fn told(thread: &str, info: &PanicHookInfo<'_>) -> String {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let place = info.location().map_or_else(String::new, |l| format!(" at {l}"));
    format!(
        "thread {thread}{place}: {}; this is a defect: the server ends, its VMs stay for \
         the next one",
        text.unwrap_or("no message")
    )
}
