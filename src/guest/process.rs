//! One process of a container: its stdio ends that the agent holds, and how it
//! ended.
//!
//! Invariants: reads and writes block only the request that asked; end of file
//! is an empty read; the exit code is set once, by a thread that waits on the
//! reaper, and kept as long as the record; a signal goes to the program itself, by a
//! pidfd, and never to whoever has its pid later.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::pty::{openpty, OpenptyResult};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::pipe2;

use super::failure::{Attempt, Failure, Outcome};
use super::listing::everything;
use super::reaper::Child;
use crate::sys::process::{pidfd_kill, pidfd_open, session};
use crate::sys::terminal::set_window_size;

/// Most bytes one ReadStdout or ReadStderr returns, whatever was asked: fits
/// one ttrpc message (4 MiB) with room.
pub const MAX_READ: usize = 1024 * 1024;

/// Largest number of a signal.
const MAX_SIGNAL: i32 = 64;

/// An end from which the agent reads.
struct Source {
    file: File,
    /// Becomes readable when the end is to be closed: who waits for bytes gives it up.
    closing: EventFd,
}

impl Source {
    /// What there is, at least a byte; nothing at the end, or when it is closed meanwhile.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let wanted = PollFlags::POLLIN;
            let mut fds =
                [PollFd::new(self.file.as_fd(), wanted), PollFd::new(self.closing.as_fd(), wanted)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                other => other?,
            };
            if fds[1].any() == Some(true) {
                return Ok(0);
            }
            match (&self.file).read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A terminal whose last user is gone.
                Err(e) if e.raw_os_error() == Some(Errno::EIO as i32) => return Ok(0),
                other => return other,
            }
        }
    }
}

/// None once it is closed; one that is being read goes when that read has given up.
type Reading = Mutex<Option<Arc<Source>>>;

/// The agent's ends of a process's stdio.
pub struct Ends {
    stdin: Mutex<Option<File>>,
    /// Whether the last byte written to it ended a line, or there was none.
    at_line: AtomicBool,
    stdout: Reading,
    stderr: Reading,
    terminal: bool,
}

/// A process that was started.
pub struct Process {
    /// Its pid in the guest's own namespace.
    pub pid: i32,
    /// Whom signals go to: itself, or the program below a small init.
    program: Mutex<Option<Arc<OwnedFd>>>,
    ends: Ends,
    code: Mutex<Option<i32>>,
    ended: Condvar,
    /// Whether there may be what it left running, of its session. Once there was nothing,
    /// its pid may be a stranger's.
    left: AtomicBool,
}

fn reading(file: impl Into<File>) -> Outcome<Reading> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let closing = EventFd::from_flags(flags).during(|| "make an eventfd")?;
    Ok(Mutex::new(Some(Arc::new(Source { file: file.into(), closing }))))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn pipe() -> Outcome<(OwnedFd, OwnedFd)> {
    pipe2(OFlag::O_CLOEXEC).during(|| "make a pipe")
}

impl Ends {
    /// Makes pipes, or a terminal of `size` (rows, columns), and gives
    /// `command` the other ends.
    pub fn attach(command: &mut Command, terminal: Option<(u16, u16)>) -> Outcome<Ends> {
        let Some((rows, columns)) = terminal else {
            let (stdin_theirs, stdin) = pipe()?;
            let (stdout, stdout_theirs) = pipe()?;
            let (stderr, stderr_theirs) = pipe()?;
            command.stdin(stdin_theirs).stdout(stdout_theirs).stderr(stderr_theirs);
            return Ok(Ends {
                stdin: Mutex::new(Some(File::from(stdin))),
                at_line: AtomicBool::new(true),
                stdout: reading(stdout)?,
                stderr: reading(stderr)?,
                terminal: false,
            });
        };
        let OpenptyResult { master, slave } = openpty(None, None).during(|| "open a terminal")?;
        set_close_on_exec(master.as_fd())?;
        set_close_on_exec(slave.as_fd())?;
        if rows > 0 && columns > 0 {
            set_window_size(slave.as_fd(), rows, columns).during(|| "set the window size")?;
        }
        let again = |fd: &OwnedFd| fd.try_clone().during(|| "duplicate a terminal");
        command.stdin(again(&slave)?).stdout(again(&slave)?).stderr(Stdio::from(slave));
        Ok(Ends {
            stdin: Mutex::new(Some(File::from(again(&master)?))),
            at_line: AtomicBool::new(true),
            stdout: reading(master)?,
            stderr: Mutex::new(None),
            terminal: true,
        })
    }
}

fn set_close_on_exec(fd: BorrowedFd<'_>) -> Outcome<()> {
    use nix::fcntl::{fcntl, FcntlArg, FdFlag};
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).during(|| "set close-on-exec").map(|_| ())
}

/// These processes with their sessions.
pub fn sessions(pids: Vec<i32>) -> Vec<(i32, i32)> {
    pids.into_iter().filter_map(|pid| Some((pid, session(pid)?))).collect()
}

impl Process {
    /// Takes over a child that runs as `pid`, which `joined` a container or is its first.
    pub fn adopt(pid: i32, ends: Ends, joined: bool) -> Outcome<Arc<Process>> {
        let child = Child::of(pid);
        let itself = match pidfd_open(pid) {
            Ok(itself) => Some(Arc::new(itself)),
            // It has ended already.
            Err(e) if e.raw_os_error() == Some(Errno::ESRCH as i32) => None,
            Err(e) => return Err(e).during(|| format!("watch process {pid}")),
        };
        let process = Arc::new(Process {
            pid,
            program: Mutex::new(itself),
            ends,
            code: Mutex::new(None),
            ended: Condvar::new(),
            left: AtomicBool::new(true),
        });
        let waiter = Arc::clone(&process);
        thread::Builder::new()
            .name(format!("wait-{pid}"))
            .stack_size(64 * 1024)
            .spawn(move || {
                let code = child.wait();
                *lock(&waiter.code) = Some(code);
                waiter.ended.notify_all();
                // A container's first process is hardly asked what it left: that goes with
                // its container, and nobody's start has to wait for the look.
                if joined {
                    waiter.forget(&sessions(everything()));
                }
                // Its record may stay for long; files are few.
                *lock(&waiter.program) = None;
                drop(lock(&waiter.ends.stdin).take());
            })
            .map_err(|e| Failure::internal(format!("start a thread to wait for {pid}: {e}")))?;
        Ok(process)
    }

    /// From now on, signals go to this process, its program below a small init.
    pub fn aim_at(&self, program: i32) {
        if let Ok(program) = pidfd_open(program) {
            *lock(&self.program) = Some(Arc::new(program));
        }
    }

    /// Waits for the end and tells the exit code.
    pub fn wait(&self) -> i32 {
        let mut code = lock(&self.code);
        loop {
            if let Some(code) = *code {
                return code;
            }
            code = self.ended.wait(code).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Whether it still runs.
    pub fn running(&self) -> bool {
        lock(&self.code).is_none()
    }

    /// Sends a signal, real-time ones included.
    pub fn signal(&self, number: u32) -> Outcome<()> {
        let signal = i32::try_from(number).ok().filter(|n| (1..=MAX_SIGNAL).contains(n));
        let signal = signal.ok_or_else(|| Failure::invalid(format!("{number} is no signal")))?;
        let ended = || Failure::not_found(format!("process {} has ended", self.pid));
        let program = lock(&self.program).clone().filter(|_| self.running());
        let program = program.ok_or_else(ended)?;
        match pidfd_kill(program.as_fd(), signal) {
            Err(e) if e.raw_os_error() == Some(Errno::ESRCH as i32) => Err(ended()),
            done => done.during(|| format!("send signal {signal} to process {}", self.pid)),
        }
    }

    /// What it left running of these processes and their sessions; nothing while it runs.
    pub fn left_of(&self, all: &[(i32, i32)]) -> Vec<i32> {
        if self.running() || !self.left.load(Ordering::Relaxed) {
            return Vec::new();
        }
        self.forget(all);
        all.iter().filter(|(_, session)| *session == self.pid).map(|(pid, _)| *pid).collect()
    }

    /// Notes when there is nothing that it left, or its pid is somebody else's.
    fn forget(&self, all: &[(i32, i32)]) {
        let others = all.iter().any(|(pid, _)| *pid == self.pid);
        if others || !all.iter().any(|(_, session)| *session == self.pid) {
            self.left.store(false, Ordering::Relaxed);
        }
    }

    /// Sends a signal to one of its session that it left running; whether it was sent.
    pub fn signal_left(&self, pid: i32, number: u32) -> bool {
        let Ok(number) = i32::try_from(number) else { return false };
        let Ok(left) = pidfd_open(pid) else { return false };
        // Looked at behind the pidfd: nobody has the pid of what it stands for.
        session(pid) == Some(self.pid) && pidfd_kill(left.as_fd(), number).is_ok()
    }

    /// Writes all of `data` to its standard input.
    pub fn write_stdin(&self, data: &[u8]) -> Outcome<u32> {
        // Held while writing: two writers' bytes must not mix, and a close
        // waits for what was sent before it.
        let mut stdin = lock(&self.ends.stdin);
        let Some(file) = stdin.as_mut() else {
            return Err(Failure::not_found(format!("stdin of process {} is closed", self.pid)));
        };
        let written = file.write_all(data);
        // The process reads no more: closed pipes, and a terminal whose last user is gone.
        let gone = |e: &io::Error| {
            e.kind() == io::ErrorKind::BrokenPipe || e.raw_os_error() == Some(Errno::EIO as i32)
        };
        if let Some(e) = written.as_ref().err().filter(|e| gone(e)) {
            return Err(Failure::not_found(format!("write to stdin of process {}: {e}", self.pid)));
        }
        written.during(|| format!("write to stdin of process {}", self.pid))?;
        if let Some(last) = data.last() {
            self.ends.at_line.store(*last == b'\n', Ordering::Relaxed);
        }
        Ok(data.len() as u32)
    }

    /// Closes its standard input; a terminal gets an end-of-file character.
    pub fn close_stdin(&self) {
        let mut stdin = lock(&self.ends.stdin);
        if let Some(mut file) = stdin.take() {
            if self.ends.terminal {
                // Within a line, the first one only sends that.
                let at_line = self.ends.at_line.load(Ordering::Relaxed);
                let _ = file.write_all(if at_line { &[4] } else { &[4, 4] });
            }
        }
    }

    /// Reads what there is, at least a byte, at most `max`; empty at the end. With a
    /// `max` of 0, which Kata's runtimes never ask for, it closes the stream instead:
    /// whoever writes to it then learns that nobody reads.
    pub fn read(&self, stderr: bool, max: u32) -> Outcome<Vec<u8>> {
        let end = if stderr { &self.ends.stderr } else { &self.ends.stdout };
        if max == 0 {
            self.close_output(end);
            return Ok(Vec::new());
        }
        let Some(source) = lock(end).clone() else {
            // A terminal has one stream; its stderr is at its end at once.
            return Ok(Vec::new());
        };
        let mut buffer = vec![0; (max as usize).min(MAX_READ)];
        let n = source.read(&mut buffer).during(|| format!("read output of {}", self.pid))?;
        if n == 0 {
            drop(lock(end).take());
        }
        buffer.truncate(n);
        Ok(buffer)
    }

    fn close_output(&self, end: &Reading) {
        if let Some(source) = lock(end).take() {
            let _ = source.closing.write(1);
        }
        if self.ends.terminal {
            // Nobody is at it any more: it hangs up, once both of its ends are closed.
            drop(lock(&self.ends.stdin).take());
        }
    }

    /// Sets the window size of its terminal.
    pub fn resize(&self, rows: u32, columns: u32) -> Outcome<()> {
        let size = u16::try_from(rows).ok().zip(u16::try_from(columns).ok());
        let (rows, columns) =
            size.ok_or_else(|| Failure::invalid(format!("window of {rows} x {columns}")))?;
        let master = lock(&self.ends.stdout).clone().filter(|_| self.ends.terminal);
        let no_terminal =
            || Failure::invalid(format!("process {} has no terminal, or it is closed", self.pid));
        let master = master.ok_or_else(no_terminal)?;
        set_window_size(master.file.as_fd(), rows, columns).during(|| "set the window size")
    }
}
