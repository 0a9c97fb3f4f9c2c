//! Handing connected sockets to gRPC, and asking them who is behind.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicI32, Ordering};

use grpcio::{Channel, ChannelBuilder, Server};

/// Numbers of connections begin here.
const LOWEST: i32 = 256;
/// How many of them are used in turn.
const NUMBERS: i32 = 8192;

/// Gives an accepted connection to a gRPC server and tells the number of its
/// fd, under which `RpcContext::peer` names it (`fd:N`).
///
/// # Errors
/// As setting the socket non-blocking, without which gRPC would hang silently.
pub fn serve_connection(server: &mut Server, stream: UnixStream) -> io::Result<i32> {
    stream.set_nonblocking(true)?;
    let fd = OwnedFd::from(stream).into_raw_fd();
    // SAFETY: a connected stream socket, owned by nobody else from here on.
    unsafe { server.add_channel_from_fd(fd) };
    Ok(fd)
}

/// The same connection under a number that was not used for long: gRPC names it by
/// its number, and may still do so when it has ended.
pub fn renumbered(stream: UnixStream) -> UnixStream {
    static NEXT: AtomicI32 = AtomicI32::new(LOWEST);
    let from = LOWEST + NEXT.fetch_add(1, Ordering::Relaxed).rem_euclid(NUMBERS);
    match nix::fcntl::fcntl(&stream, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(from)) {
        // SAFETY: the kernel just returned this fd, and nothing else owns it.
        Ok(fd) => unsafe { UnixStream::from_raw_fd(fd) },
        // Its own number, when there are not so many.
        Err(_) => stream,
    }
}

/// Another fd for the socket that has this number now, to be looked at.
///
/// # Errors
/// `EBADF` when nothing has.
pub fn copy_of(number: i32) -> io::Result<UnixStream> {
    // SAFETY: integers only; fails when the number is not open.
    let fd = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, LOWEST) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this fd, and nothing else owns it.
    Ok(unsafe { UnixStream::from_raw_fd(fd) })
}

/// A gRPC channel over a connected socket; `target` becomes its authority.
///
/// # Errors
/// As setting the socket non-blocking.
pub fn channel_over(
    builder: ChannelBuilder,
    target: &str,
    stream: UnixStream,
) -> io::Result<Channel> {
    stream.set_nonblocking(true)?;
    let fd = OwnedFd::from(stream).into_raw_fd();
    // SAFETY: a connected stream socket, owned by nobody else from here on.
    Ok(unsafe { builder.connect_from_fd(target, fd) })
}

/// Most groups of a peer that are looked at.
const MAX_GROUPS: usize = 256;

/// Pid, uid and groups of the process that connected a Unix socket.
///
/// # Errors
/// As getsockopt(2).
pub fn peer_credentials(stream: &UnixStream) -> io::Result<(i32, u32, Vec<u32>)> {
    let cred =
        nix::sys::socket::getsockopt(&stream.as_fd(), nix::sys::socket::sockopt::PeerCredentials)?;
    let mut groups = vec![0; MAX_GROUPS];
    let mut size = std::mem::size_of_val(&groups[..]) as libc::socklen_t;
    // SAFETY: pointer and size describe `groups`, which outlives the call; the kernel
    // writes at most so much and says how much.
    let rc = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            groups.as_mut_ptr().cast(),
            &raw mut size,
        )
    };
    // Who is in too many groups to tell is in its first one only.
    groups.truncate(if rc == 0 { size as usize / std::mem::size_of::<u32>() } else { 0 });
    groups.push(cred.gid());
    Ok((cred.pid(), cred.uid(), groups))
}
