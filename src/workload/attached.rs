//! Disks and network cards that a guest gets when it is claimed: plugged in,
//! found by its agent through their PCI path or hardware address, mounted and
//! configured.
//!
//! Invariants: disks are mounted as long as the first command's container
//! exists; a guest that did not get what it was to have must be destroyed.
//!
//! Source: Kata's agent.proto; storage driver `blk`, whose source is a PCI path.

use std::path::Path;

use super::{Error, Guest, GUEST_ROOT, OWN_ROOT};
use crate::hypervisor::qemu::argv::SHARE_TAG;
use crate::proto::agent::Storage;
use crate::proto::oci::Mount;
use crate::proto::types::{IPAddress, IPFamily, Interface, Route};
use crate::vm::attach::share::TAG;
use crate::vm::attach::{Disk, Nic};

/// Where resolvers are told.
const RESOLVERS: &str = "/etc/resolv.conf";

/// Where a disk is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// As the command's root ([`Guest::spawn_in_root`]).
    Root,
    /// In this directory of the command's root, an absolute path.
    Directory(String),
}

/// What was attached so far.
#[derive(Default)]
pub(super) struct Attached {
    /// Below the command's root, for a directory of the host.
    layers: Vec<Storage>,
    disks: Vec<(Storage, Place)>,
    nics: usize,
    routes: Vec<Route>,
    dns: Vec<String>,
}

impl Attached {
    pub fn disks(&self) -> bool {
        !self.disks.is_empty()
    }

    pub fn layers(&self) -> bool {
        !self.layers.is_empty()
    }

    pub fn resolvers(&self) -> bool {
        !self.dns.is_empty()
    }

    /// Lines of resolv.conf(5).
    pub fn dns(&self) -> Vec<String> {
        self.dns.clone()
    }

    /// What is to be mounted for a container with this root; the root first.
    pub fn storages(&self, root: &str) -> Vec<Storage> {
        let mut out = self.layers.clone();
        let bottom = out.len();
        for (storage, place) in &self.disks {
            let mut storage = storage.clone();
            match place {
                Place::Root => {
                    storage.mount_point = root.into();
                    out.insert(bottom, storage);
                }
                Place::Directory(dir) => {
                    let root = if root == OWN_ROOT { "" } else { root };
                    storage.mount_point = format!("{root}{dir}");
                    out.push(storage);
                }
            }
        }
        out
    }
}

/// The guest's resolvers in a container with a root of its own.
pub(super) fn resolvers_mount() -> Mount {
    Mount {
        destination: RESOLVERS.into(),
        source: RESOLVERS.into(),
        type_: "bind".into(),
        options: ["bind", "ro"].map(str::to_string).to_vec(),
        ..Mount::default()
    }
}

/// The storage driver and file system of that name.
const NINE_P: &str = "9p";
/// Bytes in one of its messages: with less, a file is read in many small steps.
const NINE_P_SIZE: &str = "msize=262144";

/// The command's root: what is below stays as it is.
fn overlay(lower: &str) -> Storage {
    Storage {
        driver: "overlayfs".into(),
        source: "overlay".into(),
        fstype: "overlay".into(),
        options: vec![
            format!("lowerdir={lower}"),
            format!("upperdir={LAYERS}/upper"),
            format!("workdir={LAYERS}/work"),
        ],
        mount_point: GUEST_ROOT.into(),
        ..Storage::default()
    }
}

/// Where the guest sees a directory of the host, and what it writes above it.
const LAYERS: &str = "/run/vmcache/layers";

impl Guest {
    /// Lets a directory of the host be the command's root, without copying it: the
    /// guest sees it as it is, and keeps what it writes to itself. `daemon` is the
    /// virtiofsd; `leased`, it ends with the calling thread. False where this process may make
    /// no read-only mount of it.
    ///
    /// # Errors
    /// [`Error::Attach`]; the VM is then of no use.
    pub fn share_root(
        &mut self,
        directory: &Path,
        daemon: &Path,
        leased: bool,
    ) -> Result<bool, Error> {
        if !self.vm.share(directory, daemon, "auto", leased).map_err(Error::Attach)? {
            return Ok(false);
        }
        let lower = format!("{LAYERS}/lower");
        let bottom = Storage {
            driver: "virtio-fs".into(),
            source: TAG.into(),
            fstype: "virtiofs".into(),
            options: vec!["ro".into()],
            mount_point: lower.clone(),
            ..Storage::default()
        };
        self.attached.layers = vec![bottom, overlay(&lower)];
        Ok(true)
    }

    /// The same by way of the directory that the VM has by 9p; false where the guest's
    /// kernel has no 9p, or the directory can not be brought there.
    ///
    /// # Errors
    /// [`Error::Agent`], and [`Error::Attach`]; the VM is then of no use.
    pub fn bind_root(&mut self, directory: &Path) -> Result<bool, Error> {
        let details = self.watched.call(|agent| agent.guest_details())?;
        if !details.agent_details.storage_handlers.iter().any(|h| h == NINE_P) {
            return Ok(false);
        }
        let Some(name) = self.vm.bind_share(directory).map_err(Error::Attach)? else {
            return Ok(false);
        };
        let shared = format!("{LAYERS}/shared");
        let options = ["ro", "trans=virtio", "version=9p2000.L", "cache=mmap", NINE_P_SIZE];
        let bottom = Storage {
            driver: NINE_P.into(),
            source: SHARE_TAG.into(),
            fstype: NINE_P.into(),
            options: options.map(String::from).to_vec(),
            mount_point: shared.clone(),
            ..Storage::default()
        };
        self.attached.layers = vec![bottom, overlay(&format!("{shared}/{name}"))];
        Ok(true)
    }

    /// Plugs a disk in, to be mounted when the next command is spawned. Its file
    /// system is found out by the guest.
    ///
    /// # Errors
    /// [`Error::Attach`]; the VM is then of no use.
    pub fn attach_disk(&mut self, disk: &Disk, place: Place) -> Result<(), Error> {
        let path = self.vm.attach_disk(disk).map_err(Error::Attach)?;
        let storage = Storage {
            driver: "blk".into(),
            source: path,
            options: disk.read_only().then(|| "ro".to_string()).into_iter().collect(),
            ..Storage::default()
        };
        self.attached.disks.push((storage, place));
        Ok(())
    }

    /// Plugs a network card in and has the guest configure it, as `eth0`,
    /// `eth1` and so on. `leased`, what carries it in user space ends with this thread.
    ///
    /// # Errors
    /// [`Error::Attach`], or [`Error::Agent`] when the guest does not take it;
    /// the VM is then of no use.
    pub fn attach_nic(&mut self, nic: &Nic, leased: bool) -> Result<(), Error> {
        let path = self.vm.attach_nic(nic, leased).map_err(Error::Attach)?;
        let wanted = nic.wanted();
        let name = format!("eth{}", self.attached.nics);
        let family = |v4| if v4 { IPFamily::v4 } else { IPFamily::v6 };
        let addresses = wanted.addresses.iter().map(|(ip, prefix)| IPAddress {
            family: family(ip.is_ipv4()).into(),
            address: ip.to_string(),
            mask: prefix.to_string(),
            ..IPAddress::default()
        });
        let interface = Interface {
            device: name.clone(),
            name: name.clone(),
            IPAddresses: addresses.collect(),
            mtu: wanted.mtu.unwrap_or(0).into(),
            hwAddr: nic.mac().into(),
            devicePath: path,
            ..Interface::default()
        };
        self.watched.call(|agent| agent.update_interface(interface))?;
        self.attached.nics += 1;
        if let Some(gateway) = wanted.gateway {
            self.attached.routes.push(Route {
                gateway: gateway.to_string(),
                device: name,
                family: family(gateway.is_ipv4()).into(),
                ..Route::default()
            });
            // The call replaces all of them.
            let routes = self.attached.routes.clone();
            self.watched.call(|agent| agent.update_routes(routes))?;
        }
        self.attached.dns.extend(wanted.dns.iter().map(|ip| format!("nameserver {ip}")));
        Ok(())
    }
}
