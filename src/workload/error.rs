//! Why nothing was run or copied, in words that say what to do.

use std::error;
use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::agent;
use crate::tree;
use crate::vm::attach;

/// Why a command could not be run, or files not be copied.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The agent refused or did not answer.
    Agent(agent::Error),
    /// The program does not exist in the guest.
    NotFound { text: String },
    /// The program can not be executed.
    NotExecutable { text: String },
    /// Local files.
    Tree(tree::Error),
    /// What was to be attached is not there, or QEMU did not take it.
    Attach(attach::Error),
    /// The local system.
    Io { during: &'static str, path: PathBuf, source: io::Error },
    /// The guest's side of a copy failed.
    Copy { text: String },
    /// The guest's agent runs nothing in its own root.
    NeedsRoot,
    /// The guest could not be had to write out its disks before the VM's end.
    Unwritten { text: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Agent(_) => f.write_str("run in the VM"),
            Error::NotFound { text } | Error::NotExecutable { text } => f.write_str(text),
            Error::Tree(_) => f.write_str("copy files"),
            // Its own text says it all.
            Error::Attach(e) => e.fmt(f),
            Error::Io { during, path, .. } => write!(f, "{during} {}", path.display()),
            Error::Copy { text } => write!(f, "copy files: {text}"),
            Error::NeedsRoot => f.write_str(
                "the guest's agent is not vmcache's own, and runs commands only in a root that is \
                 brought along: use --rootfs DIR",
            ),
            Error::Unwritten { text } => {
                write!(f, "its disks may lack what the guest wrote last: {text}")
            }
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Agent(e) => Some(e),
            Error::Tree(e) => Some(e),
            Error::Attach(e) => e.source(),
            Error::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// CreateContainer and ExecProcess tell by these codes that the program itself
/// is the matter.
pub(super) fn start_error(e: agent::Error) -> Error {
    match e {
        agent::Error::Refused { code: ttrpc::Code::NOT_FOUND, text, .. } => {
            Error::NotFound { text }
        }
        agent::Error::Refused { code: ttrpc::Code::PERMISSION_DENIED, text, .. } => {
            Error::NotExecutable { text }
        }
        other => Error::Agent(other),
    }
}
