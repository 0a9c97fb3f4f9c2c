//! Connections of agents: made by the first call, kept until they are given up.

use std::sync::{Arc, Mutex, MutexGuard};

use super::address::Address;
use super::{hyperstart, kata, Agent, Error, Outcome};

/// A connection to an agent, which another value for the same agent can take
/// over ([`super::Agent::reuse`]).
pub enum Link {
    /// To Kata's of 2.x and later, or ours.
    Ttrpc(Arc<kata::ttrpc::Connection>),
    /// To Kata's of 1.x.
    Grpc(Arc<kata::grpc::Connection>),
    /// To hyperstart.
    Hyperstart(Arc<hyperstart::session::Session>),
}

/// Where a connection is kept.
pub(super) struct Slot<T>(Mutex<Option<Arc<T>>>);

impl<T> Slot<T> {
    pub fn empty() -> Slot<T> {
        Slot(Mutex::new(None))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<T>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The connection; made by `connect` when there is none.
    pub fn get(&self, connect: impl FnOnce() -> Outcome<T>) -> Outcome<Arc<T>> {
        let mut slot = self.lock();
        if let Some(link) = &*slot {
            return Ok(Arc::clone(link));
        }
        let link = Arc::new(connect()?);
        *slot = Some(Arc::clone(&link));
        Ok(link)
    }

    pub fn put(&self, link: Arc<T>) {
        *self.lock() = Some(link);
    }

    /// Takes the connection and the address of another value for the same agent;
    /// `pick` finds it.
    pub fn take_over(
        &self,
        address: &mut Address,
        other: Box<dyn Agent>,
        pick: impl FnOnce(Link) -> Option<Arc<T>>,
    ) -> Outcome<()> {
        let there = other.address().clone();
        if let Some(link) = other.give_link() {
            let call = "reuse (of another agent's)";
            self.put(pick(link).ok_or(Error::Unsupported { call })?);
        }
        *address = there;
        Ok(())
    }

    pub fn take(&self) -> Option<Arc<T>> {
        self.lock().take()
    }
}
