//! Kata's calls, `cache.CacheService`, and what handlers share.
//!
//! Invariant: handlers never wait.

use std::sync::Arc;

use grpcio::{
    pb_de, pb_ser, Marshaller, Method, MethodType, RpcContext, RpcStatus, RpcStatusCode, Service,
    ServiceBuilder, UnarySink,
};

use super::answers::{Answers, Reserved};
use super::claim::{Asker, Call};
use super::peers::{Peer, Peers};
use crate::config::options::OURS;
use crate::config::Config;
use crate::events::event;
use crate::factory::cache::pool::Pool;
use crate::factory::grpccache::LEASE_HEADER;
use crate::proto::cache::{GrpcStatus, GrpcVM, GrpcVMConfig, GrpcVMStatus};
use crate::proto::empty::Empty;
use crate::vm::ledger::Owner;
use crate::vm::VmConfig;

/// A call, as gRPC registers it.
pub const fn method<Q, R>(ty: MethodType, name: &'static str) -> Method<Q, R>
where
    Q: protobuf::Message,
    R: protobuf::Message,
{
    let req_mar = Marshaller { ser: pb_ser, de: pb_de };
    let resp_mar = Marshaller { ser: pb_ser, de: pb_de };
    Method { ty, name, req_mar, resp_mar }
}

const CONFIG: Method<Empty, GrpcVMConfig> = method(MethodType::Unary, "/cache.CacheService/Config");
const GET_BASE_VM: Method<Empty, GrpcVM> =
    method(MethodType::ClientStreaming, "/cache.CacheService/GetBaseVM");
const STATUS: Method<Empty, GrpcStatus> = method(MethodType::Unary, "/cache.CacheService/Status");
const QUIT: Method<Empty, Empty> = method(MethodType::Unary, "/cache.CacheService/Quit");

/// Told to who calls GetBaseVM where that is not served.
const NO_KATA: &str = "GetBaseVM is not served here (kata_calls = false): claim by \
                       vmcache.v1.Control/Claim, as vmcache's own commands do";

/// Kata's service; `answers` bounds those to peers of its class.
pub fn cache(
    config: &Config,
    pool: &Arc<Pool>,
    peers: &Peers,
    answers: Option<Arc<Answers>>,
) -> Service {
    let base = VmConfig::of(config);
    let (data, agent) = match &config.served {
        Some(served) => (served.data.clone().into_bytes(), served.agent.clone().into_bytes()),
        None => (base.to_json(), base.agent_json()),
    };
    let answer = GrpcVMConfig { Data: data, AgentConfig: agent, ..GrpcVMConfig::default() };
    let (serves, base_mib) = (config.flag(OURS, "kata_calls"), config.memory());
    let (claiming, claimers) = (Arc::clone(pool), peers.clone());
    let (shown, watchers) = (Arc::clone(pool), peers.clone());
    let (quitting, quitters) = (Arc::clone(pool), peers.clone());
    ServiceBuilder::new()
        .add_unary_handler(&CONFIG, move |ctx: RpcContext<'_>, _: Empty, sink| {
            succeed(&ctx, sink, answer.clone());
        })
        .add_client_streaming_handler(&GET_BASE_VM, move |ctx: RpcContext<'_>, client, sink| {
            let call: Call<Empty, GrpcVM> = Call { client, sink, answer: |vm| vm };
            claim(&ctx, call, &claiming, &claimers, (serves, base_mib));
        })
        .add_unary_handler(&STATUS, move |ctx: RpcContext<'_>, _: Empty, sink| {
            let vmstatus = shown.board.ready().into_iter().map(|(pid, cpu, memory)| GrpcVMStatus {
                pid: pid.into(),
                cpu,
                memory,
                ..GrpcVMStatus::default()
            });
            let status = GrpcStatus {
                pid: std::process::id().into(),
                vmstatus: vmstatus.collect(),
                ..GrpcStatus::default()
            };
            let size = usize::try_from(protobuf::Message::compute_size(&status));
            let size = size.unwrap_or(usize::MAX);
            match reserve(&ctx, answers.as_ref(), &watchers, size) {
                Ok(reserved) => succeed_with(&ctx, sink, status, reserved),
                Err(why) => fail(&ctx, sink, RpcStatusCode::RESOURCE_EXHAUSTED, &why),
            }
        })
        .add_unary_handler(&QUIT, move |ctx: RpcContext<'_>, _: Empty, sink| {
            quit(&ctx, sink, &quitting, &quitters);
        })
        .build()
}

/// Answers.
pub fn succeed<T: Send + 'static>(ctx: &RpcContext<'_>, sink: UnarySink<T>, answer: T) {
    succeed_with(ctx, sink, answer, ());
}

/// Answers, and drops `kept` when the client has it all.
pub fn succeed_with<T: Send + 'static>(
    ctx: &RpcContext<'_>,
    sink: UnarySink<T>,
    answer: T,
    kept: impl Send + 'static,
) {
    let sent = sink.success(answer);
    ctx.spawn(async move {
        // Dropped, it would cancel the call.
        let _ = sent.await;
        drop(kept);
    });
}

/// Room for an answer of so many bytes to whoever asks; `None` where there is no bound.
///
/// # Errors
/// What the caller is told.
pub fn reserve(
    ctx: &RpcContext<'_>,
    answers: Option<&Arc<Answers>>,
    peers: &Peers,
    bytes: usize,
) -> Result<Option<Reserved>, String> {
    let Some(answers) = answers else { return Ok(None) };
    // One whose connection has ended reads nothing any more.
    let peer = peers.find(&ctx.peer()).ok_or("the caller is not known")?;
    answers.reserve(peer.uid, bytes).map(Some)
}

/// Refuses.
pub fn fail<T: Send + 'static>(
    ctx: &RpcContext<'_>,
    sink: UnarySink<T>,
    code: RpcStatusCode,
    text: &str,
) {
    let sent = sink.fail(RpcStatus::with_message(code, text.to_string()));
    ctx.spawn(async move {
        let _ = sent.await;
    });
}

/// Root, or who runs the server: who may end it. The sink comes back with it; anybody
/// else is told so.
pub fn master<T: Send + 'static>(
    ctx: &RpcContext<'_>,
    sink: UnarySink<T>,
    peers: &Peers,
    call: &str,
) -> Option<(Peer, UnarySink<T>)> {
    let own = nix::unistd::geteuid().as_raw();
    match peers.find(&ctx.peer()) {
        Some(peer) if peer.uid == 0 || peer.uid == own => Some((peer, sink)),
        _ => {
            let text = format!("{call} is for root and the server's own user");
            fail(ctx, sink, RpcStatusCode::PERMISSION_DENIED, &text);
            None
        }
    }
}

fn quit(ctx: &RpcContext<'_>, sink: UnarySink<Empty>, pool: &Arc<Pool>, peers: &Peers) {
    let Some((peer, sink)) = master(ctx, sink, peers, "Quit") else { return };
    event!(QUIT, pid = peer.pid, uid = peer.uid; "asked for by pid {} of uid {}", peer.pid, peer.uid);
    let pool = Arc::clone(pool);
    let why = format!("Quit by pid {}", peer.pid);
    let sent = sink.success(Empty::new());
    ctx.spawn(async move {
        // Answered first: stopping cancels what is still on its way.
        let _ = sent.await;
        super::stop(&pool, &why);
    });
}

/// Who asks, when that may claim.
///
/// # Errors
/// What it is told.
pub fn claimer(ctx: &RpcContext<'_>, peers: &Peers) -> Result<Peer, String> {
    match peers.find(&ctx.peer()) {
        Some(peer) if peer.may_claim() => Ok(peer),
        Some(Peer { pid, uid, class, .. }) => {
            event!(
                CLAIM_REFUSED, pid = pid, uid = uid, peer = class;
                "pid {pid} of uid {uid} is not among who may claim"
            );
            Err(format!(
                "uid {uid} may not claim VMs: see claim_users (which has to name a subordinate \
                 user of /etc/subuid), claim_groups, and user"
            ))
        }
        None => Err("the caller is not known".to_string()),
    }
}

/// GetBaseVM.
fn claim(
    ctx: &RpcContext<'_>,
    call: Call<Empty, GrpcVM>,
    pool: &Arc<Pool>,
    peers: &Peers,
    (serves, base_mib): (bool, u32),
) {
    if !serves {
        let code = RpcStatusCode::UNIMPLEMENTED;
        return ctx.spawn(async move { call.refuse(code, NO_KATA).await });
    }
    let peer = match claimer(ctx, peers) {
        Ok(peer) => peer,
        Err(why) => {
            let code = RpcStatusCode::PERMISSION_DENIED;
            return ctx.spawn(async move { call.refuse(code, &why).await });
        }
    };
    let lease = ctx.request_headers().iter().any(|(name, _)| name == LEASE_HEADER);
    let Peer { pid, start_time, uid, .. } = peer;
    let owner = Owner { pid, start_time, uid, lease, unconfirmed: false };
    let asker = Asker { owner, label: String::new(), memory_mib: 0, base_mib };
    ctx.spawn(call.serve(asker, Arc::clone(pool)));
}
