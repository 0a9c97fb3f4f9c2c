//! `vmcache-agent unpack DIR`: a tar stream on stdin becomes a directory.
//!
//! Runs as a container's program, so the host needs no other call than
//! WriteStdin to bring in a whole root file system.

use std::io;
use std::path::Path;

use super::failure::{Failure, Outcome};
use crate::tree;

/// Unpacks until the stream's end.
pub fn run(target: &str) -> Outcome<()> {
    let unpacked = tree::unpack(&mut io::stdin().lock(), Path::new(target), true)
        .map_err(|e| Failure::internal(e.to_string()))?;
    // The rest is whole: the host says it, and goes on.
    if let Some(text) = unpacked.complaint() {
        eprintln!("{text}");
    }
    Ok(())
}
