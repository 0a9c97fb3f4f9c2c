//! The manifest: what a template was made from, and so whether it still fits.
//!
//! Invariant: it is written last, whole or not at all; where there is none,
//! there is no template.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde_derive::{Deserialize, Serialize};

use crate::config::Config;
use crate::digest::sha256;
use crate::trusted_path::{Destination, TrustedPath};
use crate::vm::shape::{self, Stamp};

/// The file's name.
pub const FILE: &str = "manifest.json";
/// Its name until it is whole.
pub const NEW: &str = "manifest.json.new";
/// Changes when a template of an older version of this program can not be used.
const FORMAT: u32 = 2;
/// Largest manifest read, in bytes.
const MAX_FILE: u64 = 64 * 1024;

/// A file that a template was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Part {
    path: PathBuf,
    sha256: String,
}

/// What a template was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parts {
    format: u32,
    /// QEMU, kernel, initrd (with the agent in it), firmware.
    files: Vec<Part>,
    /// QEMU's arguments, without what is a single VM's own.
    arguments: Vec<String>,
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// What it was made from.
    pub parts: Parts,
    /// QEMU's version, as its monitor told it.
    pub qemu_version: String,
    /// Size of the memory, MiB.
    pub memory_mib: u32,
    /// Size of the device state, bytes.
    pub state_bytes: u64,
    /// Digest of the device state.
    pub state_sha256: String,
    /// Digest of the memory (of what in it is not zero).
    pub memory_sha256: String,
    /// When it was made, seconds since the epoch.
    pub created: u64,
}

impl Parts {
    /// What a template of this configuration is made from, now.
    ///
    /// # Errors
    /// When a file can not be read; the text names it.
    pub fn of(config: &Config) -> io::Result<Parts> {
        let part = |path: PathBuf| {
            let digest = TrustedPath::file(&path).and_then(|f| f.open()).and_then(sha256);
            let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
            Ok(Part { sha256: digest.map_err(named)?, path })
        };
        let files: io::Result<Vec<Part>> = shape::sources(config).into_iter().map(part).collect();
        let arguments = shape::arguments(config)?;
        Ok(Parts { format: FORMAT, files: files?, arguments })
    }
}

impl Manifest {
    /// Writes it into a template's directory.
    ///
    /// # Errors
    /// As the file system's.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        let bytes = serde_json::to_vec(self).map_err(io::Error::other)?;
        let new = Destination::of(&dir.join(NEW))?;
        new.create(0o644)?.write_all(&bytes)?;
        new.rename(FILE)
    }

    /// Reads a template's directory; with it, the file's identity, which is
    /// another one when the template is.
    ///
    /// # Errors
    /// When there is none, or it is damaged, or not only root's and this user's.
    pub fn read(dir: &Path) -> io::Result<(Manifest, Stamp)> {
        let file = Destination::of(&dir.join(FILE))?.open(false)?;
        let stamp = Stamp::of(&file.metadata()?);
        let mut bytes = Vec::new();
        file.take(MAX_FILE).read_to_end(&mut bytes)?;
        let manifest = serde_json::from_slice(&bytes).map_err(io::Error::other)?;
        Ok((manifest, stamp))
    }
}

/// Which manifest is in a template's directory now.
pub fn stamp(dir: &Path) -> Option<Stamp> {
    fs::metadata(dir.join(FILE)).ok().map(|m| Stamp::of(&m))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_comes_back_and_a_damaged_one_is_refused() {
        let dir = std::env::temp_dir().join(format!("vmcache-manifest-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let part = Part { path: "/k".into(), sha256: "0".into() };
        let parts = Parts { format: FORMAT, files: vec![part], arguments: vec!["-m".into()] };
        let manifest = Manifest {
            parts,
            qemu_version: "7.2.0".into(),
            memory_mib: 256,
            state_bytes: 1,
            state_sha256: "1".into(),
            memory_sha256: "2".into(),
            created: 2,
        };
        assert!(Manifest::read(&dir).is_err());
        manifest.write(&dir).unwrap();
        let (read, which) = Manifest::read(&dir).unwrap();
        assert_eq!((read, Some(which)), (manifest.clone(), stamp(&dir)));
        manifest.write(&dir).unwrap();
        assert_ne!(Some(which), stamp(&dir), "another file");
        fs::write(dir.join(FILE), b"{").unwrap();
        assert!(Manifest::read(&dir).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
