//! A network in user space: a process beside QEMU that speaks for the guest as an ordinary
//! program of this host does. QEMU itself has no network to speak on.
//!
//! QEMU's own network code (libslirp) runs in a QEMU without a machine, which sees a guest's
//! packets and nothing else of its VM; or passt does, where it is installed and asked for.
//! Packets go over a socket pair, in the form that QEMU's `-netdev socket` and `stream` share.
//!
//! Invariants: it runs in this process's network namespace, and as no user with rights; it is
//! an attendant of the VM and ends with it.
//!
//! Source: QEMU's docs/system/devices/net.rst, passt(1).

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::confine;
use crate::process::attendant::{Attendant, Role};
use crate::report::chain;
use crate::sys::cage::Cage;

/// Where passt is looked for.
const PASST: [&str; 2] = ["/usr/bin/passt", "/usr/local/bin/passt"];
/// The guest's address and the length of its network's prefix, its gateway, and its resolver:
/// QEMU's own, which passt is told.
pub const ADDRESSES: (&str, u8, &str, &str) = ("10.0.2.15", 24, "10.0.2.2", "10.0.2.3");

/// Who speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum By {
    /// QEMU's own code, in this program.
    Qemu(PathBuf),
    /// passt.
    Passt,
}

impl By {
    /// Whether it is there.
    ///
    /// # Errors
    /// A sentence with the remedy.
    pub fn check(&self) -> Result<PathBuf, String> {
        match self {
            By::Qemu(path) if path.is_file() => Ok(path.clone()),
            By::Qemu(path) => Err(format!(
                "{} is not there, whose network code it is: set path in [hypervisor.qemu]",
                path.display()
            )),
            By::Passt => PASST
                .into_iter()
                .map(PathBuf::from)
                .find(|p| p.is_file())
                .ok_or_else(|| format!("passt is none of {}: install it", PASST.join(", "))),
        }
    }

    /// Starts it for the VM in this directory; QEMU's end of the connection. `leased`, it ends
    /// with the calling thread.
    ///
    /// # Errors
    /// A sentence.
    pub fn start(&self, dir: &Path, leased: bool) -> Result<(OwnedFd, Attendant), String> {
        let program = self.check()?;
        let (qemus, theirs) = UnixStream::pair().map_err(|e| format!("make a socket: {e}"))?;
        let (args, cage) = match self {
            By::Qemu(_) => (
                qemu_args(theirs.as_raw_fd()),
                confine::user_network(&program, dir).map_err(|e| e.to_string())?,
            ),
            // It confines itself, and takes another user than root.
            By::Passt => (passt_args(theirs.as_raw_fd()), Cage::default()),
        };
        let inherited = [theirs.as_fd()];
        let started = Attendant::start(Role::Network, &program, &args, &inherited, leased, cage);
        Ok((qemus.into(), started.map_err(|e| chain(&e))?))
    }
}

fn words(text: &str) -> Vec<OsString> {
    text.split_whitespace().map(OsString::from).collect()
}

fn qemu_args(fd: i32) -> Vec<OsString> {
    words(&format!(
        "-machine none -nodefaults -no-user-config -nographic -monitor none -serial none \
         -netdev user,id=user -netdev socket,fd={fd},id=vm \
         -netdev hubport,hubid=0,netdev=user,id=port0 -netdev hubport,hubid=0,netdev=vm,id=port1 \
         -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    ))
}

fn passt_args(fd: i32) -> Vec<OsString> {
    let (address, prefix, gateway, resolver) = ADDRESSES;
    words(&format!(
        "--fd {fd} --foreground --quiet --ipv4-only --no-map-gw --no-dhcp \
         --address {address} --netmask {prefix} --gateway {gateway} --dns-forward {resolver}"
    ))
}
