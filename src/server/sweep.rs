//! What a server that was killed left behind, cleaned up by the next one.
//!
//! VMs of this endpoint that were never handed out are killed and their
//! directories removed; so are directories whose QEMU is gone. VMs that were
//! handed out, and other endpoints' VMs, are not touched.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::hypervisor::qemu::process::Process;
use crate::vm::dir::VmDir;
use crate::vm::ledger::{Ledger, State};

/// Makes the store when it is missing, and sweeps it.
///
/// # Errors
/// When the store can not be made or written.
pub fn sweep(store: &Path, endpoint: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(store)?;
    nix::unistd::access(store, nix::unistd::AccessFlags::W_OK)?;
    let own = endpoint.display().to_string();
    for (path, ledger) in Ledger::all(store) {
        if ledger.endpoint != own {
            continue;
        }
        let qemu = Process::adopt(ledger.pid, ledger.start_time).ok();
        let qemu = qemu.filter(Process::alive);
        match (ledger.state, qemu) {
            (State::Handed, Some(qemu)) => qemu.let_go(),
            (state, qemu) => {
                log::warn!(
                    "swept: VM {} ({}, QEMU pid {}{}) was left by a server that was killed",
                    ledger.id,
                    state.name(),
                    ledger.pid,
                    if qemu.is_some() { "" } else { ", dead" }
                );
                // QEMU first, then its directory.
                drop(qemu);
                drop(VmDir::adopt(&path));
            }
        }
    }
    Ok(())
}
