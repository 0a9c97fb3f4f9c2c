//! Kata's own agent, in both of its protocols: [`ttrpc`] since 2.0, [`grpc`]
//! before. The messages are the same but for a few fields (`version_1`).

macro_rules! request {
    ($kind:ident { $($field:ident : $value:expr),* $(,)? }) => {
        $kind { $($field: $value,)* ..$kind::default() }
    };
}

pub mod grpc;
pub mod ttrpc;
mod version_1;

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::seat::{Capabilities, Channel, Seat, Way};
use super::{Error, Outcome};
use crate::hypervisor::qemu::argv::AGENT_PORTS;

/// Deadline of a call that does not wait for a process.
pub const CALL: Duration = Duration::from_secs(30);

/// Deadline of one that starts a process, for which a guest may have to read or
/// translate much: what Kata's runtimes allow.
const START: Duration = Duration::from_secs(60);

/// What an agent has beyond the time that a request allows it.
const ANSWERING: Duration = Duration::from_secs(5);

/// Where vsock's backend listens for QEMU, in the VM's directory.
pub const VHOST_SOCKET: &str = "vsock/vhost.sock";

/// QEMU's end of the serial port of an agent of 1.x, in the VM's directory.
pub const MUX_SOCKET: &str = "kata.sock";

/// What both can have plugged in.
const CAPABILITIES: Capabilities =
    Capabilities { block_devices: true, block_device_hotplug: true, resize: true };

fn share_path(sandbox: &str) -> PathBuf {
    Path::new("/run/kata-containers/shared/sandboxes").join(sandbox)
}

/// The devices of an agent of 2.x or later: vsock, when that is the way, and our
/// own agent's serial ports always.
fn channels(seat: &Seat) -> Vec<Channel> {
    let ports = (0..AGENT_PORTS).map(|i| Channel::Port {
        name: format!("agent.channel.{i}"),
        socket: seat.dir.join(format!("agent.{i}.sock")),
    });
    let vsock = match seat.way {
        Way::Serial => None,
        Way::Vsock(cid) => Some(Channel::Vsock { cid }),
        Way::HybridVsock => Some(Channel::VhostUserVsock { socket: seat.dir.join(VHOST_SOCKET) }),
    };
    ports.chain(vsock).collect()
}

/// The devices of an agent of 1.x.
fn channels_1(seat: &Seat) -> Outcome<Vec<Channel>> {
    match seat.way {
        Way::Serial => Ok(vec![Channel::Port {
            name: "agent.channel.0".into(),
            socket: seat.dir.join(MUX_SOCKET),
        }]),
        Way::Vsock(cid) => Ok(vec![Channel::Vsock { cid }]),
        Way::HybridVsock => Err(Error::Unsupported { call: "configure (vsock in user space)" }),
    }
}
