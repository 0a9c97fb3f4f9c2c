//! The proxy: one process beside each VM whose agent speaks gRPC on a serial
//! port (Kata 1.x), which has room for one stream of bytes only.
//!
//! ```text
//! client ──► proxy.sock ──►┐
//! client ──► proxy.sock ──►├─ yamux ──► QEMU's socket ──► agent
//! client ──► proxy.sock ──►┘
//! ```
//!
//! A process and not a thread of the server, since it must outlive it: the VM
//! that it serves does.
//!
//! Invariants: every connection is one yamux stream, and when either end of it
//! closes, both do; the listening socket appears when QEMU's is connected, and
//! goes with the process; when QEMU ends, so does the proxy.
//!
//! Does not: look into the bytes; ping the guest, which may be paused for long.
//!
//! Source: what Kata's kata-proxy 1.13 does.

use std::error;
use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{select, Receiver};

use super::socket;
use super::yamux::{Session, Stream};
use crate::trusted_path::Destination;
use crate::worker::{self, Worker};

/// Bytes that are moved at once.
const CHUNK: usize = 16 * 1024;
/// Until another try, when a connection could not be had for want of something.
const AGAIN: Duration = Duration::from_millis(100);
/// How long QEMU may take to accept this.
const QEMU: Duration = Duration::from_secs(10);
/// Longest line of the guest's console that is logged whole, in bytes.
const MAX_LINE: u64 = 4096;

/// What a proxy is to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub listen: PathBuf,
    /// QEMU's end of the serial port.
    pub mux: PathBuf,
    /// QEMU's end of the guest's console, to be logged.
    pub console: Option<PathBuf>,
    /// The sandbox's id, for the log.
    pub sandbox: String,
}

/// Why a proxy does not run.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// QEMU can not be reached.
    Connect { path: PathBuf, source: io::Error },
    /// It can not listen.
    Listen { path: PathBuf, source: io::Error },
    /// No thread.
    Thread(worker::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Connect { path, .. } => write!(f, "connect to QEMU at {}", path.display()),
            Error::Listen { path, .. } => write!(f, "listen on {}", path.display()),
            Error::Thread(_) => f.write_str("serve"),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Connect { source, .. } | Error::Listen { source, .. } => Some(source),
            Error::Thread(source) => Some(source),
        }
    }
}

/// A socket as kata-proxy's options name it: a path, or `unix:` and a path.
pub fn socket_path(text: &str) -> Option<PathBuf> {
    let path = match text.strip_prefix("unix:") {
        Some(rest) => rest.strip_prefix("//").unwrap_or(rest),
        None if text.contains("://") => return None,
        None => text,
    };
    (!path.is_empty()).then(|| path.into())
}

/// Serves until QEMU ends or `stop` closes.
///
/// # Errors
/// When it can not start; its socket is then not there.
pub fn serve(options: &Options, stop: &Receiver<()>) -> Result<(), Error> {
    if let Some(path) = &options.console {
        log_console(connect(path)?)?;
    }
    let session = Session::client(connect(&options.mux)?).map_err(Error::Thread)?;
    let session = Arc::new(session);
    let path = &options.listen;
    let refused = |source| Error::Listen { path: path.clone(), source };
    // What is bound and then made private is the same.
    Destination::named(path).map_err(refused)?;
    let listener = UnixListener::bind(path).map_err(refused)?;
    let private = fs::set_permissions(path, Permissions::from_mode(0o700));
    let accepting = private.map_err(refused).and_then(|()| {
        let session = Arc::clone(&session);
        Worker::spawn("vmc-accept", move || accept(&listener, &session)).map_err(Error::Thread)
    });
    log::info!(
        "announce: sandbox={} {} serves {}",
        options.sandbox,
        path.display(),
        options.mux.display()
    );
    let outcome = accepting.map(|accepting| {
        select! {
            recv(session.ended()) -> _ => {}
            recv(accepting.done()) -> _ => {}
            recv(stop) -> _ => log::info!("stopped"),
        }
    });
    if let Some(why) = session.why() {
        log::info!("ending: sandbox={} {why}", options.sandbox);
    }
    let _ = fs::remove_file(path);
    outcome
}

fn connect(path: &Path) -> Result<UnixStream, Error> {
    socket::connect(path, QEMU)
        .map_err(|source| Error::Connect { path: path.to_path_buf(), source })
}

/// Ends when a connection can not be had any more.
fn accept(listener: &UnixListener, session: &Session) {
    for client in listener.incoming() {
        let client = match client {
            Ok(client) => client,
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return,
            Err(e) => {
                log::warn!("accept a connection: {e}");
                let _ = crossbeam_channel::after(AGAIN).recv();
                continue;
            }
        };
        let started = session.open().and_then(|stream| carry(client, stream));
        match started {
            Ok(()) => {}
            Err(e) if session.why().is_some() => return log::info!("no more connections: {e}"),
            Err(e) => log::warn!("refuse a connection: {e}"),
        }
    }
}

/// Two threads, which end with the connection.
fn carry(client: UnixStream, stream: Stream) -> io::Result<()> {
    let stream = Arc::new(stream);
    let (mut from, mut to) = (client.try_clone()?, client);
    let (up, down) = (Arc::clone(&stream), stream);
    Worker::spawn("vmc-up", move || {
        let mut chunk = vec![0; CHUNK];
        loop {
            match from.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) if up.write_all(&chunk[..n]).is_ok() => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        up.close();
    })
    .map_err(io::Error::other)?;
    Worker::spawn("vmc-down", move || {
        let mut chunk = vec![0; CHUNK];
        while let Ok(n @ 1..) = down.read(&mut chunk) {
            if to.write_all(&chunk[..n]).is_err() {
                break;
            }
        }
        down.close();
        let _ = to.shutdown(Shutdown::Both);
    })
    .map(|_| ())
    .map_err(io::Error::other)
}

fn log_console(console: UnixStream) -> Result<(), Error> {
    Worker::spawn("vmc-console", move || {
        let mut lines = BufReader::new(console);
        let mut line = Vec::new();
        while let Ok(1..) = (&mut lines).take(MAX_LINE).read_until(b'\n', &mut line) {
            let text: String =
                String::from_utf8_lossy(&line).chars().filter(|c| !c.is_control()).collect();
            log::info!("source=agent {text}");
            line.clear();
        }
    })
    .map(|_| ())
    .map_err(Error::Thread)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn sockets_are_named_as_kata_proxy_takes_them() {
        for text in ["/run/p.sock", "unix:/run/p.sock", "unix:///run/p.sock"] {
            assert_eq!(socket_path(text), Some("/run/p.sock".into()), "{text}");
        }
        for text in ["", "unix:", "tcp://h:1"] {
            assert_eq!(socket_path(text), None, "{text}");
        }
    }

    /// A scripted QEMU and agent: two clients at once through one serial port, one
    /// that leaves in the middle, and the end of QEMU.
    #[test]
    fn clients_share_a_port_and_the_proxy_ends_with_qemu() {
        let dir = std::env::temp_dir().join(format!("vmcache-proxy-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mux = UnixListener::bind(dir.join("kata.sock")).unwrap();
        let listen = dir.join("proxy.sock");
        let options = Options {
            listen: listen.clone(),
            mux: dir.join("kata.sock"),
            console: None,
            sandbox: "s".into(),
        };
        let (running, stop) = bounded::<()>(1);
        let proxy = Worker::spawn("test-proxy", move || serve(&options, &stop)).unwrap();
        let (_session, accepted) = Session::server(mux.accept().unwrap().0).unwrap();

        let open = || super::super::socket::open(&listen, SOON).unwrap();
        let mut clients = [open(), open()];
        for (i, client) in clients.iter_mut().enumerate() {
            client.write_all(&[i as u8; 3]).unwrap();
            let guest = accepted.recv_timeout(SOON).unwrap();
            let mut got = [9; 3];
            guest.read(&mut got).unwrap();
            guest.write_all(&got).unwrap();
            client.read_exact(&mut got).unwrap();
            assert_eq!(got, [i as u8; 3]);
            // The guest's end goes: so does the client's.
            drop(guest);
            assert_eq!(client.read(&mut got).unwrap_or(0), 0);
        }
        let leaving = open();
        let guest = accepted.recv_timeout(SOON).unwrap();
        drop(leaving);
        assert_eq!(guest.read(&mut [0; 1]).unwrap_or(0), 0);
        drop((_session, mux));
        proxy.join(SOON).unwrap().unwrap();
        assert!(!listen.exists());
        drop(running);
        fs::remove_dir_all(&dir).unwrap();
    }
}
