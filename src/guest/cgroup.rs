//! Control groups, version 2: one for each container.
//!
//! Does not: device access (it needs BPF; in a guest of its own a container
//! sees the devices that its spec makes), or version 1.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::failure::{Attempt, Failure, Outcome};
use crate::proto::oci::LinuxResources;

const ROOT: &str = "/sys/fs/cgroup";
const PARENT: &str = "/sys/fs/cgroup/vmcache";
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "memory", "pids", "io"];

/// Makes the parent of all containers' groups and hands the controllers down.
pub fn prepare() -> Outcome<()> {
    fs::create_dir_all(PARENT).during(|| format!("create {PARENT}"))?;
    for dir in [ROOT, PARENT] {
        for controller in CONTROLLERS {
            // A kernel may lack one: its limits then fail when they are asked for.
            let _ = fs::write(format!("{dir}/cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

/// A container's group.
#[derive(Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a group; an old one of that name must be gone.
    pub fn create(id: &str) -> Outcome<Cgroup> {
        let path = Path::new(PARENT).join(id);
        fs::create_dir(&path).during(|| format!("create cgroup {}", path.display()))?;
        Ok(Cgroup { path })
    }

    /// The group above all containers'.
    pub fn all() -> Cgroup {
        Cgroup { path: PARENT.into() }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn write(&self, file: &str, value: &str) -> Outcome<()> {
        fs::write(self.path.join(file), value)
            .during(|| format!("set {file} of {} to {value}", self.path.display()))
    }

    /// Reads one of its files; empty when there is none.
    pub fn read(&self, file: &str) -> String {
        fs::read_to_string(self.path.join(file)).unwrap_or_default()
    }

    /// Sets the limits that `r` names; what it does not name stays.
    pub fn apply(&self, r: &LinuxResources) -> Outcome<()> {
        let limit = |n: i64| if n < 0 { "max".to_string() } else { n.to_string() };
        if let Some(m) = r.Memory.as_ref() {
            if m.Limit != 0 {
                self.write("memory.max", &limit(m.Limit))?;
            }
            if m.Reservation != 0 {
                self.write("memory.low", &limit(m.Reservation))?;
            }
            if m.Swap != 0 && m.Limit > 0 && m.Swap >= m.Limit {
                // Version 1 counts memory in; version 2 does not.
                self.write("memory.swap.max", &limit(m.Swap - m.Limit))?;
            }
        }
        if let Some(c) = r.CPU.as_ref() {
            if c.Shares != 0 {
                self.write("cpu.weight", &weight(c.Shares).to_string())?;
            }
            if c.Quota != 0 {
                let period = if c.Period == 0 { 100_000 } else { c.Period };
                self.write("cpu.max", &format!("{} {period}", limit(c.Quota)))?;
            }
            if !c.Cpus.is_empty() {
                self.write("cpuset.cpus", &c.Cpus)?;
            }
            if !c.Mems.is_empty() {
                self.write("cpuset.mems", &c.Mems)?;
            }
        }
        if let Some(p) = r.Pids.as_ref() {
            if p.Limit != 0 {
                self.write("pids.max", &limit(p.Limit))?;
            }
        }
        if let Some(b) = r.BlockIO.as_ref() {
            if b.Weight != 0 {
                self.write("io.weight", &b.Weight.to_string())?;
            }
        }
        Ok(())
    }

    /// Freezes or thaws every process in it.
    pub fn freeze(&self, on: bool) -> Outcome<()> {
        self.write("cgroup.freeze", if on { "1" } else { "0" })
    }

    /// Whether it is frozen, or about to be.
    pub fn frozen(&self) -> bool {
        self.read("cgroup.freeze").trim() == "1"
    }

    /// Pids in it, in the guest's namespace.
    pub fn pids(&self) -> Vec<i32> {
        self.read("cgroup.procs").lines().filter_map(|l| l.parse().ok()).collect()
    }

    /// Kills every process in it.
    pub fn kill(&self) -> Outcome<()> {
        self.write("cgroup.kill", "1")
    }

    /// Removes it.
    ///
    /// # Errors
    /// `EBUSY` while a process is in it.
    pub fn remove(&self) -> Outcome<()> {
        match fs::remove_dir(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(Failure::internal(format!("remove cgroup {}: {e}", self.path.display())))
            }
            _ => Ok(()),
        }
    }
}

/// CPU weight (1 to 10000) of version 1's shares (2 to 262144), by the OCI
/// runtimes' common formula.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::weight;

    #[test]
    fn shares_become_weights_at_the_ends_of_their_ranges() {
        assert_eq!(weight(0), 1);
        assert_eq!(weight(2), 1);
        assert_eq!(weight(1024), 39);
        assert_eq!(weight(262_144), 10_000);
    }
}
