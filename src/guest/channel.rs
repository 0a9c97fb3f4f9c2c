//! Serial ports and vsock in, ttrpc connections out.
//!
//! Each virtio serial port `agent.channel.N` carries one client at a time, in
//! the frames of [`crate::transport::frame`]; each session becomes a
//! connection to the ttrpc server's socket. vsock, where there is one, goes to
//! a ttrpc server directly.
//!
//! Invariants: a HELLO ends the session before it, so a client that died can
//! not disturb the next one; a port without a host end is waited for, not
//! polled (SIGIO tells of the change; the time-out is for a lost signal).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use super::failure::{Failure, Outcome};
use super::{service, RUN_DIR};
use crate::sys::guest::{vsock_listener, want_sigio};
use crate::transport::frame::{write_frame, Deframer, Kind, MAX_PAYLOAD};
use crate::transport::AGENT_PORT;

/// Longest sleep of a port whose host end is closed, when a signal was lost.
const RECHECK: Duration = Duration::from_secs(1);

/// Counts the host's opens and closes of any port.
static CHANGES: Mutex<u64> = Mutex::new(0);
static CHANGED: Condvar = Condvar::new();

/// Starts the ttrpc servers and a thread for each port.
pub fn serve() -> Outcome<()> {
    let socket = format!("{RUN_DIR}/agent.sock");
    let agent = service::Agent::new();
    service::start(agent.clone(), |s| s.bind(&format!("unix://{socket}")))?;
    if let Ok(listener) = vsock_listener(AGENT_PORT) {
        service::start(agent, |s| s.add_listener(listener.into_raw_fd()))?;
    }
    spawn("port-events", watch_ports)?;
    for (n, device) in ports().into_iter().enumerate() {
        let socket = socket.clone();
        spawn(&format!("port-{n}"), move || {
            if let Err(e) = serve_port(&device, &socket) {
                eprintln!("vmcache-agent: serial port {}: {e}", device.display());
            }
        })?;
    }
    Ok(())
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Outcome<()> {
    thread::Builder::new()
        .name(name.to_string())
        .spawn(body)
        .map(|_| ())
        .map_err(|e| Failure::internal(format!("start thread {name}: {e}")))
}

/// Device files of the ports that are named for agents, in the names' order.
fn ports() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim().starts_with("agent.channel.") {
            found.push((name, Path::new("/dev").join(entry.file_name())));
        }
    }
    found.sort();
    found.into_iter().map(|(_, device)| device).collect()
}

fn watch_ports() {
    let mut io = SigSet::empty();
    io.add(Signal::SIGIO);
    while io.wait().is_ok() {
        *CHANGES.lock().unwrap_or_else(|e| e.into_inner()) += 1;
        CHANGED.notify_all();
    }
}

fn changes() -> u64 {
    *CHANGES.lock().unwrap_or_else(|e| e.into_inner())
}

fn wait_for_change(seen: u64) {
    let guard = CHANGES.lock().unwrap_or_else(|e| e.into_inner());
    let _ = CHANGED.wait_timeout_while(guard, RECHECK, |now| *now == seen);
}

/// A port, shared by its reader and the session that answers.
struct Port {
    /// Held while a frame is written, so frames never mix; tells the session
    /// that may write.
    writer: Mutex<(File, u64)>,
}

impl Port {
    fn send(&self, kind: Kind, session: u64, bytes: &[u8]) -> io::Result<()> {
        let mut guard = self.writer.lock().unwrap_or_else(|e| e.into_inner());
        if kind == Kind::Welcome {
            guard.1 = session;
        } else if guard.1 != session {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        write_frame(&mut guard.0, kind, session, bytes)
    }

    /// From now on nobody may write until there is a session again: a write would
    /// wait for a host end. One that waits already goes on with the next one.
    fn forget(&self) {
        if let Ok(mut guard) = self.writer.try_lock() {
            guard.1 = 0;
        }
    }
}

fn serve_port(device: &Path, socket: &str) -> io::Result<()> {
    let mut reader = OpenOptions::new().read(true).write(true).open(device)?;
    want_sigio(reader.as_fd())?;
    let port = Arc::new(Port { writer: Mutex::new((reader.try_clone()?, 0)) });
    let mut deframer = Deframer::new();
    let mut chunk = vec![0; 32 * 1024];
    let mut session: Option<(u64, UnixStream)> = None;
    loop {
        let seen = changes();
        match reader.read(&mut chunk) {
            Ok(0) => {
                // The host's end is closed; what comes next is another's.
                port.forget();
                close(session.take());
                wait_for_change(seen);
                continue;
            }
            Ok(n) => deframer.push(&chunk[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        }
        while let Some(frame) = deframer.next_frame() {
            match frame.kind {
                Kind::Hello => {
                    close(session.take());
                    session = open_session(&port, frame.session, socket)?;
                }
                Kind::Data => {
                    let Some((id, stream)) = &mut session else { continue };
                    if *id == frame.session && stream.write_all(&frame.payload).is_err() {
                        close(session.take());
                    }
                }
                // The session's thread says it back when all is closed.
                Kind::Bye => {
                    if session.as_ref().is_some_and(|(id, _)| *id == frame.session) {
                        close(session.take());
                    }
                }
                Kind::Welcome => {}
            }
        }
    }
}

fn close(session: Option<(u64, UnixStream)>) {
    if let Some((_, stream)) = session {
        let _ = stream.shutdown(std::net::Shutdown::Both);
    }
}

fn open_session(port: &Arc<Port>, id: u64, socket: &str) -> io::Result<Option<(u64, UnixStream)>> {
    let stream = UnixStream::connect(socket)?;
    let mut answers = stream.try_clone()?;
    port.send(Kind::Welcome, id, &[])?;
    let port = Arc::clone(port);
    thread::Builder::new().name("session".into()).spawn(move || {
        let mut chunk = vec![0; MAX_PAYLOAD];
        loop {
            match answers.read(&mut chunk) {
                Ok(0) => break,
                Ok(n) if port.send(Kind::Data, id, &chunk[..n]).is_ok() => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        let _ = port.send(Kind::Bye, id, &[]);
        let _ = answers.shutdown(std::net::Shutdown::Both);
    })?;
    Ok(Some((id, stream)))
}
