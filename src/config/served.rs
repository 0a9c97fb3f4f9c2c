//! A VmConfig of another server, to be told to clients to the letter.
//!
//! Made by `vmcache config import`: whatever version of Kata that server was, its
//! clients compare what they are told with their own, field by field, and take our
//! VMs for its.
//!
//! Invariant: what the file says of things that make a VM agrees with the
//! configuration, or it is refused.

use std::io::Read;
use std::path::Path;

use serde_derive::{Deserialize, Serialize};

use crate::trusted_path::{refused, TrustedPath};

/// Largest file read, in bytes.
const MAX_FILE: u64 = 1024 * 1024;

/// Both messages, as they came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// GrpcVMConfig's Data.
    #[serde(rename = "Data")]
    pub data: String,
    /// GrpcVMConfig's AgentConfig.
    #[serde(rename = "AgentConfig")]
    pub agent: String,
}

impl Served {
    /// Reads a file.
    ///
    /// # Errors
    /// A sentence: it can not be read, or is not what an import writes.
    pub fn read(path: &Path) -> Result<Served, String> {
        let mut text = String::new();
        TrustedPath::file(path)
            .and_then(|file| file.open())
            .and_then(|f| f.take(MAX_FILE + 1).read_to_string(&mut text))
            .map_err(|e| match refused(&e) {
                Some(why) => why.to_string(),
                None => format!("{e}; `vmcache config import` makes such a file"),
            })?;
        if text.len() as u64 > MAX_FILE {
            return Err(format!("over {MAX_FILE} bytes"));
        }
        let served: Served = serde_json::from_str(&text)
            .map_err(|e| format!("{e}; `vmcache config import` makes such a file"))?;
        for (name, json) in [("Data", &served.data), ("AgentConfig", &served.agent)] {
            serde_json::from_str::<serde_json::Value>(json).map_err(|e| format!("{name}: {e}"))?;
        }
        Ok(served)
    }
}
