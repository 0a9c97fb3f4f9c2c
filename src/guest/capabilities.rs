//! Capability sets of a container's process, by the names that OCI uses.

use std::collections::HashSet;

use caps::{CapSet, Capability, CapsHashSet};

use super::failure::{Failure, Outcome};
use crate::proto::oci::LinuxCapabilities;

fn parse(names: &[String]) -> Outcome<CapsHashSet> {
    let mut set = HashSet::new();
    for name in names {
        let name = name.to_uppercase();
        let name = if name.starts_with("CAP_") { name } else { format!("CAP_{name}") };
        let cap: Capability =
            name.parse().map_err(|_| Failure::invalid(format!("{name} is no capability")))?;
        set.insert(cap);
    }
    Ok(set)
}

fn failed(set: &str) -> impl Fn(caps::errors::CapsError) -> Failure + '_ {
    move |e| Failure::internal(format!("set {set} capabilities: {e}"))
}

/// Drops from the bounding set what is not asked for; needs CAP_SETPCAP.
pub fn bound(wanted: &LinuxCapabilities) -> Outcome<()> {
    let keep = parse(&wanted.Bounding)?;
    let have = caps::read(None, CapSet::Bounding).map_err(failed("bounding"))?;
    for cap in have.difference(&keep) {
        caps::drop(None, CapSet::Bounding, *cap).map_err(failed("bounding"))?;
    }
    Ok(())
}

/// Sets the other sets, after the user was changed with capabilities kept.
pub fn set(wanted: &LinuxCapabilities) -> Outcome<()> {
    let permitted = parse(&wanted.Permitted)?;
    let inheritable = parse(&wanted.Inheritable)?;
    // Effective last: once it is narrow, nothing else can be changed.
    caps::set(None, CapSet::Inheritable, &inheritable).map_err(failed("inheritable"))?;
    caps::clear(None, CapSet::Ambient).map_err(failed("ambient"))?;
    for cap in parse(&wanted.Ambient)?.intersection(&inheritable) {
        caps::raise(None, CapSet::Ambient, *cap).map_err(failed("ambient"))?;
    }
    // Effective must stay within permitted, so it is narrowed before that too.
    let effective = parse(&wanted.Effective)?;
    caps::set(None, CapSet::Effective, &effective).map_err(failed("effective"))?;
    caps::set(None, CapSet::Permitted, &permitted).map_err(failed("permitted"))?;
    Ok(())
}
