//! The grpccache factory: the client of a server's pool.
//!
//! Claims by our own call, which has to be confirmed; with a stock server, by
//! Kata's four.
//!
//! Invariants: a VM that was received is owned by the [`Vm`] that is returned;
//! one that can not be taken over is reported with its id.

mod error;
mod patience;
mod telling;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

pub use error::Error;
use grpcio::{CallOption, ChannelBuilder, EnvBuilder, Environment, MetadataBuilder, RpcStatusCode};
use telling::Telling;

use super::{BaseFactory, VmStatus};
use crate::proto::cache::{GrpcStatus, GrpcVM, GrpcVMConfig};
use crate::proto::cache_grpc::CacheServiceClient;
use crate::proto::control::{ClaimRequest, ResizeRequest, UsedRequest, VmName};
use crate::proto::control_grpc::ControlClient;
use crate::proto::empty::Empty;
use crate::sys::rpc::channel_over;
use crate::vm::{wire, Vm, VmConfig};

/// Header by which a client asks that its VM ends when it does itself.
pub const LEASE_HEADER: &str = "vmcache-lease";
/// Deadline of a call that waits for nothing.
const CALL: Duration = Duration::from_secs(10);
/// Largest answer taken, in bytes.
const MAX_ANSWER: i32 = 16 * 1024 * 1024;

/// Whether VMs end with the process that claims them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lease {
    No,
    Process,
    UntilKept,
}

/// A connection to a server. Dropped, it goes when what it told has arrived, or five
/// seconds later.
pub struct GrpcCache {
    // First, so that the channel outlives it.
    telling: Telling,
    endpoint: PathBuf,
    cache: CacheServiceClient,
    control: ControlClient,
    lease: Lease,
    label: String,
    /// CPUs and memory (MiB) to which its VMs must be able to grow; 0: as they are.
    size: (u32, u32),
    /// What the server says of its VMs: it does not change while it runs.
    served: OnceLock<VmConfig>,
    // Last, so that its threads outlive the channel.
    _environment: Arc<Environment>,
}

impl GrpcCache {
    /// Connects to a server's socket.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub fn connect(endpoint: &Path) -> Result<GrpcCache, Error> {
        let unreachable = |source| Error::Unreachable { endpoint: endpoint.to_path_buf(), source };
        let stream = UnixStream::connect(endpoint).map_err(unreachable)?;
        GrpcCache::over(stream, endpoint, environment())
    }

    /// Over a connection to a server's socket, which was made already.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    pub fn over(
        stream: UnixStream,
        endpoint: &Path,
        environment: Arc<Environment>,
    ) -> Result<GrpcCache, Error> {
        let unreachable = |source| Error::Unreachable { endpoint: endpoint.to_path_buf(), source };
        let builder = ChannelBuilder::new(Arc::clone(&environment))
            .max_receive_message_len(MAX_ANSWER)
            .http2_bdp_probe(false);
        let channel = channel_over(builder, "vmcache", stream).map_err(unreachable)?;
        Ok(GrpcCache {
            telling: Telling::new(),
            endpoint: endpoint.to_path_buf(),
            cache: CacheServiceClient::new(channel.clone()),
            control: ControlClient::new(channel),
            lease: Lease::No,
            label: String::new(),
            size: (0, 0),
            served: OnceLock::new(),
            _environment: environment,
        })
    }

    /// The same connection, whose VMs end with this process unless they are
    /// let go of by the server's knowing.
    pub fn leasing(mut self) -> GrpcCache {
        self.lease = Lease::Process;
        self
    }

    /// The same, until [`GrpcCache::keep`] is said of one; where the server has no such
    /// call, its VMs are not leased.
    pub fn leasing_until_kept(mut self) -> GrpcCache {
        self.lease = Lease::UntilKept;
        self
    }

    /// The same connection, whose VMs are shown in status with this beside them.
    pub fn labelled(mut self, label: &str) -> GrpcCache {
        self.label = label.to_string();
        self
    }

    /// The same connection, whose claims the server refuses, before it takes a VM, when
    /// that could not grow to so many CPUs and so much memory, MiB.
    pub fn growing(mut self, cpus: Option<u32>, memory: Option<u32>) -> GrpcCache {
        self.size = (cpus.unwrap_or(0), memory.unwrap_or(0));
        self
    }

    /// The server's socket.
    pub fn endpoint(&self) -> &Path {
        &self.endpoint
    }

    fn failed(&self, call: &'static str, since: Instant, e: grpcio::Error) -> Error {
        let endpoint = self.endpoint.clone();
        match e {
            grpcio::Error::RpcFailure(status) => match status.code() {
                RpcStatusCode::DEADLINE_EXCEEDED => {
                    Error::Deadline { endpoint, after: since.elapsed() }
                }
                RpcStatusCode::NOT_FOUND => {
                    Error::Gone { endpoint, text: status.message().to_string() }
                }
                // Kata's servers all have GetBaseVM; ours says why it serves none.
                RpcStatusCode::UNIMPLEMENTED if call != "GetBaseVM" => {
                    Error::Unsupported { endpoint, call }
                }
                RpcStatusCode::UNAVAILABLE => {
                    Error::Stopping { endpoint, text: status.message().to_string() }
                }
                // A server that is ending cancels what comes too late for it.
                RpcStatusCode::CANCELLED => Error::Stopping {
                    endpoint,
                    text: format!("it ended and left {call} unanswered: ask again"),
                },
                code => {
                    let text = format!("{} ({code})", status.message());
                    Error::Call { endpoint, call, text }
                }
            },
            other => Error::Call { endpoint, call, text: other.to_string() },
        }
    }

    fn short() -> CallOption {
        CallOption::default().timeout(CALL)
    }

    /// Config: what the pool's VMs are.
    ///
    /// # Errors
    /// [`Error`]; so with the following.
    pub fn fetch_config(&self) -> Result<VmConfig, Error> {
        let answer = self.fetch_config_raw()?;
        VmConfig::parse(&answer.Data).map_err(|e| Error::Answer {
            endpoint: self.endpoint.clone(),
            call: "Config",
            why: e.to_string(),
        })
    }

    /// The same, asked for once.
    fn served(&self) -> Result<&VmConfig, Error> {
        match self.served.get() {
            Some(served) => Ok(served),
            None => {
                let served = self.fetch_config()?;
                Ok(self.served.get_or_init(|| served))
            }
        }
    }

    /// Config's answer, as it came.
    pub fn fetch_config_raw(&self) -> Result<GrpcVMConfig, Error> {
        self.patiently(Some(CALL), true, |server, since, _| {
            let got = server.cache.config_opt(&Empty::new(), Self::short());
            got.map_err(|e| server.failed("Config", since, e))
        })
    }

    /// GetBaseVM, as it came: whoever calls this owns a VM that is not held by
    /// any value. For measuring, and for servers that have no Claim; everyone else wants
    /// [`BaseFactory::get_base_vm`]. A server that restarts meanwhile is asked again.
    pub fn claim_raw(&self, within: Option<Duration>) -> Result<GrpcVM, Error> {
        self.patiently(within, false, |server, since, within| {
            let mut option = waiting(within);
            if server.lease == Lease::Process {
                let mut headers = MetadataBuilder::with_capacity(1);
                headers.add_str(LEASE_HEADER, "process").expect("a constant ASCII header is valid");
                option = option.headers(headers.build());
            }
            let got = server.cache.get_base_vm_opt(&Empty::new(), option);
            got.map_err(|e| server.failed("GetBaseVM", since, e))
        })
    }

    /// Claim, as it came: the VM is the caller's once it has called
    /// [`GrpcCache::confirm_claim`], and is ended if it does not; with its grace.
    pub fn claim(&self, within: Option<Duration>) -> Result<(GrpcVM, Duration), Error> {
        let call = "vmcache.v1.Control/Claim";
        let request = ClaimRequest {
            lease: self.lease != Lease::No,
            label: self.label.clone(),
            cpus: self.size.0,
            memory_mib: self.size.1,
            ..ClaimRequest::default()
        };
        let answer = self.patiently(within, true, |server, since, within| {
            let got = server.control.claim_opt(&request, waiting(within));
            got.map_err(|e| server.failed(call, since, e))
        })?;
        let grace = Duration::from_millis(answer.grace_ms.into());
        match answer.vm.into_option() {
            Some(vm) => Ok((vm, grace)),
            None => {
                let (endpoint, why) = (self.endpoint.clone(), "it has no VM".into());
                Err(Error::Answer { endpoint, call, why })
            }
        }
    }

    /// Confirm: the caller has the VM that it claimed.
    pub fn confirm_claim(&self, id: &str) -> Result<(), Error> {
        self.say(id, "vmcache.v1.Control/Confirm", ControlClient::confirm_opt)
    }

    /// Keep: a VM that was leased outlives its claimer.
    pub fn keep(&self, id: &str) -> Result<(), Error> {
        self.say(id, "vmcache.v1.Control/Keep", ControlClient::keep_opt)
    }

    fn say(
        &self,
        id: &str,
        call: &'static str,
        say: fn(&ControlClient, &VmName, CallOption) -> grpcio::Result<Empty>,
    ) -> Result<(), Error> {
        let name = VmName { id: id.into(), ..VmName::default() };
        // The next server knows of the claim.
        self.patiently(Some(CALL), true, |server, since, _| {
            let done = say(&server.control, &name, Self::short());
            done.map(|_| ()).map_err(|e| server.failed(call, since, e))
        })
    }

    /// Release: the server ends a VM that was claimed.
    pub fn release(&self, id: &str) -> Result<(), Error> {
        self.say(id, "vmcache.v1.Control/Release", ControlClient::release_opt)
    }

    /// Drain: the server hands nothing out any more.
    pub fn drain(&self) -> Result<(), Error> {
        let since = Instant::now();
        let done = self.control.drain_opt(&Empty::new(), Self::short());
        done.map(|_| ()).map_err(|e| self.failed("vmcache.v1.Control/Drain", since, e))
    }

    /// Resize: the server keeps so many VMs ready.
    pub fn resize(&self, target: u32) -> Result<(), Error> {
        let since = Instant::now();
        let request = ResizeRequest { target, ..ResizeRequest::default() };
        let done = self.control.resize_opt(&request, Self::short());
        done.map(|_| ()).map_err(|e| self.failed("vmcache.v1.Control/Resize", since, e))
    }

    /// Restart: the server executes its program anew.
    pub fn restart(&self) -> Result<(), Error> {
        let since = Instant::now();
        let done = self.control.restart_opt(&Empty::new(), Self::short());
        done.map(|_| ()).map_err(|e| self.failed("vmcache.v1.Control/Restart", since, e))
    }

    /// Status: the VMs that stand ready.
    pub fn fetch_status(&self) -> Result<GrpcStatus, Error> {
        let since = Instant::now();
        self.cache
            .status_opt(&Empty::new(), Self::short())
            .map_err(|e| self.failed("Status", since, e))
    }

    /// The detailed status of a server of ours, as JSON.
    pub fn fetch_details(&self) -> Result<serde_json::Value, Error> {
        let call = "vmcache.v1.Control/Status";
        let answer = self.patiently(Some(CALL), true, |server, since, _| {
            let got = server.control.status_opt(&Empty::new(), Self::short());
            got.map_err(|e| server.failed(call, since, e))
        })?;
        serde_json::from_slice(&answer.json).map_err(|e| Error::Answer {
            endpoint: self.endpoint.clone(),
            call: "Status",
            why: e.to_string(),
        })
    }

    /// Quit: the server stops.
    pub fn quit(&self) -> Result<(), Error> {
        let since = Instant::now();
        self.cache
            .quit_opt(&Empty::new(), Self::short())
            .map(|_| ())
            .map_err(|e| self.failed("Quit", since, e))
    }
}

/// gRPC's thread in a client: one for all of its connections, or for each.
pub fn environment() -> Arc<Environment> {
    Arc::new(EnvBuilder::new().cq_count(1).name_prefix("vmc-rpc").build())
}

/// What a claim is given at least, also by who does not want to wait: with less, a server
/// hands a VM to somebody who has gone already.
const LEAST: Duration = Duration::from_secs(1);
/// And at most: a year.
const MOST: Duration = Duration::from_secs(31_536_000);

/// For a call that may take so long.
fn waiting(within: Option<Duration>) -> CallOption {
    within.map_or_else(CallOption::default, |within| {
        CallOption::default().timeout(within.clamp(LEAST, MOST))
    })
}

impl BaseFactory for GrpcCache {
    fn config(&self) -> Result<VmConfig, super::Error> {
        self.served().cloned().map_err(super::Error::Cache)
    }

    fn get_base_vm(&self, within: Option<Duration>) -> Result<Vm, super::Error> {
        let served = self.served().map_err(super::Error::Cache)?;
        // One of ours can serve another's word, and has a call that others have not.
        if !served.is_ours() && self.fetch_details().is_err() {
            wire::check_server(served).map_err(|why| {
                let endpoint = self.endpoint.clone();
                super::Error::Cache(Error::Answer { endpoint, call: "Config", why })
            })?;
        }
        let message = match self.claim(within) {
            Ok((vm, _)) => Ok(vm),
            Err(Error::Unsupported { .. }) => self.claim_raw(within),
            Err(e) => Err(e),
        };
        let message = message.map_err(super::Error::Cache)?;
        let served = || Ok(served.clone());
        wire::from_wire(&message, served).map_err(super::Error::Vm)
    }

    fn confirm(&self, vm: &Vm) -> Result<(), super::Error> {
        match self.confirm_claim(vm.id()) {
            Ok(()) | Err(Error::Unsupported { .. }) => Ok(()),
            Err(e) => Err(super::Error::Cache(e)),
        }
    }

    fn used(&self, vm: &Vm, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let used = UsedRequest { id: vm.id().into(), micros, ..UsedRequest::default() };
        if let Ok(answer) = self.control.used_async_opt(&used, Self::short()) {
            let told = self.telling.another();
            self.control.spawn(async move {
                // Servers without that call do not matter.
                drop(answer.await);
                drop(told);
            });
        }
    }

    fn status(&self) -> Result<Vec<VmStatus>, super::Error> {
        let status = self.fetch_status().map_err(super::Error::Cache)?;
        Ok(status
            .vmstatus
            .iter()
            .map(|s| VmStatus { pid: s.pid as i32, cpus: s.cpu, memory_mib: s.memory })
            .collect())
    }

    fn close(&self) -> Result<(), super::Error> {
        self.quit().map_err(super::Error::Cache)
    }
}
