//! The host's calendar.

use std::time::{SystemTime, UNIX_EPOCH};

/// A moment as the host's time zone has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Year, month from 1, day.
    pub date: (i32, i32, i32),
    /// Hour, minute, second.
    pub time: (i32, i32, i32),
    /// Millionths of a second.
    pub micros: u32,
    /// Minutes by which it is ahead of UTC.
    pub ahead: i64,
}

/// A moment; the epoch's beginning for one before it.
pub fn local(at: SystemTime) -> Moment {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = libc::time_t::try_from(since.as_secs()).unwrap_or_default();
    // SAFETY: a tm is plain numbers and a pointer that may be null; localtime_r fills it
    // and keeps neither address.
    let tm = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        libc::localtime_r(&seconds, &mut tm);
        tm
    };
    Moment {
        date: (tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday),
        time: (tm.tm_hour, tm.tm_min, tm.tm_sec),
        micros: since.subsec_micros(),
        ahead: tm.tm_gmtoff / 60,
    }
}
