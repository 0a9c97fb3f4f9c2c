//! What only PID 1 of a guest asks of its kernel: entropy credit, signals of
//! the serial ports, vsock listeners.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// From <linux/random.h>: _IOW('R', 3, int[2]) and _IO('R', 7).
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Most seed bytes taken in one call.
pub const MAX_SEED: usize = 4096;

/// Mixes `seed` into the kernel's pool and credits eight bits for each byte.
///
/// # Errors
/// As the ioctl; `EINVAL` for more than [`MAX_SEED`] bytes.
pub fn add_entropy(random: BorrowedFd<'_>, seed: &[u8]) -> io::Result<()> {
    if seed.len() > MAX_SEED {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // struct rand_pool_info: int entropy_count; int buf_size; __u32 buf[].
    let mut info = Vec::with_capacity(8 + seed.len());
    info.extend_from_slice(&((seed.len() * 8) as i32).to_ne_bytes());
    info.extend_from_slice(&(seed.len() as i32).to_ne_bytes());
    info.extend_from_slice(seed);
    // SAFETY: the kernel reads buf_size bytes behind the two integers, and
    // `info` holds exactly that many.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, info.as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes the kernel's generator take a new key from its pool now.
///
/// # Errors
/// `ENODATA` while the generator is not yet initialised.
pub fn reseed_crng(random: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: RNDRESEEDCRNG takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Asks for SIGIO, to this process, when the host opens or closes a virtio
/// serial port.
///
/// # Errors
/// As fcntl(2).
pub fn want_sigio(port: BorrowedFd<'_>) -> io::Result<()> {
    let fd = port.as_raw_fd();
    // SAFETY: fcntl with integer arguments only.
    unsafe {
        if libc::fcntl(fd, libc::F_SETOWN, libc::getpid()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_ASYNC) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Listens on a vsock port of this guest, for any peer.
///
/// # Errors
/// `EAFNOSUPPORT` or `ENODEV` when this guest has no vsock.
pub fn vsock_listener(port: u32) -> io::Result<OwnedFd> {
    // /dev/vsock tells whether a transport is there: bind alone succeeds without.
    let device = std::fs::File::open("/dev/vsock")?;
    let mut cid: u32 = 0;
    // IOCTL_VM_SOCKETS_GET_LOCAL_CID is _IO(7, 0xb9).
    // SAFETY: the kernel writes one u32 through the pointer.
    if unsafe { libc::ioctl(device.as_raw_fd(), 0x07b9 as _, &mut cid) } < 0 {
        return Err(io::Error::last_os_error());
    }
    if cid <= libc::VMADDR_CID_HOST || cid == libc::VMADDR_CID_ANY {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    // SAFETY: socket(2) with integers; the new fd is owned by nobody else.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: an all-zero sockaddr_vm is a valid value of a plain C struct.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = libc::VMADDR_CID_ANY;
    let size = std::mem::size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the pointer and size describe `address`, which outlives the call.
    unsafe {
        let pointer = (&raw const address).cast::<libc::sockaddr>();
        if libc::bind(socket.as_raw_fd(), pointer, size) < 0
            || libc::listen(socket.as_raw_fd(), 16) < 0
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(socket)
}

/// Adjusts the OOM killer's liking for the calling process.
///
/// # Errors
/// As writing the file.
pub fn set_oom_score(adjust: i64) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", adjust.to_string())
}
