//! Where an agent is: the URL that goes over the wire, and the way there.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Error, Kind};
use crate::transport::{self, serial, vsock, AGENT_PORT};

/// The URL of no agent.
const NOOP: &str = "noop:";

/// An agent's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// There is none.
    Noop,
    /// Our agent, on the serial ports of the VM whose directory this is.
    Serial(PathBuf),
    /// Any agent, on the vsock of the guest with this CID.
    Vsock {
        /// The guest's address.
        cid: u32,
        /// The agent's port.
        port: u32,
    },
}

impl Address {
    /// Where the agent of a VM is: on vsock when it has a CID.
    pub fn of(kind: Kind, dir: &Path, cid: Option<u32>) -> Address {
        match (kind, cid) {
            (Kind::Noop, _) => Address::Noop,
            (Kind::Kata, Some(cid)) => Address::Vsock { cid, port: AGENT_PORT },
            (Kind::Kata, None) => Address::Serial(dir.to_path_buf()),
        }
    }

    /// Parses `noop:`, `serial:///run/vc/vm/ID` and, as Kata writes it,
    /// `vsock://CID:PORT`.
    ///
    /// # Errors
    /// [`Error::Address`] for any other.
    pub fn parse(url: &str) -> Result<Address, Error> {
        let bad =
            |why: &str| Error::Address { url: url.chars().take(200).collect(), why: why.into() };
        if url == NOOP {
            return Ok(Address::Noop);
        }
        if let Some(rest) = url.strip_prefix("vsock://") {
            let parts =
                rest.split_once(':').and_then(|(c, p)| Some((c.parse().ok()?, p.parse().ok()?)));
            let (cid, port) = parts.ok_or_else(|| bad("must be vsock://CID:PORT, both numbers"))?;
            return Ok(Address::Vsock { cid, port });
        }
        match url.strip_prefix("serial://") {
            Some(dir) if dir.starts_with('/') => Ok(Address::Serial(dir.into())),
            Some(_) => Err(bad("its path is not absolute")),
            None if url.is_empty() => Err(bad(
                "the server did not send one; a stock Kata server's VMs are for Kata's own client",
            )),
            None => Err(bad("only serial:// and vsock:// are known to this version")),
        }
    }

    /// The CID of a guest with vsock.
    pub fn cid(&self) -> Option<u32> {
        match self {
            Address::Noop | Address::Serial(_) => None,
            Address::Vsock { cid, .. } => Some(*cid),
        }
    }

    /// Connects; the stream carries ttrpc. `patience` is for one try, `within`
    /// for all of them.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn connect(&self, within: Duration, patience: Duration) -> Result<UnixStream, Error> {
        let stream = match self {
            Address::Noop => {
                return Err(Error::Address { url: NOOP.into(), why: "nobody is there".into() })
            }
            Address::Serial(dir) => {
                serial::open(dir, within, patience).map_err(transport::Error::Serial)
            }
            Address::Vsock { cid, port } => {
                vsock::open(*cid, *port, within).map_err(transport::Error::Vsock)
            }
        };
        stream.map_err(|source| Error::Connect { source })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Noop => f.write_str(NOOP),
            Address::Serial(dir) => write!(f, "serial://{}", dir.display()),
            Address::Vsock { cid, port } => write!(f, "vsock://{cid}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back_and_nonsense_does_not() {
        for url in ["noop:", "serial:///run/vc/vm/x", "vsock://4252714826:1024"] {
            assert_eq!(Address::parse(url).unwrap().to_string(), url);
        }
        for url in ["", "serial://x", "vsock://", "vsock://3", "vsock://x:1", "hvsock:///x:1"] {
            assert!(Address::parse(url).is_err(), "{url}");
        }
        let there = Path::new("/v/x");
        assert_eq!(Address::of(Kind::Kata, there, Some(7)).to_string(), "vsock://7:1024");
        assert_eq!(Address::of(Kind::Kata, there, None).cid(), None);
    }
}
