//! vmcache keeps QEMU VMs booted ahead of time, their guest agents answering,
//! and hands each out once, over gRPC on a Unix socket.
//!
//! ```text
//!  configuration.toml ─► config ─► vm::VmConfig
//!                                    │
//!                                    ▼
//!             factory::direct (cold boot) or factory::template (clones)
//!                                    │
//!               boot workers (one blocking thread for each VM being made:
//!               spawn QEMU ─► QMP ─► agent check ─► identity)
//!                                    │ the Vm moves by value
//!                                    ▼
//!               factory::cache, the pool: one driver thread, one select!
//!               (a VM that nobody wants yet is rehearsed and paused)
//!                                    │ the Vm moves out, once
//!                                    ▼
//!               server: gRPC  ══ proto/cache.proto ══►  factory::grpccache
//!                                                         │ GrpcVM ─► Vm again
//!                                                         ▼
//!                                         resume · reseed · clock (vm::identity)
//!                                         the size asked for (vm::resize)
//!                                                         ▼
//!                                         workload: sandbox, container, stdio …
//! ```
//!
//! Read the arrows as ownership: at every instant exactly one of worker, pool,
//! claim in flight and client owns a VM. Calls go downward only.
//!
//! # Claim a VM and run a command in it
//!
//! ```no_run
//! use std::io::Read;
//! use std::path::Path;
//! use vmcache::factory::{grpccache::GrpcCache, Factory, Wanted};
//! use vmcache::workload::{Command, Guest, WRITING_OUT};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let server = GrpcCache::connect(Path::new("/run/vmcache/cache.sock"))?.leasing();
//!     let guest = Guest::from(Factory::new(&server, None).get_vm(&Wanted::default())?);
//!     let process = guest.spawn(&Command::new("cat").arg("/proc/version"))?;
//!     let mut text = String::new();
//!     process.stdout().read_to_string(&mut text)?;
//!     println!("{text}exit code {}", process.wait()?);
//!     guest.stop(WRITING_OUT)?;
//!     Ok(())
//! }
//! ```
//!
//! # Invariants
//!
//! - A [`vm::Vm`] is never shared; dropping it ends the VM and removes its
//!   directory, so every error path cleans up.
//! - Every wait has a deadline or an event that must come; every queue and
//!   buffer has a named bound.
//! - Bytes from outside (gRPC, QMP, agents, configuration, ledgers) never panic.
//! - What a path from outside leads to is root's and this process's user's alone
//!   ([`trusted_path`]), or it is refused before it is used.
//! - What stands between attackers and the host has a name in `walls`, and tests that take it down.
//! - `unsafe` and libc are in [`sys`] only; threads start in `worker` only; commands print
//!   by `cli::print` only, which makes what guests and files say harmless.
//! - What a guest sends is written on the host by `tree::extract` only.
//!
//! # Deliberately absent
//!
//! An async runtime; recycling of VMs that were handed out; running as a
//! library inside the guest agent of others.

#![warn(missing_docs)]

#[allow(missing_docs)]
pub mod ids;
pub mod proto;
pub mod sys;
pub mod transport;
pub mod tree;

#[cfg(feature = "guest")]
pub mod guest;

#[cfg(feature = "host")]
pub mod agent;
#[cfg(feature = "host")]
#[allow(missing_docs)] // A program's inside; its documentation is --help.
pub mod cli;
#[cfg(feature = "host")]
pub mod config;
#[cfg(feature = "host")]
pub mod confine;
#[cfg(feature = "host")]
pub mod digest;
#[cfg(feature = "host")]
pub mod doctor;
#[cfg(feature = "host")]
pub mod events;
#[cfg(feature = "host")]
pub mod factory;
#[cfg(feature = "faults")]
pub mod faults;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
#[cfg(feature = "host")]
pub mod host;
#[cfg(feature = "host")]
pub mod hypervisor;
#[cfg(feature = "host")]
pub mod initrd;
#[cfg(feature = "host")]
pub mod notify;
#[cfg(feature = "host")]
pub mod process;
#[cfg(feature = "host")]
pub mod report;
#[cfg(feature = "host")]
pub mod server;
#[cfg(feature = "host")]
pub mod stuck;
#[cfg(feature = "host")]
pub mod trusted_path;
#[cfg(feature = "host")]
pub mod vm;
#[cfg(feature = "host")]
pub mod walls;
#[cfg(feature = "host")]
pub mod worker;
#[cfg(feature = "host")]
pub mod workload;
