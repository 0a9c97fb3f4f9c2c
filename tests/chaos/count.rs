//! What there is, from /proc and the file system.

use std::fs;
use std::path::Path;

use crate::daemon::{directories, mounts, qemus, Daemon};

/// What a server with a full pool has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    pub qemus: usize,
    /// What serves them: vsock devices, proxies.
    pub attendants: usize,
    pub cgroups: usize,
    pub directories: usize,
    pub mounts: usize,
    /// Zombies that are the server's children.
    pub zombies: usize,
    /// Of the server.
    pub fds: usize,
    /// Likewise, ours: gRPC's come and go.
    pub threads: usize,
}

fn entries(path: String) -> usize {
    fs::read_dir(path).map_or(0, |entries| entries.flatten().count())
}

/// Processes beside QEMU whose command line names a VM's directory.
pub fn attendants(store: &Path) -> Vec<i32> {
    let needle = format!("{}/", store.display());
    let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        (line.contains(&needle) && !line.contains("-chardev")).then_some(pid)
    });
    all.collect()
}

/// The cgroups of VMs, in all hierarchies: a server's are named as its directory.
fn cgroups(dir: &Path) -> usize {
    let name = dir.file_name().unwrap_or_default();
    let below = |path: &Path| fs::read_dir(path.join(name)).into_iter().flatten().flatten();
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let all = hierarchies.map(|h| h.path()).chain([Path::new("/sys/fs/cgroup").to_path_buf()]);
    all.flat_map(|h| below(&h))
        .filter(|e| e.file_name().to_string_lossy().starts_with("vm-"))
        .count()
}

fn threads(pid: i32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let names = tasks.filter_map(|t| fs::read_to_string(t.path().join("comm")).ok());
    names.filter(|n| n.starts_with("vmc-") && !n.starts_with("vmc-rpc")).count()
}

fn zombies(parent: i32) -> usize {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let stats = all.filter_map(|e| fs::read_to_string(e.path().join("stat")).ok());
    let mine = |stat: &String| {
        let rest: Vec<_> =
            stat.rsplit_once(')').map_or(vec![], |(_, r)| r.split_whitespace().collect());
        rest.first() == Some(&"Z") && rest.get(1) == Some(&parent.to_string().as_str())
    };
    stats.filter(mine).count()
}

impl Count {
    pub fn now(daemon: &Daemon) -> Count {
        let pid = daemon.pid();
        Count {
            qemus: qemus(&daemon.dir.0).len(),
            attendants: attendants(&daemon.store()).len(),
            cgroups: cgroups(&daemon.dir.0),
            directories: directories(&daemon.store()).len(),
            mounts: mounts(&daemon.store()).len(),
            zombies: zombies(pid),
            fds: entries(format!("/proc/{pid}/fd")),
            threads: threads(pid),
        }
    }

    /// What is more than it was.
    pub fn beyond(&self, before: &Count) -> Vec<String> {
        let pairs = [
            ("QEMUs", self.qemus, before.qemus),
            ("attendants", self.attendants, before.attendants),
            ("cgroups", self.cgroups, before.cgroups),
            ("directories", self.directories, before.directories),
            ("mounts", self.mounts, before.mounts),
            ("zombies", self.zombies, before.zombies),
            ("fds of the server", self.fds, before.fds),
            ("threads of the server", self.threads, before.threads),
        ];
        let more = pairs.into_iter().filter(|(_, now, then)| now > then);
        more.map(|(what, now, then)| format!("{now} {what}, not {then}")).collect()
    }
}

/// Whether a process runs, and is no zombie.
pub fn runs(pid: i64) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|s| s.rsplit_once(')').is_some_and(|(_, r)| !r.trim_start().starts_with('Z')))
}
