//! The only place for `unsafe` and raw libc: thin, safe wrappers, one file per
//! part of the system.
//!
//! Invariants: every `unsafe` block has its SAFETY line; nothing here decides
//! anything; errors are `std::io::Error`, for the caller to put into words.

#[cfg(feature = "host")]
pub mod cage;
#[cfg(feature = "host")]
pub mod child;
#[cfg(feature = "host")]
pub mod clock;
#[cfg(feature = "guest")]
pub mod guest;
#[cfg(feature = "host")]
pub mod heap;
#[cfg(feature = "host")]
pub mod library;
#[cfg(feature = "host")]
pub mod mount;
pub mod process;
#[cfg(feature = "host")]
pub mod rpc;
#[cfg(feature = "host")]
pub mod sealed;
#[cfg(feature = "host")]
pub mod seccomp;
#[cfg(feature = "host")]
pub mod signal;
#[cfg(feature = "host")]
pub mod streams;
#[cfg(feature = "host")]
pub mod tap;
pub mod terminal;
#[cfg(feature = "host")]
pub mod vsock;
