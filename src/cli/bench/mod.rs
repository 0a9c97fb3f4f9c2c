//! `vmcache bench`: what this server takes, side by side in one run.
//!
//! Claims are measured in rounds that begin with a full pool and empty it, each
//! with a Config call on the same connection beside it: that call is the floor
//! of any call here, and suffers alike from the boots that have begun.
//! Every VM that is claimed is ended afterwards.

mod advise;
mod idle;
mod refill;
mod relayed;
mod samples;

use std::time::{Duration, Instant};

use serde_json::{json, Value};

use super::args::{Bench, Common};
use super::output::{Failure, FAILED, NO_VM};
use super::progress::Progress;
use super::{connect, endpoint, optional_config, print, Outcome};
use crate::config::Config;
use crate::factory::grpccache::GrpcCache;
use crate::factory::{direct, BaseFactory, Wanted};
use crate::vm::wire;
use crate::worker::Worker;
use crate::workload::{Command, Guest};
use samples::{bound, Samples};

/// Between two looks at a pool that is filling.
const LOOK: Duration = Duration::from_millis(20);
/// Longest wait for a full pool.
const FULL: Duration = Duration::from_secs(300);

/// All that was measured.
#[derive(Default)]
struct Measured {
    config: Samples,
    claim: Samples,
    run: Samples,
    refill: Samples,
    cold: Samples,
    burst: Samples,
    idle: Option<Value>,
}

/// Measures and prints.
pub fn bench(common: &Common, b: &Bench) -> Outcome {
    if let Some(clones) = b.refill {
        return refill::bench(Config::load(common.config.as_deref())?, b, clones);
    }
    if let Some(uid) = b.relay_uid {
        return relayed::bench(common, b, uid);
    }
    let server = connect(common)?;
    if let Some(rate) = &b.advise {
        return advise::advise(&server, b, rate);
    }
    let config = optional_config(common)?;
    let mut m = Measured::default();
    let details = wait_full(&server)?;
    if !b.idle.is_zero() {
        let progress = Progress::start("watching the idle server");
        m.idle = Some(idle::watch(&details, b.idle)?);
        drop(progress);
    }
    let progress = Progress::start("measuring claims");
    claims(&server, b.n, &mut m)?;
    drop(progress);
    let progress = Progress::start("measuring runs");
    runs(&server, b.n, &mut m)?;
    drop(progress);
    if b.concurrency > 0 {
        let progress = Progress::start("measuring a burst");
        burst(common, &server, b.concurrency, &mut m)?;
        drop(progress);
    }
    if let Some(config) = config.filter(|_| b.cold > 0) {
        wait_full(&server)?;
        let _progress = Progress::start("measuring cold runs");
        cold(&config, b.cold, &mut m)?;
    }
    report(b, &m)?;
    Ok(0)
}

/// Waits until the pool is full and at rest, and nothing boots; the status then.
fn wait_full(server: &GrpcCache) -> Result<Value, Failure> {
    let deadline = Instant::now() + FULL;
    loop {
        let v = server.fetch_details()?;
        let pool = |k: &str| v["pool"][k].as_u64().unwrap_or(0);
        if pool("target") > 0
            && pool("ready") >= pool("target")
            && pool("booting") + pool("awake") == 0
        {
            return Ok(v);
        }
        if Instant::now() > deadline {
            let error = v["last_error"].as_str().unwrap_or("no error told");
            let text = format!("the pool did not fill within {} s: {error}", FULL.as_secs());
            return Err(Failure::new(NO_VM, text));
        }
        pause();
    }
}

#[allow(clippy::disallowed_methods)] // Status is asked for; nothing tells when it changes.
fn pause() {
    std::thread::sleep(LOOK);
}

/// Empties the pool again and again, a Config call with each claim: now the one
/// first, now the other, so that what a pause makes slow is shared evenly.
fn claims(server: &GrpcCache, n: usize, m: &mut Measured) -> Result<(), Failure> {
    let mut config_first = true;
    while m.claim.len() < n {
        let details = wait_full(server)?;
        let ready = details["pool"]["ready"].as_u64().unwrap_or(1) as usize;
        let mut claimed = Vec::new();
        for _ in 0..ready.min(n - m.claim.len()) {
            if config_first {
                floor(server, m)?;
            }
            let start = Instant::now();
            let message = server.claim_raw(Some(FULL))?;
            m.claim.add(start.elapsed());
            claimed.push(wire::from_wire(&message, || Err("no word of the agent".into()))?);
            if !config_first {
                floor(server, m)?;
            }
        }
        config_first = !config_first;
        let empty = Instant::now();
        let taken = claimed.len();
        drop(claimed);
        wait_full(server)?;
        m.refill.add(empty.elapsed() / taken as u32);
    }
    Ok(())
}

/// A Config call: what any call on this connection takes.
fn floor(server: &GrpcCache, m: &mut Measured) -> Result<(), Failure> {
    let start = Instant::now();
    server.fetch_config_raw()?;
    m.config.add(start.elapsed());
    Ok(())
}

/// Claim, wake, run `true`, exit code: what `vmcache run -- true` does.
fn runs(server: &GrpcCache, n: usize, m: &mut Measured) -> Result<(), Failure> {
    for _ in 0..n {
        wait_full(server)?;
        let start = Instant::now();
        let mut vm = server.get_base_vm(Some(FULL))?;
        let agent = vm.wake()?;
        let guest = Guest::new(vm, agent);
        let code = guest.spawn(&Command::new("/sbin/vmcache-agent").arg("--version"))?.wait()?;
        m.run.add(start.elapsed());
        if code != 0 {
            return Err(Failure::new(FAILED, format!("the measured command ended with {code}")));
        }
    }
    Ok(())
}

fn cold(config: &Config, n: usize, m: &mut Measured) -> Result<(), Failure> {
    for _ in 0..n {
        let start = Instant::now();
        let (vm, agent) = direct::cold(config, &Wanted::default(), true, &|_| {})?;
        let guest = Guest::new(vm, agent);
        guest.spawn(&Command::new("/sbin/vmcache-agent").arg("--version"))?.wait()?;
        m.cold.add(start.elapsed());
    }
    Ok(())
}

/// Many clients at once, each on a connection of its own.
fn burst(
    common: &Common,
    server: &GrpcCache,
    clients: usize,
    m: &mut Measured,
) -> Result<(), Failure> {
    wait_full(server)?;
    let socket = endpoint(common)?;
    let mut workers = Vec::new();
    for n in 0..clients {
        let socket = socket.clone();
        let failed = |e: crate::worker::Error| Failure::new(FAILED, e.to_string());
        let work = move || -> Result<Duration, Failure> {
            let client = GrpcCache::connect(&socket)?;
            let start = Instant::now();
            let message = client.claim_raw(Some(FULL))?;
            let took = start.elapsed();
            wire::from_wire(&message, || Err("no word of the agent".into()))?.destroy();
            Ok(took)
        };
        workers.push(Worker::spawn(&format!("vmc-client-{n}"), work).map_err(failed)?);
    }
    for worker in workers {
        let took = worker.join(FULL).map_err(|e| Failure::new(FAILED, e.to_string()))??;
        m.burst.add(took);
    }
    Ok(())
}

fn report(b: &Bench, m: &Measured) -> print::Printed {
    let ratio = |a: &Samples, b: &Samples| match (a.quantile(0.5), b.quantile(0.5)) {
        (Some(a), Some(b)) if !b.is_zero() => Some(a.as_secs_f64() / b.as_secs_f64()),
        _ => None,
    };
    let s1 = ratio(&m.claim, &m.config);
    let s2 = ratio(&m.run, &m.cold);
    let all = [
        ("Config call", &m.config),
        ("GetBaseVM, VM ready", &m.claim),
        ("run, VM ready", &m.run),
        ("run --cold", &m.cold),
        ("refill, per VM", &m.refill),
        ("claims at once", &m.burst),
    ];
    if b.json.json {
        let mut out = json!({"S1": s1, "S2": s2, "idle": m.idle});
        for (name, samples) in all {
            out[name] = samples.json();
        }
        return print::json(&out);
    }
    let heads = ["", "n", "p50", "p90", "p99", "max"];
    let mut rows = vec![heads.iter().map(|h| h.to_string()).collect::<Vec<_>>()];
    rows.extend(all.iter().filter(|(_, s)| s.len() > 0).map(|(name, s)| s.row(name)));
    print::table(&rows)?;
    print::line("")?;
    bound("S1", "p50 of GetBaseVM / p50 of Config", s1, 1.3)?;
    bound("S2", "p50 of run on a ready VM / p50 of run --cold", s2, 0.1)?;
    if let Some(idle) = &m.idle {
        print::block(idle::render(idle))?;
    }
    print::block(format!("\nGetBaseVM, VM ready:\n{}\n", m.claim.histogram()))?;
    print::block(format!("run, VM ready:\n{}\n", m.run.histogram()))
}
