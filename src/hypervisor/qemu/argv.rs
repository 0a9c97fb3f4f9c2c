//! QEMU's command line: a pure function of the configuration and a VM's names.
//!
//! Devices and their ids are those of Kata's VMs (`pci-bridge-0`, `serial0`,
//! `scsi0`, `rng0`, `dimm1`), so that its clients can add devices later.
//!
//! Source: command lines of cached VMs of Kata 1.13 and 3.20 (tests/fixtures).

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::agent::seat::Channel;
use crate::agent::Kind;
use crate::config::options::{OURS, QEMU};
use crate::config::{Accel, Config, Machine, Transport};

/// Serial ports for the agent: so many clients can talk to one VM at once.
pub const AGENT_PORTS: usize = 4;

/// By what a guest finds the directory that is shared with it: Kata's name.
pub const SHARE_TAG: &str = "kataShared";

/// Where the virtiofsd for it listens, in the VM's directory.
pub const VIRTIOFS_SOCKET: &str = "fs.sock";

/// That directory, in the VM's.
pub const SHARED: &str = "shared";

/// The id of a vsock device in user space.
pub const VSOCK: &str = "vsock0";

/// Where the host's huge pages are had.
pub const HUGEPAGES: &str = "/dev/hugepages";

/// Parameters that every guest's kernel gets; as Kata's.
const KERNEL: &str = "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 i8042.direct=1 \
    i8042.dumbkbd=1 i8042.nopnp=1 i8042.noaux=1 noreplace-smp reboot=k cryptomgr.notests \
    net.ifnames=0 pci=lastbus=0 console=hvc0 console=hvc1";

/// Parameters of our own. Memory that is added holds its own page descriptors, so
/// that a small VM can become a very large one. And no bounce buffers: a guest that
/// may grow past 4 GiB sets 64 MiB aside for them, which virtio never uses.
const OURS_TOO: &str = "memory_hotplug.memmap_on_memory=1 swiotlb=noforce";

/// The processor's own virtualisation, by the names of both makers.
pub const NO_VIRTUALISATION: &str = "vmx=off,svm=off";
/// QEMU's translated processor takes its number of CPUID leaves from svm: without that, a
/// guest does not learn how long its addresses are, and maps memory wrongly.
const TRANSLATED: &str = "min-xlevel=0x8000000a";

/// What is one VM's own on its command line.
pub struct Names<'a> {
    /// The VM's id.
    pub id: &'a str,
    /// Its machine UUID.
    pub uuid: &'a str,
    /// Its directory.
    pub dir: &'a Path,
    /// What it inherits open.
    pub passed: Passed,
    /// The host's memory, MiB: the most to which a guest's can grow.
    pub host_memory: u64,
    /// Where its memory is.
    pub memory: Memory,
    /// By what its agent is reached.
    pub channels: &'a [Channel],
}

/// Numbers of the fds that a QEMU inherits: it makes no socket and connects none itself, and
/// needs no right to the directories that its images are in.
#[derive(Clone, Debug, Default)]
pub struct Passed {
    /// Listening, for its monitor.
    pub monitor: i32,
    /// Listening, for the guest's console.
    pub console: i32,
    /// Listening, for each serial port among the channels, in their order.
    pub ports: Vec<i32>,
    /// The kernel's file; else it is opened by its path.
    pub kernel: Option<i32>,
    /// The initramfs', likewise.
    pub initrd: Option<i32>,
    /// What reserves its vsock address, or is connected to who carries its vsock.
    pub vsock: Option<i32>,
    /// Connected to the virtiofsd that serves its directory.
    pub share: Option<i32>,
}

/// Where a VM's memory is.
///
/// A template's is named by the number of an inherited fd, which stays what it
/// was when the file is replaced, and whose path QEMU still takes for a file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Its own, as the configuration says.
    Own,
    /// In this file, which will be a template's.
    Template(i32),
    /// In this template's file, what it writes copied; its device state comes
    /// later, and of the kernel it needs only the head ([`super::bzimage`]).
    Clone {
        /// The template's file.
        memory: i32,
        /// The kernel's head, where it has one.
        head: Option<i32>,
    },
}

/// A comma in a value is written twice.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The arguments after the executable.
pub fn argv(c: &Config, n: &Names<'_>) -> Vec<OsString> {
    let mut args = Args(Vec::new());
    args.pair("-name", format!("sandbox-{},debug-threads=on", n.id));
    args.pair("-uuid", n.uuid);
    args.pair("-machine", machine(c));
    args.pair("-cpu", cpu(c));
    args.pair("-chardev", listens("charqmp", n.passed.monitor));
    args.pair("-mon", "chardev=charqmp,mode=control");
    let (memory, most) = (u64::from(c.memory()), n.host_memory.max(c.memory().into()));
    args.pair("-m", format!("{memory}M,slots={},maxmem={most}M", c.number(QEMU, "memory_slots")));
    bridges(c, &mut args);
    serial(n, &mut args);
    disks_and_random(c, &mut args);
    vsock(n, &mut args);
    share(c, n, &mut args);
    // Never for shared memory: see `balloon`.
    if n.memory == Memory::Own && c.flag(QEMU, "reclaim_guest_freed_memory") {
        let device = "virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=on";
        args.pair("-device", device);
    }
    args.pair("-device", "vmgenid,guid=auto,id=vmgenid0");
    args.pair("-rtc", "base=utc,driftfix=slew,clock=host");
    if c.accel == Accel::Kvm {
        args.pair("-global", "kvm-pit.lost_tick_policy=discard");
    }
    args.pair("-vga", "none");
    for flag in ["-no-user-config", "-nodefaults", "-nographic", "--no-reboot"] {
        args.one(flag);
    }
    if c.flag(OURS, "sandbox") {
        args.pair(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
    }
    args.pair("-object", backend(c, n));
    args.pair("-numa", "node,memdev=dimm1");
    match n.memory {
        Memory::Clone { head: Some(fd), .. } => args.pair("-kernel", inherited(fd)),
        _ => {
            let image = |fd: Option<i32>, path: PathBuf| fd.map_or(path, |fd| inherited(fd).into());
            args.pair("-kernel", image(n.passed.kernel, c.kernel()));
            args.pair("-initrd", image(n.passed.initrd, c.initrd()));
        }
    }
    args.pair("-append", append(c));
    if !c.text(QEMU, "firmware").is_empty() {
        args.pair("-bios", c.text(QEMU, "firmware"));
    }
    if matches!(n.memory, Memory::Clone { .. }) {
        args.pair("-incoming", "defer");
    }
    let (cpus, most) = (c.cpus(), c.max_cpus());
    args.pair("-smp", format!("{cpus},cores=1,threads=1,sockets={most},maxcpus={most}"));
    args.0
}

struct Args(Vec<OsString>);

impl Args {
    fn one(&mut self, arg: impl Into<OsString>) {
        self.0.push(arg.into());
    }

    fn pair(&mut self, option: &str, value: impl Into<OsString>) {
        self.one(option);
        self.one(value);
    }
}

/// A socket that listens already.
fn listens(id: &str, fd: i32) -> String {
    format!("socket,id={id},fd={fd},server=on,wait=off")
}

/// One that is connected.
fn connected(id: &str, fd: i32) -> String {
    format!("socket,id={id},fd={fd}")
}

fn machine(c: &Config) -> String {
    let accel = match c.accel {
        Accel::Kvm => "kvm",
        Accel::Tcg => "tcg",
    };
    // Devices that nothing here uses; and a guest's memory is in no core file.
    let without = match c.machine {
        Machine::Q35 => "vmport=off,sata=off,smbus=off",
        Machine::Pc => "vmport=off",
    };
    let name = c.machine.name();
    let mut out = format!("{name},accel={accel},dump-guest-core=off,{without}");
    let more = c.text(QEMU, "machine_accelerators").trim_matches(',');
    if !more.is_empty() {
        out.push(',');
        out.push_str(more);
    }
    out
}

fn cpu(c: &Config) -> String {
    let model = match c.accel {
        Accel::Kvm => "host",
        Accel::Tcg => "max",
    };
    let mut out = vec![model];
    out.push(c.text(QEMU, "cpu_features").trim_matches(','));
    if !c.flag(OURS, "nested") {
        // A guest that runs VMs of its own reaches the host kernel's code for that.
        out.push(NO_VIRTUALISATION);
        if c.accel == Accel::Tcg {
            out.push(TRANSLATED);
        }
    }
    out.retain(|part| !part.is_empty());
    out.join(",")
}

fn bridges(c: &Config, args: &mut Args) {
    for i in 0..c.number(QEMU, "default_bridges") {
        let address = 2 + i;
        let chassis = 1 + i;
        args.pair(
            "-device",
            match c.machine {
                Machine::Q35 => format!(
                    "pci-bridge,bus=pcie.0,id=pci-bridge-{i},chassis_nr={chassis},shpc=off,\
                 addr={address},io-reserve=4k,mem-reserve=1m,pref64-reserve=1m"
                ),
                Machine::Pc => format!(
                "pci-bridge,bus=pci.0,id=pci-bridge-{i},chassis_nr={chassis},shpc=on,addr={address}"
            ),
            },
        );
    }
}

/// Console, and the ports on which the agent listens.
fn serial(n: &Names<'_>, args: &mut Args) {
    args.pair("-device", "virtio-serial-pci,id=serial0");
    args.pair("-device", "virtconsole,chardev=charconsole0,id=console0");
    args.pair("-chardev", listens("charconsole0", n.passed.console));
    let ports = n.channels.iter().filter_map(|c| match c {
        Channel::Port { name, .. } => Some(name),
        _ => None,
    });
    for (i, (name, fd)) in ports.zip(&n.passed.ports).enumerate() {
        args.pair("-device", format!("virtserialport,chardev=charch{i},id=channel{i},name={name}"));
        args.pair("-chardev", listens(&format!("charch{i}"), *fd));
    }
}

/// The vsock device, whoever carries it.
fn vsock(n: &Names<'_>, args: &mut Args) {
    for channel in n.channels {
        match (channel, n.passed.vsock) {
            (Channel::Vsock { cid }, Some(fd)) => args.pair(
                "-device",
                format!("vhost-vsock-pci,vhostfd={fd},id=vsock-{cid},guest-cid={cid}"),
            ),
            (Channel::VhostUserVsock { .. }, Some(fd)) => {
                args.pair("-chardev", connected("charvsock0", fd));
                args.pair("-device", format!("vhost-user-vsock-pci,chardev=charvsock0,id={VSOCK}"));
            }
            _ => {}
        }
    }
}

/// The directory that QEMU itself serves to the guest, or a virtiofsd, by Kata's tag.
fn share(c: &Config, n: &Names<'_>, args: &mut Args) {
    if let Some(fd) = n.passed.share {
        args.pair("-chardev", connected("char-virtiofs0", fd));
        let device = format!("vhost-user-fs-pci,chardev=char-virtiofs0,tag={SHARE_TAG}");
        args.pair("-device", device);
    }
    if !c.shares_9p() {
        return;
    }
    let device = format!("virtio-9p-pci,fsdev=extra-9p-{SHARE_TAG},mount_tag={SHARE_TAG}");
    args.pair("-device", device);
    let path = escaped(&n.dir.join(SHARED));
    let fsdev = "security_model=none,multidevs=remap";
    args.pair("-fsdev", format!("local,id=extra-9p-{SHARE_TAG},path={path},{fsdev}"));
}

/// Whether there is a controller on which Kata's clients plug disks; ours need none.
fn has_scsi(c: &Config) -> bool {
    c.text(QEMU, "block_device_driver") == "virtio-scsi" && c.flag(OURS, "kata_calls")
}

fn disks_and_random(c: &Config, args: &mut Args) {
    if has_scsi(c) {
        args.pair("-device", "virtio-scsi-pci,id=scsi0");
    }
    let source = escaped(Path::new(c.text(QEMU, "entropy_source")));
    args.pair("-object", format!("rng-random,id=rng0,filename={source}"));
    args.pair("-device", "virtio-rng-pci,rng=rng0");
}

/// A path to a file that QEMU inherits.
fn inherited(fd: i32) -> String {
    format!("/proc/self/fd/{fd}")
}

fn backend(c: &Config, n: &Names<'_>) -> String {
    let size = c.memory();
    let (file, share) = match n.memory {
        Memory::Own => (None, "on"),
        Memory::Template(fd) => (Some(fd), "on"),
        Memory::Clone { memory, .. } => (Some(memory), "off"),
    };
    if let Some(fd) = file {
        let path = inherited(fd);
        return format!("memory-backend-file,id=dimm1,size={size}M,mem-path={path},share={share}");
    }
    let place =
        if c.flag(QEMU, "enable_hugepages") { HUGEPAGES } else { c.text(QEMU, "file_mem_backend") };
    let mut out = match place {
        "" if c.shared_memory() => format!("memory-backend-memfd,id=dimm1,size={size}M,share=on"),
        "" => format!("memory-backend-ram,id=dimm1,size={size}M"),
        dir => {
            let dir = escaped(Path::new(dir));
            format!("memory-backend-file,id=dimm1,size={size}M,mem-path={dir},share=on")
        }
    };
    if c.flag(QEMU, "enable_mem_prealloc") || c.flag(QEMU, "enable_hugepages") {
        out.push_str(",prealloc=on");
    }
    out
}

fn append(c: &Config) -> String {
    let debug = c.flag(QEMU, "enable_debug");
    let mut out = format!("{KERNEL} {OURS_TOO} {}", if debug { "debug" } else { "quiet" });
    out.push_str(&format!(" panic=1 nr_cpus={}", c.max_cpus()));
    if has_scsi(c) {
        out.push_str(" scsi_mod.scan=none");
    }
    if c.agent_kind == Kind::Kata1 {
        // Else an agent of 1.x looks for vsock first, for seconds.
        let vsock = c.transport() == Transport::Vsock;
        out.push_str(&format!(" agent.use_vsock={vsock}"));
    }
    let more = c.text(QEMU, "kernel_params").trim();
    if !more.is_empty() {
        out.push(' ');
        out.push_str(more);
    }
    out
}

#[cfg(test)]
mod tests;
