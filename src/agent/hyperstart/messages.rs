//! hyperstart's JSON, made of what Kata's agents are told.
//!
//! Invariant: hyperstart takes an unknown key for an error, or stops reading
//! there, so only keys that it knows are written; what it has no key for is
//! refused, or is listed here as left out: rlimits, capabilities, mounts,
//! namespaces, limits of a container.
//!
//! Source: hyperstart 1.1.0 (API 4244), src/parse.c and src/container.c.

use serde_derive::{Deserialize, Serialize};
use serde_json::{json, Value};

use super::super::{Error, Outcome};
use crate::proto::agent::{CreateContainerRequest, CreateSandboxRequest};
use crate::proto::oci;
use crate::proto::types::{Interface, Route};

/// hyperstart's name for a container's first process.
pub const INIT: &str = "init";
/// The container that is the guest itself.
pub const GUEST: &str = "hyperstart";

/// A process has ended.
#[derive(Debug, Deserialize)]
pub struct Event {
    /// Its container.
    pub container: String,
    /// Its id.
    pub process: String,
    /// `finished`.
    pub event: String,
    /// Its exit code; 0 for one that a signal ended.
    pub status: i32,
}

/// The numbers of a process's streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequences {
    /// Of standard input and output.
    pub stdio: u64,
    /// Of standard error; 0 when it is standard output.
    pub stderr: u64,
}

#[derive(Serialize)]
struct Variable<'a> {
    env: &'a str,
    value: &'a str,
}

/// Longest host name: of a longer one a guest dies.
const MAX_HOSTNAME: usize = 64;

/// STARTPOD's.
pub fn pod(request: &CreateSandboxRequest) -> Value {
    let hostname: String = request.hostname.chars().take(MAX_HOSTNAME).collect();
    let mut out = json!({"hostname": hostname});
    if !request.dns.is_empty() {
        out["dns"] = request.dns.clone().into();
    }
    if let Some(share) = request.storages.iter().find(|s| s.driver == "9p") {
        out["shareDir"] = share.source.clone().into();
    }
    out
}

/// A process: its id, and where its bytes go.
pub fn process(id: &str, p: &oci::Process, streams: Sequences) -> Outcome<Value> {
    if p.Args.is_empty() {
        let why = "a process without a program".to_string();
        return Err(Error::Request { call: "ExecProcess", why });
    }
    let variables: Vec<Variable<'_>> = p
        .Env
        .iter()
        .map(|e| {
            let (env, value) = e.split_once('=').unwrap_or((e, ""));
            Variable { env, value }
        })
        .collect();
    // By name, as our own agent knows it, or by number, as Kata's.
    let (user, group) = match p.User.Username.split_once(':') {
        Some((user, group)) => (user.to_string(), group.to_string()),
        None if p.User.Username.is_empty() => (p.User.UID.to_string(), p.User.GID.to_string()),
        None => (p.User.Username.clone(), p.User.GID.to_string()),
    };
    let more: Vec<String> = p.User.AdditionalGids.iter().map(|g| g.to_string()).collect();
    let mut out = json!({
        "id": id, "user": user, "group": group, "terminal": p.Terminal,
        "stdio": streams.stdio, "stderr": streams.stderr, "args": p.Args,
        "workdir": if p.Cwd.is_empty() { "/" } else { &p.Cwd },
    });
    // Empty lists are not to be sent: hyperstart takes one for the end.
    if !variables.is_empty() {
        out["envs"] = json!(variables);
    }
    if !more.is_empty() {
        out["additionalGroups"] = more.into();
    }
    Ok(out)
}

/// EXECCMD's.
pub fn exec(container: &str, process: Value) -> Value {
    json!({"container": container, "process": process})
}

/// NEWCONTAINER's: its root is on a disk (the first storage), or below the share.
pub fn container(r: &CreateContainerRequest, process: Value) -> Outcome<Value> {
    let refused = |why: String| Error::Request { call: "CreateContainer", why };
    let root = r.OCI.Root.Path.as_str();
    let mut out = json!({
        "id": r.container_id, "process": process, "initialize": true,
        "readOnly": r.OCI.Root.Readonly,
    });
    match r.storages.first() {
        Some(disk) => {
            match disk.driver.as_str() {
                "blk" => out["image"] = disk.source.trim_start_matches("/dev/").into(),
                "scsi" => {
                    // Kata writes both in hexadecimal, hyperstart reads 0:0:T:L.
                    out["image"] = "".into();
                    out["addr"] = disk.source.clone().into();
                }
                other => {
                    let why = format!("hyperstart has no storage driver {other:?}: blk or scsi");
                    return Err(refused(why));
                }
            }
            out["fstype"] = disk.fstype.clone().into();
            let below = root.strip_prefix(disk.mount_point.as_str()).unwrap_or(root);
            out["rootfs"] = below.trim_matches('/').into();
        }
        None => {
            let path = root.trim_matches('/');
            let (image, below) = path.rsplit_once('/').ok_or_else(|| {
                refused(format!("root {root:?}: it must be a directory below the share, or a disk"))
            })?;
            out["image"] = image.into();
            out["rootfs"] = below.into();
        }
    }
    Ok(out)
}

/// SETUPINTERFACE's.
pub fn interface(i: &Interface) -> Outcome<Value> {
    if i.device.is_empty() {
        let why = "hyperstart finds an interface by its name in the guest only".to_string();
        return Err(Error::Request { call: "UpdateInterface", why });
    }
    let addresses: Vec<Value> = i
        .IPAddresses
        .iter()
        .filter(|a| !a.address.contains(':'))
        .map(|a| json!({"ipAddress": a.address, "netMask": a.mask}))
        .collect();
    if addresses.len() < i.IPAddresses.len() {
        let why = "hyperstart has no IPv6".to_string();
        return Err(Error::Request { call: "UpdateInterface", why });
    }
    let mut out = json!({"device": i.device, "ipAddresses": addresses});
    if !i.name.is_empty() && i.name != i.device {
        out["newDeviceName"] = i.name.clone().into();
    }
    if i.mtu > 0 {
        out["mtu"] = i.mtu.into();
    }
    Ok(out)
}

/// SETUPROUTE's.
pub fn routes(routes: &[Route]) -> Value {
    let one = |r: &Route| {
        let mut out = json!({"dest": if r.dest.is_empty() { "default" } else { &r.dest }});
        for (key, value) in [("gateway", &r.gateway), ("device", &r.device)] {
            if !value.is_empty() {
                out[key] = value.clone().into();
            }
        }
        out
    };
    json!({"routes": routes.iter().map(one).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::agent::Storage;

    fn shell() -> oci::Process {
        oci::Process {
            Args: vec!["/bin/sh".into()],
            Env: vec!["A=b=c".into()],
            Terminal: true,
            ..Default::default()
        }
    }

    #[test]
    fn a_process_has_the_keys_that_hyperstart_reads() {
        let streams = Sequences { stdio: 5, stderr: 6 };
        let p = process("p", &shell(), streams).unwrap();
        assert_eq!(
            p,
            json!({"id": "p", "user": "0", "group": "0", "terminal": true, "stdio": 5,
                   "stderr": 6, "args": ["/bin/sh"], "envs": [{"env": "A", "value": "b=c"}],
                   "workdir": "/"})
        );
        assert!(process("p", &oci::Process::default(), streams).is_err());
    }

    #[test]
    fn a_root_is_on_a_disk_or_below_the_share() {
        let mut r = CreateContainerRequest { container_id: "c".into(), ..Default::default() };
        let root = oci::Root { Path: "/c/rootfs".into(), ..Default::default() };
        r.OCI = Some(oci::Spec { Root: Some(root).into(), ..Default::default() }).into();
        let made = container(&r, json!({})).unwrap();
        assert_eq!((&made["image"], &made["rootfs"]), (&json!("c"), &json!("rootfs")));
        r.storages = vec![Storage {
            driver: "blk".into(),
            source: "/dev/vda".into(),
            fstype: "ext4".into(),
            mount_point: "/c".into(),
            ..Default::default()
        }];
        let made = container(&r, json!({})).unwrap();
        assert_eq!((&made["image"], &made["rootfs"]), (&json!("vda"), &json!("rootfs")));
        assert_eq!(made["fstype"], json!("ext4"));
        r.storages[0].driver = "overlayfs".into();
        assert!(container(&r, json!({})).is_err());
    }
}
