//! Where an agent is: the URL that goes over the wire, and the way there.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::seat::Way;
use super::{Error, Kind};
use crate::transport::{self, hybrid_vsock, serial, socket, vsock, AGENT_PORT};

/// The URL of no agent.
const NOOP: &str = "noop:";
/// Where a proxy listens, in its VM's directory.
pub const PROXY_SOCKET: &str = "proxy.sock";
/// In a VM's directory, where who carries its vsock makes sockets.
pub const VSOCK_DIR: &str = "vsock";
/// Where vsock in user space listens for the host's side, in its VM's directory.
pub const HYBRID_SOCKET: &str = "vsock/vsock.sock";

/// An agent's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// There is none.
    Noop,
    /// Our agent, on the serial ports of the VM whose directory this is.
    Serial(PathBuf),
    /// ttrpc, on the vsock of the guest with this CID.
    Vsock {
        /// The guest's address.
        cid: u32,
        /// The agent's port.
        port: u32,
    },
    /// ttrpc, on vsock that a process of the host carries.
    Hybrid {
        /// Where that process listens.
        socket: PathBuf,
        /// The agent's port.
        port: u32,
    },
    /// gRPC (Kata 1.x), on the vsock of the guest with this CID.
    Vsock1 {
        /// The guest's address.
        cid: u32,
        /// The agent's port.
        port: u32,
    },
    /// gRPC (Kata 1.x), through a proxy that listens there.
    Proxy(PathBuf),
    /// hyperstart, on the two serial ports of the VM whose directory this is.
    Hyperstart(PathBuf),
}

impl Address {
    /// Where the agent of a VM is.
    pub fn of(kind: Kind, dir: &Path, way: Way) -> Address {
        let port = AGENT_PORT;
        match (kind, way) {
            (Kind::Noop, _) => Address::Noop,
            (Kind::Kata, Way::Vsock(cid)) => Address::Vsock { cid, port },
            (Kind::Kata, Way::Serial) => Address::Serial(dir.to_path_buf()),
            (Kind::Kata, Way::HybridVsock) => {
                Address::Hybrid { socket: dir.join(HYBRID_SOCKET), port }
            }
            (Kind::Kata1, Way::Vsock(cid)) => Address::Vsock1 { cid, port },
            (Kind::Kata1, Way::Serial | Way::HybridVsock) => Address::Proxy(dir.join(PROXY_SOCKET)),
            (Kind::Hyperstart, _) => Address::Hyperstart(dir.to_path_buf()),
        }
    }

    /// Which agent is there.
    pub fn kind(&self) -> Kind {
        match self {
            Address::Noop => Kind::Noop,
            Address::Serial(_) | Address::Vsock { .. } | Address::Hybrid { .. } => Kind::Kata,
            Address::Vsock1 { .. } | Address::Proxy(_) => Kind::Kata1,
            Address::Hyperstart(_) => Kind::Hyperstart,
        }
    }

    /// Parses `noop:`, `serial://DIR`, `hyperstart://DIR` and, as Kata writes them,
    /// `vsock://CID:PORT`, `hvsock://SOCKET:PORT` and `unix://SOCKET`. `kind` tells
    /// which protocol is spoken on vsock.
    ///
    /// # Errors
    /// [`Error::Address`] for any other.
    pub fn parse(kind: Kind, url: &str) -> Result<Address, Error> {
        let bad =
            |why: &str| Error::Address { url: url.chars().take(200).collect(), why: why.into() };
        if url == NOOP {
            return Ok(Address::Noop);
        }
        if url.is_empty() {
            return Err(bad(
                "the server did not send one; a stock Kata server's VMs are for Kata's own client",
            ));
        }
        let (scheme, rest) = url.split_once("://").ok_or_else(|| bad("it has no scheme"))?;
        let absolute = |path: &str| match path.starts_with('/') {
            true => Ok(PathBuf::from(path)),
            false => Err(bad("its path is not absolute")),
        };
        match scheme {
            "vsock" => {
                let parts = rest
                    .split_once(':')
                    .and_then(|(c, p)| Some((c.parse().ok()?, p.parse().ok()?)));
                let (cid, port) =
                    parts.ok_or_else(|| bad("must be vsock://CID:PORT, both numbers"))?;
                Ok(match kind {
                    Kind::Kata1 => Address::Vsock1 { cid, port },
                    _ => Address::Vsock { cid, port },
                })
            }
            "hvsock" => {
                let parts =
                    rest.rsplit_once(':').and_then(|(s, p)| Some((s, p.parse::<u32>().ok()?)));
                let (socket, port) = parts.ok_or_else(|| bad("must be hvsock://SOCKET:PORT"))?;
                Ok(Address::Hybrid { socket: absolute(socket)?, port })
            }
            "unix" => absolute(rest).map(Address::Proxy),
            "serial" => absolute(rest).map(Address::Serial),
            "hyperstart" => absolute(rest).map(Address::Hyperstart),
            _ => Err(bad("only noop, serial, vsock, hvsock, unix and hyperstart are known")),
        }
    }

    /// Becomes what a server says, for the same agent; an empty URL says nothing.
    ///
    /// # Errors
    /// [`Error::Address`]; it is then what it was.
    pub fn told(&mut self, url: &str) -> Result<(), Error> {
        if !url.is_empty() {
            *self = Address::parse(self.kind(), url)?;
        }
        Ok(())
    }

    /// The CID of a guest with the kernel's vsock.
    pub fn cid(&self) -> Option<u32> {
        match self {
            Address::Vsock { cid, .. } | Address::Vsock1 { cid, .. } => Some(*cid),
            _ => None,
        }
    }

    /// Connects; the stream carries ttrpc or gRPC. `patience` is for one try,
    /// `within` for all of them.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub fn dial(&self, within: Duration, patience: Duration) -> Result<UnixStream, Error> {
        let stream = match self {
            Address::Noop | Address::Hyperstart(_) => {
                let why = "there is no one stream to it".into();
                return Err(Error::Address { url: self.to_string(), why });
            }
            Address::Serial(dir) => {
                serial::open(dir, within, patience).map_err(transport::Error::Serial)
            }
            Address::Vsock { cid, port } | Address::Vsock1 { cid, port } => {
                vsock::open(*cid, *port, within).map_err(transport::Error::Vsock)
            }
            Address::Hybrid { socket, port } => {
                hybrid_vsock::open(socket, *port, within).map_err(transport::Error::Hybrid)
            }
            Address::Proxy(path) => socket::open(path, within).map_err(transport::Error::Socket),
        };
        stream.map_err(|source| Error::Connect { source })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Noop => f.write_str(NOOP),
            Address::Serial(dir) => write!(f, "serial://{}", dir.display()),
            Address::Vsock { cid, port } | Address::Vsock1 { cid, port } => {
                write!(f, "vsock://{cid}:{port}")
            }
            Address::Hybrid { socket, port } => write!(f, "hvsock://{}:{port}", socket.display()),
            Address::Proxy(socket) => write!(f, "unix://{}", socket.display()),
            Address::Hyperstart(dir) => write!(f, "hyperstart://{}", dir.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back_and_nonsense_does_not() {
        for (kind, url) in [
            (Kind::Noop, "noop:"),
            (Kind::Kata, "serial:///run/vc/vm/x"),
            (Kind::Kata, "vsock://4252714826:1024"),
            (Kind::Kata, "hvsock:///run/vc/vm/x/vsock.sock:1024"),
            (Kind::Kata1, "vsock://3:1024"),
            (Kind::Kata1, "unix:///run/vc/vm/x/proxy.sock"),
            (Kind::Hyperstart, "hyperstart:///run/vc/vm/x"),
        ] {
            let address = Address::parse(kind, url).unwrap();
            assert_eq!((address.to_string().as_str(), address.kind()), (url, kind));
        }
        for url in [
            "",
            "serial://x",
            "vsock://",
            "vsock://3",
            "vsock://x:1",
            "hvsock://x:1",
            "hvsock:///x",
            "unix://x",
            "pigeon:///x",
            "/run/vc/vm/x/kata.sock",
        ] {
            assert!(Address::parse(Kind::Kata, url).is_err(), "{url}");
        }
        let there = Path::new("/v/x");
        assert_eq!(Address::of(Kind::Kata, there, Way::Vsock(7)).to_string(), "vsock://7:1024");
        assert_eq!(Address::of(Kind::Kata, there, Way::Serial).cid(), None);
    }
}
