//! Coming to rest: what is done for a VM that stands ready while nobody waits.
//!
//! It gets a rehearsal ([`crate::workload::rehearsal`]), and then its virtual
//! CPUs are stopped. It can be claimed all the while: this thread has no more
//! than a connection to its agent, until the driver hands it the VM for the
//! instant of the pause.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{bounded, Receiver, Sender};

use super::pool::{Event, Pool, Ready};
use crate::agent::address::Address;
use crate::agent::{self, Error};
use crate::config::Config;
use crate::events::event;
use crate::report::chain;
use crate::stuck;
use crate::vm::wire;
use crate::worker::{self, Worker};
use crate::workload::rehearsal;

/// For an agent whose rehearsal did not end, to show that it answers at all.
const LAST_CHANCE: Duration = Duration::from_secs(30);

/// What the thread is asked to do.
pub enum Task {
    /// A rehearsal in this VM, which stays the pool's.
    Rehearse {
        /// QEMU's pid.
        pid: i32,
        /// The VM's agent.
        agent: Address,
    },
    /// Stop this VM's CPUs and give it back.
    Pause(Box<Ready>),
}

/// Starts the thread, which ends when the sender is dropped.
///
/// # Errors
/// When the system gives none.
pub fn start(
    config: &Arc<Config>,
    pool: &Arc<Pool>,
) -> Result<(Sender<Task>, Worker<()>), worker::Error> {
    // The driver gives a task only when the one before has been answered.
    let (tasks, todo) = bounded(1);
    let (config, pool) = (Arc::clone(config), Arc::clone(pool));
    let thread = Worker::spawn("vmc-rest", move || work(&config, &pool, &todo))?;
    Ok((tasks, thread))
}

/// Longest that one may take.
const RESTING: Duration = Duration::from_secs(120);

fn work(config: &Config, pool: &Pool, todo: &Receiver<Task>) {
    for task in todo {
        let _doing = stuck::begin("letting a VM rest", RESTING);
        #[cfg(feature = "faults")]
        crate::faults::point("rest");
        pool.tell(match task {
            Task::Rehearse { pid, agent } => {
                Event::Rehearsed { pid, silent: silent(rehearsal::run_at(&agent), &agent) }
            }
            Task::Pause(mut ready) => {
                let failed = ready.vm.pause().err().map(|e| chain(&e));
                ready.message = wire::to_wire(&ready.vm, config);
                Event::Rested { ready, failed }
            }
        });
    }
}

/// Why an agent can not be said to answer. One that refuses has answered (a guest
/// may lack the program, and then merely starts cold); one that is slow answers
/// when it is asked for no more than that; and what this host lacks is not the
/// guest's fault.
fn silent(rehearsed: Result<(), Error>, agent: &Address) -> Option<String> {
    let e = rehearsed.err()?;
    let guest = match &e {
        Error::Call { .. } => true,
        Error::Connect { source } => source.is_guests(),
        _ => false,
    };
    let asked = || agent::connect(agent, LAST_CHANCE).and_then(|a| a.check(LAST_CHANCE));
    match guest.then(asked) {
        Some(Err(again)) => Some(chain(&again)),
        Some(Ok(())) | None => {
            event!(REHEARSAL; "{}; the VM starts cold", chain(&e));
            None
        }
    }
}
