//! Agents: who answers inside a guest, and what can be asked of them.
//!
//! [`Agent`] is the interface; [`kata`] speaks it to Kata's agents of 2.x and
//! later and to our own, over ttrpc; [`noop`] is none. A call that an agent can
//! not do is [`Error::Unsupported`], never a silent success.

pub mod address;
pub mod kata;
pub mod noop;

use std::error;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use address::Address;
use kata::KataAgent;
use serde_derive::{Deserialize, Serialize};

use crate::proto::agent::{
    CopyFileRequest, CreateContainerRequest, CreateSandboxRequest, GuestDetailsResponse,
    StatsContainerResponse,
};
use crate::proto::oci::{LinuxResources, Process};
use crate::proto::types::{Interface, Route};
use crate::transport;

/// Why an agent did not do what it was asked.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// It could not be reached.
    Connect { source: transport::Error },
    /// Its address is of no kind that is known.
    Address { url: String, why: String },
    /// The connection broke, or time was up.
    Call { call: &'static str, text: String },
    /// It answered that it failed.
    Refused { call: &'static str, code: ttrpc::Code, text: String },
    /// It has no such call.
    Unsupported { call: &'static str },
    /// This host failed.
    Host { during: &'static str, source: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Connect { .. } => f.write_str("reach the guest's agent"),
            Error::Address { url, why } => write!(f, "agent address {url:?}: {why}"),
            Error::Call { call, text } => {
                write!(f, "the guest's agent did not answer {call}: {text}")
            }
            Error::Refused { text, .. } => f.write_str(text),
            Error::Unsupported { call } => write!(f, "the guest's agent has no {call}"),
            Error::Host { during, .. } => f.write_str(during),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Connect { source } => Some(source),
            Error::Host { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Which agent a guest has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// None.
    Noop,
    /// Kata's of 2.x and later, or ours.
    #[default]
    Kata,
}

impl Kind {
    /// All there are.
    pub const ALL: [Kind; 2] = [Kind::Noop, Kind::Kata];

    /// Kata's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Noop => "noop",
            Kind::Kata => "kata",
        }
    }
}

/// A type of agent that nobody knows.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownKind(String);

impl fmt::Display for UnknownKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = Kind::ALL.map(Kind::name).join(", ");
        write!(f, "Unknown agent type {}; there are {known}", self.0)
    }
}

impl error::Error for UnknownKind {}

impl FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Kind, UnknownKind> {
        let found = Kind::ALL.into_iter().find(|k| k.name() == text);
        found.ok_or_else(|| UnknownKind(text.chars().take(64).collect()))
    }
}

/// Connects to the agent of a guest that is up; it has answered when this
/// returns.
///
/// # Errors
/// [`Error::Connect`] when nothing answers.
pub fn connect(address: &Address, within: Duration) -> Outcome<Box<dyn Agent>> {
    match address {
        Address::Noop => Ok(Box::new(noop::Noop)),
        _ => Ok(Box::new(KataAgent::connect(address, within)?)),
    }
}

/// The same for a guest that may still be booting.
///
/// # Errors
/// [`Error::Connect`] when nothing answers.
pub fn await_boot(address: &Address, within: Duration) -> Outcome<Box<dyn Agent>> {
    match address {
        Address::Noop => Ok(Box::new(noop::Noop)),
        _ => Ok(Box::new(KataAgent::await_boot(address, within)?)),
    }
}

/// What most calls give.
pub type Outcome<T> = Result<T, Error>;

/// Which stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// A process in a guest: container and process id; an empty process id is the
/// container's own process.
#[derive(Clone, Debug)]
pub struct ProcessId {
    /// The container.
    pub container: String,
    /// The process in it.
    pub exec: String,
}

/// The interface of a guest's agent, by Kata's names (its agent.proto). Calls
/// block; each has a deadline, but those that wait for a process or its bytes.
///
/// Every call's errors are [`Error`].
pub trait Agent: Send + Sync {
    /// Which one it is.
    fn kind(&self) -> Kind;
    /// Ends the connection and waits, but not for long, until the guest has closed
    /// its end: what it does for that is then not left for whoever wakes it.
    /// Dropping ends the connection, too.
    fn leave(self: Box<Self>);
    /// Whether it serves.
    fn check(&self, within: Duration) -> Outcome<()>;
    /// Version of the protocol and of the agent.
    fn version(&self) -> Outcome<(String, String)>;
    /// What the guest can do; memory block size in bytes.
    fn guest_details(&self) -> Outcome<GuestDetailsResponse>;
    /// Sets up what containers share.
    fn create_sandbox(&self, request: CreateSandboxRequest) -> Outcome<()>;
    /// Removes containers and sandbox.
    fn destroy_sandbox(&self) -> Outcome<()>;
    /// Makes a container, ready before its program.
    fn create_container(&self, request: CreateContainerRequest) -> Outcome<()>;
    /// Lets a container's program start.
    fn start_container(&self, container: &str) -> Outcome<()>;
    /// Kills and removes a container.
    fn remove_container(&self, container: &str, within: Duration) -> Outcome<()>;
    /// Starts a further process in a container.
    fn exec_process(&self, id: &ProcessId, process: Process) -> Outcome<()>;
    /// Sends a signal, by number.
    fn signal_process(&self, id: &ProcessId, signal: u32) -> Outcome<()>;
    /// Waits for a process's end, with no deadline for `None`: its exit code,
    /// 128 + n when signal n ended it.
    fn wait_process(&self, id: &ProcessId, within: Option<Duration>) -> Outcome<i32>;
    /// Writes to a process's standard input; how many bytes were taken.
    fn write_stdin(&self, id: &ProcessId, data: Vec<u8>) -> Outcome<u32>;
    /// Reads at most `max` bytes; waits for some, empty at the end.
    fn read_stream(&self, id: &ProcessId, stream: Stream, max: u32) -> Outcome<Vec<u8>>;
    /// Closes a process's standard input.
    fn close_stdin(&self, id: &ProcessId) -> Outcome<()>;
    /// Sets the size of a process's terminal.
    fn resize_terminal(&self, id: &ProcessId, rows: u32, columns: u32) -> Outcome<()>;
    /// What a container uses.
    fn stats_container(&self, container: &str) -> Outcome<StatsContainerResponse>;
    /// Freezes a container's processes.
    fn pause_container(&self, container: &str) -> Outcome<()>;
    /// Thaws them.
    fn resume_container(&self, container: &str) -> Outcome<()>;
    /// Changes a container's limits.
    fn update_container(&self, container: &str, resources: LinuxResources) -> Outcome<()>;
    /// Processes of a container, as `json` (an array of pids) or `table`.
    fn list_processes(&self, container: &str, format: &str) -> Outcome<Vec<u8>>;
    /// Brings hot-added CPUs (and memory) online.
    fn online_cpu_mem(&self, cpus: u32, cpu_only: bool) -> Outcome<()>;
    /// Mixes a seed into the guest's random generator.
    fn reseed_rng(&self, seed: &[u8]) -> Outcome<()>;
    /// Sets the guest's wall clock, time since the epoch.
    fn set_guest_date_time(&self, time: Duration) -> Outcome<()>;
    /// Brings a piece of a file, a directory or a link into the guest.
    fn copy_file(&self, request: CopyFileRequest) -> Outcome<()>;
    /// The guest's network interfaces.
    fn list_interfaces(&self) -> Outcome<Vec<Interface>>;
    /// Configures one of them.
    fn update_interface(&self, interface: Interface) -> Outcome<Interface>;
    /// The guest's routes.
    fn list_routes(&self) -> Outcome<Vec<Route>>;
    /// Replaces them.
    fn update_routes(&self, routes: Vec<Route>) -> Outcome<Vec<Route>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_are_named_as_kata_names_them() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
        }
        let e = "pigeon".parse::<Kind>().unwrap_err().to_string();
        assert_eq!(e, "Unknown agent type pigeon; there are noop, kata");
    }

    #[test]
    fn no_agent_answers_at_once_and_can_do_nothing() {
        let agent = connect(&Address::Noop, Duration::ZERO).unwrap();
        agent.check(Duration::ZERO).unwrap();
        let e = agent.start_container("c").unwrap_err();
        assert!(matches!(e, Error::Unsupported { call: "StartContainer" }), "{e}");
        agent.leave();
    }
}
