//! Output of a process in a guest whose agent forgets it, and what it wrote, as soon as its
//! end is told: Kata's agents close the pipes and delete the record when WaitProcess returns
//! (`do_wait_process` of src/agent/src/rpc.rs in kata-containers 3.20 and 4.1, `WaitProcess`
//! of grpc.go in kata-containers/agent 1.13). So both streams are read to their end before
//! anybody waits.
//!
//! ```text
//! agent ──read──► a thread per stream ──► at most KEPT bytes ──► StreamReader
//!                                   └──► dropped, when somebody waits and nobody reads
//! wait: both streams over ─► WaitProcess
//!       the process has ended, and others hold its streams and say nothing ─► WaitProcess
//! ```
//!
//! Invariants: one read of a stream is under way at a time, and what it brings goes to one
//! reader, in order; at most [`KEPT`] bytes and one read's more are kept of a stream; an
//! error of a read is never its end; a thread ends with its stream, with the guest, or once
//! nobody has the process any more.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use super::running::{as_io, CHUNK};
use super::silence::Watched;
use super::Error;
use crate::agent::{self, ProcessId, Stream};
use crate::worker::Worker;

/// Bytes of a stream that nobody has read yet: then its process waits, as at a full pipe.
const KEPT: usize = 4 * CHUNK;
/// How long a thread of a full stream sleeps between looks at whether it is still wanted.
const WANTED: Duration = Duration::from_secs(1);
/// How often a silent process is asked whether it still runs.
const ENDED_PROBE: Duration = Duration::from_secs(2);
/// How long those that hold the streams of a process that has ended may say nothing.
const HELD: Duration = Duration::from_secs(10);

/// Both streams of one process.
pub(super) struct Streams {
    agent: Arc<Watched>,
    id: ProcessId,
    state: Mutex<State>,
    changed: Condvar,
    /// Its exit code, which its agent tells once: who asks holds this.
    code: Mutex<Option<i32>>,
}

#[derive(Default)]
struct State {
    out: One,
    err: One,
    /// Somebody waits for the process's end: what nobody reads is dropped.
    waited: bool,
}

impl State {
    fn of(&mut self, stream: Stream) -> &mut One {
        match stream {
            Stream::Out => &mut self.out,
            Stream::Err => &mut self.err,
        }
    }

    fn over(&self) -> bool {
        self.out.over.is_some() && self.err.over.is_some()
    }
}

/// One stream.
#[derive(Default)]
struct One {
    /// Readers that were given out and not dropped.
    readers: usize,
    /// Its thread was started.
    started: bool,
    /// Since when a read has been waiting for bytes.
    reading: Option<Instant>,
    /// What came and was not read, oldest first.
    kept: VecDeque<Vec<u8>>,
    over: Option<Over>,
}

/// Why no more comes.
enum Over {
    /// That was all.
    Ended,
    /// A read failed; the error, until somebody has it.
    Failed(Option<Error>),
}

impl One {
    /// Small pieces are put together: each has its price beside its bytes.
    fn keep(&mut self, bytes: Vec<u8>) {
        match self.kept.back_mut().filter(|last| last.len() + bytes.len() <= CHUNK) {
            Some(last) => last.extend_from_slice(&bytes),
            None => self.kept.push_back(bytes),
        }
    }

    fn full(&self) -> bool {
        self.kept.iter().map(Vec::len).sum::<usize>() >= KEPT
    }
}

impl Streams {
    /// Those of a process; with a terminal, its stderr is its stdout.
    pub fn new(agent: Arc<Watched>, id: ProcessId, terminal: bool) -> Arc<Streams> {
        let mut state = State::default();
        state.err.over = terminal.then_some(Over::Ended);
        Arc::new(Streams {
            agent,
            id,
            state: Mutex::new(state),
            changed: Condvar::new(),
            code: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// One more reader of a stream.
    pub fn open(&self, stream: Stream) {
        self.state().of(stream).readers += 1;
    }

    /// One fewer.
    pub fn close(&self, stream: Stream) {
        let mut state = self.state();
        let one = state.of(stream);
        one.readers = one.readers.saturating_sub(1);
        if one.readers == 0 {
            one.kept.clear();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The next bytes of a stream, empty at its end.
    ///
    /// # Errors
    /// Why it could not be read: once as the agent told it.
    pub fn next(self: &Arc<Self>, stream: Stream, limit: Option<Duration>) -> io::Result<Vec<u8>> {
        self.start(stream, limit).map_err(as_io)?;
        let mut state = self.state();
        loop {
            let one = state.of(stream);
            if let Some(bytes) = one.kept.pop_front() {
                drop(state);
                self.changed.notify_all();
                return Ok(bytes);
            }
            match &mut one.over {
                Some(Over::Ended) => return Ok(Vec::new()),
                Some(Over::Failed(e)) => {
                    let again = || io::Error::other("this stream failed before");
                    return Err(e.take().map_or_else(again, as_io));
                }
                // For as long as the process says nothing: its thread's read ends when the
                // guest is given up.
                None => state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner()),
            }
        }
    }

    /// Waits until both streams are over, or held by others than the process.
    ///
    /// # Errors
    /// When no thread can be had, and when it takes longer than that.
    pub fn finish(self: &Arc<Self>, within: Option<Duration>) -> Result<(), Error> {
        self.state().waited = true;
        self.changed.notify_all();
        self.start(Stream::Out, None)?;
        self.start(Stream::Err, None)?;
        let deadline = within.map(|within| Instant::now() + within);
        let mut ended: Option<Instant> = None;
        loop {
            let mut state = self.state();
            if state.over() {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let text = "its output did not end in time".to_string();
                return Err(Error::Agent(agent::Error::Call { call: "WaitProcess", text }));
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            let pause = left.map_or(ENDED_PROBE, |left| left.min(ENDED_PROBE));
            let waited = self.changed.wait_timeout(state, pause);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
            if !state.over() && silent(&state).is_some_and(|for_| for_ >= ENDED_PROBE) {
                drop(state);
                self.abandon(&mut ended);
            }
        }
    }

    /// Streams that others hold when the process itself has ended are over once they have
    /// been silent for [`HELD`]: and not before it has been known to have ended for
    /// [`ENDED_PROBE`], in which what it wrote last arrives.
    fn abandon(&self, ended: &mut Option<Instant>) {
        if ended.is_none() {
            // The process of a container takes all others with it, and says nothing here.
            let asked = self.agent.call(|agent| agent.has_ended(&self.id));
            *ended = asked.unwrap_or(false).then(Instant::now);
        }
        let mut state = self.state();
        let settled = ended.is_some_and(|ended| ended.elapsed() >= ENDED_PROBE);
        if settled && silent(&state).is_some_and(|for_| for_ >= HELD) {
            for one in [Stream::Out, Stream::Err] {
                state.of(one).over.get_or_insert(Over::Ended);
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// The exit code, by a call that is made once.
    ///
    /// # Errors
    /// That call's.
    pub fn code(&self, ask: impl FnOnce() -> Result<i32, Error>) -> Result<i32, Error> {
        let mut known = self.code.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(code) = *known {
            return Ok(code);
        }
        let code = ask()?;
        *known = Some(code);
        Ok(code)
    }

    /// Starts the thread of a stream, unless it was.
    fn start(self: &Arc<Self>, stream: Stream, limit: Option<Duration>) -> Result<(), Error> {
        let mut state = self.state();
        let one = state.of(stream);
        if one.started || one.over.is_some() {
            return Ok(());
        }
        let (weak, agent, id) = (Arc::downgrade(self), Arc::clone(&self.agent), self.id.clone());
        let name = match stream {
            Stream::Out => "vmc-out",
            Stream::Err => "vmc-err",
        };
        let read = move || {
            agent.wait(limit, |agent| {
                let bytes = agent.read_stream(&id, stream, CHUNK as u32)?;
                match bytes.len() {
                    0..=CHUNK => Ok(bytes),
                    n => {
                        let text = format!("{n} bytes where at most {CHUNK} were asked for");
                        Err(agent::Error::Call { call: "read its output", text })
                    }
                }
            })
        };
        Worker::spawn(name, move || carry(&weak, stream, read)).map_err(|e| {
            let source = io::Error::other(e);
            Error::Io { during: "start", path: "a thread".into(), source }
        })?;
        one.started = true;
        Ok(())
    }

    /// Whether the next read may be made now; waits a little for room.
    fn room(&self, stream: Stream) -> Option<bool> {
        let mut state = self.state();
        let waited = state.waited;
        let one = state.of(stream);
        if one.over.is_some() {
            return None;
        }
        if one.full() && !(waited && one.readers == 0) {
            let waited = self.changed.wait_timeout(state, WANTED);
            drop(waited.unwrap_or_else(|e| e.into_inner()));
            return Some(false);
        }
        one.reading = Some(Instant::now());
        Some(true)
    }

    /// Takes in what a read brought.
    fn put(&self, stream: Stream, answer: Result<Vec<u8>, Error>) {
        let mut state = self.state();
        let waited = state.waited;
        let one = state.of(stream);
        one.reading = None;
        if one.over.is_none() {
            match answer {
                Ok(bytes) if bytes.is_empty() => one.over = Some(Over::Ended),
                Ok(_) if waited && one.readers == 0 => {}
                Ok(bytes) => one.keep(bytes),
                Err(e) => one.over = Some(Over::Failed(Some(e))),
            }
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// How long all reads under way have been waiting, if there is one and none has room to wait
/// for.
fn silent(state: &State) -> Option<Duration> {
    let open = [&state.out, &state.err].into_iter().filter(|one| one.over.is_none());
    open.map(|one| one.reading.map(|since| since.elapsed())).min().flatten()
}

/// Reads one stream to its end.
fn carry(streams: &Weak<Streams>, stream: Stream, read: impl Fn() -> Result<Vec<u8>, Error>) {
    loop {
        match streams.upgrade().and_then(|streams| streams.room(stream)) {
            None => return,
            Some(false) => continue,
            Some(true) => {}
        }
        let answer = read();
        let Some(streams) = streams.upgrade() else { return };
        streams.put(stream, answer);
    }
}
