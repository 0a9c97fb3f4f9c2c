//! Disks and network cards that a running VM gets, over QMP.
//!
//! Invariants: files come as open descriptors, so that QEMU needs no right to a
//! path, and what was looked at is what is used; QEMU's own locks tell of a disk
//! that another VM writes. Whatever fails half way leaves a VM that its owner
//! must destroy.
//!
//! Does not: wait for the guest; its agent does, which is told the PCI path.
//!
//! Source: QEMU's qapi/block-core.json, net.json and misc.json; PCI paths as
//! Kata writes them: the bridge's slot and the device's on it, `02/01`.

use std::collections::HashSet;
use std::error;
use std::fmt;
use std::os::fd::BorrowedFd;

use serde_json::{json, Value};

use super::qmp::{self, Qmp, QUICK};

/// Slots of one bridge; its first is its own.
const SLOTS: std::ops::Range<u64> = 1..32;

/// Why a device did not come.
#[derive(Debug)]
pub enum Error {
    /// QEMU refused or did not answer.
    Monitor(qmp::Error),
    /// The machine has no place to put it.
    NoPlace,
    /// Another VM has the disk, and one of both writes.
    InUse,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Error::Monitor(_) => "add a device to a running VM",
            Error::NoPlace => {
                "the VM's machine has no free place on a PCI bridge: set default_bridges to 1 or \
                 more and restart the server, or attach less"
            }
            Error::InUse => {
                "another VM uses it, and only readers can share a disk: end that VM, or attach a \
                 copy, or attach it read-only to both"
            }
        })
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Monitor(source) => Some(source),
            _ => None,
        }
    }
}

impl From<qmp::Error> for Error {
    fn from(e: qmp::Error) -> Error {
        Error::Monitor(e)
    }
}

/// A disk's file.
#[derive(Debug)]
pub struct Drive<'a> {
    /// Open for what is to be done with it.
    pub file: BorrowedFd<'a>,
    /// Whether it is a block device, not a regular file.
    pub block_device: bool,
    /// QEMU's name for its format.
    pub format: &'static str,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

/// What a network card is connected to.
#[derive(Debug)]
pub enum Link<'a> {
    /// A tap.
    Tap(BorrowedFd<'a>),
    /// A connection to who carries its packets: a length of four bytes, big-endian, before each.
    Stream(BorrowedFd<'a>),
}

/// A free place for a device.
struct Place {
    bus: String,
    bridge: u64,
    slot: u64,
}

impl Place {
    fn find(qmp: &mut Qmp) -> Result<Place, Error> {
        let buses = qmp.execute("query-pci", None, QUICK)?;
        let devices = buses.as_array().into_iter().flatten();
        let devices = devices.filter_map(|bus| bus["devices"].as_array()).flatten();
        for bridge in devices {
            let id = bridge["qdev_id"].as_str().unwrap_or_default();
            let Some(number) = bridge["slot"].as_u64() else { continue };
            if !id.starts_with("pci-bridge-") {
                continue;
            }
            let behind = bridge["pci_bridge"]["devices"].as_array().into_iter().flatten();
            let taken: HashSet<u64> = behind.filter_map(|d| d["slot"].as_u64()).collect();
            if let Some(slot) = SLOTS.into_iter().find(|s| !taken.contains(s)) {
                return Ok(Place { bus: id.into(), bridge: number, slot });
            }
        }
        Err(Error::NoPlace)
    }

    fn path(&self) -> String {
        format!("{:02x}/{:02x}", self.bridge, self.slot)
    }

    /// Unique among a VM's devices.
    fn name(&self, kind: &str) -> String {
        format!("{kind}-{:02x}-{:02x}", self.bridge, self.slot)
    }

    fn add(&self, qmp: &mut Qmp, mut device: Value) -> Result<(), qmp::Error> {
        device["bus"] = self.bus.clone().into();
        device["addr"] = format!("{:02x}", self.slot).into();
        qmp.execute("device_add", Some(device), QUICK).map(|_| ())
    }
}

/// Adds a disk; gives its PCI path.
///
/// # Errors
/// See [`Error`]; so with [`add_nic`].
pub fn add_disk(qmp: &mut Qmp, drive: &Drive<'_>) -> Result<String, Error> {
    let place = Place::find(qmp)?;
    let set = qmp.execute_with("add-fd", None, Some(drive.file), QUICK)?;
    let set = set["fdset-id"].as_u64().unwrap_or(0);
    let node = place.name("drive");
    let file = if drive.block_device { "host_device" } else { "file" };
    let block = json!({
        "node-name": node, "driver": drive.format, "read-only": drive.read_only,
        "discard": "unmap", "file": {"driver": file, "filename": format!("/dev/fdset/{set}")},
    });
    let device = json!({
        "driver": "virtio-blk-pci", "id": place.name("virtio-drive"), "drive": node,
        // The guest is told: by default, a full disk of the host stops the VM, and nobody
        // would ever hear of it.
        "werror": "report", "rerror": "report",
    });
    // The lock is taken by one or the other, as QEMU likes.
    qmp.execute("blockdev-add", Some(block), QUICK).and_then(|_| place.add(qmp, device)).map_err(
        |e| match e {
            qmp::Error::Refused { text, .. }
                if text.contains("Failed to get") && text.contains("lock") =>
            {
                Error::InUse
            }
            other => Error::Monitor(other),
        },
    )?;
    Ok(place.path())
}

/// Adds a network card with this hardware address; gives its PCI path.
pub fn add_nic(qmp: &mut Qmp, link: &Link<'_>, mac: &str) -> Result<String, Error> {
    let place = Place::find(qmp)?;
    let name = place.name("network");
    let (fd, kind) = match link {
        Link::Tap(fd) => (fd, "tap"),
        // Not `stream`, which QEMU has since 7.2 only, and which takes no fd by name there.
        Link::Stream(fd) => (fd, "socket"),
    };
    let passed = json!({"fdname": name});
    qmp.execute_with("getfd", Some(passed), Some(*fd), QUICK)?;
    let netdev = json!({"type": kind, "id": name, "fd": name});
    qmp.execute("netdev_add", Some(netdev), QUICK)?;
    let device = json!({
        "driver": "virtio-net-pci", "id": place.name("virtio-network"), "netdev": name,
        "mac": mac, "romfile": "",
    });
    place.add(qmp, device)?;
    Ok(place.path())
}

/// Adds a directory that a virtiofsd serves on this connection; gives its PCI path.
pub fn add_share(qmp: &mut Qmp, served: BorrowedFd<'_>, tag: &str) -> Result<String, Error> {
    let place = Place::find(qmp)?;
    let chardev = place.name("charfs");
    qmp.execute_with("getfd", Some(json!({"fdname": chardev})), Some(served), QUICK)?;
    let address = json!({"type": "fd", "data": {"str": chardev}});
    let backend = json!({"type": "socket", "data": {"addr": address, "server": false}});
    let added = json!({"id": chardev, "backend": backend});
    qmp.execute("chardev-add", Some(added), QUICK)?;
    let device = json!({
        "driver": "vhost-user-fs-pci", "id": place.name("virtiofs"), "chardev": chardev,
        "tag": tag,
    });
    place.add(qmp, device)?;
    Ok(place.path())
}
