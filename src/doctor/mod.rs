//! Whether this host can do what its configuration asks for: one finding for each
//! thing, with the evidence and the remedy.
//!
//! Files: `guest` QEMU, KVM, and whether a VM boots; `images` what it is made of; `host`
//! the kernel, memory and limits; `access` who may connect, and to what; `isolation` how far
//! guests are kept from the host.
//!
//! Invariants: nothing is changed; what can be proven is proven (a guest is booted, since
//! on some hosts /dev/kvm opens and no guest ever runs), within a deadline.

mod access;
mod guest;
mod host;
mod images;
mod isolation;

use serde_derive::Serialize;

use crate::config::Config;
use crate::vm::birth::Watch;

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Good,
    /// It works, and could be better, or is worth knowing.
    Note,
    /// It works, and is a risk.
    Warning,
    /// Something that is needed is missing.
    Missing,
}

impl State {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            State::Good => "good",
            State::Note => "note",
            State::Warning => "warning",
            State::Missing => "missing",
        }
    }
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Of what.
    pub name: &'static str,
    /// How it is.
    pub state: State,
    /// By what one sees that.
    pub evidence: String,
    /// What to do; empty when there is nothing.
    pub remedy: String,
}

fn good(name: &'static str, evidence: impl Into<String>) -> Finding {
    Finding { name, state: State::Good, evidence: evidence.into(), remedy: String::new() }
}

fn finding(
    name: &'static str,
    state: State,
    evidence: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    Finding { name, state, evidence: evidence.into(), remedy: remedy.into() }
}

/// Looks at all. Blocks as long as a guest may take to boot, unless `boot` is false.
pub fn look(config: &Config, boot: bool, watch: Watch<'_>) -> Vec<Finding> {
    let mut all = guest::parts(config);
    all.extend(images::images(config));
    all.extend(host::kernel(config));
    all.extend(host::memory(config));
    all.extend(host::limits(config));
    all.extend(access::access(config));
    all.extend(isolation::isolation_findings(config));
    all.push(guest::boots(config, boot && all.iter().all(|f| f.state != State::Missing), watch));
    all
}
