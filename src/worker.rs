//! Threads: named, owned, joined with a deadline.
//!
//! The only caller of `std::thread`'s spawn on the host's side. A thread is
//! stopped by what it waits for (a channel that closes, a socket that is shut
//! down); this only joins it.

use std::fmt;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{bounded, Receiver, RecvTimeoutError};

/// Linux cuts the rest of a thread's name.
const MAX_NAME: usize = 15;

/// A thread that could not be started, or that does not end.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The system gave no thread.
    Start { name: String, source: std::io::Error },
    /// It did not end in time.
    Stuck { name: String, after: Duration },
    /// It panicked; the message stands in the log.
    Panicked { name: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Start { name, .. } => write!(f, "start thread {name}"),
            Error::Stuck { name, after } => {
                write!(f, "thread {name} did not end within {:.1} s", after.as_secs_f64())
            }
            Error::Panicked { name } => write!(f, "thread {name} panicked"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Start { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// A running thread.
#[derive(Debug)]
pub struct Worker<T> {
    name: String,
    handle: JoinHandle<T>,
    done: Receiver<()>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread.
    ///
    /// # Errors
    /// When the system gives none.
    #[allow(clippy::disallowed_methods)] // The one place where threads start.
    pub fn spawn(
        name: &str,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Worker<T>, Error> {
        debug_assert!(name.len() <= MAX_NAME, "{name}");
        // Never filled: it only tells, by closing, that the body has returned or panicked.
        let (tell, done) = bounded::<()>(1);
        let handle = Builder::new()
            .name(name.to_string())
            .stack_size(512 * 1024)
            .spawn(move || {
                let _tell = tell;
                body()
            })
            .map_err(|source| Error::Start { name: name.to_string(), source })?;
        Ok(Worker { name: name.to_string(), handle, done })
    }

    /// Closes when the thread has ended.
    pub fn done(&self) -> &Receiver<()> {
        &self.done
    }

    /// Waits for the thread's end and gives its result.
    ///
    /// # Errors
    /// When it does not end in time, or panicked.
    pub fn join(self, within: Duration) -> Result<T, Error> {
        if let Err(RecvTimeoutError::Timeout) = self.done.recv_timeout(within) {
            return Err(Error::Stuck { name: self.name, after: within });
        }
        self.handle.join().map_err(|_| Error::Panicked { name: self.name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_thread_is_named_and_a_panic_is_an_error() {
        let (tx, rx) = bounded::<()>(1);
        let stuck = Worker::spawn("vmc-stuck", move || rx.recv()).unwrap();
        let e = stuck.join(Duration::from_millis(20)).unwrap_err().to_string();
        assert!(e.contains("vmc-stuck"), "{e}");
        drop(tx);
        let broken = Worker::spawn("vmc-broken", || panic!("on purpose")).unwrap();
        assert!(matches!(broken.join(Duration::from_secs(5)), Err(Error::Panicked { .. })));
        assert_eq!(
            Worker::spawn("vmc-fine", || 7).unwrap().join(Duration::from_secs(5)).unwrap(),
            7
        );
    }
}
