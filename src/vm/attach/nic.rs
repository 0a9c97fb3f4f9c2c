//! Network cards: a tap of the host, or a network in user space.
//!
//! Invariants: a tap is never made, only opened; it may live in another network
//! namespace, which is entered by a thread that then ends.

use std::error;
use std::fmt;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{setns, CloneFlags};

use super::user_net::{By, ADDRESSES};
use super::Error;
use crate::sys::process::random;
use crate::sys::tap;
use crate::trusted_path::TrustedPath;
use crate::worker::Worker;

/// Whose network code it is where nothing else is said.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// Until a tap must be open.
const OPENING: Duration = Duration::from_secs(10);

/// What a network card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Side {
    User(By),
    Tap { name: String, netns: Option<PathBuf> },
}

/// A network card that a VM shall have, and what it is in the guest:
/// `user[,by=qemu|passt]`, or `tap=NAME[,netns=FILE][,ip=ADDRESS/LENGTH…][,gateway=ADDRESS]`
/// `[,dns=ADDRESS…][,mac=MAC][,mtu=BYTES]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    side: Side,
    /// Hardware address; one by chance where there is none.
    pub mac: Option<String>,
    /// Addresses of the guest, each with the length of its network's prefix.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Where the guest sends what is for no network of its own.
    pub gateway: Option<IpAddr>,
    /// Resolvers.
    pub dns: Vec<IpAddr>,
    /// Largest packet, in bytes.
    pub mtu: Option<u16>,
}

impl Network {
    /// A network in user space: the guest reaches what an ordinary program here reaches, by
    /// QEMU's code this host's own services included, and nobody reaches it.
    pub fn user(by: By) -> Network {
        let (address, prefix, gateway, dns) = ADDRESSES;
        let ip = |text: &str| text.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        Network {
            addresses: vec![(ip(address), prefix)],
            gateway: Some(ip(gateway)),
            dns: vec![ip(dns)],
            ..Network::with(Side::User(by))
        }
    }

    /// The same, by this QEMU's code where it is by QEMU's.
    pub fn with_qemu(mut self, program: PathBuf) -> Network {
        if let Side::User(By::Qemu(path)) = &mut self.side {
            *path = program;
        }
        self
    }

    /// The tap of this name, which exists, in the network namespace of this
    /// file (such as /run/netns/NAME) or in this process's.
    pub fn tap(name: impl Into<String>, netns: Option<PathBuf>) -> Network {
        Network::with(Side::Tap { name: name.into(), netns })
    }

    fn with(side: Side) -> Network {
        Network { side, mac: None, addresses: vec![], gateway: None, dns: vec![], mtu: None }
    }

    /// Opens what it is connected to.
    ///
    /// # Errors
    /// [`Error::Tap`] and [`Error::Host`].
    pub fn open(&self) -> Result<Nic, Error> {
        let mac = match &self.mac {
            Some(mac) => mac.clone(),
            None => random_mac()?,
        };
        let other_side = match &self.side {
            Side::User(by) => {
                by.check().map_err(|why| Error::UserNetwork { why })?;
                OtherSide::User(by.clone())
            }
            Side::Tap { name, netns } => OtherSide::Tap(open_tap(name, netns.as_deref())?),
        };
        Ok(Nic { other_side, mac, wanted: self.clone() })
    }
}

/// To what a card is connected.
#[derive(Debug)]
pub enum OtherSide {
    /// A tap, open.
    Tap(OwnedFd),
    /// A process that will be started; its program is there.
    User(By),
}

/// A network card whose other side can be had.
#[derive(Debug)]
pub struct Nic {
    other_side: OtherSide,
    mac: String,
    wanted: Network,
}

impl Nic {
    /// Its hardware address, lower case with colons.
    pub fn mac(&self) -> &str {
        &self.mac
    }

    /// What it shall be in the guest.
    pub fn wanted(&self) -> &Network {
        &self.wanted
    }

    /// To what QEMU shall connect it.
    pub fn other_side(&self) -> &OtherSide {
        &self.other_side
    }
}

/// Of nobody's making, and no group's.
fn random_mac() -> Result<String, Error> {
    let mut b = [0; 6];
    random(&mut b).map_err(|source| Error::Host { during: "take random bytes", source })?;
    b[0] = b[0] & 0xfc | 0x02;
    Ok(b.map(|x| format!("{x:02x}")).join(":"))
}

/// The file of a network namespace. Those of processes are the kernel's: whose the process is,
/// its pid says to whoever names it.
fn namespace(path: &Path) -> io::Result<File> {
    let parts: Vec<&str> = path.to_str().unwrap_or_default().split('/').collect();
    match parts[..] {
        ["", "proc", pid, "ns", "net"] if pid == "self" || pid.parse::<u32>().is_ok() => {
            File::open(path)
        }
        _ => TrustedPath::file(path)?.open(),
    }
}

fn open_tap(name: &str, netns: Option<&Path>) -> Result<OwnedFd, Error> {
    let error = |what: &str, source| Error::Tap {
        name: name.into(),
        netns: netns.map(Path::to_path_buf),
        what: what.into(),
        source,
    };
    let opened = match netns {
        None => tap::open(name),
        Some(path) => {
            let space = namespace(path).map_err(|e| error("open the namespace", Some(e)))?;
            let name = name.to_string();
            // Its namespace is the thread's own, and goes with it.
            let thread = Worker::spawn("vmc-netns", move || {
                setns(space, CloneFlags::CLONE_NEWNET).map(|()| tap::open(&name))
            });
            let joined = thread.and_then(|t| t.join(OPENING));
            let entered = joined.map_err(|e| error(&e.to_string(), None))?;
            entered.map_err(|e| {
                let what = match e {
                    Errno::EINVAL => "the file is no network namespace",
                    Errno::EPERM => "entering the namespace takes CAP_SYS_ADMIN",
                    _ => "enter the namespace",
                };
                error(what, Some(e.into()))
            })?
        }
    };
    opened.map_err(|e| {
        let what = match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENODEV) => "there is none: make it, `ip tuntap add mode tap NAME`",
            Some(Errno::EBUSY) => "another process has it, such as another VM's QEMU",
            Some(Errno::EINVAL) => "this interface is no tap",
            Some(Errno::EPERM) => {
                "not this user's: make it with `ip tuntap add mode tap user USER NAME`, or run \
                 with CAP_NET_ADMIN"
            }
            Some(Errno::ENOENT) => "there is no /dev/net/tun: load the kernel's module tun",
            _ => "open it through /dev/net/tun",
        };
        error(what, Some(e))
    })
}

/// Why a network is not understood.
#[derive(Debug, PartialEq, Eq)]
pub struct Misread(String);

impl fmt::Display for Misread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl error::Error for Misread {}

impl FromStr for Network {
    type Err = Misread;

    fn from_str(text: &str) -> Result<Network, Misread> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let rest: Vec<_> = parts.collect();
        if first == "user" {
            return match rest[..] {
                [] | ["by=qemu"] => Ok(Network::user(By::Qemu(QEMU.into()))),
                ["by=passt"] => Ok(Network::user(By::Passt)),
                _ => Err(Misread(
                    "user takes by=qemu or by=passt, and nothing else: its addresses are given"
                        .into(),
                )),
            };
        }
        let name = first.strip_prefix("tap=").filter(|n| !n.is_empty()).ok_or_else(|| {
            Misread("must be `user`, or `tap=NAME` and its options, with commas between".into())
        })?;
        let mut network = Network::tap(name, None);
        for option in rest {
            network.set(option)?;
        }
        Ok(network)
    }
}

impl Network {
    fn set(&mut self, option: &str) -> Result<(), Misread> {
        let bad = |what: &str| Misread(format!("{option}: {what}"));
        let (key, value) = option.split_once('=').ok_or_else(|| bad("must be KEY=VALUE"))?;
        let address = || value.parse().map_err(|_| bad("no IP address"));
        match key {
            "netns" => {
                if let Side::Tap { netns, .. } = &mut self.side {
                    *netns = Some(value.into());
                }
            }
            "ip" => {
                let (ip, length) = value
                    .split_once('/')
                    .ok_or_else(|| bad("must be ADDRESS/LENGTH, such as 192.0.2.10/24"))?;
                let ip: IpAddr = ip.parse().map_err(|_| bad("no IP address"))?;
                let most = if ip.is_ipv4() { 32 } else { 128 };
                let length = length.parse().ok().filter(|n| *n <= most);
                self.addresses.push((ip, length.ok_or_else(|| bad("no length of a prefix"))?));
            }
            "gateway" => self.gateway = Some(address()?),
            "dns" => self.dns.push(address()?),
            "mac" => {
                let bytes: Vec<_> = value.split(':').collect();
                let hex = |b: &&str| b.len() == 2 && b.bytes().all(|c| c.is_ascii_hexdigit());
                if bytes.len() != 6 || !bytes.iter().all(hex) {
                    return Err(bad("must be six bytes, such as 02:00:00:00:00:01"));
                }
                if u8::from_str_radix(bytes[0], 16).is_ok_and(|b| b & 1 == 1) {
                    return Err(bad("a group's address, not a card's"));
                }
                self.mac = Some(value.to_lowercase());
            }
            "mtu" => {
                let mtu = value.parse().ok().filter(|n| *n >= 68);
                self.mtu = Some(mtu.ok_or_else(|| bad("must be 68 to 65535"))?);
            }
            _ => return Err(bad("not known; there are netns, ip, gateway, dns, mac, mtu")),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_read() {
        let n: Network = "tap=t0,netns=/run/netns/a,ip=192.0.2.10/24,ip=2001:db8::1/64,\
                          gateway=192.0.2.1,dns=192.0.2.2,mac=02:AB:00:00:00:01,mtu=1400"
            .parse()
            .unwrap();
        let netns = Some("/run/netns/a".into());
        assert_eq!(n.side, Side::Tap { name: "t0".into(), netns });
        assert_eq!((n.addresses.len(), n.addresses[1].1, n.mtu), (2, 64, Some(1400)));
        assert_eq!(n.mac.as_deref(), Some("02:ab:00:00:00:01"));
        let qemus = |path: &str| Network::user(By::Qemu(path.into()));
        assert_eq!("user".parse::<Network>().unwrap().with_qemu("/q".into()), qemus("/q"));
        assert_eq!("user,by=passt".parse(), Ok(Network::user(By::Passt)));
        let e = qemus("/nonexistent/qemu").open().unwrap_err().to_string();
        assert!(e.contains("/nonexistent/qemu is not there"), "{e}");
        for (text, words) in [
            ("", "must be `user`"),
            ("tap=", "must be `user`"),
            ("user,ip=10.0.0.1/8", "takes by=qemu or by=passt"),
            ("tap=t,ip=192.0.2.10", "ADDRESS/LENGTH"),
            ("tap=t,ip=192.0.2.10/33", "no length"),
            ("tap=t,gateway=here", "no IP address"),
            ("tap=t,mac=01:00:00:00:00:01", "a group's"),
            ("tap=t,mac=02:00:00:00:00:+1", "six bytes"),
            ("tap=t,mtu=10", "68 to 65535"),
            ("tap=t,speed=1", "not known"),
        ] {
            let e = text.parse::<Network>().unwrap_err().to_string();
            assert!(e.contains(words), "{text}: {e}");
        }
    }

    #[test]
    fn a_random_address_is_a_cards_own() {
        for _ in 0..64 {
            let mac = random_mac().unwrap();
            assert_eq!(u8::from_str_radix(&mac[..2], 16).unwrap() & 3, 2, "{mac}");
        }
    }

    #[test]
    fn a_missing_tap_is_told_and_never_made() {
        let e = Network::tap("vmc-none0", None).open().unwrap_err().to_string();
        assert!(e.contains("tap vmc-none0: there is none"), "{e}");
        assert_eq!(nix::net::if_::if_nametoindex("vmc-none0"), Err(Errno::ENODEV));
        let e = Network::tap("t", Some("/nonexistent".into())).open().unwrap_err().to_string();
        assert!(e.contains("network namespace /nonexistent: open the namespace"), "{e}");
    }
}
