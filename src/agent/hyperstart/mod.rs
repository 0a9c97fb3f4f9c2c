//! hyperstart: the agent of runV and of Kata's beginnings, on two serial ports.
//!
//! Invariants: what it can not do is [`Error::Unsupported`] (Kata's own agent for
//! it said "done"); a container is remembered here between its creation and its
//! start, which hyperstart has no two words for.
//!
//! Nothing is sent of which a guest is known to die: a second STARTPOD, a host name
//! that is too long, a container's name while it is in use, REMOVECONTAINER.
//!
//! Does not: reseed or set the clock, which hyperstart can not; so no clones. Nor
//! survive what hyperstart does not: a process with a user or directory that is
//! not there, and a client that is killed in the middle of a message.
//!
//! Source: hyperstart 1.1.0 (API 4244); channel and socket names of Kata's
//! hyperstart agent.

pub mod frames;
pub mod messages;
pub mod session;

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_derive::{Deserialize, Serialize};
use serde_json::{json, Value};
use ttrpc::Code as Status;

use super::address::Address;
use super::kata::CALL;
use super::link::{Link, Slot};
use super::seat::{self, Capabilities, Channel, Seat};
use super::{Agent, Error, Kind, ListFormat, Outcome, ProcessId, Stream};
use crate::proto::agent::*;
use crate::proto::oci::{LinuxResources, Process};
use crate::proto::types::{Interface, Route};
use crate::transport;
use frames::{Code, API};
use messages::{GUEST, INIT};
use session::{Key, Session};

/// Containers that are remembered until they are started.
const MAX_CREATED: usize = 64;
/// Bytes of standard input that hyperstart keeps for a process; more are lost.
const STDIN: usize = 512;
/// A terminal's end of input.
const END_OF_INPUT: u8 = 4;

/// The AgentConfig of Kata's VmConfig for this agent: where QEMU's two sockets
/// are; relative names, or none, are in the VM's directory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HyperConfig {
    /// The control channel's.
    #[serde(rename = "SockCtlName")]
    pub control: String,
    /// The stream channel's.
    #[serde(rename = "SockTtyName")]
    pub stream: String,
}

impl HyperConfig {
    fn sockets(&self, dir: &Path) -> (PathBuf, PathBuf) {
        let name =
            |given: &str, default: &str| dir.join(if given.is_empty() { default } else { given });
        (name(&self.control, "hyper.sock"), name(&self.stream, "tty.sock"))
    }
}

/// The agent.
pub struct Hyperstart {
    address: Address,
    config: HyperConfig,
    slot: Slot<Session>,
    created: Mutex<HashMap<String, CreateContainerRequest>>,
    sandbox: AtomicBool,
}

fn no<T>(call: &'static str) -> Outcome<T> {
    Err(Error::Unsupported { call })
}

fn failed(call: &'static str, e: session::Error) -> Error {
    match e {
        session::Error::Broken(text) if ["ExecProcess", "StartContainer"].contains(&call) => {
            let text = format!(
                "{text}; hyperstart ends when a process's user or directory does not exist"
            );
            Error::Call { call, text }
        }
        session::Error::Broken(text) => Error::Call { call, text },
        refused => Error::Refused { call, code: Status::UNKNOWN, text: refused.to_string() },
    }
}

fn key(id: &ProcessId) -> Key {
    let process = if id.exec.is_empty() { INIT } else { &id.exec };
    Key { container: id.container.clone(), process: process.into() }
}

impl Hyperstart {
    /// The one at an address.
    pub fn at(address: Address) -> Hyperstart {
        let config = HyperConfig::default();
        Hyperstart {
            address,
            config,
            slot: Slot::empty(),
            created: Mutex::default(),
            sandbox: AtomicBool::new(false),
        }
    }

    /// One that is connected already, at an address that leads nowhere.
    pub(crate) fn over(control: UnixStream, stream: UnixStream) -> Outcome<Hyperstart> {
        let agent = Hyperstart::at(Address::Hyperstart(PathBuf::from("/nonexistent")));
        let session = Session::over(control, stream).map_err(|e| Error::Host {
            during: "serve hyperstart's channels",
            source: std::io::Error::other(e),
        })?;
        agent.slot.put(Arc::new(session));
        Ok(agent)
    }

    fn created(&self) -> MutexGuard<'_, HashMap<String, CreateContainerRequest>> {
        self.created.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn open(&self, within: Duration, booting: bool) -> Outcome<Session> {
        let Address::Hyperstart(dir) = &self.address else {
            let why = "no hyperstart is there".into();
            return Err(Error::Address { url: self.address.to_string(), why });
        };
        let (control, stream) = self.config.sockets(dir);
        let opened = Session::open(&control, &stream, within, booting);
        let session = opened.map_err(|source| Error::Connect { source })?;
        let version = session.call(Code::GetVersion, &[], within);
        let version = version.map_err(|e| failed("GETVERSION", e))?;
        match <[u8; 4]>::try_from(version).map(u32::from_be_bytes) {
            Ok(API) => Ok(session),
            other => {
                let said = other.map_or("no number".to_string(), |n| n.to_string());
                let what = format!("hyperstart's API is {said}; {API} is needed");
                Err(Error::Connect { source: transport::Error::Guest { what } })
            }
        }
    }

    fn link(&self) -> Outcome<Arc<Session>> {
        self.slot.get(|| self.open(CALL, false))
    }

    fn command(&self, call: &'static str, code: Code, payload: &Value) -> Outcome<Vec<u8>> {
        let bytes = match payload {
            Value::Null => Vec::new(),
            other => other.to_string().into_bytes(),
        };
        self.link()?.call(code, &bytes, CALL).map_err(|e| failed(call, e))
    }

    fn power_off(&self) -> Outcome<()> {
        match self.command("DestroySandbox", Code::DestroyPod, &Value::Null) {
            Err(Error::Call { text, .. }) if text.contains("channel ended") => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Starts a process with its streams announced; undoes that when it fails.
    fn launch(
        &self,
        call: &'static str,
        id: &ProcessId,
        process: &Process,
        message: impl FnOnce(Value) -> Outcome<(Code, Value)>,
    ) -> Outcome<()> {
        let link = self.link()?;
        let key = key(id);
        let streams = link.announce(key.clone(), process.Terminal).map_err(|e| failed(call, e))?;
        let sent = messages::process(&key.process, process, streams)
            .and_then(message)
            .and_then(|(code, json)| self.command(call, code, &json));
        if sent.is_err() {
            link.forget(&key);
        }
        sent.map(|_| ())
    }

    fn read(
        &self,
        call: &'static str,
        id: &ProcessId,
        which: Stream,
        max: u32,
    ) -> Outcome<Vec<u8>> {
        let link = self.link()?;
        let key = key(id);
        let sequences = link.sequences(&key).ok_or_else(|| missing(call, id))?;
        let sequence = match which {
            Stream::Out => sequences.stdio,
            Stream::Err => sequences.stderr,
        };
        link.read(&key, sequence, max as usize).map_err(|e| failed(call, e))
    }
}

fn missing(call: &'static str, id: &ProcessId) -> Error {
    let text = format!("no process {:?} in container {:?}", id.exec, id.container);
    Error::Refused { call, code: Status::NOT_FOUND, text }
}

mod calls;
#[cfg(test)]
mod tests;
