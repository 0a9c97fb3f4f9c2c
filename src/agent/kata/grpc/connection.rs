//! A connection to an agent of 1.x, and what its calls have in common.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use grpcio::{CallOption, ChannelBuilder, EnvBuilder, Environment, RpcStatusCode};
use protobuf::Enum;
use ttrpc::Code;

use super::super::CALL;
use crate::agent::{Error, Outcome};
use crate::proto::agent_grpc::AgentServiceClient;
use crate::proto::health_grpc::HealthClient;
use crate::sys::rpc::channel_over;

/// Largest answer taken, in bytes; agents of 1.x take 4 MiB themselves.
const MAX_ANSWER: i32 = 4 * 1024 * 1024;

/// A connection to an agent.
pub struct Connection {
    pub(super) agent: AgentServiceClient,
    pub(super) health: HealthClient,
    stream: UnixStream,
    // Last, so that its threads outlive the channel.
    _environment: Arc<Environment>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.hang_up();
    }
}

impl Connection {
    /// Ends it; whoever waits for an answer is told.
    pub(super) fn hang_up(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    pub(super) fn over(stream: UnixStream) -> Outcome<Connection> {
        let failed = |source| Error::Host { during: "use a connection to an agent", source };
        let kept = stream.try_clone().map_err(failed)?;
        let environment = Arc::new(EnvBuilder::new().cq_count(1).name_prefix("vmc-rpc").build());
        // No keepalive: the agent's server ends connections that ping.
        let builder = ChannelBuilder::new(Arc::clone(&environment))
            .max_receive_message_len(MAX_ANSWER)
            .http2_bdp_probe(false);
        let channel = channel_over(builder, "vmcache", stream).map_err(failed)?;
        Ok(Connection {
            agent: AgentServiceClient::new(channel.clone()),
            health: HealthClient::new(channel),
            stream: kept,
            _environment: environment,
        })
    }
}

pub(super) fn failed(call: &'static str, e: grpcio::Error) -> Error {
    match e {
        grpcio::Error::RpcFailure(status) => match status.code() {
            RpcStatusCode::UNIMPLEMENTED => Error::Unsupported { call },
            RpcStatusCode::DEADLINE_EXCEEDED
            | RpcStatusCode::UNAVAILABLE
            | RpcStatusCode::CANCELLED => Error::Call { call, text: status.message().to_string() },
            code => {
                let code = Code::from_i32(code.into()).unwrap_or(Code::UNKNOWN);
                Error::Refused { call, code, text: status.message().to_string() }
            }
        },
        other => Error::Call { call, text: other.to_string() },
    }
}

pub(super) fn quick() -> CallOption {
    within(CALL)
}

pub(super) fn within(time: Duration) -> CallOption {
    CallOption::default().timeout(time)
}

/// No deadline: for what waits on a process.
pub(super) fn endless() -> CallOption {
    CallOption::default()
}

pub(super) fn nothing<T>(call: &'static str, r: grpcio::Result<T>) -> Outcome<()> {
    r.map(|_| ()).map_err(|e| failed(call, e))
}
