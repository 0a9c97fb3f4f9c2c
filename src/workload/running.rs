//! A process that runs in a guest: its streams and its end.
//!
//! Invariant: what waits for the guest without an end is watched ([`Watched`]), and ends
//! when that gives the guest up.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;

use super::silence::Watched;
use super::Error;
use crate::agent::{self, ProcessId, Stream};

/// Bytes of one read or write: large enough to make calls rare, small enough
/// that four connections' worth fit the guest.
pub const CHUNK: usize = 256 * 1024;

/// How long a process may write on that was told that nobody reads, where its end can
/// not be closed.
pub const IGNORED: Duration = Duration::from_secs(2);

/// A process in a guest. Streams are separate, carry any bytes, and may be
/// used from different threads.
#[derive(Clone)]
pub struct Running {
    agent: Arc<Watched>,
    id: ProcessId,
    terminal: bool,
    limit: Option<Duration>,
}

impl Running {
    pub(super) fn new(agent: Arc<Watched>, id: ProcessId, terminal: bool) -> Running {
        Running { agent, id, terminal, limit: None }
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
        StreamWriter { agent: Arc::clone(&self.agent), id: self.id.clone(), limit: self.limit }
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
        StreamReader { agent, id, stream, rest: (Vec::new(), 0), ended, limit }
    }

    /// Waits for its end: its exit code, 128 + n when signal n ended it.
    ///
    /// # Errors
    /// When the agent cannot be reached any more, or does not answer.
    pub fn wait(&self) -> Result<i32, Error> {
        self.agent.wait(None, |agent| agent.wait_process(&self.id, None))
    }

    /// The same, for at most so long.
    ///
    /// # Errors
    /// As [`Running::wait`], and when it has not ended.
    pub(super) fn wait_within(&self, within: Duration) -> Result<i32, Error> {
        self.agent.call(|agent| agent.wait_process(&self.id, Some(within)))
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

fn as_io(e: Error) -> io::Error {
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
            .map_err(as_io)?;
        Ok((taken as usize).min(piece.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        // It may have ended, and then there is nothing to close.
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
        self.agent.own() && self.agent.call(|a| a.read_stream(&self.id, self.stream, 0)).is_ok()
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
    /// writes on for [`IGNORED`], SIGKILL; until its end this reads, and drops what it reads.
    ///
    /// # Errors
    /// When the agent can not be reached any more.
    pub fn close(mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        match self.agent.own() {
            true => {
                let closed = self.agent.call(|a| a.read_stream(&self.id, self.stream, 0));
                closed.map(|_| ()).map_err(as_io)
            }
            false => self.drain(),
        }
    }

    fn drain(&mut self) -> io::Result<()> {
        let signal = |n: i32| self.agent.call(|a| a.signal_process(&self.id, n as u32));
        let _ = signal(libc::SIGPIPE);
        let patience = Instant::now() + IGNORED;
        let mut killed = false;
        loop {
            let read =
                self.agent.wait(self.limit, |a| a.read_stream(&self.id, self.stream, CHUNK as u32));
            if read.map_err(as_io)?.is_empty() {
                return Ok(());
            }
            if !killed && Instant::now() > patience {
                killed = true;
                let _ = signal(libc::SIGKILL);
            }
        }
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
