//! Claims: how a VM leaves, by Kata's GetBaseVM or our own Claim.
//!
//! Both take a stream of requests: on the wire that is the same as a single one, and
//! only a stream tells, when it is asked, whether its client is still there, so that a
//! claim that was given up takes no VM with it.
//!
//! Invariants: a ready VM is taken, recorded and answered on gRPC's own thread, which
//! never waits; whatever becomes of a delivery, the driver is told, and the VM moves
//! with the telling.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use futures_util::Stream;
use grpcio::{ClientStreamingSink, RequestStream, RpcStatus, RpcStatusCode};

use crate::events::event;
use crate::factory::cache::claim::{Answer, Place};
use crate::factory::cache::pool::{Delivered, Event, Pool, Ready};
use crate::factory::cache::quota::Share;
use crate::proto::cache::GrpcVM;
use crate::vm::ledger::Owner;
use crate::vm::resize::grown;

/// A claim: who asks, and where the answer goes. The one must outlive the other:
/// dropped, a stream of requests cancels its call.
pub struct Call<Q, R> {
    /// Where its requests come from.
    pub client: RequestStream<Q>,
    /// Where its answer goes.
    pub sink: ClientStreamingSink<R>,
    /// A VM's message as this call's answer.
    pub answer: fn(GrpcVM) -> R,
}

impl<Q: Send + 'static, R: Send + 'static> Call<Q, R> {
    /// No VM.
    pub async fn refuse(self, code: RpcStatusCode, text: &str) {
        let _ = self.sink.fail(RpcStatus::with_message(code, text.to_string())).await;
        drop(self.client);
    }

    /// The first of its requests; `None` when the client has gone, or sends none.
    pub async fn request(&mut self) -> Option<Q> {
        let client = &mut self.client;
        poll_fn(|cx| Pin::new(&mut *client).poll_next(cx)).await?.ok()
    }

    /// Gives a VM, at once or when one comes.
    pub async fn serve(self, claimer: Asker, pool: Arc<Pool>) {
        let since = Instant::now();
        let claimer = match claimer.within(&pool) {
            Ok(claimer) => claimer,
            Err(why) => {
                let Owner { pid, uid, .. } = claimer.owner;
                event!(CLAIM_REFUSED, pid = pid, uid = uid; "pid {pid}: {why}");
                return self.refuse(RpcStatusCode::RESOURCE_EXHAUSTED, &why).await;
            }
        };
        // Not after the server has said that it ends.
        let taken = if pool.closing() { None } else { pool.take() };
        match taken {
            Some(ready) => self.deliver(ready, claimer, &pool, (false, since)).await,
            None if pool.closing() => {
                self.refuse(RpcStatusCode::UNAVAILABLE, pool.farewell()).await;
            }
            None => match pool.stand_in_line(claimer.owner.uid) {
                Ok(place) => self.wait(&place, claimer, &pool, since).await,
                Err(full) => self.refuse(RpcStatusCode::RESOURCE_EXHAUSTED, &full).await,
            },
        }
    }

    /// Waits in line, until there is an answer or the client has gone.
    async fn wait(mut self, place: &Arc<Place>, claimer: Claimer, pool: &Pool, since: Instant) {
        let answer = poll_fn(|cx| {
            // An error is the client's cancellation, its deadline, or its end. It
            // comes only when it is asked for: the driver has every place asked
            // now and then, and this one is when a VM comes.
            let client = Pin::new(&mut self.client).poll_next(cx);
            let gone = matches!(client, Poll::Ready(Some(Err(_))));
            match gone {
                true => Poll::Ready(None),
                false => place.poll(cx).map(Some),
            }
        })
        .await;
        match answer.or_else(|| place.leave().map(Answer::returned)) {
            Some(Answer::Vm(ready)) => self.deliver(ready, claimer, pool, (true, since)).await,
            Some(Answer::Closing) => {
                self.refuse(RpcStatusCode::UNAVAILABLE, pool.farewell()).await;
            }
            // Nobody has seen this VM: it is as good as new.
            Some(Answer::Returned(ready)) => pool.tell(Event::Returned(ready)),
            None => pool.tell(Event::Gone(Arc::clone(place))),
        }
    }

    /// Sends a VM to its claimer and tells the driver what became of it: whether the claim
    /// had stood in line, and since when it is there.
    async fn deliver(
        self,
        ready: Box<Ready>,
        claimer: Claimer,
        pool: &Pool,
        (waited, since): (bool, Instant),
    ) {
        if let Err(e) = ready.note.write(&claimer.owner) {
            let text = format!("write the ledger of VM {}: {e}", ready.vm.id());
            event!(CLAIM_REFUSED, vm = ready.vm.id(); "{text}");
            // Nobody has seen this VM.
            let event = match ready.note.clear() {
                Ok(()) => Event::Returned(ready),
                Err(_) => Event::Undelivered { vm: Box::new(ready.vm), why: text.clone() },
            };
            self.refuse(RpcStatusCode::INTERNAL, &text).await;
            return pool.tell(event);
        }
        let uid = claimer.owner.uid;
        let own = uid == 0 || uid == nix::unistd::geteuid().as_raw();
        let handed = match own {
            true => Ok(()),
            false => ready.vm.hand_to(uid, claimer.memory_mib),
        };
        if let Err(e) = handed {
            let text = format!(
                "hand VM {} to uid {uid}: {e}; another claim gets another VM, and the server's log \
                 tells whether that fails, too",
                ready.vm.id()
            );
            event!(CLAIM_REFUSED, vm = ready.vm.id(); "{text}");
            self.refuse(RpcStatusCode::INTERNAL, &text).await;
            return pool.tell(Event::Undelivered { vm: Box::new(ready.vm), why: text });
        }
        let Call { client, sink, answer } = self;
        let Ready { vm, message, .. } = *ready;
        // Nobody else is woken before the answer is out: on a small machine the driver
        // would take the client's processor.
        let sent = sink.success(answer(message)).await.map_err(|e| e.to_string());
        drop(client);
        let Claimer { owner, label, share, .. } = claimer;
        pool.tell(match sent {
            Ok(()) => Event::Delivered {
                vm: Delivered::new(vm, owner, label, share),
                waited,
                took: since.elapsed(),
            },
            Err(why) => {
                pool.quotas.unconfirmed(uid);
                Event::Undelivered { vm: Box::new(vm), why }
            }
        });
    }
}

/// Who claims.
pub struct Asker {
    /// The process.
    pub owner: Owner,
    /// What it calls the VM.
    pub label: String,
    /// To what it will make its memory grow, MiB; 0 for no more than it has.
    pub memory_mib: u32,
    /// The memory of the pool's VMs, MiB.
    pub base_mib: u32,
}

impl Asker {
    /// The same as one who may have one more VM.
    fn within(&self, pool: &Pool) -> Result<Claimer, String> {
        let Asker { owner, label, memory_mib, base_mib } = self;
        let share = pool.quotas.claim(owner.uid, grown(*base_mib, *memory_mib))?;
        Ok(Claimer { owner: *owner, label: label.clone(), memory_mib: *memory_mib, share })
    }
}

/// Who may have one more VM.
struct Claimer {
    owner: Owner,
    label: String,
    memory_mib: u32,
    share: Share,
}
