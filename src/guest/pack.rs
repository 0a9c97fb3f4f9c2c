//! `vmcache-agent pack PATH`: a file or directory becomes a tar stream on stdout.
//!
//! Runs as a container's program, so that the host can copy out of a guest
//! with no other call than ReadStdout. PATH is in the root that [`tree::ROOT`] names, and
//! its links lead there; `PATH/.` is what is in a directory.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::failure::{Attempt, Failure, Outcome};
use super::scope;
use crate::tree::naming::{without_ending, Ending};
use crate::tree::{self, Sockets, FOLLOW, ROOT, SKIP_SOCKETS};

/// Packs `source` under its own name.
pub fn run(source: &str) -> Outcome<()> {
    let source = Path::new(source);
    let ending = Ending::of(source.as_os_str());
    let plain = Path::new(without_ending(source.as_os_str()));
    let name = match ending {
        Ending::Dot => Path::new(""),
        _ => Path::new(
            plain
                .file_name()
                .ok_or_else(|| Failure::invalid(format!("{}: has no name", source.display())))?,
        ),
    };
    let set = |name| std::env::var_os(name).is_some();
    let found = find(plain, set(FOLLOW) || ending.is_directory())?;
    if ending.is_directory() {
        // A link to one is one; what is none is an error that says so.
        std::fs::read_dir(&found).during(|| format!("pack {}", plain.display()))?;
    }
    let sockets = match set(SKIP_SOCKETS) {
        true => Sockets::Skip,
        false => Sockets::Refuse,
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let packed = tree::pack(&found, name, sockets, &mut out);
    let packed = packed.map_err(|e| Failure::internal(e.to_string()))?;
    out.flush().during(|| "write the tar stream")?;
    // The rest is whole: this is told when it has gone.
    packed.complaint().map_or(Ok(()), |text| Err(Failure::internal(text)))
}

/// Where it is in this guest.
fn find(source: &Path, follow: bool) -> Outcome<PathBuf> {
    let Some(root) = std::env::var_os(ROOT) else { return Ok(source.to_path_buf()) };
    let root = Path::new(&root);
    scope::resolve(root, source.strip_prefix(root).unwrap_or(source), follow)
}
