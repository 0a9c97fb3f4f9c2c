//! A process that runs in a guest: its streams and its end.
//!
//! Our own agent keeps what a process wrote until it is read. Kata's forget it when its end
//! is told, so in their guests the streams come first ([`Streams`]).
//!
//! Invariant: what waits for the guest without an end is watched ([`Watched`]), and ends
//! when that gives the guest up.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::silence::Watched;
use super::streams::Streams;
use super::Error;
use crate::agent::{self, ProcessId, Stream};
use crate::sys::signal::{SIGKILL, SIGPIPE};

/// Bytes of one read or write: large enough to make calls rare, small enough
/// that four connections' worth fit the guest.
pub const CHUNK: usize = 256 * 1024;
/// What a terminal takes for the end of its input.
const END_OF_INPUT: u8 = 4;
/// What the last call of a wait has at least, when its streams took all the time.
const LAST_CALL: Duration = Duration::from_secs(1);

/// How long a process may write on that was told that nobody reads, where its end can
/// not be closed.
pub const IGNORED: Duration = Duration::from_secs(2);

/// A process in a guest. Streams are separate, carry any bytes, and may be
/// used from different threads.
///
/// Take the readers of its output before waiting for its end. In a guest with an agent of
/// Kata's, [`Running::wait`] reads on by itself, so that nothing is lost: up to 1 MiB of a
/// stream whose reader does nothing is kept for it, then the process waits as at a full
/// pipe; what nobody has a reader for is dropped.
#[derive(Clone)]
pub struct Running {
    agent: Arc<Watched>,
    id: ProcessId,
    terminal: bool,
    limit: Option<Duration>,
    /// In guests whose agent does not keep them.
    streams: Option<Arc<Streams>>,
}

impl Running {
    /// A process of our own agent's.
    pub(super) fn new(agent: Arc<Watched>, id: ProcessId, terminal: bool) -> Running {
        Running { agent, id, terminal, limit: None, streams: None }
    }

    /// A process of an agent that forgets its output with its end.
    pub(super) fn forgetful(agent: Arc<Watched>, id: ProcessId, terminal: bool) -> Running {
        let streams = Streams::new(Arc::clone(&agent), id.clone(), terminal);
        Running { streams: Some(streams), ..Running::new(agent, id, terminal) }
    }

    /// The same, for a process that never does nothing for so long: one read or write of
    /// its streams may take no longer.
    pub(super) fn limited(self, limit: Duration) -> Running {
        Running { limit: Some(limit), ..self }
    }

    /// Why its guest was given up, if it was.
    pub(super) fn given_up(&self) -> Option<Error> {
        self.agent.given_up()
    }

    /// Its container and process id.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Its standard input; closed when the writer is dropped.
    pub fn stdin(&self) -> StreamWriter {
        // Kata's agents of 2.x and later close the whole terminal (`close_stdin` of rustjail's
        // process.rs in 4.1), and what was not read is lost; those of 1.x do nothing.
        let typed = self.terminal && self.streams.is_some();
        StreamWriter {
            agent: Arc::clone(&self.agent),
            id: self.id.clone(),
            limit: self.limit,
            typed,
            at_line: true,
        }
    }

    /// Its standard output.
    pub fn stdout(&self) -> StreamReader {
        self.reader(Stream::Out)
    }

    /// Its standard error; empty when it has a terminal.
    pub fn stderr(&self) -> StreamReader {
        self.reader(Stream::Err)
    }

    fn reader(&self, stream: Stream) -> StreamReader {
        let ended = self.terminal && stream == Stream::Err;
        let (agent, id, limit) = (Arc::clone(&self.agent), self.id.clone(), self.limit);
        // A process that works need not complain.
        let limit = limit.filter(|_| stream == Stream::Out);
        let streams = self.streams.clone();
        if let Some(streams) = &streams {
            streams.open(stream);
        }
        StreamReader { agent, id, stream, rest: (Vec::new(), 0), ended, limit, streams }
    }

    /// Waits for its end: its exit code, 128 + n when signal n ended it.
    ///
    /// In a guest with an agent of Kata's, its output ends first: this returns once both
    /// streams have been read to their end, by readers or by this. Processes that it left
    /// behind and that hold its streams are waited for until they have written nothing for
    /// 10 s; what they write later is lost. A reader that failed is not waited for.
    ///
    /// # Errors
    /// When the agent cannot be reached any more, or does not answer.
    pub fn wait(&self) -> Result<i32, Error> {
        let ask = || self.agent.wait(None, |agent| agent.wait_process(&self.id, None));
        let Some(streams) = &self.streams else { return ask() };
        streams.finish(None)?;
        streams.code(ask)
    }

    /// The same, for at most so long.
    ///
    /// # Errors
    /// As [`Running::wait`], and when it has not ended.
    pub(super) fn wait_within(&self, within: Duration) -> Result<i32, Error> {
        let until = Instant::now() + within;
        if let Some(streams) = &self.streams {
            streams.finish(Some(within))?;
        }
        let left = until.saturating_duration_since(Instant::now()).max(LAST_CALL);
        let ask = || self.agent.call(|agent| agent.wait_process(&self.id, Some(left)));
        match &self.streams {
            Some(streams) => streams.code(ask),
            None => ask(),
        }
    }

    /// Sends it a signal, by number.
    ///
    /// # Errors
    /// When it has ended, or the agent can not be reached.
    pub fn signal(&self, number: i32) -> Result<(), Error> {
        let number = u32::try_from(number).unwrap_or(0);
        self.agent.call(|agent| agent.signal_process(&self.id, number))
    }

    /// Sets the size of its terminal, rows and columns.
    ///
    /// # Errors
    /// When it has none, or the agent can not be reached.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), Error> {
        self.agent.call(|agent| agent.winsize_process(&self.id, rows.into(), columns.into()))
    }
}

pub(super) fn as_io(e: Error) -> io::Error {
    let kind = match &e {
        // The process has ended or closed its standard input.
        Error::Agent(agent::Error::Refused { .. }) => io::ErrorKind::BrokenPipe,
        _ => io::ErrorKind::ConnectionAborted,
    };
    io::Error::new(kind, e)
}

/// The writing end of a process's standard input.
pub struct StreamWriter {
    agent: Arc<Watched>,
    id: ProcessId,
    limit: Option<Duration>,
    /// Its end is a character.
    typed: bool,
    /// Whether the last byte ended a line.
    at_line: bool,
}

impl Write for StreamWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let piece = &bytes[..bytes.len().min(CHUNK)];
        let data = piece.to_vec();
        let taken = self
            .agent
            .wait(self.limit, |agent| agent.write_process_stdin(&self.id, data))
            .map_err(|e| self.not_taken(e))?;
        let taken = (taken as usize).min(piece.len());
        self.at_line = taken.checked_sub(1).map_or(self.at_line, |last| piece[last] == b'\n');
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl StreamWriter {
    /// Our own agent says by its code that nobody reads; Kata's by texts of many kinds.
    fn not_taken(&self, e: Error) -> io::Error {
        match &e {
            Error::Agent(agent::Error::Refused { code, .. })
                if self.agent.own() && *code != ttrpc::Code::NOT_FOUND =>
            {
                io::Error::other(e)
            }
            _ => as_io(e),
        }
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        // It may have ended, and then there is nothing to close.
        if self.typed {
            // Within a line, the first one only sends that.
            let end = vec![END_OF_INPUT; if self.at_line { 1 } else { 2 }];
            let _ = self.agent.call(|agent| agent.write_process_stdin(&self.id, end));
            return;
        }
        let _ = self.agent.call(|agent| agent.close_process_stdin(&self.id));
    }
}

/// The reading end of a process's standard output or error.
pub struct StreamReader {
    agent: Arc<Watched>,
    id: ProcessId,
    stream: Stream,
    /// What came and was not read, from its second field on: a tar's reader takes a chunk
    /// in pieces of 512 bytes.
    rest: (Vec<u8>, usize),
    ended: bool,
    limit: Option<Duration>,
    streams: Option<Arc<Streams>>,
}

impl StreamReader {
    /// The next bytes as they come, empty at the end.
    ///
    /// # Errors
    /// When the agent cannot be reached any more, or does not answer, or answers with more
    /// than it was asked for.
    pub fn next_chunk(&mut self) -> io::Result<Vec<u8>> {
        let (mut rest, at) = std::mem::take(&mut self.rest);
        if at < rest.len() {
            rest.drain(..at);
            return Ok(rest);
        }
        if self.ended {
            return Ok(Vec::new());
        }
        if let Some(streams) = &self.streams {
            let bytes = streams.next(self.stream, self.limit)?;
            self.ended = bytes.is_empty();
            return Ok(bytes);
        }
        let bytes = self
            .agent
            .wait(self.limit, |agent| agent.read_stream(&self.id, self.stream, CHUNK as u32))
            .map_err(as_io)?;
        if bytes.len() > CHUNK {
            let text = format!("{} bytes where at most {CHUNK} were asked for", bytes.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        self.ended = bytes.is_empty();
        Ok(bytes)
    }
}

/// Closes a stream of a process while another reads it: see [`StreamReader::closer`].
pub struct StreamCloser {
    agent: Arc<Watched>,
    id: ProcessId,
    stream: Stream,
}

impl StreamCloser {
    /// Closes the process's end; who reads it is at the end then. False where the agent
    /// has no such call: the reader has to do it ([`StreamReader::close`]).
    pub fn close(&self) -> bool {
        let closed = || self.agent.call(|a| a.read_stream(&self.id, self.stream, 0));
        self.agent.own() && closed().is_ok_and(|bytes| bytes.is_empty())
    }
}

impl StreamReader {
    /// For another thread, which learns that what is read is not wanted any more.
    pub fn closer(&self) -> StreamCloser {
        let (agent, id, stream) = (Arc::clone(&self.agent), self.id.clone(), self.stream);
        StreamCloser { agent, id, stream }
    }

    /// Closes the process's end, so that it learns by its next write (EPIPE, and SIGPIPE
    /// unless it ignores that) that nobody reads. What was not read is lost, as it is for
    /// a local process; one that has ended has nothing left to close.
    ///
    /// An agent of Kata's has no such call: there, the process gets SIGPIPE, and, if it
    /// writes on for 2 s, SIGKILL; until its end this reads, and drops what it reads.
    ///
    /// # Errors
    /// When the agent can not be reached any more.
    pub fn close(mut self) -> io::Result<()> {
        if self.ended {
            return Ok(());
        }
        if self.agent.own() {
            let closed = self.agent.call(|a| a.read_stream(&self.id, self.stream, 0));
            // An older one gives a byte instead.
            if closed.map_err(as_io)?.is_empty() {
                return Ok(());
            }
        }
        let signal = |reader: &StreamReader, n: i32| {
            let _ = reader.agent.call(|a| a.signal_process(&reader.id, n as u32));
        };
        signal(&self, SIGPIPE);
        let patience = Instant::now() + IGNORED;
        let mut killed = false;
        while !self.next_chunk()?.is_empty() {
            if !killed && Instant::now() > patience {
                killed = true;
                signal(&self, SIGKILL);
            }
        }
        Ok(())
    }
}

impl Read for StreamReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.1 >= self.rest.0.len() {
            self.rest = (self.next_chunk()?, 0);
        }
        let (bytes, at) = &mut self.rest;
        let n = buffer.len().min(bytes.len() - *at);
        buffer[..n].copy_from_slice(&bytes[*at..*at + n]);
        *at += n;
        Ok(n)
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        if let Some(streams) = &self.streams {
            streams.close(self.stream);
        }
    }
}
