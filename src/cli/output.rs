//! Failures with their exit codes, tables, and text from guests.

use std::error::Error;
use std::fmt;

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
#[derive(Clone, Debug)]
pub struct Failure {
    code: u8,
    text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Failure {
    /// A failure with its exit code.
    pub fn new(code: u8, text: impl Into<String>) -> Failure {
        Failure { code, text: text.into() }
    }

    /// An error with its causes.
    pub fn of(code: u8, e: &dyn Error) -> Failure {
        Failure { code, text: chain(e) }
    }

    /// With more to say.
    pub fn and(mut self, more: &str) -> Failure {
        self.text.push_str(more);
        self
    }

    /// For commands whose exit code is another program's: any failure of ours
    /// is 125, but what is said of that program itself.
    pub fn in_vmcache(mut self) -> Failure {
        if ![USAGE, NOT_FOUND, NOT_EXECUTABLE].contains(&self.code) {
            self.code = IN_VMCACHE;
        }
        self
    }

    /// Prints it; its exit code.
    pub fn report(&self) -> u8 {
        eprintln!("vmcache: {}", self.text);
        self.code
    }
}

impl From<config::Error> for Failure {
    fn from(e: config::Error) -> Failure {
        let code = match &e {
            config::Error::File { .. } => PREFLIGHT,
            _ => USAGE,
        };
        Failure::of(code, &e)
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
            other => Failure::of(FAILED, &other),
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
        Failure::of(code, &e)
    }
}

impl From<workload::Error> for Failure {
    fn from(e: workload::Error) -> Failure {
        let code = match &e {
            workload::Error::NotFound { .. } => NOT_FOUND,
            workload::Error::NotExecutable { .. } => NOT_EXECUTABLE,
            _ => FAILED,
        };
        Failure::of(code, &e)
    }
}

impl From<vm::Error> for Failure {
    fn from(e: vm::Error) -> Failure {
        Failure::of(FAILED, &e)
    }
}

impl From<BootError> for Failure {
    fn from(e: BootError) -> Failure {
        Failure::of(FAILED, &e)
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

/// Rows in columns as wide as their widest cell.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, w)| format!("{cell:<w$}"));
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// Text that came from a guest, without what could command a terminal.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '?' } else { c }).collect()
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
    fn tables_align_and_terminals_are_safe() {
        let rows = vec![vec!["a".into(), "bb".into()], vec!["ccc".into(), "d".into()]];
        assert_eq!(table(&rows), "a    bb\nccc  d\n");
        assert_eq!(harmless("ok\x1b[2J\n"), "ok?[2J\n");
        assert_eq!(age(119), "119 s");
        assert_eq!(age(7200), "2 h");
    }
}
