//! A session with hyperstart: both channels, one reader thread each.
//!
//! ```text
//!            control  ◄── NEXT, ACK, ERROR, events ── vmc-hyper-ctl ─┐
//! commands ─► 512 bytes, NEXT, 512 bytes, NEXT …                     ├─► state
//!            stream   ◄── bytes of all processes ──── vmc-hyper-tty ─┘
//! ```
//!
//! Invariants: one command at a time, whose answer is the next one that comes; an
//! answer that did not come in time leaves the session of no use, since the next
//! command would get it. Of each stream at most [`KEPT`] bytes are kept: then the
//! channel is not read, and all processes of the guest wait for whoever reads that
//! one. A process has ended when its streams have and its event has come.
//!
//! Does not: recover a channel in which another client left half a message.
//!
//! Source: hyperstart 1.1.0 (API 4244), src/event.c and src/init.c.

mod readers;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::frames::{control, stream, Code, PIECE};
use super::messages::Sequences;
use crate::transport::{self, socket};
use crate::worker::{Error as ThreadError, Worker};
use readers::{read_bytes, read_commands};

/// Bytes of one stream that wait for their reader.
pub const KEPT: usize = 1024 * 1024;
/// How long QEMU may take no bytes.
const WRITING: Duration = Duration::from_secs(30);
/// Processes whose streams or ends are remembered.
pub const MAX_PROCESSES: usize = 1024;

/// Why a command was not carried out.
#[derive(Debug)]
pub enum Error {
    /// The channel ended, or an answer did not come.
    Broken(String),
    /// The guest said ERROR, perhaps with a text.
    Refused(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Broken(text) => f.write_str(text),
            Error::Refused(text) if text.is_empty() => f.write_str("hyperstart refused it"),
            Error::Refused(text) => write!(f, "hyperstart refused it: {text}"),
        }
    }
}

/// A process in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Its container.
    pub container: String,
    /// Its id.
    pub process: String,
}

#[derive(Default)]
struct Process {
    sequences: Option<Sequences>,
    streams_ended: bool,
    code: Option<i32>,
}

#[derive(Default)]
struct State {
    ready: bool,
    /// Bytes that were sent and that the guest has not read.
    unread: usize,
    answer: Option<Result<Vec<u8>, Vec<u8>>>,
    processes: HashMap<Key, Process>,
    streams: HashMap<u64, VecDeque<u8>>,
    /// Why no more commands can be given.
    broken: Option<String>,
    /// Why no more bytes come. An answer that is on its way still does.
    stream_ended: Option<String>,
}

impl State {
    /// Forgets processes that have ended, and what of their output nobody has read.
    fn drop_ended(&mut self) {
        self.processes.retain(|_, p| p.code.is_none() || !p.streams_ended);
        let known: Vec<u64> = self
            .processes
            .values()
            .filter_map(|p| p.sequences)
            .flat_map(|q| [q.stdio, q.stderr])
            .collect();
        self.streams.retain(|sequence, _| known.contains(sequence));
    }
}

struct Shared {
    state: Mutex<State>,
    news: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.news.wait(guard).unwrap_or_else(|e| e.into_inner())
    }

    fn change(&self, f: impl FnOnce(&mut State)) {
        f(&mut self.lock());
        self.news.notify_all();
    }

    fn broke(&self, why: &str) {
        self.change(|state| {
            state.broken.get_or_insert(why.to_string());
        });
    }

    /// Waits until `done` gives something; `None` for no deadline. `on_streams`: it
    /// comes by the stream channel, not by the control channel alone.
    fn until<T>(
        &self,
        within: Option<Duration>,
        on_streams: bool,
        what: &str,
        mut done: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, Error> {
        let deadline = within.map(|w| Instant::now() + w);
        let mut state = self.lock();
        loop {
            if let Some(value) = done(&mut state) {
                return Ok(value);
            }
            // What lies in the other channel still counts: a guest that ends closes both.
            let all_read = !on_streams || state.stream_ended.is_some();
            if let Some(why) = state.broken.as_ref().filter(|_| all_read) {
                return Err(Error::Broken(why.clone()));
            }
            let Some(deadline) = deadline else {
                state = self.wait(state);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let after = within.unwrap_or_default().as_secs_f64();
                return Err(Error::Broken(format!("no {what} within {after:.1} s")));
            }
            state = self.news.wait_timeout(state, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

/// A session.
pub struct Session {
    shared: Arc<Shared>,
    control: Mutex<UnixStream>,
    stream: Mutex<UnixStream>,
    next: Mutex<u64>,
}

impl Drop for Session {
    fn drop(&mut self) {
        for channel in [&self.control, &self.stream] {
            let channel = channel.lock().unwrap_or_else(|e| e.into_inner());
            let _ = channel.shutdown(Shutdown::Both);
        }
    }
}

impl Session {
    /// Connects to both of QEMU's sockets. With `booting`, waits for READY, which a
    /// guest says once; else the guest must answer a PING.
    ///
    /// # Errors
    /// When a socket is not there, or the guest says nothing.
    pub fn open(
        control: &Path,
        stream: &Path,
        within: Duration,
        booting: bool,
    ) -> Result<Session, transport::Error> {
        let deadline = Instant::now() + within;
        let control = socket::open(control, within).map_err(transport::Error::Socket)?;
        let stream = socket::open(stream, within).map_err(transport::Error::Socket)?;
        let guest = |what: String| transport::Error::Guest { what };
        let session = Session::over(control, stream).map_err(|e| guest(e.to_string()))?;
        let left = deadline.saturating_duration_since(Instant::now());
        let greeted = match booting {
            true => session
                .shared
                .until(Some(left), false, "READY of hyperstart", |s| s.ready.then_some(())),
            false => session.call(Code::Ping, &[], left).map(|_| ()),
        };
        greeted.map_err(|e| guest(format!("no hyperstart answers: {e}")))?;
        Ok(session)
    }

    /// The same on streams that are connected already.
    ///
    /// # Errors
    /// When there are no threads.
    pub fn over(control: UnixStream, stream: UnixStream) -> Result<Session, ThreadError> {
        let failed = |source| ThreadError::Start { name: "vmc-hyper-ctl".into(), source };
        let shared = Arc::new(Shared { state: Mutex::new(State::default()), news: Condvar::new() });
        for channel in [&control, &stream] {
            channel.set_write_timeout(Some(WRITING)).map_err(failed)?;
        }
        let mut from = control.try_clone().map_err(failed)?;
        let theirs = Arc::clone(&shared);
        Worker::spawn("vmc-hyper-ctl", move || read_commands(&theirs, &mut from))?;
        let mut from = stream.try_clone().map_err(failed)?;
        let theirs = Arc::clone(&shared);
        Worker::spawn("vmc-hyper-tty", move || read_bytes(&theirs, &mut from))?;
        // Numbers that no earlier client of this guest has used.
        let first = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        Ok(Session {
            shared,
            control: Mutex::new(control),
            stream: Mutex::new(stream),
            next: Mutex::new(first as u64),
        })
    }

    /// Carries out a command; its answer's payload.
    ///
    /// # Errors
    /// [`Error`].
    pub fn call(&self, code: Code, payload: &[u8], within: Duration) -> Result<Vec<u8>, Error> {
        self.call_by_number(code as u32, payload, within)
    }

    pub(super) fn call_by_number(
        &self,
        code: u32,
        payload: &[u8],
        within: Duration,
    ) -> Result<Vec<u8>, Error> {
        let deadline = Instant::now() + within;
        let mut out = self.control.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(why) = &self.shared.lock().broken {
            return Err(Error::Broken(why.clone()));
        }
        let done = self.exchange(&mut out, &control(code, payload), deadline);
        if let Err(Error::Broken(why)) = &done {
            // Its answer may still come, and would be the next command's; and a guest
            // that has half a message takes what comes next for the rest.
            self.shared.broke(why);
        }
        done
    }

    fn exchange(
        &self,
        out: &mut UnixStream,
        message: &[u8],
        deadline: Instant,
    ) -> Result<Vec<u8>, Error> {
        let left = || Some(deadline.saturating_duration_since(Instant::now()));
        // One that nobody asked for is nobody's.
        self.shared.change(|s| s.answer = None);
        for piece in message.chunks(PIECE) {
            self.shared.until(left(), false, "NEXT", |s| (s.unread == 0).then_some(()))?;
            self.shared.change(|s| s.unread += piece.len());
            out.write_all(piece).map_err(|e| Error::Broken(format!("write to QEMU: {e}")))?;
        }
        let answer = self.shared.until(left(), false, "answer", |s| s.answer.take())?;
        answer.map_err(|text| {
            let text = String::from_utf8_lossy(&text);
            Error::Refused(text.trim_end_matches('\0').chars().take(200).collect())
        })
    }

    /// Announces a process, before it is started: the numbers of its streams.
    ///
    /// # Errors
    /// When so many are remembered already that never were waited for.
    pub fn announce(&self, key: Key, terminal: bool) -> Result<Sequences, Error> {
        let sequences = {
            let mut next = self.next.lock().unwrap_or_else(|e| e.into_inner());
            let stdio = *next;
            *next += 2;
            Sequences { stdio, stderr: if terminal { 0 } else { stdio + 1 } }
        };
        let mut room = true;
        self.shared.change(|s| {
            if s.processes.len() >= MAX_PROCESSES {
                s.drop_ended();
            }
            room = s.processes.len() < MAX_PROCESSES;
        });
        if room {
            self.remember(key, sequences);
        }
        match room {
            true => Ok(sequences),
            false => Err(Error::Broken(format!("{MAX_PROCESSES} processes were never waited for"))),
        }
    }

    pub(super) fn remember(&self, key: Key, sequences: Sequences) {
        self.shared.change(|s| {
            s.processes.insert(key, Process { sequences: Some(sequences), ..Process::default() });
            s.streams.insert(sequences.stdio, VecDeque::new());
            if sequences.stderr != 0 {
                s.streams.insert(sequences.stderr, VecDeque::new());
            }
        });
    }

    /// The processes that have not ended.
    pub fn running(&self) -> Vec<Key> {
        let state = self.shared.lock();
        state.processes.iter().filter(|(_, p)| p.code.is_none()).map(|(k, _)| k.clone()).collect()
    }

    /// Nothing more is to be asked of the guest.
    pub fn close(&self, why: &str) {
        self.shared.broke(why);
    }

    /// The same, and nothing more is waited for: what the guest wrote and was not read is
    /// lost.
    pub fn hang_up(&self, why: &str) {
        self.shared.change(|s| {
            s.broken.get_or_insert(why.to_string());
            s.stream_ended.get_or_insert(why.to_string());
        });
    }

    /// Forgets a process that was not started, or whose end has been told.
    pub fn forget(&self, key: &Key) {
        self.shared.change(|s| {
            let known = s.processes.remove(key).and_then(|p| p.sequences);
            for sequence in known.into_iter().flat_map(|q| [q.stdio, q.stderr]) {
                s.streams.remove(&sequence);
            }
        });
    }

    /// The numbers of a process's streams.
    pub fn sequences(&self, key: &Key) -> Option<Sequences> {
        self.shared.lock().processes.get(key).and_then(|p| p.sequences)
    }

    /// Whether a process has ended.
    pub fn ended(&self, key: &Key) -> bool {
        self.shared.lock().processes.get(key).is_none_or(|p| p.code.is_some())
    }

    /// Waits for a process's end: its exit code.
    ///
    /// # Errors
    /// When there is no such process, time is up, or the channel ended.
    pub fn wait(&self, key: &Key, within: Option<Duration>) -> Result<i32, Error> {
        self.shared.until(within, true, "end of the process", |s| match s.processes.get(key) {
            None => Some(Err(Error::Refused("no such process".into()))),
            Some(p) => p.code.filter(|_| p.streams_ended || s.stream_ended.is_some()).map(Ok),
        })?
    }

    /// Sends bytes of a process's standard input; none for its end.
    ///
    /// # Errors
    /// When the channel ended.
    pub fn send(&self, sequence: u64, data: &[u8]) -> Result<(), Error> {
        let mut out = self.stream.lock().unwrap_or_else(|e| e.into_inner());
        out.write_all(&stream(sequence, data))
            .map_err(|e| Error::Broken(format!("write to QEMU: {e}")))
    }

    /// Reads what a process wrote; waits for some, empty at the end.
    ///
    /// # Errors
    /// When the channel ended.
    pub fn read(&self, key: &Key, sequence: u64, most: usize) -> Result<Vec<u8>, Error> {
        let bytes = self.shared.until(None, true, "bytes", |s| {
            let ended = s.processes.get(key).is_none_or(|p| p.streams_ended);
            match s.streams.get_mut(&sequence) {
                Some(kept) if !kept.is_empty() => {
                    let n = kept.len().min(most);
                    Some(Ok(kept.drain(..n).collect()))
                }
                _ if ended => Some(Ok(Vec::new())),
                _ => s.stream_ended.clone().map(|why| Err(Error::Broken(why))),
            }
        })??;
        self.shared.news.notify_all();
        Ok(bytes)
    }
}
