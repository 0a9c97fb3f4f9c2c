//! Handing connected sockets to gRPC, and asking them who is behind.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};

use grpcio::{Channel, ChannelBuilder, Server};
use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg::F_DUPFD_CLOEXEC};
use nix::sys::socket::MsgFlags;

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

/// The same connection under another number: the next one in turn of this range that is free.
///
/// # Errors
/// As fcntl(2); `EMFILE` when none is free.
pub fn within(stream: UnixStream, range: &Range<i32>) -> io::Result<UnixStream> {
    static TURN: AtomicI32 = AtomicI32::new(0);
    let turn = TURN.fetch_add(1, Ordering::Relaxed).rem_euclid(range.len().max(1) as i32);
    for from in [range.start + turn, range.start] {
        // SAFETY: the kernel just returned this fd, and nothing else owns it.
        let copy = unsafe { UnixStream::from_raw_fd(fcntl(&stream, F_DUPFD_CLOEXEC(from))?) };
        if range.contains(&copy.as_raw_fd()) {
            return Ok(copy);
        }
    }
    Err(io::Error::from_raw_os_error(libc::EMFILE))
}

/// The same connection under this number; `None` when that is something else's now.
///
/// # Errors
/// As fcntl(2).
pub fn numbered(stream: &UnixStream, number: i32) -> io::Result<Option<UnixStream>> {
    // SAFETY: the kernel just returned this fd, and nothing else owns it.
    let copy = unsafe { UnixStream::from_raw_fd(fcntl(stream, F_DUPFD_CLOEXEC(number))?) };
    Ok(Some(copy).filter(|copy| copy.as_raw_fd() == number))
}

/// Most files that the kernel passes with one message (its `SCM_MAX_FD`).
const MAX_PASSED: usize = 253;
/// Words of control data that they take: a header, and an integer for each.
const CONTROL: usize = 2 + MAX_PASSED / 2 + 2;

/// Reads bytes, and the open files that came with them, all that there can be.
///
/// # Errors
/// As recvmsg(2).
pub fn receive_with_files(
    stream: &UnixStream,
    into: &mut [u8],
    how: MsgFlags,
) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut control = [0_u64; CONTROL];
    let mut bytes = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    // SAFETY: integers and null pointers, of which all bytes may be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&mut bytes, 1);
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = std::mem::size_of_val(&control);
    let how = how.bits() | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: both buffers are as large as they are said to be, and outlive the call.
    let n = Errno::result(unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, how) })?;
    let mut files = Vec::new();
    // SAFETY: the kernel has written the message; its headers are within `control`, aligned.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !header.is_null() {
        // SAFETY: as above.
        let (one, data) = unsafe { (*header, libc::CMSG_DATA(header).cast::<i32>()) };
        if (one.cmsg_level, one.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            let all = one.cmsg_len - (data as usize - header as usize);
            for at in 0..all / std::mem::size_of::<i32>() {
                // SAFETY: within the message, and opened for this process by the kernel just now.
                files.push(unsafe { OwnedFd::from_raw_fd(data.add(at).read_unaligned()) });
            }
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(&message, header) };
    }
    Ok((n as usize, files))
}

/// Closing this does not wait for what its peer has not taken, if it is a socket.
pub fn linger_no_more(file: &OwnedFd) {
    let off = libc::linger { l_onoff: 0, l_linger: 0 };
    // No socket has nothing of the kind.
    let _ = nix::sys::socket::setsockopt(file, nix::sys::socket::sockopt::Linger, &off);
}

/// `SO_PASSRIGHTS`, since Linux 6.16 (include/uapi/asm-generic/socket.h).
const SO_PASSRIGHTS: i32 = 83;

/// Has the kernel refuse open files that are passed to this socket, or to connections that it
/// accepts; a kernel without that is no error.
///
/// # Errors
/// As setsockopt(2).
pub fn refuse_files(socket: RawFd) -> io::Result<()> {
    let off = 0_i32;
    let length = std::mem::size_of_val(&off) as libc::socklen_t;
    let off = std::ptr::from_ref(&off).cast();
    // SAFETY: an integer of that size.
    match unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, SO_PASSRIGHTS, off, length) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
            e => Err(e),
        },
    }
}

/// Which socket has this number now, by its inode; `None` for no socket.
pub fn socket_of(number: i32) -> Option<u64> {
    let mut found = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: an integer, and room for what the kernel writes; it fails where nothing is open.
    if unsafe { libc::fstat(number, found.as_mut_ptr()) } < 0 {
        return None;
    }
    // SAFETY: the call succeeded, so the kernel has written all of it.
    let found = unsafe { found.assume_init() };
    (found.st_mode & libc::S_IFMT == libc::S_IFSOCK).then_some(found.st_ino)
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

/// Connects as another user and group, of whom the peer's credentials will tell. The calling
/// thread is that user's from here on, and has to end: its process's others stay what they are.
///
/// # Errors
/// As setresuid(2), which is root's to call, and connect(2).
pub fn connect_as(path: &Path, uid: u32, gid: u32) -> io::Result<UnixStream> {
    let unchanged = libc::uid_t::MAX;
    for (call, id) in [(libc::SYS_setresgid, gid), (libc::SYS_setresuid, uid)] {
        // SAFETY: integers only. The system call itself, and not the C library's function,
        // which would change all threads.
        if unsafe { libc::syscall(call, unchanged, id, unchanged) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    UnixStream::connect(path)
}
