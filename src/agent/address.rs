//! Where an agent is: the URL that goes over the wire, and the way there.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::Error;
use crate::transport::serial;

/// An agent's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Our agent, on the serial ports of the VM whose directory this is.
    Serial(PathBuf),
}

impl Address {
    /// Parses `serial:///run/vc/vm/ID`.
    ///
    /// # Errors
    /// [`Error::Address`] for any other.
    pub fn parse(url: &str) -> Result<Address, Error> {
        let bad =
            |why: &str| Error::Address { url: url.chars().take(200).collect(), why: why.into() };
        match url.strip_prefix("serial://") {
            Some(dir) if dir.starts_with('/') => Ok(Address::Serial(dir.into())),
            Some(_) => Err(bad("its path is not absolute")),
            None if url.is_empty() => Err(bad(
                "the server did not send one; a stock Kata server's VMs are for Kata's own client",
            )),
            None => Err(bad("only serial:// is known to this version")),
        }
    }

    /// Connects; the stream carries ttrpc. `patience` is for one try, `within`
    /// for all of them.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn connect(&self, within: Duration, patience: Duration) -> Result<UnixStream, Error> {
        match self {
            Address::Serial(dir) => {
                serial::open(dir, within, patience).map_err(|source| Error::Connect { source })
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Serial(dir) => write!(f, "serial://{}", dir.display()),
        }
    }
}
