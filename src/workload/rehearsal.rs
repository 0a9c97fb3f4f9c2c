//! A rehearsal: a command that does nothing, before the one that counts.
//!
//! What a guest does for the first time costs most: its kernel reads, allocates
//! and sets up, the host's pages are touched, and under TCG all code on the way
//! is translated. After a rehearsal the first real command finds that done.
//!
//! Invariants: in a container of its own, which is gone afterwards; nothing of
//! the sandbox is touched, so that a client may use the VM meanwhile.

use std::time::Duration;

use super::{files, Command, OWN_ROOT};
use crate::agent::address::Address;
use crate::agent::{self, Agent, Error, ProcessId};
use crate::proto::agent::CreateContainerRequest;

/// Name of its container.
const NAME: &str = "rehearsal";
/// Until the agent of a VM that stands ready answers.
const ANSWER: Duration = Duration::from_secs(10);
/// Until the command has ended.
const RUNNING: Duration = Duration::from_secs(10);
/// Until its container is gone.
const REMOVAL: Duration = Duration::from_secs(10);

/// Runs it.
///
/// # Errors
/// The agent's; something of it may then be left.
pub fn run(agent: &dyn Agent) -> Result<(), Error> {
    agent.create_container(CreateContainerRequest {
        container_id: NAME.into(),
        exec_id: NAME.into(),
        OCI: Some(Command::new(files::AGENT).arg("--version").spec(OWN_ROOT, 0)).into(),
        ..CreateContainerRequest::default()
    })?;
    let id = ProcessId { container: NAME.into(), exec: String::new() };
    let ran = agent.start_container(NAME).and_then(|()| agent.wait_process(&id, Some(RUNNING)));
    let removed = agent.stop_container(NAME, REMOVAL);
    ran.and(removed)
}

/// Removes what a rehearsal left that was cut short, if there was one.
///
/// # Errors
/// When the agent does not answer.
pub fn clear(agent: &dyn Agent) -> Result<(), Error> {
    match agent.stop_container(NAME, REMOVAL) {
        Ok(()) | Err(Error::Refused { .. } | Error::Unsupported { .. }) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Runs it in a VM that is awake, over a connection of its own.
///
/// # Errors
/// As [`run`].
pub fn run_at(agent: &Address) -> Result<(), Error> {
    let agent = agent::connect(agent, ANSWER)?;
    let done = run(&*agent);
    agent.disconnect();
    done
}
