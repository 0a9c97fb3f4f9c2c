//! The socket: its lock, its path, its permissions, and who connects.
//!
//! A server holds a lock on `<endpoint>.lock` for all its life, so a socket
//! whose lock is free is stale and is replaced; the new one appears under its
//! name with its permissions already set. Connections are accepted here and
//! not by gRPC, so that the peer's credentials are known before a byte of it
//! is read: they decide whether it is gRPC's at once, or the relay's ([`super::relay`]), or is
//! turned away. Whatever others do, root's connection waits for no more here than the turning
//! away of those that stand before it in the kernel's queue.

use std::error;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use grpcio::Server;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::{chown, geteuid, Group};

use super::numbers::Ranges;
use super::peers::{Class, Peer, Peers};
use super::relay::bucket::Nanos;
use super::relay::client::refuse_files;
use super::relay::gate::Gate;
use super::relay::limits::nanos;
use super::relay::{turn_away, Door};
use crate::config::paths::{self, SOCKET_LOCK, SOCKET_NEW};
use crate::config::{options::OURS, Config, MAX_SOCKET_PATH};
use crate::confine::admission::Admission;
use crate::stuck;
use crate::sys::process::{start_time, state};
use crate::sys::rpc::{peer_credentials, serve_connection, within};
use crate::walls::Wall;
use crate::worker::{self, Worker};

/// Connections that are accepted before it is asked whether to stop.
const AT_ONCE: usize = 64;
/// Longest that a connection may take to be given to gRPC.
const ADMIT: Duration = Duration::from_secs(5);
/// Pause after accepting failed, for want of fds for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long children of a server that was killed may hold its lock.
const INHERITED: Duration = Duration::from_secs(5);
/// Pause between looks at it.
const LOOK: Duration = Duration::from_millis(10);

/// What a socket's name ends with until it is put in its place.
pub const NEW: &str = SOCKET_NEW;

/// Why there is no socket.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// Its path is too long.
    TooLong { endpoint: PathBuf },
    /// Its directory does not exist.
    NoDirectory { endpoint: PathBuf },
    /// Another server has it.
    Held { endpoint: PathBuf, holder: String },
    /// Another socket was passed than the configuration names.
    Passed { why: String },
    /// Something else is there.
    NotASocket { endpoint: PathBuf },
    /// The group does not exist.
    NoGroup { name: String },
    /// The system refused.
    Io { during: &'static str, path: PathBuf, source: io::Error },
    /// No thread to accept.
    Thread(worker::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::TooLong { endpoint } => write!(
                f,
                "socket path of {} bytes, but at most {MAX_SOCKET_PATH} are possible: {}",
                endpoint.as_os_str().len(),
                endpoint.display()
            ),
            Error::NoDirectory { endpoint } => write!(
                f,
                "the directory of {} does not exist: make it, or change vm_cache_endpoint",
                endpoint.display()
            ),
            Error::Held { endpoint, holder } => write!(
                f,
                "another server (pid {holder}) holds {}: stop it with `vmcache quit`, \
                 or use another endpoint",
                endpoint.display()
            ),
            Error::Passed { why } => f.write_str(why),
            Error::NotASocket { endpoint } => write!(
                f,
                "{} exists and is no socket: remove it, or change vm_cache_endpoint",
                endpoint.display()
            ),
            Error::NoGroup { name } => {
                write!(f, "socket_group {name:?} does not exist on this host")
            }
            Error::Io { during, path, .. } => write!(f, "{during} {}", path.display()),
            Error::Thread(_) => f.write_str("accept connections"),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Io { source, .. } => Some(source),
            Error::Thread(source) => Some(source),
            _ => None,
        }
    }
}

/// The right to an endpoint, held by one server at a time.
pub struct Lock {
    endpoint: PathBuf,
    file: Flock<File>,
}

impl Lock {
    /// Takes it.
    ///
    /// # Errors
    /// [`Error::Held`] with the holder's pid, or as the file system's; when the directory, the
    /// lock or what has the socket's name is another user's.
    pub fn take(endpoint: &Path) -> Result<Lock, Error> {
        if endpoint.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(Error::TooLong { endpoint: endpoint.to_path_buf() });
        }
        if !endpoint.parent().is_some_and(Path::is_dir) {
            return Err(Error::NoDirectory { endpoint: endpoint.to_path_buf() });
        }
        let path = beside(endpoint, SOCKET_LOCK);
        let failed = |source| Error::Io { during: "lock", path: path.clone(), source };
        let file = paths::endpoint(endpoint)
            .and_then(|place| place.with(SOCKET_LOCK)?.open_or_create(0o600))
            .map_err(failed)?;
        let deadline = Instant::now() + INHERITED;
        let mut next = file;
        let mut file = loop {
            let (mut file, e) = match Flock::lock(next, FlockArg::LockExclusiveNonblock) {
                Ok(locked) => break locked,
                Err(refused) => refused,
            };
            if e != nix::errno::Errno::EWOULDBLOCK {
                return Err(failed(e.into()));
            }
            let mut holder = String::new();
            let _ = file.rewind().and_then(|()| (&mut file).take(32).read_to_string(&mut holder));
            let holder = holder.trim().to_string();
            // A server that was killed between forking and the child's executing QEMU:
            // the child has the lock, too, until then.
            let gone = holder.parse().is_ok_and(|pid| matches!(state(pid), None | Some('Z')));
            if !gone || Instant::now() >= deadline {
                return Err(Error::Held { endpoint: endpoint.to_path_buf(), holder });
            }
            pause(LOOK);
            next = file;
        };
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| file.write_all(format!("{}\n", std::process::id()).as_bytes()))
            .map_err(failed)?;
        Ok(Lock { endpoint: endpoint.to_path_buf(), file })
    }

    /// The one that this process had before it executed its program anew.
    ///
    /// # Errors
    /// As flock(2).
    pub fn inherit(endpoint: &Path, file: File) -> Result<Lock, Error> {
        let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| {
            Error::Io { during: "lock", path: beside(endpoint, SOCKET_LOCK), source: e.into() }
        })?;
        Ok(Lock { endpoint: endpoint.to_path_buf(), file })
    }

    /// Its file, locked.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Removes a stale socket and puts a new one in its place.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn listen(&self, config: &Config) -> Result<UnixListener, Error> {
        use std::os::unix::fs::FileTypeExt;
        let endpoint = &self.endpoint;
        match fs::symlink_metadata(endpoint) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(Error::NotASocket { endpoint: endpoint.clone() });
            }
            Ok(_) => log::warn!("replacing the stale socket {}", endpoint.display()),
            Err(_) => {}
        }
        // Bound beside its place: it has its permissions when its name appears.
        let new = beside(endpoint, NEW);
        let failed = |during| {
            let path = endpoint.clone();
            move |source| Error::Io { during, path, source }
        };
        let _ = fs::remove_file(&new);
        let socket = UnixListener::bind(&new).map_err(failed("bind"))?;
        self.permit_at(&new, config)?;
        fs::rename(&new, endpoint).map_err(failed("put in place"))?;
        Ok(socket)
    }

    /// Gives the socket that is there its permissions.
    ///
    /// # Errors
    /// As chmod(2) and chown(2), and [`Error::NoGroup`].
    pub fn permit(&self, config: &Config) -> Result<(), Error> {
        self.permit_at(&self.endpoint, config)
    }

    fn permit_at(&self, path: &Path, config: &Config) -> Result<(), Error> {
        let failed = |during| {
            let path = self.endpoint.clone();
            move |source| Error::Io { during, path, source }
        };
        let mode = fs::Permissions::from_mode(config.socket_mode);
        fs::set_permissions(path, mode).map_err(failed("set the permissions of"))?;
        let group = config.text(OURS, "socket_group");
        if !group.is_empty() {
            let found = Group::from_name(group).ok().flatten();
            let found = found.ok_or_else(|| Error::NoGroup { name: group.to_string() })?;
            chown(path, None, Some(found.gid)).map_err(|e| failed("set the group of")(e.into()))?;
        }
        Ok(())
    }

    /// Removes the socket, unless it is a unit's of systemd, and lets the lock go.
    pub fn release(self, units: bool) {
        if !units {
            let _ = fs::remove_file(&self.endpoint);
        }
        let _ = fs::remove_file(beside(&self.endpoint, SOCKET_LOCK));
    }
}

fn beside(endpoint: &Path, ending: &str) -> PathBuf {
    let mut name = endpoint.as_os_str().to_os_string();
    name.push(ending);
    name.into()
}

/// The thread that accepts.
pub struct Accepting {
    stop: Arc<EventFd>,
    thread: Worker<Server>,
    listener: UnixListener,
}

impl Accepting {
    /// Stops accepting and gives the gRPC server back, unless its thread does not end, and the
    /// socket, in whose queue whoever connects now waits.
    pub fn stop(self, within: Duration) -> (Option<Server>, UnixListener) {
        let _ = self.stop.write(1);
        let server = self.thread.join(within).map_err(|e| log::error!("stop: {e}")).ok();
        (server, self.listener)
    }
}

/// Who is let in, and where to.
pub struct Entrance {
    /// Root's and the server's own.
    pub direct: Server,
    /// Everybody else's.
    pub door: Door,
    /// How often those may connect.
    pub gate: Gate,
    /// Who may claim.
    pub admission: Admission,
    /// Who is who.
    pub peers: Peers,
}

/// Accepts connections and gives them to gRPC, or to the relay before it.
///
/// # Errors
/// When there is no thread.
pub fn accept(listener: UnixListener, mut entrance: Entrance) -> Result<Accepting, Error> {
    let failed = |source| Error::Io { during: "watch", path: PathBuf::new(), source };
    // A connection that has gone again must not hold this thread.
    listener.set_nonblocking(true).map_err(failed)?;
    if let Err(e) = refuse_files(&listener) {
        log::warn!("have the kernel refuse files that are passed to the socket: {e}");
    }
    let kept = listener.try_clone().map_err(failed)?;
    let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(|e| failed(e.into()))?;
    let stop = Arc::new(stop);
    let stopped = Arc::clone(&stop);
    let thread = Worker::spawn("vmc-accept", move || {
        let (start, ranges) = (Instant::now(), entrance.peers.ranges());
        loop {
            let mut fds = [&*stopped as &dyn AsFd, &listener]
                .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
            let _ = poll(&mut fds, PollTimeout::NONE);
            if fds[0].any().unwrap_or(true) {
                return entrance.direct;
            }
            for _ in 0..AT_ONCE {
                match listener.accept() {
                    Ok((stream, _)) => entrance.admit(stream, &ranges, nanos(start.elapsed())),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        log::error!("accept a connection: {e}");
                        pause(ACCEPT_PAUSE);
                        break;
                    }
                }
            }
        }
    })
    .map_err(Error::Thread)?;
    Ok(Accepting { stop, thread, listener: kept })
}

#[allow(clippy::disallowed_methods)] // Nothing tells when it can be had again.
fn pause(time: Duration) {
    std::thread::sleep(time);
}

impl Entrance {
    /// Decides what a peer may do, by its credentials alone, before anything is done for it.
    fn admit(&mut self, stream: UnixStream, ranges: &Ranges, now: Nanos) {
        let (pid, uid, groups) = match peer_credentials(&stream) {
            Ok(found) => found,
            Err(e) => {
                drop(self.door.client(stream));
                log::warn!("refused a connection whose peer can not be told: {e}");
                return;
            }
        };
        let class = match self.admission.allows(uid, &groups) {
            _ if uid == 0 || uid == geteuid().as_raw() || !Wall::Relay.stands() => Class::Direct,
            true => Class::Claimer,
            false => Class::Stranger,
        };
        let mut peer = Peer { pid, start_time: 0, uid, class };
        if class == Class::Direct {
            return self.serve(stream, peer, &ranges.of(class), &groups);
        }
        let client = self.door.client(stream);
        if let Err(why) = self.gate.connect(uid, class, now) {
            return turn_away(&client, &peer, &why);
        }
        // It identifies who has a VM; of a stranger nobody needs to know it soon.
        if class == Class::Claimer {
            peer.start_time = start_time(pid).unwrap_or(0);
        }
        self.door.hand_in(client, peer);
    }

    /// Gives a connection to gRPC itself.
    fn serve(&mut self, stream: UnixStream, peer: Peer, numbers: &Range<i32>, groups: &[u32]) {
        let _doing = stuck::begin("admitting a connection", ADMIT);
        #[cfg(feature = "faults")]
        crate::faults::point("accept");
        let pid = peer.pid;
        let mut peer = Peer { start_time: start_time(pid).unwrap_or(0), ..peer };
        if !self.admission.allows(peer.uid, groups) {
            // Without the relay, which only a test can be.
            peer.class = Class::Stranger;
        }
        let served = within(stream, numbers).and_then(|stream| {
            // Known before gRPC can name it.
            self.peers.add_direct(stream.as_raw_fd(), peer);
            serve_connection(&mut self.direct, stream)
        });
        if let Err(e) = served {
            log::warn!("serve the connection of pid {pid}: {e}; LimitNOFILE= may be too low");
        }
    }
}
