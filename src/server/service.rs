//! The calls: `cache.CacheService`, Kata's four, and our own Control.
//!
//! GetBaseVM takes a stream of requests: on the wire that is the same as a
//! single one, and only a stream of requests tells, when it is asked, whether
//! its client is still there, so that a claim that was given up takes no VM
//! with it.
//!
//! Invariants: handlers never wait; a ready VM is taken, recorded and answered
//! on gRPC's own thread; whatever becomes of a delivery, the driver is told,
//! and the VM moves with the telling.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use futures_util::Stream;
use grpcio::{
    pb_de, pb_ser, ClientStreamingSink, Marshaller, Method, MethodType, RequestStream, RpcContext,
    RpcStatus, RpcStatusCode, Service, ServiceBuilder, UnarySink,
};

use super::listener::{Peer, Peers};
use crate::config::Config;
use crate::factory::cache::claim::{Answer, Place};
use crate::factory::cache::pool::{Delivered, Event, Pool, Ready};
use crate::factory::grpccache::LEASE_HEADER;
use crate::proto::cache::{GrpcStatus, GrpcVM, GrpcVMConfig, GrpcVMStatus};
use crate::proto::control::StatusReply;
use crate::proto::control_grpc::{create_control, Control};
use crate::proto::empty::Empty;
use crate::vm::ledger::Owner;
use crate::vm::VmConfig;

const fn method<Q, R>(ty: MethodType, name: &'static str) -> Method<Q, R>
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

/// Kata's service.
pub fn cache(config: &Config, pool: &Arc<Pool>, peers: &Peers) -> Service {
    let base = VmConfig::of(config);
    let (data, agent) = match &config.served {
        Some(served) => (served.data.clone().into_bytes(), served.agent.clone().into_bytes()),
        None => (base.to_json(), base.agent_json()),
    };
    let answer = GrpcVMConfig { Data: data, AgentConfig: agent, ..GrpcVMConfig::default() };
    let (claiming, claimers) = (Arc::clone(pool), peers.clone());
    let shown = Arc::clone(pool);
    let (quitting, quitters) = (Arc::clone(pool), peers.clone());
    ServiceBuilder::new()
        .add_unary_handler(&CONFIG, move |ctx: RpcContext<'_>, _: Empty, sink| {
            succeed(&ctx, sink, answer.clone());
        })
        .add_client_streaming_handler(&GET_BASE_VM, move |ctx: RpcContext<'_>, client, sink| {
            let call = Call { client, sink };
            claim(&ctx, call, &claiming, &claimers);
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
            succeed(&ctx, sink, status);
        })
        .add_unary_handler(&QUIT, move |ctx: RpcContext<'_>, _: Empty, sink| {
            quit(&ctx, sink, &quitting, &quitters);
        })
        .build()
}

fn succeed<T: Send + 'static>(ctx: &RpcContext<'_>, sink: UnarySink<T>, answer: T) {
    let sent = sink.success(answer);
    ctx.spawn(async move {
        // Dropped, it would cancel the call.
        let _ = sent.await;
    });
}

fn fail<T: Send + 'static>(
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

fn quit(ctx: &RpcContext<'_>, sink: UnarySink<Empty>, pool: &Arc<Pool>, peers: &Peers) {
    let peer = peers.find(&ctx.peer());
    let own = nix::unistd::geteuid().as_raw();
    match peer {
        Some(peer) if peer.uid == 0 || peer.uid == own => {
            log::info!("quit: asked for by pid {} of uid {}", peer.pid, peer.uid);
            let pool = Arc::clone(pool);
            let why = format!("Quit by pid {}", peer.pid);
            let sent = sink.success(Empty::new());
            ctx.spawn(async move {
                // Answered first: stopping cancels what is still on its way.
                let _ = sent.await;
                super::stop(&pool, &why);
            });
        }
        _ => {
            let text = "Quit is for root and the server's own user";
            fail(ctx, sink, RpcStatusCode::PERMISSION_DENIED, text);
        }
    }
}

/// A GetBaseVM call: who asks, and where the answer goes. The one must outlive
/// the other: dropped, a stream of requests cancels its call.
struct Call {
    client: RequestStream<Empty>,
    sink: ClientStreamingSink<GrpcVM>,
}

impl Call {
    async fn refuse(self, code: RpcStatusCode, text: &str) {
        let _ = self.sink.fail(RpcStatus::with_message(code, text.to_string())).await;
        drop(self.client);
    }
}

/// GetBaseVM.
fn claim(ctx: &RpcContext<'_>, call: Call, pool: &Arc<Pool>, peers: &Peers) {
    let Some(peer) = peers.find(&ctx.peer()) else {
        let code = RpcStatusCode::PERMISSION_DENIED;
        return ctx.spawn(async move { call.refuse(code, "the caller is not known").await });
    };
    let pool = Arc::clone(pool);
    if pool.closing() {
        return ctx
            .spawn(async move { call.refuse(RpcStatusCode::UNAVAILABLE, pool.farewell()).await });
    }
    let lease = ctx.request_headers().iter().any(|(name, _)| name == LEASE_HEADER);
    let Peer { pid, start_time, uid } = peer;
    let owner = Owner { pid, start_time, uid, lease };
    match pool.take() {
        Some(ready) => ctx.spawn(async move { deliver(call, ready, owner, &pool, false).await }),
        None if pool.closing() => {
            ctx.spawn(
                async move { call.refuse(RpcStatusCode::UNAVAILABLE, pool.farewell()).await },
            );
        }
        None => {
            let place = pool.stand_in_line();
            ctx.spawn(async move { wait(call, &place, owner, &pool).await });
        }
    }
}

/// Waits in line, until there is an answer or the client has gone.
async fn wait(mut call: Call, place: &Arc<Place>, owner: Owner, pool: &Pool) {
    let answer = poll_fn(|cx| {
        // An error is the client's cancellation, its deadline, or its end. It
        // comes only when it is asked for: the driver has every place asked
        // now and then, and this one is when a VM comes.
        let client = Pin::new(&mut call.client).poll_next(cx);
        let gone = matches!(client, Poll::Ready(Some(Err(_))));
        match gone {
            true => Poll::Ready(None),
            false => place.poll(cx).map(Some),
        }
    })
    .await;
    match answer.or_else(|| place.leave().map(Answer::returned)) {
        Some(Answer::Vm(ready)) => deliver(call, ready, owner, pool, true).await,
        Some(Answer::Closing) => call.refuse(RpcStatusCode::UNAVAILABLE, pool.farewell()).await,
        // Nobody has seen this VM: it is as good as new.
        Some(Answer::Returned(ready)) => pool.tell(Event::Returned(ready)),
        None => pool.tell(Event::Gone(Arc::clone(place))),
    }
}

/// Sends a VM to its claimer and tells the driver what became of it.
async fn deliver(call: Call, ready: Box<Ready>, owner: Owner, pool: &Pool, waited: bool) {
    let Call { client, sink } = call;
    let Ready { vm, message, note, .. } = *ready;
    let sent = match note.write(&owner) {
        Ok(()) => {
            // Nobody else is woken before the answer is out: on a small machine
            // the driver would take the client's processor.
            sink.success(message).await.map_err(|e| e.to_string())
        }
        Err(e) => {
            let text = format!("write the ledger of VM {}: {e}", vm.id());
            let status = RpcStatus::with_message(RpcStatusCode::INTERNAL, text.clone());
            let _ = sink.fail(status).await;
            Err(text)
        }
    };
    drop(client);
    pool.tell(match sent {
        Ok(()) => Event::Delivered { vm: Delivered::new(vm, owner), waited },
        Err(why) => Event::Undelivered { vm: Box::new(vm), why },
    });
}

/// Our own service.
#[derive(Clone)]
struct Own {
    pool: Arc<Pool>,
    endpoint: String,
}

/// Our own service, ready to be registered.
pub fn control(config: &Config, pool: &Arc<Pool>) -> Service {
    let endpoint = config.endpoint().display().to_string();
    create_control(Own { pool: Arc::clone(pool), endpoint })
}

impl Control for Own {
    fn status(&mut self, ctx: RpcContext<'_>, _: Empty, sink: UnarySink<StatusReply>) {
        let json = self.pool.board.json(&self.endpoint).to_string().into_bytes();
        succeed(&ctx, sink, StatusReply { json, ..StatusReply::default() });
    }
}
