//! The guest agent, `vmcache-agent`: PID 1 of a guest.
//!
//! ```text
//! boot ─► reaper ─► channel (serial ports, vsock) ─► service (ttrpc)
//!                                                      │
//!                            sandbox ─► container ─► stage (a new process)
//!                               └─► process, cgroup, network, identity, copy
//! ```
//!
//! It speaks Kata's `grpc.AgentService` and `grpc.Health`. The binary has several
//! lives, told apart by its arguments: PID 1, the first stage of a container
//! (`stage`), `unpack`, `put` and `pack` of tar streams, and `--version`.
//!
//! Invariants: PID 1 never exits and never panics on a request; every child is
//! reaped by one thread (`reaper`); what a request makes, `RemoveContainer`
//! or `DestroySandbox` takes away.
//!
//! Does not: trust the host less than a guest must (the host owns its memory),
//! hide one container's existence from another, or fetch images.

// A program of its own, with rules of its own: PID 1's threads live as long as
// the guest, and starting processes is its trade; what it prints is the guest's console, or
// goes to a host that makes it harmless.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros)]

mod boot;
mod capabilities;
mod cgroup;
mod channel;
mod container;
mod copy;
mod failure;
#[cfg(feature = "kata-habits")]
mod habits;
mod hosts;
mod identity;
mod listing;
mod memory;
mod mounts;
mod network;
mod pack;
mod process;
mod reaper;
mod sandbox;
mod scope;
mod service;
mod stage;
mod stats;
mod storage;
mod unpack;
mod user;

use std::process::exit;

/// Version of the protocol that Health.Version tells, as Kata's agents do.
pub const PROTOCOL_VERSION: &str = "0.0.1";
/// Where the agent keeps what is its own.
pub const RUN_DIR: &str = "/run/vmcache";

/// Where it keeps its containers' state.
pub const CONTAINERS: &str = "/run/vmcache/containers";

/// Runs the life that the arguments name; does not return.
pub fn main() -> ! {
    let args: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = args.iter().skip(1).map(String::as_str).collect();
    let result = match words.as_slice() {
        ["--version"] => {
            println!("vmcache-agent {}", env!("CARGO_PKG_VERSION"));
            exit(0)
        }
        ["stage", dir, name] => stage::run(dir, name),
        ["unpack", target] => unpack::run(target),
        ["put", root, path, kind, name] => unpack::put(root, path, kind, name),
        ["pack", source] => pack::run(source),
        _ if std::process::id() == 1 => boot::run(),
        _ => Err(failure::Failure::internal(
            "vmcache-agent is PID 1 of a guest; `vmcache mkinitrd` packs it into an initramfs",
        )),
    };
    match result {
        Ok(()) => exit(0),
        Err(e) => {
            eprintln!("vmcache-agent: {}", e.message);
            exit(1)
        }
    }
}
