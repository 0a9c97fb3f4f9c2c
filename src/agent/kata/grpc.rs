//! Kata's agent of 1.x: gRPC, over vsock directly, or through a proxy
//! ([`crate::transport::proxy`]) to its serial port.
//!
//! Invariant: an agent of 1.x takes a known field of another type for garbage, so
//! what later versions mean by the same numbers is renumbered or refused
//! (`version_1`).
//!
//! Source: agent.proto and health.proto of Kata's agent 1.13, and its server.

mod connection;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ttrpc::Code;

pub use connection::Connection;
use connection::{endless, failed, nothing, quick, within};

use super::super::address::Address;
use super::super::link::{Link, Slot};
use super::super::seat::{self, Capabilities, Channel, ProxyCommand, Seat};
use super::super::{Agent, Error, Kind, ListFormat, Outcome, ProcessId, PS_ARGS};
use super::{version_1, ANSWERING, CALL, CAPABILITIES, MUX_SOCKET, START};
use crate::process::attendant::{Attendant, Role};
use crate::proto::agent::*;
use crate::proto::health::CheckRequest;
use crate::proto::oci::{LinuxResources, Process};
use crate::proto::types::{Interface, Route};
use crate::sys::cage::Cage;

/// An agent of 1.x.
pub struct Kata1Agent {
    address: Address,
    slot: Slot<Connection>,
}

/// Agents of 1.x know a container's own process by its container's name, which is
/// the id that it is made with.
fn exec_id(id: &ProcessId) -> String {
    if id.exec.is_empty() { &id.container } else { &id.exec }.clone()
}

/// The end of a stream is an error without a code there: of a pipe io.EOF, of a terminal what
/// read(2) says once all have closed it.
///
/// Source: `readStdio` of agent.go and epoll.go, kata-containers/agent 1.13.
fn end_of_stream(answer: Outcome<ReadStreamResponse>) -> Outcome<Vec<u8>> {
    match answer {
        Ok(answer) => Ok(answer.data),
        Err(Error::Refused { code: Code::UNKNOWN, text, .. })
            if text == "EOF" || text.ends_with(": input/output error") =>
        {
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

impl Kata1Agent {
    /// The one at an address.
    pub fn at(address: Address) -> Kata1Agent {
        Kata1Agent { address, slot: Slot::empty() }
    }

    /// One that is connected already, at an address that leads nowhere.
    pub(in super::super) fn over(stream: UnixStream) -> Outcome<Kata1Agent> {
        let agent = Kata1Agent::at(Address::Proxy(PathBuf::from("/nonexistent/proxy.sock")));
        agent.slot.put(Arc::new(Connection::over(stream)?));
        Ok(agent)
    }

    fn dial(&self, time: Duration) -> Outcome<Connection> {
        Connection::over(self.address.dial(time, time)?)
    }

    fn link(&self) -> Outcome<Arc<Connection>> {
        self.slot.get(|| self.dial(CALL))
    }

    fn health(&self, time: Duration) -> Outcome<()> {
        let link = self.slot.get(|| self.dial(time))?;
        let answer = link.health.check_opt(&CheckRequest::default(), within(time));
        match answer.map_err(|e| failed("Check", e))?.status.value() {
            1 => Ok(()),
            other => {
                Err(Error::Call { call: "Check", text: format!("status {other}, not serving") })
            }
        }
    }

    fn read_request(id: &ProcessId, max: u32) -> ReadStreamRequest {
        request!(ReadStreamRequest {
            container_id: id.container.clone(),
            exec_id: exec_id(id),
            len: max,
        })
    }
}

impl Agent for Kata1Agent {
    fn kind(&self) -> Kind {
        Kind::Kata1
    }

    fn capabilities(&self) -> Capabilities {
        CAPABILITIES
    }

    fn configure(&mut self, seat: &Seat) -> Outcome<Vec<Channel>> {
        self.address = Address::of(Kind::Kata1, &seat.dir, seat.way);
        super::channels_1(seat)
    }

    fn configure_from_grpc(&mut self, config: &[u8]) -> Outcome<()> {
        seat::config_object(config).map(|_| ())
    }

    fn start_proxy(&mut self, command: &ProxyCommand) -> Outcome<Option<Attendant>> {
        let Address::Proxy(socket) = &self.address else { return Ok(None) };
        let dir = socket.parent().unwrap_or(Path::new("/"));
        let mut args: Vec<String> = command.subcommand.iter().map(|s| s.to_string()).collect();
        args.extend(["-listen-socket".into(), format!("unix://{}", socket.display())]);
        args.extend(["-mux-socket".into(), dir.join(MUX_SOCKET).display().to_string()]);
        args.extend(["-sandbox".into(), command.sandbox.clone()]);
        if command.debug {
            let console = dir.join("console.sock").display().to_string();
            args.extend(["-log".into(), "debug".into(), "-agent-logs-socket".into(), console]);
        }
        let args: Vec<_> = args.into_iter().map(Into::into).collect();
        let started = Attendant::start(
            Role::Proxy,
            &command.program,
            &args,
            &[],
            command.leased,
            Cage::default(),
        );
        started.map(Some).map_err(|e| Error::Host {
            during: "start the proxy to the agent",
            source: std::io::Error::other(e),
        })
    }

    fn set_proxy(&mut self, url: &str) -> Outcome<()> {
        self.address = Address::parse(Kind::Kata1, url)?;
        self.slot.take();
        Ok(())
    }

    fn address(&self) -> &Address {
        &self.address
    }

    fn reuse(&mut self, other: Box<dyn Agent>) -> Outcome<()> {
        self.slot.take_over(&mut self.address, other, |link| match link {
            Link::Grpc(link) => Some(link),
            _ => None,
        })
    }

    fn give_link(self: Box<Self>) -> Option<Link> {
        self.slot.take().map(Link::Grpc)
    }

    fn share_path(&self, sandbox: &str) -> PathBuf {
        super::share_path(sandbox)
    }

    fn connect(&self, time: Duration, _: bool) -> Outcome<()> {
        // A proxy accepts whether or not there is an agent behind it.
        self.health(time)
    }

    fn disconnect(&self) {
        self.slot.take();
    }

    fn hang_up(&self) {
        // Calls that wait hold the connection, too: dropping it here does not end it.
        if let Some(link) = self.slot.take() {
            link.hang_up();
        }
    }

    fn check(&self, time: Duration) -> Outcome<()> {
        self.health(time)
    }

    fn version(&self) -> Outcome<(String, String)> {
        let answer = self.link()?.health.version_opt(&CheckRequest::default(), quick());
        answer.map(|v| (v.grpc_version, v.agent_version)).map_err(|e| failed("Version", e))
    }

    fn guest_details(&self) -> Outcome<GuestDetailsResponse> {
        let r = request!(GuestDetailsRequest { mem_block_size: true, mem_hotplug_probe: true });
        let answer = self.link()?.agent.get_guest_details_opt(&r, quick());
        answer.map_err(|e| failed("GetGuestDetails", e))
    }

    fn online_cpu_mem(&self, cpus: u32, cpu_only: bool) -> Outcome<()> {
        let r = request!(OnlineCPUMemRequest { wait: true, nb_cpus: cpus, cpu_only: cpu_only });
        nothing("OnlineCPUMem", self.link()?.agent.online_cpu_mem_opt(&r, quick()))
    }

    fn mem_hotplug_by_probe(&self, addresses: &[u64]) -> Outcome<()> {
        let r = request!(MemHotplugByProbeRequest { memHotplugProbeAddr: addresses.to_vec() });
        nothing("MemHotplugByProbe", self.link()?.agent.mem_hotplug_by_probe_opt(&r, quick()))
    }

    fn reseed_rng(&self, seed: &[u8]) -> Outcome<()> {
        let r = request!(ReseedRandomDevRequest { data: seed.to_vec() });
        nothing("ReseedRandomDev", self.link()?.agent.reseed_random_dev_opt(&r, quick()))
    }

    fn set_guest_date_time(&self, time: Duration) -> Outcome<()> {
        let r = request!(SetGuestDateTimeRequest {
            Sec: time.as_secs().min(i64::MAX as u64) as i64,
            Usec: time.subsec_micros().into(),
        });
        nothing("SetGuestDateTime", self.link()?.agent.set_guest_date_time_opt(&r, quick()))
    }

    fn copy_file(&self, r: CopyFileRequest) -> Outcome<()> {
        nothing("CopyFile", self.link()?.agent.copy_file_opt(&r, quick()))
    }

    fn list_interfaces(&self) -> Outcome<Vec<Interface>> {
        let answer = self.link()?.agent.list_interfaces_opt(&Default::default(), quick());
        answer.map(|a| a.Interfaces).map_err(|e| failed("ListInterfaces", e))
    }

    fn update_interface(&self, interface: Interface) -> Outcome<Interface> {
        let r = request!(UpdateInterfaceRequest { interface: Some(interface).into() });
        let answer = self.link()?.agent.update_interface_opt(&r, quick());
        answer.map_err(|e| failed("UpdateInterface", e))
    }

    fn list_routes(&self) -> Outcome<Vec<Route>> {
        let answer = self.link()?.agent.list_routes_opt(&Default::default(), quick());
        answer.map(|a| a.Routes).map_err(|e| failed("ListRoutes", e))
    }

    fn update_routes(&self, routes: Vec<Route>) -> Outcome<Vec<Route>> {
        let routes = request!(Routes { Routes: routes });
        let r = request!(UpdateRoutesRequest { routes: Some(routes).into() });
        let answer = self.link()?.agent.update_routes_opt(&r, quick());
        answer.map(|a| a.Routes).map_err(|e| failed("UpdateRoutes", e))
    }

    fn start_sandbox(&self, r: CreateSandboxRequest) -> Outcome<()> {
        nothing("CreateSandbox", self.link()?.agent.create_sandbox_opt(&r, quick()))
    }

    fn stop_sandbox(&self) -> Outcome<()> {
        let r = DestroySandboxRequest::default();
        nothing("DestroySandbox", self.link()?.agent.destroy_sandbox_opt(&r, quick()))
    }

    fn create_container(&self, mut r: CreateContainerRequest) -> Outcome<()> {
        if !r.shared_mounts.is_empty() {
            let why = "agents of 1.x have no mounts shared between containers".into();
            return Err(Error::Request { call: "CreateContainer", why });
        }
        if let Some(spec) = r.OCI.as_mut() {
            version_1::adapt(spec)?;
        }
        nothing("CreateContainer", self.link()?.agent.create_container_opt(&r, within(START)))
    }

    fn start_container(&self, container: &str) -> Outcome<()> {
        let r = request!(StartContainerRequest { container_id: container.into() });
        nothing("StartContainer", self.link()?.agent.start_container_opt(&r, within(START)))
    }

    fn stop_container(&self, container: &str, time: Duration) -> Outcome<()> {
        let timeout = time.as_secs().clamp(1, 3600) as u32;
        let r =
            request!(RemoveContainerRequest { container_id: container.into(), timeout: timeout });
        let option = within(time + ANSWERING);
        nothing("RemoveContainer", self.link()?.agent.remove_container_opt(&r, option))
    }

    fn update_container(&self, container: &str, resources: LinuxResources) -> Outcome<()> {
        let r = request!(UpdateContainerRequest {
            container_id: container.into(),
            resources: Some(resources).into(),
        });
        nothing("UpdateContainer", self.link()?.agent.update_container_opt(&r, quick()))
    }

    fn stats_container(&self, container: &str) -> Outcome<StatsContainerResponse> {
        let r = request!(StatsContainerRequest { container_id: container.into() });
        let answer = self.link()?.agent.stats_container_opt(&r, quick());
        answer.map_err(|e| failed("StatsContainer", e))
    }

    fn pause_container(&self, container: &str) -> Outcome<()> {
        let r = request!(PauseContainerRequest { container_id: container.into() });
        nothing("PauseContainer", self.link()?.agent.pause_container_opt(&r, quick()))
    }

    fn resume_container(&self, container: &str) -> Outcome<()> {
        let r = request!(ResumeContainerRequest { container_id: container.into() });
        nothing("ResumeContainer", self.link()?.agent.resume_container_opt(&r, quick()))
    }

    fn process_list_container(
        &self,
        container: &str,
        format: ListFormat,
        args: &[String],
    ) -> Outcome<Vec<u8>> {
        let args = match (format, args) {
            (ListFormat::Table, []) => vec![PS_ARGS.to_string()],
            (_, args) => args.to_vec(),
        };
        let r = request!(ListProcessesRequest {
            container_id: container.into(),
            format: format.name().into(),
            args: args,
        });
        let answer = self.link()?.agent.list_processes_opt(&r, quick());
        answer.map(|a| a.process_list).map_err(|e| failed("ListProcesses", e))
    }

    fn exec(&self, id: &ProcessId, process: Process) -> Outcome<()> {
        let r = request!(ExecProcessRequest {
            container_id: id.container.clone(),
            exec_id: id.exec.clone(),
            process: Some(process).into(),
        });
        nothing("ExecProcess", self.link()?.agent.exec_process_opt(&r, within(START)))
    }

    fn signal_process(&self, id: &ProcessId, signal: u32) -> Outcome<()> {
        // By its name: without one, all processes of the container are meant.
        let r = request!(SignalProcessRequest {
            container_id: id.container.clone(),
            exec_id: exec_id(id),
            signal: signal,
        });
        nothing("SignalProcess", self.link()?.agent.signal_process_opt(&r, quick()))
    }

    fn wait_process(&self, id: &ProcessId, time: Option<Duration>) -> Outcome<i32> {
        let r = request!(WaitProcessRequest {
            container_id: id.container.clone(),
            exec_id: exec_id(id),
        });
        let option = time.map_or_else(endless, within);
        let answer = self.link()?.agent.wait_process_opt(&r, option);
        answer.map(|a| a.status).map_err(|e| failed("WaitProcess", e))
    }

    fn has_ended(&self, id: &ProcessId) -> Outcome<bool> {
        // Of a container's own process they never say it; its streams end with all that is in
        // the container (`SignalProcess` of grpc.go, kata-containers/agent 1.13).
        match self.signal_process(id, 0) {
            Err(Error::Refused { text, .. }) => Ok(text.ends_with("no such process")),
            Ok(()) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn write_process_stdin(&self, id: &ProcessId, data: Vec<u8>) -> Outcome<u32> {
        let r = request!(WriteStreamRequest {
            container_id: id.container.clone(),
            exec_id: exec_id(id),
            data: data,
        });
        let answer = self.link()?.agent.write_stdin_opt(&r, endless());
        answer.map(|a| a.len).map_err(|e| failed("WriteStdin", e))
    }

    fn close_process_stdin(&self, id: &ProcessId) -> Outcome<()> {
        let r = request!(CloseStdinRequest {
            container_id: id.container.clone(),
            exec_id: exec_id(id),
        });
        nothing("CloseStdin", self.link()?.agent.close_stdin_opt(&r, quick()))
    }

    fn read_process_stdout(&self, id: &ProcessId, max: u32) -> Outcome<Vec<u8>> {
        let answer = self.link()?.agent.read_stdout_opt(&Self::read_request(id, max), endless());
        end_of_stream(answer.map_err(|e| failed("ReadStdout", e)))
    }

    fn read_process_stderr(&self, id: &ProcessId, max: u32) -> Outcome<Vec<u8>> {
        let answer = self.link()?.agent.read_stderr_opt(&Self::read_request(id, max), endless());
        end_of_stream(answer.map_err(|e| failed("ReadStderr", e)))
    }

    fn winsize_process(&self, id: &ProcessId, rows: u32, columns: u32) -> Outcome<()> {
        let r = request!(TtyWinResizeRequest {
            container_id: id.container.clone(),
            exec_id: exec_id(id),
            row: rows,
            column: columns,
        });
        nothing("TtyWinResize", self.link()?.agent.tty_win_resize_opt(&r, quick()))
    }
}
