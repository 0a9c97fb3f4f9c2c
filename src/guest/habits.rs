//! This agent with the habits of Kata's, for tests of the host: a double that answers in a
//! real guest, through the real protocol. Only with the feature `kata-habits`, which no
//! package has, and only when the kernel's command line says `vmcache.habits=kata1.13`,
//! `kata3.20` or `kata4.1`.
//!
//! Every habit names its source: a file of kata-containers/agent at 1.13.0-alpha0 (0b75b2d8),
//! or of kata-containers/kata-containers at the tag of that version.
//!
//! Invariants: a call without a habit is our own agent's; where this knows less than Kata's
//! agents tell, it errs to the host's harm, never to its comfort.
//!
//! Does not: speak gRPC and yamux, which Kata's 1.13 does on a serial port (a test puts a
//! bridge there); turn the guest off at DestroySandbox; name temporary files of CopyFile as
//! Kata's do; tell a signal of 3.20 from an exit code of 129 to 192.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use ttrpc::{get_status, Code, TtrpcContext};

use super::process::Process;
use super::sandbox::with;
use super::service::Agent;
use crate::proto::agent::*;
use crate::proto::agent_ttrpc::AgentService;
use crate::proto::empty::Empty;
use crate::proto::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use crate::proto::health_ttrpc::Health;
use crate::proto::oci;
use crate::proto::types;

/// How the kernel's command line asks for it.
const PARAMETER: &str = "vmcache.habits=";
/// How long a read goes on once the process has ended (`DRAIN_DEADLINE_MS`, rpc.rs of 4.1).
const DRAIN: Duration = Duration::from_millis(500);
/// Between looks at whether the process of a waiting read has ended.
const LOOK: Duration = Duration::from_millis(5);
/// What follows an error of an agent that is built with backtraces: `{:?}` of an
/// `anyhow::Error` (`ttrpc_error` of rpc.rs, 3.20 and 4.1).
const BACKTRACE: &str = "\n\nStack backtrace:\n   0: <unknown>\n   1: <unknown>\n   2: <unknown>";

/// Whose habits.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Habits {
    Kata1,
    Kata3,
    Kata4,
}

/// As the kernel's command line has it.
static HABITS: LazyLock<Option<Habits>> = LazyLock::new(|| {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let asked = line.split_whitespace().find_map(|word| word.strip_prefix(PARAMETER))?;
    match asked {
        "kata1.13" => Some(Habits::Kata1),
        "kata3.20" => Some(Habits::Kata3),
        "kata4.1" => Some(Habits::Kata4),
        other => {
            eprintln!("vmcache-agent: {PARAMETER}{other} is of no agent that this knows");
            None
        }
    }
});

/// A process by container and its own name, which is the container's for the first.
type Key = (String, String);

fn key(container: &str, exec: &str) -> Key {
    let exec = if exec.is_empty() { container } else { exec };
    (container.to_string(), exec.to_string())
}

/// What such an agent knows beside its sandbox. One for all connections.
#[derive(Default)]
struct Known {
    /// Programs, by whose process they are.
    programs: HashMap<Key, String>,
    terminals: HashSet<Key>,
    /// Processes whose standard input was closed.
    closed: HashSet<Key>,
    /// Processes that ended before their program began, with their exit codes.
    stillborn: HashMap<Key, i32>,
    /// Reads that were given up, whose bytes are the next one's.
    flights: HashMap<(Key, bool), Flight>,
}

type Flight = Receiver<ttrpc::Result<Vec<u8>>>;

static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);

fn known() -> MutexGuard<'static, Known> {
    KNOWN.lock().unwrap_or_else(|e| e.into_inner())
}

/// The services of an agent, with habits if the command line says so.
pub fn services(
    agent: Agent,
) -> (Arc<dyn AgentService + Send + Sync>, Arc<dyn Health + Send + Sync>) {
    match *HABITS {
        None => (Arc::new(agent.clone()), Arc::new(agent)),
        Some(habits) => {
            let double = Double { agent, habits };
            (Arc::new(double.clone()), Arc::new(double))
        }
    }
}

#[derive(Clone)]
struct Double {
    agent: Agent,
    habits: Habits,
}

fn status(code: Code, text: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, text.into()))
}

fn parts(e: &ttrpc::Error) -> (Code, String) {
    match e {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message.clone()),
        other => (Code::UNKNOWN, other.to_string()),
    }
}

impl Double {
    /// An error in their manner. 2.x and later: INTERNAL for nearly all (`map_ttrpc_err` of
    /// rpc.rs), with a page of addresses. 1.13: what Go's gRPC makes of a plain `error`,
    /// UNKNOWN, but for those that say NotFound, FailedPrecondition or AlreadyExists.
    fn told(&self, e: ttrpc::Error) -> ttrpc::Error {
        let (code, text) = parts(&e);
        match (self.habits, code) {
            (Habits::Kata3 | Habits::Kata4, _) => self.failed(text),
            (Habits::Kata1, Code::NOT_FOUND | Code::FAILED_PRECONDITION | Code::ALREADY_EXISTS) => {
                status(code, text)
            }
            (Habits::Kata1, _) => status(Code::UNKNOWN, text),
        }
    }

    fn failed(&self, text: impl Into<String>) -> ttrpc::Error {
        match self.habits {
            Habits::Kata1 => status(Code::UNKNOWN, text),
            Habits::Kata3 | Habits::Kata4 => {
                status(Code::INTERNAL, format!("{}{BACKTRACE}", text.into()))
            }
        }
    }

    /// A program that cannot be started. 2.x and later look for it before they answer ("the
    /// file X was not found", `do_init_child` of rustjail's container.rs) and execute it
    /// afterwards: an execve that fails is an exit code, its errno (`do_exec`). 1.13 looks
    /// for it with `exec.LookPath` (runc's standard_init_linux.go, `execProcess` of grpc.go).
    fn not_started(&self, key: &Key, e: ttrpc::Error) -> ttrpc::Result<()> {
        let program = known().programs.get(key).cloned().unwrap_or_default();
        let (code, _) = parts(&e);
        match (self.habits, code) {
            (Habits::Kata3 | Habits::Kata4, Code::NOT_FOUND) => {
                Err(self.failed(format!("the file {program} was not found")))
            }
            (Habits::Kata3 | Habits::Kata4, Code::PERMISSION_DENIED) => {
                known().stillborn.insert(key.clone(), nix::errno::Errno::EACCES as i32);
                Ok(())
            }
            (Habits::Kata1, Code::NOT_FOUND | Code::PERMISSION_DENIED) => {
                let why = match (code, program.contains('/')) {
                    (Code::PERMISSION_DENIED, _) => "permission denied".to_string(),
                    (_, true) => format!("stat {program}: no such file or directory"),
                    (_, false) => "executable file not found in $PATH".to_string(),
                };
                let looked_up = format!("exec: {program:?}: {why}");
                let text = format!(
                    "Could not run process: container_linux.go:349: starting container process \
                     caused {looked_up:?}"
                );
                Err(status(Code::INTERNAL, text))
            }
            _ => Err(self.told(e)),
        }
    }

    /// A process, or their words for that there is none: one whose end was told, or whose
    /// container is not there (`find_container_process` of sandbox.rs, 3.20 and 4.1;
    /// `getProcess` of agent.go).
    fn process(&self, container: &str, exec: &str) -> ttrpc::Result<Arc<Process>> {
        let found = self.agent.sandbox.process(container, exec);
        found.map_err(|_| {
            let known = self.agent.sandbox.container(container).is_ok();
            match (self.habits, known, exec.is_empty()) {
                (Habits::Kata1, ..) => {
                    let text = format!("Process {exec} not found (container {container})");
                    status(Code::NOT_FOUND, text)
                }
                (Habits::Kata3, false, _) => self.failed("Invalid container id"),
                (Habits::Kata3, true, true) => self.failed("cannot find init process!"),
                (Habits::Kata3, true, false) => self.failed("Invalid exec id"),
                (Habits::Kata4, false, _) => status(Code::INVALID_ARGUMENT, "InvalidContainerId"),
                (Habits::Kata4, true, true) => status(Code::NOT_FOUND, "InitProcessNotFound"),
                (Habits::Kata4, true, false) => status(Code::NOT_FOUND, "InvalidExecId"),
            }
        })
    }

    /// Notes a process, and makes it one of theirs: its user is two numbers, whatever name
    /// comes along (`buildProcess` of grpc.go; `do_init_child` of container.rs).
    fn note(&self, key: &Key, process: &mut oci::Process) {
        if let Some(user) = process.User.as_mut() {
            user.Username.clear();
        }
        let mut known = known();
        known.programs.insert(key.clone(), process.Args.first().cloned().unwrap_or_default());
        known.closed.remove(key);
        match process.Terminal {
            true => known.terminals.insert(key.clone()),
            false => known.terminals.remove(key),
        };
    }

    /// One read(2), of at most as many bytes as are asked for: a pipe gives 64 KiB.
    ///
    /// The end: 1.13 an error of io.EOF, and of a terminal read(2)'s (`readStdio` of
    /// agent.go); 3.20 "read meet eof"; 4.1 no bytes (`read_stream` of rpc.rs). A read that
    /// waits when the process ends is answered "eof" by 3.20, although others may hold the
    /// pipe; 4.1 waits for half a second more (`do_read_stream`). 1.13 lets it wait.
    /// A terminal has one stream, whichever is read.
    fn read(&self, r: &ReadStreamRequest, stderr: bool) -> ttrpc::Result<ReadStreamResponse> {
        let key = key(&r.container_id, &r.exec_id);
        if known().stillborn.contains_key(&key) {
            return self.end(false);
        }
        let process = self.process(&r.container_id, &r.exec_id)?;
        let terminal = known().terminals.contains(&key);
        if terminal && self.habits != Habits::Kata1 && known().closed.contains(&key) {
            return Err(self.failed("cannot get stream reader"));
        }
        let stderr = stderr && !terminal;
        let answer = match self.habits {
            Habits::Kata1 => read(&process, stderr, r.len),
            Habits::Kata3 | Habits::Kata4 => match self.fly(&key, &process, stderr, r.len) {
                Some(answer) => answer,
                None if self.habits == Habits::Kata3 => return Err(self.failed("eof")),
                None => return Ok(ReadStreamResponse::default()),
            },
        };
        match answer {
            Ok(data) if data.is_empty() => self.end(terminal),
            Ok(data) => Ok(ReadStreamResponse { data, ..ReadStreamResponse::default() }),
            Err(e) => Err(self.told(e)),
        }
    }

    fn end(&self, terminal: bool) -> ttrpc::Result<ReadStreamResponse> {
        match (self.habits, terminal) {
            (Habits::Kata1, false) => Err(status(Code::UNKNOWN, "EOF")),
            (Habits::Kata1, true) => {
                Err(status(Code::UNKNOWN, "read /dev/ptmx: input/output error"))
            }
            (Habits::Kata3, _) => Err(self.failed("read meet eof")),
            (Habits::Kata4, _) => Ok(ReadStreamResponse::default()),
        }
    }

    /// A read that the process's end ends; `None` when it did. What it would have brought is
    /// then the next one's.
    fn fly(
        &self,
        key: &Key,
        process: &Arc<Process>,
        stderr: bool,
        max: u32,
    ) -> Option<ttrpc::Result<Vec<u8>>> {
        let place = (key.clone(), stderr);
        let ran = process.running();
        let before = known().flights.remove(&place);
        let flight = before.unwrap_or_else(|| {
            let (tell, flight) = channel();
            let process = Arc::clone(process);
            thread::spawn(move || tell.send(read(&process, stderr, max)));
            flight
        });
        loop {
            match flight.recv_timeout(LOOK) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Disconnected) => return Some(Ok(Vec::new())),
                Err(RecvTimeoutError::Timeout) if ran && !process.running() => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        let rest = match self.habits {
            Habits::Kata4 => flight.recv_timeout(DRAIN).ok(),
            _ => None,
        };
        if rest.is_none() {
            known().flights.insert(place, flight);
        }
        rest
    }

    /// 2.x and later: SIGKILL of a container's own process is for all in its control group
    /// (`do_signal_process` of rpc.rs). All: SIGTERM of it is SIGKILL when it has no handler
    /// (4.1: or blocks or ignores it; 1.13: `isSignalHandled` of grpc.go). A process that has
    /// ended is none to complain of, but for 1.13's further processes.
    fn signal(&self, r: &SignalProcessRequest) -> ttrpc::Result<Empty> {
        let first = r.exec_id.is_empty() || r.exec_id == r.container_id;
        if known().stillborn.contains_key(&key(&r.container_id, &r.exec_id)) {
            return Ok(Empty::new());
        }
        if first && self.habits != Habits::Kata1 && r.signal == Signal::SIGKILL as u32 {
            let container = self.agent.sandbox.container(&r.container_id);
            let container = container.map_err(|_| self.failed("Invalid container id"))?;
            let killed = with(&container, |c| c.cgroup.kill());
            return killed.map(|()| Empty::new()).map_err(|e| self.told(e.into()));
        }
        let process = self.process(&r.container_id, &r.exec_id)?;
        let mut number = r.signal;
        if first && number == Signal::SIGTERM as u32 && !self.handles(process.pid, number) {
            number = Signal::SIGKILL as u32;
        }
        if !process.running() {
            return match self.habits == Habits::Kata1 && !first {
                true => Err(self.failed("no such process")),
                false => Ok(Empty::new()),
            };
        }
        match number {
            0 => Ok(Empty::new()),
            _ => process.signal(number).map(|()| Empty::new()).map_err(|e| self.told(e.into())),
        }
    }

    fn handles(&self, pid: i32, signal: u32) -> bool {
        let masks: &[&str] = match self.habits {
            Habits::Kata1 => &["SigCgt:"],
            Habits::Kata3 | Habits::Kata4 => &["SigBlk:", "SigIgn:", "SigCgt:"],
        };
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let bits = |line: &str| {
            let mask = masks.iter().find_map(|name| line.strip_prefix(name))?;
            u64::from_str_radix(mask.trim(), 16).ok()
        };
        text.lines().filter_map(bits).any(|mask| mask & (1 << (signal - 1)) != 0)
    }

    /// When it returns, the process's pipes are closed and its record is deleted
    /// (`do_wait_process` of rpc.rs; `WaitProcess` of grpc.go). Of a process that signal n
    /// ended, versions before 3.32 tell n (`handle_sigchild` of signal.rs).
    fn wait(&self, r: &WaitProcessRequest) -> ttrpc::Result<WaitProcessResponse> {
        let key = key(&r.container_id, &r.exec_id);
        if let Some(status) = known().stillborn.get(&key).copied() {
            return Ok(WaitProcessResponse { status, ..WaitProcessResponse::default() });
        }
        let mut status = self.process(&r.container_id, &r.exec_id)?.wait();
        if let Ok(container) = self.agent.sandbox.container(&r.container_id) {
            let mut container = container.lock().unwrap_or_else(|e| e.into_inner());
            container.processes.remove(&key.1);
        }
        if self.habits == Habits::Kata3 && (129..=192).contains(&status) {
            status -= 128;
        }
        Ok(WaitProcessResponse { status, ..WaitProcessResponse::default() })
    }

    /// Where files may come, and as what. 4.1: below one directory (`do_copy_file`, since
    /// 3dba12cd of July 2026); 3.20: below /run/kata-containers; 1.13: below /run, and
    /// regular files only, of whatever was meant as a link (`CopyFile` of grpc.go).
    fn copy(&self, mut r: CopyFileRequest) -> ttrpc::Result<CopyFileRequest> {
        let (below, text) = match self.habits {
            Habits::Kata1 => {
                ("/run", "Only is possible to copy files into the /run directory".into())
            }
            Habits::Kata3 => (
                "/run/kata-containers",
                format!("Path {:?} does not start with /run/kata-containers", r.path),
            ),
            Habits::Kata4 => (
                "/run/kata-containers/shared/containers",
                format!(
                    "removing \"/run/kata-containers/shared/containers/\" prefix from {}\n\n\
                     Caused by:\n    prefix not found",
                    r.path
                ),
            ),
        };
        if !Path::new(&r.path).starts_with(below) {
            return Err(self.failed(text));
        }
        if self.habits == Habits::Kata1 {
            r.file_mode = 0o100_000 | (r.file_mode & 0o777);
        }
        Ok(r)
    }
}

fn read(process: &Process, stderr: bool, max: u32) -> ttrpc::Result<Vec<u8>> {
    process.read(stderr, max).map_err(ttrpc::Error::from)
}

impl Health for Double {
    fn check(&self, c: &TtrpcContext, r: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        self.agent.check(c, r)
    }

    fn version(&self, c: &TtrpcContext, r: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        let mut version = self.agent.version(c, r)?;
        version.agent_version = self.version_text().into();
        Ok(version)
    }
}

impl Double {
    fn version_text(&self) -> &'static str {
        match self.habits {
            Habits::Kata1 => "1.13.0-alpha0",
            Habits::Kata3 => "3.20.0",
            Habits::Kata4 => "4.1.0",
        }
    }
}

/// Calls in which only the errors differ.
macro_rules! as_ours {
    ($($call:ident($request:ty) -> $answer:ty;)*) => {
        $(fn $call(&self, c: &TtrpcContext, r: $request) -> ttrpc::Result<$answer> {
            self.agent.$call(c, r).map_err(|e| self.told(e))
        })*
    };
}

impl AgentService for Double {
    as_ours! {
        tty_win_resize(TtyWinResizeRequest) -> Empty;
        update_container(UpdateContainerRequest) -> Empty;
        stats_container(StatsContainerRequest) -> StatsContainerResponse;
        pause_container(PauseContainerRequest) -> Empty;
        resume_container(ResumeContainerRequest) -> Empty;
        destroy_sandbox(DestroySandboxRequest) -> Empty;
        online_cpu_mem(OnlineCPUMemRequest) -> Empty;
        reseed_random_dev(ReseedRandomDevRequest) -> Empty;
        mem_hotplug_by_probe(MemHotplugByProbeRequest) -> Empty;
        set_guest_date_time(SetGuestDateTimeRequest) -> Empty;
        update_interface(UpdateInterfaceRequest) -> types::Interface;
        update_routes(UpdateRoutesRequest) -> Routes;
        list_interfaces(ListInterfacesRequest) -> Interfaces;
        list_routes(ListRoutesRequest) -> Routes;
    }

    /// 2.x and later remove all below /run/kata-containers first, whoever uses it, and fail
    /// later when there is a sandbox (`create_sandbox` of rpc.rs); 1.13 says that it exists.
    fn create_sandbox(&self, c: &TtrpcContext, r: CreateSandboxRequest) -> ttrpc::Result<Empty> {
        if self.habits != Habits::Kata1 {
            let _ = fs::remove_dir_all("/run/kata-containers");
            let _ = fs::create_dir_all("/run/kata-containers");
        }
        self.agent.create_sandbox(c, r).map_err(|e| self.told(e))
    }

    /// No annotation of ours is known. 1.13 gives each container processes of its own
    /// (`updateContainerConfigNamespaces` of grpc.go), whatever the specification says.
    fn create_container(
        &self,
        c: &TtrpcContext,
        mut r: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let key = key(&r.container_id, "");
        if let Some(spec) = r.OCI.as_mut() {
            spec.Annotations.clear();
            if let Some(process) = spec.Process.as_mut() {
                self.note(&key, process);
            }
            if self.habits == Habits::Kata1 {
                let linux = spec.Linux.mut_or_insert_default();
                linux.Namespaces.retain(|n| n.Type != "pid");
                let pid = oci::LinuxNamespace { Type: "pid".into(), ..Default::default() };
                linux.Namespaces.push(pid);
            }
        }
        match self.agent.create_container(c, r) {
            Ok(empty) => Ok(empty),
            Err(e) => self.not_started(&key, e).map(|()| Empty::new()),
        }
    }

    fn start_container(&self, c: &TtrpcContext, r: StartContainerRequest) -> ttrpc::Result<Empty> {
        let key = key(&r.container_id, "");
        if known().stillborn.contains_key(&key) {
            return Ok(Empty::new());
        }
        match self.agent.start_container(c, r) {
            Ok(empty) => Ok(empty),
            Err(e) => self.not_started(&key, e).map(|()| Empty::new()),
        }
    }

    fn remove_container(
        &self,
        c: &TtrpcContext,
        r: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let id = r.container_id.clone();
        let stillborn = known().stillborn.remove(&key(&id, "")).is_some();
        let removed = self.agent.remove_container(c, r);
        let mut known = known();
        known.flights.retain(|((container, _), _), _| *container != id);
        known.stillborn.retain(|(container, _), _| *container != id);
        drop(known);
        match removed {
            Err(_) if stillborn => Ok(Empty::new()),
            other => other.map_err(|e| self.told(e)),
        }
    }

    fn exec_process(&self, c: &TtrpcContext, mut r: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let key = key(&r.container_id, &r.exec_id);
        if self.agent.sandbox.container(&r.container_id).is_err() {
            return Err(match self.habits {
                Habits::Kata1 => {
                    status(Code::NOT_FOUND, format!("Container {} not found", r.container_id))
                }
                Habits::Kata3 | Habits::Kata4 => self.failed("Invalid container id"),
            });
        }
        if let Some(process) = r.process.as_mut() {
            self.note(&key, process);
        }
        match self.agent.exec_process(c, r) {
            Ok(empty) => Ok(empty),
            Err(e) => self.not_started(&key, e).map(|()| Empty::new()),
        }
    }

    fn signal_process(&self, _: &TtrpcContext, r: SignalProcessRequest) -> ttrpc::Result<Empty> {
        self.signal(&r)
    }

    fn wait_process(
        &self,
        _: &TtrpcContext,
        r: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        self.wait(&r)
    }

    /// All is written, however long it takes (`do_write_stream` of rpc.rs; `WriteStdin` of
    /// grpc.go). 2.x and later take no bytes for the end; 1.13 ignores what comes after it.
    fn write_stdin(
        &self,
        c: &TtrpcContext,
        r: WriteStreamRequest,
    ) -> ttrpc::Result<WriteStreamResponse> {
        let key = key(&r.container_id, &r.exec_id);
        if known().stillborn.contains_key(&key) {
            return Err(self.failed("Broken pipe (os error 32)"));
        }
        let process = self.process(&r.container_id, &r.exec_id)?;
        if self.habits == Habits::Kata1 && known().closed.contains(&key) {
            return Ok(WriteStreamResponse::default());
        }
        if self.habits != Habits::Kata1 && r.data.is_empty() {
            known().closed.insert(key);
            process.close_stdin();
            return Ok(WriteStreamResponse::default());
        }
        self.agent.write_stdin(c, r).map_err(|e| self.told(e))
    }

    /// A terminal: 2.x and later close all of it (`close_stdin` of rustjail's process.rs);
    /// 1.13 does nothing (`CloseStdin` of grpc.go).
    fn close_stdin(&self, _: &TtrpcContext, r: CloseStdinRequest) -> ttrpc::Result<Empty> {
        let key = key(&r.container_id, &r.exec_id);
        if known().stillborn.contains_key(&key) {
            return Ok(Empty::new());
        }
        let process = self.process(&r.container_id, &r.exec_id)?;
        let terminal = known().terminals.contains(&key);
        if terminal && self.habits == Habits::Kata1 {
            return Ok(Empty::new());
        }
        known().closed.insert(key);
        if !terminal {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    fn read_stdout(
        &self,
        _: &TtrpcContext,
        r: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        self.read(&r, false)
    }

    fn read_stderr(
        &self,
        _: &TtrpcContext,
        r: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        self.read(&r, true)
    }

    /// 2.x and later have no such call (agent.proto of 2.0 to 4.1).
    fn list_processes(
        &self,
        c: &TtrpcContext,
        r: ListProcessesRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        match self.habits {
            Habits::Kata1 => self.agent.list_processes(c, r).map_err(|e| self.told(e)),
            Habits::Kata3 | Habits::Kata4 => {
                let text = "/grpc.AgentService/ListProcesses is not supported";
                Err(status(Code::UNIMPLEMENTED, text))
            }
        }
    }

    /// No features of ours: by them a host tells our agent from Kata's.
    fn get_guest_details(
        &self,
        c: &TtrpcContext,
        r: GuestDetailsRequest,
    ) -> ttrpc::Result<GuestDetailsResponse> {
        let mut details = self.agent.get_guest_details(c, r).map_err(|e| self.told(e))?;
        if let Some(agent) = details.agent_details.as_mut() {
            agent.extra_features.clear();
            agent.version = self.version_text().into();
        }
        Ok(details)
    }

    fn copy_file(&self, c: &TtrpcContext, r: CopyFileRequest) -> ttrpc::Result<Empty> {
        let r = self.copy(r)?;
        self.agent.copy_file(c, r).map_err(|e| self.told(e))
    }
}
