//! What is wrong with a configuration, in words that tell what to do.

use std::error;
use std::fmt;
use std::io;
use std::path::PathBuf;

use super::Place;
use crate::trusted_path::refused;

/// What is wrong with a configuration.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// No file was found where one is looked for.
    NotFound { tried: Vec<PathBuf> },
    /// A file could not be read.
    Read { file: PathBuf, source: io::Error },
    /// Not TOML.
    Syntax { place: Place, why: String },
    /// A value of the wrong type.
    Type { place: Place, key: String, found: String, wanted: &'static str },
    /// A key in our table that does not exist.
    UnknownKey { place: Place, key: String },
    /// A value that can not be.
    Value { place: Place, key: &'static str, value: String, why: String },
    /// A file that a value names is missing or of the wrong kind.
    File { place: Place, key: &'static str, path: PathBuf, why: String },
}

impl Error {
    /// Whether a file of the configuration is not only root's and this user's.
    pub fn untrusted(&self) -> bool {
        matches!(self, Error::Read { source, .. } if refused(source).is_some())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NotFound { tried } => {
                let list: Vec<_> = tried.iter().map(|p| p.display().to_string()).collect();
                write!(
                    f,
                    "no configuration file: none of {} exists; write one, or name it with --config",
                    list.join(", ")
                )
            }
            Error::Read { file, .. } => write!(f, "read configuration {}", file.display()),
            Error::Syntax { place, why } => write!(f, "{place}: not valid TOML: {why}"),
            Error::Type { place, key, found, wanted } => {
                write!(f, "{place}: {key} is {found}, but must be {wanted}")
            }
            Error::UnknownKey { place, key } => write!(
                f,
                "{place}: {key} is not an option; `vmcache config show` lists those there are"
            ),
            Error::Value { place, key, value, why } => {
                write!(f, "{place}: {key} = {value}: {why}")
            }
            Error::File { place, key, path, why } => {
                write!(f, "{place}: {key} = {:?}: {why}", path.display().to_string())
            }
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Read { source, .. } => Some(source),
            _ => None,
        }
    }
}
