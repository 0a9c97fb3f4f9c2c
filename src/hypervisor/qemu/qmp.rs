//! QMP, QEMU's monitor: JSON lines over a Unix socket.
//!
//! Invariants: bytes that were read are never lost to a time-out; a line has a
//! bound; an answer is matched by its id; every wait has a deadline. QEMU
//! serves one monitor client at a time, so whoever hands a VM on drops this
//! first.
//!
//! Source: QEMU's docs/interop/qmp-spec.

use std::collections::VecDeque;
use std::error;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags};
use serde_json::{json, Value};

use crate::transport::socket::connect;

/// Longest line taken from QEMU, in bytes.
pub const MAX_LINE: usize = 1024 * 1024;
/// Events kept until somebody asks; older ones are dropped.
const MAX_EVENTS: usize = 64;
/// Deadline of a command that should be quick.
pub const QUICK: Duration = Duration::from_secs(10);

/// Why talking to QEMU failed.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The socket could not be connected.
    Connect { path: PathBuf, source: io::Error },
    /// Reading or writing failed.
    Io { during: String, path: PathBuf, source: io::Error },
    /// QEMU closed the connection.
    Closed { during: String, path: PathBuf },
    /// Nothing came in time.
    Silent { during: String, path: PathBuf, after: Duration },
    /// What came is not QMP.
    Garbage { during: String, path: PathBuf, what: String },
    /// QEMU refused a command.
    Refused { command: String, class: String, text: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Connect { path, .. } => {
                write!(f, "connect to QEMU's monitor {}", path.display())
            }
            Error::Io { during, path, .. } => {
                write!(f, "{during} on QEMU's monitor {}", path.display())
            }
            Error::Closed { during, path } => write!(
                f,
                "QEMU closed its monitor {} during {during}: it has probably died",
                path.display()
            ),
            Error::Silent { during, path, after } => write!(
                f,
                "QEMU's monitor {} did not answer {during} within {:.1} s: it hangs, or another \
                 client holds the monitor",
                path.display(),
                after.as_secs_f64()
            ),
            Error::Garbage { during, path, what } => {
                write!(f, "QEMU's monitor {} during {during}: {what}", path.display())
            }
            Error::Refused { command, class, text } => {
                write!(f, "QEMU refused {command}: {text} ({class})")
            }
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Connect { source, .. } | Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// A connection to one QEMU's monitor, past its greeting.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    lines: Lines,
    next_id: u64,
    events: VecDeque<Value>,
    version: String,
}

impl Qmp {
    /// Connects, takes the greeting, leaves negotiation mode.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn connect(path: &Path, within: Duration) -> Result<Qmp, Error> {
        let deadline = Instant::now() + within;
        let stream = connect(path, within)
            .map_err(|source| Error::Connect { path: path.to_path_buf(), source })?;
        Qmp::over(stream, path, deadline.saturating_duration_since(Instant::now()))
    }

    /// The same over a connected socket.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn over(stream: UnixStream, path: &Path, within: Duration) -> Result<Qmp, Error> {
        let mut qmp = Qmp {
            stream,
            path: path.to_path_buf(),
            lines: Lines::default(),
            next_id: 0,
            events: VecDeque::new(),
            version: String::new(),
        };
        let deadline = Instant::now() + within;
        let greeting = qmp.line("the greeting", deadline, within)?;
        let Some(hello) = greeting.get("QMP") else {
            return Err(qmp.garbage("the greeting", "no greeting of QMP"));
        };
        let part = |k: &str| hello["version"]["qemu"][k].as_u64().unwrap_or(0);
        qmp.version = format!("{}.{}.{}", part("major"), part("minor"), part("micro"));
        let left = deadline.saturating_duration_since(Instant::now());
        qmp.execute("qmp_capabilities", None, left)?;
        Ok(qmp)
    }

    /// QEMU's version, `major.minor.micro`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn execute(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        within: Duration,
    ) -> Result<Value, Error> {
        self.execute_with(command, arguments, None, within)
    }

    /// The same, with an fd that goes along.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn execute_with(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        fd: Option<BorrowedFd<'_>>,
        within: Duration,
    ) -> Result<Value, Error> {
        self.next_id += 1;
        let id = format!("vmcache-{}", self.next_id);
        let mut request = json!({"execute": command, "id": id});
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        let mut bytes = request.to_string().into_bytes();
        bytes.push(b'\n');
        let failed = |path: &Path, source: io::Error| Error::Io {
            during: command.to_string(),
            path: path.to_path_buf(),
            source,
        };
        let wait = within.max(Duration::from_millis(1));
        self.stream
            .set_write_timeout(Some(wait))
            .and_then(|()| self.send(&bytes, fd))
            .map_err(|e| failed(&self.path, e))?;
        let deadline = Instant::now() + within;
        loop {
            let answer = self.line(command, deadline, within)?;
            if answer.get("event").is_some() {
                self.keep(answer);
                continue;
            }
            if answer.get("id").and_then(Value::as_str) != Some(&id) {
                // An answer to a command whose time was up.
                continue;
            }
            if let Some(error) = answer.get("error") {
                let text = |k: &str| error[k].as_str().unwrap_or_default().to_string();
                return Err(Error::Refused {
                    command: command.to_string(),
                    class: text("class"),
                    text: text("desc"),
                });
            }
            return match answer.get("return") {
                Some(value) => Ok(value.clone()),
                None => Err(self.garbage(command, "an answer without result or error")),
            };
        }
    }

    /// Stops the virtual CPUs.
    ///
    /// # Errors
    /// See [`Error`]; so with the following.
    pub fn pause(&mut self) -> Result<(), Error> {
        self.execute("stop", None, QUICK).map(|_| ())
    }

    /// Lets the virtual CPUs run.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.execute("cont", None, QUICK).map(|_| ())
    }

    /// Whether the virtual CPUs run; an error when they can not run again, either.
    pub fn running(&mut self) -> Result<bool, Error> {
        match self.status(QUICK)?.as_str() {
            "running" => Ok(true),
            "paused" => Ok(false),
            _ => Err(self.garbage("query-status", "neither running nor paused")),
        }
    }

    /// What QEMU says of the VM as a whole: `running`, `paused`, `internal-error` and so
    /// on (its RunState).
    ///
    /// # Errors
    /// See [`Error`].
    pub fn status(&mut self, within: Duration) -> Result<String, Error> {
        let answer = self.execute("query-status", None, within)?;
        Ok(answer["status"].as_str().unwrap_or_default().to_string())
    }

    /// Asks QEMU to end.
    pub fn quit(&mut self) -> Result<(), Error> {
        self.execute("quit", None, QUICK).map(|_| ())
    }

    /// The oldest event that nobody has taken, or the next one that comes.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::Silent`] when none comes before `deadline`,
    /// which is `within` from when the wait began.
    pub fn next_event(
        &mut self,
        during: &str,
        deadline: Instant,
        within: Duration,
    ) -> Result<Value, Error> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(event);
            }
            let line = self.line(during, deadline, within)?;
            if line.get("event").is_some() {
                self.keep(line);
            }
        }
    }

    /// Writes all of it; the fd travels with the first byte.
    fn send(&mut self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut sent = 0;
        if let Some(fd) = fd {
            let fds = [fd.as_raw_fd()];
            let parts = [io::IoSlice::new(bytes)];
            let with = [ControlMessage::ScmRights(&fds)];
            let to = self.stream.as_raw_fd();
            sent = sendmsg::<()>(to, &parts, &with, MsgFlags::MSG_NOSIGNAL, None)?;
        }
        self.stream.write_all(&bytes[sent..])
    }

    fn keep(&mut self, event: Value) {
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    pub(super) fn silent(&self, during: &str, after: Duration) -> Error {
        Error::Silent { during: during.to_string(), path: self.path.clone(), after }
    }

    fn garbage(&self, during: &str, what: &str) -> Error {
        Error::Garbage {
            during: during.to_string(),
            path: self.path.clone(),
            what: what.to_string(),
        }
    }

    fn line(&mut self, during: &str, deadline: Instant, within: Duration) -> Result<Value, Error> {
        loop {
            match self.lines.next() {
                Some(Ok(line)) => {
                    return serde_json::from_slice(&line).map_err(|e| {
                        let head: String =
                            String::from_utf8_lossy(&line).chars().take(80).collect();
                        self.garbage(during, &format!("not JSON ({e}): {head:?}"))
                    });
                }
                Some(Err(TooLong)) => {
                    return Err(self.garbage(during, &format!("a line of over {MAX_LINE} bytes")));
                }
                None => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.silent(during, within));
            }
            let mut chunk = [0; 4096];
            let read = self
                .stream
                .set_read_timeout(Some(left))
                .and_then(|()| self.stream.read(&mut chunk));
            match read {
                Ok(0) => {
                    return Err(Error::Closed {
                        during: during.to_string(),
                        path: self.path.clone(),
                    })
                }
                Ok(n) => self.lines.push(&chunk[..n]),
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
                {
                    return Err(self.silent(during, within));
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(Error::Closed {
                        during: during.to_string(),
                        path: self.path.clone(),
                    });
                }
                Err(source) => {
                    return Err(Error::Io {
                        during: during.to_string(),
                        path: self.path.clone(),
                        source,
                    });
                }
            }
        }
    }
}

/// A line over [`MAX_LINE`].
#[derive(Debug, PartialEq)]
struct TooLong;

/// Cuts a stream of bytes into lines, at most [`MAX_LINE`] long.
#[derive(Debug, Default)]
struct Lines {
    buffer: Vec<u8>,
    looked: usize,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    fn next(&mut self) -> Option<Result<Vec<u8>, TooLong>> {
        loop {
            let Some(end) = self.buffer[self.looked..].iter().position(|b| *b == b'\n') else {
                self.looked = self.buffer.len();
                return (self.buffer.len() > MAX_LINE).then_some(Err(TooLong));
            };
            let line: Vec<u8> = self.buffer.drain(..=self.looked + end).collect();
            self.looked = 0;
            if line.len() > MAX_LINE {
                return Some(Err(TooLong));
            }
            if !line.trim_ascii().is_empty() {
                return Some(Ok(line));
            }
        }
    }
}

#[cfg(test)]
mod tests;
