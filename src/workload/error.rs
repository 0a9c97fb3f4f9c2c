//! Why nothing was run or copied, in words that say what to do.

use std::error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

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
    /// The command can not be run like this, by nobody.
    Command { text: String },
    /// There is no such command in the VM, or none any more.
    NoCommand { vm: String, exec: Option<String> },
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
    /// The guest answers nothing any more.
    Silent { vm: String, after: Duration },
    /// QEMU has stopped the VM, which does not go on by itself; QEMU's word for it.
    Stopped { vm: String, status: String },
    /// The guest's side of a copy does nothing any more, though its agent answers.
    Stalled { vm: String, after: Duration },
    /// Somebody asked for a copy's end.
    Interrupted,
    /// The guest could not be had to write out its disks before the VM's end.
    Unwritten { text: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Agent(_) => f.write_str("run in the VM"),
            Error::NotFound { text } | Error::NotExecutable { text } | Error::Command { text } => {
                f.write_str(text)
            }
            Error::NoCommand { vm, exec: None } => write!(
                f,
                "no command of `vmcache run` runs in VM {vm}: `vmcache ps {vm}` lists those of \
                 `exec`, for --exec"
            ),
            Error::NoCommand { vm, exec: Some(exec) } => {
                write!(
                    f,
                    "no command {exec:?} runs in VM {vm}: `vmcache ps {vm}` lists those that do"
                )
            }
            Error::Tree(_) => f.write_str("copy files"),
            // Its own text says it all.
            Error::Attach(e) => e.fmt(f),
            Error::Io { during, path, .. } => write!(f, "{during} {}", path.display()),
            Error::Copy { text } => write!(f, "copy files: {text}"),
            Error::NeedsRoot => f.write_str(
                "the guest's agent is not vmcache's own, and runs commands only in a root that is \
                 brought along: use --rootfs DIR",
            ),
            Error::Silent { vm, after } => {
                write!(f, "the guest of VM {vm} has not answered for {} s", after.as_secs())
            }
            Error::Stopped { vm, status } => {
                write!(f, "VM {vm} does not run any more: QEMU has stopped it ({status})")
            }
            Error::Stalled { vm, after } => write!(
                f,
                "the guest of VM {vm} answers, but its side of the copy has done nothing for {} s",
                after.as_secs()
            ),
            Error::Interrupted => f.write_str("interrupted"),
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

impl Error {
    /// The VM that is of no use any more, as far as this can be told from here.
    pub fn lost_vm(&self) -> Option<&str> {
        match self {
            Error::Silent { vm, .. } | Error::Stopped { vm, .. } | Error::Stalled { vm, .. } => {
                Some(vm)
            }
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
