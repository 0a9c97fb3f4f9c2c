//! The sandbox: which containers there are, and who may be called what.
//!
//! Invariants: one lock around the table, never held while a process is waited
//! for, read or written; a request names a container and a process, an empty
//! process name is the container's own.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::unistd::sethostname;

use super::container::Container;
use super::failure::{Attempt, Failure, Outcome};
use super::process::{sessions, Process};
use super::{hosts, storage};
use crate::proto::agent::{CreateContainerRequest, CreateSandboxRequest};
use crate::proto::oci;

const SIGKILL: u32 = 9;
/// Most containers in one guest.
const MAX_CONTAINERS: usize = 1024;

/// A container, for one request at a time.
type Shared = Arc<Mutex<Container>>;

#[derive(Default)]
struct Table {
    id: Option<String>,
    mounts: Vec<PathBuf>,
    containers: HashMap<String, Shared>,
    /// Those that are being made.
    begun: HashSet<String>,
}

/// All that CreateSandbox and CreateContainer made.
#[derive(Default)]
pub struct Sandbox {
    table: Mutex<Table>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

impl Sandbox {
    /// Names the sandbox and sets what all its containers share.
    pub fn create(&self, request: &CreateSandboxRequest) -> Outcome<()> {
        let mut table = lock(&self.table);
        if let Some(id) = &table.id {
            let text = format!("sandbox {id:?} exists already");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, text));
        }
        if request.sandbox_pidns {
            let text = "a pid namespace for the whole sandbox is not supported in this guest";
            return Err(Failure::new(ttrpc::Code::UNIMPLEMENTED, text));
        }
        if !request.hostname.is_empty() {
            sethostname(&request.hostname).during(|| "set the host name")?;
            // A full guest, for one, is no reason to run nothing in it.
            if let Err(e) = hosts::know(&request.hostname) {
                eprintln!("vmcache-agent: {}", e.message);
            }
        }
        if !request.dns.is_empty() {
            let lines: String = request.dns.iter().map(|l| format!("{l}\n")).collect();
            std::fs::write("/etc/resolv.conf", lines).during(|| "write /etc/resolv.conf")?;
        }
        for storage in &request.storages {
            table.mounts.push(storage::attach(storage, Path::new("/"))?);
        }
        table.id = Some(request.sandbox_id.clone());
        Ok(())
    }

    /// Removes every container and what the sandbox mounted. One that can not be
    /// removed keeps none of the others, and is there still.
    pub fn destroy(&self) -> Outcome<()> {
        let containers: Vec<(String, Shared)> = lock(&self.table).containers.drain().collect();
        let mut failed = Vec::new();
        for (id, container) in containers {
            let removed = lock(&container).remove(Duration::ZERO);
            if let Err(e) = removed {
                failed.push(format!("remove container {id}: {}", e.message));
                lock(&self.table).containers.insert(id, container);
            }
        }
        if !failed.is_empty() {
            return Err(Failure::internal(failed.join("; ")));
        }
        let mut table = lock(&self.table);
        let written = storage::detach_all(&mut table.mounts);
        if table.mounts.is_empty() {
            table.id = None;
        }
        written
    }

    /// Makes a container, its init ready to be started.
    pub fn create_container(&self, request: CreateContainerRequest) -> Outcome<()> {
        let id = request.container_id.clone();
        if request.sandbox_pidns {
            let text = "sandbox_pidns is not supported in this guest";
            return Err(Failure::new(ttrpc::Code::UNIMPLEMENTED, text));
        }
        let spec = request.OCI.into_option();
        let spec = spec.ok_or_else(|| Failure::invalid(format!("container {id} has no spec")))?;
        check_texts(spec.Process.get_or_default())?;
        self.begin(&id)?;
        let made = Container::create(&id, spec, &request.storages);
        let mut table = lock(&self.table);
        table.begun.remove(&id);
        table.containers.insert(id, Arc::new(Mutex::new(made?)));
        Ok(())
    }

    /// Takes the id, which nobody else has then, made or being made.
    fn begin(&self, id: &str) -> Outcome<()> {
        let mut table = lock(&self.table);
        if table.containers.contains_key(id) || table.begun.contains(id) {
            let text = format!("container {id} exists already");
            return Err(Failure::new(ttrpc::Code::ALREADY_EXISTS, text));
        }
        if table.containers.len() + table.begun.len() >= MAX_CONTAINERS {
            let text = format!("{MAX_CONTAINERS} containers exist, no more in one guest");
            return Err(Failure::new(ttrpc::Code::RESOURCE_EXHAUSTED, text));
        }
        table.begun.insert(id.to_string());
        Ok(())
    }

    /// A container by its id.
    pub fn container(&self, id: &str) -> Outcome<Arc<Mutex<Container>>> {
        let found = lock(&self.table).containers.get(id).cloned();
        found.ok_or_else(|| Failure::not_found(format!("no container {id:?} in this guest")))
    }

    /// Lets a container's init go; its program runs when this returns.
    pub fn start_container(&self, id: &str) -> Outcome<()> {
        let container = self.container(id)?;
        let starting = lock(&container).start(id)?;
        starting.wait()
    }

    /// Kills and forgets a container.
    pub fn remove_container(&self, id: &str, within: Duration) -> Outcome<()> {
        let container = self.container(id)?;
        lock(&container).remove(within)?;
        lock(&self.table).containers.remove(id);
        Ok(())
    }

    /// Runs a process in a started container; its program runs when this returns.
    pub fn exec(&self, id: &str, exec_id: &str, process: oci::Process) -> Outcome<()> {
        check_texts(&process)?;
        let container = self.container(id)?;
        let starting = lock(&container).exec(id, exec_id, process)?;
        starting.wait().inspect_err(|_| {
            // One that may still start has no name any more.
            if let Some(process) = lock(&container).processes.remove(exec_id) {
                let _ = process.signal(SIGKILL);
            }
        })
    }

    /// All processes that were started, with the names of their container and their own.
    pub fn started(&self) -> Vec<(String, String, i32)> {
        let containers: Vec<_> = lock(&self.table)
            .containers
            .iter()
            .map(|(id, c)| (id.clone(), Arc::clone(c)))
            .collect();
        let mut all = Vec::new();
        for (id, container) in containers {
            // One in which something is being made is not waited for: it is missing here.
            let Ok(container) = container.try_lock() else { continue };
            let there = sessions(container.cgroup.pids());
            for (name, process) in &container.processes {
                // Of one that has ended, what it left running.
                if process.running() || !process.left_of(&there).is_empty() {
                    all.push((id.clone(), name.clone(), process.pid));
                }
            }
        }
        all
    }

    /// Sends a signal to a process; of one that joined a container and has ended, to what
    /// it left running there.
    pub fn signal(&self, id: &str, exec_id: &str, number: u32) -> Outcome<()> {
        let process = self.process(id, exec_id)?;
        let ended = match process.signal(number) {
            Err(e) if e.code == ttrpc::Code::NOT_FOUND => e,
            done => return done,
        };
        let container = self.container(id)?;
        let there = lock(&container).cgroup.pids();
        let left = process.left_of(&sessions(there));
        let sent = left.into_iter().filter(|pid| process.signal_left(*pid, number));
        match sent.count() {
            0 => Err(ended),
            _ => Ok(()),
        }
    }

    /// A process by container and exec id.
    pub fn process(&self, id: &str, exec_id: &str) -> Outcome<Arc<Process>> {
        let container = self.container(id)?;
        let name = if exec_id.is_empty() { id } else { exec_id };
        let found = lock(&container).processes.get(name).cloned();
        found.ok_or_else(|| Failure::not_found(format!("no process {name:?} in container {id:?}")))
    }
}

/// Refuses what no system call takes: a text would end at its NUL.
fn check_texts(process: &oci::Process) -> Outcome<()> {
    let user = process.User.get_or_default();
    let all = process.Args.iter().map(|t| ("argument", t));
    let all = all.chain(process.Env.iter().map(|t| ("variable", t)));
    let mut all = all.chain([("working directory", &process.Cwd), ("user", &user.Username)]);
    match all.find(|(_, text)| text.contains('\0')) {
        None => Ok(()),
        Some((what, text)) => Err(Failure::invalid(format!("{what} {text:?}: contains a NUL"))),
    }
}

/// Runs `f` on a container.
pub fn with<T>(c: &Arc<Mutex<Container>>, f: impl FnOnce(&Container) -> T) -> T {
    f(&lock(c))
}
