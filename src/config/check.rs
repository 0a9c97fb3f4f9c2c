//! Whether the values can work: each alone, together, and with the files that
//! they name.

use std::path::Path;
use std::time::Duration;

use super::logging::Logging;
use super::options::{AGENT, FACTORY, OURS, QEMU};
use super::raw::Raw;
use super::served::Served;
use super::{Accel, Config, Error, Machine, Transport, MAX_POOL, MAX_SOCKET_PATH, QEMU_MIB};
use crate::agent::Kind;
use crate::vm::config::import::contradiction;
use crate::vm::VmConfig;

/// Longest name of a socket in a VM's directory, `/<uuid>/vsock/vsock.sock`.
const VM_FILES: usize = 54;
/// Least memory that a guest is given, MiB.
const MIN_MEMORY: u64 = 64;

impl Config {
    pub(super) fn check(raw: Raw) -> Result<Config, Error> {
        let mut config = Config {
            files: raw.files.clone(),
            warnings: raw.warnings.clone(),
            accel: Accel::Kvm,
            machine: Machine::Q35,
            agent_kind: Kind::Kata,
            boot_timeout: Duration::ZERO,
            boot_parallel: 0,
            pool: 0,
            socket_mode: 0,
            logging: Logging::default(),
            served: None,
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
        let kind = config.text(OURS, "agent").parse::<Kind>();
        config.agent_kind = kind.map_err(|e| config.wrong(OURS, "agent", e.to_string()))?;
        config.agent_kind = match (config.agent_kind, config.text(AGENT, "protocol")) {
            (kind, "ttrpc") => kind,
            (Kind::Kata, "grpc") => Kind::Kata1,
            (_, "grpc") => {
                let why = "is for agent = \"kata\" only";
                return Err(config.wrong(AGENT, "protocol", why));
            }
            _ => return Err(config.wrong(AGENT, "protocol", "must be \"ttrpc\" or \"grpc\"")),
        };
        config.check_numbers()?;
        config.check_paths()?;
        config.check_choices()?;
        config.check_confinement()?;
        config.check_served()?;
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
            0 => (crate::host::cpus() / 2).max(2) as usize,
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

    /// Checks what templates need: their memory is a file of its own in
    /// template_path.
    ///
    /// # Errors
    /// [`Error`], naming file, line and key.
    pub fn check_template(&self) -> Result<(), Error> {
        if !self.text(FACTORY, "template_path").starts_with('/') {
            return Err(self.wrong(FACTORY, "template_path", "must be an absolute path"));
        }
        if matches!(self.agent_kind, Kind::Noop | Kind::Hyperstart) {
            let why = "can not be used with templates: nobody in a clone could make it another \
                       than its template";
            return Err(self.wrong(OURS, "agent", why));
        }
        if self.transport() == Transport::VhostUserVsock {
            let why = "can not be \"vhost-user-vsock\" with templates, whose memory another \
                       process may not share: use \"vsock\" or \"serial\"";
            return Err(self.wrong(OURS, "transport", why));
        }
        for key in ["enable_hugepages", "enable_mem_prealloc"] {
            if self.flag(QEMU, key) {
                let why = "can not be used with enable_template, whose clones share memory: \
                           leave one of the two false";
                return Err(self.wrong(QEMU, key, why));
            }
        }
        if !self.text(QEMU, "file_mem_backend").is_empty() {
            let why = "can not be used with enable_template, which keeps memory in \
                       template_path: leave one of the two out";
            return Err(self.wrong(QEMU, "file_mem_backend", why));
        }
        Ok(())
    }

    fn check_choices(&mut self) -> Result<(), Error> {
        if self.flag(FACTORY, "enable_template") {
            self.check_template()?;
            if self.flag(QEMU, "reclaim_guest_freed_memory") {
                let place = self.place(QEMU, "reclaim_guest_freed_memory");
                let line = format!(
                    "{place}: reclaim_guest_freed_memory has no effect on clones \
                     (enable_template): their memory is their template's"
                );
                self.warnings.push(line);
            }
        }
        if !self.text(QEMU, "image").is_empty() {
            let why = "guests from a disk image are not supported by this version: use initrd";
            return Err(self.wrong(QEMU, "image", why));
        }
        if !["auto", "serial", "vsock", "vhost-user-vsock"].contains(&self.text(OURS, "transport"))
        {
            let why = "must be \"auto\", \"serial\", \"vsock\" or \"vhost-user-vsock\"";
            return Err(self.wrong(OURS, "transport", why));
        }
        if !self.text(OURS, "vsock_sockets").is_empty() {
            let two = self.vsock_sockets().is_some_and(|(a, b)| a.is_absolute() && b.is_absolute());
            if !two {
                let why = "must be two absolute paths with a comma between";
                return Err(self.wrong(OURS, "vsock_sockets", why));
            }
            if self.pool > 1 {
                let why = "serve one VM: set vm_cache_number to 1, or name vsock_device instead";
                return Err(self.wrong(OURS, "vsock_sockets", why));
            }
        }
        match (self.agent_kind, self.transport()) {
            (Kind::Kata1, Transport::VhostUserVsock) => {
                let why = "can not be \"vhost-user-vsock\" for an agent of 1.x: use \"serial\"";
                return Err(self.wrong(OURS, "transport", why));
            }
            (Kind::Hyperstart, Transport::Vsock | Transport::VhostUserVsock) => {
                let why = "must be \"serial\" (or \"auto\") for hyperstart";
                return Err(self.wrong(OURS, "transport", why));
            }
            _ => {}
        }
        let features = self.text(QEMU, "cpu_features");
        let virtualises =
            |f: &str| ["vmx", "svm"].iter().any(|n| f == *n || f == format!("{n}=on"));
        if !self.flag(OURS, "nested") && features.split(',').any(|f| virtualises(f.trim())) {
            let why = "gives guests the processor's own virtualisation: set nested = true in \
                       [vmcache], too, if that is what is wanted";
            return Err(self.wrong(QEMU, "cpu_features", why));
        }
        if !["kata-1", "kata-3"].contains(&self.text(OURS, "wire")) {
            return Err(self.wrong(OURS, "wire", "must be \"kata-1\" or \"kata-3\""));
        }
        let driver = self.text(QEMU, "block_device_driver");
        if !["virtio-scsi", "virtio-blk"].contains(&driver) {
            let why = "must be \"virtio-scsi\" or \"virtio-blk\"";
            return Err(self.wrong(QEMU, "block_device_driver", why));
        }
        let shared = self.text(QEMU, "shared_fs");
        if !["none", "", "virtio-9p", "virtio-fs"].contains(&shared) {
            // Kata's file knows more; nothing here needs them.
            let line = format!(
                "{}: shared_fs = {shared:?}: no directory is shared with guests",
                self.place(QEMU, "shared_fs")
            );
            self.warnings.push(line);
        } else if shared == "virtio-fs" && !self.shares_virtiofs() {
            let line = format!(
                "{}: shared_fs = \"virtio-fs\" has no effect on clones (enable_template)",
                self.place(QEMU, "shared_fs")
            );
            self.warnings.push(line);
        }
        self.logging = Logging::of(self)?;
        Ok(())
    }

    fn check_served(&mut self) -> Result<(), Error> {
        let path = self.text(OURS, "served_config");
        if path.is_empty() {
            return Ok(());
        }
        let wrong = |why: String| self.wrong(OURS, "served_config", why);
        let served = Served::read(Path::new(path)).map_err(wrong)?;
        let told = VmConfig::parse(served.data.as_bytes()).map_err(|e| wrong(e.to_string()))?;
        // Before it is set, what is derived is what is booted.
        if let Some(what) = contradiction(&told, &VmConfig::of(self)) {
            return Err(wrong(format!("{what}: import it again, or change the one or the other")));
        }
        self.served = Some(std::sync::Arc::new(served));
        Ok(())
    }

    /// Whether this host has what a server of this configuration needs.
    ///
    /// # Errors
    /// As [`Config::check_files`], and when such a pool can never fit.
    pub fn check_host(&self) -> Result<(), Error> {
        self.check_files()?;
        self.check_confinable()?;
        self.check_room()
    }

    /// Whether this host can ever hold such a pool.
    ///
    /// # Errors
    /// With the sum.
    pub fn check_room(&self) -> Result<(), Error> {
        let (n, guest) = (self.pool as u64, u64::from(self.memory()));
        let huge = self.flag(QEMU, "enable_hugepages");
        // Clones share what they have not written, which is most.
        let (each, once) = match self.flag(FACTORY, "enable_template") {
            // In its directory, and sealed, for clones to map.
            true => (QEMU_MIB, 2 * guest),
            false if huge => (QEMU_MIB, 0),
            false => (guest + QEMU_MIB, 0),
        };
        let (need, have) = (n * each + once, crate::host::memory_mib());
        let sum = match once {
            0 => format!("{n} VMs of {each} MiB are {need} MiB"),
            once => format!("{n} clones of {each} MiB and a template of {once} are {need} MiB"),
        };
        if have > 0 && need > have {
            let why = format!("{sum}, and this host has {have} MiB: make it smaller");
            return Err(self.wrong(FACTORY, "vm_cache_number", why));
        }
        let (need, have) = (n * guest, crate::host::huge_mib());
        if huge && need > have {
            let why = format!(
                "{n} VMs of {guest} MiB are {need} MiB of huge pages, and this host has {have} \
                 MiB of them: set vm.nr_hugepages higher, or make the pool smaller"
            );
            return Err(self.wrong(FACTORY, "vm_cache_number", why));
        }
        Ok(())
    }
}
