//! Why an agent did not do what it was asked.

use std::error;
use std::fmt;
use std::io;

use crate::transport;

/// What most calls give.
pub type Outcome<T> = Result<T, Error>;

/// Why an agent did not do what it was asked.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// It could not be reached.
    Connect { source: transport::Error },
    /// Its address is of no kind that is known.
    Address { url: String, why: String },
    /// What a server said of its agents makes no sense.
    Config { why: String },
    /// The connection broke, or time was up.
    Call { call: &'static str, text: String },
    /// It answered that it failed.
    Refused { call: &'static str, code: ttrpc::Code, text: String },
    /// It has no such call.
    Unsupported { call: &'static str },
    /// The request has something that this agent would take for something else.
    Request { call: &'static str, why: String },
    /// This host failed.
    Host { during: &'static str, source: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Connect { .. } => f.write_str("reach the guest's agent"),
            Error::Address { url, why } => write!(f, "agent address {url:?}: {why}"),
            Error::Config { why } => write!(f, "the server's AgentConfig: {why}"),
            Error::Call { call, text } => {
                write!(f, "the guest's agent did not answer {call}: {text}")
            }
            Error::Refused { text, .. } => f.write_str(text),
            Error::Unsupported { call } => write!(f, "the guest's agent has no {call}"),
            Error::Request { call, why } => write!(f, "{call} was not sent: {why}"),
            Error::Host { during, .. } => f.write_str(during),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Connect { source } => Some(source),
            Error::Host { source, .. } => Some(source),
            _ => None,
        }
    }
}
