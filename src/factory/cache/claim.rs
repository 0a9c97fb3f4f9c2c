//! A place in the line of claims: where the driver puts a VM and the claim's
//! handler finds it.
//!
//! Invariant: a VM that is given is either taken by the handler or handed back
//! to the giver; a place that was left gives nothing away. All under one lock,
//! which is held for a few instructions.

use std::sync::{Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use super::pool::Ready;

/// What a claim in line is told.
pub enum Answer {
    /// Its VM.
    Vm(Box<Ready>),
    /// The server stops.
    Closing,
    /// A VM that was given to a claim which had gone.
    Returned(Box<Ready>),
}

impl Answer {
    /// What an answer becomes when its claim has gone.
    pub fn returned(self) -> Answer {
        match self {
            Answer::Vm(ready) => Answer::Returned(ready),
            other => other,
        }
    }
}

enum State {
    Waiting(Option<Waker>),
    Answered(Answer),
    Left,
}

/// One claim's place.
pub struct Place {
    /// The user who claims.
    pub uid: u32,
    state: Mutex<State>,
}

impl Place {
    /// A place of this user's.
    pub fn of(uid: u32) -> Place {
        Place { uid, state: Mutex::new(State::Waiting(None)) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Puts an answer there and wakes the handler.
    ///
    /// # Errors
    /// The answer itself, when the claim has gone.
    pub fn give(&self, answer: Answer) -> Result<(), Answer> {
        let mut state = self.lock();
        match &mut *state {
            State::Waiting(waker) => {
                let waker = waker.take();
                *state = State::Answered(answer);
                drop(state);
                if let Some(waker) = waker {
                    waker.wake();
                }
                Ok(())
            }
            State::Answered(_) | State::Left => Err(answer),
        }
    }

    /// Looks for the answer; the handler is woken when it comes.
    pub fn poll(&self, cx: &Context<'_>) -> Poll<Answer> {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, State::Left) {
            State::Answered(answer) => Poll::Ready(answer),
            State::Waiting(_) => {
                *state = State::Waiting(Some(cx.waker().clone()));
                Poll::Pending
            }
            State::Left => Poll::Pending,
        }
    }

    /// The claim goes away; what was given to it in the meantime comes back.
    pub fn leave(&self) -> Option<Answer> {
        match std::mem::replace(&mut *self.lock(), State::Left) {
            State::Answered(answer) => Some(answer),
            State::Waiting(_) | State::Left => None,
        }
    }

    /// Makes the handler look whether its client is still there.
    pub fn nudge(&self) {
        let waker = match &*self.lock() {
            State::Waiting(waker) => waker.clone(),
            State::Answered(_) | State::Left => None,
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    #[test]
    fn an_answer_is_given_once_and_never_to_one_who_left() {
        let cx = Context::from_waker(Waker::noop());
        let place = Place::of(0);
        assert!(place.poll(&cx).is_pending());
        assert!(place.give(Answer::Closing).is_ok());
        assert!(place.give(Answer::Closing).is_err());
        assert!(matches!(place.poll(&cx), Poll::Ready(Answer::Closing)));
        assert!(place.poll(&cx).is_pending());

        let left = Place::of(0);
        assert!(left.leave().is_none());
        assert!(left.give(Answer::Closing).is_err());

        let late = Place::of(0);
        assert!(late.give(Answer::Closing).is_ok());
        assert!(late.leave().is_some(), "what was given comes back");
    }
}
