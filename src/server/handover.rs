//! A restart in place: the server executes its program anew, with the lock and the
//! socket that it holds.
//!
//! Invariants: the pid stays, and with it whoever supervises the server, and the
//! QEMUs that are its children; whoever connects meanwhile waits in the socket's
//! queue; VMs that stood ready are found again by their ledgers ([`super::adopt`]).
//! Nothing is asked for from outside: the fds' numbers count only with this process's
//! pid beside them.

use std::env;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use crate::sys::process::{close_on_exec, keep_on_exec, owned};

/// Environment variable: pid, fd of the lock, fd of the socket.
const VARIABLE: &str = "VMCACHE_HANDOVER";

/// What this process had before it executed its program anew.
pub struct Inherited {
    /// The lock's file, locked.
    pub lock: File,
    /// The socket, listening.
    pub socket: UnixListener,
}

impl Inherited {
    /// What there is; `None` in a process that was started as usual.
    pub fn take() -> Option<Inherited> {
        let text = env::var(VARIABLE).ok()?;
        let numbers: Vec<i32> = text.split(' ').map(|n| n.parse().ok()).collect::<Option<_>>()?;
        let [pid, lock, socket] = numbers[..] else { return None };
        if u32::try_from(pid) != Ok(std::process::id()) {
            return None;
        }
        let (lock, socket) = (owned(lock).ok()?, owned(socket).ok()?);
        Some(Inherited { lock: lock.into(), socket: socket.into() })
    }
}

/// The program that this process was started from, to be asked for at its start: what
/// is there later is a newer one of that name.
///
/// # Errors
/// When the system does not tell.
pub fn program() -> io::Result<PathBuf> {
    match env::args_os().next().map(PathBuf::from) {
        Some(named) if named.is_absolute() => Ok(named),
        _ => env::current_exe(),
    }
}

/// Executes the program; does not return unless that fails.
pub fn execute(program: &std::path::Path, lock: &File, socket: &OwnedFd) -> io::Error {
    match prepared(program, lock, socket) {
        Ok((program, args, env)) => match nix::unistd::execve(&program, &args, &env) {
            Ok(never) => match never {},
            Err(e) => e.into(),
        },
        Err(e) => e,
    }
}

type Prepared = (CString, Vec<CString>, Vec<CString>);

fn prepared(program: &std::path::Path, lock: &File, socket: &OwnedFd) -> io::Result<Prepared> {
    let text = |bytes: Vec<u8>| CString::new(bytes).map_err(io::Error::other);
    let args = env::args_os().map(|a| text(a.into_vec())).collect::<io::Result<_>>()?;
    let numbers =
        format!("{VARIABLE}={} {} {}", std::process::id(), lock.as_raw_fd(), socket.as_raw_fd());
    let pair = |(key, value): (std::ffi::OsString, std::ffi::OsString)| {
        text([key.as_bytes(), b"=", value.as_bytes()].concat())
    };
    let mut variables =
        env::vars_os().filter(|(k, _)| k != VARIABLE).map(pair).collect::<io::Result<Vec<_>>>()?;
    variables.push(text(numbers.into_bytes())?);
    // What gRPC has open without saying so must not pile up.
    close_on_exec()?;
    keep_on_exec(lock.as_fd())?;
    keep_on_exec(socket.as_fd())?;
    Ok((text(program.as_os_str().as_bytes().to_vec())?, args, variables))
}
