//! Guests that answer nothing any more, while something waits for them without an end: a
//! command's output, its end, room for its input.
//!
//! ```text
//! a call waits, and nothing was heard for 15 s ─► is the VM paused? ─► wait on
//!                                                 has QEMU stopped it? ─► Stopped
//!                                                 else: Check, within 10 s ─► heard
//!                                                       twice no answer ─► Silent
//! a call of a copy waits, and nothing came for its own limit ─► Stalled
//! ```
//!
//! Invariants: a command that says nothing for an hour is not disturbed, as long as the
//! agent answers; nor is one in a VM that somebody has paused; once a guest was given up,
//! nothing is asked of it any more, and every call that waited has returned.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{after, bounded, Receiver, RecvTimeoutError, Sender};

use super::Error;
use crate::agent::{self, Agent};
use crate::hypervisor::qemu::qmp::Qmp;
use crate::transport::socket::connect_now;
use crate::vm::Vm;
use crate::worker::Worker;

/// How patient this is.
const PATIENCE: Patience =
    Patience { quiet: Duration::from_secs(15), probe: Duration::from_secs(10) };
/// Answers that may be missed, one after the other, before it is given up.
const MISSES: u32 = 2;
/// How long a VM's end may take that has broken its agent's connection.
const GOING: Duration = Duration::from_millis(500);
/// Pause between looks whether it has ended.
const LOOKING: Duration = Duration::from_millis(20);
/// How long QEMU's monitor may take: it is QEMU's own loop, or another client has it.
const MONITOR: Duration = Duration::from_secs(2);

/// How long a guest may say nothing.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Until one of which nothing was heard is asked whether it is there.
    quiet: Duration,
    /// How long it may take to answer that: under TCG on a busy host, seconds.
    probe: Duration,
}

/// Whether a VM's virtual CPUs run, as QEMU says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// They do, or nobody could be asked.
    Runs,
    /// Somebody has paused them.
    Paused,
    /// QEMU has stopped them, and they do not go on by themselves: QEMU's word for it.
    Stopped(String),
}

/// Asks QEMU, which has little time to answer.
pub fn run_state(vm: &Vm) -> RunState {
    ask(&vm.monitor())
}

fn ask(monitor: &Path) -> RunState {
    let status = Qmp::connect(monitor, MONITOR).and_then(|mut qmp| qmp.status(MONITOR));
    match status.as_deref() {
        Ok("paused") => RunState::Paused,
        Ok(
            status @ ("internal-error" | "io-error" | "guest-panicked" | "shutdown" | "watchdog"),
        ) => RunState::Stopped(status.to_string()),
        _ => RunState::Runs,
    }
}

/// Why a guest was given up.
#[derive(Clone, Debug)]
enum Verdict {
    Silent(Duration),
    Stopped(String),
    Stalled(Duration),
}

/// An agent, and whether it answers.
pub(super) struct Watched {
    agent: Arc<dyn Agent>,
    vm: String,
    /// Whether it is vmcache's own.
    own: bool,
    monitor: PathBuf,
    patience: Patience,
    state: Mutex<State>,
    // Never filled: closing it ends the thread.
    _watching: Sender<()>,
}

struct State {
    /// When the guest was heard last, or first waited for.
    heard: Instant,
    /// Calls that wait, by number: when they began, and how long they may.
    open: BTreeMap<u64, (Instant, Option<Duration>)>,
    next: u64,
    verdict: Option<Verdict>,
    /// For the thread, which the first such call starts.
    ended: Option<Receiver<()>>,
}

impl Watched {
    /// The agent of a VM.
    pub fn new(vm: &Vm, agent: Arc<dyn Agent>) -> Arc<Watched> {
        Watched::over(agent, (vm.id(), vm.own_agent()), &vm.monitor(), PATIENCE)
    }

    fn over(
        agent: Arc<dyn Agent>,
        (vm, own): (&str, bool),
        monitor: &Path,
        patience: Patience,
    ) -> Arc<Watched> {
        let (watching, ended) = bounded(1);
        let state = State {
            heard: Instant::now(),
            open: BTreeMap::new(),
            next: 0,
            verdict: None,
            ended: Some(ended),
        };
        Arc::new(Watched {
            agent,
            vm: vm.to_string(),
            own,
            monitor: monitor.to_path_buf(),
            patience,
            state: Mutex::new(state),
            _watching: watching,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether the agent is vmcache's own, which can do more than Kata's.
    pub fn own(&self) -> bool {
        self.own
    }

    /// Why the guest was given up, if it was.
    pub fn given_up(&self) -> Option<Error> {
        let vm = self.vm.clone();
        Some(match self.state().verdict.clone()? {
            Verdict::Silent(after) => Error::Silent { vm, after },
            Verdict::Stopped(status) => Error::Stopped { vm, status },
            Verdict::Stalled(after) => Error::Stalled { vm, after },
        })
    }

    /// A call that may wait without an end; with `limit`, no longer than that.
    ///
    /// # Errors
    /// The agent's, [`Error::Silent`], [`Error::Stopped`], [`Error::Stalled`].
    pub fn wait<T>(
        self: &Arc<Self>,
        limit: Option<Duration>,
        call: impl FnOnce(&dyn Agent) -> agent::Outcome<T>,
    ) -> Result<T, Error> {
        let number = self.begin(limit)?;
        let answer = call(&*self.agent);
        self.state().open.remove(&number);
        self.answered(answer)
    }

    /// A call that has a deadline of its own.
    ///
    /// # Errors
    /// The agent's, and as [`Watched::wait`] when the guest was given up before.
    pub fn call<T>(&self, call: impl FnOnce(&dyn Agent) -> agent::Outcome<T>) -> Result<T, Error> {
        match self.given_up() {
            // It would connect again, and wait.
            Some(why) => Err(why),
            None => self.answered(call(&*self.agent)),
        }
    }

    fn answered<T>(&self, answer: agent::Outcome<T>) -> Result<T, Error> {
        match &answer {
            Ok(_) | Err(agent::Error::Refused { .. }) => self.hear(),
            Err(_) => {}
        }
        answer.map_err(|e| match (self.given_up(), &e) {
            (Some(why), _) => why,
            (None, agent::Error::Call { .. } | agent::Error::Connect { .. }) if self.ended() => {
                Error::Ended { vm: self.vm.clone() }
            }
            _ => Error::Agent(e),
        })
    }

    /// Whether the VM's QEMU is gone: its monitor's socket is, or nobody listens on it. The
    /// agent's connection may break a moment before.
    fn ended(&self) -> bool {
        let gone = |e: io::Error| {
            matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
        };
        let deadline = Instant::now() + GOING;
        while Instant::now() < deadline {
            // One that stands still takes no connection, and is there.
            if connect_now(&self.monitor).is_err_and(gone) {
                return true;
            }
            let _ = after(LOOKING).recv();
        }
        false
    }

    fn hear(&self) {
        self.state().heard = Instant::now();
    }

    /// Notes a call that waits; starts the thread that watches, for the first one.
    fn begin(self: &Arc<Self>, limit: Option<Duration>) -> Result<u64, Error> {
        if let Some(why) = self.given_up() {
            return Err(why);
        }
        let mut state = self.state();
        let now = Instant::now();
        if state.open.is_empty() {
            // Before, nothing was asked.
            state.heard = now;
        }
        state.next += 1;
        let number = state.next;
        state.open.insert(number, (now, limit));
        let Some(ended) = state.ended.take() else { return Ok(number) };
        drop(state);
        let (watched, quiet) = (Arc::downgrade(self), self.patience.quiet);
        match Worker::spawn("vmc-silence", move || watch(&watched, &ended, quiet)) {
            Ok(_) => Ok(number),
            Err(e) => {
                self.state().open.remove(&number);
                let source = io::Error::other(e);
                Err(Error::Io { during: "start", path: "a thread".into(), source })
            }
        }
    }

    /// What is to be done now; `None` when the guest was given up.
    fn look(&self) -> Option<Duration> {
        let (quiet, stalled) = {
            let state = self.state();
            let now = Instant::now();
            let stalled = state.open.values().find_map(|(since, limit)| {
                let waited = now.saturating_duration_since(*since);
                limit.filter(|limit| waited >= *limit).map(|_| waited)
            });
            let quiet = now.saturating_duration_since(state.heard);
            (if state.open.is_empty() { Duration::ZERO } else { quiet }, stalled)
        };
        if let Some(left) = self.patience.quiet.checked_sub(quiet).filter(|left| !left.is_zero()) {
            return match stalled {
                Some(after) => self.give_up(Verdict::Stalled(after)),
                None => Some(left),
            };
        }
        for _ in 0..MISSES {
            match ask(&self.monitor) {
                RunState::Paused => {
                    // For a copy, too: its time goes on with the VM's.
                    let mut state = self.state();
                    let now = Instant::now();
                    state.heard = now;
                    state.open.values_mut().for_each(|(since, _)| *since = now);
                    return Some(self.patience.quiet);
                }
                RunState::Stopped(status) => return self.give_up(Verdict::Stopped(status)),
                RunState::Runs => {}
            }
            let asked = Instant::now();
            if self.agent.check(self.patience.probe).is_ok() {
                self.hear();
            }
            if self.state().heard >= asked {
                return match stalled {
                    Some(after) => self.give_up(Verdict::Stalled(after)),
                    None => Some(self.patience.quiet),
                };
            }
        }
        let silent = self.state().heard.elapsed();
        self.give_up(Verdict::Silent(silent))
    }

    fn give_up(&self, verdict: Verdict) -> Option<Duration> {
        self.state().verdict = Some(verdict);
        // Whoever waits returns now, and finds why.
        self.agent.hang_up();
        None
    }
}

fn watch(watched: &Weak<Watched>, ended: &Receiver<()>, quiet: Duration) {
    let mut wait = quiet;
    while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(wait) {
        let Some(watched) = watched.upgrade() else { return };
        match watched.look() {
            Some(next) => wait = next,
            None => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::kata::ttrpc::KataAgent;
    use crate::agent::noop::Noop;
    use crate::agent::{ProcessId, Stream};
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    const SOON: Patience =
        Patience { quiet: Duration::from_millis(100), probe: Duration::from_millis(100) };
    const LONG: Duration = Duration::from_secs(20);

    fn id() -> ProcessId {
        ProcessId { container: "c".into(), exec: String::new() }
    }

    /// Somewhere that no monitor is.
    fn nowhere() -> PathBuf {
        PathBuf::from("/nonexistent/qmp.sock")
    }

    #[test]
    fn one_that_answers_nothing_is_given_up_and_asked_nothing_more() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = Arc::new(KataAgent::over(ours).unwrap());
        let watched = Watched::over(agent, ("v", true), &nowhere(), SOON);
        let before = Instant::now();
        let e = watched.wait(None, |a| a.read_stream(&id(), Stream::Out, 1)).unwrap_err();
        assert!(matches!(e, Error::Silent { .. }), "{e:?}");
        assert!(before.elapsed() < LONG);
        assert!(e.to_string().starts_with("the guest of VM v has not answered for"), "{e}");
        let refused = |e: Error| assert!(matches!(e, Error::Silent { .. }), "{e:?}");
        refused(watched.wait(None, |_| -> agent::Outcome<()> { panic!("asked") }).unwrap_err());
        refused(watched.call(|_| -> agent::Outcome<()> { panic!("asked") }).unwrap_err());
        // Its end was closed.
        let mut rest = Vec::new();
        (&theirs).read_to_end(&mut rest).unwrap();
    }

    /// Calls wait much longer than it takes to ask; the agent (that is none) answers.
    #[test]
    fn one_that_answers_may_say_nothing_for_as_long_as_it_likes() {
        let watched = Watched::over(Arc::new(Noop), ("v", true), &nowhere(), SOON);
        let (tell, told) = bounded::<()>(1);
        let waiting = Arc::clone(&watched);
        let call = Worker::spawn("test-call", move || {
            waiting.wait(None, |_| {
                let _ = told.recv_timeout(LONG);
                Ok(7)
            })
        })
        .unwrap();
        // What is waited for here is that nothing happens.
        assert!(call.done().recv_timeout(10 * SOON.quiet).is_err());
        assert!(watched.given_up().is_none());
        tell.send(()).unwrap();
        assert_eq!(call.join(LONG).unwrap().unwrap(), 7);
    }

    #[test]
    fn a_copy_that_does_nothing_is_given_up_though_the_agent_answers() {
        let watched = Watched::over(Arc::new(Noop), ("v", true), &nowhere(), SOON);
        let limit = Some(3 * SOON.quiet);
        let e = watched.wait(limit, |_| {
            let deadline = Instant::now() + LONG;
            while watched.given_up().is_none() && Instant::now() < deadline {
                let _ = crossbeam_channel::after(Duration::from_millis(5)).recv();
            }
            Err::<(), _>(agent::Error::Call { call: "ReadStdout", text: "hung up".into() })
        });
        assert!(matches!(e, Err(Error::Stalled { .. })), "{e:?}");
    }

    /// A monitor that says what a paused VM's says, and then what a dead one's does.
    #[test]
    fn one_that_is_paused_is_waited_for_and_one_that_is_stopped_is_not() {
        let path = std::env::temp_dir().join(format!("vmcache-silence-{}", std::process::id()));
        let monitor = UnixListener::bind(&path).unwrap();
        let (tell, told) = bounded::<&str>(1);
        let serve = move || {
            let mut status = "paused";
            for stream in monitor.incoming() {
                let Ok(mut stream) = stream else { return };
                status = told.try_recv().unwrap_or(status);
                let hello = r#"{"QMP": {"version": {"qemu": {}}}}"#;
                let _ = writeln!(stream, "{hello}");
                for n in 1..3 {
                    let _ = stream.read(&mut [0; 4096]);
                    let answer = r#"{"return": {"status": "STATUS"}, "id": "vmcache-N"}"#;
                    let answer = answer.replace("STATUS", status).replace('N', &n.to_string());
                    let _ = writeln!(stream, "{answer}");
                }
                if status != "paused" {
                    return;
                }
            }
        };
        let server = Worker::spawn("test-monitor", serve).unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let agent = Arc::new(KataAgent::over(ours).unwrap());
        let watched = Watched::over(agent, ("v", true), &path, SOON);
        let waiting = Arc::clone(&watched);
        let call =
            Worker::spawn("test-call", move || waiting.wait(None, |a| a.wait_process(&id(), None)))
                .unwrap();
        assert!(call.done().recv_timeout(10 * SOON.quiet).is_err());
        tell.send("internal-error").unwrap();
        let e = call.join(LONG).unwrap().unwrap_err();
        assert!(matches!(&e, Error::Stopped { status, .. } if status == "internal-error"), "{e:?}");
        server.join(LONG).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
