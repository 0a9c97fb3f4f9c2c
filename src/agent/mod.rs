//! Agents: who answers inside a guest, and what can be asked of them.
//!
//! [`Agent`] is the interface, Kata's whole one. Behind it: [`kata::ttrpc`]
//! speaks to Kata's agents of 2.x and later and to our own; [`kata::grpc`] to
//! those of 1.x; [`hyperstart`] to hyperstart; [`noop`] is none. [`matrix`]
//! tells which of them has which call.
//!
//! Invariant: a call that an agent can not do is [`Error::Unsupported`], never a
//! silent success.

pub mod address;
mod error;
pub mod hyperstart;
pub mod kata;
mod kind;
mod link;
pub mod matrix;
pub mod noop;
pub mod seat;

use std::path::{Path, PathBuf};
use std::time::Duration;

use address::Address;
pub use error::{Error, Outcome};
pub use kind::{Kind, UnknownKind};
pub use link::Link;
use seat::{Capabilities, Channel, ProxyCommand, Seat};

use crate::process::attendant::Attendant;
use crate::proto::agent::{
    CopyFileRequest, CreateContainerRequest, CreateSandboxRequest, GuestDetailsResponse,
    StatsContainerResponse,
};
use crate::proto::cache::GrpcVM;
use crate::proto::oci::{LinuxResources, Process};
use crate::proto::types::{Interface, Route};

/// How long one of several ways to a guest may be silent before another is tried.
const PATIENCE: Duration = Duration::from_secs(4);

/// The agent of a guest, not connected yet.
pub fn new(kind: Kind) -> Box<dyn Agent> {
    at(match kind {
        Kind::Noop => Address::Noop,
        Kind::Kata => Address::Serial(PathBuf::new()),
        Kind::Kata1 => Address::Proxy(PathBuf::new()),
        Kind::Hyperstart => Address::Hyperstart(PathBuf::new()),
    })
}

/// The agent at an address, not connected yet.
pub fn at(address: Address) -> Box<dyn Agent> {
    match address.kind() {
        Kind::Noop => Box::new(noop::Noop),
        Kind::Kata => Box::new(kata::ttrpc::KataAgent::at(address)),
        Kind::Kata1 => Box::new(kata::grpc::Kata1Agent::at(address)),
        Kind::Hyperstart => Box::new(hyperstart::Hyperstart::at(address)),
    }
}

/// Connects to the agent of a guest that is up; it has answered when this
/// returns.
///
/// # Errors
/// [`Error::Connect`] when nothing answers.
pub fn connect(address: &Address, within: Duration) -> Outcome<Box<dyn Agent>> {
    let agent = at(address.clone());
    agent.connect(within, false)?;
    Ok(agent)
}

/// Which stream of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// How a list of processes is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListFormat {
    /// An array of pids.
    Json,
    /// Lines as ps(1) prints them, with a header.
    Table,
}

impl ListFormat {
    /// Kata's name.
    pub fn name(self) -> &'static str {
        match self {
            ListFormat::Json => "json",
            ListFormat::Table => "table",
        }
    }
}

/// Arguments for ps(1) when none are given.
pub const PS_ARGS: &str = "-ef";

/// A process in a guest: container and process id; an empty process id is the
/// container's own process.
#[derive(Clone, Debug)]
pub struct ProcessId {
    /// The container.
    pub container: String,
    /// The process in it.
    pub exec: String,
}

/// The interface of a guest's agent, by the names of Kata's. Calls block; each
/// has a deadline ([`kata::CALL`]), but those that wait for a process or its
/// bytes. A call connects if nothing has before.
///
/// Every call's errors are [`Error`]; `Unsupported` where an agent has no such
/// call ([`matrix`]).
///
/// Source: virtcontainers' agent interface of Kata 1.x, and agent.proto.
pub trait Agent: Send + Sync {
    // The host's side: nothing of this asks the guest.

    /// Which one it is.
    fn kind(&self) -> Kind;
    /// What it can have plugged in.
    fn capabilities(&self) -> Capabilities;
    /// Takes its place beside a VM that is to be started; the devices that it needs
    /// the VM to have. No process runs yet.
    fn configure(&mut self, seat: &Seat) -> Outcome<Vec<Channel>>;
    /// Takes over what a server said of its agents: the JSON of its AgentConfig,
    /// at most [`seat::MAX_CONFIG`] bytes. Refuses what is no such JSON.
    fn configure_from_grpc(&mut self, config: &[u8]) -> Outcome<()>;
    /// Starts the process that it is reached through, for which QEMU must run
    /// already; `None` when it needs none. Whoever gets it owns it.
    fn start_proxy(&mut self, _command: &ProxyCommand) -> Outcome<Option<Attendant>> {
        Ok(None)
    }
    /// Reaches it through a proxy that runs: its URL, `unix://PATH`.
    fn set_proxy(&mut self, _url: &str) -> Outcome<()> {
        Err(Error::Unsupported { call: "set_proxy" })
    }
    /// The same as a server says it; an empty URL changes nothing.
    fn set_proxy_from_grpc(&mut self, vm: &GrpcVM) -> Outcome<()> {
        match vm.proxyURL.as_str() {
            "" => Ok(()),
            url => self.set_proxy(url),
        }
    }
    /// Where it is.
    fn address(&self) -> &Address;
    /// The same as a URL.
    fn agent_url(&self) -> String {
        self.address().to_string()
    }
    /// Takes over the connection, and the address, of another value for the same
    /// agent, which is then not connected any more.
    fn reuse(&mut self, other: Box<dyn Agent>) -> Outcome<()>;
    /// Gives its connection away, for [`Agent::reuse`].
    fn give_link(self: Box<Self>) -> Option<Link>;
    /// A VM's directory below a store.
    fn vm_path(&self, store: &Path, id: &str) -> PathBuf {
        store.join(id)
    }
    /// Where what a sandbox shares with its guest is on the host.
    fn share_path(&self, sandbox: &str) -> PathBuf;
    /// Prepares the host for a sandbox: makes [`Agent::share_path`], mode 0750.
    fn create_sandbox(&self, sandbox: &str) -> Outcome<PathBuf> {
        seat::make_share(self.share_path(sandbox))
    }
    /// Undoes [`Agent::create_sandbox`]; nothing that is mounted there is touched,
    /// which is an error then.
    fn cleanup(&self, sandbox: &str) -> Outcome<()> {
        seat::remove_share(&self.share_path(sandbox))
    }
    /// Connects, unless it is connected; it has answered when this returns. With
    /// `booting`, the guest may take all of `within` to come up.
    fn connect(&self, within: Duration, booting: bool) -> Outcome<()>;
    /// Ends the connection and waits, but not for long, until the guest has closed
    /// its end: what it does for that is then not left for whoever wakes it.
    /// Dropping ends the connection, too. A later call connects again.
    fn disconnect(&self);
    /// Ends the connection at once, so that calls that wait for the guest return with an
    /// error; nothing is waited for. A later call connects again.
    fn hang_up(&self);

    // The guest as a whole.

    /// Whether it serves.
    fn check(&self, within: Duration) -> Outcome<()>;
    /// Version of the protocol and of the agent.
    fn version(&self) -> Outcome<(String, String)>;
    /// What the guest can do; memory block size in bytes.
    fn guest_details(&self) -> Outcome<GuestDetailsResponse>;
    /// Brings hot-added CPUs (and memory) online.
    fn online_cpu_mem(&self, cpus: u32, cpu_only: bool) -> Outcome<()>;
    /// Tells a guest without ACPI of memory that was added, by its addresses.
    fn mem_hotplug_by_probe(&self, addresses: &[u64]) -> Outcome<()>;
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

    // Sandbox and containers.

    /// Sets up what containers share.
    fn start_sandbox(&self, request: CreateSandboxRequest) -> Outcome<()>;
    /// Removes containers and sandbox.
    fn stop_sandbox(&self) -> Outcome<()>;
    /// Makes a container, ready before its program.
    fn create_container(&self, request: CreateContainerRequest) -> Outcome<()>;
    /// Lets a container's program start.
    fn start_container(&self, container: &str) -> Outcome<()>;
    /// Kills and removes a container.
    fn stop_container(&self, container: &str, within: Duration) -> Outcome<()>;
    /// Changes a container's limits.
    fn update_container(&self, container: &str, resources: LinuxResources) -> Outcome<()>;
    /// What a container uses.
    fn stats_container(&self, container: &str) -> Outcome<StatsContainerResponse>;
    /// Freezes a container's processes.
    fn pause_container(&self, container: &str) -> Outcome<()>;
    /// Thaws them.
    fn resume_container(&self, container: &str) -> Outcome<()>;
    /// Processes of a container; `args` are ps(1)'s for a table, [`PS_ARGS`] when
    /// empty.
    fn process_list_container(
        &self,
        container: &str,
        format: ListFormat,
        args: &[String],
    ) -> Outcome<Vec<u8>>;

    // Processes.

    /// Starts a further process in a container.
    fn exec(&self, id: &ProcessId, process: Process) -> Outcome<()>;
    /// Sends a signal, by number.
    fn signal_process(&self, id: &ProcessId, signal: u32) -> Outcome<()>;
    /// Waits for a process's end, with no deadline for `None`: its exit code,
    /// 128 + n when signal n ended it (Kata's agents of 2.0 to 3.31 tell n, and
    /// hyperstart 0).
    ///
    /// Kata's agents close its streams when this returns: what was not read is lost.
    fn wait_process(&self, id: &ProcessId, within: Option<Duration>) -> Outcome<i32>;
    /// Whether a process has ended, for an agent that has forgotten its streams once
    /// [`Agent::wait_process`] has returned. `false` as well when it cannot be told.
    fn has_ended(&self, _id: &ProcessId) -> Outcome<bool> {
        Ok(false)
    }
    /// Writes to a process's standard input; how many bytes were taken.
    fn write_process_stdin(&self, id: &ProcessId, data: Vec<u8>) -> Outcome<u32>;
    /// Closes a process's standard input.
    fn close_process_stdin(&self, id: &ProcessId) -> Outcome<()>;
    /// Reads at most `max` bytes of standard output; waits for some, empty at the end.
    fn read_process_stdout(&self, id: &ProcessId, max: u32) -> Outcome<Vec<u8>>;
    /// The same of standard error.
    fn read_process_stderr(&self, id: &ProcessId, max: u32) -> Outcome<Vec<u8>>;
    /// One of both.
    fn read_stream(&self, id: &ProcessId, stream: Stream, max: u32) -> Outcome<Vec<u8>> {
        match stream {
            Stream::Out => self.read_process_stdout(id, max),
            Stream::Err => self.read_process_stderr(id, max),
        }
    }
    /// Sets the size of a process's terminal, in characters.
    fn winsize_process(&self, id: &ProcessId, rows: u32, columns: u32) -> Outcome<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_agent_answers_at_once_and_can_do_nothing() {
        let agent = connect(&Address::Noop, Duration::ZERO).unwrap();
        agent.check(Duration::ZERO).unwrap();
        let e = agent.start_container("c").unwrap_err();
        assert!(matches!(e, Error::Unsupported { call: "StartContainer" }), "{e}");
        agent.disconnect();
    }
}
