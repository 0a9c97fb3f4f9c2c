//! A process of a VM: QEMU, or one beside it ([`attendant`]). Started in a session
//! of its own, held by a pidfd.
//!
//! Invariants: whoever holds a [`Process`] owns it; dropping it kills the process
//! unless it was let go. Its output goes to a pipe that never blocks it and
//! is read when it has died. This and `initrd` are the only callers of
//! `Command::new`.

pub mod attendant;

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::sys::wait::{waitid, Id, WaitPidFlag, WaitStatus};
use nix::unistd::pipe2;

use crate::confine;
use crate::sys::cage::Cage;
use crate::sys::child;
use crate::sys::process::{
    parent, pidfd_alive, pidfd_kill, pidfd_open, pidfd_wait, real_uid, start_time,
};
use crate::trusted_path::TrustedPath;

/// Bytes of its output that an error carries, the last ones.
pub const KEPT_OUTPUT: usize = 4096;
/// How long a killed one may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// Longest command line looked at, in bytes.
const MAX_LINE: u64 = 64 * 1024;
/// SIGKILL.
const KILL: i32 = 9;

/// Why it could not be started.
#[derive(Debug)]
pub struct SpawnError {
    path: PathBuf,
    limits: String,
    source: io::Error,
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "start {}{}", self.path.display(), self.limits)
    }
}

impl std::error::Error for SpawnError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// One that this process started, or one that it took over.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    start_time: u64,
    pidfd: OwnedFd,
    output: Option<OwnedFd>,
    child: bool,
    let_go: bool,
}

impl Process {
    /// Starts a program; it inherits the fds of `inherited` and no others. With `leased`, the
    /// kernel kills it when the calling thread ends. It is left with what `cage` says.
    ///
    /// # Errors
    /// When the executable cannot be started, or is not only root's and this user's
    /// ([`crate::trusted_path`]).
    #[allow(clippy::disallowed_methods)] // The one place where they are started.
    pub fn spawn(
        program: &Path,
        args: &[OsString],
        inherited: &[BorrowedFd<'_>],
        leased: bool,
        cage: Cage,
    ) -> Result<Process, SpawnError> {
        let limits = confine::described(&cage);
        let failed = |source: io::Error| SpawnError {
            path: program.to_path_buf(),
            limits: limits.clone(),
            source,
        };
        // Here for all of them: nobody else decides what is executed under its name.
        TrustedPath::program(program).map_err(failed)?;
        let (output, theirs) =
            pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(|e| failed(e.into()))?;
        // Our reading end may block; theirs must not, or a full pipe stops the VM.
        fcntl(&output, FcntlArg::F_SETFL(OFlag::empty())).map_err(|e| failed(e.into()))?;
        let mut command = Command::new(program);
        command.args(args).env_clear().current_dir("/").stdin(Stdio::null());
        command.stdout(theirs.try_clone().map_err(failed)?).stderr(Stdio::from(theirs));
        // It has the reading end, too: when this process is gone, what it writes goes
        // nowhere, and does not end it.
        let kept: Vec<_> = inherited.iter().copied().chain([output.as_fd()]).collect();
        child::prepare(&mut command, &kept, leased, cage);
        let mut child = command.spawn().map_err(failed)?;
        let pid = child.id() as i32;
        let pidfd = match pidfd_open(pid) {
            Ok(pidfd) => pidfd,
            Err(e) => {
                // Not reaped yet, so the pid is still its own.
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(e));
            }
        };
        let start_time = start_time(pid).unwrap_or(0);
        Ok(Process { pid, start_time, pidfd, output: Some(output), child: true, let_go: false })
    }

    /// Takes over one that another process started.
    ///
    /// # Errors
    /// When it is gone, or the pid now names another process.
    pub fn adopt(pid: i32, started: u64) -> io::Result<Process> {
        let pidfd = pidfd_open(pid)?;
        if start_time(pid) != Some(started) {
            return Err(io::Error::other(format!("pid {pid} is another process now")));
        }
        // Started before this process executed another program in its place.
        let child = parent(pid) == Some(std::process::id() as i32);
        Ok(Process { pid, start_time: started, pidfd, output: None, child, let_go: false })
    }

    /// The same for one that only a user can have named who may kill it; `None`: root, or this
    /// process's user.
    ///
    /// # Errors
    /// As [`Process::adopt`], and when it is not that user's.
    pub fn adopt_of(pid: i32, started: u64, uid: Option<u32>) -> io::Result<Process> {
        let process = Process::adopt(pid, started);
        let Some(uid) = uid else { return process };
        let process = process?;
        // The pid is still its own when it runs after its user was read.
        match real_uid(pid) == Some(uid) && process.alive() {
            true => Ok(process),
            false => {
                process.let_go();
                Err(io::Error::other(format!("pid {pid} is not uid {uid}'s")))
            }
        }
    }

    /// Whether it bears such a name: an argument that is, or begins with it and a
    /// comma. Asked of the process that is held, so that a pid that is used anew
    /// answers for nobody.
    pub fn is_named(&self, name: &str) -> bool {
        let file = fs::File::open(format!("/proc/{}/cmdline", self.pid));
        let mut line = Vec::new();
        let read = file.and_then(|f| f.take(MAX_LINE).read_to_end(&mut line));
        let named = line.split(|b| *b == 0).any(|word| {
            word.strip_prefix(name.as_bytes()).is_some_and(|rest| matches!(rest, [] | [b',', ..]))
        });
        read.is_ok() && named && self.alive()
    }

    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its start time, in clock ticks after the host's boot.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Whether it runs.
    pub fn alive(&self) -> bool {
        pidfd_alive(self.pidfd.as_fd())
    }

    /// Another fd for the same process, to watch it.
    ///
    /// # Errors
    /// As dup(2).
    pub fn watch(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Gives ownership up: it runs on when this is dropped.
    pub fn let_go(mut self) {
        self.let_go = true;
    }

    /// Whether this user may not signal it.
    pub fn is_anothers(&self) -> bool {
        let refused = pidfd_kill(self.pidfd.as_fd(), 0).err().and_then(|e| e.raw_os_error());
        refused == Some(nix::errno::Errno::EPERM as i32)
    }

    /// Kills it and waits until it is gone; harmless when it is already. Another user's
    /// is left to that user's server.
    pub fn kill(&self) {
        let killed = pidfd_kill(self.pidfd.as_fd(), KILL);
        if !killed.is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied) {
            self.wait(KILL_WAIT);
        }
    }

    /// Waits for its end; false when it still runs after `within`.
    pub fn wait(&self, within: Duration) -> bool {
        let ended = pidfd_wait(self.pidfd.as_fd(), within);
        if ended && self.child {
            reap(self.pidfd.as_fd());
        }
        ended
    }

    /// How it ended and the end of what it wrote, for an error; only when it
    /// has died, since reading waits for that.
    pub fn last_words(&mut self) -> String {
        if self.alive() {
            return "it is still running".to_string();
        }
        let mut text = Vec::new();
        if let Some(output) = self.output.take() {
            // A pipe's capacity bounds this.
            let _ = fs::File::from(output).take(1 << 20).read_to_end(&mut text);
        }
        let from = text.len().saturating_sub(KEPT_OUTPUT);
        let text = String::from_utf8_lossy(&text[from..]).trim().to_string();
        match text.as_str() {
            "" => "it wrote nothing".to_string(),
            words => format!("it wrote: {words}"),
        }
    }
}

/// Collects a child's exit status, so that no zombie stays.
pub fn reap(pidfd: BorrowedFd<'_>) -> Option<WaitStatus> {
    waitid(Id::PIDFd(pidfd), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG).ok()
}

/// Collects all children that have ended: those of whoever this process was before it
/// executed its program anew. Only while nobody else waits for a child.
pub fn reap_all() {
    use nix::sys::wait::waitpid;
    while matches!(
        waitpid(None, Some(WaitPidFlag::WNOHANG)),
        Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))
    ) {}
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.let_go {
            self.kill();
        }
    }
}
