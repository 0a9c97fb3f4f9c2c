//! `vmcache-agent pack PATH`: a file or directory becomes a tar stream on stdout.
//!
//! Runs as a container's program, so that the host can copy out of a guest
//! with no other call than ReadStdout.

use std::io::{self, Write};
use std::path::Path;

use super::failure::{Attempt, Failure, Outcome};
use crate::tree;

/// Packs `source` under its own name.
pub fn run(source: &str) -> Outcome<()> {
    let source = Path::new(source);
    let name = source
        .file_name()
        .ok_or_else(|| Failure::invalid(format!("{}: has no name", source.display())))?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    tree::pack(source, Path::new(name), &mut out).map_err(|e| Failure::internal(e.to_string()))?;
    out.flush().during(|| "write the tar stream")
}
