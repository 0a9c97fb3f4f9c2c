//! Messages: a server's go where its configuration says, all others to stderr.
//!
//! A server's have ten lines a second of each kind ([`crate::events::limit`]).
//!
//! What the command line says counts before the environment, and that before the
//! configuration, which a reload reads again.

mod lines;
mod sink;

use std::io::{self, IsTerminal};

use log::kv::Key;
use log::{LevelFilter, Log, Metadata, Record};

use super::args::{Cli, Command, Factory, LogTo as Asked};
use super::output::{Failure, FAILED, USAGE};
use super::print;
use crate::config::logging::{Form, LogTo, Logging, DEV_LOG};
use crate::config::Config;
use crate::events::limit::{self, Kind};
use crate::walls::Wall;
use lines::Line;
use sink::Sink;

struct Stderr {
    server: bool,
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        ours(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !ours(record.metadata()) {
            return;
        }
        let told = Line::of(record).told();
        if self.server {
            print::bare_message(format!("{:<5} {told}", record.level()));
        } else {
            print::message(format!("{}: {told}", record.level().as_str().to_lowercase()));
        }
    }

    fn flush(&self) {}
}

/// A server's log, which has so many lines of a kind a second.
struct Limited(Box<dyn Log>);

impl Log for Limited {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !ours(record.metadata()) || !self.0.enabled(record.metadata()) {
            return;
        }
        let said = record.target() == limit::TARGET || !Wall::Relay.stands();
        if said || limit::is_said(kind(record), record.level()) {
            self.0.log(record);
        }
    }

    fn flush(&self) {
        self.0.flush();
    }
}

fn kind(record: &Record<'_>) -> Kind {
    let value = |key: &str| record.key_values().get(Key::from_str(key)).map(|v| v.to_string());
    let peer = value("peer").unwrap_or_default();
    match value("event") {
        Some(event) => Kind::event(&event, &peer),
        None => match record.args().as_str() {
            Some(text) => Kind::text(text, &peer),
            None => Kind::text(&record.args().to_string(), &peer),
        },
    }
}

/// Libraries' own messages only at their worst: a client that goes away is an
/// error to ttrpc and nothing to us.
fn ours(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with("vmcache")
}

/// Starts logging as the command line and, for a server, its configuration say.
pub fn start(cli: &Cli) -> Result<(), Failure> {
    let server = matches!(cli.command, Command::Serve | Command::Factory(Factory::Init));
    let mut logging = match &cli.command {
        // A broken configuration is reported when it is read for real.
        _ if server => match Config::load(cli.common.config.as_deref()) {
            Ok(config) => {
                config.check_log()?;
                config.logging
            }
            Err(_) => Logging::default(),
        },
        Command::Proxy(p) if p.debug => to_auto(LevelFilter::Debug),
        Command::Proxy(_) => to_auto(LevelFilter::Warn),
        _ => Logging { to: LogTo::Stderr, ..to_auto(LevelFilter::Warn) },
    };
    // An empty variable is one that is not set.
    if let Some(text) = cli.common.log_level.as_ref().filter(|t| !t.is_empty()) {
        logging.level = level("--log-level or $VMCACHE_LOG_LEVEL", text)?;
    }
    match cli.common.log {
        Some(Asked::Stderr) => logging.to = LogTo::Stderr,
        // One that the configuration names is the system's log.
        Some(Asked::Syslog) if !matches!(logging.to, LogTo::Unix(_) | LogTo::Udp(_)) => {
            logging.to = LogTo::Unix(DEV_LOG.into());
        }
        Some(Asked::Syslog) | None => {}
    }
    let auto = logging.to == LogTo::Auto;
    if auto {
        logging.to = match io::stderr().is_terminal() {
            true => LogTo::Stderr,
            false => LogTo::Unix(DEV_LOG.into()),
        };
    }
    log::set_max_level(logging.level);
    let opened = match logging.to {
        LogTo::Stderr => None,
        to => match Sink::open(to, logging.form) {
            // As in a container.
            (_, Some(why)) if auto => {
                print::message(format!("{why}: logging to stderr"));
                None
            }
            (sink, why) => {
                if let Some(why) = why {
                    let then = "it is tried again, and messages are lost until then";
                    print::message(format!("{why}: {then}"));
                }
                Some(sink)
            }
        },
    };
    let logger: Box<dyn Log> = match opened {
        Some(sink) => Box::new(sink),
        None => Box::new(Stderr { server }),
    };
    let set = match server {
        true => log::set_boxed_logger(Box::new(Limited(logger))),
        false => log::set_boxed_logger(logger),
    };
    set.map_err(|e| Failure::new(FAILED, e.to_string()))
}

fn to_auto(level: LevelFilter) -> Logging {
    Logging { to: LogTo::Auto, form: Form::Rfc3164, level }
}

fn level(option: &str, text: &str) -> Result<LevelFilter, Failure> {
    text.parse().map_err(|_| {
        Failure::new(USAGE, format!("{option} {text:?}: error, warn, info, debug or trace"))
    })
}
