//! `vmcache-agent pack PATH`: a file or directory becomes a tar stream on stdout.
//!
//! Runs as a container's program, so that the host can copy out of a guest
//! with no other call than ReadStdout.

use std::io::{self, Write};
use std::path::Path;

use super::failure::{Attempt, Failure, Outcome};
use crate::tree::{self, Sockets, SKIP_SOCKETS};

/// Packs `source` under its own name.
pub fn run(source: &str) -> Outcome<()> {
    let source = Path::new(source);
    let name = source
        .file_name()
        .ok_or_else(|| Failure::invalid(format!("{}: has no name", source.display())))?;
    let sockets = match std::env::var_os(SKIP_SOCKETS) {
        Some(_) => Sockets::Skip,
        None => Sockets::Refuse,
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let packed = tree::pack(source, Path::new(name), sockets, &mut out);
    let packed = packed.map_err(|e| Failure::internal(e.to_string()))?;
    out.flush().during(|| "write the tar stream")?;
    // The rest is whole: this is told when it has gone.
    packed.complaint().map_or(Ok(()), |text| Err(Failure::internal(text)))
}
