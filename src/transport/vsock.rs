//! The host's end of a guest's vsock: an address of its own for each guest, and
//! any number of connections to its ports.
//!
//! Invariants: an address is reserved in the host's kernel before QEMU is
//! started, and the reservation is what QEMU is given, so no two guests ever
//! race for one; it goes when QEMU does.
//!
//! Does not: hide a guest's port from other users of the host, which the kernel
//! can not do.

use std::error;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crossbeam_channel::after;
use nix::errno::Errno;

use crate::sys::process::random;
use crate::sys::vsock;

/// The kernel's device for guests with vsock.
pub const DEVICE: &str = "/dev/vhost-vsock";
/// Addresses tried until one is free. There are four billion.
const TRIES: usize = 16;
/// The first address that may be a guest's; those below have meanings.
const FIRST: u32 = 3;
/// Pause between tries to reach a guest that may be booting.
const RETRY: Duration = Duration::from_millis(20);
/// Longest wait of the first try, doubled with each: a request that came before the
/// guest's driver is lost, and a slow guest needs longer than a quick one.
const TRY: Duration = Duration::from_millis(500);

/// Why there is no connection, or no address.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// This host can give no guest an address.
    Device { source: io::Error },
    /// Nobody answered.
    Silent { cid: u32, port: u32, after: Duration, source: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Device { .. } => write!(
                f,
                "reserve a vsock address through {DEVICE}: load the module vhost_vsock, or set \
                 transport = \"serial\""
            ),
            Error::Silent { cid, port, after, .. } => write!(
                f,
                "no agent answered on vsock {cid}:{port} within {:.1} s; a guest without vsock \
                 needs transport = \"serial\"",
                after.as_secs_f64()
            ),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Device { source } | Error::Silent { source, .. } => Some(source),
        }
    }
}

/// A guest's address, and the file that reserves it.
///
/// # Errors
/// [`Error::Device`].
pub fn reserve() -> Result<(u32, File), Error> {
    let failed = |source| Error::Device { source };
    let mut last = None;
    for _ in 0..TRIES {
        let mut bytes = [0; 4];
        random(&mut bytes).map_err(failed)?;
        // Not the last: that is "any".
        let cid = u32::from_ne_bytes(bytes).clamp(FIRST, u32::MAX - 1);
        match vsock::reserve(Path::new(DEVICE), cid) {
            Ok(file) => return Ok((cid, file)),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => last = Some(e),
            Err(e) => return Err(failed(e)),
        }
    }
    Err(failed(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into())))
}

/// Connects to a guest's port, trying until `within` is over: a guest that boots
/// has no driver at first, and then nobody who listens.
///
/// # Errors
/// [`Error::Silent`] with what the last try said.
pub fn open(cid: u32, port: u32, within: Duration) -> Result<UnixStream, Error> {
    let deadline = Instant::now() + within;
    let mut patience = TRY;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let tried = vsock::connect(cid, port, left.min(patience).max(RETRY));
        patience = patience.saturating_mul(2);
        match tried {
            // A socket of another family, used for what all of them can do.
            Ok(socket) => return Ok(UnixStream::from(socket)),
            Err(source) if Instant::now() >= deadline || !passing(&source) => {
                return Err(Error::Silent { cid, port, after: within, source });
            }
            Err(_) => {
                let _ = after(RETRY).recv();
            }
        }
    }
}

/// Whether another try may do better. Not when there is no such guest: its address
/// is reserved before its QEMU is started, and goes with it.
fn passing(e: &io::Error) -> bool {
    let passing = [Errno::ETIMEDOUT, Errno::ECONNRESET, Errno::EINTR];
    e.raw_os_error().is_some_and(|n| passing.contains(&Errno::from_raw(n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a host without vsock, as on one without that guest.
    #[test]
    fn nobody_at_an_address_is_an_error_in_time() {
        let start = Instant::now();
        let e = open(u32::MAX - 7, 1024, Duration::from_millis(100)).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(e.to_string().contains("vsock 4294967288:1024"), "{e}");
        assert!(error::Error::source(&e).is_some());
    }

    #[test]
    fn addresses_are_reserved_or_the_remedy_is_told() {
        match (Path::new(DEVICE).exists(), reserve()) {
            (true, Ok((cid, _file))) => assert!(cid >= FIRST && cid != u32::MAX),
            (false, Err(e)) => assert!(e.to_string().contains("vhost_vsock"), "{e}"),
            (there, other) => panic!("there {there}, reserve {other:?}"),
        }
    }
}
