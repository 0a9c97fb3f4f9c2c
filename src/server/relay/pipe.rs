//! One direction of a relayed connection: bytes that were read, how far their frames have been
//! looked at, and how far they may go on.
//!
//! Invariants: at most [`MAX_HELD`] bytes and what came before a first frame are held, and
//! nothing is read while there are any; bytes go on in order, each once, and none of a frame's
//! that was put off.

use std::io::{self, ErrorKind, Write};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;

use super::bucket::Nanos;
use super::client::Source;
use super::frames::{FrameReader, Header};
use super::limits::Excess;
use super::meter::Pass;

/// Bytes that are read at once, and held at most where they cannot go on.
pub const MAX_HELD: usize = 16 * 1024;

/// What a read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes; `true` when there may be more.
    Some(usize, bool),
    /// The same, which are still to be taken out.
    There(usize, bool),
    /// There is nothing yet.
    Nothing,
    /// There will be nothing more.
    End,
}

/// How looking at bytes ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looked {
    /// All may go on.
    All,
    /// From some frame on, they are to be looked at again.
    Until(Pass),
}

/// One direction.
#[derive(Debug)]
pub struct Pipe {
    reader: FrameReader,
    held: Vec<u8>,
    /// Of the bytes held: those that may go on.
    may_go: usize,
    /// And those whose frames were looked at, one of which may be `put_off`.
    looked: usize,
    put_off: Option<Header>,
    /// Where the bytes come from has ended.
    pub ended: bool,
    /// Where they go has been told, or has gone.
    pub closed: bool,
    /// Since when bytes that may go on cannot; 0 while there are none.
    pub stuck_since: Nanos,
    /// The frame that is not complete: its number, and since when.
    begun: (u64, Nanos),
}

impl Pipe {
    /// Nothing has come yet.
    pub fn new(reader: FrameReader) -> Pipe {
        Pipe {
            reader,
            held: Vec::new(),
            may_go: 0,
            looked: 0,
            put_off: None,
            ended: false,
            closed: false,
            stuck_since: 0,
            begun: (0, 0),
        }
    }

    /// Where its frames are.
    pub fn reader(&self) -> &FrameReader {
        &self.reader
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Whether something is held that may go on.
    pub fn may_go(&self) -> bool {
        self.may_go > 0
    }

    /// Whether a frame is put off.
    pub fn is_put_off(&self) -> bool {
        self.put_off.is_some()
    }

    /// Forgets what is held.
    pub fn clear(&mut self) {
        self.held = Vec::new();
        (self.may_go, self.looked, self.put_off, self.stuck_since) = (0, 0, None, 0);
    }

    /// Copies what there is into `scratch`, at most so much, and leaves it where it is: taken
    /// out ([`Pipe::take_out`]) it wakes who waits to write more, who would have the processor
    /// that whom it is for needs.
    ///
    /// # Errors
    /// As recv(2), but for its having nothing yet.
    pub fn look_in(from: &impl Source, scratch: &mut [u8]) -> io::Result<Filled> {
        match Pipe::receive(from, scratch, MsgFlags::MSG_PEEK)? {
            Filled::Some(n, more) => Ok(Filled::There(n, more)),
            // Urgent bytes (MSG_OOB) are not looked at, only read over: left there, they would
            // wake without end.
            Filled::Nothing => Pipe::fill(from, scratch),
            other => Ok(other),
        }
    }

    /// Takes out what was copied; whether as much was there to be taken. A peer can make the
    /// two differ by urgent bytes (MSG_OOB) and by passing files, and by nothing else.
    #[must_use]
    pub fn take_out(from: &impl Source, scratch: &mut [u8]) -> bool {
        let mut at = 0;
        while at < scratch.len() {
            match Pipe::receive(from, &mut scratch[at..], MsgFlags::empty()) {
                Ok(Filled::Some(n, _)) => at += n,
                _ => return false,
            }
        }
        true
    }

    /// Reads into `scratch`, at most so much.
    ///
    /// # Errors
    /// As recv(2), but for its having nothing yet.
    pub fn fill(from: &impl Source, scratch: &mut [u8]) -> io::Result<Filled> {
        Pipe::receive(from, scratch, MsgFlags::empty())
    }

    fn receive(from: &impl Source, scratch: &mut [u8], how: MsgFlags) -> io::Result<Filled> {
        loop {
            return match from.receive(scratch, how) {
                Ok(0) => Ok(Filled::End),
                Ok(n) => Ok(Filled::Some(n, n == scratch.len())),
                Err(Errno::EAGAIN) => Ok(Filled::Nothing),
                Err(Errno::EINTR) => continue,
                Err(e) => Err(e.into()),
            };
        }
    }

    /// Looks at the frames of new bytes, and sends on what may go; the rest is held.
    ///
    /// # Errors
    /// What `verdict` refuses, or a preface that is none: then nothing of these bytes goes on.
    pub fn take(
        &mut self,
        bytes: &[u8],
        to: Option<&UnixStream>,
        now: Nanos,
        verdict: &mut dyn FnMut(&Header) -> Result<Pass, Excess>,
    ) -> Result<Looked, Excess> {
        if !self.held.is_empty() {
            self.held.extend_from_slice(bytes);
            return self.again(now, verdict);
        }
        let (may_go, looked, ended) = self.look(bytes, 0, verdict)?;
        self.note(now);
        let sent = match to {
            Some(to) => self.send(to, &bytes[..may_go]),
            None => 0,
        };
        if self.closed {
            self.clear();
            return Ok(ended);
        }
        if sent < bytes.len() {
            self.held.extend_from_slice(&bytes[sent..]);
            (self.may_go, self.looked) = (may_go - sent, looked - sent);
            if self.may_go > 0 && to.is_some() {
                self.stuck_since = now.max(1);
            }
        }
        Ok(ended)
    }

    /// Looks at frames that are held: one that was put off first.
    ///
    /// # Errors
    /// As [`Pipe::take`].
    pub fn again(
        &mut self,
        now: Nanos,
        verdict: &mut dyn FnMut(&Header) -> Result<Pass, Excess>,
    ) -> Result<Looked, Excess> {
        if let Some(header) = self.put_off {
            match verdict(&header)? {
                Pass::Go => self.put_off = None,
                later => return Ok(Looked::Until(later)),
            }
        }
        let held = std::mem::take(&mut self.held);
        let looked = self.look(&held, self.looked, verdict);
        self.held = held;
        let (may_go, looked, ended) = looked?;
        (self.may_go, self.looked) = (may_go, looked);
        self.note(now);
        Ok(ended)
    }

    /// Looks at bytes from an offset on: which may go, which were looked at.
    fn look(
        &mut self,
        bytes: &[u8],
        from: usize,
        verdict: &mut dyn FnMut(&Header) -> Result<Pass, Excess>,
    ) -> Result<(usize, usize, Looked), Excess> {
        let mut at = from;
        while at < bytes.len() {
            let read = self.reader.read(&bytes[at..]);
            let (n, header) = read.map_err(|_| Excess::Protocol("no HTTP/2 preface"))?;
            at += n;
            let Some(header) = header else { break };
            match verdict(&header)? {
                Pass::Go => {}
                later => {
                    // A part of its header that went on already says nothing.
                    self.put_off = Some(header);
                    let before = at.saturating_sub(super::frames::HEADER).max(from);
                    return Ok((before, at, Looked::Until(later)));
                }
            }
        }
        Ok((bytes.len(), bytes.len(), Looked::All))
    }

    fn note(&mut self, now: Nanos) {
        let unfinished = self.reader.unfinished();
        let number = self.reader.current();
        match unfinished {
            true if self.begun.1 > 0 && self.begun.0 == number => {}
            true => self.begun = (number, now.max(1)),
            false => self.begun.1 = 0,
        }
    }

    /// Since when a frame is not complete for which more has to come.
    pub fn unfinished_since(&self) -> Option<Nanos> {
        (self.begun.1 > 0 && self.held.is_empty()).then_some(self.begun.1)
    }

    /// Bytes that were sent; all that can be.
    fn send(&mut self, to: &UnixStream, bytes: &[u8]) -> usize {
        let (mut to, mut sent) = (to, 0);
        while sent < bytes.len() {
            match to.write(&bytes[sent..]) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.closed = true;
                    break;
                }
            }
        }
        sent
    }

    /// Sends on what is held and may go.
    pub fn flush(&mut self, to: &UnixStream, now: Nanos) {
        if self.may_go == 0 {
            return;
        }
        let held = std::mem::take(&mut self.held);
        let sent = self.send(to, &held[..self.may_go]);
        if self.closed {
            return self.clear();
        }
        self.held = held;
        self.may_go -= sent;
        self.looked -= sent;
        self.held.drain(..sent);
        if self.held.is_empty() {
            // Given back: most connections hold nothing most of the time.
            self.held = Vec::new();
            // What has to come of a frame could not before.
            if self.begun.1 > 0 {
                self.begun.1 = now.max(1);
            }
        }
        match self.may_go {
            0 => self.stuck_since = 0,
            _ if self.stuck_since == 0 => self.stuck_since = now.max(1),
            _ => {}
        }
    }

    /// Adds bytes of the relay's own, behind all that is held.
    pub fn append(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
        self.may_go = self.held.len();
        self.looked = self.held.len();
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::{kind, PREFACE};
    use super::*;
    use std::io::Read;

    fn pair() -> (UnixStream, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        (near, far)
    }

    fn frame(kind: u8, length: u8) -> Vec<u8> {
        [&[0, 0, length, kind, 0, 0, 0, 0, 1][..], &vec![kind; length as usize]].concat()
    }

    fn all(far: &UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = (&mut &*far).read_to_end(&mut bytes);
        bytes
    }

    #[test]
    fn nothing_of_a_frame_that_is_put_off_goes_on_but_a_piece_of_a_header() {
        let first = [PREFACE.to_vec(), frame(kind::SETTINGS, 6)].concat();
        let ping = frame(kind::PING, 8);
        let bytes = [first.clone(), ping.clone(), frame(kind::DATA, 3)].concat();
        for size in 1..bytes.len() {
            let (near, far) = pair();
            let mut pipe = Pipe::new(FrameReader::client());
            let mut asked = 0;
            let mut verdict = |h: &Header| {
                asked += u32::from(h.kind == kind::PING);
                Ok(if h.kind == kind::PING { Pass::At(7) } else { Pass::Go })
            };
            let mut rest = bytes.chunks(size);
            for chunk in &mut rest {
                if pipe.take(chunk, Some(&near), 1, &mut verdict) != Ok(Looked::All) {
                    break;
                }
            }
            assert_eq!(pipe.again(1, &mut verdict), Ok(Looked::Until(Pass::At(7))));
            pipe.flush(&near, 1);
            let sent = all(&far);
            assert!(sent.len() >= first.len() && sent.len() < first.len() + 9, "{size}");
            assert!(bytes.starts_with(&sent));
            assert!(pipe.is_put_off() && !pipe.is_empty() && !pipe.may_go());
            assert_eq!(asked, 2);
            let mut go = |_: &Header| Ok(Pass::Go);
            assert_eq!(pipe.again(2, &mut go), Ok(Looked::All));
            for chunk in rest {
                assert_eq!(pipe.take(chunk, Some(&near), 2, &mut go), Ok(Looked::All));
            }
            pipe.flush(&near, 2);
            assert_eq!([sent, all(&far)].concat(), bytes, "{size}");
            assert!(pipe.is_empty() && pipe.unfinished_since().is_none());
        }
    }

    #[test]
    fn what_can_not_go_on_is_held_and_its_age_is_known() {
        let (near, far) = pair();
        let mut pipe = Pipe::new(FrameReader::server());
        let mut go = |_: &Header| Ok(Pass::Go);
        let chunk = frame(kind::DATA, 200).repeat(60);
        let mut bytes = Vec::new();
        while pipe.is_empty() {
            pipe.take(&chunk, Some(&near), 5, &mut go).unwrap();
            bytes.extend_from_slice(&chunk);
        }
        assert!(pipe.may_go() && pipe.held.len() <= MAX_HELD);
        assert_eq!(pipe.stuck_since, 5);
        pipe.flush(&near, 6);
        assert_eq!(pipe.stuck_since, 5, "it still is");
        let mut got = all(&far);
        pipe.flush(&near, 7);
        got.extend(all(&far));
        assert_eq!((pipe.stuck_since, pipe.is_empty()), (0, true));
        assert!(got == bytes);
        // Its reader has gone.
        drop(far);
        pipe.take(&chunk, Some(&near), 8, &mut go).unwrap();
        assert!(pipe.closed && pipe.is_empty());
    }

    #[test]
    fn a_frame_that_is_not_complete_has_the_age_of_its_first_byte() {
        let (near, _far) = pair();
        let mut pipe = Pipe::new(FrameReader::server());
        let mut go = |_: &Header| Ok(Pass::Go);
        let bytes = [frame(kind::DATA, 2), frame(kind::DATA, 2)].concat();
        for (n, byte) in bytes.iter().enumerate() {
            let now = 10 + n as Nanos;
            pipe.take(&[*byte], Some(&near), now, &mut go).unwrap();
            let since = if n <= 10 { Some(10) } else { Some(21) };
            let since = since.filter(|_| n != 10 && n != 21);
            assert_eq!(pipe.unfinished_since(), since, "{n}");
        }
    }
}
