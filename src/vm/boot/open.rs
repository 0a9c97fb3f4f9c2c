//! What a QEMU is given open: sockets that listen, connections, images. It makes no socket
//! and connects none, and needs no right to a directory.
//!
//! Invariant: nobody but the server reaches a VM's sockets before the VM is handed out: they
//! are the server's, in a directory that is the server's alone.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::socket::{
    bind, listen, socket, AddressFamily, Backlog, SockFlag, SockType, UnixAddr,
};

use super::{Base, Source};
use crate::agent::seat::Channel;
use crate::config::Config;
use crate::hypervisor::qemu::argv::{Passed, VIRTIOFS_SOCKET};
use crate::vm::dir::VmDir;

/// Clients that may wait at a socket that serves one at a time: further ones are refused at
/// once, and try another.
const ONE: i32 = 1;

/// What it inherits.
pub struct Opened {
    monitor: UnixListener,
    console: UnixListener,
    ports: Vec<UnixListener>,
    kernel: Option<File>,
    initrd: Option<File>,
    vsock: Option<OwnedFd>,
    share: Option<OwnedFd>,
}

impl Opened {
    /// For a VM in this directory; `vsock` holds its address, when that is in the host's
    /// kernel. Who serves it beside QEMU listens already.
    ///
    /// # Errors
    /// As the system's; the text names the path.
    pub fn of(
        config: &Config,
        dir: &VmDir,
        channels: &[Channel],
        base: &Base<'_>,
        vsock: Option<File>,
    ) -> Result<Opened, Source> {
        let mut ports = Vec::new();
        let mut vsock = vsock.map(OwnedFd::from);
        for channel in channels {
            match channel {
                Channel::Port { socket, .. } => ports.push(serving(socket, ONE)?),
                Channel::VhostUserVsock { socket } => vsock = Some(connection(socket)?),
                Channel::Vsock { .. } => {}
            }
        }
        let share = config.shares_virtiofs().then(|| connection(&dir.path().join(VIRTIOFS_SOCKET)));
        let has_head = matches!(base, Base::Clone(origin) if origin.head.is_some());
        let image = |wanted: bool, path: std::path::PathBuf| {
            let opened = wanted.then(|| File::open(&path).map_err(on(&path)));
            opened.transpose()
        };
        Ok(Opened {
            monitor: serving(&dir.monitor(), Backlog::MAXCONN.into())?,
            console: serving(&dir.console(), ONE)?,
            ports,
            kernel: image(!has_head, config.kernel())?,
            initrd: image(!matches!(base, Base::Clone(_)), config.initrd())?,
            vsock,
            share: share.transpose()?,
        })
    }

    /// Their numbers.
    pub fn passed(&self) -> Passed {
        Passed {
            monitor: self.monitor.as_raw_fd(),
            console: self.console.as_raw_fd(),
            ports: self.ports.iter().map(AsRawFd::as_raw_fd).collect(),
            kernel: self.kernel.as_ref().map(AsRawFd::as_raw_fd),
            initrd: self.initrd.as_ref().map(AsRawFd::as_raw_fd),
            vsock: self.vsock.as_ref().map(AsRawFd::as_raw_fd),
            share: self.share.as_ref().map(AsRawFd::as_raw_fd),
        }
    }

    /// All of them.
    pub fn fds(&self) -> Vec<BorrowedFd<'_>> {
        let sockets = [&self.monitor, &self.console].into_iter().chain(&self.ports);
        let images = [&self.kernel, &self.initrd].into_iter().flatten();
        let connections = [&self.vsock, &self.share].into_iter().flatten();
        sockets
            .map(AsFd::as_fd)
            .chain(images.map(AsFd::as_fd))
            .chain(connections.map(AsFd::as_fd))
            .collect()
    }
}

fn on(path: &Path) -> impl Fn(io::Error) -> io::Error + '_ {
    move |e| io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

/// A socket at this path that only its owner may connect to.
fn serving(path: &Path, waiting: i32) -> io::Result<UnixListener> {
    let made = || -> io::Result<UnixListener> {
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listen(&fd, Backlog::new(waiting)?)?;
        Ok(fd.into())
    };
    made().map_err(on(path))
}

/// A connection to who serves a VM beside its QEMU.
fn connection(path: &Path) -> io::Result<OwnedFd> {
    UnixStream::connect(path).map(OwnedFd::from).map_err(on(path))
}
