//! A container: a directory of state, a cgroup, an init process and those that
//! joined it.
//!
//! Invariants: [`Container::create`] leaves nothing behind when it fails;
//! [`Container::remove`] leaves nothing behind when it succeeds.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protobuf::Message;

use super::cgroup::Cgroup;
use super::failure::{Attempt, Failure, Outcome};
use super::process::{Ends, Process};
use super::stage::{code_of, INIT};
use super::{reaper, storage, RUN_DIR};
use crate::proto::agent::Storage;
use crate::proto::oci::{self, Spec};

/// How long RemoveContainer waits for killed processes when no time is given.
const REMOVE_WAIT: Duration = Duration::from_secs(10);
/// Pause between looks at a cgroup that is emptying.
const EMPTYING: Duration = Duration::from_millis(2);

/// Records of processes kept in one container; beyond it, ended ones are forgotten.
const MAX_PROCESSES: usize = 1024;

/// A container that exists, started or not.
pub struct Container {
    dir: PathBuf,
    /// Its control group.
    pub cgroup: Cgroup,
    started: bool,
    mounts: Vec<PathBuf>,
    next: u64,
    /// By exec id; the init process has the container's.
    pub processes: HashMap<String, Arc<Process>>,
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
        let dir = Path::new(RUN_DIR).join("containers").join(id);
        if dir.exists() {
            let text = format!("container {id} exists already");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, text));
        }
        fs::create_dir_all(&dir).during(|| format!("create {}", dir.display()))?;
        let cgroup = Cgroup::create(id).inspect_err(|_| {
            let _ = fs::remove_dir_all(&dir);
        })?;
        let mut container = Container {
            dir,
            cgroup,
            started: false,
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
            self.mounts.push(storage::attach(storage, Path::new(&root))?);
        }
        let linux = spec.Linux.mut_or_insert_default();
        if let Some(resources) = linux.Resources.as_ref() {
            self.cgroup.apply(resources)?;
        }
        linux.CgroupsPath = self.cgroup.path().to_string_lossy().into_owned();
        mkfifo(&self.dir.join("start"), Mode::S_IRUSR | Mode::S_IWUSR)
            .during(|| "make the start pipe")?;
        let process = self.stage(INIT, spec)?;
        self.processes.insert(id.to_string(), process);
        Ok(())
    }

    /// Lets init execute its program.
    pub fn start(&mut self, id: &str) -> Outcome<()> {
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
        Ok(())
    }

    /// Runs a further process in the container.
    pub fn exec(&mut self, id: &str, exec_id: &str, process: oci::Process) -> Outcome<()> {
        check_id(exec_id)?;
        if self.processes.contains_key(exec_id) {
            let text = format!("process {exec_id} of container {id} exists already");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, text));
        }
        if !self.started || !self.processes.get(id).is_some_and(|p| p.running()) {
            let text = format!("container {id} is not running");
            return Err(Failure::new(ttrpc::Code::FAILED_PRECONDITION, text));
        }
        if self.processes.len() >= MAX_PROCESSES {
            self.processes.retain(|name, p| name == id || p.running());
        }
        let linux = oci::Linux {
            CgroupsPath: self.cgroup.path().to_string_lossy().into_owned(),
            ..oci::Linux::default()
        };
        let spec =
            Spec { Process: Some(process).into(), Linux: Some(linux).into(), ..Spec::default() };
        self.next += 1;
        let name = format!("exec-{}", self.next);
        let process = self.stage(&name, &spec)?;
        self.processes.insert(exec_id.to_string(), process);
        Ok(())
    }

    /// Runs a stage (see [`super::stage`]) to its end and takes its child over.
    fn stage(&self, name: &str, spec: &Spec) -> Outcome<Arc<Process>> {
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
        let code = reaper::wait(child.id() as i32);
        let _ = fs::remove_file(self.dir.join(format!("{name}.spec")));
        if code != 0 {
            let text = fs::read_to_string(self.dir.join(format!("{name}.error")));
            let text = text.unwrap_or_default();
            let (number, message) = text.split_once('\n').unwrap_or(("", ""));
            let code_name = code_of(number.parse().unwrap_or(-1));
            let message = match message {
                "" => format!("a container's stage ended with code {code} and said nothing"),
                m => m.to_string(),
            };
            return Err(Failure::new(code_name, message));
        }
        let path = self.dir.join(format!("{name}.pid"));
        let pid = fs::read_to_string(&path).during(|| format!("read {}", path.display()))?;
        let pid = pid.trim().parse().map_err(|_| Failure::internal("a stage told no pid"))?;
        Process::adopt(pid, ends)
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
