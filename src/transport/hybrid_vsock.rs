//! The host's end of vsock that a process on the host carries: a Unix socket on
//! which one line asks for a port of the guest.
//!
//! ```text
//! host                             vhost-device-vsock
//!  | CONNECT 1024\n ────────────────► |
//!  | ◄────────────────── OK 1073741824\n |   then bytes of the connection
//! ```
//!
//! Invariants: an answer longer than `MAX_ANSWER` bytes is none; nothing of
//! what follows it is read.
//!
//! Does not: know when a guest can be dialled. Version 0.3.0 of the device dies
//! of a connection that comes before the guest's driver, so that must be found
//! out first ([`crate::hypervisor::qemu::virtio`]).
//!
//! Source: Firecracker's description of its vsock device; vhost-device-vsock.

use std::error;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::after;

use super::socket::connect;

/// Longest answer, in bytes: `OK`, a number of 32 bits, the line's end.
const MAX_ANSWER: usize = 32;
/// Pause between tries to reach a guest that may be booting.
const RETRY: Duration = Duration::from_millis(20);
/// Longest wait of the first try, doubled with each.
const TRY: Duration = Duration::from_millis(500);

/// Why there is no connection.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// Nobody carries the guest's vsock.
    Gone { socket: PathBuf, source: io::Error },
    /// No such connection came about.
    Silent { socket: PathBuf, port: u32, after: Duration, source: io::Error },
    /// What answers there is something else.
    Answer { socket: PathBuf, answer: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Gone { socket, .. } => write!(
                f,
                "connect to {}: the process that carries the guest's vsock has ended",
                socket.display()
            ),
            Error::Silent { socket, port, after, .. } => write!(
                f,
                "no agent answered on port {port} through {} within {:.1} s",
                socket.display(),
                after.as_secs_f64()
            ),
            Error::Answer { socket, answer } => write!(
                f,
                "{} answered {answer:?} where OK and a number were expected",
                socket.display()
            ),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Gone { source, .. } | Error::Silent { source, .. } => Some(source),
            Error::Answer { .. } => None,
        }
    }
}

/// Connects to a guest's port, trying until `within` is over.
///
/// # Errors
/// See [`Error`].
pub fn open(socket: &Path, port: u32, within: Duration) -> Result<UnixStream, Error> {
    let deadline = Instant::now() + within;
    let mut patience = TRY;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let stream = connect(socket, left.max(RETRY))
            .map_err(|source| Error::Gone { socket: socket.to_path_buf(), source })?;
        let tried = shake_hands(stream, port, left.min(patience).max(RETRY));
        patience = patience.saturating_mul(2);
        match tried {
            Ok(Shaken::Connected(stream)) => return Ok(stream),
            Ok(Shaken::Nonsense(answer)) => {
                return Err(Error::Answer { socket: socket.to_path_buf(), answer });
            }
            Err(source) if Instant::now() >= deadline => {
                return Err(Error::Silent {
                    socket: socket.to_path_buf(),
                    port,
                    after: within,
                    source,
                });
            }
            Err(_) => {
                let _ = after(RETRY).recv();
            }
        }
    }
}

/// What came of a handshake.
#[derive(Debug)]
pub enum Shaken {
    /// The connection.
    Connected(UnixStream),
    /// The answer is none.
    Nonsense(String),
}

/// Asks for a port on a stream that is connected already.
///
/// # Errors
/// When the stream ends or nothing comes `within`: nobody listens on that port,
/// or not yet.
pub fn shake_hands(mut stream: UnixStream, port: u32, within: Duration) -> io::Result<Shaken> {
    let deadline = Instant::now() + within;
    stream.set_write_timeout(Some(within))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    // Byte by byte: what follows the line is the agent's.
    while answer.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => answer.push(byte[0]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        if answer.len() > MAX_ANSWER {
            break;
        }
    }
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let number = text.strip_prefix("OK ").and_then(|rest| rest.strip_suffix('\n'));
    Ok(match number.is_some_and(|n| n.parse::<u32>().is_ok()) {
        true => Shaken::Connected(stream),
        false => Shaken::Nonsense(text.trim_end().to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(2);

    fn answered(answer: &[u8]) -> io::Result<Shaken> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(answer).unwrap();
        let shaken = shake_hands(ours, 1024, SOON);
        let mut asked = [0; 13];
        theirs.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"CONNECT 1024\n");
        shaken
    }

    #[test]
    fn a_connection_begins_behind_the_line_and_nonsense_is_none() {
        let Ok(Shaken::Connected(mut stream)) = answered(b"OK 1073741824\nfirst") else {
            panic!("not connected")
        };
        let mut first = [0; 5];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(&first, b"first");
        for nonsense in [&b"OK\n"[..], b"OK x\n", b"OK 99999999999\n", b"\n", b"HTTP/1.1 400\n"] {
            assert!(matches!(answered(nonsense), Ok(Shaken::Nonsense(_))));
        }
        let endless = [b'O'; 4096];
        assert!(matches!(answered(&endless), Ok(Shaken::Nonsense(t)) if t.len() <= MAX_ANSWER + 1));
        // Half a line, and then nothing.
        assert_eq!(answered(b"OK 10").unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn nobody_there_is_an_error_at_once() {
        let e = open(Path::new("/nonexistent/v.sock"), 1024, Duration::from_secs(60)).unwrap_err();
        assert!(matches!(e, Error::Gone { .. }), "{e}");
    }
}
