//! Ways from the host to a guest's agent: bytes in order, both ways.
//!
//! Does not know what the bytes mean; that is `agent`.

/// The vsock port on which Kata's agents, and ours, listen.
pub const AGENT_PORT: u32 = 1024;

pub mod frame;
#[cfg(feature = "host")]
pub mod serial;
#[cfg(feature = "host")]
pub mod vsock;

/// Why there is no connection.
#[cfg(feature = "host")]
#[derive(Debug)]
pub enum Error {
    /// Over a serial port.
    Serial(serial::Error),
    /// Over vsock.
    Vsock(vsock::Error),
}

#[cfg(feature = "host")]
impl Error {
    /// Whether the guest, or its QEMU, is what fails, and not this host.
    pub fn is_guests(&self) -> bool {
        match self {
            Error::Serial(e) => e.is_guests(),
            Error::Vsock(e) => matches!(e, vsock::Error::Silent { .. }),
        }
    }
}

// Their own texts say it all.
#[cfg(feature = "host")]
impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Serial(e) => e.fmt(f),
            Error::Vsock(e) => e.fmt(f),
        }
    }
}

#[cfg(feature = "host")]
impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Serial(e) => e.source(),
            Error::Vsock(e) => e.source(),
        }
    }
}
