//! Kata's agent protocol of 2.x and later: ttrpc, services `grpc.AgentService`
//! and `grpc.Health`. Our own guest agent speaks it too.
//!
//! Sources: Kata's agent.proto and health.proto; the ttrpc protocol of
//! containerd.

use std::net::Shutdown;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use ttrpc::context::{with_duration, Context};
use ttrpc::Code;

use super::address::Address;
use super::{Agent, Error, Kind, Outcome, ProcessId, Stream};
use crate::proto::agent::*;
use crate::proto::agent_ttrpc::AgentServiceClient;
use crate::proto::health::{CheckRequest, HealthCheckResponse};
use crate::proto::health_ttrpc::HealthClient;
use crate::proto::oci::{LinuxResources, Process};
use crate::proto::types::{Interface, Route};
use crate::transport::serial::FAREWELL;

/// Deadline of a call that does not wait for a process.
pub const CALL: Duration = Duration::from_secs(30);

/// What an agent has beyond the time that a request allows it.
const ANSWERING: Duration = Duration::from_secs(5);

/// How long one of a guest's ports may be silent before another is tried.
const PATIENCE: Duration = Duration::from_secs(4);

/// A connection to an agent.
///
/// Invariant: the connection ends when this is dropped, whatever the client
/// library's threads wait for.
pub struct KataAgent {
    agent: AgentServiceClient,
    health: HealthClient,
    stream: UnixStream,
}

impl Drop for KataAgent {
    fn drop(&mut self) {
        // The library's reader holds the connection while it waits, so
        // dropping the library's client alone may never close it.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl KataAgent {
    /// Connects to the agent of a guest that is up; it has answered when this
    /// returns.
    ///
    /// # Errors
    /// [`Error::Connect`] when nothing answers.
    pub fn connect(address: &Address, within: Duration) -> Outcome<KataAgent> {
        KataAgent::over(address.connect(within, PATIENCE)?)
    }

    /// The same for a guest that may still be booting.
    ///
    /// # Errors
    /// [`Error::Connect`] when nothing answers.
    pub fn await_boot(address: &Address, within: Duration) -> Outcome<KataAgent> {
        KataAgent::over(address.connect(within, within)?)
    }

    fn over(stream: UnixStream) -> Outcome<KataAgent> {
        let kept = stream
            .try_clone()
            .map_err(|source| Error::Host { during: "duplicate a connection", source })?;
        let fd = OwnedFd::from(stream).into_raw_fd();
        let client = ttrpc::Client::new(fd).map_err(|e| failed("connect", e))?;
        Ok(KataAgent {
            agent: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client),
            stream: kept,
        })
    }
}

fn failed(call: &'static str, e: ttrpc::Error) -> Error {
    match e {
        ttrpc::Error::RpcStatus(status) => {
            let code = status.code();
            let missing = code == Code::UNIMPLEMENTED
                || (code == Code::INVALID_ARGUMENT && status.message.ends_with("does not exist"));
            if missing {
                return Error::Unsupported { call };
            }
            Error::Refused { call, code, text: status.message }
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

macro_rules! request {
    ($kind:ident { $($field:ident : $value:expr),* $(,)? }) => {
        $kind { $($field: $value,)* ..$kind::default() }
    };
}

impl Agent for KataAgent {
    fn kind(&self) -> Kind {
        Kind::Kata
    }

    fn leave(self: Box<Self>) {
        let _ = self.stream.shutdown(Shutdown::Write);
        let hung_up = PollFd::new(self.stream.as_fd(), PollFlags::empty());
        let timeout = PollTimeout::try_from(FAREWELL).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut [hung_up], timeout);
    }

    fn check(&self, within: Duration) -> Outcome<()> {
        let answer: HealthCheckResponse = self
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
        let answer = self.health.version(quick(), &CheckRequest::default());
        answer.map(|v| (v.grpc_version, v.agent_version)).map_err(|e| failed("Version", e))
    }

    fn guest_details(&self) -> Outcome<GuestDetailsResponse> {
        let r = request!(GuestDetailsRequest { mem_block_size: true, mem_hotplug_probe: true });
        self.agent.get_guest_details(quick(), &r).map_err(|e| failed("GetGuestDetails", e))
    }

    fn create_sandbox(&self, r: CreateSandboxRequest) -> Outcome<()> {
        nothing("CreateSandbox", self.agent.create_sandbox(quick(), &r))
    }

    fn destroy_sandbox(&self) -> Outcome<()> {
        let r = DestroySandboxRequest::default();
        nothing("DestroySandbox", self.agent.destroy_sandbox(quick(), &r))
    }

    fn create_container(&self, r: CreateContainerRequest) -> Outcome<()> {
        nothing("CreateContainer", self.agent.create_container(quick(), &r))
    }

    fn start_container(&self, container: &str) -> Outcome<()> {
        let r = request!(StartContainerRequest { container_id: container.into() });
        nothing("StartContainer", self.agent.start_container(quick(), &r))
    }

    fn remove_container(&self, container: &str, within: Duration) -> Outcome<()> {
        let timeout = within.as_secs().clamp(1, 3600) as u32;
        let r =
            request!(RemoveContainerRequest { container_id: container.into(), timeout: timeout });
        let context = with_duration(within + ANSWERING);
        nothing("RemoveContainer", self.agent.remove_container(context, &r))
    }

    fn exec_process(&self, id: &ProcessId, process: Process) -> Outcome<()> {
        let r = request!(ExecProcessRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            process: Some(process).into(),
        });
        nothing("ExecProcess", self.agent.exec_process(quick(), &r))
    }

    fn signal_process(&self, id: &ProcessId, signal: u32) -> Outcome<()> {
        let r = request!(SignalProcessRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            signal: signal,
        });
        nothing("SignalProcess", self.agent.signal_process(quick(), &r))
    }

    fn wait_process(&self, id: &ProcessId, within: Option<Duration>) -> Outcome<i32> {
        let r = request!(WaitProcessRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
        });
        let context = within.map_or_else(endless, with_duration);
        let answer = self.agent.wait_process(context, &r);
        answer.map(|a| a.status).map_err(|e| failed("WaitProcess", e))
    }

    fn write_stdin(&self, id: &ProcessId, data: Vec<u8>) -> Outcome<u32> {
        let r = request!(WriteStreamRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            data: data,
        });
        let answer = self.agent.write_stdin(endless(), &r);
        answer.map(|a| a.len).map_err(|e| failed("WriteStdin", e))
    }

    fn read_stream(&self, id: &ProcessId, stream: Stream, max: u32) -> Outcome<Vec<u8>> {
        let r = request!(ReadStreamRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            len: max,
        });
        let (call, answer) = match stream {
            Stream::Out => ("ReadStdout", self.agent.read_stdout(endless(), &r)),
            Stream::Err => ("ReadStderr", self.agent.read_stderr(endless(), &r)),
        };
        answer.map(|a| a.data).map_err(|e| failed(call, e))
    }

    fn close_stdin(&self, id: &ProcessId) -> Outcome<()> {
        let r = request!(CloseStdinRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
        });
        nothing("CloseStdin", self.agent.close_stdin(endless(), &r))
    }

    fn resize_terminal(&self, id: &ProcessId, rows: u32, columns: u32) -> Outcome<()> {
        let r = request!(TtyWinResizeRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            row: rows,
            column: columns,
        });
        nothing("TtyWinResize", self.agent.tty_win_resize(quick(), &r))
    }

    fn stats_container(&self, container: &str) -> Outcome<StatsContainerResponse> {
        let r = request!(StatsContainerRequest { container_id: container.into() });
        self.agent.stats_container(quick(), &r).map_err(|e| failed("StatsContainer", e))
    }

    fn pause_container(&self, container: &str) -> Outcome<()> {
        let r = request!(PauseContainerRequest { container_id: container.into() });
        nothing("PauseContainer", self.agent.pause_container(quick(), &r))
    }

    fn resume_container(&self, container: &str) -> Outcome<()> {
        let r = request!(ResumeContainerRequest { container_id: container.into() });
        nothing("ResumeContainer", self.agent.resume_container(quick(), &r))
    }

    fn update_container(&self, container: &str, resources: LinuxResources) -> Outcome<()> {
        let r = request!(UpdateContainerRequest {
            container_id: container.into(),
            resources: Some(resources).into(),
        });
        nothing("UpdateContainer", self.agent.update_container(quick(), &r))
    }

    fn list_processes(&self, container: &str, format: &str) -> Outcome<Vec<u8>> {
        let r = request!(ListProcessesRequest {
            container_id: container.into(),
            format: format.into(),
        });
        let answer = self.agent.list_processes(quick(), &r);
        answer.map(|a| a.process_list).map_err(|e| failed("ListProcesses", e))
    }

    fn online_cpu_mem(&self, cpus: u32, cpu_only: bool) -> Outcome<()> {
        let r = request!(OnlineCPUMemRequest { wait: true, nb_cpus: cpus, cpu_only: cpu_only });
        nothing("OnlineCPUMem", self.agent.online_cpu_mem(quick(), &r))
    }

    fn reseed_rng(&self, seed: &[u8]) -> Outcome<()> {
        let r = request!(ReseedRandomDevRequest { data: seed.to_vec() });
        nothing("ReseedRandomDev", self.agent.reseed_random_dev(quick(), &r))
    }

    fn set_guest_date_time(&self, time: Duration) -> Outcome<()> {
        let r = request!(SetGuestDateTimeRequest {
            Sec: time.as_secs().min(i64::MAX as u64) as i64,
            Usec: time.subsec_micros().into(),
        });
        nothing("SetGuestDateTime", self.agent.set_guest_date_time(quick(), &r))
    }

    fn copy_file(&self, r: CopyFileRequest) -> Outcome<()> {
        nothing("CopyFile", self.agent.copy_file(quick(), &r))
    }

    fn list_interfaces(&self) -> Outcome<Vec<Interface>> {
        let answer = self.agent.list_interfaces(quick(), &ListInterfacesRequest::default());
        answer.map(|a| a.Interfaces).map_err(|e| failed("ListInterfaces", e))
    }

    fn update_interface(&self, interface: Interface) -> Outcome<Interface> {
        let r = request!(UpdateInterfaceRequest { interface: Some(interface).into() });
        self.agent.update_interface(quick(), &r).map_err(|e| failed("UpdateInterface", e))
    }

    fn list_routes(&self) -> Outcome<Vec<Route>> {
        let answer = self.agent.list_routes(quick(), &ListRoutesRequest::default());
        answer.map(|a| a.Routes).map_err(|e| failed("ListRoutes", e))
    }

    fn update_routes(&self, routes: Vec<Route>) -> Outcome<Vec<Route>> {
        let routes = request!(Routes { Routes: routes });
        let r = request!(UpdateRoutesRequest { routes: Some(routes).into() });
        let answer = self.agent.update_routes(quick(), &r);
        answer.map(|a| a.Routes).map_err(|e| failed("UpdateRoutes", e))
    }
}
