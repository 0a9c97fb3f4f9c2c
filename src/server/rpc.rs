//! The gRPC servers: one for each class of peers, on the same thread.
//!
//! What gRPC's core bounds, it bounds for a server: memory, calls of a connection, sizes of
//! headers. With one for each class, what strangers use up is the strangers'. The numbers here
//! are a second wall behind [`super::relay`], which bounds the same per connection and user.

use std::ffi::CStr;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use grpcio::{ChannelBuilder, EnvBuilder, Environment, ResourceQuota, Server, ServerBuilder};

use super::answers::Answers;
use super::peers::{Class, Peers};
use super::relay::limits::{Limits, CLAIMERS_STREAMS, CLAIMER_STREAMS};
use super::relay::Far;
use super::{control, katas_calls_only, service, Again};
use crate::config::Config;
use crate::factory::cache::pool::Pool;
use crate::sys::rpc::serve_connection;
use crate::worker::Worker;

/// Memory that gRPC may take for connections' buffers, in bytes, by class: root's as much as
/// it needs at its busiest, and of others more than the relay's limits allow.
const fn memory(class: Class) -> usize {
    match class {
        Class::Direct => 8 << 20,
        Class::Claimer => 64 << 20,
        Class::Stranger => 16 << 20,
    }
}

/// Calls that gRPC is asked for at a time; it keeps a line of the others. Each has memory that
/// is made anew with every call, so that after a flood each may hold a page back.
const fn slots(class: Class) -> usize {
    match class {
        Class::Direct => 128,
        Class::Claimer => 64,
        Class::Stranger => 32,
    }
}

/// Largest request taken, in bytes: all of Kata's are empty.
const MAX_REQUEST: i32 = 64 * 1024;
/// Size of a relayed call's headers, as HTTP/2 counts them, from which on some calls, and from
/// which on all are refused.
const RELAYED_HEADERS: [(&CStr, i32); 2] =
    [(c"grpc.max_metadata_size", 4096), (c"grpc.absolute_max_metadata_size", 8192)];

/// What the services need.
pub struct Services<'a> {
    /// The configuration.
    pub config: &'a Config,
    /// The pool.
    pub pool: &'a Arc<Pool>,
    /// Who is who.
    pub peers: &'a Peers,
    /// Asked before a restart.
    pub again: &'a Arc<Again>,
}

/// The servers.
pub struct Servers {
    /// Of root and the server's own user.
    pub direct: Server,
    /// Of all others.
    pub relayed: Relayed,
}

/// Those of claimers and strangers, which the relay gives connections to; taken out when the
/// daemon ends.
#[derive(Clone)]
pub struct Relayed(Arc<Mutex<Option<[Server; 2]>>>);

impl Servers {
    /// Builds and starts them.
    ///
    /// # Errors
    /// As gRPC's.
    pub fn start(services: &Services<'_>, strangers: &Limits) -> Result<Servers, String> {
        // gRPC's own messages, which strangers have it write as often as they like, go to the
        // log, which leaves those of libraries out.
        grpcio::redirect_log();
        let environment = EnvBuilder::new().cq_count(1).name_prefix("vmc-rpc").build();
        let environment = Arc::new(environment);
        let build = |class, streams| {
            let server = server(services, &environment, class, streams);
            server.map(|mut server| {
                server.start();
                server
            })
        };
        Ok(Servers {
            direct: build(Class::Direct, CLAIMERS_STREAMS)?,
            relayed: Relayed(Arc::new(Mutex::new(Some([
                build(Class::Claimer, CLAIMER_STREAMS)?,
                build(Class::Stranger, strangers.streams)?,
            ])))),
        })
    }
}

fn server(
    services: &Services<'_>,
    environment: &Arc<Environment>,
    class: Class,
    streams: usize,
) -> Result<Server, String> {
    let Services { config, pool, peers, again } = services;
    let quota = ResourceQuota::new(Some("vmcache")).resize_memory(memory(class));
    let mut channel = ChannelBuilder::new(Arc::clone(environment))
        .set_resource_quota(quota)
        .max_receive_message_len(MAX_REQUEST)
        .max_concurrent_stream(i32::try_from(streams).unwrap_or(i32::MAX))
        .http2_bdp_probe(false);
    if class != Class::Direct {
        for (name, value) in RELAYED_HEADERS {
            channel = channel.raw_cfg_int(name.into(), value);
        }
    }
    let answers = (class != Class::Direct).then(Arc::<Answers>::default);
    let mut builder = ServerBuilder::new(Arc::clone(environment))
        .channel_args(channel.build_args())
        .requests_slot_per_cq(slots(class))
        .register_service(service::cache(config, pool, peers, answers.clone()));
    if !katas_calls_only() {
        builder = builder.register_service(control::control(config, pool, peers, again, answers));
    }
    builder.build().map_err(|e| e.to_string())
}

impl Far for Relayed {
    fn begin(&mut self, class: Class, end: UnixStream) -> io::Result<()> {
        let mut servers = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let [claimers, strangers] =
            servers.as_mut().ok_or_else(|| io::Error::other("the server ends"))?;
        let server = if class == Class::Stranger { strangers } else { claimers };
        serve_connection(server, end).map(|_| ())
    }
}

impl Relayed {
    fn take(&self) -> Option<[Server; 2]> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).take()
    }
}

/// Ends servers: what is answered already arrives, within `answers`; then what still waits is
/// cancelled, and with it the connections end, within `join`.
pub fn shut_down(direct: Option<Server>, relayed: &Relayed, answers: Duration, join: Duration) {
    let mut servers: Vec<Server> = relayed.take().into_iter().flatten().collect();
    servers.extend(direct);
    let finished: Vec<_> = servers.iter_mut().map(Server::shutdown).collect();
    let ended = Worker::spawn("vmc-shutdown", move || {
        finished.into_iter().for_each(|f| drop(futures_executor::block_on(f)));
    });
    if let Ok(ended) = ended {
        let _ = ended.done().recv_timeout(answers);
        servers.iter_mut().for_each(Server::cancel_all_calls);
        let _ = ended.join(join);
    }
}
