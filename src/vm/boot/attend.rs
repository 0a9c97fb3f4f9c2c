//! What stands beside QEMU: the agent's place, and the processes that carry a
//! guest's vsock or the connections to its agent.
//!
//! Invariant: what listens for QEMU is there before QEMU is started; whoever
//! gets an [`Attendant`] owns it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Source;
use crate::agent::address::{Address, HYBRID_SOCKET, VSOCK_DIR};
use crate::agent::seat::{Channel, ProxyCommand, Seat, Way};
use crate::agent::{self, Agent, Kind};
use crate::config::options::{OURS, PROXY, QEMU};
use crate::config::{Config, Transport};
use crate::confine::Confinement;
use crate::hypervisor::qemu::argv::{SHARED, VIRTIOFS_SOCKET};
use crate::process::attendant::{Attendant, Role};
use crate::proto::cache::GrpcVM;
use crate::transport::{vsock, AGENT_PORT};
use crate::vm::attach::share::{listening, virtiofsd};

/// Our program's name.
const OWN: &str = "vmcache";
/// How long one may take to listen.
const LISTENING: Duration = Duration::from_secs(10);
/// The address of every guest whose vsock a process carries: each such process
/// knows one guest only.
const OWN_CID: u32 = 3;

/// An agent that has its place beside a VM to be.
pub struct Seated {
    pub agent: Box<dyn Agent>,
    pub channels: Vec<Channel>,
    /// Its address in the host's kernel, and the file that holds it until QEMU does.
    pub vsock: Option<(u32, File)>,
}

impl Seated {
    pub fn take(config: &Config, dir: &Path) -> Result<Seated, Source> {
        let mut agent = agent::new(config.agent_kind);
        let vsock = match config.transport() {
            Transport::Vsock if config.agent_kind != Kind::Noop => Some(vsock::reserve()?),
            _ => None,
        };
        let way = match (&vsock, config.transport()) {
            (Some((cid, _)), _) => Way::Vsock(*cid),
            (None, Transport::VhostUserVsock) => Way::HybridVsock,
            (None, _) => Way::Serial,
        };
        let mut channels = agent.configure(&Seat { dir: dir.to_path_buf(), way })?;
        if let (Way::HybridVsock, Some((qemus, hosts))) = (way, config.vsock_sockets()) {
            for channel in &mut channels {
                if let Channel::VhostUserVsock { socket } = channel {
                    socket.clone_from(&qemus);
                }
            }
            let url = Address::Hybrid { socket: hosts, port: AGENT_PORT }.to_string();
            agent.set_proxy_from_grpc(&GrpcVM { proxyURL: url, ..GrpcVM::default() })?;
        }
        Ok(Seated { agent, channels, vsock })
    }
}

/// Starts what must listen before QEMU connects to it.
pub fn before_qemu(
    config: &Config,
    channels: &[Channel],
    confinement: &Confinement<'_>,
    leased: bool,
    within: Duration,
) -> Result<Vec<Attendant>, Source> {
    let mut out = Vec::new();
    let dir = confinement.dir;
    for channel in channels {
        let Channel::VhostUserVsock { socket } = channel else { continue };
        if !socket.starts_with(dir) {
            // Somebody else's.
            continue;
        }
        let device = PathBuf::from(config.text(OURS, "vsock_device"));
        let args = [
            "--guest-cid".into(),
            OWN_CID.to_string().into(),
            "--socket".into(),
            socket.into(),
            "--uds-path".into(),
            dir.join(HYBRID_SOCKET).into_os_string(),
        ];
        let cage = confinement.vsock_device(&device, VSOCK_DIR)?;
        let mut device = Attendant::start(Role::Vsock, &device, &args, &[], leased, cage)?;
        listening(&mut device, socket, within.min(LISTENING))?;
        out.push(device);
    }
    if config.shares_virtiofs() {
        let socket = dir.join(VIRTIOFS_SOCKET);
        let cache = match config.text(QEMU, "virtio_fs_cache") {
            "" => "auto",
            given => given,
        };
        let program = PathBuf::from(config.text(QEMU, "virtio_fs_daemon"));
        out.push(virtiofsd(&program, &socket, &dir.join(SHARED), cache, leased, None)?);
    }
    Ok(out)
}

/// vmcache, which this process may be, or may use as a library.
fn own_program() -> Result<PathBuf, Source> {
    let this = std::env::current_exe()?;
    if this.file_name().is_some_and(|n| n == OWN) {
        return Ok(this);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|d| d.join(OWN)).find(|p| p.is_file());
    found
        .ok_or_else(|| "no vmcache in $PATH, whose `proxy` is needed: set [proxy.kata] path".into())
}

/// Waits until a proxy serves.
pub fn await_proxy(
    proxy: &mut Attendant,
    address: &Address,
    within: Duration,
) -> Result<(), Source> {
    match address {
        Address::Proxy(socket) => Ok(listening(proxy, socket, within.min(LISTENING))?),
        _ => Ok(()),
    }
}

/// How the proxy of a VM is started: the one that the configuration names, or ours.
pub fn proxy(config: &Config, id: &str, leased: bool) -> Result<ProxyCommand, Source> {
    let program: PathBuf = match config.text(PROXY, "path") {
        "" => own_program()?,
        path => path.into(),
    };
    let subcommand = program.file_name().is_some_and(|n| n == OWN).then_some("proxy");
    Ok(ProxyCommand {
        program,
        subcommand,
        sandbox: id.to_string(),
        debug: config.flag(PROXY, "enable_debug"),
        leased,
    })
}
