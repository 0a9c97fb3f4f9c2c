//! A Unix socket that a process on the host opens sooner or later.

use std::error;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::after;
use nix::errno::Errno;
use nix::sys::socket::{self as sockets, AddressFamily, SockFlag, SockType, UnixAddr};

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
        match connect_now(path) {
            Ok(Some(stream)) => return Ok(stream),
            other if Instant::now() >= deadline => {
                let source = other.err().unwrap_or_else(busy);
                return Err(Error { path: path.to_path_buf(), after: within, source });
            }
            _ => {
                let _ = after(RETRY).recv();
            }
        }
    }
}

/// Connects to whoever listens there; one whose queue is full, since it stands still, is
/// waited for until `within`. connect(2) itself would wait for ever.
///
/// # Errors
/// As connect(2).
pub fn connect(path: &Path, within: Duration) -> io::Result<UnixStream> {
    let deadline = Instant::now() + within;
    loop {
        match connect_now(path)? {
            Some(stream) => return Ok(stream),
            None if Instant::now() >= deadline => return Err(busy()),
            None => {
                let _ = after(RETRY).recv();
            }
        }
    }
}

fn busy() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "nobody accepts connections there")
}

/// Connects without waiting; `None` when nobody accepts there now.
///
/// # Errors
/// As connect(2).
pub fn connect_now(path: &Path) -> io::Result<Option<UnixStream>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = sockets::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match sockets::connect(fd.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => {
            let stream = UnixStream::from(fd);
            stream.set_nonblocking(false)?;
            Ok(Some(stream))
        }
        Err(Errno::EAGAIN) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn one_who_does_not_accept_is_not_waited_for_for_ever() {
        let path = std::env::temp_dir().join(format!("vmcache-socket-{}", std::process::id()));
        let _listener = UnixListener::bind(&path).unwrap();
        // Its queue is full at some time.
        let mut held = Vec::new();
        while let Ok(Some(stream)) = connect_now(&path) {
            held.push(stream);
        }
        let short = Duration::from_millis(50);
        let before = Instant::now();
        assert_eq!(connect(&path, short).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(open(&path, short).is_err());
        assert!(before.elapsed() < Duration::from_secs(5));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(connect(&path, short).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
