//! Where the faults happen: a server with a pool of clones, and what is claimed of it.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::count::{runs, Count};
use crate::daemon::{text, Daemon, Dir, Options};

/// How long all may take to be as before.
const SETTLE: Duration = Duration::from_secs(120);

/// What came of one kind of fault.
#[derive(Default)]
pub struct Row {
    /// Claims that gave a VM.
    pub claimed: usize,
    /// Claims that said why they did not.
    pub refused: usize,
    /// VMs that were handed out a second time.
    pub twice: usize,
    /// VMs that were dead when they were handed out.
    pub dead: usize,
    /// What is there that should not be.
    pub leaked: Vec<String>,
    /// Whether the pool was full again.
    pub full: bool,
}

impl Row {
    pub const HEAD: &'static str =
        "| fault | times | claims served | refused | twice | dead | leaked | pool full again | s |\n\
         |---|---|---|---|---|---|---|---|---|";

    pub fn line(&self, fault: &str, times: u32, took: Duration) -> String {
        format!(
            "| {fault} | {times} | {} | {} | {} | {} | {} | {} | {} |",
            self.claimed,
            self.refused,
            self.twice,
            self.dead,
            self.leaked.len(),
            if self.full { "yes" } else { "NO" },
            took.as_secs()
        )
    }

    pub fn good(&self) -> bool {
        self.twice == 0 && self.dead == 0 && self.leaked.is_empty() && self.full
    }
}

/// Numbers that are as random as this needs, and the same in each run.
pub struct Dice(u64);

impl Dice {
    pub fn new() -> Dice {
        Dice(0x9e37_79b9_7f4a_7c15)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n.max(1)
    }

    pub fn pause(&mut self, most: Duration) {
        std::thread::sleep(Duration::from_micros(self.below(most.as_micros() as u64)));
    }
}

/// A pool, and what was claimed of it.
pub struct Field {
    daemon: Option<Daemon>,
    pub options: Options,
    pub row: Row,
    before: Count,
    held: HashSet<String>,
    _template: Dir,
}

impl Field {
    /// `change` the options of a pool of `n` clones.
    pub fn new(prepared: &Path, n: usize, change: impl FnOnce(&mut Options, &Path)) -> Field {
        Field::with(prepared, n, change, &[])
    }

    /// The same, with more in the server's environment.
    pub fn with(
        prepared: &Path,
        n: usize,
        change: impl FnOnce(&mut Options, &Path),
        environment: &[(&str, &str)],
    ) -> Field {
        let dir = Dir::new();
        let template = Dir::new();
        let mut options = Options::pool(prepared, n);
        let path = template.0.join("template");
        options.more_factory = format!("enable_template = true\ntemplate_path = {path:?}\n");
        let name = dir.0.file_name().unwrap().to_str().unwrap();
        options.more_ours += &format!("cgroup = {name:?}\n");
        change(&mut options, &dir.0);
        let daemon = Daemon::launch_with(&options, dir, environment);
        daemon.wait_rest(n);
        // Once, so that what a first client brings about is there.
        daemon.ok(&["run", "--", "true"]);
        daemon.wait_rest(n);
        let before = Count::now(&daemon);
        let (row, held) = (Row::default(), HashSet::new());
        Field { daemon: Some(daemon), options, row, before, held, _template: template }
    }

    pub fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    /// What `get --json` said: the VM's id, and QEMU's pid, when it gave one.
    pub fn got(&mut self, out: &Output) -> Option<(String, i64)> {
        let line = text(&out.stdout);
        let Ok(vm) = serde_json::from_str::<Value>(line.trim()) else {
            self.row.refused += 1;
            if std::env::var_os("VMCACHE_CHAOS_LOG").is_some() {
                eprintln!("refused: {}", text(&out.stderr).trim_end());
            }
            return None;
        };
        self.row.claimed += 1;
        let (id, pid) = (vm["id"].as_str().unwrap().to_string(), vm["pid"].as_i64().unwrap());
        self.row.twice += usize::from(!self.held.insert(id.clone()));
        Some((id, pid))
    }

    /// Claims a VM as anybody would, who waits so long; dead ones count.
    pub fn claim(&mut self, wait: &str) -> Option<(String, i64)> {
        let out = self.daemon().output(&["get", "--json", "--wait", wait]);
        let (id, pid) = self.got(&out)?;
        self.row.dead += usize::from(!runs(pid));
        Some((id, pid))
    }

    /// Ends a VM that was claimed.
    pub fn stop(&self, id: &str) {
        let _ = self.daemon().output(&["stop", id]);
    }

    /// Kills the server, and starts another one in its place.
    pub fn kill_server(&mut self) {
        let mut old = self.daemon.take().unwrap();
        old.signal(nix::sys::signal::Signal::SIGKILL);
        old.wait();
        self.daemon = Some(Daemon::launch(&self.options, old.forsake()));
    }

    /// Waits until all is as it was, and says what is not.
    pub fn settle(mut self) -> Row {
        for id in &self.held {
            self.stop(id);
        }
        let deadline = Instant::now() + SETTLE;
        let pool = self.options.pool;
        loop {
            let status = self.daemon().status();
            let full = status["pool"]["ready"] == pool
                && status["pool"]["booting"] == 0
                && status["pool"]["awake"] == 0;
            let left = Count::now(self.daemon()).beyond(&self.before);
            if (full && left.is_empty()) || Instant::now() > deadline {
                (self.row.full, self.row.leaked) = (full, left);
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        if !self.row.good() || std::env::var_os("VMCACHE_CHAOS_LOG").is_some() {
            eprintln!("{}", self.daemon().log());
        }
        let dir = self.daemon.take().unwrap().quit();
        // The empty one in which VMs had theirs.
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(dir.0.file_name().unwrap()));
        }
        self.row
    }
}
