//! A Unix socket that a process on the host opens sooner or later.

use std::error;
use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::after;

/// Pause between tries.
const RETRY: Duration = Duration::from_millis(5);

/// Why there is no connection.
#[derive(Debug)]
pub struct Error {
    path: PathBuf,
    after: Duration,
    source: io::Error,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let after = self.after.as_secs_f64();
        write!(f, "connect to {}, tried for {after:.1} s", self.path.display())
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Connects as soon as somebody listens there.
///
/// # Errors
/// With what the last try said, after `within`.
pub fn open(path: &Path, within: Duration) -> Result<UnixStream, Error> {
    let deadline = Instant::now() + within;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(source) if Instant::now() >= deadline => {
                return Err(Error { path: path.to_path_buf(), after: within, source });
            }
            Err(_) => {
                let _ = after(RETRY).recv();
            }
        }
    }
}
