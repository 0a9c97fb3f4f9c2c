//! Watches pidfds: one thread sleeps until a process ends, without polling.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crossbeam_channel::Sender;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::pool::Event;
use crate::worker::{self, Worker};

/// The token of the eventfd that stops the thread.
const STOP: u64 = 0;

/// How long the thread may take to end.
const END: Duration = Duration::from_secs(2);

struct Shared {
    epoll: Epoll,
    stop: EventFd,
    fds: Mutex<HashMap<u64, OwnedFd>>,
}

/// A thread that tells the driver of ended processes.
pub struct Watch {
    shared: Arc<Shared>,
    next: u64,
    thread: Option<Worker<()>>,
}

fn fds(shared: &Shared) -> MutexGuard<'_, HashMap<u64, OwnedFd>> {
    shared.fds.lock().unwrap_or_else(|e| e.into_inner())
}

impl Watch {
    /// Starts the thread; `events` gets an [`Event::Ended`] for each end.
    ///
    /// # Errors
    /// As epoll_create(2), or when there is no thread.
    pub fn start(events: Sender<Event>) -> io::Result<Watch> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        epoll.add(&stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        let shared = Arc::new(Shared { epoll, stop, fds: Mutex::new(HashMap::new()) });
        let theirs = Arc::clone(&shared);
        let thread = Worker::spawn("vmc-watch", move || run(&theirs, &events))
            .map_err(|e: worker::Error| io::Error::other(e.to_string()))?;
        Ok(Watch { shared, next: STOP + 1, thread: Some(thread) })
    }

    /// Watches a pidfd; the token that its event will carry.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add(&mut self, pidfd: OwnedFd) -> io::Result<u64> {
        let token = self.next;
        self.next += 1;
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
        self.shared.epoll.add(&pidfd, EpollEvent::new(flags, token))?;
        fds(&self.shared).insert(token, pidfd);
        Ok(token)
    }

    /// Stops watching; its event may be on the way already.
    pub fn remove(&mut self, token: u64) {
        if let Some(fd) = fds(&self.shared).remove(&token) {
            let _ = self.shared.epoll.delete(&fd);
        }
    }
}

impl Drop for Watch {
    /// Ends the thread, which has an end of the driver's channel.
    fn drop(&mut self) {
        let _ = self.shared.stop.write(1);
        if let Some(Err(e)) = self.thread.take().map(|t| t.join(END)) {
            log::error!("stop: {e}");
        }
    }
}

fn run(shared: &Shared, events: &Sender<Event>) {
    // So many at once are taken from the kernel; more come with the next round.
    let mut found = [EpollEvent::empty(); 64];
    loop {
        let n = match shared.epoll.wait(&mut found, EpollTimeout::NONE) {
            Ok(n) => n,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => {
                log::error!("watch for ended processes: {e}");
                return;
            }
        };
        for event in &found[..n] {
            if event.data() == STOP || events.send(Event::Ended(event.data())).is_err() {
                return;
            }
        }
    }
}
