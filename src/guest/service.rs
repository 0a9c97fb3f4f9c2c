//! The ttrpc services, call by call. Nothing is decided here: a call's fields
//! are handed to the module that does it.

use std::sync::Arc;
use std::time::Duration;

use ttrpc::{Server, TtrpcContext};

use super::cgroup::Cgroup;
use super::failure::{Failure, Outcome};
use super::sandbox::{with, Sandbox};
use super::{copy, identity, listing, memory, network, stats, storage, PROTOCOL_VERSION};
use crate::proto::agent::*;
use crate::proto::agent_ttrpc::{self, AgentService};
use crate::proto::empty::Empty;
use crate::proto::health::health_check_response::ServingStatus;
use crate::proto::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use crate::proto::health_ttrpc::{self, Health};
use crate::proto::types;

/// Idle threads that a connection keeps, at least and at most. A blocked call
/// (WaitProcess, ReadStdout) is not idle, so it never starves the others.
const IDLE_THREADS: (usize, usize) = (1, 4);

/// The agent, as its services see it.
#[derive(Clone)]
pub struct Agent {
    pub(super) sandbox: Arc<Sandbox>,
}

impl Agent {
    /// One that has no sandbox yet.
    pub fn new() -> Agent {
        Agent { sandbox: Arc::new(Sandbox::default()) }
    }
}

/// Starts a ttrpc server for `agent`, listening as `listen` says, and lets it
/// run for ever.
pub fn start(agent: Agent, listen: impl FnOnce(Server) -> ttrpc::Result<Server>) -> Outcome<()> {
    #[cfg(not(feature = "kata-habits"))]
    let (service, health) = (Arc::new(agent.clone()), Arc::new(agent));
    #[cfg(feature = "kata-habits")]
    let (service, health) = super::habits::services(agent);
    let service = agent_ttrpc::create_agent_service(service);
    let health = health_ttrpc::create_health(health);
    let server = Server::new()
        .set_thread_count_min(IDLE_THREADS.0)
        .set_thread_count_default(IDLE_THREADS.0 + 1)
        .set_thread_count_max(IDLE_THREADS.1);
    listen(server)
        .map(|s| s.register_service(service).register_service(health))
        .and_then(|mut server| {
            server.start()?;
            // Its threads run on without it; dropping it would stop them.
            std::mem::forget(server);
            Ok(())
        })
        .map_err(|e| Failure::internal(format!("start the ttrpc server: {e}")))
}

fn empty(done: Outcome<()>) -> ttrpc::Result<Empty> {
    done.map(|()| Empty::new()).map_err(ttrpc::Error::from)
}

fn answer<T>(done: Outcome<T>) -> ttrpc::Result<T> {
    done.map_err(ttrpc::Error::from)
}

impl Health for Agent {
    fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        let status = ServingStatus::SERVING.into();
        Ok(HealthCheckResponse { status, ..HealthCheckResponse::default() })
    }

    fn version(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: PROTOCOL_VERSION.to_string(),
            agent_version: env!("CARGO_PKG_VERSION").to_string(),
            ..VersionCheckResponse::default()
        })
    }
}

impl AgentService for Agent {
    fn create_sandbox(&self, _: &TtrpcContext, r: CreateSandboxRequest) -> ttrpc::Result<Empty> {
        empty(self.sandbox.create(&r))
    }

    fn destroy_sandbox(&self, _: &TtrpcContext, _: DestroySandboxRequest) -> ttrpc::Result<Empty> {
        empty(self.sandbox.destroy())
    }

    fn create_container(
        &self,
        _: &TtrpcContext,
        r: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        empty(self.sandbox.create_container(r))
    }

    fn start_container(&self, _: &TtrpcContext, r: StartContainerRequest) -> ttrpc::Result<Empty> {
        empty(self.sandbox.start_container(&r.container_id))
    }

    fn remove_container(
        &self,
        _: &TtrpcContext,
        r: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let within = Duration::from_secs(r.timeout.into());
        empty(self.sandbox.remove_container(&r.container_id, within))
    }

    fn exec_process(&self, _: &TtrpcContext, r: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let Some(process) = r.process.into_option() else {
            return empty(Err(Failure::invalid("no process to execute")));
        };
        empty(self.sandbox.exec(&r.container_id, &r.exec_id, process))
    }

    fn signal_process(&self, _: &TtrpcContext, r: SignalProcessRequest) -> ttrpc::Result<Empty> {
        empty(self.sandbox.signal(&r.container_id, &r.exec_id, r.signal))
    }

    fn wait_process(
        &self,
        _: &TtrpcContext,
        r: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let process = answer(self.sandbox.process(&r.container_id, &r.exec_id))?;
        Ok(WaitProcessResponse { status: process.wait(), ..WaitProcessResponse::default() })
    }

    fn write_stdin(
        &self,
        _: &TtrpcContext,
        r: WriteStreamRequest,
    ) -> ttrpc::Result<WriteStreamResponse> {
        let process = self.sandbox.process(&r.container_id, &r.exec_id);
        let len = answer(process.and_then(|p| p.write_stdin(&r.data)))?;
        Ok(WriteStreamResponse { len, ..WriteStreamResponse::default() })
    }

    fn close_stdin(&self, _: &TtrpcContext, r: CloseStdinRequest) -> ttrpc::Result<Empty> {
        let process = self.sandbox.process(&r.container_id, &r.exec_id);
        empty(process.map(|p| p.close_stdin()))
    }

    fn read_stdout(
        &self,
        _: &TtrpcContext,
        r: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        self.read(r, false)
    }

    fn read_stderr(
        &self,
        _: &TtrpcContext,
        r: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        self.read(r, true)
    }

    fn tty_win_resize(&self, _: &TtrpcContext, r: TtyWinResizeRequest) -> ttrpc::Result<Empty> {
        let process = self.sandbox.process(&r.container_id, &r.exec_id);
        empty(process.and_then(|p| p.resize(r.row, r.column)))
    }

    fn stats_container(
        &self,
        _: &TtrpcContext,
        r: StatsContainerRequest,
    ) -> ttrpc::Result<StatsContainerResponse> {
        let group = answer(self.group(&r.container_id))?;
        Ok(stats::read(&group))
    }

    fn pause_container(&self, _: &TtrpcContext, r: PauseContainerRequest) -> ttrpc::Result<Empty> {
        let container = answer(self.sandbox.container(&r.container_id))?;
        empty(with(&container, |c| c.cgroup.freeze(true)))
    }

    fn resume_container(
        &self,
        _: &TtrpcContext,
        r: ResumeContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = answer(self.sandbox.container(&r.container_id))?;
        empty(with(&container, |c| c.cgroup.freeze(false)))
    }

    fn update_container(
        &self,
        _: &TtrpcContext,
        r: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = answer(self.sandbox.container(&r.container_id))?;
        empty(with(&container, |c| c.cgroup.apply(&r.resources)))
    }

    fn list_processes(
        &self,
        _: &TtrpcContext,
        r: ListProcessesRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let pids = match r.container_id.as_str() {
            "" => listing::everything(),
            id => answer(self.group(id))?.pids(),
        };
        let process_list =
            answer(listing::processes(pids, &self.sandbox.started(), &r.format, &r.args))?;
        Ok(ListProcessesResponse { process_list, ..ListProcessesResponse::default() })
    }

    fn online_cpu_mem(&self, _: &TtrpcContext, r: OnlineCPUMemRequest) -> ttrpc::Result<Empty> {
        let online = identity::online(r.nb_cpus, r.cpu_only, r.wait);
        memory::grow();
        empty(online)
    }

    fn mem_hotplug_by_probe(
        &self,
        _: &TtrpcContext,
        r: MemHotplugByProbeRequest,
    ) -> ttrpc::Result<Empty> {
        let known = identity::probe(&r.memHotplugProbeAddr);
        memory::grow();
        empty(known)
    }

    fn reseed_random_dev(
        &self,
        _: &TtrpcContext,
        r: ReseedRandomDevRequest,
    ) -> ttrpc::Result<Empty> {
        empty(identity::reseed(&r.data))
    }

    fn set_guest_date_time(
        &self,
        _: &TtrpcContext,
        r: SetGuestDateTimeRequest,
    ) -> ttrpc::Result<Empty> {
        empty(identity::set_clock(r.Sec, r.Usec))
    }

    fn get_guest_details(
        &self,
        _: &TtrpcContext,
        r: GuestDetailsRequest,
    ) -> ttrpc::Result<GuestDetailsResponse> {
        let details = AgentDetails {
            version: env!("CARGO_PKG_VERSION").to_string(),
            init_daemon: true,
            storage_handlers: storage::handlers(),
            // By which a host tells it from Kata's.
            extra_features: vec![crate::transport::OWN_AGENT.to_string()],
            ..AgentDetails::default()
        };
        let mut out = identity::details(r.mem_block_size, r.mem_hotplug_probe);
        out.agent_details = Some(details).into();
        Ok(out)
    }

    fn copy_file(&self, _: &TtrpcContext, r: CopyFileRequest) -> ttrpc::Result<Empty> {
        empty(copy::store(&r))
    }

    fn list_interfaces(
        &self,
        _: &TtrpcContext,
        _: ListInterfacesRequest,
    ) -> ttrpc::Result<Interfaces> {
        let list = answer(network::interfaces())?;
        Ok(Interfaces { Interfaces: list, ..Interfaces::default() })
    }

    fn update_interface(
        &self,
        _: &TtrpcContext,
        r: UpdateInterfaceRequest,
    ) -> ttrpc::Result<types::Interface> {
        let Some(wanted) = r.interface.into_option() else {
            return Err(Failure::invalid("no interface to update").into());
        };
        answer(network::update_interface(&wanted).map(|()| wanted))
    }

    fn list_routes(&self, _: &TtrpcContext, _: ListRoutesRequest) -> ttrpc::Result<Routes> {
        let list = answer(network::routes())?;
        Ok(Routes { Routes: list, ..Routes::default() })
    }

    fn update_routes(&self, _: &TtrpcContext, r: UpdateRoutesRequest) -> ttrpc::Result<Routes> {
        answer(network::update_routes(&r.routes.Routes))?;
        let list = answer(network::routes())?;
        Ok(Routes { Routes: list, ..Routes::default() })
    }
}

impl Agent {
    /// A container's control group; all containers' for an empty id, which
    /// Kata's agents do not have.
    fn group(&self, id: &str) -> Outcome<Cgroup> {
        match id {
            "" => Ok(Cgroup::all()),
            id => self.sandbox.container(id).map(|c| with(&c, |c| c.cgroup.clone())),
        }
    }

    fn read(&self, r: ReadStreamRequest, stderr: bool) -> ttrpc::Result<ReadStreamResponse> {
        let process = self.sandbox.process(&r.container_id, &r.exec_id);
        let data = answer(process.and_then(|p| p.read(stderr, r.len)))?;
        Ok(ReadStreamResponse { data, ..ReadStreamResponse::default() })
    }
}
