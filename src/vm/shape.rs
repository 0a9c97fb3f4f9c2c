//! What a VM is made from: QEMU's arguments without what is one VM's own, and the
//! files that they name. Two VMs of one shape are alike; one of another shape than
//! the configuration now gives is of an old one.
//!
//! Invariant: asking is cheap (no file is read), so every boot does.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::agent;
use crate::agent::seat::{Seat, Way};
use crate::config::options::{AGENT, OURS, QEMU};
use crate::config::{Config, Transport};
use crate::confine;
use crate::digest::hexadecimal;
use crate::hypervisor::qemu::argv::{argv, Memory, Names, Passed};

/// Which file it is: device, inode, time of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp(u64, u64, i64, i64);

impl Stamp {
    /// By what the file system says of it.
    pub fn of(m: &fs::Metadata) -> Stamp {
        Stamp(m.dev(), m.ino(), m.ctime(), m.ctime_nsec())
    }
}

/// The files of a configuration from which its VMs are made.
pub fn sources(config: &Config) -> Vec<PathBuf> {
    let mut paths = vec![config.qemu(), config.kernel(), config.initrd()];
    let firmware = config.text(QEMU, "firmware");
    if !firmware.is_empty() {
        paths.push(firmware.into());
    }
    paths
}

/// Which files those are now: others when they were replaced.
pub fn stamps(config: &Config) -> Vec<Option<Stamp>> {
    sources(config).iter().map(|p| fs::metadata(p).ok().map(|m| Stamp::of(&m))).collect()
}

/// QEMU's arguments, as far as they depend on the configuration alone: the addresses
/// do not.
///
/// # Errors
/// When the agent can not be reached in the way that is configured.
pub fn arguments(config: &Config) -> io::Result<Vec<String>> {
    let way = match config.transport() {
        Transport::Serial => Way::Serial,
        Transport::Vsock => Way::Vsock(0),
        Transport::VhostUserVsock => Way::HybridVsock,
    };
    let seat = Seat { dir: "/".into(), way };
    let channels = agent::new(config.agent_kind).configure(&seat).map_err(io::Error::other)?;
    let names = Names {
        id: "",
        uuid: "",
        dir: Path::new("/"),
        passed: Passed {
            ports: vec![0; channels.len()],
            vsock: (way != Way::Serial).then_some(0),
            share: config.shares_virtiofs().then_some(0),
            ..Passed::default()
        },
        host_memory: crate::host::memory_mib(),
        memory: Memory::Own,
        channels: &channels,
    };
    Ok(argv(config, &names).iter().map(|a| a.to_string_lossy().into_owned()).collect())
}

/// The shape of a configuration's VMs, in hexadecimal; empty when it can not be told.
pub fn shape(config: &Config) -> String {
    let Ok(arguments) = arguments(config) else { return String::new() };
    let mut hash = Sha256::new();
    for argument in arguments {
        hash.update(argument.as_bytes());
        hash.update([0]);
    }
    hash.update(format!("{:?}", stamps(config)).as_bytes());
    hash.update(confine::shape(config).as_bytes());
    hexadecimal(hash)
}

/// Options that make a VM of another size or kind, which clients and servers reckon with.
const BUILD: [(&str, &str); 14] = [
    (QEMU, "default_vcpus"),
    (QEMU, "default_memory"),
    (QEMU, "memory_slots"),
    (QEMU, "default_bridges"),
    (QEMU, "machine_type"),
    (QEMU, "shared_fs"),
    (QEMU, "block_device_driver"),
    (AGENT, "protocol"),
    (OURS, "agent"),
    (OURS, "transport"),
    (OURS, "accel"),
    (OURS, "sandbox"),
    (OURS, "kata_calls"),
    (OURS, "nested"),
];

/// A VM's size and kind, and how it is confined, in hexadecimal: two that are alike in
/// this can be used the same way, whatever kernel or program they were made from.
pub fn build(config: &Config) -> String {
    let mut hash = Sha256::new();
    for (table, key) in BUILD {
        hash.update(format!("{table}.{key}={}\n", config.literal(table, key)).as_bytes());
    }
    hash.update(config.max_cpus().to_le_bytes());
    hash.update(confine::shape(config).as_bytes());
    hexadecimal(hash)
}
