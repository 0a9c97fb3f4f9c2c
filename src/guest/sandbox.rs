//! The sandbox: which containers there are, and who may be called what.
//!
//! Invariants: one lock around the table, never held while a process is waited
//! for, read or written; a request names a container and a process, an empty
//! process name is the container's own.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::unistd::sethostname;

use super::container::Container;
use super::failure::{Attempt, Failure, Outcome};
use super::process::Process;
use super::storage;
use crate::proto::agent::{CreateContainerRequest, CreateSandboxRequest};
use crate::proto::oci;

/// Most containers in one guest.
const MAX_CONTAINERS: usize = 1024;

#[derive(Default)]
struct Table {
    id: Option<String>,
    mounts: Vec<PathBuf>,
    containers: HashMap<String, Arc<Mutex<Container>>>,
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

    /// Removes every container and what the sandbox mounted.
    pub fn destroy(&self) -> Outcome<()> {
        let mut table = lock(&self.table);
        let containers: Vec<_> = table.containers.drain().collect();
        for (_, container) in containers {
            lock(&container).remove(Duration::ZERO)?;
        }
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
        if lock(&self.table).containers.len() >= MAX_CONTAINERS {
            let text = format!("{MAX_CONTAINERS} containers exist, no more in one guest");
            return Err(Failure::new(ttrpc::Code::RESOURCE_EXHAUSTED, text));
        }
        let container = Container::create(&id, spec, &request.storages)?;
        lock(&self.table).containers.insert(id, Arc::new(Mutex::new(container)));
        Ok(())
    }

    /// A container by its id.
    pub fn container(&self, id: &str) -> Outcome<Arc<Mutex<Container>>> {
        let found = lock(&self.table).containers.get(id).cloned();
        found.ok_or_else(|| Failure::not_found(format!("no container {id:?} in this guest")))
    }

    /// Lets a container's init go.
    pub fn start_container(&self, id: &str) -> Outcome<()> {
        let container = self.container(id)?;
        let mut guard = lock(&container);
        guard.start(id)
    }

    /// Kills and forgets a container.
    pub fn remove_container(&self, id: &str, within: Duration) -> Outcome<()> {
        let container = self.container(id)?;
        lock(&container).remove(within)?;
        lock(&self.table).containers.remove(id);
        Ok(())
    }

    /// Runs a process in a started container.
    pub fn exec(&self, id: &str, exec_id: &str, process: oci::Process) -> Outcome<()> {
        let container = self.container(id)?;
        let mut guard = lock(&container);
        guard.exec(id, exec_id, process)
    }

    /// A process by container and exec id.
    pub fn process(&self, id: &str, exec_id: &str) -> Outcome<Arc<Process>> {
        let container = self.container(id)?;
        let name = if exec_id.is_empty() { id } else { exec_id };
        let found = lock(&container).processes.get(name).cloned();
        found.ok_or_else(|| Failure::not_found(format!("no process {name:?} in container {id:?}")))
    }
}

/// Runs `f` on a container.
pub fn with<T>(c: &Arc<Mutex<Container>>, f: impl FnOnce(&Container) -> T) -> T {
    f(&lock(c))
}
