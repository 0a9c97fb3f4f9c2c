//! What makes each VM its own: ids, random numbers, the clock.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use super::ledger::Ledger;
use crate::agent::{Agent, Error, Kind};
use crate::proto::agent::CopyFileRequest;
use crate::sys::process::random;
use crate::transport::OWN_AGENT;

/// Bytes with which a guest's random generator is reseeded.
pub const SEED: usize = 512;

/// A random UUID (version 4).
///
/// # Errors
/// When the kernel gives no random bytes.
pub fn uuid() -> io::Result<String> {
    let mut b = [0; 16];
    random(&mut b)?;
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|x| format!("{x:02x}")).collect();
    Ok(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// Gives a guest random numbers and a clock of its own.
///
/// Done before a VM is published and again when a client resumes it: it may
/// have been paused for long, and a clone has its template's generator.
///
/// # Errors
/// As the agent's; the VM must then not be used.
pub fn refresh(agent: &dyn Agent) -> Result<(), Error> {
    if matches!(agent.kind(), Kind::Noop | Kind::Hyperstart) {
        // They can not; their VMs are nobody's clones: that is checked.
        return Ok(());
    }
    let mut seed = [0; SEED];
    random(&mut seed).map_err(|source| Error::Host { during: "take random bytes", source })?;
    agent.reseed_rng(&seed)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    agent.set_guest_date_time(now)
}

/// What a guest calls itself, by its VM's id.
pub fn host_name(id: &str) -> String {
    format!("vm-{}", id.get(..8).unwrap_or("guest"))
}

/// Whether a guest's agent is vmcache's own, which can do more than Kata's.
///
/// # Errors
/// As the agent's.
pub fn is_own(agent: &dyn Agent) -> Result<bool, Error> {
    if agent.kind() != Kind::Kata {
        return Ok(false);
    }
    let details = agent.guest_details()?;
    Ok(details.agent_details.extra_features.iter().any(|f| f == OWN_AGENT))
}

/// Gives a guest all that makes it its own: random numbers, the clock, names.
///
/// # Errors
/// As the agent's; the VM must then not be used.
pub fn give(agent: &dyn Agent, ledger: &Ledger) -> Result<(), Error> {
    refresh(agent)?;
    match ledger.own_agent {
        true => name(agent, &ledger.id),
        // Kata's names a guest when its sandbox is made.
        false => Ok(()),
    }
}

/// Gives a guest its names: the machine id that belongs to its VM's, the UUID
/// without its dashes, as machine-id(5) has it, and a host name, which our agent
/// sets when it gets hostname(5). Done before a VM is published, since a clone
/// has its template's.
fn name(agent: &dyn Agent, id: &str) -> Result<(), Error> {
    let file = |path: &str, line: String, mode: u32| {
        let data = format!("{line}\n").into_bytes();
        agent.copy_file(CopyFileRequest {
            path: path.into(),
            file_size: data.len() as i64,
            file_mode: 0o100_000 | mode,
            dir_mode: 0o755,
            data,
            ..CopyFileRequest::default()
        })
    };
    file("/etc/machine-id", id.replace('-', ""), 0o444)?;
    file("/etc/hostname", host_name(id), 0o644)
}

#[cfg(test)]
mod tests {
    #[test]
    fn uuids_are_version_four_and_differ() {
        let (a, b) = (super::uuid().unwrap(), super::uuid().unwrap());
        assert_ne!(a, b);
        assert_eq!((a.len(), &a[14..15]), (36, "4"));
        assert!("89ab".contains(&a[19..20]), "{a}");
    }
}
