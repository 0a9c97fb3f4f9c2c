//! yamux: many byte streams over one, as Kata 1.x's agents speak it on their
//! serial port.
//!
//! ```text
//! +-----------+--------+---------+-------------+------------+
//! | version 0 | type 1 | flags 2 | stream 4    | length 4   |  big-endian, then
//! +-----------+--------+---------+-------------+------------+  data of a data frame
//!
//! client                                        server
//!  | WINDOW(SYN, stream 1, 0) ────────────────► |   opens; data may follow at once
//!  | ◄──────────────── WINDOW(ACK, stream 1, 0) |
//!  | ◄─────────────── DATA(stream 1, n bytes) ─►|   at most the window that is left
//!  | WINDOW(stream 1, delta) ─────────────────► |   as the reader has read
//!  | WINDOW(FIN, stream 1, 0) ────────────────► |   this way has ended; both: forgotten
//! ```
//!
//! Invariants: of each stream at most [`WINDOW`] bytes are kept, of streams at
//! most [`MAX_STREAMS`]; a peer that sends more, or nonsense, ends the session and
//! nothing else. When the carrier ends, so do all streams. Nothing is written
//! that the peer has no window for, so a stream that nobody reads holds up no
//! other.
//!
//! Does not: ping (it answers), nor time out: a paused guest answers later.
//!
//! Source: hashicorp/yamux's spec.md, and what Kata's agent and proxy 1.13 do.

mod header;

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use crossbeam_channel::{bounded, Receiver, Sender};

use crate::worker::{self, Worker};
pub use header::{End, Header, Kind, HEADER};
use header::{ACK, FIN, RST, SYN};

/// Bytes that may be under way to a reader, each way, in each stream.
pub const WINDOW: u32 = 256 * 1024;
/// Streams at one time.
pub const MAX_STREAMS: usize = 64;
/// Bytes of one data frame that are sent.
const MAX_DATA: usize = 64 * 1024;

/// One stream's state.
#[derive(Default)]
struct Flow {
    /// Came, and not read yet.
    received: VecDeque<u8>,
    /// What the peer may still send.
    receive_window: u32,
    /// What we may still send.
    send_window: u32,
    /// The peer will send no more.
    peer_done: bool,
    /// We will send no more.
    own_done: bool,
    /// It was torn down.
    reset: bool,
}

struct Cell {
    flow: Mutex<Flow>,
    news: Condvar,
}

impl Cell {
    fn new() -> Arc<Cell> {
        let flow = Flow { receive_window: WINDOW, send_window: WINDOW, ..Flow::default() };
        Arc::new(Cell { flow: Mutex::new(flow), news: Condvar::new() })
    }

    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn change(&self, f: impl FnOnce(&mut Flow)) {
        f(&mut self.flow());
        self.news.notify_all();
    }
}

struct Table {
    streams: HashMap<u32, Arc<Cell>>,
    next: u32,
    ended: Option<End>,
    no_more: bool,
}

struct Shared {
    carrier: UnixStream,
    out: Mutex<UnixStream>,
    table: Mutex<Table>,
    /// Streams that the peer opened; `None` on the client's side.
    accepting: Option<Sender<Stream>>,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn send(&self, header: Header, data: &[u8]) -> io::Result<()> {
        let mut out = self.out.lock().unwrap_or_else(|e| e.into_inner());
        if data.is_empty() {
            return out.write_all(&header.encode());
        }
        let mut frame = Vec::with_capacity(HEADER + data.len());
        frame.extend_from_slice(&header.encode());
        frame.extend_from_slice(data);
        out.write_all(&frame)
    }

    fn window(&self, stream: u32, flags: u16, delta: u32) -> io::Result<()> {
        self.send(Header { kind: Kind::Window, flags, stream, length: delta }, &[])
    }

    fn end(&self, why: End) -> End {
        let _ = self.carrier.shutdown(Shutdown::Both);
        let mut table = self.table();
        let why = table.ended.get_or_insert(why).clone();
        for cell in std::mem::take(&mut table.streams).into_values() {
            cell.change(|flow| (flow.reset, flow.peer_done) = (true, true));
        }
        why
    }
}

/// A session over one carrier.
pub struct Session {
    shared: Arc<Shared>,
    reader: Worker<End>,
}

impl Session {
    /// The side that opens streams: the host.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn client(carrier: UnixStream) -> Result<Session, worker::Error> {
        Session::start(carrier, 1, None)
    }

    /// The side that accepts them: the guest. Of streams that nobody has accepted
    /// yet, [`MAX_STREAMS`] wait.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn server(carrier: UnixStream) -> Result<(Session, Receiver<Stream>), worker::Error> {
        let (sender, accepted) = bounded(MAX_STREAMS);
        Ok((Session::start(carrier, 2, Some(sender))?, accepted))
    }

    fn start(
        carrier: UnixStream,
        first: u32,
        accepting: Option<Sender<Stream>>,
    ) -> Result<Session, worker::Error> {
        let failed = |source| worker::Error::Start { name: "vmc-yamux".into(), source };
        let mut from = carrier.try_clone().map_err(failed)?;
        let out = Mutex::new(carrier.try_clone().map_err(failed)?);
        let table =
            Mutex::new(Table { streams: HashMap::new(), next: first, ended: None, no_more: false });
        let shared = Arc::new(Shared { carrier, out, table, accepting });
        let theirs = Arc::clone(&shared);
        let reader = Worker::spawn("vmc-yamux", move || {
            let why = receive(&theirs, &mut from);
            theirs.end(why)
        })?;
        Ok(Session { shared, reader })
    }

    /// Opens a stream.
    ///
    /// # Errors
    /// When the session has ended, or has [`MAX_STREAMS`].
    pub fn open(&self) -> io::Result<Stream> {
        let cell = Cell::new();
        let id = {
            let mut table = self.shared.table();
            if let Some(why) = &table.ended {
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, why.clone()));
            }
            if table.streams.len() >= MAX_STREAMS || table.no_more {
                let text = format!("{MAX_STREAMS} connections are open, and no more can be");
                return Err(io::Error::other(text));
            }
            let id = table.next;
            table.next = id.checked_add(2).ok_or_else(|| io::Error::other("out of streams"))?;
            table.streams.insert(id, Arc::clone(&cell));
            id
        };
        self.shared.window(id, SYN, 0)?;
        Ok(Stream { id, cell, shared: Arc::clone(&self.shared) })
    }

    /// Closes when the session has ended.
    pub fn ended(&self) -> &Receiver<()> {
        self.reader.done()
    }

    /// Why it ended, once it has.
    pub fn why(&self) -> Option<End> {
        self.shared.table().ended.clone()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.end(End::Closed);
    }
}

/// A stream; what is dropped is closed.
pub struct Stream {
    id: u32,
    cell: Arc<Cell>,
    shared: Arc<Shared>,
}

impl Stream {
    /// Reads some bytes; waits for the first, 0 at the end.
    ///
    /// # Errors
    /// When the stream was torn down.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut flow = self.cell.flow();
        while flow.received.is_empty() && !flow.peer_done {
            flow = self.cell.news.wait(flow).unwrap_or_else(|e| e.into_inner());
        }
        let n = flow.received.read(buffer)?;
        if n == 0 && flow.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let held = flow.received.len() as u32;
        let delta = WINDOW - held.min(WINDOW) - flow.receive_window.min(WINDOW - held.min(WINDOW));
        if delta < WINDOW / 2 || flow.peer_done {
            return Ok(n);
        }
        flow.receive_window += delta;
        drop(flow);
        // The reader has its bytes, whatever becomes of the next ones.
        let _ = self.shared.window(self.id, 0, delta);
        Ok(n)
    }

    /// Writes all bytes, waiting for the peer to take them.
    ///
    /// # Errors
    /// When the stream, or its session, has ended.
    pub fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut flow = self.cell.flow();
            while flow.send_window == 0 && !flow.reset && !flow.own_done {
                flow = self.cell.news.wait(flow).unwrap_or_else(|e| e.into_inner());
            }
            if flow.reset || flow.own_done {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let n = bytes.len().min(flow.send_window as usize).min(MAX_DATA);
            flow.send_window -= n as u32;
            drop(flow);
            let header = Header { kind: Kind::Data, flags: 0, stream: self.id, length: n as u32 };
            self.shared.send(header, &bytes[..n])?;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// No more will be written; what the peer sends can still be read.
    pub fn finish(&self) {
        let mut done = true;
        self.cell.change(|flow| done = std::mem::replace(&mut flow.own_done, true) || flow.reset);
        if !done {
            let _ = self.shared.window(self.id, FIN, 0);
        }
    }

    /// Ends both ways: whoever reads or writes is woken.
    pub fn close(&self) {
        self.finish();
        let mut both = false;
        self.cell.change(|flow| {
            both = flow.peer_done;
            (flow.reset, flow.peer_done) = (true, true);
            flow.received.clear();
        });
        let known = self.shared.table().streams.remove(&self.id).is_some();
        if known && !both {
            // The peer may have more to send, which nobody wants.
            let _ = self.shared.window(self.id, RST, 0);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.close();
    }
}

fn receive(shared: &Arc<Shared>, from: &mut UnixStream) -> End {
    let carrier = |e: io::Error| End::Carrier(e.to_string());
    loop {
        let mut bytes = [0; HEADER];
        if let Err(e) = from.read_exact(&mut bytes) {
            return carrier(e);
        }
        let done = Header::decode(&bytes).and_then(|header| match header.kind {
            Kind::Data | Kind::Window => stream_frame(shared, header, from),
            Kind::Ping if header.flags & SYN != 0 => {
                shared.send(Header { flags: ACK, ..header }, &[]).map_err(carrier)
            }
            Kind::Ping => Ok(()),
            Kind::GoAway if header.length == 0 => {
                shared.table().no_more = true;
                Ok(())
            }
            Kind::GoAway => Err(End::Nonsense(format!("it went away, code {}", header.length))),
        });
        if let Err(why) = done {
            return why;
        }
    }
}

fn stream_frame(shared: &Arc<Shared>, h: Header, from: &mut UnixStream) -> Result<(), End> {
    let known = match h.flags & SYN != 0 {
        true => Some(accept(shared, h)?),
        false => shared.table().streams.get(&h.stream).cloned(),
    };
    let carrier = |e: io::Error| End::Carrier(e.to_string());
    if h.kind == Kind::Data && h.length > 0 {
        if h.length > WINDOW {
            return Err(End::Nonsense(format!("{} bytes in one frame", h.length)));
        }
        let mut data = vec![0; h.length as usize];
        from.read_exact(&mut data).map_err(carrier)?;
        // A stream that is forgotten here may not be there yet.
        if let Some(cell) = &known {
            let mut over = false;
            cell.change(|flow| match flow.receive_window.checked_sub(h.length) {
                Some(left) if !flow.reset => {
                    flow.receive_window = left;
                    flow.received.extend(&data);
                }
                Some(_) => {}
                None => over = true,
            });
            if over {
                return Err(End::Nonsense(format!("stream {} is beyond its window", h.stream)));
            }
        }
    }
    let Some(cell) = known else { return Ok(()) };
    let mut finished = false;
    cell.change(|flow| {
        if h.kind == Kind::Window {
            flow.send_window = flow.send_window.saturating_add(h.length);
        }
        flow.peer_done |= h.flags & (FIN | RST) != 0;
        flow.reset |= h.flags & RST != 0;
        finished = flow.reset || (flow.peer_done && flow.own_done);
    });
    if finished {
        shared.table().streams.remove(&h.stream);
    }
    Ok(())
}

/// A stream that the peer opens.
fn accept(shared: &Arc<Shared>, h: Header) -> Result<Arc<Cell>, End> {
    let Some(accepting) = &shared.accepting else {
        return Err(End::Nonsense(format!("it opened stream {}", h.stream)));
    };
    let cell = Cell::new();
    {
        let mut table = shared.table();
        if h.stream % 2 == 0 || table.streams.contains_key(&h.stream) {
            return Err(End::Nonsense(format!("it opened stream {} again", h.stream)));
        }
        if table.streams.len() >= MAX_STREAMS {
            return Err(End::Nonsense(format!("it opened more than {MAX_STREAMS} streams")));
        }
        table.streams.insert(h.stream, Arc::clone(&cell));
    }
    let stream = Stream { id: h.stream, cell: Arc::clone(&cell), shared: Arc::clone(shared) };
    let sent = shared.window(h.stream, ACK, 0);
    sent.map_err(|e| End::Carrier(e.to_string()))?;
    // Full when nobody accepts: dropped, the stream is torn down.
    let _ = accepting.try_send(stream);
    Ok(cell)
}

#[cfg(test)]
mod tests;
