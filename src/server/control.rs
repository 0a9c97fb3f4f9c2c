//! Our own calls, `vmcache.v1.Control`.
//!
//! Invariants: handlers never wait; what changes the pool is the driver's to do, which
//! answers through the event that it was told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_channel::oneshot;
use grpcio::{
    Method, MethodType, RpcContext, RpcStatus, RpcStatusCode, Service, ServiceBuilder, UnarySink,
};

use super::answers::Answers;
use super::claim::{Asker, Call};
use super::peers::{Peer, Peers};
use super::service::{claimer, fail, master, method, reserve, succeed, succeed_with};
use super::Again;
use crate::config::{Config, MAX_POOL};
use crate::factory::cache::pool::{Asked, Event, Pool, Refusal, Target, Then, GRACE};
use crate::proto::cache::GrpcVM;
use crate::proto::control::{
    ClaimReply, ClaimRequest, NoteRequest, ResizeRequest, StatusReply, UsedRequest, VmName,
};
use crate::proto::empty::Empty;
use crate::vm::ledger::Owner;
use crate::vm::{notes, resize, VmConfig};

/// Longest label, in bytes.
const MAX_LABEL: usize = 64;
/// Longest time that a client can say it took.
const LONGEST_USE: Duration = Duration::from_secs(3600);

const STATUS: Method<Empty, StatusReply> = method(MethodType::Unary, "/vmcache.v1.Control/Status");
const CLAIM: Method<ClaimRequest, ClaimReply> =
    method(MethodType::ClientStreaming, "/vmcache.v1.Control/Claim");
const CONFIRM: Method<VmName, Empty> = method(MethodType::Unary, "/vmcache.v1.Control/Confirm");
const KEEP: Method<VmName, Empty> = method(MethodType::Unary, "/vmcache.v1.Control/Keep");
const RELEASE: Method<VmName, Empty> = method(MethodType::Unary, "/vmcache.v1.Control/Release");
const USED: Method<UsedRequest, Empty> = method(MethodType::Unary, "/vmcache.v1.Control/Used");
const NOTE: Method<NoteRequest, Empty> = method(MethodType::Unary, "/vmcache.v1.Control/Note");
const DRAIN: Method<Empty, Empty> = method(MethodType::Unary, "/vmcache.v1.Control/Drain");
const RESIZE: Method<ResizeRequest, Empty> =
    method(MethodType::Unary, "/vmcache.v1.Control/Resize");
const RESTART: Method<Empty, Empty> = method(MethodType::Unary, "/vmcache.v1.Control/Restart");

/// What the handlers know.
#[derive(Clone)]
struct Own {
    pool: Arc<Pool>,
    peers: Peers,
    endpoint: String,
    base: Arc<VmConfig>,
    base_mib: u32,
    again: Arc<Again>,
    answers: Option<Arc<Answers>>,
}

/// Our own service; `answers` bounds those to peers of its class.
pub fn control(
    config: &Config,
    pool: &Arc<Pool>,
    peers: &Peers,
    again: &Arc<Again>,
    answers: Option<Arc<Answers>>,
) -> Service {
    let own = Own {
        pool: Arc::clone(pool),
        peers: peers.clone(),
        endpoint: config.endpoint().display().to_string(),
        base: Arc::new(VmConfig::of(config)),
        base_mib: config.memory(),
        again: Arc::clone(again),
        answers,
    };
    let [a, b, c, d, e, f, g, h, i, j] = std::array::from_fn(|_| own.clone());
    ServiceBuilder::new()
        .add_unary_handler(&STATUS, move |ctx: RpcContext<'_>, _: Empty, sink| {
            a.status(&ctx, sink);
        })
        .add_client_streaming_handler(&CLAIM, move |ctx: RpcContext<'_>, client, sink| {
            b.claim(&ctx, Call { client, sink, answer });
        })
        .add_unary_handler(&CONFIRM, move |ctx: RpcContext<'_>, r: VmName, sink| {
            c.ask(&ctx, r, sink, Event::Confirm);
        })
        .add_unary_handler(&KEEP, move |ctx: RpcContext<'_>, r: VmName, sink| {
            h.ask(&ctx, r, sink, Event::Keep);
        })
        .add_unary_handler(&RELEASE, move |ctx: RpcContext<'_>, r: VmName, sink| {
            d.ask(&ctx, r, sink, Event::Release);
        })
        .add_unary_handler(&USED, move |ctx: RpcContext<'_>, r: UsedRequest, sink| {
            i.used(&ctx, &r, sink);
        })
        .add_unary_handler(&NOTE, move |ctx: RpcContext<'_>, r: NoteRequest, sink| {
            j.note(&ctx, r, sink);
        })
        .add_unary_handler(&DRAIN, move |ctx: RpcContext<'_>, _: Empty, sink| {
            e.target(&ctx, sink, "Drain", None);
        })
        .add_unary_handler(&RESIZE, move |ctx: RpcContext<'_>, r: ResizeRequest, sink| {
            f.target(&ctx, sink, "Resize", Some(r.target));
        })
        .add_unary_handler(&RESTART, move |ctx: RpcContext<'_>, _: Empty, sink| {
            g.restart(&ctx, sink);
        })
        .build()
}

fn answer(vm: GrpcVM) -> ClaimReply {
    let grace_ms = GRACE.as_millis() as u32;
    ClaimReply { vm: Some(vm).into(), grace_ms, ..ClaimReply::default() }
}

impl Own {
    fn status(&self, ctx: &RpcContext<'_>, sink: UnarySink<StatusReply>) {
        #[cfg(feature = "faults")]
        crate::faults::point("rpc");
        let make = || self.pool.board.json(&self.endpoint).to_string().into_bytes();
        let json = match &self.answers {
            Some(answers) => answers.status(Instant::now(), make),
            None => make(),
        };
        match reserve(ctx, self.answers.as_ref(), &self.peers, json.len()) {
            Ok(reserved) => {
                succeed_with(ctx, sink, StatusReply { json, ..StatusReply::default() }, reserved);
            }
            Err(why) => fail(ctx, sink, RpcStatusCode::RESOURCE_EXHAUSTED, &why),
        }
    }

    fn claim(&self, ctx: &RpcContext<'_>, mut call: Call<ClaimRequest, ClaimReply>) {
        let Peer { pid, start_time, uid, .. } = match claimer(ctx, &self.peers) {
            Ok(peer) => peer,
            Err(why) => {
                let code = RpcStatusCode::PERMISSION_DENIED;
                return ctx.spawn(async move { call.refuse(code, &why).await });
            }
        };
        let (pool, base) = (Arc::clone(&self.pool), Arc::clone(&self.base));
        let base_mib = self.base_mib;
        ctx.spawn(async move {
            let Some(request) = call.request().await else { return };
            if let Err(why) = fits(&request, &base) {
                return call.refuse(RpcStatusCode::INVALID_ARGUMENT, &why).await;
            }
            let lease = request.lease;
            let owner = Owner { pid, start_time, uid, lease, unconfirmed: true };
            let (label, memory_mib) = (request.label, request.memory_mib);
            call.serve(Asker { owner, label, memory_mib, base_mib }, pool).await;
        });
    }

    /// Something that the driver is to do with a VM that was claimed.
    fn ask(
        &self,
        ctx: &RpcContext<'_>,
        vm: VmName,
        sink: UnarySink<Empty>,
        event: impl FnOnce(Asked) -> Event,
    ) {
        let Some(by) = self.peers.find(&ctx.peer()) else {
            return fail(ctx, sink, RpcStatusCode::PERMISSION_DENIED, "the caller is not known");
        };
        let (reply, answer) = oneshot::channel();
        let Peer { pid, start_time, uid, .. } = by;
        let by = Owner { pid, start_time, uid, lease: false, unconfirmed: false };
        self.pool.tell(event(Asked { id: vm.id, by, reply }));
        let pool = Arc::clone(&self.pool);
        ctx.spawn(async move {
            let _ = match answer.await {
                Ok(Ok(())) => sink.success(Empty::new()).await,
                Ok(Err(refusal)) => sink.fail(status(&refusal)).await,
                Err(_) => {
                    let text = pool.farewell().to_string();
                    sink.fail(RpcStatus::with_message(RpcStatusCode::UNAVAILABLE, text)).await
                }
            };
        });
    }

    /// What a VM's owner has noted about it.
    fn note(&self, ctx: &RpcContext<'_>, r: NoteRequest, sink: UnarySink<Empty>) {
        let Some(by) = self.peers.find(&ctx.peer()) else {
            return fail(ctx, sink, RpcStatusCode::PERMISSION_DENIED, "the caller is not known");
        };
        let kind = notes::Kind::of(r.kind).ok_or_else(|| "no kind of note".to_string());
        match kind.and_then(|kind| kind.check(&r.text, by.uid).map(|text| (kind, text))) {
            Ok((kind, text)) => {
                let vm = VmName { id: r.id, ..VmName::default() };
                self.ask(ctx, vm, sink, |asked| Event::Note { asked, kind, text });
            }
            Err(why) => fail(ctx, sink, RpcStatusCode::INVALID_ARGUMENT, &why),
        }
    }

    /// A measure: of somebody who may claim, about a VM that was claimed.
    fn used(&self, ctx: &RpcContext<'_>, r: &UsedRequest, sink: UnarySink<Empty>) {
        let by = match claimer(ctx, &self.peers) {
            Ok(peer) => peer.pid,
            Err(why) => return fail(ctx, sink, RpcStatusCode::PERMISSION_DENIED, &why),
        };
        let took = Duration::from_micros(r.micros).min(LONGEST_USE);
        if !self.pool.board.facts().used(&r.id, by, took) {
            let refusal = status(&Refusal::NoSuchVm);
            return ctx.spawn(async move { drop(sink.fail(refusal).await) });
        }
        succeed(ctx, sink, Empty::new());
    }

    /// Another number of VMs to keep ready; `None` to hand nothing out any more.
    fn target(
        &self,
        ctx: &RpcContext<'_>,
        sink: UnarySink<Empty>,
        call: &str,
        target: Option<u32>,
    ) {
        let Some((peer, sink)) = master(ctx, sink, &self.peers, call) else { return };
        if target.is_some_and(|t| u64::from(t) > MAX_POOL) {
            let text = format!("a pool has at most {MAX_POOL} VMs");
            return fail(ctx, sink, RpcStatusCode::INVALID_ARGUMENT, &text);
        }
        let by = format!("pid {} of uid {}", peer.pid, peer.uid);
        let target = target.map_or(Target::Drained, |t| Target::Keep(t as usize));
        // What comes behind the answer finds it so, however busy the driver is.
        self.pool.drain(target == Target::Drained);
        self.pool.tell(Event::Target { target, by });
        succeed(ctx, sink, Empty::new());
    }

    fn restart(&self, ctx: &RpcContext<'_>, sink: UnarySink<Empty>) {
        let Some((peer, sink)) = master(ctx, sink, &self.peers, "Restart") else { return };
        // A server that would not come up again says so to who asked for it.
        if let Err(why) = (self.again)() {
            return fail(ctx, sink, RpcStatusCode::FAILED_PRECONDITION, &why);
        }
        let pool = Arc::clone(&self.pool);
        let sent = sink.success(Empty::new());
        ctx.spawn(async move {
            let _ = sent.await;
            super::leave(&pool, &format!("asked for by pid {}", peer.pid), Then::Again);
        });
    }
}

/// Whether a VM of this pool can be what is asked for.
fn fits(request: &ClaimRequest, base: &VmConfig) -> Result<(), String> {
    if request.label.len() > MAX_LABEL {
        return Err(format!("a label of {} bytes; at most {MAX_LABEL}", request.label.len()));
    }
    let wanted = |n: u32| (n > 0).then_some(n);
    let size = resize::check(base, wanted(request.cpus), wanted(request.memory_mib));
    size.map_err(|e| e.to_string())
}

fn status(refusal: &Refusal) -> RpcStatus {
    let (code, text) = match refusal {
        Refusal::NoSuchVm => {
            (RpcStatusCode::NOT_FOUND, "no such VM is a client's: it has ended, or was ended")
        }
        Refusal::NotYours => (RpcStatusCode::PERMISSION_DENIED, "another process claimed that VM"),
        Refusal::NotNoted => {
            (RpcStatusCode::INTERNAL, "it could not be written: the server's log says why")
        }
    };
    RpcStatus::with_message(code, text.to_string())
}
