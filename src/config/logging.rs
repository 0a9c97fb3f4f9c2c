//! Where messages go, in which form, and how many: `log`, `log_format`, `log_level`.

use std::path::{Path, PathBuf};

use log::LevelFilter;

use super::options::OURS;
use super::{Config, Error};

/// Where messages go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTo {
    /// The system's log when there is no terminal, else standard error.
    Auto,
    /// Standard error.
    Stderr,
    /// A datagram socket of this host, such as /dev/log.
    Unix(PathBuf),
    /// A syslog server, host and port.
    Udp(String),
}

/// The system's log.
pub const DEV_LOG: &str = "/dev/log";

/// How a message is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The classic one, which /dev/log expects.
    Rfc3164,
    /// With time zone, MSGID and structured data.
    Rfc5424,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Logging {
    /// Where to.
    pub to: LogTo,
    /// In which form.
    pub form: Form,
    /// From which level on.
    pub level: LevelFilter,
}

impl Default for Logging {
    fn default() -> Logging {
        Logging { to: LogTo::Auto, form: Form::Rfc3164, level: LevelFilter::Info }
    }
}

impl LogTo {
    /// As the option is written.
    fn parse(text: &str) -> Option<LogTo> {
        match text.split_once(':') {
            None if text == "auto" => Some(LogTo::Auto),
            None if text == "stderr" => Some(LogTo::Stderr),
            None if text == "syslog" => Some(LogTo::Unix(DEV_LOG.into())),
            Some(("unix", path)) if path.starts_with('/') => Some(LogTo::Unix(path.into())),
            Some(("udp", address)) => {
                let (host, port) = address.rsplit_once(':')?;
                let good = !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0);
                good.then(|| LogTo::Udp(address.to_string()))
            }
            _ => None,
        }
    }
}

impl Logging {
    /// As a configuration says.
    ///
    /// # Errors
    /// With the option that is wrong.
    pub fn of(config: &Config) -> Result<Logging, Error> {
        let level = config.text(OURS, "log_level").parse().map_err(|_| {
            config.wrong(OURS, "log_level", "must be error, warn, info, debug or trace")
        })?;
        let to = LogTo::parse(config.text(OURS, "log")).ok_or_else(|| {
            let why = "must be auto, syslog, stderr, unix:/PATH or udp:HOST:PORT";
            config.wrong(OURS, "log", why)
        })?;
        // What listens on /dev/log reads the classic form; others read the newer one.
        let local = |path: &PathBuf| path == Path::new(DEV_LOG);
        let form = match config.text(OURS, "log_format") {
            "rfc3164" => Form::Rfc3164,
            "rfc5424" => Form::Rfc5424,
            "auto" => match &to {
                LogTo::Unix(path) if !local(path) => Form::Rfc5424,
                LogTo::Udp(_) => Form::Rfc5424,
                _ => Form::Rfc3164,
            },
            _ => {
                let why = "must be auto, rfc3164 or rfc5424";
                return Err(config.wrong(OURS, "log_format", why));
            }
        };
        Ok(Logging { to, form, level })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read_as_written() {
        let udp = |a: &str| Some(LogTo::Udp(a.into()));
        assert_eq!(LogTo::parse("udp:logs.example:514"), udp("logs.example:514"));
        assert_eq!(LogTo::parse("udp:[::1]:514"), udp("[::1]:514"));
        assert_eq!(LogTo::parse("unix:/run/log"), Some(LogTo::Unix("/run/log".into())));
        for bad in ["", "udp:", "udp:host", "udp:host:0", "udp::514", "unix:log", "tcp:h:1", "x"] {
            assert_eq!(LogTo::parse(bad), None, "{bad}");
        }
    }
}
