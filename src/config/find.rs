//! Which file is the configuration.

use std::env;
use std::path::{Path, PathBuf};

use super::Error;

/// Where a configuration is looked for when none is named.
pub const SEARCH: [&str; 3] = [
    "/etc/vmcache/configuration.toml",
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
];

/// The file named by the command line, by `$VMCACHE_CONFIG`, or the first of
/// [`SEARCH`] that exists.
///
/// # Errors
/// [`Error::NotFound`] when nothing is named and nothing exists.
pub fn locate(given: Option<&Path>) -> Result<PathBuf, Error> {
    if let Some(path) = given {
        return Ok(path.to_path_buf());
    }
    if let Some(path) = env::var_os("VMCACHE_CONFIG").filter(|p| !p.is_empty()) {
        return Ok(path.into());
    }
    let tried: Vec<PathBuf> = SEARCH.iter().map(PathBuf::from).collect();
    tried.iter().find(|p| p.exists()).cloned().ok_or(Error::NotFound { tried })
}
