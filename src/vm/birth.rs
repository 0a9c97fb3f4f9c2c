//! What whoever has a VM made is told while it is being made, so that it can end
//! what there is of it at any moment.
//!
//! Invariant: between [`Birth::Begins`] and [`Birth::Runs`], or the failure, what
//! is made is known to the thread that makes it only: who is ended by a signal
//! then lets that wait.

use std::path::Path;

use crate::process::Process;

/// How far a VM has come.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Birth<'a> {
    /// From now on it may have a directory and processes.
    Begins,
    /// Its QEMU runs; its directory names all else that it has.
    Runs { id: &'a str, dir: &'a Path, qemu: &'a Process },
}

/// Told of a VM from its beginning.
pub type Watch<'a> = &'a mut dyn FnMut(Birth<'_>);
