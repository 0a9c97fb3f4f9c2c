//! Ways from the host to a guest's agent: bytes in order, both ways.
//!
//! Does not know what the bytes mean; that is `agent`.

/// The vsock port on which Kata's agents, and ours, listen.
pub const AGENT_PORT: u32 = 1024;

/// The feature by which our agent is told from Kata's.
pub const OWN_AGENT: &str = "vmcache";

pub mod frame;
#[cfg(feature = "host")]
pub mod hybrid_vsock;
#[cfg(feature = "host")]
pub mod proxy;
#[cfg(feature = "host")]
pub mod serial;
#[cfg(feature = "host")]
pub mod socket;
#[cfg(feature = "host")]
pub mod vsock;
#[cfg(feature = "host")]
pub mod yamux;

/// Why there is no connection.
#[cfg(feature = "host")]
#[derive(Debug)]
pub enum Error {
    /// Over a serial port.
    Serial(serial::Error),
    /// Over vsock.
    Vsock(vsock::Error),
    /// Over vsock in user space.
    Hybrid(hybrid_vsock::Error),
    /// A socket of a process on the host.
    Socket(socket::Error),
    /// The guest's end said nothing, or nothing that makes sense.
    Guest {
        /// What it was to say.
        what: String,
    },
}

#[cfg(feature = "host")]
impl Error {
    /// Whether the guest, or its QEMU, is what fails, and not this host.
    pub fn is_guests(&self) -> bool {
        match self {
            Error::Serial(e) => e.is_guests(),
            Error::Vsock(e) => matches!(e, vsock::Error::Silent { .. }),
            Error::Hybrid(e) => matches!(e, hybrid_vsock::Error::Silent { .. }),
            Error::Socket(_) => false,
            Error::Guest { .. } => true,
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
            Error::Hybrid(e) => e.fmt(f),
            Error::Socket(e) => e.fmt(f),
            Error::Guest { what } => f.write_str(what),
        }
    }
}

#[cfg(feature = "host")]
impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Serial(e) => e.source(),
            Error::Vsock(e) => e.source(),
            Error::Hybrid(e) => e.source(),
            Error::Socket(e) => e.source(),
            Error::Guest { .. } => None,
        }
    }
}
