//! Taps: network interfaces whose other side is a file descriptor.
//!
//! Source: Linux's Documentation/networking/tuntap.rst.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{self, c_int, c_short};
use nix::net::if_::if_nametoindex;

nix::ioctl_write_ptr_bad!(
    /// `TUNSETIFF`.
    tun_set_interface,
    libc::TUNSETIFF,
    libc::ifreq
);

/// Opens the tap of this name, in the calling thread's network namespace, for
/// packets with virtio's header.
///
/// # Errors
/// `ENODEV` when there is no such interface (none is made), `EINVAL` when it is
/// no tap, `EBUSY` when another process has it, and those of open(2).
pub fn open(name: &str) -> io::Result<OwnedFd> {
    if_nametoindex(name)?;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    match attach(&file, name, flags) {
        // Made for several queues, of which one will do.
        Err(Errno::EINVAL) => attach(&file, name, flags | libc::IFF_MULTI_QUEUE)?,
        other => other?,
    }
    Ok(file.into())
}

fn attach(file: &impl AsRawFd, name: &str, flags: c_int) -> Result<(), Errno> {
    // SAFETY: an ifreq is plain bytes, of which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    if name.len() > room {
        return Err(Errno::ENODEV);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the request is initialised, and outlives the call.
    unsafe { tun_set_interface(file.as_raw_fd(), &request) }.map(|_| ())
}
