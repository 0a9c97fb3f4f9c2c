//! Kata's agent protocol of 2.x and later: ttrpc, services `grpc.AgentService`
//! and `grpc.Health`. Our own guest agent speaks it too.
//!
//! Sources: Kata's agent.proto and health.proto; the ttrpc protocol of
//! containerd.

use std::net::Shutdown;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use ttrpc::context::{with_duration, Context};
use ttrpc::Code;

use super::super::address::Address;
use super::super::link::{Link, Slot};
use super::super::seat::{self, Capabilities, Channel, Seat};
use super::super::{Agent, Error, Kind, ListFormat, Outcome, ProcessId, Stream, PATIENCE};
use super::{ANSWERING, CALL, CAPABILITIES, START};
use crate::proto::agent::*;
use crate::proto::agent_ttrpc::AgentServiceClient;
use crate::proto::health::{CheckRequest, HealthCheckResponse};
use crate::proto::health_ttrpc::HealthClient;
use crate::proto::oci::{LinuxResources, Process};
use crate::proto::types::{Interface, Route};
use crate::transport::serial::FAREWELL;

/// One more than Linux has.
const NO_SIGNAL: u32 = 65;

/// A connection to an agent.
///
/// Invariant: it ends when this is dropped, whatever the client library's threads
/// wait for.
pub struct Connection {
    agent: AgentServiceClient,
    health: HealthClient,
    stream: UnixStream,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The library's reader holds the connection while it waits, so
        // dropping the library's client alone may never close it.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Connection {
    fn over(stream: UnixStream) -> Outcome<Connection> {
        let kept = stream
            .try_clone()
            .map_err(|source| Error::Host { during: "duplicate a connection", source })?;
        let fd = OwnedFd::from(stream).into_raw_fd();
        let client = ttrpc::Client::new(fd).map_err(|e| failed("connect", e))?;
        Ok(Connection {
            agent: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
            stream: kept,
        })
    }

    fn farewell(&self) {
        let _ = self.stream.shutdown(Shutdown::Write);
        let hung_up = PollFd::new(self.stream.as_fd(), PollFlags::empty());
        let timeout = PollTimeout::try_from(FAREWELL).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut [hung_up], timeout);
    }
}

/// An agent of 2.x or later, or ours.
pub struct KataAgent {
    address: Address,
    slot: Slot<Connection>,
}

impl KataAgent {
    /// The one at an address.
    pub fn at(address: Address) -> KataAgent {
        KataAgent { address, slot: Slot::empty() }
    }

    /// One that is connected already, at an address that leads nowhere.
    pub(crate) fn over(stream: UnixStream) -> Outcome<KataAgent> {
        let agent = KataAgent::at(Address::Serial(PathBuf::from("/nonexistent")));
        agent.slot.put(Arc::new(Connection::over(stream)?));
        Ok(agent)
    }

    fn link(&self) -> Outcome<Arc<Connection>> {
        self.slot.get(|| Connection::over(self.address.dial(CALL, PATIENCE)?))
    }

    /// Kata's agents up to 3.26 have no other word for the end than an error, and say "eof"
    /// to a read that waited when the process ended: what it wrote last, and others that hold
    /// its streams, are for the next read. Later ones answer with no bytes.
    ///
    /// Source: `read_stream` and `do_read_stream` of src/agent/src/rpc.rs, kata-containers
    /// 3.20 and 4.1.
    fn read(&self, id: &ProcessId, stream: Stream, max: u32) -> Outcome<Vec<u8>> {
        for _ in 0..2 {
            match self.read_once(id, stream, max) {
                Err(Error::Refused { text, .. }) if text == "read meet eof" => break,
                Err(Error::Refused { text, .. }) if text == "eof" => {}
                other => return other,
            }
        }
        Ok(Vec::new())
    }

    fn read_once(&self, id: &ProcessId, stream: Stream, max: u32) -> Outcome<Vec<u8>> {
        let r = request!(ReadStreamRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            len: max,
        });
        let link = self.link()?;
        let (call, answer) = match stream {
            Stream::Out => ("ReadStdout", link.agent.read_stdout(endless(), &r)),
            Stream::Err => ("ReadStderr", link.agent.read_stderr(endless(), &r)),
        };
        answer.map(|answer| answer.data).map_err(|e| failed(call, e))
    }
}

fn failed(call: &'static str, e: ttrpc::Error) -> Error {
    match e {
        ttrpc::Error::RpcStatus(status) => {
            let code = status.code();
            // Kata's agents of 3.x add a page of addresses.
            let text = status.message.split("\n\nStack backtrace:").next().unwrap_or_default();
            let missing = code == Code::UNIMPLEMENTED
                || (code == Code::INVALID_ARGUMENT && status.message.ends_with("does not exist"));
            if missing {
                return Error::Unsupported { call };
            }
            Error::Refused { call, code, text: text.trim_end().to_string() }
        }
        other => Error::Call { call, text: other.to_string() },
    }
}

fn quick() -> Context {
    with_duration(CALL)
}

/// No deadline: for what waits on a process.
fn endless() -> Context {
    Context::default()
}

fn nothing<T>(call: &'static str, r: ttrpc::Result<T>) -> Outcome<()> {
    r.map(|_| ()).map_err(|e| failed(call, e))
}

impl Agent for KataAgent {
    fn kind(&self) -> Kind {
        Kind::Kata
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn configure(&mut self, seat: &Seat) -> Outcome<Vec<Channel>> {
        self.address = Address::of(Kind::Kata, &seat.dir, seat.way);
        Ok(super::channels(seat))
    }

    fn configure_from_grpc(&mut self, config: &[u8]) -> Outcome<()> {
        seat::config_object(config).map(|_| ())
    }

    fn set_proxy_from_grpc(&mut self, vm: &crate::proto::cache::GrpcVM) -> Outcome<()> {
        // Kata's servers put an agent's own URL here when there is no proxy.
        self.address.told(&vm.proxyURL)
    }

    fn address(&self) -> &Address {
        &self.address
    }

    fn reuse(&mut self, other: Box<dyn Agent>) -> Outcome<()> {
        self.slot.take_over(&mut self.address, other, |link| match link {
            Link::Ttrpc(link) => Some(link),
            _ => None,
        })
    }

    fn give_link(self: Box<Self>) -> Option<Link> {
        self.slot.take().map(Link::Ttrpc)
    }

    fn share_path(&self, sandbox: &str) -> PathBuf {
        super::share_path(sandbox)
    }

    fn connect(&self, within: Duration, booting: bool) -> Outcome<()> {
        let patience = if booting { within } else { PATIENCE.min(within) };
        self.slot.get(|| Connection::over(self.address.dial(within, patience)?)).map(|_| ())
    }

    fn disconnect(&self) {
        if let Some(link) = self.slot.take() {
            link.farewell();
        }
    }

    fn hang_up(&self) {
        // Calls that wait hold the connection, too: dropping it here does not end it.
        if let Some(link) = self.slot.take() {
            let _ = link.stream.shutdown(Shutdown::Both);
        }
    }

    fn check(&self, within: Duration) -> Outcome<()> {
        let answer: HealthCheckResponse = self
            .link()?
            .health
            .check(with_duration(within), &CheckRequest::default())
            .map_err(|e| failed("Check", e))?;
        match answer.status.value() {
            1 => Ok(()),
            other => {
                Err(Error::Call { call: "Check", text: format!("status {other}, not serving") })
            }
        }
    }

    fn version(&self) -> Outcome<(String, String)> {
        let answer = self.link()?.health.version(quick(), &CheckRequest::default());
        answer.map(|v| (v.grpc_version, v.agent_version)).map_err(|e| failed("Version", e))
    }

    fn guest_details(&self) -> Outcome<GuestDetailsResponse> {
        let r = request!(GuestDetailsRequest { mem_block_size: true, mem_hotplug_probe: true });
        self.link()?.agent.get_guest_details(quick(), &r).map_err(|e| failed("GetGuestDetails", e))
    }

    fn start_sandbox(&self, r: CreateSandboxRequest) -> Outcome<()> {
        nothing("CreateSandbox", self.link()?.agent.create_sandbox(quick(), &r))
    }

    fn stop_sandbox(&self) -> Outcome<()> {
        let r = DestroySandboxRequest::default();
        nothing("DestroySandbox", self.link()?.agent.destroy_sandbox(quick(), &r))
    }

    fn create_container(&self, r: CreateContainerRequest) -> Outcome<()> {
        nothing("CreateContainer", self.link()?.agent.create_container(with_duration(START), &r))
    }

    fn start_container(&self, container: &str) -> Outcome<()> {
        let r = request!(StartContainerRequest { container_id: container.into() });
        nothing("StartContainer", self.link()?.agent.start_container(with_duration(START), &r))
    }

    fn stop_container(&self, container: &str, within: Duration) -> Outcome<()> {
        let timeout = within.as_secs().clamp(1, 3600) as u32;
        let r =
            request!(RemoveContainerRequest { container_id: container.into(), timeout: timeout });
        let context = with_duration(within + ANSWERING);
        nothing("RemoveContainer", self.link()?.agent.remove_container(context, &r))
    }

    fn exec(&self, id: &ProcessId, process: Process) -> Outcome<()> {
        let r = request!(ExecProcessRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            process: Some(process).into(),
        });
        nothing("ExecProcess", self.link()?.agent.exec_process(with_duration(START), &r))
    }

    fn signal_process(&self, id: &ProcessId, signal: u32) -> Outcome<()> {
        let r = request!(SignalProcessRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            signal: signal,
        });
        nothing("SignalProcess", self.link()?.agent.signal_process(quick(), &r))
    }

    fn wait_process(&self, id: &ProcessId, within: Option<Duration>) -> Outcome<i32> {
        let r = request!(WaitProcessRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
        });
        let context = within.map_or_else(endless, with_duration);
        let answer = self.link()?.agent.wait_process(context, &r);
        answer.map(|a| a.status).map_err(|e| failed("WaitProcess", e))
    }

    fn has_ended(&self, id: &ProcessId) -> Outcome<bool> {
        // A signal that there is not reaches nobody: the kernel says so, unless there is no
        // process, which these agents do not mind (`do_signal_process` of rpc.rs, 4.1).
        match self.signal_process(id, NO_SIGNAL) {
            Ok(()) => Ok(true),
            Err(Error::Refused { .. }) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn write_process_stdin(&self, id: &ProcessId, data: Vec<u8>) -> Outcome<u32> {
        let r = request!(WriteStreamRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            data: data,
        });
        let answer = self.link()?.agent.write_stdin(endless(), &r);
        answer.map(|a| a.len).map_err(|e| failed("WriteStdin", e))
    }

    fn read_process_stdout(&self, id: &ProcessId, max: u32) -> Outcome<Vec<u8>> {
        self.read(id, Stream::Out, max)
    }

    fn read_process_stderr(&self, id: &ProcessId, max: u32) -> Outcome<Vec<u8>> {
        self.read(id, Stream::Err, max)
    }

    fn close_process_stdin(&self, id: &ProcessId) -> Outcome<()> {
        let r = request!(CloseStdinRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
        });
        nothing("CloseStdin", self.link()?.agent.close_stdin(quick(), &r))
    }

    fn winsize_process(&self, id: &ProcessId, rows: u32, columns: u32) -> Outcome<()> {
        let r = request!(TtyWinResizeRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            row: rows,
            column: columns,
        });
        nothing("TtyWinResize", self.link()?.agent.tty_win_resize(quick(), &r))
    }

    fn stats_container(&self, container: &str) -> Outcome<StatsContainerResponse> {
        let r = request!(StatsContainerRequest { container_id: container.into() });
        self.link()?.agent.stats_container(quick(), &r).map_err(|e| failed("StatsContainer", e))
    }

    fn pause_container(&self, container: &str) -> Outcome<()> {
        let r = request!(PauseContainerRequest { container_id: container.into() });
        nothing("PauseContainer", self.link()?.agent.pause_container(quick(), &r))
    }

    fn resume_container(&self, container: &str) -> Outcome<()> {
        let r = request!(ResumeContainerRequest { container_id: container.into() });
        nothing("ResumeContainer", self.link()?.agent.resume_container(quick(), &r))
    }

    fn update_container(&self, container: &str, resources: LinuxResources) -> Outcome<()> {
        let r = request!(UpdateContainerRequest {
            container_id: container.into(),
            resources: Some(resources).into(),
        });
        nothing("UpdateContainer", self.link()?.agent.update_container(quick(), &r))
    }

    fn process_list_container(
        &self,
        container: &str,
        format: ListFormat,
        args: &[String],
    ) -> Outcome<Vec<u8>> {
        let r = request!(ListProcessesRequest {
            container_id: container.into(),
            format: format.name().into(),
            args: args.to_vec(),
        });
        let answer = self.link()?.agent.list_processes(quick(), &r);
        answer.map(|a| a.process_list).map_err(|e| failed("ListProcesses", e))
    }

    fn online_cpu_mem(&self, cpus: u32, cpu_only: bool) -> Outcome<()> {
        let r = request!(OnlineCPUMemRequest { wait: true, nb_cpus: cpus, cpu_only: cpu_only });
        nothing("OnlineCPUMem", self.link()?.agent.online_cpu_mem(quick(), &r))
    }

    fn mem_hotplug_by_probe(&self, addresses: &[u64]) -> Outcome<()> {
        let r = request!(MemHotplugByProbeRequest { memHotplugProbeAddr: addresses.to_vec() });
        nothing("MemHotplugByProbe", self.link()?.agent.mem_hotplug_by_probe(quick(), &r))
    }

    fn reseed_rng(&self, seed: &[u8]) -> Outcome<()> {
        let r = request!(ReseedRandomDevRequest { data: seed.to_vec() });
        nothing("ReseedRandomDev", self.link()?.agent.reseed_random_dev(quick(), &r))
    }

    fn set_guest_date_time(&self, time: Duration) -> Outcome<()> {
        let r = request!(SetGuestDateTimeRequest {
            Sec: time.as_secs().min(i64::MAX as u64) as i64,
            Usec: time.subsec_micros().into(),
        });
        nothing("SetGuestDateTime", self.link()?.agent.set_guest_date_time(quick(), &r))
    }

    fn copy_file(&self, r: CopyFileRequest) -> Outcome<()> {
        nothing("CopyFile", self.link()?.agent.copy_file(quick(), &r))
    }

    fn list_interfaces(&self) -> Outcome<Vec<Interface>> {
        let answer = self.link()?.agent.list_interfaces(quick(), &ListInterfacesRequest::default());
        answer.map(|a| a.Interfaces).map_err(|e| failed("ListInterfaces", e))
    }

    fn update_interface(&self, interface: Interface) -> Outcome<Interface> {
        let r = request!(UpdateInterfaceRequest { interface: Some(interface).into() });
        self.link()?.agent.update_interface(quick(), &r).map_err(|e| failed("UpdateInterface", e))
    }

    fn list_routes(&self) -> Outcome<Vec<Route>> {
        let answer = self.link()?.agent.list_routes(quick(), &ListRoutesRequest::default());
        answer.map(|a| a.Routes).map_err(|e| failed("ListRoutes", e))
    }

    fn update_routes(&self, routes: Vec<Route>) -> Outcome<Vec<Route>> {
        let routes = request!(Routes { Routes: routes });
        let r = request!(UpdateRoutesRequest { routes: Some(routes).into() });
        let answer = self.link()?.agent.update_routes(quick(), &r);
        answer.map(|a| a.Routes).map_err(|e| failed("UpdateRoutes", e))
    }
}

#[cfg(test)]
mod tests;
