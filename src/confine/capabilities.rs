//! Capabilities: what root is left with.
//!
//! Source: capabilities(7).

use caps::{CapSet, Capability, CapsHashSet};

use crate::config::Config;

/// What the server needs, and what it may leave to who it starts: to run QEMU as
/// another user (`SETUID`, `SETGID`, `SETPCAP`), with files of that user (`CHOWN`,
/// `DAC_*`, `FOWNER`, `FSETID`) and cgroups; to end it (`KILL`); to mount templates
/// and root file systems (`SYS_ADMIN`); to make taps (`NET_ADMIN`); limits
/// (`SYS_RESOURCE`, `SYS_NICE`); memory that is locked (`IPC_LOCK`); to see which root
/// file system a QEMU lives in (`SYS_PTRACE`); and virtiofsd's (`MKNOD`, `SETFCAP`,
/// `SYS_CHROOT`).
const SERVER: [Capability; 18] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_SETPCAP,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_IPC_LOCK,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_NICE,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_SYS_RESOURCE,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
];

/// What a QEMU keeps that serves a directory to its guest, with the guest's owners and
/// modes.
const SERVES_FILES: [Capability; 6] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
];

fn bits(all: &[Capability]) -> u64 {
    all.iter().fold(0, |bits, c| bits | c.bitmask())
}

/// What QEMU may keep; `None` when this process could not take it away.
pub fn of_qemu(config: &Config) -> Option<u64> {
    let able = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP);
    let serves: &[Capability] = if config.shares_9p() { &SERVES_FILES } else { &[] };
    // Devices of the host that clients add want its memory locked.
    let kept = bits(serves) | Capability::CAP_IPC_LOCK.bitmask();
    able.unwrap_or(false).then_some(kept)
}

/// That a process keeps none; `None` when this one could not take them away.
pub fn none() -> Option<u64> {
    let able = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP);
    able.unwrap_or(false).then_some(0)
}

/// This process keeps what a server needs. Before it has threads, which keep theirs.
///
/// # Errors
/// As capset(2) and prctl(2).
pub fn keep_the_servers() -> Result<(), caps::errors::CapsError> {
    let wanted: CapsHashSet = SERVER.into_iter().collect();
    let has = caps::read(None, CapSet::Permitted)?;
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for more in caps::read(None, CapSet::Bounding)?.difference(&wanted) {
            caps::drop(None, CapSet::Bounding, *more)?;
        }
    }
    let kept: CapsHashSet = has.intersection(&wanted).copied().collect();
    if nix::unistd::geteuid().is_root() {
        // Another user's server keeps what it was given for its next program.
        caps::clear(None, CapSet::Inheritable)?;
    }
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}
