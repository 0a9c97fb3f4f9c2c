//! How much of what the server answers with is on its way at a time.
//!
//! A status of thousands of VMs takes most of a megabyte, and stays in memory until its client
//! has taken it. Invariants: of answers to peers through the relay, at most [`MAX_BYTES`] of a
//! class are under way, and [`MAX_BYTES_OF_USER`] of one user or a single answer; root and the
//! server's own user are not bounded.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Bytes of answers to all peers of a class.
pub const MAX_BYTES: usize = 4 << 20;
/// And to one user, who may have one answer whatever its size.
pub const MAX_BYTES_OF_USER: usize = 1 << 20;
/// A status as large as this is put together once in [`STATUS_AGE`] at most.
const LARGE_STATUS: usize = 64 << 10;
/// Oldest status that is told again.
const STATUS_AGE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct UnderWay {
    all: usize,
    users: HashMap<u32, usize>,
}

/// Answers to the peers of one class.
#[derive(Debug, Default)]
pub struct Answers {
    under_way: Mutex<UnderWay>,
    status: Mutex<Option<(Instant, Vec<u8>)>>,
}

/// An answer that is under way until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct Reserved {
    answers: Arc<Answers>,
    uid: u32,
    bytes: usize,
}

impl Answers {
    fn under_way(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// An answer of so many bytes to this user is under way.
    ///
    /// # Errors
    /// What the user is told when there is too much already.
    pub fn reserve(self: &Arc<Answers>, uid: u32, bytes: usize) -> Result<Reserved, String> {
        let mut under_way = self.under_way();
        let own = under_way.users.get(&uid).copied().unwrap_or(0);
        if own > 0 && own + bytes > MAX_BYTES_OF_USER {
            return Err(format!(
                "{own} bytes of answers to uid {uid} have not been read yet, of at most \
                 {MAX_BYTES_OF_USER}: read them, then ask again"
            ));
        }
        if under_way.all > 0 && under_way.all + bytes > MAX_BYTES {
            return Err(format!(
                "{} bytes of answers to other users have not been read yet, of at most \
                 {MAX_BYTES}: ask again",
                under_way.all
            ));
        }
        under_way.all += bytes;
        *under_way.users.entry(uid).or_default() += bytes;
        Ok(Reserved { answers: Arc::clone(self), uid, bytes })
    }

    /// A status: if the last one was large, that again for a while.
    pub fn status(&self, now: Instant, make: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
        let mut kept = self.status.lock().unwrap_or_else(|e| e.into_inner());
        match &*kept {
            Some((at, status)) if now.saturating_duration_since(*at) < STATUS_AGE => {
                return status.clone();
            }
            _ => {}
        }
        let status = make();
        *kept = (status.len() >= LARGE_STATUS).then(|| (now, status.clone()));
        status
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut under_way = self.answers.under_way();
        under_way.all = under_way.all.saturating_sub(self.bytes);
        if let Some(own) = under_way.users.get_mut(&self.uid) {
            *own = own.saturating_sub(self.bytes);
            if *own == 0 {
                under_way.users.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_are_not_read_keep_others_waiting_only_at_the_limit() {
        let answers = Arc::new(Answers::default());
        let large = answers.reserve(1, 3 << 20).unwrap();
        let why = answers.reserve(1, 1).unwrap_err();
        assert!(why.contains("uid 1 have not been read"), "{why}");
        let small: Vec<_> = (0..4).map(|_| answers.reserve(2, 250 << 10).unwrap()).collect();
        assert!(answers.reserve(2, 250 << 10).is_err());
        let why = answers.reserve(3, 250 << 10).unwrap_err();
        assert!(why.contains("other users"), "{why}");
        drop(large);
        let _again = answers.reserve(3, 250 << 10).unwrap();
        drop((small, _again));
        let left = answers.under_way();
        assert_eq!((left.all, left.users.len()), (0, 0));
    }

    #[test]
    fn a_large_status_is_put_together_once_a_second_and_a_small_one_each_time() {
        let (answers, start) = (Answers::default(), Instant::now());
        let at = |ms: u64, size: usize, fill: u8| {
            answers.status(start + Duration::from_millis(ms), || vec![fill; size])[0]
        };
        assert_eq!((at(0, 10, 1), at(1, 10, 2)), (1, 2));
        assert_eq!((at(2, LARGE_STATUS, 3), at(900, 10, 4), at(1002, 10, 5)), (3, 3, 5));
        assert_eq!(at(1003, 10, 6), 6);
    }
}
