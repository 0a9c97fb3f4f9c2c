//! Ending a copy from another thread: a signal.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};

use nix::unistd::{unlinkat, UnlinkatFlags};

use super::walk::{identity, look};
use super::Error;

/// Ends a copy. Whoever asks for it may end this process right afterwards: the file that
/// was half written is gone then, and no other one is begun.
#[derive(Debug, Default)]
pub struct Stop(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    asked: bool,
    half: Option<Half>,
}

/// A file that is being written.
#[derive(Debug)]
struct Half {
    directory: OwnedFd,
    name: OsString,
    identity: (u64, u64),
}

impl Half {
    /// Only what was made: somebody may have put another file in its place.
    fn remove(&self) {
        let dir = self.directory.as_fd();
        if look(dir, &self.name).is_ok_and(|stat| identity(&stat) == self.identity) {
            let _ = unlinkat(dir, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

impl Stop {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Asks for the end; removes the file that is being written.
    pub fn ask(&self) {
        let mut state = self.state();
        state.asked = true;
        if let Some(half) = state.half.take() {
            half.remove();
        }
    }

    /// Goes on unless somebody has asked for the end.
    ///
    /// # Errors
    /// [`Error::Stopped`].
    pub fn check(&self) -> Result<(), Error> {
        match self.state().asked {
            true => Err(Error::Stopped),
            false => Ok(()),
        }
    }

    /// From now on, this file is half written.
    pub(super) fn begun(
        &self,
        directory: BorrowedFd<'_>,
        name: &OsStr,
        identity: (u64, u64),
    ) -> std::io::Result<()> {
        let half = Half {
            directory: directory.try_clone_to_owned()?,
            name: name.to_os_string(),
            identity,
        };
        let mut state = self.state();
        if state.asked {
            half.remove();
        } else {
            state.half = Some(half);
        }
        Ok(())
    }

    /// It is whole.
    pub(super) fn done(&self) {
        self.state().half = None;
    }

    /// It will not be.
    pub(super) fn failed(&self) {
        if let Some(half) = self.state().half.take() {
            half.remove();
        }
    }
}
