//! Why a request could not be done, as the ttrpc status that tells it.
//!
//! `NOT_FOUND` and `PERMISSION_DENIED` of CreateContainer and ExecProcess mean
//! that the program itself is missing or not executable: shells' 127 and 126.

use std::fmt::Display;
use std::io;

use ttrpc::Code;

/// Most bytes of a sentence: it goes through pipes that nobody reads before its end, and a
/// request's own names are in it.
const MAX_MESSAGE: usize = 4096;

/// A ttrpc status code and a sentence.
#[derive(Debug)]
pub struct Failure {
    /// What kind of failure.
    pub code: Code,
    /// What was attempted, on what, and why it failed.
    pub message: String,
}

/// What most functions of the agent return.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// A failure of the given kind.
    pub fn new(code: Code, message: impl Into<String>) -> Failure {
        let mut message = message.into();
        if message.len() > MAX_MESSAGE {
            // The end says why.
            let boundary =
                |from: usize| (from..message.len()).find(|n| message.is_char_boundary(*n));
            let last = message.len() - MAX_MESSAGE / 2;
            let (ends, begins) = (boundary(MAX_MESSAGE / 2), boundary(last));
            message.replace_range(ends.unwrap_or(0)..begins.unwrap_or(last), " … ");
        }
        Failure { code, message }
    }

    /// Something went wrong that the request did not cause.
    pub fn internal(message: impl Into<String>) -> Failure {
        Failure::new(Code::INTERNAL, message)
    }

    /// The request itself makes no sense.
    pub fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(Code::INVALID_ARGUMENT, message)
    }

    /// The same, of something else than the program: its kind says no more that that is
    /// missing, or not executable.
    pub fn not_the_program(self) -> Failure {
        match self.code {
            Code::NOT_FOUND | Code::PERMISSION_DENIED => Failure::internal(self.message),
            _ => self,
        }
    }

    /// What the request names does not exist.
    pub fn not_found(message: impl Into<String>) -> Failure {
        Failure::new(Code::NOT_FOUND, message)
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(f: Failure) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(f.code, f.message))
    }
}

/// Adds what was attempted to an error of the system.
pub trait Attempt<T> {
    /// `attempt` reads like `mount proc on /proc`.
    fn during<S: Display>(self, attempt: impl FnOnce() -> S) -> Outcome<T>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn during<S: Display>(self, attempt: impl FnOnce() -> S) -> Outcome<T> {
        self.map_err(|e| {
            let e: io::Error = e.into();
            let code = match e.kind() {
                io::ErrorKind::NotFound => Code::NOT_FOUND,
                io::ErrorKind::PermissionDenied => Code::PERMISSION_DENIED,
                _ => Code::INTERNAL,
            };
            Failure::new(code, format!("{}: {e}", attempt()))
        })
    }
}
