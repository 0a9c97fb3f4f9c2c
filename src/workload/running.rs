//! A process that runs in a guest: its streams and its end.

use std::io::{self, Read, Write};
use std::sync::Arc;

use super::Error;
use crate::agent::{self, Agent, ProcessId, Stream};

/// Bytes of one read or write: large enough to make calls rare, small enough
/// that four connections' worth fit the guest.
pub const CHUNK: usize = 256 * 1024;

/// A process in a guest. Streams are separate, carry any bytes, and may be
/// used from different threads.
#[derive(Clone)]
pub struct Running {
    agent: Arc<dyn Agent>,
    id: ProcessId,
    terminal: bool,
}

impl Running {
    pub(super) fn new(agent: Arc<dyn Agent>, id: ProcessId, terminal: bool) -> Running {
        Running { agent, id, terminal }
    }

    /// Its container and process id.
    pub fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Its standard input; closed when the writer is dropped.
    pub fn stdin(&self) -> StreamWriter {
        StreamWriter { agent: Arc::clone(&self.agent), id: self.id.clone() }
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
        let rest = Vec::new();
        StreamReader { agent: Arc::clone(&self.agent), id: self.id.clone(), stream, rest, ended }
    }

    /// Waits for its end: its exit code, 128 + n when signal n ended it.
    ///
    /// # Errors
    /// When the agent can not be reached any more.
    pub fn wait(&self) -> Result<i32, Error> {
        self.agent.wait_process(&self.id, None).map_err(Error::Agent)
    }

    /// Sends it a signal, by number.
    ///
    /// # Errors
    /// When it has ended, or the agent can not be reached.
    pub fn signal(&self, number: i32) -> Result<(), Error> {
        let number = u32::try_from(number).unwrap_or(0);
        self.agent.signal_process(&self.id, number).map_err(Error::Agent)
    }

    /// Sets the size of its terminal, rows and columns.
    ///
    /// # Errors
    /// When it has none, or the agent can not be reached.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), Error> {
        self.agent.winsize_process(&self.id, rows.into(), columns.into()).map_err(Error::Agent)
    }
}

fn as_io(e: agent::Error) -> io::Error {
    let kind = match &e {
        // The process has ended or closed its standard input.
        agent::Error::Refused { .. } => io::ErrorKind::BrokenPipe,
        _ => io::ErrorKind::ConnectionAborted,
    };
    io::Error::new(kind, e)
}

/// The writing end of a process's standard input.
pub struct StreamWriter {
    agent: Arc<dyn Agent>,
    id: ProcessId,
}

impl Write for StreamWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let piece = &bytes[..bytes.len().min(CHUNK)];
        let taken = self.agent.write_process_stdin(&self.id, piece.to_vec()).map_err(as_io)?;
        Ok((taken as usize).min(piece.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        // It may have ended, and then there is nothing to close.
        let _ = self.agent.close_process_stdin(&self.id);
    }
}

/// The reading end of a process's standard output or error.
pub struct StreamReader {
    agent: Arc<dyn Agent>,
    id: ProcessId,
    stream: Stream,
    rest: Vec<u8>,
    ended: bool,
}

impl StreamReader {
    /// The next bytes as they come, empty at the end.
    ///
    /// # Errors
    /// When the agent can not be reached any more.
    pub fn next_chunk(&mut self) -> io::Result<Vec<u8>> {
        if !self.rest.is_empty() {
            return Ok(std::mem::take(&mut self.rest));
        }
        if self.ended {
            return Ok(Vec::new());
        }
        let bytes = self.agent.read_stream(&self.id, self.stream, CHUNK as u32).map_err(as_io)?;
        self.ended = bytes.is_empty();
        Ok(bytes)
    }
}

impl Read for StreamReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut bytes = self.next_chunk()?;
        let n = bytes.len().min(buffer.len());
        buffer[..n].copy_from_slice(&bytes[..n]);
        self.rest = bytes.split_off(n);
        Ok(n)
    }
}
