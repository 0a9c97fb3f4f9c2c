//! vsock from the host's side: a guest's address reserved, a connection made.
//!
//! Source: Linux's vhost.h (VHOST_VSOCK_SET_GUEST_CID) and vsock(7).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{getsockopt, sockopt};

nix::ioctl_write_ptr!(
    /// `VHOST_VSOCK_SET_GUEST_CID`.
    set_guest_cid,
    0xaf,
    0x60,
    u64
);

/// Reserves a guest's address for whoever holds the file, QEMU in the end.
///
/// # Errors
/// `EADDRINUSE` when another guest has it, and those of open(2) on `device`.
pub fn reserve(device: &Path, cid: u32) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(device)?;
    let cid = u64::from(cid);
    // SAFETY: the kernel reads one u64 through the pointer.
    unsafe { set_guest_cid(file.as_raw_fd(), &raw const cid) }?;
    Ok(file)
}

/// Connects to a guest's port; the stream blocks.
///
/// # Errors
/// `ETIMEDOUT` after `within`, `ECONNRESET` when nobody listens there, `ENODEV`
/// when there is no such guest.
pub fn connect(cid: u32, port: u32, within: Duration) -> io::Result<OwnedFd> {
    // SAFETY: socket(2) with integers; the new fd is owned by nobody else.
    let socket = unsafe {
        let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let fd = libc::socket(libc::AF_VSOCK, flags, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: an all-zero sockaddr_vm is a valid value of a plain C struct.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    let size = std::mem::size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let pointer = (&raw const address).cast::<libc::sockaddr>();
    // SAFETY: the pointer and size describe `address`, which outlives the call.
    if unsafe { libc::connect(socket.as_raw_fd(), pointer, size) } < 0 {
        let e = io::Error::last_os_error();
        if e.raw_os_error() != Some(libc::EINPROGRESS) {
            return Err(e);
        }
        await_connected(socket.as_fd(), within)?;
    }
    std::os::unix::net::UnixStream::from(socket.try_clone()?).set_nonblocking(false)?;
    Ok(socket)
}

fn await_connected(socket: BorrowedFd<'_>, within: Duration) -> io::Result<()> {
    let timeout = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(socket, PollFlags::POLLOUT)], timeout)? {
        0 => Err(Errno::ETIMEDOUT.into()),
        _ => match getsockopt(&socket, sockopt::SocketError)? {
            0 => Ok(()),
            e => Err(io::Error::from_raw_os_error(e)),
        },
    }
}
