//! This process's signals, and its streams tied to a process in a guest.
//!
//! Invariants: a signal that comes before there is a process ends what is under
//! way, a VM that is ours included; one that comes later goes to the process,
//! whose end ends this. A guest that does not answer never holds the terminal:
//! the second signal, or the time limit, ends this without it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crossbeam_channel::{after, at, bounded, never, select, Receiver, Sender};

use super::output::{Failure, FAILED, IN_VMCACHE, TIMED_OUT};
use super::print;
use super::run::exit_code;
use super::streams::{carry_input, carry_output, Carried, Output, QUIET};
use super::terminal::{size, Terminal};
use crate::sys::process::{pidfd_kill, pidfd_wait};
use crate::sys::signal::{
    is_ignored, real_time, Set, SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGPIPE, SIGQUIT,
    SIGSTOP, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH,
};
use crate::vm::birth::Birth;
use crate::vm::dir::VmDir;
use crate::vm::ledger::Ledger;
use crate::worker::{self, Worker};
use crate::workload::{self, Running};

/// The largest of the signals that are not real-time ones.
const LAST_STANDARD: i32 = 31;
/// Signals that are not passed on: those that cannot be caught, those that tell this
/// process of its own children and streams, and those by which a shell stops it.
const KEPT: [i32; 8] = [SIGKILL, SIGSTOP, SIGCHLD, SIGURG, SIGPIPE, SIGTSTP, SIGTTIN, SIGTTOU];
/// Those by which a user means: end.
const ENDING: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];
/// Those that do nothing to a process that does not ask for them.
const IDLE: [i32; 2] = [SIGCONT, SIGWINCH];
/// Signals that may wait for the guest; more are dropped, as the kernel does.
const SIGNALS: usize = 64;
/// After the time limit's kill, or a signal that the guest refused: until this
/// ends without the guest.
const GRACE: Duration = Duration::from_secs(5);
/// How long a signal by which a user means: end waits for a process that is being started.
const STARTING: Duration = Duration::from_secs(2);

/// Between two signals by which a user means: end, of which the second ends this without the
/// guest.
const INSISTING: Duration = Duration::from_secs(1);
/// How long before a command's end such a signal counts as its reason.
const RECENT: Duration = Duration::from_secs(10);
/// Exit codes of those that a signal ended.
const SIGNALLED: std::ops::RangeInclusive<i32> = 129..=192;
/// Outputs of a process.
const OUTPUTS: usize = 2;

/// When a command has had its time.
pub type Limit = Option<Instant>;

/// Signals that go to the process in the guest.
fn forwarded() -> impl Iterator<Item = i32> {
    (1..=LAST_STANDARD).filter(|n| !KEPT.contains(n)).chain(real_time())
}

/// What is under way when a signal comes.
#[derive(Default)]
struct Stage {
    /// A VM that ends with this process.
    held: Option<(OwnedFd, PathBuf)>,
    /// It is being made, and not known well enough to be ended.
    begins: bool,
    /// A signal that came meanwhile.
    waiting: Option<i32>,
    /// Who passes signals on to a process in a guest.
    process: Option<Sender<i32>>,
    /// Whether that process is only being started.
    starting: bool,
}

/// Signals of this process, taken over.
pub struct Session {
    stage: Arc<Mutex<Stage>>,
}

/// A process that is being started: its signals wait for it here.
pub struct Expected {
    signals: Receiver<i32>,
    stage: Arc<Mutex<Stage>>,
}

impl Drop for Expected {
    /// One whose start failed is not waited for.
    fn drop(&mut self) {
        let mut stage = lock(&self.stage);
        if std::mem::take(&mut stage.starting) {
            stage.process = None;
        }
    }
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
        // What is ignored stays so, as by any program: nohup, or a script's `&`.
        let signals = Set::of(forwarded().filter(|n| !is_ignored(*n)));
        let failed = |e: &dyn std::fmt::Display| Failure::new(FAILED, format!("take signals: {e}"));
        signals.block().map_err(|e| failed(&e))?;
        let stage = Arc::new(Mutex::new(Stage::default()));
        let shared = Arc::clone(&stage);
        Worker::spawn("vmc-signals", move || {
            while let Ok(signal) = signals.wait() {
                on_signal(signal, &shared);
            }
        })
        .map_err(|e| failed(&e))?;
        Ok(Session { stage })
    }

    fn change(&self, f: impl FnOnce(&mut Stage)) {
        f(&mut lock(&self.stage));
    }

    /// From now on, a process is being started, and signals wait for it; one by which a
    /// user means: end does not wait long. With `limit`, it is all over then, unless the
    /// process runs.
    pub fn expect(&self, limit: Option<Duration>) -> Result<(Expected, Limit), Failure> {
        let (passed, signals) = bounded(SIGNALS);
        self.change(|s| (s.process, s.starting) = (Some(passed), true));
        let expected = Expected { signals, stage: Arc::clone(&self.stage) };
        let Some(limit) = limit else { return Ok((expected, None)) };
        let stage = Arc::clone(&self.stage);
        Worker::spawn("vmc-limit", move || {
            let _ = after(limit).recv();
            let mut stage = lock(&stage);
            if stage.starting {
                print::message(format!("the command did not start within {limit:?}: given up"));
                end(&mut stage, TIMED_OUT.into());
            }
        })
        .map_err(|e| Failure::new(FAILED, e.to_string()))?;
        Ok((expected, Instant::now().checked_add(limit)))
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
                    end(s, 128 + signal);
                }
            }
        });
    }

    /// From now on, the VM outlives this process.
    pub fn release(&self) {
        self.change(|s| (s.held, s.begins) = (None, false));
    }

    /// Ties this process's streams to `process` and waits for its end; `input` tells
    /// whether standard input is one of them.
    pub fn attach(
        &self,
        process: &Running,
        expected: Expected,
        terminal: Option<Terminal>,
        input: bool,
        limit: Limit,
    ) -> Result<Ended, Failure> {
        self.change(|s| s.starting = false);
        let raw = terminal.as_ref().map(Terminal::raw).transpose()?;
        let mut attended = Attended { process, terminal: terminal.as_ref(), limit };
        let ended = attended.attend(&expected.signals, input);
        drop(raw);
        self.change(|s| s.process = None);
        let (ended, lost) = ended?;
        match lost {
            None => Ok(ended),
            Some(text) => {
                print::message(text);
                let code = if ended.code == TIMED_OUT { TIMED_OUT } else { IN_VMCACHE };
                Ok(Ended { code, ..ended })
            }
        }
    }
}

impl Drop for Session {
    /// A signal that is ending this process ends it, with its own exit code: that a
    /// VM has gone because of it is no failure to be told.
    fn drop(&mut self) {
        // What began came to nothing, which its maker has removed.
        if let Some(signal) = lock(&self.stage).waiting {
            std::process::exit(128 + signal);
        }
    }
}

fn lock(stage: &Mutex<Stage>) -> MutexGuard<'_, Stage> {
    stage.lock().unwrap_or_else(|e| e.into_inner())
}

fn on_signal(signal: i32, shared: &Arc<Mutex<Stage>>) {
    let mut stage = lock(shared);
    if let Some(process) = &stage.process {
        let _ = process.try_send(signal);
        if stage.starting && ENDING.contains(&signal) {
            let shared = Arc::clone(shared);
            let late = Worker::spawn("vmc-late", move || {
                let _ = after(STARTING).recv();
                let mut stage = lock(&shared);
                if stage.starting {
                    end(&mut stage, 128 + signal);
                }
            });
            if late.is_err() {
                end(&mut stage, 128 + signal);
            }
        }
        return;
    }
    if IDLE.contains(&signal) {
        return;
    }
    if stage.begins {
        stage.waiting = Some(signal);
        return;
    }
    end(&mut stage, 128 + signal);
}

/// Ends this process, and the VM that ends with it.
fn end(stage: &mut Stage, code: i32) {
    if let Some((qemu, dir)) = stage.held.take() {
        let _ = pidfd_kill(qemu.as_fd(), SIGKILL);
        // Until it is gone, it can still make sockets in its directory.
        pidfd_wait(qemu.as_fd(), GRACE);
        // What served it goes, too.
        drop(Ledger::read(&dir).map(|ledger| ledger.adopt_attendants()));
        drop(VmDir::adopt(&dir));
    }
    std::process::exit(code);
}

/// Something for the process, done by a thread that may wait for the guest.
enum Order {
    Signal(i32),
    Resize,
}

/// A process whose streams and signals are carried.
struct Attended<'a> {
    process: &'a Running,
    terminal: Option<&'a Terminal>,
    limit: Limit,
}

/// What is known of it so far.
#[derive(Default)]
struct Known {
    status: Option<i32>,
    /// When that came.
    since: Option<Instant>,
    /// Outputs that are at their end.
    outputs: usize,
    /// What did not arrive, the first of it.
    lost: Option<String>,
    timed_out: bool,
    /// When a signal by which the user means: end was sent last.
    ending: Option<Instant>,
    /// When this ends without the guest, and with which exit code.
    give_up: Option<(Instant, u8)>,
    /// Since when a signal by which the user means: end has no answer from the guest.
    unanswered: Option<Instant>,
}

impl Known {
    fn carried(&mut self, output: Result<Carried, crossbeam_channel::RecvError>) {
        self.outputs += 1;
        match output {
            Ok(Carried::Whole) => {}
            Ok(Carried::Lost(text)) => self.lose(text),
            Err(_) => self.lose("carry the command's output: the thread panicked".into()),
        }
    }

    fn lose(&mut self, text: String) {
        self.lost.get_or_insert(text);
    }

    /// Its end is known, and nobody takes the rest of its output. One that was ended from
    /// here says by its exit code that there may be more; where there was none for a while,
    /// what still may write it is not the command.
    fn cut_off(&mut self, quiet: bool) {
        let sent = self.ending.is_some() || self.timed_out;
        let by_us = sent && self.status.is_some_and(|status| SIGNALLED.contains(&status));
        if self.outputs < OUTPUTS && self.status.is_some() && !by_us && !quiet {
            self.lose("the command has ended, and the rest of its output was not taken".into());
        }
    }

    fn give_up_in(&mut self, grace: Duration, code: u8) {
        self.give_up.get_or_insert((Instant::now() + grace, code));
    }

    fn ended(self, code: u8, known: bool) -> (Ended, Option<String>) {
        // What was lost of one that was given up is the least of it.
        (Ended { code, known }, self.lost.filter(|_| known))
    }

    fn code(&self) -> u8 {
        if self.timed_out {
            TIMED_OUT
        } else {
            exit_code(self.status.unwrap_or_default())
        }
    }
}

impl Attended<'_> {
    /// Carries streams and signals until the process has ended, or is given up; also
    /// what was lost of its streams.
    fn attend(
        &mut self,
        signals: &Receiver<i32>,
        input: bool,
    ) -> Result<(Ended, Option<String>), Failure> {
        let process = self.process;
        let failed = |e: worker::Error| Failure::new(FAILED, e.to_string());
        let (mut out, out_flow) = carry_output(process, Output::Stdout).map_err(failed)?;
        let (mut err, err_flow) = carry_output(process, Output::Stderr).map_err(failed)?;
        let quiet = || out_flow.quiet() && err_flow.quiet();
        let fault = match input {
            true => Some(carry_input(process).map_err(failed)?),
            false => {
                drop(process.stdin());
                None
            }
        };
        let mut end = wait_for(process).map_err(failed)?;
        let (orders, answers) = take_orders(process).map_err(failed)?;
        let mut known = Known::default();
        while known.status.is_none() || known.outputs < OUTPUTS {
            let late = self.limit.map_or_else(never, at);
            let over = known.give_up.map_or_else(never, |(t, _)| at(t));
            // A channel that has ended is always ready: it is replaced.
            select! {
                recv(end) -> answer => {
                    end = never();
                    let panicked = |_| Failure::new(FAILED, "the waiting thread panicked");
                    known.status = Some(answer.map_err(panicked)??);
                    known.since = Some(Instant::now());
                    known.give_up = known.give_up.filter(|_| known.timed_out);
                    if known.ending.is_some_and(|sent| sent.elapsed() < RECENT) {
                        // Who reads its output may never go on.
                        known.give_up_in(GRACE, known.code());
                    }
                }
                recv(out) -> carried => {
                    out = never();
                    known.carried(carried);
                }
                recv(err) -> carried => {
                    err = never();
                    known.carried(carried);
                }
                recv(late) -> _ => {
                    self.limit = None;
                    // What it wrote last may come after its end.
                    if let Some(soon) = known.since.map(|t| t + QUIET).filter(|t| *t > Instant::now()) {
                        self.limit = Some(soon);
                        continue;
                    }
                    if known.status.is_some() {
                        // Others hold its streams; they have had their time.
                        known.cut_off(quiet());
                        let code = known.code();
                        return Ok(known.ended(code, true));
                    }
                    known.timed_out = true;
                    let _ = orders.try_send(Order::Signal(SIGKILL));
                    known.give_up = None;
                    known.give_up_in(GRACE, TIMED_OUT);
                }
                recv(over) -> _ => {
                    let code = known.give_up.map_or(TIMED_OUT, |(_, code)| code);
                    let answered = known.status.is_some();
                    known.cut_off(quiet());
                    return Ok(known.ended(code, answered));
                }
                recv(answers) -> answer => {
                    let Ok((signal, taken)) = answer else { continue };
                    if !ENDING.contains(&signal) {
                        continue;
                    }
                    known.unanswered = None;
                    // Its end may be on the way: that is why it takes no signal.
                    if !taken && known.status.is_none() {
                        known.give_up_in(GRACE, exit_code(128 + signal));
                    }
                }
                recv(signals) -> signal => {
                    let Ok(signal) = signal else { continue };
                    if let Some(code) = self.pass(signal, &orders, &mut known) {
                        return Ok(known.ended(code, false));
                    }
                }
            }
        }
        if let Some(text) = fault.and_then(|f| f.lock().unwrap_or_else(|e| e.into_inner()).take()) {
            known.lose(text);
        }
        let code = known.code();
        Ok(known.ended(code, true))
    }

    /// Passes a signal on; the exit code, where nobody is left to take it.
    fn pass(&self, signal: i32, orders: &Sender<Order>, known: &mut Known) -> Option<u8> {
        if let Some(terminal) = self.terminal.filter(|_| signal == SIGCONT) {
            // While it was stopped, the terminal was the shell's, and may have another size.
            terminal.again();
            let _ = orders.try_send(Order::Resize);
        }
        if signal == SIGWINCH && self.terminal.is_some() {
            if known.unanswered.is_none() {
                let _ = orders.try_send(Order::Resize);
            }
            return None;
        }
        let ending = ENDING.contains(&signal);
        // The last one was not taken, or there is nobody. Two that come at once are one wish.
        let refused = known.unanswered.is_some_and(|since| since.elapsed() >= INSISTING);
        if ending && (known.status.is_some() || refused) {
            return Some(exit_code(128 + signal));
        }
        let sent = orders.try_send(Order::Signal(signal)).is_ok();
        if ending && sent {
            known.unanswered.get_or_insert_with(Instant::now);
        }
        if ending {
            known.ending = Some(Instant::now());
        }
        None
    }
}

type End = Result<i32, workload::Error>;

/// Waits for its end on a thread of its own.
fn wait_for(process: &Running) -> Result<Receiver<End>, worker::Error> {
    let (tell, end) = bounded(1);
    let process = process.clone();
    Worker::spawn("vmc-wait", move || tell.send(process.wait()))?;
    Ok(end)
}

type Answers = Receiver<(i32, bool)>;

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
                    let done = process.signal(signal).is_ok();
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
