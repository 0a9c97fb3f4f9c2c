//! This process's streams, signals and terminal, tied to a process in a guest.
//!
//! Invariants: the terminal is restored on every way out; a signal that comes
//! before there is a process ends what is under way; one that comes later goes
//! to the process, whose end ends this.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::bounded;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::termios::{cfmakeraw, tcgetattr, tcsetattr, SetArg, Termios};

use super::output::{Failure, FAILED, TIMED_OUT, USAGE};
use super::run::exit_code;
use crate::sys::process::pidfd_kill;
use crate::sys::terminal::window_size;
use crate::worker::Worker;
use crate::workload::{Running, StreamReader};

/// Signals that go to the process in the guest.
const FORWARDED: [Signal; 6] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];
/// SIGKILL and SIGPIPE.
const KILL: i32 = 9;
const PIPE: i32 = 13;
/// Bytes read from standard input at once.
const CHUNK: usize = 256 * 1024;

/// What is under way when a signal comes.
enum Stage {
    /// Nothing that needs care: a claim goes with its connection.
    Waiting,
    /// A QEMU of our own.
    Booting(OwnedFd),
    /// A process in a guest.
    Running { process: Running, terminal: bool },
}

/// Signals of this process, taken over.
pub struct Session {
    stage: Arc<Mutex<Stage>>,
}

fn set(stage: &Mutex<Stage>, new: Stage) {
    *stage.lock().unwrap_or_else(|e| e.into_inner()) = new;
}

impl Session {
    /// Takes the signals over; before any other thread is started.
    pub fn start() -> Result<Session, Failure> {
        let mut signals = SigSet::empty();
        for signal in FORWARDED.into_iter().chain([Signal::SIGWINCH]) {
            signals.add(signal);
        }
        let failed = |e: &dyn std::fmt::Display| Failure::new(FAILED, format!("take signals: {e}"));
        signals.thread_block().map_err(|e| failed(&e))?;
        let stage = Arc::new(Mutex::new(Stage::Waiting));
        let shared = Arc::clone(&stage);
        Worker::spawn("vmc-signals", move || loop {
            match signals.wait() {
                Ok(signal) => on_signal(signal, &shared),
                Err(_) => return,
            }
        })
        .map_err(|e| failed(&e))?;
        Ok(Session { stage })
    }

    /// A signal ends this QEMU from now on.
    pub fn booting(&self, qemu: OwnedFd) {
        set(&self.stage, Stage::Booting(qemu));
    }

    /// Ties this process's streams to `process` and waits for its end; the
    /// exit code that it had.
    pub fn attach(
        &self,
        process: &Running,
        terminal: Option<Terminal>,
        timeout: Option<Duration>,
    ) -> Outcome {
        let stage = Stage::Running { process: process.clone(), terminal: terminal.is_some() };
        set(&self.stage, stage);
        let raw = terminal.as_ref().map(Terminal::raw).transpose()?;
        let failed = |e: crate::worker::Error| Failure::new(FAILED, e.to_string());

        let mut stdin = process.stdin();
        // Not joined: it may sit in a read of our stdin that never comes.
        Worker::spawn("vmc-stdin", move || {
            let mut chunk = vec![0; CHUNK];
            let mut from = io::stdin().lock();
            loop {
                match from.read(&mut chunk) {
                    Ok(n) if n > 0 => {
                        if stdin.write_all(&chunk[..n]).is_err() {
                            // It reads no more, or has ended; its exit code tells.
                            return;
                        }
                    }
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    _ => return,
                }
            }
        })
        .map_err(failed)?;
        let out = pump("vmc-stdout", process, process.stdout(), io::stdout()).map_err(failed)?;
        let err = pump("vmc-stderr", process, process.stderr(), io::stderr()).map_err(failed)?;

        let timed_out = Arc::new(AtomicBool::new(false));
        // Never filled: closing it tells that the process has ended in time.
        let (in_time, over) = bounded::<()>(1);
        if let Some(timeout) = timeout {
            let (process, flag) = (process.clone(), Arc::clone(&timed_out));
            Worker::spawn("vmc-timeout", move || {
                if over.recv_timeout(timeout).is_err_and(|e| e.is_timeout()) {
                    flag.store(true, Ordering::SeqCst);
                    let _ = process.signal(KILL);
                }
            })
            .map_err(failed)?;
        }
        let status = process.wait()?;
        drop(in_time);
        // Everything that it wrote comes out, however slow our reader is.
        let _ = (out.done().recv(), err.done().recv());
        drop(raw);
        set(&self.stage, Stage::Waiting);
        Ok(if timed_out.load(Ordering::SeqCst) { TIMED_OUT } else { exit_code(status) })
    }
}

type Outcome = Result<u8, Failure>;

fn on_signal(signal: Signal, stage: &Mutex<Stage>) {
    let stage = stage.lock().unwrap_or_else(|e| e.into_inner());
    match &*stage {
        Stage::Running { process, terminal } if signal == Signal::SIGWINCH => {
            if let Some((rows, columns)) = terminal.then(size).flatten() {
                let _ = process.resize(rows, columns);
            }
        }
        Stage::Running { process, .. } => {
            let _ = process.signal(signal as i32);
        }
        _ if signal == Signal::SIGWINCH => {}
        Stage::Booting(qemu) => {
            let _ = pidfd_kill(qemu.as_fd(), KILL);
            std::process::exit(128 + signal as i32);
        }
        Stage::Waiting => std::process::exit(128 + signal as i32),
    }
}

/// Carries one stream out. When nobody reads ours any more, the process gets
/// what it would get from a pipe.
fn pump(
    name: &str,
    process: &Running,
    mut from: StreamReader,
    mut to: impl Write + Send + 'static,
) -> Result<Worker<()>, crate::worker::Error> {
    let process = process.clone();
    Worker::spawn(name, move || {
        let mut open = true;
        while let Ok(bytes) = from.next_chunk() {
            if bytes.is_empty() {
                return;
            }
            if open && to.write_all(&bytes).and_then(|()| to.flush()).is_err() {
                open = false;
                let _ = process.signal(PIPE);
            }
        }
    })
}

fn size() -> Option<(u16, u16)> {
    window_size(io::stdin().as_fd()).ok()
}

/// This process's terminal.
pub struct Terminal {
    before: Termios,
}

impl Terminal {
    /// Standard input, which must be a terminal.
    pub fn open() -> Result<Terminal, Failure> {
        if !io::stdin().is_terminal() {
            return Err(Failure::new(USAGE, "--tty: standard input is no terminal"));
        }
        let before = tcgetattr(io::stdin())
            .map_err(|e| Failure::new(FAILED, format!("read the terminal's state: {e}")))?;
        Ok(Terminal { before })
    }

    /// Its rows and columns.
    pub fn size(&self) -> (u16, u16) {
        size().unwrap_or((24, 80))
    }

    fn raw(&self) -> Result<Raw, Failure> {
        let mut raw = self.before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)
            .map_err(|e| Failure::new(FAILED, format!("make the terminal raw: {e}")))?;
        Ok(Raw { before: self.before.clone() })
    }
}

/// A raw terminal; restored when dropped.
struct Raw {
    before: Termios,
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.before);
    }
}
