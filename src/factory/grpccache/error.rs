//! Why a server did not do what it was asked, in words that say what to do.

use std::error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a server did not do what it was asked.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// Nothing listens there.
    Unreachable { endpoint: PathBuf, source: io::Error },
    /// No VM came in time.
    Deadline { endpoint: PathBuf, after: Duration },
    /// The server is stopping.
    Stopping { endpoint: PathBuf, text: String },
    /// It has no such VM any more.
    Gone { endpoint: PathBuf, text: String },
    /// The server has no such call.
    Unsupported { endpoint: PathBuf, call: &'static str },
    /// It refused or broke off.
    Call { endpoint: PathBuf, call: &'static str, text: String },
    /// What it sent makes no sense.
    Answer { endpoint: PathBuf, call: &'static str, why: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreachable { endpoint, .. } => write!(
                f,
                "connect to the vmcache server at {}: is it running? `vmcache serve` starts one; \
                 --endpoint or $VMCACHE_ENDPOINT names another socket",
                endpoint.display()
            ),
            Error::Deadline { endpoint, after } => write!(
                f,
                "no VM from {} within {:.1} s: `vmcache status` tells why",
                endpoint.display(),
                after.as_secs_f64()
            ),
            Error::Stopping { endpoint, text } => {
                write!(f, "the server at {} gives no more VMs: {text}", endpoint.display())
            }
            Error::Gone { endpoint, text } => {
                write!(f, "the server at {}: {text}", endpoint.display())
            }
            Error::Unsupported { endpoint, call } => write!(
                f,
                "the server at {} has no {call}: it is not vmcache's own",
                endpoint.display()
            ),
            Error::Call { endpoint, call, text } => {
                write!(f, "{call} of the server at {}: {text}", endpoint.display())
            }
            Error::Answer { endpoint, call, why } => {
                write!(f, "the answer to {call} of the server at {}: {why}", endpoint.display())
            }
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Unreachable { source, .. } => Some(source),
            _ => None,
        }
    }
}
