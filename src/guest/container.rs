//! A container: a directory of state, a cgroup, an init process and those that
//! joined it.
//!
//! Invariants: [`Container::create`] leaves nothing behind when it fails;
//! [`Container::remove`] leaves nothing behind when it succeeds.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protobuf::Message;

use super::cgroup::Cgroup;
use super::failure::{Attempt, Failure, Outcome};
use super::process::{Ends, Process};
use super::reaper::Child;
use super::stage::{has_small_init, heard, run_pipe, INIT};
use super::{storage, CONTAINERS};
use crate::proto::agent::Storage;
use crate::proto::oci::{self, Spec};
use crate::sys::process::{parent, start_time};

/// How long RemoveContainer waits for killed processes when no time is given.
const REMOVE_WAIT: Duration = Duration::from_secs(10);
/// Pause between looks at a cgroup that is emptying.
const EMPTYING: Duration = Duration::from_millis(2);

/// How long execve may take: the program may be on a slow disk.
const STARTING: Duration = Duration::from_secs(50);
/// Records of processes kept in one container; beyond it, ended ones are forgotten.
const MAX_PROCESSES: usize = 1024;

/// A container that exists, started or not.
pub struct Container {
    dir: PathBuf,
    /// Its control group.
    pub cgroup: Cgroup,
    started: bool,
    /// Where the start of its program is heard of.
    starting: Option<File>,
    /// Whether its program has a small init above it.
    small_init: bool,
    mounts: Vec<PathBuf>,
    next: u64,
    /// By exec id; the init process has the container's.
    pub processes: HashMap<String, Arc<Process>>,
}

/// A program that was let go, but may not run yet.
pub struct Starting {
    pipe: File,
    process: Arc<Process>,
    cgroup: Cgroup,
    /// Whether a small init may be above the program.
    init: bool,
}

impl Starting {
    /// Waits until the program runs.
    ///
    /// # Errors
    /// Why it does not, as execve(2) says.
    pub fn wait(mut self) -> Outcome<()> {
        let deadline = Instant::now() + STARTING;
        let mut text = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) => {
                    let text = format!("no execve within {} s", STARTING.as_secs());
                    return Err(Failure::internal(text));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(e) => return Err(e).during(|| "wait for the program's start"),
            }
            let mut piece = [0; 4096];
            match self.pipe.read(&mut piece) {
                Ok(0) => break,
                Ok(n) => text.extend_from_slice(&piece[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).during(|| "hear of the program's start"),
            }
        }
        match heard(&String::from_utf8_lossy(&text)) {
            Some(failure) => Err(failure),
            None => {
                if self.init {
                    self.aim();
                }
                Ok(())
            }
        }
    }

    /// Finds the program below a small init, whose oldest child it is.
    fn aim(&self) {
        let init = self.process.pid;
        let children = self.cgroup.pids().into_iter().filter(|pid| parent(*pid) == Some(init));
        if let Some(program) = children.min_by_key(|pid| (start_time(*pid), *pid)) {
            self.process.aim_at(program);
        }
    }
}

/// Ids become names of directories.
pub fn check_id(id: &str) -> Outcome<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if id.is_empty() || id.len() > 128 || id.starts_with('.') || !id.chars().all(good) {
        return Err(Failure::invalid(format!(
            "container id {id:?}: 1 to 128 letters, digits, '.', '_', '-', not starting with '.'"
        )));
    }
    Ok(())
}

impl Container {
    /// Makes a container whose init stands ready before its program.
    pub fn create(id: &str, mut spec: Spec, storages: &[Storage]) -> Outcome<Container> {
        check_id(id)?;
        let dir = Path::new(CONTAINERS).join(id);
        match fs::create_dir(&dir) {
            // Another's, which stays as it is.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                let text = format!("container {id} exists already");
                return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, text));
            }
            made => made.during(|| format!("create {}", dir.display()))?,
        }
        let cgroup = Cgroup::create(id).inspect_err(|_| {
            let _ = fs::remove_dir_all(&dir);
        })?;
        let mut container = Container {
            dir,
            cgroup,
            started: false,
            starting: None,
            small_init: has_small_init(&spec),
            mounts: Vec::new(),
            next: 0,
            processes: HashMap::new(),
        };
        match container.set_up(id, &mut spec, storages) {
            Ok(()) => Ok(container),
            Err(e) => {
                let _ = container.remove(REMOVE_WAIT);
                Err(e)
            }
        }
    }

    fn set_up(&mut self, id: &str, spec: &mut Spec, storages: &[Storage]) -> Outcome<()> {
        let root = spec.Root.as_ref().map(|r| r.Path.clone()).unwrap_or_default();
        for storage in storages {
            let mount = storage::attach(storage, Path::new(&root));
            self.mounts.push(mount.map_err(Failure::not_the_program)?);
        }
        let linux = spec.Linux.mut_or_insert_default();
        if let Some(resources) = linux.Resources.as_ref() {
            self.cgroup.apply(resources)?;
        }
        linux.CgroupsPath = self.cgroup.path().to_string_lossy().into_owned();
        mkfifo(&self.dir.join("start"), Mode::S_IRUSR | Mode::S_IWUSR)
            .during(|| "make the start pipe")?;
        let (process, starting) = self.stage(INIT, spec)?;
        self.starting = Some(starting);
        self.processes.insert(id.to_string(), process);
        Ok(())
    }

    /// Lets init execute its program; what to wait for, without this container's lock.
    pub fn start(&mut self, id: &str) -> Outcome<Starting> {
        if self.started {
            return Err(Failure::invalid(format!("container {id} has started already")));
        }
        // Read and write: this never blocks, even when init is gone.
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.dir.join("start"))
            .and_then(|mut pipe| pipe.write_all(b"!"))
            .during(|| format!("start container {id}"))?;
        self.started = true;
        self.starting(id).ok_or_else(|| Failure::internal(format!("container {id} has no init")))
    }

    fn starting(&mut self, name: &str) -> Option<Starting> {
        let process = Arc::clone(self.processes.get(name)?);
        let (pipe, cgroup) = (self.starting.take()?, self.cgroup.clone());
        Some(Starting { pipe, process, cgroup, init: self.small_init })
    }

    /// Runs a further process in the container; what to wait for, without this
    /// container's lock.
    pub fn exec(&mut self, id: &str, exec_id: &str, process: oci::Process) -> Outcome<Starting> {
        check_id(exec_id)?;
        if self.processes.contains_key(exec_id) {
            let text = format!("process {exec_id} of container {id} exists already");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, text));
        }
        if !self.started || !self.processes.get(id).is_some_and(|p| p.running()) {
            let text = format!("container {id} is not running");
            return Err(Failure::new(ttrpc::Code::FAILED_PRECONDITION, text));
        }
        // It would stop as it joins, and hold up whoever is to let it go on.
        if self.cgroup.frozen() {
            let text = format!("container {id} is paused: resume it first");
            return Err(Failure::new(ttrpc::Code::ABORTED, text));
        }
        if self.processes.len() >= MAX_PROCESSES {
            self.processes.retain(|name, p| name == id || p.running());
        }
        if self.processes.len() >= MAX_PROCESSES {
            let text = format!("{MAX_PROCESSES} processes run in container {id}, no more in one");
            return Err(Failure::new(ttrpc::Code::RESOURCE_EXHAUSTED, text));
        }
        let linux = oci::Linux {
            CgroupsPath: self.cgroup.path().to_string_lossy().into_owned(),
            ..oci::Linux::default()
        };
        let spec =
            Spec { Process: Some(process).into(), Linux: Some(linux).into(), ..Spec::default() };
        self.next += 1;
        let name = format!("exec-{}", self.next);
        let (process, pipe) = self.stage(&name, &spec)?;
        self.processes.insert(exec_id.to_string(), Arc::clone(&process));
        Ok(Starting { pipe, process, cgroup: self.cgroup.clone(), init: false })
    }

    /// Runs a stage (see [`super::stage`]) to its end and takes its child over; where
    /// the start of the program is heard of.
    fn stage(&self, name: &str, spec: &Spec) -> Outcome<(Arc<Process>, File)> {
        let run = run_pipe(&self.dir, name);
        mkfifo(&run, Mode::S_IRUSR | Mode::S_IWUSR).during(|| format!("make {}", run.display()))?;
        // Before there is a writer, for whom nothing waits here.
        let starting = OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&run)
            .during(|| format!("open {}", run.display()))?;
        let bytes =
            spec.write_to_bytes().map_err(|e| Failure::invalid(format!("encode the spec: {e}")))?;
        fs::write(self.dir.join(format!("{name}.spec")), bytes).during(|| "write the spec")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("stage").arg(&self.dir).arg(name).env_clear();
        let process = spec.Process.clone().unwrap_or_default();
        let size = process.ConsoleSize.clone().unwrap_or_default();
        let size = (size.Height.min(0xffff) as u16, size.Width.min(0xffff) as u16);
        let ends = Ends::attach(&mut command, process.Terminal.then_some(size))?;
        let child = command.spawn().during(|| "start a container's stage")?;
        drop(command);
        let code = Child::of(child.id() as i32).wait();
        let _ = fs::remove_file(self.dir.join(format!("{name}.spec")));
        let _ = fs::remove_file(&run);
        if code != 0 {
            let text = fs::read_to_string(self.dir.join(format!("{name}.error")));
            return Err(heard(&text.unwrap_or_default()).unwrap_or_else(|| {
                let text = format!("a container's stage ended with code {code} and said nothing");
                Failure::internal(text)
            }));
        }
        let path = self.dir.join(format!("{name}.pid"));
        let pid = fs::read_to_string(&path).during(|| format!("read {}", path.display()))?;
        if name != INIT {
            // Nobody asks for it again.
            let _ = fs::remove_file(&path);
        }
        let pid = pid.trim().parse().map_err(|_| Failure::internal("a stage told no pid"))?;
        Ok((Process::adopt(pid, ends, name != INIT)?, starting))
    }

    /// Kills what runs in it and takes it all away.
    pub fn remove(&mut self, within: Duration) -> Outcome<()> {
        let deadline = Instant::now() + if within.is_zero() { REMOVE_WAIT } else { within };
        let _ = self.cgroup.freeze(false);
        let _ = self.cgroup.kill();
        while !self.cgroup.pids().is_empty() {
            if Instant::now() > deadline {
                let pids = self.cgroup.pids();
                return Err(Failure::internal(format!("processes {pids:?} do not die")));
            }
            sleep(EMPTYING);
        }
        // A killed process leaves its group when it is reaped.
        while self.cgroup.remove().is_err() {
            if Instant::now() > deadline {
                return self.cgroup.remove();
            }
            sleep(EMPTYING);
        }
        let written = storage::detach_all(&mut self.mounts);
        if !self.mounts.is_empty() {
            return written;
        }
        fs::remove_dir_all(&self.dir).during(|| format!("remove {}", self.dir.display()))?;
        written
    }
}
