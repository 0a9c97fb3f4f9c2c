//! A VM's directory: Kata's place and names, mode 0700.
//!
//! Invariant: whoever holds a [`VmDir`] owns the directory; dropping it removes
//! it unless it was let go.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Tries to remove a directory to which others add files.
const MORE_TRIES: usize = 8;

/// The directory of one VM.
#[derive(Debug)]
pub struct VmDir {
    path: PathBuf,
    let_go: bool,
}

impl VmDir {
    /// Makes the directory of a new VM, and the store above it.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn create(store: &Path, id: &str) -> io::Result<VmDir> {
        DirBuilder::new().recursive(true).mode(0o700).create(store)?;
        let path = store.join(id);
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(VmDir { path, let_go: false })
    }

    /// Takes over a directory that another process made.
    pub fn adopt(path: &Path) -> VmDir {
        VmDir { path: path.to_path_buf(), let_go: false }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// QEMU's monitor.
    pub fn monitor(&self) -> PathBuf {
        self.path.join("qmp.sock")
    }

    /// The guest's console.
    pub fn console(&self) -> PathBuf {
        self.path.join("console.sock")
    }

    /// Gives ownership up: the directory stays when this is dropped.
    pub fn let_go(mut self) {
        self.let_go = true;
    }
}

/// There was nothing to remove.
fn gone(e: io::Error) -> io::Result<()> {
    match e.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(e),
    }
}

impl Drop for VmDir {
    fn drop(&mut self) {
        if self.let_go {
            return;
        }
        // Who is just connecting to the agent may add a port's lock meanwhile.
        let mut removed = fs::remove_dir_all(&self.path);
        for _ in 0..MORE_TRIES {
            match &removed {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {
                    removed = fs::remove_dir_all(&self.path);
                }
                _ => break,
            }
        }
        if let Err(e) = removed.or_else(gone) {
            log::warn!("remove the VM directory {}: {e}", self.path.display());
        }
    }
}
