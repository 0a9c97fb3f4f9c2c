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
//!   │   exit code ───┘                         ├─ waits for StartContainer
//!   │   DIR/NAME.pid or DIR/NAME.error         └─ executes the program
//!   └── DIR/NAME.run: closed by execve, or why that failed ◄─┘
//! ```
//!
//! The orphan becomes the agent's child, which is PID 1 here.
//!
//! Invariants: single-threaded, so fork is safe; the program is found before
//! "ready" is told, so a missing one is an error of CreateContainer; the end of
//! DIR/NAME.run means that the program runs, with its signals as it wants them.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sched::{setns, unshare, CloneFlags};
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::signal::{kill, SigSet, Signal};
use nix::sys::wait::waitpid;
use nix::unistd::{
    access, execve, fchown, pipe2, setgroups, sethostname, setresgid, setresuid, setsid,
    AccessFlags, ForkResult, Gid, Pid, Uid,
};
use protobuf::Message;
use ttrpc::Code;

use super::failure::{Attempt, Failure, Outcome};
use super::{capabilities, user};
use crate::proto::oci::{Process, Spec};
use crate::sys::guest::set_oom_score;
use crate::sys::process::{default_actions, fork, reap};
use crate::sys::terminal::set_controlling;

/// Files that a program may have open, soft and hard, unless it is told otherwise: the
/// kernel's own.
const FILES: (u64, u64) = (1024, 4096);
/// Name of the stage that makes a container; any other joins one.
pub const INIT: &str = "init";
/// Annotation that puts a small init before the program, so that signals
/// reach it (PID 1 of a namespace ignores those it has no handler for) and
/// orphans are reaped.
pub const REAPER_ANNOTATION: &str = "io.vmcache.init";

/// Where the agent hears that the program runs.
pub fn run_pipe(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.run"))
}

/// A failure in the form in which stages tell it.
fn told(e: &Failure) -> String {
    format!("{}\n{}", e.code as i32, e.message)
}

/// The failure that a stage told, if it did; `None` for a text that is none.
pub fn heard(text: &str) -> Option<Failure> {
    let (number, message) = text.split_once('\n')?;
    Some(Failure::new(code_of(number.parse().unwrap_or(-1)), message))
}

/// The stage's life: sets up, reports to files in `dir`, ends.
pub fn run(dir: &str, name: &str) -> Outcome<()> {
    let dir = Path::new(dir);
    let result = prepare(dir, name);
    let (file, text) = match &result {
        Ok(pid) => (format!("{name}.pid"), pid.to_string()),
        Err(e) => (format!("{name}.error"), told(e)),
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
    let run = OpenOptions::new()
        .write(true)
        .open(run_pipe(dir, name))
        .during(|| "open the pipe of the program's start")?;
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
            child(spec, mounts, Pipes { start, report, run })
        }
        ForkResult::Parent { child } => {
            drop(report);
            let mut text = String::new();
            answer.read_to_string(&mut text).during(|| "hear from the container")?;
            match text.split_once('\n') {
                Some(("0", _)) => Ok(child.as_raw()),
                Some(_) => {
                    let _ = waitpid(child, None);
                    Err(heard(&text).unwrap_or_else(|| Failure::internal(text)))
                }
                None => Err(Failure::internal("the container's first process died at once")),
            }
        }
    }
}

/// The status codes that stages report.
fn code_of(number: i32) -> Code {
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

/// Whether a specification asks for the small init.
pub fn has_small_init(spec: &Spec) -> bool {
    spec.Annotations.get(REAPER_ANNOTATION).is_some_and(|v| v == "true")
}

/// What the first process in the namespaces hears and says.
struct Pipes {
    /// StartContainer's byte.
    start: File,
    /// "Ready", or why not.
    report: File,
    /// Why the program does not run; closed when it does.
    run: File,
}

/// In the namespaces: becomes the program, or reports why not and ends.
fn child(spec: Spec, mounts: Option<File>, pipes: Pipes) -> ! {
    let Pipes { start, mut report, mut run } = pipes;
    let init = mounts.is_none();
    let ready = match settle(&spec, mounts) {
        Ok(ready) => ready,
        Err(e) => {
            let _ = write!(report, "{}", told(&e));
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
    let reap = init && has_small_init(&spec);
    let process = spec.Process.unwrap_or_default();
    if reap {
        // From before the program is there, so that none is lost in between.
        let _ = SigSet::all().thread_block();
        if let Ok(ForkResult::Parent { child }) = fork() {
            drop(run);
            reap_until(child);
        }
    }
    let failure = finish(&ready, &process);
    let _ = write!(run, "{}", told(&failure));
    std::process::exit(if failure.code == Code::NOT_FOUND { 127 } else { 126 })
}

/// A small init: forwards signals to its child, reaps, ends as it ends.
fn reap_until(child: Pid) -> ! {
    let all = SigSet::all();
    // The child's stdio is its own: an open end here would hide its end of file.
    for fd in 0..3 {
        let _ = nix::unistd::close(fd);
    }
    loop {
        while let Ok(Some((pid, code))) = reap(-1) {
            if pid == child.as_raw() {
                std::process::exit(code)
            }
        }
        // Real-time ones, of which this has no names, come from inside: they are dropped,
        // as any first process of a namespace drops what it does not handle.
        match all.wait() {
            Ok(Signal::SIGCHLD) | Err(_) => {}
            Ok(signal) => {
                let _ = kill(child, signal);
            }
        }
    }
}

/// What execve needs, found before it may be called.
struct Ready {
    program: PathBuf,
    home: String,
}

/// Everything short of executing.
fn settle(spec: &Spec, mounts: Option<File>) -> Outcome<Ready> {
    let process =
        spec.Process.as_ref().ok_or_else(|| Failure::invalid("no process in the spec"))?;
    let home = surround(spec, process, mounts).map_err(Failure::not_the_program)?;
    Ok(Ready { program: find(process)?, home })
}

/// What a program has around it: its file systems, limits, user, directory. Gives the
/// user's home.
fn surround(spec: &Spec, process: &Process, mounts: Option<File>) -> Outcome<String> {
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
    // The agent's own is larger.
    setrlimit(Resource::RLIMIT_NOFILE, FILES.0, FILES.1).during(|| "limit open files")?;
    for limit in &process.Rlimits {
        let (name, resource) = resource(&limit.Type)?;
        setrlimit(resource, limit.Soft, limit.Hard).during(|| format!("set {name}"))?;
    }
    let home = become_user(process)?;
    let cwd = if process.Cwd.is_empty() { "/" } else { &process.Cwd };
    nix::unistd::chdir(cwd).during(|| format!("enter working directory {cwd}"))?;
    if process.NoNewPrivileges {
        nix::sys::prctl::set_no_new_privs().during(|| "forbid new privileges")?;
    }
    Ok(home)
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
/// Gives the user's home directory.
fn become_user(process: &Process) -> Outcome<String> {
    let user::Identity { uid, gid, groups, home } = user::identity(process.User.get_or_default())?;
    if let Some(caps) = process.Capabilities.as_ref() {
        capabilities::bound(caps)?;
        nix::sys::prctl::set_keepcaps(true).during(|| "keep capabilities")?;
    }
    let groups: Vec<Gid> = groups.into_iter().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    own_streams(uid)?;
    setgroups(&groups).during(|| "set the groups")?;
    setresgid(gid, gid, gid).during(|| format!("become group {gid}"))?;
    setresuid(uid, uid, uid).during(|| format!("become user {uid}"))?;
    if let Some(caps) = process.Capabilities.as_ref() {
        capabilities::set(caps)?;
        nix::sys::prctl::set_keepcaps(false).during(|| "let capabilities go")?;
    }
    Ok(home)
}

/// Gives the streams to the user, who may open them anew then: /dev/stdout, and the
/// terminal. Their group stays: a terminal's is the one that may write to it.
fn own_streams(uid: Uid) -> Outcome<()> {
    for stream in [std::io::stdin().as_fd(), std::io::stdout().as_fd(), std::io::stderr().as_fd()] {
        fchown(stream, Some(uid), None).during(|| format!("give its streams to user {uid}"))?;
    }
    Ok(())
}

/// The program's path: as given when it has a slash, else by the process's PATH.
fn find(process: &Process) -> Outcome<PathBuf> {
    let name = process.Args.first();
    let name =
        name.ok_or_else(|| Failure::invalid("no program to run: the arguments are empty"))?;
    if name.is_empty() {
        return Err(Failure::not_found("the command's name is empty: no such command"));
    }
    let executable = |p: &Path| p.is_file() && access(p, AccessFlags::X_OK).is_ok();
    let denied = || Failure::new(Code::PERMISSION_DENIED, format!("{name}: not executable"));
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match path.metadata() {
            Err(e) => Err(match e.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENOENT) => {
                    Failure::not_found(format!("{name}: no such file in the guest ({e})"))
                }
                _ => Failure::new(Code::PERMISSION_DENIED, format!("{name}: not executable: {e}")),
            }),
            Ok(_) if executable(&path) => Ok(path),
            Ok(_) => Err(denied()),
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

/// A session and terminal of its own, then the program; returns why there is none.
fn finish(ready: &Ready, process: &Process) -> Failure {
    // What the kernel's first process and Rust ignore would stay so across exec.
    default_actions();
    let _ = setsid();
    if process.Terminal {
        let _ = set_controlling(std::io::stdin().as_fd());
    }
    let texts = |list: &[String]| list.iter().map(|s| CString::new(s.as_bytes())).collect();
    let args: Result<Vec<CString>, _> = texts(&process.Args);
    let mut all = process.Env.clone();
    // As an empty one, as shells take it.
    if !all.iter().any(|e| e.strip_prefix("HOME=").is_some_and(|h| !h.is_empty())) {
        all.retain(|e| !e.starts_with("HOME="));
        all.push(format!("HOME={}", ready.home));
    }
    let env: Result<Vec<CString>, _> = texts(&all);
    let path = CString::new(ready.program.as_os_str().as_encoded_bytes());
    let (Ok(args), Ok(env), Ok(path)) = (args, env, path) else {
        return Failure::invalid("a NUL in an argument, a variable or the program's path");
    };
    // The agent blocks signals, and what is blocked stays so, too.
    let _ = SigSet::empty().thread_set_mask();
    let Err(error) = execve(&path, &args, &env);
    let text = format!("execute {}: {}", ready.program.display(), why_not(error, &ready.program));
    match error {
        Errno::ENOENT => Failure::not_found(text),
        Errno::EACCES
        | Errno::ENOTDIR
        | Errno::ENOEXEC
        | Errno::EPERM
        | Errno::ELOOP
        | Errno::ENAMETOOLONG
        | Errno::ETXTBSY => Failure::new(Code::PERMISSION_DENIED, text),
        _ => Failure::internal(text),
    }
}

/// What a script's first line names, as far as the kernel reads it.
fn interpreter(script: &Path) -> Option<String> {
    let mut line = [0; 256];
    let n = File::open(script).and_then(|mut file| file.read(&mut line)).ok()?;
    let line = line[..n].strip_prefix(b"#!")?.split(|b| *b == b'\n').next()?;
    String::from_utf8_lossy(line).split_whitespace().next().map(str::to_string)
}

/// The kernel's word, with what it means for a file that is there.
fn why_not(error: Errno, program: &Path) -> String {
    let error = std::io::Error::from(error);
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) if program.exists() => {
            let named = interpreter(program).map_or(String::new(), |name| format!(" {name}"));
            format!("its interpreter or loader{named} is not in the guest ({error})")
        }
        Some(Errno::ENOEXEC) => {
            format!("neither a program of this machine nor a script with #! ({error})")
        }
        _ => error.to_string(),
    }
}
