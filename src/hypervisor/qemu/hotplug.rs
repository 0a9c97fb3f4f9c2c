//! CPUs and memory that a running VM gets, over QMP.
//!
//! Invariants: nothing counts as added before the guest's kernel has said, by
//! ACPI's _OST, that it took it; every wait has a deadline. Whatever fails half
//! way leaves a VM of no known size, which its owner must destroy.
//!
//! Does not: bring CPUs and memory online in the guest; its agent does.
//!
//! Source: QEMU's qapi/acpi.json and docs/memory-hotplug; ids as Kata gives
//! them (`cpu-0`, `mem0`, `dimmmem0`).

use std::error;
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{json, Map, Value};

use super::qmp::{self, Qmp, QUICK};

/// Added before the guest's answers are taken; each is an event, of which the
/// monitor keeps only so many.
const BATCH: usize = 16;
/// How long a guest may take to accept what was added.
pub const ACCEPT: Duration = Duration::from_secs(20);
/// ACPI 6.5, 6.3.5: the guest is still at it.
const IN_PROGRESS: u64 = 0x80;

/// Why a VM did not grow.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// QEMU refused or did not answer.
    Monitor(qmp::Error),
    /// The machine was started with fewer places.
    Full { what: &'static str, wanted: usize, free: usize },
    /// The guest's kernel did not take it.
    Rejected { device: String, status: u64 },
    /// The guest's kernel said nothing.
    Ignored { device: String, source: qmp::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Monitor(_) => f.write_str("add to a running VM"),
            Error::Full { what, wanted, free } => {
                write!(f, "{wanted} {what} to add, and its machine has places for {free}")
            }
            Error::Rejected { device, status } => {
                write!(f, "the guest's kernel refused {device}, ACPI status {status:#x}")
            }
            Error::Ignored { device, .. } => write!(
                f,
                "the guest's kernel did not take {device}: it hangs, or was built without hotplug"
            ),
        }
    }
}

impl error::Error for Error {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            Error::Monitor(source) | Error::Ignored { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<qmp::Error> for Error {
    fn from(e: qmp::Error) -> Error {
        Error::Monitor(e)
    }
}

/// Where memory that is added comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// QEMU's own memory.
    Ram,
    /// Memory that processes beside QEMU see, too.
    Shared,
    /// Files in this directory.
    Files {
        /// The directory.
        directory: PathBuf,
        /// All of it taken at once.
        prealloc: bool,
    },
}

/// Adds `count` CPUs and waits until the guest's kernel has them, offline.
///
/// # Errors
/// See [`Error`]; so with [`add_memory`].
pub fn add_cpus(qmp: &mut Qmp, count: usize) -> Result<(), Error> {
    let answer = qmp.execute("query-hotpluggable-cpus", None, QUICK)?;
    let mut free: Vec<&Map<String, Value>> = answer
        .as_array()
        .into_iter()
        .flatten()
        .filter(|place| place.get("qom-path").is_none())
        .filter_map(Value::as_object)
        .collect();
    if free.len() < count {
        return Err(Error::Full { what: "CPUs", wanted: count, free: free.len() });
    }
    let place = |c: &Map<String, Value>, key: &str| {
        c.get("props").and_then(|p| p[key].as_u64()).unwrap_or(0)
    };
    free.sort_by_key(|c| ["socket-id", "core-id", "thread-id"].map(|k| place(c, k)));
    for (batch, places) in free[..count].chunks(BATCH).enumerate() {
        let mut names = Vec::new();
        for (n, cpu) in places.iter().enumerate() {
            let id = format!("cpu-{}", batch * BATCH + n);
            let properties = cpu.get("props").and_then(Value::as_object);
            let mut arguments = properties.cloned().unwrap_or_default();
            arguments.insert("driver".into(), cpu.get("type").cloned().unwrap_or_default());
            arguments.insert("id".into(), id.clone().into());
            // QEMU puts it there by itself, and refuses the property on some machines.
            arguments.remove("node-id");
            qmp.execute("device_add", Some(Value::Object(arguments)), QUICK)?;
            names.push(id);
        }
        accepted(qmp, names)?;
    }
    Ok(())
}

/// Adds memory, a multiple of the guest's block size, and waits until the
/// guest's kernel has it, offline.
pub fn add_memory(qmp: &mut Qmp, mib: u32, backend: &Backend) -> Result<(), Error> {
    let devices = qmp.execute("query-memory-devices", None, QUICK)?;
    let slot = devices.as_array().map_or(0, Vec::len);
    let (memory, device) = (format!("mem{slot}"), format!("dimmmem{slot}"));
    let mut object = json!({
        "qom-type": "memory-backend-ram", "id": memory, "size": u64::from(mib) << 20,
    });
    if *backend == Backend::Shared {
        object["qom-type"] = "memory-backend-memfd".into();
        object["share"] = true.into();
    }
    if let Backend::Files { directory, prealloc } = backend {
        object["qom-type"] = "memory-backend-file".into();
        object["mem-path"] = directory.display().to_string().into();
        object["share"] = true.into();
        object["prealloc"] = (*prealloc).into();
    }
    qmp.execute("object-add", Some(object), ACCEPT)?;
    let dimm = json!({"driver": "pc-dimm", "id": device, "memdev": memory});
    qmp.execute("device_add", Some(dimm), ACCEPT)?;
    accepted(qmp, vec![device])
}

/// Waits until the guest's kernel has answered for each of `devices`.
fn accepted(qmp: &mut Qmp, mut devices: Vec<String>) -> Result<(), Error> {
    let deadline = Instant::now() + ACCEPT;
    while let Some(waiting) = devices.first() {
        let event = qmp
            .next_event("the guest's answer", deadline, ACCEPT)
            .map_err(|source| Error::Ignored { device: waiting.clone(), source })?;
        if event["event"] != "ACPI_DEVICE_OST" {
            continue;
        }
        let info = &event["data"]["info"];
        let Some(at) = devices.iter().position(|d| info["device"] == d.as_str()) else { continue };
        match info["status"].as_u64().unwrap_or(u64::MAX) {
            0 => drop(devices.swap_remove(at)),
            IN_PROGRESS => {}
            status => return Err(Error::Rejected { device: devices.swap_remove(at), status }),
        }
    }
    Ok(())
}
