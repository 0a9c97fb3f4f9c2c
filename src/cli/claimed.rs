//! Commands on VMs that were claimed on this host: list, ps, stats, pause,
//! resume, stop.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{json, Value};

use super::args::{Common, Json, Kill, Many, One, Ps};
use super::output::{age, Failure, FAILED};
use super::{optional_config, print, Outcome};
use crate::agent::ListFormat;
use crate::config::options::{find, Fallback, OURS};
use crate::factory::grpccache::{Error, GrpcCache};
use crate::report::chain;
use crate::sys::process::{start_time, state};
use crate::trusted_path::{check_existing, refused, Kind};
use crate::vm::ledger::{Ledger, State};
use crate::vm::wire::from_directory;
use crate::vm::Vm;
use crate::workload::{self, holds_disks, run_state, Guest, RunState, WRITING_OUT};

fn store(common: &Common) -> Result<PathBuf, Failure> {
    let store = match optional_config(common)? {
        Some(config) => config.store(),
        None => match find(OURS, "vm_store_path").map(|o| o.default) {
            Some(Fallback::Text(path)) => path.into(),
            _ => "/run/vc/vm".into(),
        },
    };
    match check_existing(&store, Kind::SharedDirectory).as_ref().map_err(refused) {
        Err(Some(why)) => Err(Failure::new(FAILED, format!("vm_store_path: {why}"))),
        // Who may not look there knows a VM's whole id.
        Ok(()) | Err(None) => Ok(store),
    }
}

/// Whether it is a client's. One that is being handed out is, too: who knows its
/// id has its answer, which arrives before the server has put that down.
fn claimed(ledger: &Ledger) -> bool {
    match ledger.state {
        State::Handed | State::Handing => true,
        State::Ready => ledger.endpoint.is_empty(),
        // A client's, and the client is gone: whoever finds it may end it.
        State::Booting => ledger.endpoint.is_empty() && !ledger.owner.is_some_and(|o| o.runs()),
    }
}

/// The one VM whose id begins so.
pub fn find_ledger(common: &Common, id: &str) -> Result<(PathBuf, Ledger), Failure> {
    let store = store(common)?;
    let mut found: Vec<_> = Ledger::all(&store)
        .into_iter()
        .filter(|(_, l)| !id.is_empty() && l.id.starts_with(id))
        .collect();
    // Who may not list the store knows the VM's whole id.
    if found.is_empty() && !id.contains('/') && fs::read_dir(&store).is_err() {
        let path = store.join(id);
        found.extend(Ledger::read(&path).ok().map(|l| (path, l)));
    }
    let text = match found.len() {
        0 => format!("no VM {id:?} in {}: `vmcache list` shows those there are", store.display()),
        1 => {
            let (path, ledger) = found.remove(0);
            if claimed(&ledger) {
                return Ok((path, ledger));
            }
            match ledger.endpoint.as_str() {
                "" => format!("VM {} is still booting, for another command", ledger.id),
                pool => format!(
                    "VM {} is {} and belongs to the pool at {pool}: claim one with `vmcache get`",
                    ledger.id,
                    ledger.state.name(),
                ),
            }
        }
        n => format!("{n} VMs have an id that begins with {id:?}: give more of it"),
    };
    Err(Failure::new(FAILED, text))
}

/// The same, as a VM. Whoever lets it drop ends it.
pub fn find_vm(common: &Common, id: &str) -> Result<Vm, Failure> {
    let (path, ledger) = find_ledger(common, id)?;
    Ok(from_directory(&path, ledger)?)
}

/// A VM that runs, with its agent. It stays, whatever comes of it.
pub fn reach(vm: Vm) -> Result<Guest, Failure> {
    let id = vm.id();
    let stands = match run_state(&vm) {
        RunState::Runs => None,
        RunState::Paused => Some(format!("VM {id} is paused: `vmcache resume {id}`")),
        RunState::Stopped(status) => Some(format!(
            "VM {id} does not run any more: QEMU has stopped it ({status}): `vmcache stop {id}` \
             ends it"
        )),
    };
    let agent = match stands {
        Some(text) => Err(Failure::new(FAILED, text)),
        None => vm.connect_agent().map_err(Failure::from),
    };
    match agent {
        Ok(agent) => Ok(Guest::new(vm, agent)),
        Err(e) => {
            vm.let_go();
            Err(e)
        }
    }
}

/// Does something with a VM's agent; the VM stays, whatever comes of it.
pub fn with_guest<T>(
    common: &Common,
    id: &str,
    f: impl FnOnce(&Guest) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let guest = reach(find_vm(common, id)?)?;
    let result = f(&guest);
    guest.keep().let_go();
    result
}

/// `vmcache ps`.
pub fn ps(common: &Common, o: &Ps) -> Outcome {
    let (own, bytes) = with_guest(common, &o.id, |g| {
        // Kata's agents have a table in no form that could be read.
        let own = g.vm().own_agent();
        let format = if o.json.json && !own { ListFormat::Json } else { ListFormat::Table };
        Ok((own, g.list_processes(format, &o.args)?))
    })?;
    if o.json.json {
        let list = match own {
            true => rows(&String::from_utf8_lossy(&bytes)),
            false => serde_json::from_slice::<Vec<i64>>(&bytes)
                .ok()
                .map(|pids| pids.into_iter().map(|pid| json!({"pid": pid})).collect()),
        };
        let none = || Failure::new(FAILED, "the guest's list of processes is none");
        print::json(&json!(list.ok_or_else(none)?))?;
    } else {
        print::block(format!("{}\n", String::from_utf8_lossy(&bytes).trim_end()))?;
    }
    Ok(0)
}

/// The rows of our own agent's table, below its heading.
fn rows(table: &str) -> Option<Vec<Value>> {
    let row = |line: &str| {
        let mut rest = line.trim_start();
        let mut next = || {
            let (word, after) = rest.split_once(' ')?;
            rest = after.trim_start();
            Some(word)
        };
        let (pid, uid) = (next()?.parse::<u32>().ok()?, next()?.parse::<u32>().ok());
        let (state, rss, exec) = (next()?, next()?.parse::<u64>().ok(), next()?);
        let exec = Some(exec).filter(|name| *name != "-");
        Some(json!({
            "pid": pid, "uid": uid, "state": state, "rss_kib": rss, "exec": exec, "command": rest,
        }))
    };
    table.lines().skip(1).map(row).collect()
}

/// `vmcache kill`.
pub fn kill(common: &Common, k: &Kill) -> Outcome {
    with_guest(common, &k.id, |g| Ok(g.signal(k.exec.as_deref(), k.signal)?))?;
    Ok(0)
}

/// `vmcache stats`.
pub fn stats(common: &Common, o: &One) -> Outcome {
    let s = with_guest(common, &o.id, |g| Ok(g.stats()?))?;
    let (cpu, memory) = (&s.cgroup_stats.cpu_stats.cpu_usage, &s.cgroup_stats.memory_stats);
    let network = s
        .network_stats
        .iter()
        .map(|n| json!({"name": n.name, "rx_bytes": n.rx_bytes, "tx_bytes": n.tx_bytes}));
    let v = json!({
        "cpu_ns": cpu.total_usage,
        "cpu_user_ns": cpu.usage_in_usermode,
        "cpu_system_ns": cpu.usage_in_kernelmode,
        "memory_bytes": memory.usage.usage,
        "memory_peak_bytes": memory.usage.max_usage,
        "cache_bytes": memory.cache,
        "processes": s.cgroup_stats.pids_stats.current,
        "network": network.collect::<Vec<_>>(),
    });
    if o.json.json {
        print::json(&v)?;
        return Ok(0);
    }
    let number = |k: &str| v[k].as_u64().unwrap_or(0) as f64;
    let rows = [
        ("CPU", format!("{:.3} s", number("cpu_ns") / 1e9)),
        ("memory", format!("{:.1} MiB", number("memory_bytes") / 1_048_576.0)),
        ("processes", format!("{}", number("processes"))),
    ];
    for (name, value) in rows {
        print::line(format!("{name:<10} {value}"))?;
    }
    Ok(0)
}

/// `vmcache pause`.
pub fn pause(common: &Common, o: &One) -> Outcome {
    let mut vm = find_vm(common, &o.id)?;
    let done = vm.pause();
    vm.let_go();
    done?;
    Ok(0)
}

/// `vmcache resume`.
pub fn resume(common: &Common, o: &One) -> Outcome {
    let mut vm = find_vm(common, &o.id)?;
    let done = vm.resume().and_then(|()| vm.wake().map(|_| ()));
    vm.let_go();
    done?;
    Ok(0)
}

/// `vmcache stop`.
pub fn stop(common: &Common, m: &Many) -> Outcome {
    let mut failed = None;
    let mut printed = Ok(());
    for id in &m.ids {
        match find_ledger(common, id) {
            Ok((path, ledger)) => {
                let id = ledger.id.clone();
                match from_directory(&path, ledger).map(end) {
                    Ok(Ok(())) => {}
                    Ok(Err((gone, text))) => {
                        let e = Failure::new(FAILED, text);
                        e.report();
                        failed = Some(e);
                        if !gone {
                            continue;
                        }
                    }
                    // Dead already: what is left of it is its directory.
                    Err(_) => drop(crate::vm::dir::VmDir::adopt(&path)),
                }
                // The others end, whether or not somebody reads it.
                printed = printed.and_then(|()| print::line(id));
            }
            Err(e) => {
                e.report();
                failed = Some(e);
            }
        }
    }
    match failed {
        None => printed.map(|()| 0),
        Some(_) => Err(Failure::new(FAILED, "not all of them were stopped as they should be")),
    }
}

/// Ends a VM; what its guest wrote to disks is there before it goes. Else whether it has
/// gone nevertheless, and what is wrong.
fn end(mut vm: Vm) -> Result<(), (bool, String)> {
    let id = vm.id().to_string();
    if vm.is_servers() {
        // The server's to end, and this user's to ask for it.
        let endpoint = vm.ledger().endpoint.clone();
        vm.let_go();
        let asked = GrpcCache::connect(Path::new(&endpoint)).and_then(|s| s.release(&id));
        return match asked {
            // Another may have ended it, or this call, the first time that it was made.
            Ok(()) | Err(Error::Gone { .. }) => Ok(()),
            Err(e) => {
                let text = "only its server can end it: ask again when that runs";
                Err((false, format!("VM {id} goes on: {}; {text}", chain(&e))))
            }
        };
    }
    if !holds_disks(&vm) {
        vm.destroy();
        return Ok(());
    }
    // It may have been paused.
    let awake = vm.resume().and_then(|()| vm.wake());
    let agent = awake.map_err(|e| workload::Error::Unwritten { text: chain(&e) });
    let ended = agent.and_then(|agent| Guest::new(vm, agent).stop(WRITING_OUT));
    ended.map_err(|e| (true, format!("VM {id} is gone, but {}", chain(&e))))
}

/// `vmcache list`.
pub fn list(common: &Common, j: Json) -> Outcome {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut vms: Vec<Value> = Vec::new();
    for (_, l) in Ledger::all(&store(common)?) {
        if !claimed(&l) {
            continue;
        }
        let alive = start_time(l.pid) == Some(l.start_time) && state(l.pid) != Some('Z');
        vms.push(json!({
            "id": l.id, "pid": l.pid, "state": if alive { "running" } else { "dead" },
            "source": l.source, "cpus": l.cpus, "memory_mib": l.memory_mib,
            "age_s": now.saturating_sub(l.created),
            "owner_pid": l.owner.map(|o| o.pid), "leased": l.owner.is_some_and(|o| o.lease),
        }));
    }
    if j.json {
        print::json(&Value::Array(vms))?;
        return Ok(0);
    }
    let heads = ["ID", "PID", "STATE", "SOURCE", "CPUS", "MIB", "AGE", "CLAIMED BY"];
    let mut rows = vec![heads.iter().map(|h| h.to_string()).collect::<Vec<_>>()];
    for vm in &vms {
        let text = |k: &str| vm[k].as_str().map_or_else(|| vm[k].to_string(), str::to_string);
        let owner = vm["owner_pid"].as_i64().map_or("-".into(), |p| format!("pid {p}"));
        let columns = ["id", "pid", "state", "source", "cpus", "memory_mib"];
        let mut row: Vec<String> = columns.iter().map(|k| text(k)).collect();
        row.extend([age(vm["age_s"].as_u64().unwrap_or(0)), owner]);
        rows.push(row);
    }
    print::table(&rows)?;
    Ok(0)
}
