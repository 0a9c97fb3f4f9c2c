//! `vmcache cp`: docker cp's rules for names, in both directions, and `-` for tar streams.
//!
//! Does not: decide what a guest's files become; that is `workload` and `tree`.

use std::ffi::OsStr;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

use super::args::{Common, Cp};
use super::claimed::with_guest;
use super::interrupt::Interrupt;
use super::output::{Failure, FAILED, USAGE};
use super::{print, Outcome};
use crate::sys::streams::was_closed;
use crate::tree::{Extracted, Stop};
use crate::vm::Vm;
use crate::workload::{copy_in, copy_out, stream_in, stream_out, CopyPolicy, Error};

/// A tar stream on standard input or output.
const STREAM: &str = "-";
/// Milliseconds after which a stream that has nothing, or takes nothing, is looked at again:
/// a signal may have asked for the copy's end.
const LOOK: u16 = 200;
/// Bytes that a pipe takes at once when it takes any: no write of so many blocks.
const PIPE_BUF: usize = 4096;

/// Splits `ID:PATH`; a path with a slash before the colon is local.
fn remote(text: &OsStr) -> Result<Option<(&str, &str)>, Failure> {
    let bytes = text.as_bytes();
    let Some(colon) = bytes.iter().position(|b| *b == b':') else { return Ok(None) };
    let (id, path) = (&bytes[..colon], &bytes[colon + 1..]);
    if id.is_empty() || id.contains(&b'/') || id.starts_with(b".") {
        return Ok(None);
    }
    match (std::str::from_utf8(id), std::str::from_utf8(path)) {
        (Ok(id), Ok(path)) => Ok(Some((id, path))),
        _ => Err(Failure::new(
            USAGE,
            format!("{text:?}: an id and a path in a VM are given in UTF-8; copy its directory"),
        )),
    }
}

/// Copies in or out.
pub fn cp(common: &Common, c: &Cp) -> Outcome {
    let (from, to) = (remote(&c.source)?, remote(&c.target)?);
    let interrupt = Interrupt::take()?;
    let done = match (from, to) {
        (None, Some((id, path))) => copy_into(common, c, id, path, &interrupt.stop),
        (Some((id, path)), None) => copy_from(common, c, id, path, &interrupt.stop),
        _ => Err(Failure::new(
            USAGE,
            "one of source and target must be in a VM, as ID:PATH, and the other on this host, or \
             \"-\" for a tar stream (a local file with a colon in its name: ./NAME)",
        )),
    };
    match interrupt.code() {
        Some(code) => Ok(code),
        None => done.map(|()| 0),
    }
}

fn copy_into(common: &Common, c: &Cp, id: &str, path: &str, stop: &Stop) -> Result<(), Failure> {
    if c.source != STREAM {
        let source = Path::new(&c.source);
        return with_guest(common, id, |g| Ok(copy_in(g, source, path, c.follow_link, stop)?));
    }
    if was_closed(0) {
        return Err(closed("input"));
    }
    if io::stdin().is_terminal() {
        return Err(Failure::new(USAGE, "a tar stream does not come from a terminal"));
    }
    let stdin = io::stdin();
    with_guest(common, id, |g| {
        let mut stream = Patient { fd: stdin.as_fd(), stop, of: Some(g.vm()) };
        Ok(stream_in(g, &mut stream, path, stop)?)
    })
}

fn copy_from(common: &Common, c: &Cp, id: &str, path: &str, stop: &Stop) -> Result<(), Failure> {
    if c.archive && !nix::unistd::geteuid().is_root() {
        let text = "--archive: only root can give files other owners, and make devices";
        return Err(Failure::new(USAGE, text));
    }
    let policy = CopyPolicy {
        archive: c.archive,
        follow: c.follow_link,
        max_bytes: c.max_size,
        max_entries: c.max_entries,
    };
    let copied = match c.target == STREAM {
        false => {
            with_guest(common, id, |g| Ok(copy_out(g, path, Path::new(&c.target), &policy, stop)?))?
        }
        true if was_closed(1) => return Err(closed("output")),
        true if io::stdout().is_terminal() => {
            let text = "a tar stream is nothing for a terminal: put it into a file or a pipe";
            return Err(Failure::new(USAGE, text));
        }
        true => {
            let stdout = io::stdout();
            let stream = Patient { fd: stdout.as_fd(), stop, of: None };
            let mut out = io::BufWriter::with_capacity(PIPE_BUF, stream);
            with_guest(common, id, |g| Ok(stream_out(g, path, &mut out, &policy, stop)?))?
        }
    };
    warn(&copied);
    Ok(())
}

/// What is at the place of a stream that was closed takes and gives nothing.
fn closed(which: &str) -> Failure {
    Failure::new(FAILED, format!("copy a tar stream: standard {which} is closed"))
}

fn warn(copied: &Extracted) {
    if let Some((file, name, n)) = &copied.lost {
        let file = file.display();
        print::message(format!(
            "warning: {n} extended attributes are not kept by the target's file system, the first \
             {name} of {file}"
        ));
    }
}

/// A standard stream of this process: one that is non-blocking and has nothing yet, or takes
/// nothing yet, is waited for, and so is none once a signal has asked for the end, or the VM
/// that it is for has ended.
struct Patient<'a> {
    fd: BorrowedFd<'a>,
    stop: &'a Stop,
    of: Option<&'a Vm>,
}

impl Patient<'_> {
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        loop {
            self.stop.check().map_err(io::Error::other)?;
            match poll(&mut [PollFd::new(self.fd, what)], PollTimeout::from(LOOK)) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => match self.of {
                    Some(vm) if !vm.runs() => {
                        return Err(io::Error::other(Error::Ended { vm: vm.id().to_string() }))
                    }
                    _ => {}
                },
                Ok(_) => return Ok(()),
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// As if nothing had happened yet.
fn again<T>(result: &io::Result<T>) -> bool {
    let kind = result.as_ref().err().map(io::Error::kind);
    matches!(kind, Some(ErrorKind::WouldBlock | ErrorKind::Interrupted))
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::POLLIN)?;
            let read = nix::unistd::read(self.fd, buffer).map_err(io::Error::from);
            if !again(&read) {
                return read;
            }
        }
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            self.wait(PollFlags::POLLOUT)?;
            let piece = &bytes[..bytes.len().min(PIPE_BUF)];
            let written = nix::unistd::write(self.fd, piece).map_err(io::Error::from);
            if !again(&written) {
                return written;
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_and_remote_paths_are_told_apart() {
        let remote = |text: &[u8]| {
            let found = remote(OsStr::from_bytes(text)).map_err(|e| e.to_string())?;
            Ok::<_, String>(found.map(|(id, path)| format!("{id} {path}")))
        };
        assert_eq!(remote(b"ab12:/etc"), Ok(Some("ab12 /etc".into())));
        assert_eq!(remote(b"ab12:"), Ok(Some("ab12 ".into())));
        for local in [&b"./a:b"[..], b"/a:b", b"plain", b"-", b":/x", b"a/b:c", b"\xff"] {
            assert_eq!(remote(local), Ok(None));
        }
        assert!(remote(b"ab12:/\xff").is_err());
    }

    #[test]
    fn a_stream_that_has_nothing_yet_is_waited_for() {
        let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let stop = Stop::default();
        let (mut from, mut to) = (
            Patient { fd: reader.as_fd(), stop: &stop, of: None },
            Patient { fd: writer.as_fd(), stop: &stop, of: None },
        );
        let bytes: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let mut seen = vec![0; bytes.len()];
        // More than the pipe holds, both ways at once.
        std::thread::scope(|threads| {
            threads.spawn(|| to.write_all(&bytes).unwrap());
            from.read_exact(&mut seen).unwrap();
        });
        assert!(seen == bytes);
        stop.ask();
        assert!(from.read(&mut seen).is_err(), "it ends by a signal, though nothing comes");
    }
}
