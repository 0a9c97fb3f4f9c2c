//! The configuration: Kata's file and names, plus a table of ours.
//!
//! ```text
//! files ─► raw (values with file and line) ─► Config (checked) ─► VmConfig (wire)
//! ```
//!
//! Invariants: a [`Config`] that exists is consistent in itself; every error
//! names file, line, key, value and remedy. Whether the files that it names
//! exist is checked apart ([`Config::check_files`]), since a client may use a
//! configuration whose kernel only the server can read.

mod check;
mod confinement;
mod error;
mod find;
pub mod logging;
pub mod options;
pub mod paths;
mod raw;
pub mod sample;
pub mod served;
mod show;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::agent::Kind;
pub use error::Error;
pub use find::{locate, SEARCH};
use options::{Fallback, AGENT, FACTORY, OURS, QEMU};
pub use raw::endpoint_alone;
use raw::{Raw, Value};
pub use sample::sample;
pub use show::{markdown, show};

/// Longest path of a Unix socket, without the ending zero.
pub const MAX_SOCKET_PATH: usize = 107;
/// Most VMs in one pool.
pub const MAX_POOL: u64 = 4096;
/// What is set aside for a QEMU beside its guest's memory, MiB.
pub const QEMU_MIB: u64 = 64;

/// A file and a line in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; 0 for a default that stands in no file.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "built-in default"),
            line => write!(f, "{}:{line}", self.file.display()),
        }
    }
}

/// How guests' instructions are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// By QEMU's translator.
    Tcg,
}

/// QEMU's machine types that VMs can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// PCI Express.
    Q35,
    /// Classic PCI.
    Pc,
}

/// How an agent is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// By virtio serial ports.
    Serial,
    /// By the host kernel's vsock.
    Vsock,
    /// By vsock that a process of the host carries.
    VhostUserVsock,
}

impl Machine {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Machine::Q35 => "q35",
            Machine::Pc => "pc",
        }
    }
}

/// A checked configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// The files it came from.
    pub files: Vec<PathBuf>,
    /// Lines for the log.
    pub warnings: Vec<String>,
    /// How guests are executed.
    pub accel: Accel,
    /// Machine type.
    pub machine: Machine,
    /// Which agent guests have.
    pub agent_kind: Kind,
    /// Until a VM is ready or has failed.
    pub boot_timeout: Duration,
    /// VMs made at the same time.
    pub boot_parallel: usize,
    /// VMs kept ready.
    pub pool: usize,
    /// Permissions of the server's socket.
    pub socket_mode: u32,
    /// Messages.
    pub logging: logging::Logging,
    /// What clients are told instead of what is derived.
    pub served: Option<std::sync::Arc<served::Served>>,
    raw: std::sync::Arc<Raw>,
}

impl Config {
    /// Reads the file that `--config`, `$VMCACHE_CONFIG` or the usual places name.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn load(given: Option<&Path>) -> Result<Config, Error> {
        Config::read(&locate(given)?)
    }

    /// Reads a file and its drop-ins.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn read(file: &Path) -> Result<Config, Error> {
        Config::check(Raw::read(file)?)
    }

    /// A configuration from text, as if it stood in `file`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn parse(file: &Path, text: &str) -> Result<Config, Error> {
        let mut raw = Raw::default();
        raw.add_text(file, text)?;
        raw.files.push(file.to_path_buf());
        Config::check(raw)
    }

    /// Where an option's value stands.
    pub fn place(&self, table: &str, key: &str) -> Place {
        let entry = self.raw.entries.get(&(table.to_string(), key.to_string()));
        entry.map_or(Place { file: PathBuf::new(), line: 0 }, |e| e.place.clone())
    }

    fn value(&self, table: &str, key: &str) -> Value {
        if let Some(entry) = self.raw.entries.get(&(table.to_string(), key.to_string())) {
            return entry.value.clone();
        }
        let default = options::find(table, key).map_or(Fallback::Text(""), |o| o.default);
        Value::of(default)
    }

    /// An error about an option's value.
    pub fn wrong(&self, table: &str, key: &'static str, why: impl Into<String>) -> Error {
        let value = show::literal(&self.value(table, key));
        Error::Value { place: self.place(table, key), key, value, why: why.into() }
    }

    /// An option as TOML writes it.
    pub fn literal(&self, table: &str, key: &str) -> String {
        show::literal(&self.value(table, key))
    }

    /// A text option.
    pub fn text(&self, table: &str, key: &str) -> &str {
        let entry = self.raw.entries.get(&(table.to_string(), key.to_string()));
        match (entry.map(|e| &e.value), options::find(table, key).map(|o| o.default)) {
            (Some(Value::Text(t)), _) => t,
            (None, Some(Fallback::Text(t))) => t,
            _ => "",
        }
    }

    /// A number option.
    pub fn number(&self, table: &str, key: &str) -> u64 {
        match self.value(table, key) {
            Value::Number(n) => n,
            _ => 0,
        }
    }

    /// A true-or-false option.
    pub fn flag(&self, table: &str, key: &str) -> bool {
        self.value(table, key) == Value::Flag(true)
    }

    /// A list option.
    pub fn list(&self, table: &str, key: &str) -> Vec<String> {
        match self.value(table, key) {
            Value::List(l) => l,
            _ => Vec::new(),
        }
    }

    /// Whether an option stands in a file.
    pub fn given(&self, table: &str, key: &str) -> bool {
        self.raw.entries.contains_key(&(table.to_string(), key.to_string()))
    }

    /// QEMU's executable.
    pub fn qemu(&self) -> PathBuf {
        self.text(QEMU, "path").into()
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.text(QEMU, "kernel").into()
    }

    /// The guest's initramfs.
    pub fn initrd(&self) -> PathBuf {
        self.text(QEMU, "initrd").into()
    }

    /// The server's socket.
    pub fn endpoint(&self) -> PathBuf {
        self.text(FACTORY, "vm_cache_endpoint").into()
    }

    /// Where VMs' directories are made.
    pub fn store(&self) -> PathBuf {
        self.text(OURS, "vm_store_path").into()
    }

    /// CPUs of a base VM.
    pub fn cpus(&self) -> u32 {
        self.number(QEMU, "default_vcpus") as u32
    }

    /// Memory of a base VM, MiB.
    pub fn memory(&self) -> u32 {
        self.number(QEMU, "default_memory") as u32
    }

    /// Whether VMs that wait in the pool are paused.
    pub fn pause_idle(&self) -> bool {
        self.flag(OURS, "pause_idle")
    }

    /// How the agent is reached.
    pub fn transport(&self) -> Transport {
        match self.text(OURS, "transport") {
            "vsock" => Transport::Vsock,
            "vhost-user-vsock" => Transport::VhostUserVsock,
            // What a file of Kata 1.x says holds for its agents.
            "auto" if self.agent_kind == Kind::Kata1 && self.flag(QEMU, "use_vsock") => {
                match Path::new(crate::transport::vsock::DEVICE).exists() {
                    true => Transport::Vsock,
                    false => Transport::Serial,
                }
            }
            // Our agent answers on all, and only its serial ports are private.
            _ => Transport::Serial,
        }
    }

    /// The sockets of a vsock device that somebody else has started: QEMU's, and the
    /// host's.
    pub fn vsock_sockets(&self) -> Option<(PathBuf, PathBuf)> {
        let (qemus, hosts) = self.text(OURS, "vsock_sockets").split_once(',')?;
        Some((qemus.trim().into(), hosts.trim().into()))
    }

    /// Whether QEMU serves a directory of the host to each guest.
    pub fn shares_9p(&self) -> bool {
        self.text(QEMU, "shared_fs") == "virtio-9p"
    }

    /// Whether a virtiofsd serves a directory of the host to each guest. Not to
    /// clones, whose memory it could not share.
    pub fn shares_virtiofs(&self) -> bool {
        self.text(QEMU, "shared_fs") == "virtio-fs" && !self.flag(FACTORY, "enable_template")
    }

    /// Whether processes beside QEMU must see a guest's memory.
    pub fn shared_memory(&self) -> bool {
        self.shares_virtiofs() || self.transport() == Transport::VhostUserVsock
    }

    /// Most CPUs that a VM can have; QEMU and the kernel must know it at boot.
    pub fn max_cpus(&self) -> u32 {
        // What QEMU's machines take without an IOMMU.
        let limit = 240;
        match self.number(QEMU, "default_maxvcpus").min(limit) as u32 {
            0 => crate::host::cpus().min(limit as u32),
            n => n,
        }
    }

    /// Parameters of the agent, as the wire format's AgentConfig needs them.
    pub fn agent(&self) -> (bool, Vec<String>) {
        (self.flag(AGENT, "enable_debug"), self.list(AGENT, "kernel_modules"))
    }

    /// The same configuration with other CPUs and memory, for a cold VM of a
    /// size that the pool's are not.
    ///
    /// # Errors
    /// When the size can not be.
    pub fn resized(&self, cpus: Option<u32>, memory: Option<u32>) -> Result<Config, Error> {
        let cpus = cpus.map(|n| (QEMU, "default_vcpus", Value::Number(n.into())));
        let memory = memory.map(|n| (QEMU, "default_memory", Value::Number(n.into())));
        self.changed(cpus.into_iter().chain(memory))
    }

    /// The same configuration with guests giving back what memory they do not use,
    /// or not.
    ///
    /// # Errors
    /// None that the value can cause.
    pub fn giving_back(&self, yes: bool) -> Result<Config, Error> {
        self.changed([(QEMU, "reclaim_guest_freed_memory", Value::Flag(yes))].into_iter())
    }

    /// The same configuration for another socket.
    ///
    /// # Errors
    /// When the path can not be.
    pub fn at_endpoint(&self, endpoint: &Path) -> Result<Config, Error> {
        let value = Value::Text(endpoint.display().to_string());
        self.changed([(FACTORY, "vm_cache_endpoint", value)].into_iter())
    }

    /// The same configuration with some options from the command line.
    fn changed(
        &self,
        changes: impl Iterator<Item = (&'static str, &'static str, Value)>,
    ) -> Result<Config, Error> {
        let mut raw = Raw {
            files: self.raw.files.clone(),
            entries: self.raw.entries.clone(),
            warnings: self.raw.warnings.clone(),
        };
        let place = Place { file: "command line".into(), line: 1 };
        for (table, key, value) in changes {
            let entry = raw::Entry { value, place: place.clone() };
            raw.entries.insert((table.to_string(), key.to_string()), entry);
        }
        Config::check(raw)
    }
}

#[cfg(test)]
mod tests;
