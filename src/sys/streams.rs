//! Which of the three standard streams this process was started without.
//!
//! Rust's runtime opens /dev/null for a closed one before `main`, so that what is
//! written there would be lost without a word; this looks before the runtime does.

use std::sync::atomic::{AtomicU8, Ordering};

/// A bit for each of fd 0 to 2 that was closed.
static CLOSED: AtomicU8 = AtomicU8::new(0);

extern "C" fn look() {
    let mut closed = 0;
    for fd in 0..3 {
        // SAFETY: integers only.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            closed |= 1 << fd;
        }
    }
    CLOSED.store(closed, Ordering::Relaxed);
}

// SAFETY: the C runtime calls the functions of this section once each, before
// `main`; this one needs nothing that is set up later.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Whether the process was started with this one of fd 0 to 2 closed.
pub fn was_closed(fd: u8) -> bool {
    fd < 3 && CLOSED.load(Ordering::Relaxed) & (1 << fd) != 0
}
