//! VMs that stood ready when the server before this one went: they are the new
//! pool's.
//!
//! Invariants: one is taken that is of the shape which the configuration gives now,
//! whose QEMU answers, and whose agent does if it runs; a paused guest is as the
//! server before left it. All others are ended by [`super::sweep`].

use std::path::Path;
use std::time::Duration;

use crate::config::Config;
use crate::factory::cache::pool::Ready;
use crate::report::chain;
use crate::vm::ledger::{ClaimNote, Ledger};
use crate::vm::{wire, Vm};
use crate::workload::rehearsal;

/// How long an agent may take to answer: it has before.
const ANSWER: Duration = Duration::from_secs(5);

/// The VM in this directory, to be handed out again.
///
/// # Errors
/// Why it is of no use, a sentence; it still runs.
pub fn adopt(path: &Path, ledger: Ledger, shape: &str, config: &Config) -> Result<Ready, String> {
    if ledger.shape.is_empty() || ledger.shape != shape {
        return Err("it was made from another configuration or other files".into());
    }
    let mut vm = wire::from_directory(path, ledger).map_err(|e| chain(&e))?;
    match look(&mut vm).and_then(|()| ClaimNote::open(path).map_err(|e| e.to_string())) {
        Ok(note) => {
            let message = wire::to_wire(&vm, config);
            let at_rest = vm.paused();
            Ok(Ready { vm, message, note, at_rest })
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
