//! A socket that was there before this process's program was: from the one that this
//! process executed before, or from systemd.
//!
//! A restart in place: the server executes its program anew, with the lock and the
//! socket that it holds. Invariants: the pid stays, and with it whoever supervises the
//! server, and the QEMUs that are its children; whoever connects meanwhile waits in the
//! socket's queue; VMs that stood ready are found again by their ledgers
//! ([`super::adopt`]). Nothing is asked for from outside: the fds' numbers count only
//! with this process's pid beside them.
//!
//! Source: sd_listen_fds(3), for systemd's.

use std::env;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::sys::socket::{getsockopt, sockopt::AcceptConn};

use crate::factory::cache::pool::Target;
use crate::notify;
use crate::sys::process::{close_on_exec, keep_on_exec, owned};

/// Environment variable: pid, fd of the lock, fd of the socket, whose that is, target.
const VARIABLE: &str = "VMCACHE_HANDOVER";
/// The first fd that systemd passes.
const FIRST: i32 = 3;
/// Most that are looked at.
const MOST: i32 = 16;

/// What this process was given.
pub struct Inherited {
    /// The lock's file, locked; from this process's former program only.
    pub lock: Option<File>,
    /// The socket, listening.
    pub socket: UnixListener,
    /// Whether a unit of systemd's made it, whose it is to remove.
    pub units: bool,
    /// How many VMs are kept ready, when that was changed.
    pub target: Option<Target>,
}

impl Inherited {
    /// What there is for a server at this endpoint; `None` in a process that was started
    /// as usual.
    ///
    /// # Errors
    /// A sentence: systemd listens elsewhere.
    pub fn take(endpoint: &Path) -> Result<Option<Inherited>, String> {
        if let Some(own) = own() {
            return Ok(Some(own));
        }
        let Some((socket, stored)) = systemds() else { return Ok(None) };
        let place = socket.local_addr().ok().and_then(|a| a.as_pathname().map(PathBuf::from));
        let there = place.as_deref().is_some_and(|p| same(p, endpoint));
        if !there {
            return Err(format!(
                "systemd listens on {}, and vm_cache_endpoint is {}: make ListenStream= of the \
                 socket's unit the same",
                place.map_or("no path".into(), |p| p.display().to_string()),
                endpoint.display()
            ));
        }
        Ok(Some(Inherited { lock: None, socket, units: !stored, target: None }))
    }
}

/// The same file, by whatever path; or its name before it was put in place.
fn same(bound: &Path, endpoint: &Path) -> bool {
    let mut before = endpoint.as_os_str().to_os_string();
    before.push(super::listener::NEW);
    let before = PathBuf::from(before);
    let real = |p: &Path| {
        p.parent().and_then(|d| d.canonicalize().ok()).zip(p.file_name().map(ToOwned::to_owned))
    };
    let same = |p: &Path| p == bound || real(p) == real(bound);
    same(endpoint) || same(&before)
}

fn own() -> Option<Inherited> {
    let text = env::var(VARIABLE).ok()?;
    let words: Vec<&str> = text.split(' ').collect();
    let [pid, lock, socket, units, target] = words[..] else { return None };
    if pid.parse() != Ok(std::process::id()) {
        return None;
    }
    let (lock, socket) = (owned(lock.parse().ok()?).ok()?, owned(socket.parse().ok()?).ok()?);
    let units = units == "unit";
    let target = target.parse().ok();
    Some(Inherited { lock: Some(lock.into()), socket: socket.into(), units, target })
}

/// The socket that systemd passes, and whether it had kept it for us.
fn systemds() -> Option<(UnixListener, bool)> {
    let number = |key: &str| env::var(key).ok()?.parse::<i32>().ok();
    if number("LISTEN_PID").and_then(|n| u32::try_from(n).ok()) != Some(std::process::id()) {
        return None;
    }
    let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut found = None;
    for n in 0..number("LISTEN_FDS")?.min(MOST) {
        // Those that are not taken are closed.
        let (name, fd) = (names.next().unwrap_or_default(), owned(FIRST + n));
        let Ok(fd) = fd else { continue };
        if getsockopt(&fd, AcceptConn).unwrap_or(false) && found.is_none() {
            found = Some((fd.into(), name == notify::STORED));
        }
    }
    found
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

/// What the next program is given.
pub struct Given<'a> {
    /// The lock's file, locked.
    pub lock: &'a File,
    /// The socket.
    pub socket: &'a OwnedFd,
    /// Whether a unit of systemd's made it.
    pub units: bool,
    /// How many VMs are kept ready, when that was changed.
    pub target: Option<Target>,
}

/// Executes the program; does not return unless that fails.
pub fn execute(program: &Path, given: &Given<'_>) -> io::Error {
    match prepared(program, given) {
        Ok((program, args, env)) => match nix::unistd::execve(&program, &args, &env) {
            Ok(never) => match never {},
            Err(e) => e.into(),
        },
        Err(e) => e,
    }
}

type Prepared = (CString, Vec<CString>, Vec<CString>);

fn prepared(program: &Path, given: &Given<'_>) -> io::Result<Prepared> {
    let text = |bytes: Vec<u8>| CString::new(bytes).map_err(io::Error::other);
    let args = env::args_os().map(|a| text(a.into_vec())).collect::<io::Result<_>>()?;
    let numbers = format!(
        "{VARIABLE}={} {} {} {} {}",
        std::process::id(),
        given.lock.as_raw_fd(),
        given.socket.as_raw_fd(),
        if given.units { "unit" } else { "own" },
        given.target.map_or("-".to_string(), |t| t.to_string()),
    );
    let pair = |(key, value): (std::ffi::OsString, std::ffi::OsString)| {
        text([key.as_bytes(), b"=", value.as_bytes()].concat())
    };
    let mut variables =
        env::vars_os().filter(|(k, _)| k != VARIABLE).map(pair).collect::<io::Result<Vec<_>>>()?;
    variables.push(text(numbers.into_bytes())?);
    // What gRPC has open without saying so must not pile up.
    close_on_exec()?;
    keep_on_exec(given.lock.as_fd())?;
    keep_on_exec(given.socket.as_fd())?;
    Ok((text(program.as_os_str().as_bytes().to_vec())?, args, variables))
}
