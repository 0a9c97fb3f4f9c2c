//! Failures with their exit codes, and tables.

use std::error::Error;
use std::fmt;

use super::{escape, print};
use crate::factory::grpccache;
use crate::report::chain;
use crate::vm::boot::BootError;
use crate::{agent, config, factory, initrd, server, vm, workload};

/// Failed.
pub const FAILED: u8 = 1;
/// Usage or configuration.
pub const USAGE: u8 = 2;
/// No server reachable.
pub const UNREACHABLE: u8 = 3;
/// No VM in time.
pub const NO_VM: u8 = 4;
/// Something that is needed is missing.
pub const PREFLIGHT: u8 = 5;
/// `run` and `exec`: the command took too long.
pub const TIMED_OUT: u8 = 124;
/// `run` and `exec`: vmcache failed, not the command.
pub const IN_VMCACHE: u8 = 125;
/// `run` and `exec`: not executable.
pub const NOT_EXECUTABLE: u8 = 126;
/// `run` and `exec`: not found.
pub const NOT_FOUND: u8 = 127;

/// Why a command failed, and the exit code that says so.
#[derive(Clone, Debug, Default)]
pub struct Failure {
    code: u8,
    text: String,
    /// Whether the text has lines of its own ([`print::message_in_lines`]).
    lines: bool,
    /// What to do, for a VM that is there still.
    remedy: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Failure {
    /// A failure with its exit code.
    pub fn new(code: u8, text: impl Into<String>) -> Failure {
        Failure { code, text: text.into(), ..Failure::default() }
    }

    /// An error with its causes.
    pub fn of(code: u8, e: &dyn Error) -> Failure {
        Failure::new(code, chain(e))
    }

    /// The end of a command whose output nobody reads any more: nothing is said, and the
    /// exit code is 0, as of others before a `head`.
    pub fn quiet() -> Failure {
        Failure::default()
    }

    /// Its text has lines of its own.
    fn in_lines(self) -> Failure {
        Failure { lines: true, ..self }
    }

    /// The VM that it is about ends now: nothing is to be done for it.
    pub fn of_ended_vm(mut self) -> Failure {
        if !self.remedy.is_empty() {
            self.remedy = "it is ended".into();
        }
        self
    }

    /// With more to say.
    pub fn and(mut self, more: &str) -> Failure {
        self.text.push_str(more);
        self
    }

    /// For commands whose exit code is another program's: any failure of ours
    /// is 125, but what is said of that program itself.
    pub fn in_vmcache(mut self) -> Failure {
        if ![0, USAGE, NOT_FOUND, NOT_EXECUTABLE].contains(&self.code) {
            self.code = IN_VMCACHE;
        }
        self
    }

    /// Prints it; its exit code.
    pub fn report(&self) -> u8 {
        match (self.text.is_empty(), self.remedy.as_str()) {
            (true, _) => {}
            (false, "") if self.lines => print::message_in_lines(&self.text),
            (false, "") => print::message(&self.text),
            (false, remedy) => print::message(format!("{}: {remedy}", self.text)),
        }
        self.code
    }
}

impl From<config::Error> for Failure {
    fn from(e: config::Error) -> Failure {
        let code = match &e {
            config::Error::File { .. } => PREFLIGHT,
            _ => USAGE,
        };
        Failure::of(code, &e).in_lines()
    }
}

impl From<grpccache::Error> for Failure {
    fn from(e: grpccache::Error) -> Failure {
        let code = match &e {
            grpccache::Error::Unreachable { .. } => UNREACHABLE,
            grpccache::Error::Deadline { .. } => NO_VM,
            _ => FAILED,
        };
        Failure::of(code, &e)
    }
}

impl From<factory::Error> for Failure {
    fn from(e: factory::Error) -> Failure {
        match e {
            factory::Error::Cache(e) => e.into(),
            factory::Error::Size { .. } => Failure::of(USAGE, &e),
            other => Failure::of(FAILED, &other).in_lines(),
        }
    }
}

impl From<server::Error> for Failure {
    fn from(e: server::Error) -> Failure {
        let code = match &e {
            server::Error::Config(config::Error::File { .. }) | server::Error::Store { .. } => {
                PREFLIGHT
            }
            server::Error::Config(_) => USAGE,
            server::Error::Listen(
                server::listener::Error::TooLong { .. }
                | server::listener::Error::NoDirectory { .. }
                | server::listener::Error::NoGroup { .. },
            ) => USAGE,
            _ => FAILED,
        };
        Failure::of(code, &e).in_lines()
    }
}

impl From<workload::Error> for Failure {
    fn from(e: workload::Error) -> Failure {
        let code = match &e {
            workload::Error::NotFound { .. } => NOT_FOUND,
            workload::Error::NotExecutable { .. } => NOT_EXECUTABLE,
            workload::Error::Command { .. } => USAGE,
            _ => FAILED,
        };
        let remedy = e.lost_vm().map_or(String::new(), ends);
        Failure { remedy, ..Failure::of(code, &e) }
    }
}

impl From<vm::Error> for Failure {
    fn from(e: vm::Error) -> Failure {
        let remedy = match &e {
            vm::Error::Agent { id, source: agent::Error::Connect { source } }
                if source.is_guests() =>
            {
                ends(id)
            }
            vm::Error::Agent { id, source: agent::Error::Call { .. } } => ends(id),
            _ => String::new(),
        };
        Failure { remedy, ..Failure::of(FAILED, &e) }
    }
}

/// What to do about a VM that is of no use any more.
fn ends(id: &str) -> String {
    format!("`vmcache stop {id}` ends it")
}

impl From<BootError> for Failure {
    fn from(e: BootError) -> Failure {
        Failure::of(FAILED, &e).in_lines()
    }
}

impl From<agent::Error> for Failure {
    fn from(e: agent::Error) -> Failure {
        Failure::of(FAILED, &e)
    }
}

impl From<initrd::Error> for Failure {
    fn from(e: initrd::Error) -> Failure {
        let code = match &e {
            initrd::Error::Write { .. } => FAILED,
            _ => PREFLIGHT,
        };
        Failure::of(code, &e)
    }
}

/// Rows in columns as wide as their widest cell, each cell harmless.
pub fn table(rows: &[Vec<String>]) -> String {
    let escaped = |row: &Vec<String>| row.iter().map(|cell| escape::line(cell)).collect();
    let rows: Vec<Vec<String>> = rows.iter().map(escaped).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}"));
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// A time as people say it.
pub fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_their_cells_are_harmless() {
        let rows = vec![vec!["a".into(), "bb".into()], vec!["ccc".into(), "d".into()]];
        assert_eq!(table(&rows), "a    bb\nccc  d\n");
        let forged = vec![vec!["a\nb\x1b[2J".into(), "c".into()]];
        assert_eq!(table(&forged), "a\\nb\\x1b[2J  c\n");
        assert_eq!(age(119), "119 s");
        assert_eq!(age(7200), "2 h");
    }
}
