//! One process of a container: its stdio ends that the agent holds, and how it
//! ended.
//!
//! Invariants: reads and writes block only the request that asked; end of file
//! is an empty read; the exit code is set once, by a thread that waits on the
//! reaper, and kept as long as the record.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use nix::fcntl::OFlag;
use nix::pty::{openpty, OpenptyResult};
use nix::sys::signal::{kill, Signal};
use nix::unistd::{pipe2, Pid};

use super::failure::{Attempt, Failure, Outcome};
use super::reaper;
use crate::sys::terminal::set_window_size;

/// Most bytes one ReadStdout or ReadStderr returns, whatever was asked: fits
/// one ttrpc message (4 MiB) with room.
pub const MAX_READ: usize = 1024 * 1024;

/// The agent's ends of a process's stdio.
pub struct Ends {
    stdin: Mutex<Option<File>>,
    stdout: Option<File>,
    stderr: Option<File>,
    terminal: bool,
}

/// A process that was started.
pub struct Process {
    /// Its pid in the guest's own namespace.
    pub pid: i32,
    ends: Ends,
    code: Mutex<Option<i32>>,
    ended: Condvar,
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
                stdout: Some(File::from(stdout)),
                stderr: Some(File::from(stderr)),
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
            stdout: Some(File::from(master)),
            stderr: None,
            terminal: true,
        })
    }
}

fn set_close_on_exec(fd: BorrowedFd<'_>) -> Outcome<()> {
    use nix::fcntl::{fcntl, FcntlArg, FdFlag};
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).during(|| "set close-on-exec").map(|_| ())
}

impl Process {
    /// Takes over a child that runs as `pid`.
    pub fn adopt(pid: i32, ends: Ends) -> Outcome<Arc<Process>> {
        let process =
            Arc::new(Process { pid, ends, code: Mutex::new(None), ended: Condvar::new() });
        let waiter = Arc::clone(&process);
        thread::Builder::new()
            .name(format!("wait-{pid}"))
            .stack_size(64 * 1024)
            .spawn(move || {
                let code = reaper::wait(waiter.pid);
                *waiter.code.lock().unwrap_or_else(|e| e.into_inner()) = Some(code);
                waiter.ended.notify_all();
            })
            .map_err(|e| Failure::internal(format!("start a thread to wait for {pid}: {e}")))?;
        Ok(process)
    }

    /// Waits for the end and tells the exit code.
    pub fn wait(&self) -> i32 {
        let mut code = self.code.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if let Some(code) = *code {
                return code;
            }
            code = self.ended.wait(code).unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Whether it still runs.
    pub fn running(&self) -> bool {
        self.code.lock().unwrap_or_else(|e| e.into_inner()).is_none()
    }

    /// Sends a signal.
    pub fn signal(&self, number: u32) -> Outcome<()> {
        let signal = i32::try_from(number)
            .ok()
            .and_then(|n| Signal::try_from(n).ok())
            .ok_or_else(|| Failure::invalid(format!("{number} is no signal")))?;
        if !self.running() {
            return Err(Failure::not_found(format!("process {} has ended", self.pid)));
        }
        kill(Pid::from_raw(self.pid), signal)
            .during(|| format!("send {signal} to process {}", self.pid))
    }

    /// Writes all of `data` to its standard input.
    pub fn write_stdin(&self, data: &[u8]) -> Outcome<u32> {
        // Held while writing: two writers' bytes must not mix, and a close
        // waits for what was sent before it.
        let mut stdin = self.ends.stdin.lock().unwrap_or_else(|e| e.into_inner());
        let Some(file) = stdin.as_mut() else {
            return Err(Failure::not_found(format!("stdin of process {} is closed", self.pid)));
        };
        file.write_all(data).during(|| format!("write to stdin of process {}", self.pid))?;
        Ok(data.len() as u32)
    }

    /// Closes its standard input; a terminal gets an end-of-file character.
    pub fn close_stdin(&self) {
        let mut stdin = self.ends.stdin.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(mut file) = stdin.take() {
            if self.ends.terminal {
                let _ = file.write_all(&[4]);
            }
        }
    }

    /// Reads what there is, at least a byte, at most `max`; empty at the end.
    pub fn read(&self, stderr: bool, max: u32) -> Outcome<Vec<u8>> {
        let file = if stderr { &self.ends.stderr } else { &self.ends.stdout };
        let Some(file) = file else {
            // A terminal has one stream; its stderr is at its end at once.
            return Ok(Vec::new());
        };
        let mut buffer = vec![0; (max as usize).clamp(1, MAX_READ)];
        loop {
            match (&*file).read(&mut buffer) {
                Ok(n) => {
                    buffer.truncate(n);
                    return Ok(buffer);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A terminal whose last user is gone.
                Err(e) if e.raw_os_error() == Some(nix::errno::Errno::EIO as i32) => {
                    return Ok(Vec::new());
                }
                Err(e) => return Err(e).during(|| format!("read output of {}", self.pid)),
            }
        }
    }

    /// Sets the window size of its terminal.
    pub fn resize(&self, rows: u32, columns: u32) -> Outcome<()> {
        let size = u16::try_from(rows).ok().zip(u16::try_from(columns).ok());
        let (rows, columns) =
            size.ok_or_else(|| Failure::invalid(format!("window of {rows} x {columns}")))?;
        match &self.ends.stdout {
            Some(master) if self.ends.terminal => {
                set_window_size(master.as_fd(), rows, columns).during(|| "set the window size")
            }
            _ => Err(Failure::invalid(format!("process {} has no terminal", self.pid))),
        }
    }
}
