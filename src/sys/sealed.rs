//! Files in memory that nobody can change any more, whoever has them open and however: for
//! what several QEMUs share.
//!
//! Invariant: what [`close`] has sealed keeps its bytes and its length, and takes no further
//! seals.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};

use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};

/// An empty file that can be sealed; its name is for people who look at a process.
///
/// # Errors
/// As memfd_create(2).
pub fn open(name: &CStr) -> io::Result<File> {
    Ok(memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?.into())
}

/// Seals it.
///
/// # Errors
/// As fcntl(2): `EBUSY` while it is mapped to be written.
pub fn close(file: &File) -> io::Result<()> {
    let seals = SealFlag::F_SEAL_SEAL
        | SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SHRINK;
    fcntl(file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(())
}

/// A sealed copy of what is read.
///
/// # Errors
/// As read(2) and write(2), and those above.
pub fn copy(name: &CStr, from: &mut dyn Read) -> io::Result<File> {
    let file = unsealed(name, from)?;
    close(&file)?;
    Ok(file)
}

/// The same, not sealed.
///
/// # Errors
/// As [`copy`].
pub fn unsealed(name: &CStr, from: &mut dyn Read) -> io::Result<File> {
    let mut file = open(name)?;
    io::copy(from, &mut file)?;
    Ok(file)
}
