//! The calls: `cache.CacheService`, Kata's four, and our own Control.
//!
//! GetBaseVM is served as a stream of one message: on the wire that is the
//! same as a single answer, and only a stream's sink tells when its client has
//! gone, so that a claim that was given up takes no VM with it.
//!
//! Invariants: handlers never wait; a ready VM is taken, recorded and answered
//! on gRPC's own thread; whatever becomes of a delivery, the driver is told,
//! and the VM moves with the telling.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use futures_util::{Sink, SinkExt};
use grpcio::{
    pb_de, pb_ser, Marshaller, Method, MethodType, RpcContext, RpcStatus, RpcStatusCode,
    ServerStreamingSink, Service, ServiceBuilder, UnarySink, WriteFlags,
};

use super::listener::{Peer, Peers};
use crate::config::Config;
use crate::factory::cache::claim::{Answer, Place};
use crate::factory::cache::pool::{Event, Pool, Ready};
use crate::factory::grpccache::LEASE_HEADER;
use crate::proto::cache::{GrpcStatus, GrpcVM, GrpcVMConfig, GrpcVMStatus};
use crate::proto::control::StatusReply;
use crate::proto::control_grpc::{create_control, Control};
use crate::proto::empty::Empty;
use crate::vm::ledger::{Owner, State};
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

const CONFIG: Method<Empty, GrpcVMConfig> =
    method(MethodType::Unary, "/cache.CacheService/Config");
const GET_BASE_VM: Method<Empty, GrpcVM> =
    method(MethodType::ServerStreaming, "/cache.CacheService/GetBaseVM");
const STATUS: Method<Empty, GrpcStatus> = method(MethodType::Unary, "/cache.CacheService/Status");
const QUIT: Method<Empty, Empty> = method(MethodType::Unary, "/cache.CacheService/Quit");

/// Kata's service.
pub fn cache(config: &Config, pool: &Arc<Pool>, peers: &Peers) -> Service {
    let base = VmConfig::of(config);
    let answer = GrpcVMConfig {
        Data: base.to_json(),
        AgentConfig: base.agent_json(),
        ..GrpcVMConfig::default()
    };
    let (claiming, claimers) = (Arc::clone(pool), peers.clone());
    let shown = Arc::clone(pool);
    let (quitting, quitters) = (Arc::clone(pool), peers.clone());
    ServiceBuilder::new()
        .add_unary_handler(&CONFIG, move |ctx: RpcContext<'_>, _: Empty, sink| {
            succeed(&ctx, sink, answer.clone());
        })
        .add_server_streaming_handler(&GET_BASE_VM, move |ctx: RpcContext<'_>, _: Empty, sink| {
            claim(&ctx, sink, &claiming, &claimers);
        })
        .add_unary_handler(&STATUS, move |ctx: RpcContext<'_>, _: Empty, sink| {
            let vmstatus = shown.board.ready().into_iter().map(|(pid, cpu, memory)| {
                GrpcVMStatus { pid: pid.into(), cpu, memory, ..GrpcVMStatus::default() }
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

fn fail<T: Send + 'static>(ctx: &RpcContext<'_>, sink: UnarySink<T>, code: RpcStatusCode, text: &str) {
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

/// GetBaseVM.
fn claim(ctx: &RpcContext<'_>, mut sink: ServerStreamingSink<GrpcVM>, pool: &Arc<Pool>, peers: &Peers) {
    let refuse = |sink: ServerStreamingSink<GrpcVM>, code, text: &str| {
        let sent = sink.fail(RpcStatus::with_message(code, text.to_string()));
        ctx.spawn(async move {
            let _ = sent.await;
        });
    };
    let Some(peer) = peers.find(&ctx.peer()) else {
        return refuse(sink, RpcStatusCode::PERMISSION_DENIED, "the caller is not known");
    };
    if pool.closing() {
        return refuse(sink, RpcStatusCode::UNAVAILABLE, "the server is stopping");
    }
    let lease = ctx.request_headers().iter().any(|(name, _)| name == LEASE_HEADER);
    let Peer { pid, start_time, uid } = peer;
    let owner = Owner { pid, start_time, uid, lease };
    let pool = Arc::clone(pool);
    match pool.take() {
        Some(ready) => {
            let taken = ready.vm.pid();
            ctx.spawn(async move { deliver(sink, ready, owner, &pool, Some(taken)).await });
        }
        None => {
            let place = pool.stand_in_line();
            ctx.spawn(async move {
                match wait(&place, &mut sink).await {
                    Some(Answer::Vm(ready)) => deliver(sink, ready, owner, &pool, None).await,
                    Some(Answer::Closing) => {
                        let status = RpcStatus::with_message(
                            RpcStatusCode::UNAVAILABLE,
                            "the server is stopping".to_string(),
                        );
                        let _ = sink.fail(status).await;
                    }
                    None => give_up(&place, &pool),
                }
            });
        }
    }
}

/// Waits in line: for an answer, or (`None`) until the client has gone.
async fn wait(place: &Place, sink: &mut ServerStreamingSink<GrpcVM>) -> Option<Answer> {
    poll_fn(|cx| {
        // An error here is the client's cancellation, its deadline, or its end.
        if let Poll::Ready(Err(_)) = Pin::new(&mut *sink).poll_ready(cx) {
            return Poll::Ready(None);
        }
        place.poll(cx).map(Some)
    })
    .await
}

/// Leaves the line; a VM that was given in the meantime goes back to the driver.
fn give_up(place: &Arc<Place>, pool: &Pool) {
    match place.leave() {
        Some(Answer::Vm(ready)) => {
            // Never sent to anybody, so it is as good as new: but it left the
            // pool's books as handed, and the books must stay simple.
            let why = "its claim had just gone".to_string();
            pool.tell(Event::Undelivered { vm: Box::new(ready.vm), why });
        }
        Some(Answer::Closing) => {}
        None => pool.tell(Event::Gone(Arc::clone(place))),
    }
}

/// Sends a VM to its claimer and tells the driver what became of it.
async fn deliver(
    mut sink: ServerStreamingSink<GrpcVM>,
    ready: Box<Ready>,
    owner: Owner,
    pool: &Pool,
    taken: Option<i32>,
) {
    let Ready { mut vm, message } = *ready;
    let recorded = vm.record(|l| {
        l.state = State::Handing;
        l.owner = Some(owner);
    });
    let sent = match recorded {
        Ok(()) => {
            // Held back until the status follows, so both go out in one write.
            let flags = WriteFlags::default().buffer_hint(true);
            match sink.send((message, flags)).await {
                Ok(()) => sink.close().await.map_err(|e| e.to_string()),
                Err(e) => Err(e.to_string()),
            }
        }
        Err(e) => {
            let text = format!("write the ledger of VM {}: {e}", vm.id());
            let status = RpcStatus::with_message(RpcStatusCode::INTERNAL, text.clone());
            let _ = sink.fail(status).await;
            Err(text)
        }
    };
    if let Some(pid) = taken {
        pool.tell(Event::Taken { pid });
    }
    let vm = Box::new(vm);
    pool.tell(match sent {
        Ok(()) => Event::Delivered { vm, owner },
        Err(why) => Event::Undelivered { vm, why },
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
