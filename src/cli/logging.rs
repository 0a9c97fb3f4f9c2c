//! Messages: to syslog for a server that has no terminal, else to stderr.

use std::io::{self, IsTerminal, Write};

use log::{LevelFilter, Log, Metadata, Record};
use syslog::{BasicLogger, Facility, Formatter3164};

use super::args::{Cli, Command, Factory, LogTo};
use super::output::Failure;
use crate::config::Config;

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
        // One write a line: whole lines in the file, and quick.
        let line = if self.server {
            format!("{:<5} {}\n", record.level(), record.args())
        } else {
            format!("vmcache: {}: {}\n", record.level().as_str().to_lowercase(), record.args())
        };
        // A closed stderr is no reason to stop.
        let _ = io::stderr().lock().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Libraries' own messages only at their worst: a client that goes away is an
/// error to ttrpc and nothing to us.
fn ours(metadata: &Metadata<'_>) -> bool {
    metadata.target().starts_with("vmcache")
}

/// Starts logging as the command line and, for a server, its configuration say.
pub fn start(cli: &Cli) -> Result<(), Failure> {
    let server = matches!(cli.command, Command::Serve | Command::Factory(Factory::Init));
    let proxy = matches!(cli.command, Command::Proxy(_));
    let level = match &cli.command {
        // A broken configuration is reported when it is read for real.
        _ if server => {
            Config::load(cli.common.config.as_deref()).map_or(LevelFilter::Info, |c| c.log_level)
        }
        Command::Proxy(p) if p.debug => LevelFilter::Debug,
        Command::Proxy(p) => p.log_level.parse().map_err(|_| {
            let text = format!("-log {:?}: error, warn, info or debug", p.log_level);
            Failure::new(super::output::USAGE, text)
        })?,
        _ => LevelFilter::Warn,
    };
    let default = if (server || proxy) && !io::stderr().is_terminal() {
        LogTo::Syslog
    } else {
        LogTo::Stderr
    };
    log::set_max_level(level);
    if cli.common.log.unwrap_or(default) == LogTo::Syslog {
        let formatter = Formatter3164 {
            facility: Facility::LOG_DAEMON,
            hostname: None,
            process: "vmcache".into(),
            pid: std::process::id(),
        };
        match syslog::unix(formatter) {
            Ok(logger) => {
                let set = log::set_boxed_logger(Box::new(BasicLogger::new(logger)));
                return set.map_err(|e| Failure::new(super::output::FAILED, e.to_string()));
            }
            Err(e) => eprintln!("vmcache: no syslog ({e}): logging to stderr"),
        }
    }
    log::set_boxed_logger(Box::new(Stderr { server }))
        .map_err(|e| Failure::new(super::output::FAILED, e.to_string()))
}
