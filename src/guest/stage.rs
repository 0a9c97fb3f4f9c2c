//! The process between the agent and a container's program.
//!
//! The agent has many threads, and namespaces are made by forking, so it
//! executes itself anew: `vmcache-agent stage DIR NAME`. That process joins
//! the cgroup, makes or joins the namespaces, forks, and ends when its child
//! stands ready to execute the program:
//!
//! ```text
//! agent ──spawn──► stage ──fork──► first process in the namespaces
//!   ▲                │  ◄─ "ready" or why not ─┤ (mounts, user, limits)
//!   └── exit code ───┘                         ├─ waits for StartContainer
//!       DIR/NAME.pid or DIR/NAME.error         └─ executes the program
//! ```
//!
//! The orphan becomes the agent's child, which is PID 1 here.
//!
//! Invariants: single-threaded, so fork is safe; the program is found before
//! "ready" is told, so a missing one is an error of CreateContainer.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sched::{setns, unshare, CloneFlags};
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::{kill, SigSet, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::{
    access, execve, pipe2, setgroups, sethostname, setresgid, setresuid, setsid, AccessFlags,
    ForkResult, Gid, Pid, Uid,
};
use protobuf::Message;
use ttrpc::Code;

use super::failure::{Attempt, Failure, Outcome};
use super::{capabilities, user};
use crate::proto::oci::{Process, Spec};
use crate::sys::guest::set_oom_score;
use crate::sys::process::{default_sigpipe, fork};
use crate::sys::terminal::set_controlling;

/// Name of the stage that makes a container; any other joins one.
pub const INIT: &str = "init";
/// Annotation that puts a small init before the program, so that signals
/// reach it (PID 1 of a namespace ignores those it has no handler for) and
/// orphans are reaped.
pub const REAPER_ANNOTATION: &str = "io.vmcache.init";

/// The stage's life: sets up, reports to files in `dir`, ends.
pub fn run(dir: &str, name: &str) -> Outcome<()> {
    let dir = Path::new(dir);
    let result = prepare(dir, name);
    let (file, text) = match &result {
        Ok(pid) => (format!("{name}.pid"), pid.to_string()),
        Err(e) => (format!("{name}.error"), format!("{}\n{}", e.code as i32, e.message)),
    };
    fs::write(dir.join(file), text).during(|| format!("report to {}", dir.display()))?;
    result.map(|_| ())
}

fn prepare(dir: &Path, name: &str) -> Outcome<i32> {
    let bytes = fs::read(dir.join(format!("{name}.spec"))).during(|| "read the spec")?;
    let spec = Spec::parse_from_bytes(&bytes)
        .map_err(|e| Failure::invalid(format!("parse the spec of {name}: {e}")))?;
    let start = OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.join("start"))
        .during(|| "open the start pipe")?;
    if let Some(linux) = spec.Linux.as_ref() {
        fs::write(Path::new(&linux.CgroupsPath).join("cgroup.procs"), "0")
            .during(|| format!("join cgroup {}", linux.CgroupsPath))?;
    }
    // The mount namespace is entered by the child alone: this process must
    // still find the directory in which it reports.
    let mounts = match name {
        INIT => {
            make_namespaces(&spec)?;
            None
        }
        _ => Some(join_namespaces(dir)?),
    };
    let (mut answer, report) = pipe2(OFlag::O_CLOEXEC)
        .map(|(r, w)| (File::from(r), File::from(w)))
        .during(|| "make a pipe")?;
    match fork().during(|| "fork into the namespaces")? {
        ForkResult::Child => {
            drop(answer);
            child(spec, mounts, start, report)
        }
        ForkResult::Parent { child } => {
            drop(report);
            let mut text = String::new();
            answer.read_to_string(&mut text).during(|| "hear from the container")?;
            match text.split_once('\n') {
                Some(("0", _)) => Ok(child.as_raw()),
                Some((code, message)) => {
                    let _ = waitpid(child, None);
                    let code = code.parse().unwrap_or(Code::INTERNAL as i32);
                    Err(Failure::new(code_of(code), message))
                }
                None => Err(Failure::internal("the container's first process died at once")),
            }
        }
    }
}

/// The status codes that stages report.
pub fn code_of(number: i32) -> Code {
    [Code::NOT_FOUND, Code::PERMISSION_DENIED, Code::INVALID_ARGUMENT, Code::UNIMPLEMENTED]
        .into_iter()
        .find(|c| *c as i32 == number)
        .unwrap_or(Code::INTERNAL)
}

fn namespace(kind: &str) -> Option<(CloneFlags, &'static str)> {
    Some(match kind {
        "pid" => (CloneFlags::CLONE_NEWPID, "pid"),
        "mount" => (CloneFlags::CLONE_NEWNS, "mnt"),
        "uts" => (CloneFlags::CLONE_NEWUTS, "uts"),
        "ipc" => (CloneFlags::CLONE_NEWIPC, "ipc"),
        "network" => (CloneFlags::CLONE_NEWNET, "net"),
        "cgroup" => (CloneFlags::CLONE_NEWCGROUP, "cgroup"),
        _ => return None,
    })
}

fn make_namespaces(spec: &Spec) -> Outcome<()> {
    let mut new = CloneFlags::empty();
    for ns in spec.Linux.as_ref().map(|l| l.Namespaces.as_slice()).unwrap_or_default() {
        let Some((flag, _)) = namespace(&ns.Type) else {
            let text = format!("{} namespaces are not supported in this guest", ns.Type);
            return Err(Failure::new(Code::UNIMPLEMENTED, text));
        };
        if flag == CloneFlags::CLONE_NEWNS {
            continue;
        }
        if ns.Path.is_empty() {
            new |= flag;
        } else {
            let file = File::open(&ns.Path).during(|| format!("open namespace {}", ns.Path))?;
            setns(file, flag).during(|| format!("join namespace {}", ns.Path))?;
        }
    }
    unshare(new).during(|| "make namespaces")
}

/// Joins those of the container's init; gives its mount namespace, unjoined.
fn join_namespaces(dir: &Path) -> Outcome<File> {
    let pid = fs::read_to_string(dir.join(format!("{INIT}.pid"))).during(|| "read init's pid")?;
    let open = |name: &str| {
        let path = format!("/proc/{}/ns/{name}", pid.trim());
        File::open(&path).during(|| format!("open {path}"))
    };
    let mounts = open("mnt")?;
    for kind in ["ipc", "uts", "network", "cgroup", "pid"] {
        let Some((flag, name)) = namespace(kind) else { continue };
        setns(open(name)?, flag).during(|| format!("join the {kind} namespace"))?;
    }
    Ok(mounts)
}

/// In the namespaces: becomes the program, or reports why not and ends.
fn child(spec: Spec, mounts: Option<File>, start: File, mut report: File) -> ! {
    let init = mounts.is_none();
    let ready = settle(&spec, mounts);
    let program = match ready {
        Ok(program) => program,
        Err(e) => {
            let _ = write!(report, "{}\n{}", e.code as i32, e.message);
            std::process::exit(1)
        }
    };
    let _ = report.write_all(b"0\n");
    drop(report);
    if init {
        // Opened for writing too, so this waits for a byte and sees no end.
        let mut byte = [0];
        let _ = (&start).read(&mut byte);
    }
    drop(start);
    let process = spec.Process.unwrap_or_default();
    let reap = init && spec.Annotations.get(REAPER_ANNOTATION).is_some_and(|v| v == "true");
    if reap {
        if let Ok(ForkResult::Parent { child }) = fork() {
            reap_until(child);
        }
    }
    finish(&program, &process)
}

/// A small init: forwards signals to its child, reaps, ends as it ends.
fn reap_until(child: Pid) -> ! {
    let all = SigSet::all();
    let _ = all.thread_block();
    // The child's stdio is its own: an open end here would hide its end of file.
    for fd in 0..3 {
        let _ = nix::unistd::close(fd);
    }
    loop {
        match all.wait() {
            Ok(Signal::SIGCHLD) => loop {
                match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::Exited(pid, code)) if pid == child => std::process::exit(code),
                    Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => {
                        std::process::exit(128 + signal as i32)
                    }
                    Ok(WaitStatus::StillAlive) | Err(_) => break,
                    Ok(_) => {}
                }
            },
            Ok(signal) => {
                let _ = kill(child, signal);
            }
            Err(_) => {}
        }
    }
}

/// Everything short of executing; returns the program's path.
fn settle(spec: &Spec, mounts: Option<File>) -> Outcome<PathBuf> {
    let process =
        spec.Process.as_ref().ok_or_else(|| Failure::invalid("no process in the spec"))?;
    let terminal = process.Terminal.then(|| fs::read_link("/proc/self/fd/0").ok()).flatten();
    if let Some(mounts) = mounts {
        setns(mounts, CloneFlags::CLONE_NEWNS).during(|| "join the mount namespace")?;
    } else {
        unshare(CloneFlags::CLONE_NEWNS).during(|| "make a mount namespace")?;
        if !spec.Hostname.is_empty() {
            sethostname(&spec.Hostname).during(|| "set the host name")?;
        }
        super::mounts::enter(spec, terminal.as_deref())?;
        for (key, value) in spec.Linux.as_ref().map(|l| &l.Sysctl).into_iter().flatten() {
            let path = format!("/proc/sys/{}", key.replace('.', "/"));
            fs::write(&path, value).during(|| format!("set sysctl {key} to {value}"))?;
        }
    }
    if process.OOMScoreAdj != 0 {
        set_oom_score(process.OOMScoreAdj).during(|| "set the OOM score")?;
    }
    for limit in &process.Rlimits {
        let (name, resource) = resource(&limit.Type)?;
        setrlimit(resource, limit.Soft, limit.Hard).during(|| format!("set {name}"))?;
    }
    become_user(process)?;
    let cwd = if process.Cwd.is_empty() { "/" } else { &process.Cwd };
    nix::unistd::chdir(cwd).during(|| format!("enter working directory {cwd}"))?;
    if process.NoNewPrivileges {
        nix::sys::prctl::set_no_new_privs().during(|| "forbid new privileges")?;
    }
    find(process)
}

fn resource(name: &str) -> Outcome<(&str, Resource)> {
    let kind = match name.trim_start_matches("RLIMIT_") {
        "AS" => Resource::RLIMIT_AS,
        "CORE" => Resource::RLIMIT_CORE,
        "CPU" => Resource::RLIMIT_CPU,
        "DATA" => Resource::RLIMIT_DATA,
        "FSIZE" => Resource::RLIMIT_FSIZE,
        "LOCKS" => Resource::RLIMIT_LOCKS,
        "MEMLOCK" => Resource::RLIMIT_MEMLOCK,
        "MSGQUEUE" => Resource::RLIMIT_MSGQUEUE,
        "NICE" => Resource::RLIMIT_NICE,
        "NOFILE" => Resource::RLIMIT_NOFILE,
        "NPROC" => Resource::RLIMIT_NPROC,
        "RSS" => Resource::RLIMIT_RSS,
        "RTPRIO" => Resource::RLIMIT_RTPRIO,
        "RTTIME" => Resource::RLIMIT_RTTIME,
        "SIGPENDING" => Resource::RLIMIT_SIGPENDING,
        "STACK" => Resource::RLIMIT_STACK,
        other => return Err(Failure::invalid(format!("{other} is no resource limit"))),
    };
    Ok((name, kind))
}

/// User, groups and capabilities; names are looked up in the container's own files.
fn become_user(process: &Process) -> Outcome<()> {
    let user = process.User.clone().unwrap_or_default();
    let (mut uid, mut gid) = (user.UID, user.GID);
    let mut groups = user.AdditionalGids.clone();
    if !user.Username.is_empty() {
        (uid, gid) = user::look_up(&user.Username, &mut groups)?;
    }
    if let Some(caps) = process.Capabilities.as_ref() {
        capabilities::bound(caps)?;
        nix::sys::prctl::set_keepcaps(true).during(|| "keep capabilities")?;
    }
    let groups: Vec<Gid> = groups.into_iter().map(Gid::from_raw).collect();
    setgroups(&groups).during(|| "set the groups")?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid).during(|| format!("become group {gid}"))?;
    setresuid(uid, uid, uid).during(|| format!("become user {uid}"))?;
    if let Some(caps) = process.Capabilities.as_ref() {
        capabilities::set(caps)?;
        nix::sys::prctl::set_keepcaps(false).during(|| "let capabilities go")?;
    }
    Ok(())
}

/// The program's path: as given when it has a slash, else by the process's PATH.
fn find(process: &Process) -> Outcome<PathBuf> {
    let name = process.Args.first().filter(|a| !a.is_empty());
    let name =
        name.ok_or_else(|| Failure::invalid("no program to run: the arguments are empty"))?;
    let executable = |p: &Path| p.is_file() && access(p, AccessFlags::X_OK).is_ok();
    let denied = || Failure::new(Code::PERMISSION_DENIED, format!("{name}: not executable"));
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match path.exists() {
            false => Err(Failure::not_found(format!("{name}: no such file in the guest"))),
            true if executable(&path) => Ok(path),
            true => Err(denied()),
        };
    }
    let path = process.Env.iter().find_map(|e| e.strip_prefix("PATH="));
    let path = path.unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let mut seen = false;
    for dir in path.split(':') {
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        if executable(&candidate) {
            return Ok(candidate);
        }
        seen |= candidate.is_file();
    }
    if seen {
        return Err(denied());
    }
    Err(Failure::not_found(format!("{name}: command not found in the guest (PATH={path})")))
}

/// A session and terminal of its own, then the program.
fn finish(program: &Path, process: &Process) -> ! {
    // Rust ignores it, and what is ignored stays so across exec.
    default_sigpipe();
    // The agent blocks signals, and what is blocked stays so, too.
    let _ = SigSet::empty().thread_set_mask();
    let _ = setsid();
    if process.Terminal {
        let _ = set_controlling(std::io::stdin().as_fd());
    }
    let text = |s: &String| CString::new(s.as_bytes()).unwrap_or_default();
    let args: Vec<CString> = process.Args.iter().map(text).collect();
    let mut env: Vec<CString> = process.Env.iter().map(text).collect();
    if !process.Env.iter().any(|e| e.starts_with("HOME=")) {
        env.push(text(&format!("HOME={}", user::home(nix::unistd::getuid().as_raw()))));
    }
    let path = CString::new(program.as_os_str().as_encoded_bytes()).unwrap_or_default();
    let Err(error) = execve(&path, &args, &env);
    eprintln!("vmcache-agent: execute {}: {error}", program.display());
    std::process::exit(126)
}
