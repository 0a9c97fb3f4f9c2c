//! A client's socket. Whoever is at the other end can pass open files along with its bytes
//! (`SCM_RIGHTS`), and the last close of one can take as long as that user likes: a TCP socket
//! that lingers, a file of a file system of its own.
//!
//! Invariants: where Linux has it (6.16), none can be passed ([`refuse_files`]). Elsewhere no
//! thread but `vmc-close` closes one, as long as no more than `WAITING` wait for it: bytes are
//! read with room for all files that may come, and a socket is closed after it was read out,
//! when nothing more can be sent to it. Sockets of root and of the server's own user are not
//! looked at: they go to gRPC as they are.

use std::io;
use std::net::Shutdown;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crossbeam_channel::{bounded, Sender};
use nix::errno::Errno;
use nix::sys::socket::{recv, MsgFlags};

use crate::stuck;
use crate::sys::rpc::{linger_no_more, receive_with_files};
use crate::walls::Wall;
use crate::worker::{self, Worker};

/// Files that wait to be closed.
const WAITING: usize = 1024;
/// How long closing one may take before that is told.
const CLOSING: Duration = Duration::from_secs(5);
/// Bytes that are read at once before a close.
const READ_OUT: usize = 4096;

/// Where files go that were passed.
#[derive(Clone, Debug)]
pub struct Closer(Sender<OwnedFd>);

impl Closer {
    /// Starts the thread, which ends when all that it may get is closed.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn start() -> Result<Closer, worker::Error> {
        let (sender, files) = bounded::<OwnedFd>(WAITING);
        // Nobody waits for it: what it does may take for ever.
        Worker::spawn("vmc-close", move || {
            for file in files {
                let _doing = stuck::begin("closing a file that a client has passed", CLOSING);
                drop(file);
            }
        })?;
        Ok(Closer(sender))
    }

    fn close(&self, files: Vec<OwnedFd>) {
        for file in files {
            linger_no_more(&file);
            // Where too many wait: here, for want of a better place.
            drop(self.0.try_send(file));
        }
    }
}

/// A client's socket.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    closer: Closer,
}

impl Client {
    /// A connection that was accepted.
    pub fn new(stream: UnixStream, closer: &Closer) -> Client {
        Client { stream, closer: closer.clone() }
    }
}

impl Deref for Client {
    type Target = UnixStream;

    fn deref(&self) -> &UnixStream {
        &self.stream
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if !Wall::Files.stands() {
            return;
        }
        // From here on whoever sends is told that nobody reads; what is there stays to be read.
        let _ = self.stream.shutdown(Shutdown::Read);
        let mut scratch = [0; READ_OUT];
        loop {
            match self.receive(&mut scratch, MsgFlags::empty()) {
                // Files of one message are closed; the next may have others.
                Ok(1..) | Err(Errno::EBADMSG | Errno::EINTR) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }
}

/// What bytes are read from, without waiting.
pub trait Source {
    /// Reads, or looks (`MSG_PEEK`); 0 at the end.
    ///
    /// # Errors
    /// As recv(2); `EBADMSG` when files were passed along, which are closed, and with which the
    /// bytes are lost.
    fn receive(&self, into: &mut [u8], how: MsgFlags) -> nix::Result<usize>;
}

impl Source for UnixStream {
    fn receive(&self, into: &mut [u8], how: MsgFlags) -> nix::Result<usize> {
        recv(self.as_raw_fd(), into, how | MsgFlags::MSG_DONTWAIT)
    }
}

impl Source for Client {
    fn receive(&self, into: &mut [u8], how: MsgFlags) -> nix::Result<usize> {
        // Who only looks leaves files where they are.
        if how.contains(MsgFlags::MSG_PEEK) || !Wall::Files.stands() {
            return self.stream.receive(into, how);
        }
        let (n, files) = receive_with_files(&self.stream, into, how | MsgFlags::MSG_DONTWAIT)?;
        if files.is_empty() {
            return Ok(n);
        }
        self.closer.close(files);
        Err(Errno::EBADMSG)
    }
}

/// Has the kernel refuse files that are passed to a listening socket's connections; what it
/// lacks before Linux 6.16 is no error.
///
/// # Errors
/// As setsockopt(2).
pub fn refuse_files(listener: &impl AsRawFd) -> io::Result<()> {
    match Wall::Rights.stands() {
        true => crate::sys::rpc::refuse_files(listener.as_raw_fd()),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Write};

    use nix::sys::socket::{sendmsg, ControlMessage};

    use super::*;

    fn pass(to: &UnixStream, bytes: &[u8], file: &impl AsRawFd) {
        let fds = [file.as_raw_fd(); 200];
        let rights = [ControlMessage::ScmRights(&fds)];
        let iov = [IoSlice::new(bytes)];
        sendmsg::<()>(to.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None).unwrap();
    }

    fn open_files() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    #[test]
    fn files_that_are_passed_are_taken_out_and_closed() {
        let closer = Closer::start().unwrap();
        let (mut near, far) = UnixStream::pair().unwrap();
        let client = Client::new(far, &closer);
        let (end, told) = UnixStream::pair().unwrap();
        let mut scratch = [0; 64];
        near.write_all(b"before").unwrap();
        assert_eq!(client.receive(&mut scratch, MsgFlags::empty()), Ok(6));
        pass(&near, b"with", &end);
        near.write_all(b"after").unwrap();
        // Looked at first, as the relay does.
        assert_eq!(client.receive(&mut scratch, MsgFlags::MSG_PEEK), Ok(4));
        assert_eq!(client.receive(&mut scratch, MsgFlags::empty()), Err(Errno::EBADMSG));
        assert_eq!(client.receive(&mut scratch, MsgFlags::empty()), Ok(5));
        assert_eq!(client.receive(&mut scratch, MsgFlags::empty()), Err(Errno::EAGAIN));
        // And what nobody has read when it is closed, message by message.
        for _ in 0..3 {
            pass(&near, b"unread", &end);
        }
        let (passed, closes) = bounded(WAITING);
        drop(Client { stream: client.stream.try_clone().unwrap(), closer: Closer(passed) });
        assert_eq!(closes.try_iter().count(), 3 * 200);
        drop(client);
        drop(end);
        // Closed all, their other end says so.
        told.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        assert_eq!(std::io::Read::read(&mut &told, &mut scratch).unwrap(), 0);
        assert!(near.write_all(b"more").is_err());
        assert!(open_files() < 200);
    }
}
