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

mod find;
pub mod options;
mod raw;
mod show;

use std::error;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use find::{locate, SEARCH};
use options::{Fallback, AGENT, FACTORY, OURS, QEMU};
use raw::{Raw, Value};
pub use show::{markdown, show};

/// Longest path of a Unix socket, without the ending zero.
pub const MAX_SOCKET_PATH: usize = 107;
/// Longest name of a file in a VM's directory, `<uuid>/agent.3.sock`, with slashes.
const VM_FILES: usize = 51;
/// Least memory that a guest is given, MiB.
const MIN_MEMORY: u64 = 64;
/// Most VMs in one pool.
pub const MAX_POOL: u64 = 4096;

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

/// What is wrong with a configuration.
#[derive(Debug)]
pub enum Error {
    /// No file was found where one is looked for.
    NotFound { tried: Vec<PathBuf> },
    /// A file could not be read.
    Read { file: PathBuf, source: io::Error },
    /// Not TOML.
    Syntax { place: Place, why: String },
    /// A value of the wrong type.
    Type { place: Place, key: String, found: String, wanted: &'static str },
    /// A key in our table that does not exist.
    UnknownKey { place: Place, key: String },
    /// A value that can not be.
    Value { place: Place, key: &'static str, value: String, why: String },
    /// A file that a value names is missing or of the wrong kind.
    File { place: Place, key: &'static str, path: PathBuf, why: String },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::NotFound { tried } => {
                let list: Vec<_> = tried.iter().map(|p| p.display().to_string()).collect();
                write!(
                    f,
                    "no configuration file: none of {} exists; write one, or name it with --config",
                    list.join(", ")
                )
            }
            Error::Read { file, .. } => write!(f, "read configuration {}", file.display()),
            Error::Syntax { place, why } => write!(f, "{place}: not valid TOML: {why}"),
            Error::Type { place, key, found, wanted } => {
                write!(f, "{place}: {key} is {found}, but must be {wanted}")
            }
            Error::UnknownKey { place, key } => write!(
                f,
                "{place}: {key} is not an option; `vmcache config show` lists those there are"
            ),
            Error::Value { place, key, value, why } => {
                write!(f, "{place}: {key} = {value}: {why}")
            }
            Error::File { place, key, path, why } => {
                write!(f, "{place}: {key} = {:?}: {why}", path.display().to_string())
            }
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Read { source, .. } => Some(source),
            _ => None,
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
    /// Until a VM is ready or has failed.
    pub boot_timeout: Duration,
    /// VMs made at the same time.
    pub boot_parallel: usize,
    /// VMs kept ready.
    pub pool: usize,
    /// Permissions of the server's socket.
    pub socket_mode: u32,
    /// Log level.
    pub log_level: log::LevelFilter,
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

    fn check(raw: Raw) -> Result<Config, Error> {
        let mut config = Config {
            files: raw.files.clone(),
            warnings: raw.warnings.clone(),
            accel: Accel::Kvm,
            machine: Machine::Q35,
            boot_timeout: Duration::ZERO,
            boot_parallel: 0,
            pool: 0,
            socket_mode: 0,
            log_level: log::LevelFilter::Info,
            raw: std::sync::Arc::new(raw),
        };
        config.accel = match config.text(OURS, "accel") {
            "kvm" => Accel::Kvm,
            "tcg" => Accel::Tcg,
            _ => return Err(config.wrong(OURS, "accel", "must be \"kvm\" or \"tcg\"")),
        };
        config.machine = match config.text(QEMU, "machine_type") {
            "q35" => Machine::Q35,
            "pc" => Machine::Pc,
            _ => return Err(config.wrong(QEMU, "machine_type", "must be \"q35\" or \"pc\"")),
        };
        config.check_numbers()?;
        config.check_paths()?;
        config.check_choices()?;
        Ok(config)
    }

    fn check_numbers(&mut self) -> Result<(), Error> {
        let memory = self.number(QEMU, "default_memory");
        if !(MIN_MEMORY..=4 * 1024 * 1024).contains(&memory) {
            let why = format!("a guest needs at least {MIN_MEMORY} MiB (and at most 4 TiB)");
            return Err(self.wrong(QEMU, "default_memory", why));
        }
        let (cpus, most) = (self.number(QEMU, "default_vcpus"), self.max_cpus());
        if cpus == 0 || cpus > u64::from(most) {
            let why = format!("must be 1 to default_maxvcpus, which is {most} here");
            return Err(self.wrong(QEMU, "default_vcpus", why));
        }
        let pool = self.number(FACTORY, "vm_cache_number");
        if pool > MAX_POOL {
            let why = format!("must be at most {MAX_POOL}");
            return Err(self.wrong(FACTORY, "vm_cache_number", why));
        }
        self.pool = pool as usize;
        let timeout = self.number(OURS, "boot_timeout");
        if !(1..=3600).contains(&timeout) {
            return Err(self.wrong(OURS, "boot_timeout", "must be 1 to 3600 seconds"));
        }
        self.boot_timeout = Duration::from_secs(timeout);
        let parallel = self.number(OURS, "boot_parallel");
        if parallel > 256 {
            return Err(self.wrong(OURS, "boot_parallel", "must be at most 256"));
        }
        self.boot_parallel = match parallel {
            0 => (host_cpus() / 2).max(2) as usize,
            n => n as usize,
        };
        if self.number(QEMU, "memory_slots") > 255 {
            return Err(self.wrong(QEMU, "memory_slots", "must be at most 255"));
        }
        if self.number(QEMU, "default_bridges") > 5 {
            return Err(self.wrong(QEMU, "default_bridges", "must be at most 5"));
        }
        Ok(())
    }

    fn check_paths(&mut self) -> Result<(), Error> {
        let endpoint = self.text(FACTORY, "vm_cache_endpoint").to_string();
        if endpoint.len() > MAX_SOCKET_PATH {
            let why = format!(
                "{} bytes, but the path of a socket can have {MAX_SOCKET_PATH}: choose a shorter one",
                endpoint.len()
            );
            return Err(self.wrong(FACTORY, "vm_cache_endpoint", why));
        }
        let store = self.text(OURS, "vm_store_path").to_string();
        if store.len() + VM_FILES > MAX_SOCKET_PATH {
            let most = MAX_SOCKET_PATH - VM_FILES;
            let why = format!(
                "{} bytes, but VMs' sockets below it leave only {most}: choose a shorter one",
                store.len()
            );
            return Err(self.wrong(OURS, "vm_store_path", why));
        }
        for (table, key) in [(FACTORY, "vm_cache_endpoint"), (OURS, "vm_store_path")] {
            if !self.text(table, key).starts_with('/') {
                return Err(self.wrong(table, key, "must be an absolute path"));
            }
        }
        let mode = self.text(OURS, "socket_mode").to_string();
        let digits = mode.trim_start_matches("0o");
        self.socket_mode = u32::from_str_radix(digits, 8)
            .ok()
            .filter(|m| *m <= 0o777)
            .ok_or_else(|| self.wrong(OURS, "socket_mode", "must be octal, such as \"0660\""))?;
        Ok(())
    }

    fn check_choices(&mut self) -> Result<(), Error> {
        if self.flag(FACTORY, "enable_template") {
            let why = "templates are not supported by this version: leave it false";
            return Err(self.wrong(FACTORY, "enable_template", why));
        }
        if !self.text(QEMU, "image").is_empty() {
            let why = "guests from a disk image are not supported by this version: use initrd";
            return Err(self.wrong(QEMU, "image", why));
        }
        if !["auto", "serial"].contains(&self.text(OURS, "transport")) {
            let why = "must be \"auto\" or \"serial\" in this version";
            return Err(self.wrong(OURS, "transport", why));
        }
        let driver = self.text(QEMU, "block_device_driver");
        if !["virtio-scsi", "virtio-blk"].contains(&driver) {
            let why = "must be \"virtio-scsi\" or \"virtio-blk\"";
            return Err(self.wrong(QEMU, "block_device_driver", why));
        }
        let shared = self.text(QEMU, "shared_fs");
        if !["none", ""].contains(&shared) {
            // Kata's file names virtio-fs or 9p; nothing here needs it.
            let line = format!(
                "{}: shared_fs = {shared:?}: no directory is shared with guests",
                self.place(QEMU, "shared_fs")
            );
            self.warnings.push(line);
        }
        self.log_level = self
            .text(OURS, "log_level")
            .parse()
            .map_err(|_| self.wrong(OURS, "log_level", "must be error, warn, info, debug or trace"))?;
        Ok(())
    }

    /// Checks that the files that VMs are made from exist and are what they should be.
    ///
    /// # Errors
    /// [`Error::File`] for the first that is not.
    pub fn check_files(&self) -> Result<(), Error> {
        let wrong = |table, key, path: &Path, why: String| Error::File {
            place: self.place(table, key),
            key,
            path: path.to_path_buf(),
            why,
        };
        let qemu = self.qemu();
        let found = std::fs::metadata(&qemu).map_err(|e| {
            let why = format!("{e}; install QEMU (Debian: qemu-system-x86) or set its path");
            wrong(QEMU, "path", &qemu, why)
        })?;
        if !found.is_file() {
            return Err(wrong(QEMU, "path", &qemu, "is no file".to_string()));
        }
        let (kernel, initrd) = (self.kernel(), self.initrd());
        let head = head_of(&kernel).map_err(|e| {
            wrong(QEMU, "kernel", &kernel, format!("{e}; name the guest's kernel"))
        })?;
        if head.get(0x202..0x206) != Some(b"HdrS") && !head.starts_with(b"\x7fELF") {
            let why = "is no Linux kernel (neither bzImage nor ELF)".to_string();
            return Err(wrong(QEMU, "kernel", &kernel, why));
        }
        if initrd.as_os_str().is_empty() {
            let why = "is not set; `vmcache mkinitrd` makes one".to_string();
            return Err(wrong(QEMU, "initrd", &initrd, why));
        }
        let head = head_of(&initrd).map_err(|e| {
            wrong(QEMU, "initrd", &initrd, format!("{e}; `vmcache mkinitrd` makes one"))
        })?;
        let archives: [&[u8]; 8] = [
            b"070701", b"070702", b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18",
            b"BZh", b"\x5d\x00\x00",
        ];
        if !archives.iter().any(|magic| head.starts_with(magic)) {
            let why = "is no initramfs (no cpio archive, compressed or not); \
                       `vmcache mkinitrd` makes one"
                .to_string();
            return Err(wrong(QEMU, "initrd", &initrd, why));
        }
        Ok(())
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
        match options::find(table, key).map(|o| o.default) {
            Some(Fallback::Text(t)) => Value::Text(t.to_string()),
            Some(Fallback::Number(n)) => Value::Number(n),
            Some(Fallback::Flag(b)) => Value::Flag(b),
            Some(Fallback::List(l)) => Value::List(l.iter().map(|s| s.to_string()).collect()),
            None => Value::Text(String::new()),
        }
    }

    fn wrong(&self, table: &str, key: &'static str, why: impl Into<String>) -> Error {
        let value = show::literal(&self.value(table, key));
        Error::Value { place: self.place(table, key), key, value, why: why.into() }
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

    /// Most CPUs that a VM can have; QEMU and the kernel must know it at boot.
    pub fn max_cpus(&self) -> u32 {
        // What QEMU's machines take without an IOMMU.
        let limit = 240;
        match self.number(QEMU, "default_maxvcpus").min(limit) as u32 {
            0 => host_cpus().min(limit as u32),
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

fn head_of(path: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(path)?.take(1024).read_to_end(&mut head)?;
    Ok(head)
}

/// Processors of this host.
pub fn host_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

#[cfg(test)]
mod tests;
