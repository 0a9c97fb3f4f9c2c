//! An agent's place beside a VM: what it needs the VM to have, and what runs
//! on the host for it.
//!
//! Source: device names, socket names and directories of Kata 1.x and 2.x and
//! of its hyperstart agent.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Error, Outcome};

/// Largest AgentConfig taken from a server, in bytes.
pub const MAX_CONFIG: usize = 64 * 1024;

/// How an agent is to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By virtio serial ports.
    Serial,
    /// By kernel vsock, at this address.
    Vsock(u32),
    /// By vsock in user space: a Unix socket in the VM's directory.
    HybridVsock,
}

/// Where a VM will be.
#[derive(Clone, Debug)]
pub struct Seat {
    /// Its directory.
    pub dir: PathBuf,
    /// How its agent is to be reached.
    pub way: Way,
}

/// A device by which a guest hears its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channel {
    /// A serial port: its name in the guest, and QEMU's socket on the host.
    Port {
        /// By which the guest finds it.
        name: String,
        /// Where QEMU listens.
        socket: PathBuf,
    },
    /// A vsock device of the host's kernel.
    Vsock {
        /// The guest's address.
        cid: u32,
    },
    /// A vsock device of a process on the host.
    VhostUserVsock {
        /// Where that process listens for QEMU.
        socket: PathBuf,
    },
}

/// What can be plugged into a guest with this agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Disks, as roots of containers.
    pub block_devices: bool,
    /// Disks while the guest runs.
    pub block_device_hotplug: bool,
    /// CPUs and memory while the guest runs.
    pub resize: bool,
}

/// How a proxy is started.
#[derive(Clone, Debug)]
pub struct ProxyCommand {
    /// Its executable.
    pub program: PathBuf,
    /// What stands before its options: `proxy`, when the program is ours.
    pub subcommand: Option<&'static str>,
    /// The sandbox's id, for its log.
    pub sandbox: String,
    /// Whether it logs all it can.
    pub debug: bool,
    /// Whether the kernel ends it with the thread that starts it.
    pub leased: bool,
}

/// What a server says of its agents: an object with the names of Kata's fields.
/// Which there are depends on agent and version.
pub(super) fn config_object(config: &[u8]) -> Outcome<Value> {
    let wrong = |why: String| Err(Error::Config { why });
    if config.len() > MAX_CONFIG {
        return wrong(format!("{} bytes, over {MAX_CONFIG}", config.len()));
    }
    match serde_json::from_slice(config) {
        Ok(object @ Value::Object(_)) => Ok(object),
        Ok(other) => wrong(format!("is {other}, not an object")),
        Err(e) => wrong(e.to_string()),
    }
}

/// Makes the directory of a share.
pub(super) fn make_share(path: PathBuf) -> Outcome<PathBuf> {
    match DirBuilder::new().recursive(true).mode(0o750).create(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(Error::Host { during: "make a sandbox's shared directory", source }),
    }
}

/// Removes it. Not what is mounted below: removing files there would remove
/// them where they come from.
pub(super) fn remove_share(path: &Path) -> Outcome<()> {
    let failed = |source| Error::Host { during: "remove a sandbox's shared directory", source };
    let path = &match path.canonicalize() {
        Ok(real) => real,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    let table = fs::read_to_string("/proc/self/mounts").map_err(failed)?;
    let mounted =
        table.lines().filter_map(|l| l.split(' ').nth(1)).any(|m| Path::new(m).starts_with(path));
    if mounted {
        let text = format!("something is mounted below {}: unmount it first", path.display());
        return Err(failed(io::Error::other(text)));
    }
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_comes_and_goes() {
        let path = std::env::temp_dir().join(format!("vmcache-share-{}", std::process::id()));
        let made = make_share(path.join("a/shared")).unwrap();
        assert!(made.is_dir());
        remove_share(&path).unwrap();
        assert!(!path.exists());
        remove_share(&path).unwrap();
        let e = remove_share(Path::new("/proc")).unwrap_err();
        assert!(
            matches!(e, Error::Host { ref source, .. } if source.to_string().contains("mounted"))
        );
    }
}
