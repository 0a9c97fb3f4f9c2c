//! What status shows: a copy of facts about the pool, never a VM itself.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_derive::Serialize;
use serde_json::{json, Value};

use super::measures::Histogram;
use crate::confine::isolation::Isolation;
use crate::vm::ledger::State;
use crate::vm::Vm;

/// Facts about one VM.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Its id.
    pub id: String,
    /// Where it is in its life.
    pub state: State,
    /// `direct` or `template`.
    pub source: String,
    /// CPUs.
    pub cpus: u32,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Since when it exists.
    pub since: Instant,
    /// Whether it is in the pool and has not come to rest yet.
    pub awake: bool,
    /// Whether a server before this one made it.
    pub adopted: bool,
    /// Whether it stands ready and is of an older configuration.
    pub outdated: bool,
    /// What its claimer calls it.
    pub label: String,
    /// Who claimed it, by pid; 0 for nobody.
    pub owner: i32,
    /// Whether that one has told how long it took.
    pub used: bool,
}

impl Seen {
    /// What is to be seen of this VM.
    pub fn of(vm: &Vm, state: State, since: Instant) -> Seen {
        Seen {
            id: vm.id().to_string(),
            state,
            source: vm.source().to_string(),
            cpus: vm.cpus(),
            memory_mib: vm.memory_mib(),
            since,
            awake: false,
            adopted: false,
            outdated: false,
            label: vm.ledger().label.clone(),
            owner: vm.ledger().owner.map_or(0, |o| o.pid),
            used: false,
        }
    }
}

/// Counts since the server's start.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Counters {
    /// Claims answered with a VM that stood ready.
    pub claims_from_pool: u64,
    /// Claims answered after they had waited.
    pub claims_waited: u64,
    /// Claims that went away, or ran out of time, before a VM came.
    pub claims_cancelled: u64,
    /// VMs whose delivery failed; they were destroyed.
    pub deliveries_failed: u64,
    /// Boots that came through.
    pub boots: u64,
    /// Boots that failed.
    pub boots_failed: u64,
    /// VMs of the pool of a server before this one, taken over.
    pub adopted: u64,
    /// VMs that died while they stood ready.
    pub died_ready: u64,
    /// VMs ended because their claim was not confirmed in time.
    pub claims_unconfirmed: u64,
    /// VMs ended because the process that had leased them ended.
    pub leases_ended: u64,
}

/// What is shown.
#[derive(Debug, Default)]
pub struct Facts {
    /// When this server started, nanoseconds since the epoch.
    pub started: u64,
    /// VMs to keep ready.
    pub target: usize,
    /// VMs made at the same time, at most.
    pub parallel: usize,
    /// VMs being made, those included that have no QEMU yet.
    pub making: usize,
    /// Claims in line.
    pub waiting: usize,
    /// Counts.
    pub counters: Counters,
    /// VMs by QEMU's pid.
    pub vms: BTreeMap<i32, Seen>,
    /// From a claim's coming to its client's having the VM.
    pub claim: Histogram,
    /// From a client's asking until its VM could run a command.
    pub exec_ready: Histogram,
    /// Claims answered, by the VM's source: with one that stood ready, and after waiting.
    pub claims: BTreeMap<String, [u64; 2]>,
    /// Until a VM is ready, booted and cloned.
    pub made: [Histogram; 2],
    /// Boots that failed, by their phase.
    pub failures: BTreeMap<&'static str, u64>,
    /// Why no VM is made, although some are missing.
    pub held: Option<String>,
    /// How far VMs are isolated.
    pub isolation: Isolation,
    /// Threads that do not come to an end of what they do.
    pub stuck: Vec<String>,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
}

impl Facts {
    /// The process `by` could use the VM that it claimed after so long; whether there is such
    /// a VM.
    pub fn used(&mut self, id: &str, by: i32, took: Duration) -> bool {
        let mut handed = self.vms.values_mut().filter(|vm| vm.state == State::Handed);
        let Some(vm) = handed.find(|vm| vm.id == id && vm.owner == by) else { return false };
        // Once: it is the first command that counts.
        if !std::mem::replace(&mut vm.used, true) {
            self.exec_ready.add(took);
        }
        true
    }
}

/// The facts, for whoever asks.
#[derive(Debug, Default)]
pub struct Board(Mutex<Facts>);

impl Board {
    /// The facts, locked: for a few instructions.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Pid, CPUs and memory (MiB) of the VMs that stand ready.
    pub fn ready(&self) -> Vec<(i32, u32, u32)> {
        let facts = self.facts();
        let ready = facts.vms.iter().filter(|(_, vm)| vm.state == State::Ready);
        ready.map(|(pid, vm)| (*pid, vm.cpus, vm.memory_mib)).collect()
    }

    /// The JSON of `vmcache status --json`.
    pub fn json(&self, endpoint: &str) -> Value {
        let facts = self.facts();
        let count = |s: State| facts.vms.values().filter(|v| v.state == s).count();
        let awake = facts.vms.values().filter(|v| v.state == State::Ready && v.awake).count();
        let vms: Vec<Value> = facts
            .vms
            .iter()
            .map(|(pid, vm)| {
                json!({
                    "id": vm.id, "pid": pid, "state": vm.state.name(), "source": vm.source,
                    "cpus": vm.cpus, "memory_mib": vm.memory_mib,
                    "age_s": vm.since.elapsed().as_secs(), "adopted": vm.adopted, "outdated": vm.outdated,
                    "label": vm.label,
                })
            })
            .collect();
        let outdated = facts.vms.values().filter(|v| v.outdated).count();
        let claims: serde_json::Map<String, Value> = facts
            .claims
            .iter()
            .map(|(source, [at_once, waited])| {
                (source.clone(), json!({"from_pool": at_once, "waited": waited}))
            })
            .collect();
        json!({
            "pid": std::process::id(),
            "endpoint": endpoint,
            "version": env!("CARGO_PKG_VERSION"),
            // Another one after a restart, which keeps the pid.
            "started": facts.started,
            "pool": {
                "target": facts.target,
                "ready": count(State::Ready),
                "awake": awake,
                "booting": facts.making,
                "waiting": facts.waiting,
                "held": facts.held,
                "outdated": outdated,
                "parallel": facts.parallel,
            },
            "counters": facts.counters,
            "vms": vms,
            "latency": {
                "claim": facts.claim.json(),
                "exec_ready": facts.exec_ready.json(),
                "direct": facts.made[0].json(),
                "template": facts.made[1].json(),
            },
            "claims": claims,
            "failures": facts.failures,
            "memory_bytes": crate::host::resident_bytes(),
            "isolation": facts.isolation,
            "stuck": facts.stuck,
            "last_error": facts.last_error,
        })
    }
}
