//! This process's three streams, tied to those of a process in a guest.
//!
//! | ours | what happens |
//! |---|---|
//! | output: its reader has gone | the guest's end is closed, too: the process gets EPIPE |
//! | output: takes nothing now (a full pipe, a reader that stops, non-blocking) | the process waits in its write |
//! | output: any other error (full disk, closed) | a message, and exit code 125 |
//! | input: nothing there yet, non-blocking or not | it is waited for |
//! | input: a terminal that has another job in front | it is waited for, and no signal stops this |
//! | input: closed | at its end |
//! | input: any other error | its end, a message, and exit code 125 |
//!
//! Invariants: every byte is carried, in order, or [`Carried::Lost`] says that it was
//! not; flags of a file that others share are never changed.
//!
//! Does not: keep the two outputs in the order in which they were written.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{after, bounded, Receiver};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::unistd::{getpgrp, read, tcgetpgrp, write};

use crate::report::chain;
use crate::sys::signal::{Set, SIGTTIN};
use crate::sys::streams::was_closed;
use crate::worker::{self, Worker};
use crate::workload::{Running, StreamCloser, StreamReader};

/// Bytes read from standard input at once.
const CHUNK: usize = 256 * 1024;
/// How often a terminal is asked whether this job is in front again.
const IN_BACKGROUND: Duration = Duration::from_millis(250);

/// A guest that has bytes answers sooner.
pub const QUIET: Duration = Duration::from_secs(1);

/// How carrying a stream ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Carried {
    /// All of it is where it belongs, or nobody wants it any more.
    Whole,
    /// Some of it is not, and why.
    Lost(String),
}

/// How a stream flows: for who asks whether there was more of it.
#[derive(Clone)]
pub struct Flow(Arc<Mutex<Flowing>>);

enum Flowing {
    /// Bytes are waited for, since then.
    Waits(Instant),
    /// Bytes are here that nobody has taken yet.
    Holds,
    /// It is at its end.
    Ended,
}

impl Flow {
    fn set(&self, flowing: Flowing) {
        *self.0.lock().unwrap_or_else(|e| e.into_inner()) = flowing;
    }

    /// Whether all that came was taken, and nothing more for a while.
    pub fn quiet(&self) -> bool {
        match *self.0.lock().unwrap_or_else(|e| e.into_inner()) {
            Flowing::Waits(since) => since.elapsed() >= QUIET,
            Flowing::Holds => false,
            Flowing::Ended => true,
        }
    }
}

/// Why standard input was not carried to its end, if it was not.
pub type InputFault = Arc<Mutex<Option<String>>>;

/// Waits until `fd` can be read or written, or has an error to tell.
fn wait_for(fd: BorrowedFd<'_>, what: PollFlags) -> Result<(), Errno> {
    match poll(&mut [PollFd::new(fd, what)], PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(e),
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match write(fd, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait_for(fd, PollFlags::POLLOUT)?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What a file system tells of earlier writes when a file is closed.
fn close_error(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let again = fd.try_clone_to_owned().map_err(|_| Errno::EBADF)?;
    nix::unistd::close(again)
}

/// One of our outputs.
#[derive(Clone, Copy)]
pub enum Output {
    Stdout,
    Stderr,
}

impl Output {
    fn name(self) -> &'static str {
        match self {
            Output::Stdout => "standard output",
            Output::Stderr => "standard error",
        }
    }

    fn thread(self) -> &'static str {
        match self {
            Output::Stdout => "vmc-stdout",
            Output::Stderr => "vmc-stderr",
        }
    }

    fn from(self, process: &Running) -> StreamReader {
        match self {
            Output::Stdout => process.stdout(),
            Output::Stderr => process.stderr(),
        }
    }

    fn put(self, bytes: &[u8]) -> Result<(), Errno> {
        match self {
            _ if was_closed(self as u8 + 1) => Err(Errno::EBADF),
            Output::Stdout => write_all(io::stdout().as_fd(), bytes),
            Output::Stderr => write_all(io::stderr().as_fd(), bytes),
        }
    }

    fn end(self) -> Result<(), Errno> {
        match self {
            _ if was_closed(self as u8 + 1) => Ok(()),
            Output::Stdout => close_error(io::stdout().as_fd()),
            Output::Stderr => close_error(io::stderr().as_fd()),
        }
    }

    fn fd(self) -> io::Result<OwnedFd> {
        match self {
            Output::Stdout => io::stdout().as_fd().try_clone_to_owned(),
            Output::Stderr => io::stderr().as_fd().try_clone_to_owned(),
        }
    }

    /// Closes the guest's end as soon as our reader goes, not only when something is
    /// written that nobody takes. Not joined: the reader may stay. A FIFO with a name may
    /// have another reader by then.
    fn watch(self, process: StreamCloser) -> Result<(), worker::Error> {
        let Ok(fd) = self.fd() else { return Ok(()) };
        let kind = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let once = |name: &str| name.starts_with("pipe:") || name.starts_with("socket:");
        if !kind.is_ok_and(|k| k.to_str().is_some_and(once)) {
            return Ok(());
        }
        Worker::spawn("vmc-reader", move || {
            // Errors are told without being asked for: a pipe's POLLERR, a socket's POLLHUP.
            if wait_for(fd.as_fd(), PollFlags::empty()).is_ok() {
                process.close();
            }
        })?;
        Ok(())
    }

    fn carry(self, mut from: StreamReader, flow: &Flow) -> Carried {
        let fault = |e: Errno| {
            let why = io::Error::from(e);
            Carried::Lost(format!("write the command's output to {}: {why}", self.name()))
        };
        loop {
            flow.set(Flowing::Waits(Instant::now()));
            let bytes = match from.next_chunk() {
                Ok(bytes) => bytes,
                Err(e) => {
                    let why = chain(&e);
                    return Carried::Lost(format!("read the command's {}: {why}", self.name()));
                }
            };
            if bytes.is_empty() {
                return self.end().map_or_else(fault, |()| Carried::Whole);
            }
            flow.set(Flowing::Holds);
            if let Err(e) = self.put(&bytes) {
                let gone = matches!(e, Errno::EPIPE | Errno::ECONNRESET);
                // The process is to learn of it by its next write; it may have ended.
                let _ = from.close();
                return if gone { Carried::Whole } else { fault(e) };
            }
        }
    }
}

/// Carries one output of the process on a thread of its own.
pub fn carry_output(
    process: &Running,
    to: Output,
) -> Result<(Receiver<Carried>, Flow), worker::Error> {
    let from = to.from(process);
    if !was_closed(to as u8 + 1) {
        to.watch(from.closer())?;
    }
    let (tell, carried) = bounded(1);
    let flow = Flow(Arc::new(Mutex::new(Flowing::Waits(Instant::now()))));
    let told = flow.clone();
    Worker::spawn(to.thread(), move || {
        let end = to.carry(from, &told);
        told.set(Flowing::Ended);
        tell.send(end)
    })?;
    Ok((carried, flow))
}

/// Carries our standard input in, on a thread of its own. That is not joined: it may sit
/// in a read that never comes.
pub fn carry_input(process: &Running) -> Result<InputFault, worker::Error> {
    let fault = InputFault::default();
    if was_closed(0) {
        drop(process.stdin());
        return Ok(fault);
    }
    let mut to = process.stdin();
    let told = Arc::clone(&fault);
    Worker::spawn("vmc-stdin", move || {
        // A read by a job in the background then fails, and does not stop it.
        let _ = Set::of([SIGTTIN]).block();
        let tell = |text| *told.lock().unwrap_or_else(|e| e.into_inner()) = Some(text);
        let mut chunk = vec![0; CHUNK];
        loop {
            match next_input(&mut chunk) {
                Ok(0) => return,
                Ok(n) => match to.write_all(&chunk[..n]) {
                    Ok(()) => {}
                    // It reads no more, or has ended; its exit code tells.
                    Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return,
                    Err(e) => return tell(format!("write the command's input: {}", chain(&e))),
                },
                // Not open to be read, as nohup leaves it.
                Err(Errno::EBADF) => return,
                Err(e) => return tell(format!("read standard input: {}", io::Error::from(e))),
            }
        }
    })?;
    Ok(fault)
}

fn next_input(chunk: &mut [u8]) -> Result<usize, Errno> {
    let from = io::stdin();
    loop {
        match read(from.as_fd(), chunk) {
            Ok(n) => return Ok(n),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait_for(from.as_fd(), PollFlags::POLLIN)?,
            Err(Errno::EIO) if in_background(from.as_fd()) => {
                let _ = after(IN_BACKGROUND).recv();
            }
            Err(e) => return Err(e),
        }
    }
}

/// Whether it is a terminal, and another job has it.
pub fn in_background(fd: BorrowedFd<'_>) -> bool {
    tcgetpgrp(fd).is_ok_and(|front| front != getpgrp())
}
