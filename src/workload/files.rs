//! Files into a guest and out of it, as tar streams through its agent's own
//! `unpack`, `put` and `pack`.
//!
//! | module | does |
//! |--------|------|
//! | `side` | the guest's side: a process of its agent, its answers, how it ended |
//! | `into` | root file systems, files and streams into the guest |
//! | `out`  | files and streams out of it |
//!
//! Invariants: what comes out of a guest is written by `tree::extract` or `tree::forward`,
//! which do not trust it; names there are decided by what this host has looked at
//! (`tree::naming`); a guest's side that does nothing any more is given up; an error says
//! which side failed, and why.

mod into;
mod out;
mod side;

pub use into::{copy_in, send_root, stream_in};
pub use out::{copy_out, stream_out, CopyPolicy};
pub use side::Full;

/// The agent in its own guest.
pub(super) const AGENT: &str = "/sbin/vmcache-agent";
