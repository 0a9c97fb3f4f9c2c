//! What `run` attaches to its VM: `--image`, `--mount`, `--net`.
//!
//! Invariant: all of it is open before a VM is claimed, so that a wrong name
//! costs none.

use std::path::Path;

use super::args::{Common, Run};
use super::optional_config;
use super::output::{Failure, USAGE};
use crate::vm::attach::{Disk, Network, Nic};
use crate::workload::{Guest, Place};

/// Disks and network cards, open.
pub struct Attachments {
    disk: Option<(Disk, Place)>,
    nics: Vec<Nic>,
}

impl Attachments {
    /// Opens what the options name.
    pub fn open(common: &Common, r: &Run) -> Result<Attachments, Failure> {
        let a = &r.attach;
        let usage = |e: &dyn std::error::Error| Failure::of(USAGE, e);
        let place = match &a.mount {
            Some(dir) => Place::Directory(dir.clone()),
            None => Place::Root,
        };
        if a.image.is_some() && r.rootfs.is_some() && place == Place::Root {
            let text = "--image and --rootfs both name the command's root: say by --mount where \
                        the image shall be";
            return Err(Failure::new(USAGE, text));
        }
        if let Place::Directory(dir) = &place {
            if ["/dev", "/proc", "/sys"].iter().any(|d| Path::new(dir).starts_with(d)) {
                let text = format!("--mount {dir}: the command's own {dir} would hide it");
                return Err(Failure::new(USAGE, text));
            }
        }
        let disk = a.image.clone().map(|i| i.format(a.image_format).open());
        let disk = disk.transpose().map_err(|e| usage(&e))?.map(|disk| (disk, place));
        let config = optional_config(common)?;
        let own = |n: &Network| match &config {
            Some(config) => n.clone().with_qemu(config.qemu()),
            None => n.clone(),
        };
        let nics = a.net.iter().map(|n| own(n).open()).collect::<Result<_, _>>();
        Ok(Attachments { disk, nics: nics.map_err(|e| usage(&e))? })
    }

    /// Whether the disk is the command's root.
    pub fn root(&self) -> bool {
        matches!(self.disk, Some((_, Place::Root)))
    }

    /// Gives them to a guest, which must be destroyed when that fails; `leased`, it ends with
    /// this process.
    pub fn attach(&self, guest: &mut Guest, leased: bool) -> Result<(), Failure> {
        for nic in &self.nics {
            guest.attach_nic(nic, leased)?;
        }
        if let Some((disk, place)) = &self.disk {
            guest.attach_disk(disk, place.clone())?;
        }
        Ok(())
    }
}
