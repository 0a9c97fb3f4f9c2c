//! Commands in a VM: what a claimed VM is for.
//!
//! A [`Guest`] is a VM that is awake, with its agent; [`Guest::spawn`] runs a
//! [`Command`] in it and gives a [`Running`], whose streams are read and
//! written like a local child's.
//!
//! Invariant: dropping a [`Guest`] destroys its VM; [`Guest::keep`] leaves it.

mod attached;
mod command;
mod error;
mod files;
pub mod rehearsal;
mod running;
mod silence;
mod stock;
mod streams;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use serde_derive::{Deserialize, Serialize};

pub use attached::Place;
pub use command::Command;
use error::start_error;
pub use error::Error;
pub use files::{copy_in, copy_out, send_root, stream_in, stream_out, CopyPolicy};
pub use running::{Running, StreamCloser, StreamReader, StreamWriter};
pub use silence::{run_state, RunState};

use attached::Attached;
use silence::Watched;

use crate::agent::{self, Agent, Kind, ListFormat, ProcessId};
use crate::proto::agent::{
    CreateContainerRequest, CreateSandboxRequest, StatsContainerResponse, Storage,
};
use crate::vm::{identity, notes, Vm};

/// Name of the container in which [`Guest::spawn`] runs the first command.
pub const MAIN: &str = "main";
/// Where a root file system from the host is unpacked in the guest.
pub const GUEST_ROOT: &str = "/run/vmcache/rootfs";
/// The guest's own root.
const OWN_ROOT: &str = "/";
/// How long a guest may take to write out its disks, unless there is a hurry.
pub const WRITING_OUT: Duration = Duration::from_secs(120);
/// How long a container whose command has ended may take to go.
const REMOVAL: Duration = Duration::from_secs(10);

/// What later commands need to know of the VM's workload.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Note {
    container: String,
    root: String,
    /// Whether disks are mounted as long as the container exists.
    #[serde(default)]
    disks: bool,
    /// Whether the root is, likewise.
    #[serde(default)]
    layers: bool,
    /// Whether the guest's resolvers are to be seen in that root.
    #[serde(default)]
    resolvers: bool,
}

/// Whether a VM's guest has disks of the host mounted, whose last bytes it may
/// not have written yet: it must then be ended by [`Guest::stop`].
pub fn holds_disks(vm: &Vm) -> bool {
    note(vm).is_some_and(|n| n.disks)
}

fn note(vm: &Vm) -> Option<Note> {
    let (bytes, _) = notes::read(vm.dir(), notes::Kind::Workload)?;
    serde_json::from_slice(&bytes).ok()
}

/// A VM that is awake.
pub struct Guest {
    vm: Vm,
    agent: Arc<dyn Agent>,
    watched: Arc<Watched>,
    fallback: Option<String>,
    attached: Attached,
    sandbox: AtomicBool,
}

impl Guest {
    /// A VM whose agent is connected.
    pub fn new(vm: Vm, agent: Box<dyn Agent>) -> Guest {
        let agent: Arc<dyn Agent> = Arc::from(agent);
        Guest {
            watched: Watched::new(&vm, Arc::clone(&agent)),
            vm,
            agent,
            fallback: None,
            attached: Attached::default(),
            sandbox: AtomicBool::new(false),
        }
    }

    /// The same, with the reason why it is not of the pool, if it is not.
    pub fn because(self, fallback: Option<String>) -> Guest {
        Guest { fallback, ..self }
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Its agent.
    pub fn agent(&self) -> &Arc<dyn Agent> {
        &self.agent
    }

    /// Why it was booted cold instead of taken from the pool, if it was.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// Runs a command in a container of its own.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::NotExecutable`] when the program is the
    /// matter.
    pub fn spawn(&self, command: &Command) -> Result<Running, Error> {
        self.spawn_in(command, MAIN, OWN_ROOT)
    }

    /// The same with the root that [`send_root`] brought into the guest, or
    /// [`Guest::attach_disk`] as [`Place::Root`].
    ///
    /// # Errors
    /// As [`Guest::spawn`].
    pub fn spawn_in_root(&self, command: &Command) -> Result<Running, Error> {
        self.spawn_in(command, MAIN, self.brought_root())
    }

    /// Where a root that was brought along is.
    fn brought_root(&self) -> &'static str {
        match self.vm.own_agent() {
            true => GUEST_ROOT,
            false => stock::ROOT,
        }
    }

    fn spawn_in(&self, command: &Command, container: &str, root: &str) -> Result<Running, Error> {
        let note = Note {
            container: container.to_string(),
            root: root.to_string(),
            disks: self.attached.disks(),
            layers: self.attached.layers(),
            resolvers: self.attached.resolvers() && root != OWN_ROOT,
        };
        self.rooted(&note)?;
        self.start_sandbox()?;
        let bytes = serde_json::to_vec(&note).unwrap_or_default();
        let failed = |source| {
            let path = self.vm.dir().join(notes::Kind::Workload.file());
            Error::Io { during: "write", path, source }
        };
        self.vm.note(notes::Kind::Workload, &bytes).map_err(failed)?;
        self.launch(command, &note, self.attached.storages(root))
    }

    /// Whether a command can run in that root.
    fn rooted(&self, note: &Note) -> Result<(), Error> {
        let katas = !self.vm.own_agent() && self.agent.kind() != Kind::Noop;
        match katas && note.root == OWN_ROOT {
            true => Err(Error::NeedsRoot),
            false => Ok(()),
        }
    }

    /// Sets up what containers share, unless that is done: before anything else, since
    /// Kata's agents forget what was there.
    fn start_sandbox(&self) -> Result<(), Error> {
        // Asked twice, Kata's of 2.x and later would forget what containers they have.
        let katas = !self.vm.own_agent() && note(&self.vm).is_some();
        if katas || self.sandbox.load(Ordering::SeqCst) {
            return Ok(());
        }
        let sandbox = CreateSandboxRequest {
            sandbox_id: self.vm.id().to_string(),
            hostname: identity::host_name(self.vm.id()),
            dns: self.attached.dns(),
            ..CreateSandboxRequest::default()
        };
        match self.watched.call(|agent| agent.start_sandbox(sandbox)) {
            Err(Error::Agent(agent::Error::Refused {
                code: ttrpc::Code::ALREADY_EXISTS, ..
            }))
            | Ok(()) => {
                self.sandbox.store(true, Ordering::SeqCst);
                Ok(())
            }
            failed => failed,
        }
    }

    /// Makes a container as the note says and starts it.
    fn launch(
        &self,
        command: &Command,
        note: &Note,
        storages: Vec<Storage>,
    ) -> Result<Running, Error> {
        command.check()?;
        self.rooted(note)?;
        self.start_sandbox()?;
        let mut spec = command.spec(&note.root, self.vm.memory_mib());
        if note.resolvers {
            spec.Mounts.push(attached::resolvers_mount());
        }
        if !self.vm.own_agent() {
            stock::adapt(&mut spec)?;
        }
        let container = &note.container;
        let request = CreateContainerRequest {
            container_id: container.clone(),
            exec_id: container.clone(),
            storages,
            OCI: Some(spec).into(),
            ..CreateContainerRequest::default()
        };
        let made = self.watched.call(|agent| agent.create_container(request));
        made.map_err(|e| self.start_error(e))?;
        if let Err(e) = self.watched.call(|agent| agent.start_container(container)) {
            let _ = self.remove(container);
            return Err(self.start_error(e));
        }
        let id = ProcessId { container: container.clone(), exec: String::new() };
        Ok(self.running(id, command))
    }

    /// A process that was started.
    fn running(&self, id: ProcessId, command: &Command) -> Running {
        let (agent, terminal) = (Arc::clone(&self.watched), command.is_terminal());
        match self.vm.own_agent() {
            true => Running::new(agent, id, terminal),
            false => Running::forgetful(agent, id, terminal),
        }
    }

    /// Why a process was not started, in the words of the agent that did not.
    fn start_error(&self, e: Error) -> Error {
        match e {
            Error::Agent(e) if self.vm.own_agent() => start_error(e),
            Error::Agent(e) => stock::start_error(e),
            other => other,
        }
    }

    /// Runs a further command: in the VM's running container, or, when there
    /// is none, in a new one with the same root.
    ///
    /// # Errors
    /// As [`Guest::spawn`].
    pub fn exec(&self, command: &Command) -> Result<Running, Error> {
        command.check()?;
        let fresh = identity::uuid().map_err(|source| Error::Io {
            during: "take",
            path: "random bytes".into(),
            source,
        })?;
        let name = format!("exec-{}", &fresh[..8]);
        let Some(note) = note(&self.vm) else { return self.launch_beside(command, &name) };
        let id = ProcessId { container: note.container.clone(), exec: name.clone() };
        let anew = Note { container: name, ..note };
        let mut process = command.process();
        if !self.vm.own_agent() {
            stock::adapt_process(&mut process)?;
        }
        let started = self.watched.call(|agent| agent.exec(&id, process));
        // Its command has ended, or it is gone: the root is still there.
        let gone = match &started {
            Err(Error::Agent(agent::Error::Refused { code, text, .. })) => {
                *code == ttrpc::Code::FAILED_PRECONDITION
                    || *code == ttrpc::Code::NOT_FOUND && text.contains("no container")
            }
            _ => false,
        };
        match started {
            Ok(()) => Ok(self.running(id, command)),
            Err(_) if gone => self.launch(command, &anew, Vec::new()),
            Err(e) => Err(self.start_error(e)),
        }
    }

    /// Makes a container in the guest's own root and starts it.
    pub(crate) fn launch_beside(&self, command: &Command, name: &str) -> Result<Running, Error> {
        let note = Note { container: name.into(), root: OWN_ROOT.into(), ..Note::default() };
        self.launch(command, &note, Vec::new())
    }

    /// Sends a signal, by number, to the first command, or to the one of [`Guest::exec`]
    /// with that name.
    ///
    /// # Errors
    /// [`Error::NoCommand`] when there is none, or it has ended; the agent's.
    pub fn signal(&self, exec: Option<&str>, number: i32) -> Result<(), Error> {
        let number = u32::try_from(number).unwrap_or(0);
        let main = note(&self.vm).map(|n| n.container);
        let of = |container: &str, exec: &str| ProcessId {
            container: container.to_string(),
            exec: exec.to_string(),
        };
        // One that ran beside no other, or after it, has a container of its own.
        let places = match exec {
            None => main.iter().map(|c| of(c, "")).collect::<Vec<_>>(),
            // Which would be a container's own.
            Some("") => Vec::new(),
            Some(name) => {
                main.iter().map(|c| of(c, name)).chain([of(name, "")]).collect::<Vec<_>>()
            }
        };
        for id in places {
            match self.watched.call(|agent| agent.signal_process(&id, number)) {
                Err(Error::Agent(agent::Error::Refused {
                    code: ttrpc::Code::NOT_FOUND, ..
                })) => {}
                done => return done,
            }
        }
        let (vm, exec) = (self.vm.id().to_string(), exec.map(str::to_string));
        Err(Error::NoCommand { vm, exec })
    }

    /// The container of which Kata's agents are asked; ours tells of all the guest
    /// when it is asked of none.
    fn observed(&self) -> String {
        match self.vm.own_agent() {
            true => String::new(),
            false => note(&self.vm).map_or_else(|| MAIN.to_string(), |n| n.container),
        }
    }

    /// What runs in the guest, or in the workload's container where its agent can
    /// not tell of all.
    ///
    /// # Errors
    /// The agent's.
    pub fn list_processes(&self, format: ListFormat, args: &[String]) -> Result<Vec<u8>, Error> {
        self.watched.call(|agent| agent.process_list_container(&self.observed(), format, args))
    }

    /// What they use.
    ///
    /// # Errors
    /// The agent's.
    pub fn stats(&self) -> Result<StatsContainerResponse, Error> {
        self.watched.call(|agent| agent.stats_container(&self.observed()))
    }

    /// Where the workload's root is in the guest.
    pub fn root(&self) -> String {
        note(&self.vm).map_or(OWN_ROOT.to_string(), |n| n.root)
    }

    /// Removes a container whose command has ended.
    ///
    /// # Errors
    /// The agent's.
    pub fn remove(&self, container: &str) -> Result<(), Error> {
        self.watched.call(|agent| agent.stop_container(container, REMOVAL))
    }

    /// Removes the workload's container, if it may go before the VM does: not
    /// when it holds disks or its root, which are then still wanted.
    pub fn tidy(&self) {
        if note(&self.vm).is_some_and(|n| !n.disks && !n.layers) {
            let _ = self.remove(MAIN);
        }
    }

    /// Destroys the VM, once what it wrote to its disks is there, for which it has
    /// so long; dropping this destroys it as a power cut would.
    ///
    /// # Errors
    /// [`Error::Unwritten`]; the VM is gone all the same.
    pub fn stop(self, patience: Duration) -> Result<(), Error> {
        let Some(note) = note(&self.vm).filter(|n| n.disks) else { return Ok(()) };
        self.agent
            .stop_container(&note.container, patience)
            .map_err(|e| Error::Unwritten { text: crate::report::chain(&e) })
    }

    /// Leaves the VM running; whoever knows its id owns it now.
    pub fn keep(self) -> Vm {
        self.vm
    }
}
