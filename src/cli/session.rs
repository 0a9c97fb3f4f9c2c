//! This process's signals, and its streams tied to a process in a guest.
//!
//! Invariants: a signal that comes before there is a process ends what is under
//! way, a VM that is ours included; one that comes later goes to the process,
//! whose end ends this. A guest that does not answer never holds the terminal:
//! the second signal, or the time limit, ends this without it.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{at, bounded, never, select, Receiver, Sender};
use nix::sys::signal::{SigSet, Signal};

use super::output::{Failure, FAILED, TIMED_OUT};
use super::run::exit_code;
use super::terminal::{size, Terminal};
use crate::sys::process::{pidfd_kill, pidfd_wait};
use crate::vm::birth::Birth;
use crate::vm::dir::VmDir;
use crate::vm::ledger::Ledger;
use crate::worker::{self, Worker};
use crate::workload::{self, Running, StreamReader};

/// Signals that go to the process in the guest.
const FORWARDED: [Signal; 6] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];
/// Those of them by which a user means: end.
const ENDING: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
/// Bytes read from standard input at once.
const CHUNK: usize = 256 * 1024;
/// Signals that may wait for the guest; more are dropped, as the kernel does.
const SIGNALS: usize = 16;
/// After the time limit's kill, or a signal that the guest refused: until this
/// ends without the guest.
const GRACE: Duration = Duration::from_secs(5);

/// What is under way when a signal comes.
#[derive(Default)]
struct Stage {
    /// A VM that ends with this process.
    held: Option<(OwnedFd, PathBuf)>,
    /// It is being made, and not known well enough to be ended.
    begins: bool,
    /// A signal that came meanwhile.
    waiting: Option<Signal>,
    /// Who passes signals on to a process in a guest.
    process: Option<Sender<Signal>>,
}

/// Signals of this process, taken over.
pub struct Session {
    stage: Arc<Mutex<Stage>>,
}

/// How a process in a guest ended, as far as this side knows.
pub struct Ended {
    /// The exit code for this process.
    pub code: u8,
    /// Whether the guest said so; otherwise it was given up.
    pub known: bool,
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
        let stage = Arc::new(Mutex::new(Stage::default()));
        let shared = Arc::clone(&stage);
        Worker::spawn("vmc-signals", move || {
            while let Ok(signal) = signals.wait() {
                on_signal(signal, &mut shared.lock().unwrap_or_else(|e| e.into_inner()));
            }
        })
        .map_err(|e| failed(&e))?;
        Ok(Session { stage })
    }

    fn change(&self, f: impl FnOnce(&mut Stage)) {
        f(&mut self.stage.lock().unwrap_or_else(|e| e.into_inner()));
    }

    /// From now on, a signal that has no process to go to ends this VM; while it
    /// only begins to be, the signal waits.
    pub fn hold(&self, birth: Birth<'_>) {
        self.change(|s| match birth {
            Birth::Begins => s.begins = true,
            Birth::Runs { dir, qemu, .. } => {
                s.held = qemu.watch().ok().map(|qemu| (qemu, dir.to_path_buf()));
                s.begins = false;
                if let Some(signal) = s.waiting {
                    on_signal(signal, s);
                }
            }
        });
    }

    /// From now on, the VM outlives this process.
    pub fn release(&self) {
        self.change(|s| (s.held, s.begins) = (None, false));
    }

    /// Ties this process's streams to `process` and waits for its end.
    pub fn attach(
        &self,
        process: &Running,
        terminal: Option<Terminal>,
        timeout: Option<Duration>,
    ) -> Result<Ended, Failure> {
        let (passed, signals) = bounded(SIGNALS);
        self.change(|s| s.process = Some(passed));
        let raw = terminal.as_ref().map(Terminal::raw).transpose()?;
        let ended = attend(process, terminal.is_some(), timeout, &signals);
        drop(raw);
        self.change(|s| s.process = None);
        ended
    }
}

impl Drop for Session {
    /// A signal that is ending this process ends it, with its own exit code: that a
    /// VM has gone because of it is no failure to be told.
    fn drop(&mut self) {
        let stage = self.stage.lock().unwrap_or_else(|e| e.into_inner());
        // What began came to nothing, which its maker has removed.
        if let Some(signal) = stage.waiting {
            std::process::exit(128 + signal as i32);
        }
    }
}

fn on_signal(signal: Signal, stage: &mut Stage) {
    if let Some(process) = &stage.process {
        let _ = process.try_send(signal);
        return;
    }
    if signal == Signal::SIGWINCH {
        return;
    }
    if stage.begins {
        stage.waiting = Some(signal);
        return;
    }
    if let Some((qemu, dir)) = stage.held.take() {
        let _ = pidfd_kill(qemu.as_fd(), Signal::SIGKILL as i32);
        // Until it is gone, it can still make sockets in its directory.
        pidfd_wait(qemu.as_fd(), GRACE);
        // What served it goes, too.
        drop(Ledger::read(&dir).map(|ledger| ledger.adopt_attendants()));
        drop(VmDir::adopt(&dir));
    }
    std::process::exit(128 + signal as i32);
}

/// Something for the process, done by a thread that may wait for the guest.
enum Order {
    Signal(Signal),
    Resize,
}

/// Carries streams and signals until the process has ended, or is given up.
fn attend(
    process: &Running,
    terminal: bool,
    timeout: Option<Duration>,
    signals: &Receiver<Signal>,
) -> Result<Ended, Failure> {
    let failed = |e: worker::Error| Failure::new(FAILED, e.to_string());
    carry_stdin(process).map_err(failed)?;
    let out = pump("vmc-stdout", process, process.stdout(), io::stdout()).map_err(failed)?;
    let err = pump("vmc-stderr", process, process.stderr(), io::stderr()).map_err(failed)?;
    let end = wait_for(process).map_err(failed)?;
    let (orders, answers) = take_orders(process).map_err(failed)?;

    let started = Instant::now();
    let given_up = |code| Ok(Ended { code, known: false });
    let mut limit = timeout.map(|t| started + t);
    let mut give_up: Option<(Instant, u8)> = None;
    // What is not known yet: the exit code, and the rest of the streams.
    let (mut end, mut out, mut err) = (end, out.done().clone(), err.done().clone());
    let (mut status, mut streams) = (None::<i32>, 2);
    let mut timed_out = false;
    // A signal that the guest has not answered yet.
    let mut unanswered = false;
    while status.is_none() || streams > 0 {
        let late = limit.map_or_else(never, at);
        let over = give_up.map_or_else(never, |(t, _)| at(t));
        select! {
            recv(end) -> answer => {
                match answer {
                    Ok(answer) => status = Some(answer?),
                    Err(_) => return Err(Failure::new(FAILED, "the waiting thread panicked")),
                }
                // A channel that has ended is always ready.
                end = never();
                if !timed_out {
                    give_up = None;
                }
            }
            recv(out) -> _ => {
                out = never();
                streams -= 1;
            }
            recv(err) -> _ => {
                err = never();
                streams -= 1;
            }
            recv(late) -> _ => {
                if let Some(status) = status {
                    // Others hold its streams; they have had their time.
                    return Ok(Ended { code: exit_code(status), known: true });
                }
                (timed_out, limit) = (true, None);
                let _ = orders.try_send(Order::Signal(Signal::SIGKILL));
                give_up = Some((Instant::now() + GRACE, TIMED_OUT));
            }
            recv(over) -> _ => return given_up(give_up.map_or(TIMED_OUT, |(_, code)| code)),
            recv(answers) -> answer => {
                unanswered = false;
                // Its end may be on the way: that is why it takes no signal.
                if let (Ok((signal, false)), None, None) = (answer, status, give_up) {
                    give_up = Some((Instant::now() + GRACE, exit_code(128 + signal as i32)));
                }
            }
            recv(signals) -> signal => {
                let Ok(signal) = signal else { continue };
                if signal == Signal::SIGWINCH {
                    if terminal && !unanswered {
                        let _ = orders.try_send(Order::Resize);
                    }
                    continue;
                }
                let ending = ENDING.contains(&signal);
                // Nobody is left to take it, or the last one was not taken.
                if ending && (status.is_some() || unanswered) {
                    return given_up(exit_code(128 + signal as i32));
                }
                unanswered |= ending && orders.try_send(Order::Signal(signal)).is_ok();
            }
        }
    }
    let code = if timed_out { TIMED_OUT } else { exit_code(status.unwrap_or_default()) };
    Ok(Ended { code, known: true })
}

/// Carries our standard input in. Not joined: the thread may sit in a read that
/// never comes.
fn carry_stdin(process: &Running) -> Result<(), worker::Error> {
    let mut stdin = process.stdin();
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
    })?;
    Ok(())
}

type End = Result<i32, workload::Error>;

/// Waits for its end on a thread of its own.
fn wait_for(process: &Running) -> Result<Receiver<End>, worker::Error> {
    let (tell, end) = bounded(1);
    let process = process.clone();
    Worker::spawn("vmc-wait", move || tell.send(process.wait()))?;
    Ok(end)
}

type Answers = Receiver<(Signal, bool)>;

/// Takes orders on a thread of its own; for each signal, an answer: whether the
/// guest took it.
fn take_orders(process: &Running) -> Result<(Sender<Order>, Answers), worker::Error> {
    let (orders, taken) = bounded(SIGNALS);
    let (tell, answers) = bounded(SIGNALS);
    let process = process.clone();
    Worker::spawn("vmc-orders", move || {
        for order in taken {
            match order {
                Order::Signal(signal) => {
                    let done = process.signal(signal as i32).is_ok();
                    if tell.send((signal, done)).is_err() {
                        return;
                    }
                }
                Order::Resize => {
                    if let Some((rows, columns)) = size() {
                        let _ = process.resize(rows, columns);
                    }
                }
            }
        }
    })?;
    Ok((orders, answers))
}

/// Carries one stream out. When nobody reads ours any more, the process gets
/// what it would get from a pipe.
fn pump(
    name: &str,
    process: &Running,
    mut from: StreamReader,
    mut to: impl Write + Send + 'static,
) -> Result<Worker<()>, worker::Error> {
    let process = process.clone();
    Worker::spawn(name, move || {
        let mut open = true;
        while let Ok(bytes) = from.next_chunk() {
            if bytes.is_empty() {
                return;
            }
            if open && to.write_all(&bytes).and_then(|()| to.flush()).is_err() {
                open = false;
                let _ = process.signal(Signal::SIGPIPE as i32);
            }
        }
    })
}
