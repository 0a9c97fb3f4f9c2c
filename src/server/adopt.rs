//! VMs that stood ready when the server before this one went: they are the new
//! pool's.
//!
//! Invariants: one is taken whose QEMU answers, and whose agent does if it runs; a
//! paused guest is as the server before left it. One that was made from another kernel,
//! program or parameters is taken until it can be replaced; one of another size, or that
//! is reached or confined otherwise, is not: clients and this server reckon with those.
//! All others are ended by [`super::sweep`].

use std::path::Path;
use std::time::Duration;

use crate::config::Config;
use crate::factory::cache::pool::Ready;
use crate::report::chain;
use crate::vm::ledger::{ClaimNote, Ledger};
use crate::vm::shape::{build, shape};
use crate::vm::{wire, Vm};
use crate::workload::rehearsal;

/// How VMs are made now.
pub struct Made {
    shape: String,
    build: String,
}

impl Made {
    /// By this configuration.
    pub fn of(config: &Config) -> Made {
        Made { shape: shape(config), build: build(config) }
    }
}

/// How a VM compares with that.
pub enum Age {
    /// It is made like this.
    Current,
    /// It would be made otherwise, but can be used the same way.
    Outdated,
}

/// How long an agent may take to answer: it has before.
const ANSWER: Duration = Duration::from_secs(5);

/// The VM in this directory, to be handed out again.
///
/// # Errors
/// Why it is of no use, a sentence; it still runs.
pub fn adopt(
    path: &Path,
    ledger: Ledger,
    now: &Made,
    config: &Config,
) -> Result<(Ready, Age), String> {
    let same = |then: &str, now: &str| !then.is_empty() && then == now;
    let age = match same(&ledger.shape, &now.shape) {
        true => Age::Current,
        false if same(&ledger.build, &now.build) => Age::Outdated,
        false => return Err("it is of another size or kind than VMs are now".into()),
    };
    let mut vm = wire::from_directory(path, ledger).map_err(|e| chain(&e))?;
    match look(&mut vm).and_then(|()| ClaimNote::open(path).map_err(|e| e.to_string())) {
        Ok(note) => {
            let message = wire::to_wire(&vm, config);
            let at_rest = vm.paused();
            Ok((Ready { vm, message, note, at_rest }, age))
        }
        Err(why) => {
            vm.let_go();
            Err(why)
        }
    }
}

/// Whether it still answers.
fn look(vm: &mut Vm) -> Result<(), String> {
    if !vm.alive() {
        return Err(vm.lost());
    }
    vm.look().map_err(|e| chain(&e))?;
    if vm.paused() {
        return Ok(());
    }
    let agent = vm.connect_agent().map_err(|e| chain(&e))?;
    let answered = agent.check(ANSWER).and_then(|()| rehearsal::clear(&*agent));
    agent.disconnect();
    answered.map_err(|e| chain(&e))
}
