//! Where syslog's messages go: a Unix socket or a UDP address, for as long as the
//! process lives.
//!
//! Invariants: a log that does not take messages holds nobody up for more than
//! [`PATIENCE`] in [`PAUSE`], is tried again, and is told how many it missed.

use std::io::ErrorKind;
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::after;
use log::{Level, Log, Metadata, Record};
use nix::sys::signal::SigSet;
use syslog::{Logger, LoggerBackend};

use super::lines::{Line, Writer};
use crate::config::logging::{Form, LogTo};
use crate::events::LOG_LOST;
use crate::worker::Worker;

/// How long a full log is waited for.
const PATIENCE: Duration = Duration::from_millis(50);
/// How often a name is looked up that is not known yet.
const AGAIN: Duration = Duration::from_secs(5);
/// How long one that failed is left alone.
const PAUSE: Duration = Duration::from_secs(1);

/// The log of this process.
pub struct Sink {
    to: LogTo,
    form: Form,
    host: String,
    /// A server's address, once its name is known.
    address: Arc<OnceLock<SocketAddr>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    logger: Option<Logger<LoggerBackend, Writer>>,
    lost: u64,
    failed: Option<Instant>,
}

impl Sink {
    /// Opens it, and tells why that can not be done yet, if it can not.
    pub fn open(to: LogTo, form: Form) -> (Sink, Option<String>) {
        let host = nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok());
        // RFC 5424, 6.2.4: printable, no space.
        let host = host.filter(|h| !h.is_empty() && h.bytes().all(|b| b.is_ascii_graphic()));
        let host = host.unwrap_or_else(|| "-".into());
        let address = Arc::default();
        let unknown = match &to {
            LogTo::Udp(name) => find(name, &address).err(),
            _ => None,
        };
        let sink = Sink { to, form, host, address, state: Mutex::default() };
        let why = match unknown {
            Some(why) => Some(why),
            None => sink.connect().map(|logger| sink.state().logger = Some(logger)).err(),
        };
        (sink, why)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn connect(&self) -> Result<Logger<LoggerBackend, Writer>, String> {
        let failed = |what: String| move |e: std::io::Error| format!("{what}: {e}");
        let backend = match &self.to {
            LogTo::Unix(path) => {
                let open = || {
                    let socket = UnixDatagram::unbound()?;
                    socket.connect(path)?;
                    socket.set_write_timeout(Some(PATIENCE))?;
                    Ok(LoggerBackend::Unix(socket))
                };
                open().map_err(failed(format!("log to {}", path.display())))?
            }
            LogTo::Udp(name) => {
                // Never looked up here: whoever logs would wait for it.
                let to = *self.address.get().ok_or("its address is not known yet")?;
                let open = || {
                    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                    let socket = UdpSocket::bind(any)?;
                    socket.set_nonblocking(true)?;
                    Ok(LoggerBackend::Udp(socket, to))
                };
                open().map_err(failed(format!("log to {name} by UDP")))?
            }
            LogTo::Auto | LogTo::Stderr => return Err("log to syslog: not asked for".into()),
        };
        let writer = Writer { form: self.form, host: self.host.clone(), pid: std::process::id() };
        Ok(Logger::new(backend, writer))
    }

    /// Sends it, over a new connection when the log was started anew.
    fn send(&self, state: &mut State, level: Level, line: &Line) -> bool {
        for _ in 0..2 {
            let mut logger = match state.logger.take().map_or_else(|| self.connect(), Ok) {
                Ok(logger) => logger,
                Err(_) => return false,
            };
            let sent = match level {
                Level::Error => logger.err(line),
                Level::Warn => logger.warning(line),
                Level::Info => logger.info(line),
                Level::Debug | Level::Trace => logger.debug(line),
            };
            match sent {
                Ok(()) => {
                    state.logger = Some(logger);
                    return true;
                }
                // It is there, and full.
                Err(syslog::Error::Write(e)) if e.kind() == ErrorKind::WouldBlock => {
                    state.logger = Some(logger);
                    return false;
                }
                Err(_) => {}
            }
        }
        false
    }
}

/// Looks a server's name up; a thread goes on with it until it is known.
///
/// # Errors
/// A sentence, when it is not known yet.
fn find(name: &str, address: &Arc<OnceLock<SocketAddr>>) -> Result<(), String> {
    let look = |name: &str| name.to_socket_addrs().map(|mut all| all.next());
    let why = match look(name) {
        Ok(Some(found)) => {
            let _ = address.set(found);
            return Ok(());
        }
        Ok(None) => format!("log to {name} by UDP: the name has no address"),
        Err(e) => format!("log to {name} by UDP: {e}"),
    };
    let (name, address) = (name.to_string(), Arc::clone(address));
    let thread = Worker::spawn("vmc-log", move || {
        // Signals are another thread's.
        let _ = SigSet::all().thread_block();
        while address.get().is_none() {
            let _ = after(AGAIN).recv();
            if let Ok(Some(found)) = look(&name) {
                let _ = address.set(found);
            }
        }
    });
    Err(thread.err().map_or(why, |e| e.to_string()))
}

impl Log for Sink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        super::ours(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !super::ours(record.metadata()) {
            return;
        }
        let line = Line::of(record);
        let mut state = self.state();
        if state.failed.is_some_and(|at| at.elapsed() < PAUSE) {
            state.lost += 1;
            return;
        }
        if state.lost > 0 {
            let text = format!("{} messages before this one were not taken by the log", state.lost);
            let lost = Line { event: Some(LOG_LOST.name.into()), text, ..Line::default() };
            if self.send(&mut state, LOG_LOST.level, &lost) {
                state.lost = 0;
            }
        }
        let sent = state.lost == 0 && self.send(&mut state, record.level(), &line);
        state.failed = (!sent).then(Instant::now);
        state.lost += u64::from(!sent);
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(sink: &Sink, text: &str) {
        let args = format_args!("{text}");
        sink.log(&Record::builder().args(args).level(Level::Info).target("vmcache").build());
    }

    fn heard(log: &UnixDatagram) -> String {
        log.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut bytes = [0; 16 * 1024];
        let n = log.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..n].to_vec()).unwrap()
    }

    #[test]
    fn a_log_that_was_started_anew_goes_on() {
        let path = std::env::temp_dir().join(format!("vmcache-log-{}", std::process::id()));
        let log = UnixDatagram::bind(&path).unwrap();
        let sink = Sink::open(LogTo::Unix(path.clone()), Form::Rfc5424).0;
        say(&sink, "one");
        assert!(heard(&log).ends_with(" - - one"));
        drop(log);
        std::fs::remove_file(&path).unwrap();
        say(&sink, "two");
        let log = UnixDatagram::bind(&path).unwrap();
        // It is left alone for a moment, which is now.
        sink.state().failed = Some(Instant::now());
        say(&sink, "three");
        sink.state().failed = None;
        say(&sink, "four");
        let lost = heard(&log);
        assert!(lost.contains(" log-lost - 2 messages before this one"), "{lost}");
        assert!(heard(&log).ends_with(" - - four"));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_server_whose_name_is_not_known_loses_messages_and_holds_nobody_up() {
        let to = LogTo::Udp("name.invalid:514".into());
        let (sink, why) = Sink::open(to, Form::Rfc5424);
        assert!(why.unwrap().contains("name.invalid"));
        let before = Instant::now();
        (0..100).for_each(|_| say(&sink, "x"));
        // A hundredth of what a resolver takes.
        assert!(before.elapsed() < Duration::from_secs(10));
        assert_eq!(sink.state().lost, 100);
    }

    #[test]
    fn a_log_that_takes_nothing_holds_nobody_up() {
        let path = std::env::temp_dir().join(format!("vmcache-full-{}", std::process::id()));
        let log = UnixDatagram::bind(&path).unwrap();
        let sink = Sink::open(LogTo::Unix(path.clone()), Form::Rfc3164).0;
        for _ in 0..10_000 {
            say(&sink, "x");
        }
        let state = sink.state();
        assert!(state.failed.is_some() && state.lost > 5_000, "{} lost", state.lost);
        drop((state, log));
        std::fs::remove_file(&path).unwrap();
    }
}
