//! The host's end of a guest's serial ports: a byte stream to the agent.
//!
//! QEMU serves each port on a Unix socket, one client at a time. A file beside
//! the socket, locked while a connection lasts, tells which ports are taken;
//! the lock goes with its holder, however that ends.
//!
//! Invariants: a connection gets only bytes of its own session (see
//! [`frame`](super::frame)); it ends when either end closes, the guest being told
//! and given a moment to close its own; both pump threads end with it.

use std::error;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use nix::fcntl::{Flock, FlockArg, OFlag};

use super::frame::{header, write_frame, Deframer, Kind, FILLER, HEADER, MAX_PAYLOAD};
use super::socket::connect_now;
use crate::hypervisor::qemu::argv::AGENT_PORTS;
use crate::sys::process::random;
use crate::worker::{self, Worker};

/// Pause between looks at ports that are all taken.
const RETRY: Duration = Duration::from_millis(10);
/// How long a guest may take to say good-bye.
pub const FAREWELL: Duration = Duration::from_millis(500);
/// Most bytes of older sessions that are skipped before the guest's welcome.
const MAX_SKIP: usize = 4 * 1024 * 1024;

/// Why there is no connection.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The VM's directory has no port, or none may be opened.
    Open { path: PathBuf, source: io::Error },
    /// All ports were taken for all the time given.
    Busy { dir: PathBuf, after: Duration },
    /// The guest did not answer.
    Silent { path: PathBuf, after: Duration },
    /// QEMU closed the port.
    Closed { path: PathBuf },
    /// The guest sends, but nothing that is an agent's.
    Garbage { path: PathBuf },
    /// No thread for the connection.
    Thread(worker::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Open { path, .. } => {
                write!(f, "open the agent's serial port {}", path.display())
            }
            Error::Busy { dir, after } => write!(
                f,
                "all {AGENT_PORTS} agent connections of the VM in {} were taken for {:.1} s: \
                 end one of its clients",
                dir.display(),
                after.as_secs_f64()
            ),
            Error::Silent { path, after } => write!(
                f,
                "no agent answered on {} within {:.1} s",
                path.display(),
                after.as_secs_f64()
            ),
            Error::Closed { path } => {
                write!(f, "QEMU closed the agent's serial port {}", path.display())
            }
            Error::Garbage { path } => {
                write!(f, "the guest sends on {}, but it is no vmcache agent", path.display())
            }
            Error::Thread(_) => f.write_str("serve the agent's serial port"),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Open { source, .. } => Some(source),
            Error::Thread(source) => Some(source),
            _ => None,
        }
    }
}

impl Error {
    /// Whether the guest, or its QEMU, is what fails, and not this host.
    pub fn is_guests(&self) -> bool {
        matches!(self, Error::Silent { .. } | Error::Closed { .. } | Error::Garbage { .. })
    }
}

/// Path of a port's socket in a VM's directory.
pub fn socket(dir: &Path, port: usize) -> PathBuf {
    dir.join(format!("agent.{port}.sock"))
}

/// Opens a session with the agent of the VM in `dir`.
///
/// The result is one end of a socket pair; closing it ends the session. Works
/// before the guest has booted: QEMU keeps the bytes until its driver is there.
/// `patience` is how long one port is waited for before the next one is tried:
/// QEMU's end of a port may be left hanging by a client that died.
///
/// # Errors
/// See [`Error`].
pub fn open(dir: &Path, within: Duration, patience: Duration) -> Result<UnixStream, Error> {
    let deadline = Instant::now() + within;
    let mut silent = None;
    loop {
        let mut taken = 0;
        for port in 0..AGENT_PORTS {
            let Some(lock) = lock_port(dir, port)? else {
                taken += 1;
                continue;
            };
            let path = socket(dir, port);
            let failed = |source| Error::Open { path: path.clone(), source };
            let Some(stream) = connect_now(&path).map_err(failed)? else { continue };
            let until = deadline.min(Instant::now() + patience);
            match session(stream, lock, &path, until) {
                Err(e @ Error::Silent { .. }) => silent = Some(e),
                other => return other,
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        if Instant::now() >= deadline {
            return Err(match silent {
                Some(Error::Silent { path, .. }) => Error::Silent { path, after: within },
                _ if taken == AGENT_PORTS => Error::Busy { dir: dir.to_path_buf(), after: within },
                _ => Error::Silent { path: dir.to_path_buf(), after: within },
            });
        }
        sleep(RETRY);
    }
}

/// Starts a session on a connected port.
fn session(
    mut port: UnixStream,
    lock: Flock<File>,
    path: &Path,
    deadline: Instant,
) -> Result<UnixStream, Error> {
    let failed = |source| Error::Open { path: path.to_path_buf(), source };
    let session = session_number().map_err(failed)?;
    let rest = greet(&mut port, session, path, deadline)?;
    port.set_read_timeout(None).map_err(failed)?;
    port.set_write_timeout(None).map_err(failed)?;
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    pump(port, ours, session, rest, lock).map_err(|e| match e {
        Pump::Io(source) => failed(source),
        Pump::Thread(e) => Error::Thread(e),
    })?;
    Ok(theirs)
}

/// Locks a port; `None` when another client has it.
fn lock_port(dir: &Path, port: usize) -> Result<Option<Flock<File>>, Error> {
    let path = dir.join(format!("agent.{port}.lock"));
    // What others may have put there is neither followed nor waited for.
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
    let open = |options: &mut OpenOptions| options.custom_flags(flags).open(&path);
    // The server's file, which another user's client may only read: that is enough to lock it.
    let file = match open(OpenOptions::new().read(true)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            open(OpenOptions::new().create(true).append(true).mode(0o600))
        }
        other => other,
    };
    let file = file.and_then(|file| match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no file")),
    });
    let file = file.map_err(|source| Error::Open { path: path.clone(), source })?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(Error::Open { path, source: e.into() }),
    }
}

#[allow(clippy::disallowed_methods)] // flock has no wait with a deadline.
fn sleep(time: Duration) {
    std::thread::sleep(time);
}

fn session_number() -> io::Result<u64> {
    let mut bytes = [0; 8];
    random(&mut bytes)?;
    // Never zero: that is what a port has before its first session.
    Ok(u64::from_le_bytes(bytes) | 1)
}

/// Says hello and reads up to the welcome; gives what came after it.
fn greet(
    port: &mut UnixStream,
    session: u64,
    path: &Path,
    deadline: Instant,
) -> Result<Vec<u8>, Error> {
    let within = deadline.saturating_duration_since(Instant::now());
    let silent = || Error::Silent { path: path.to_path_buf(), after: within };
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => silent(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            Error::Closed { path: path.to_path_buf() }
        }
        _ => Error::Open { path: path.to_path_buf(), source },
    };
    let mut hello = vec![0; FILLER];
    hello.extend_from_slice(&header(Kind::Hello, session, 0));
    port.set_write_timeout(Some(within.max(RETRY))).map_err(failed)?;
    port.write_all(&hello).map_err(failed)?;

    let welcome = header(Kind::Welcome, session, 0);
    let (mut seen, mut skipped): (Vec<u8>, usize) = (Vec::new(), 0);
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(silent());
        }
        port.set_read_timeout(Some(left)).map_err(failed)?;
        match port.read(&mut chunk) {
            Ok(0) => return Err(Error::Closed { path: path.to_path_buf() }),
            Ok(n) => seen.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(failed(e)),
        }
        if let Some(at) = seen.windows(HEADER).position(|w| w == welcome) {
            return Ok(seen.split_off(at + HEADER));
        }
        let drop = seen.len().saturating_sub(HEADER);
        skipped += drop;
        seen.drain(..drop);
        if skipped > MAX_SKIP {
            return Err(Error::Garbage { path: path.to_path_buf() });
        }
    }
}

enum Pump {
    Io(io::Error),
    Thread(worker::Error),
}

/// Starts the two threads that carry bytes; they own everything and end with
/// either side.
fn pump(
    port: UnixStream,
    ours: UnixStream,
    session: u64,
    rest: Vec<u8>,
    lock: Flock<File>,
) -> Result<(), Pump> {
    let (mut to_guest, mut from_client) =
        (port.try_clone().map_err(Pump::Io)?, ours.try_clone().map_err(Pump::Io)?);
    let (mut from_guest, mut to_client) = (port, ours);
    // Never filled: it only tells, by closing, that the guest has said good-bye.
    let (ending, ended) = bounded::<()>(1);
    Worker::spawn("vmc-port-tx", move || {
        let mut chunk = vec![0; MAX_PAYLOAD];
        loop {
            match from_client.read(&mut chunk) {
                Ok(n) if n > 0 => {
                    if write_frame(&mut to_guest, Kind::Data, session, &chunk[..n]).is_err() {
                        break;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        if write_frame(&mut to_guest, Kind::Bye, session, &[]).is_ok() {
            let _ = ended.recv_timeout(FAREWELL);
        }
        let _ = to_guest.shutdown(Shutdown::Both);
        let _ = from_client.shutdown(Shutdown::Both);
    })
    .map_err(Pump::Thread)?;
    Worker::spawn("vmc-port-rx", move || {
        let _ending = ending;
        let mut frames = Deframer::new();
        frames.push(&rest);
        while let Ok(Some(frame)) = frames.read_frame(&mut from_guest) {
            if frame.session != session {
                continue;
            }
            let done = frame.kind != Kind::Data || to_client.write_all(&frame.payload).is_err();
            if done {
                break;
            }
        }
        let _ = from_guest.shutdown(Shutdown::Both);
        let _ = to_client.shutdown(Shutdown::Both);
        drop(lock);
    })
    .map_err(Pump::Thread)?;
    Ok(())
}
