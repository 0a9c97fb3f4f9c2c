//! `vmcache bench --refill`: clones beside cold boots, in one run, without a
//! server: time until ready, memory, and the first command.
//!
//! Every VM that is measured is ended afterwards; the template stays.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use super::samples::{bound, show, Samples};
use crate::cli::args::Bench;
use crate::cli::output::{Failure, FAILED};
use crate::cli::print;
use crate::cli::progress::Progress;
use crate::config::Config;
use crate::factory::template::Template;
use crate::vm::boot::{boot, Purpose};
use crate::vm::Vm;
use crate::worker::Worker;
use crate::workload::{self, rehearsal, Command, Guest};

/// VMs that are made at once.
const AT_ONCE: usize = 4;
/// The clone whose memory S4 is about: the eighth.
const EIGHTH: usize = 7;
/// Longest wait for VMs that are made at once.
const LONG: Duration = Duration::from_secs(600);
/// Made for the measurement, and gone with the thread that asked for it.
const PURPOSE: Purpose = Purpose::Own { leased: true, waits: true };

/// One way to make VMs, and what it took.
#[derive(Default)]
struct Way {
    each: Samples,
    rest: Samples,
    at_once: Option<Duration>,
    run: Samples,
    vms: Vec<Vm>,
    /// Resident and proportional memory of each VM, KiB.
    memory: Vec<(u64, u64)>,
}

/// Measures and prints.
pub fn bench(config: Config, b: &Bench, clones: usize) -> Result<u8, Failure> {
    config.check_files()?;
    config.check_template()?;
    let config = Arc::new(config);
    let template = Arc::new(Template::new(&config));
    let progress = Progress::start("making the template");
    template.create(&mut |_| {})?;
    drop(progress);
    let booting = Arc::new(config.giving_back(false)?);
    let giving = config.giving_back(true)?;
    let (mut direct, mut given) = (Way::default(), Way::default());
    let mut cloned = Way::default();
    let progress = Progress::start("booting and cloning, one after the other");
    // In turn, so that what else the machine does is shared evenly.
    for n in 0..clones.max(b.cold) {
        if n < b.cold {
            direct.make(|| boot(&booting, &PURPOSE, &mut |_| {}))?;
            given.make(|| boot(&giving, &PURPOSE, &mut |_| {}))?;
        }
        if n < clones {
            cloned.make(|| template.clone_vm(&PURPOSE, &mut |_| {}))?;
        }
    }
    // What the template itself takes, mapped by clones or not.
    let kept = template.size().unwrap_or(0) >> 20;
    for way in [&mut direct, &mut given, &mut cloned] {
        way.memory = way.vms.iter().map(|vm| memory(vm.pid())).collect();
    }
    drop(progress);
    let progress = Progress::start("running a command in each");
    // In turn again, while there are both.
    while [&mut direct, &mut given, &mut cloned].iter().any(|w| !w.vms.is_empty()) {
        for way in [&mut direct, &mut given, &mut cloned] {
            way.run_one()?;
        }
    }
    drop(progress);
    let progress = Progress::start("booting and cloning, four at once");
    let cloning = template;
    direct.at_once = Some(at_once(move || boot(&booting, &PURPOSE, &mut |_| {}).map(drop))?);
    let clone = move || cloning.clone_vm(&PURPOSE, &mut |_| {}).map(drop);
    cloned.at_once = Some(at_once(clone)?);
    drop(progress);
    report(b, &direct, &given, &cloned, kept)?;
    Ok(0)
}

impl Way {
    fn make<E>(&mut self, make: impl FnOnce() -> Result<Vm, E>) -> Result<(), Failure>
    where
        Failure: From<E>,
    {
        let start = Instant::now();
        let mut vm = make()?;
        self.each.add(start.elapsed());
        // From here on it could be claimed; in a pool, this is done while nobody does.
        rehearsal::run_at(vm.agent_address()).map_err(workload::Error::Agent)?;
        vm.pause()?;
        self.rest.add(start.elapsed());
        self.vms.push(vm);
        Ok(())
    }

    /// Wakes a VM, if there is one, runs a command in it, and ends it, as
    /// `run -- true` does.
    fn run_one(&mut self) -> Result<(), Failure> {
        let Some(mut vm) = self.vms.pop() else { return Ok(()) };
        let start = Instant::now();
        let agent = vm.wake()?;
        let guest = Guest::new(vm, agent);
        let code = guest.spawn(&Command::new("/sbin/vmcache-agent").arg("--version"))?.wait()?;
        self.run.add(start.elapsed());
        if code != 0 {
            let text = format!("the measured command ended with {code}");
            return Err(Failure::new(FAILED, text));
        }
        Ok(())
    }

    fn mean(&self, column: impl Fn(&(u64, u64)) -> u64) -> f64 {
        let sum: u64 = self.memory.iter().map(column).sum();
        sum as f64 / self.memory.len().max(1) as f64 / 1024.0
    }
}

/// The time until so many at once are ready; they are ended at once.
fn at_once<E>(
    make: impl Fn() -> Result<(), E> + Send + Clone + 'static,
) -> Result<Duration, Failure>
where
    E: Send + 'static,
    Failure: From<E>,
{
    let failed = |e: crate::worker::Error| Failure::new(FAILED, e.to_string());
    let start = Instant::now();
    let mut workers = Vec::new();
    for n in 0..AT_ONCE {
        let make = make.clone();
        workers.push(Worker::spawn(&format!("vmc-make-{n}"), make).map_err(failed)?);
    }
    for worker in workers {
        worker.join(LONG).map_err(failed)??;
    }
    Ok(start.elapsed())
}

/// Resident and proportional memory of a process, KiB.
fn memory(pid: i32) -> (u64, u64) {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let value = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    (value("Rss:"), value("Pss:"))
}

fn ratio(a: Option<Duration>, b: Option<Duration>) -> Option<f64> {
    let (a, b) = (a?, b?);
    (!b.is_zero()).then(|| a.as_secs_f64() / b.as_secs_f64())
}

fn report(b: &Bench, direct: &Way, given: &Way, cloned: &Way, kept: u64) -> print::Printed {
    let s3 = ratio(cloned.each.quantile(0.5), direct.each.quantile(0.5));
    let s3_at_once = ratio(cloned.at_once, direct.at_once);
    let run = ratio(cloned.run.quantile(0.5), direct.run.quantile(0.5));
    let eighth = cloned.memory.get(EIGHTH).or(cloned.memory.last()).map(|m| m.1 as f64 / 1024.0);
    let s4 = eighth.map(|e| e / direct.mean(|m| m.1).max(0.001));
    let ways = [("direct", direct), ("direct, reclaimed", given), ("template", cloned)];
    let per_minute = |d: Option<Duration>, n: usize| {
        d.filter(|d| !d.is_zero()).map_or(0.0, |d| 60.0 * n as f64 / d.as_secs_f64())
    };
    if b.json.json {
        let mut out = json!({
            "S3": s3, "S3_four_at_once": s3_at_once, "S4": s4, "run": run,
            "template_mib": kept,
        });
        for (name, way) in ways {
            out[name] = json!({
                "ready": way.each.json(), "at_rest": way.rest.json(), "run": way.run.json(),
                "four_at_once_s": way.at_once.map(|d| d.as_secs_f64()),
                "rss_mib": way.mean(|m| m.0), "pss_mib": way.mean(|m| m.1),
                "vms": way.memory.len(),
            });
        }
        return print::json(&out);
    }
    let text = |words: &[&str]| words.iter().map(|w| w.to_string()).collect::<Vec<_>>();
    let mut rows = vec![text(&["", "n", "p50", "p90", "p99", "max"])];
    for (name, way) in ways {
        rows.push(way.each.row(&format!("{name}, until ready")));
        rows.push(way.rest.row(&format!("{name}, until at rest")));
        rows.push(way.run.row(&format!("{name}, first command")));
    }
    print::table(&rows)?;
    print::line("")?;
    let heads = ["", "VMs", "RSS/VM MiB", "all", "PSS/VM MiB", "all", "VMs/min", "four at once"];
    let mut rows = vec![text(&heads)];
    for (name, way) in ways {
        let (rss, pss) = (way.mean(|m| m.0), way.mean(|m| m.1));
        rows.push(vec![
            name.to_string(),
            way.memory.len().to_string(),
            format!("{rss:.0}"),
            format!("{:.0}", rss * way.memory.len() as f64),
            format!("{pss:.0}"),
            format!("{:.0}", pss * way.memory.len() as f64),
            format!("{:.0}", per_minute(way.each.quantile(0.5), 1)),
            way.at_once.map_or("-".into(), |d| {
                format!("{}, {:.0}/min", show(d), per_minute(Some(d), AT_ONCE))
            }),
        ]);
    }
    print::table(&rows)?;
    let own = "of which the clones' PSS has what they map";
    print::block(format!("the template's own memory: {kept} MiB, {own}\n\n"))?;
    bound("S3", "p50 of a clone / p50 of a cold boot, until ready", s3, 1.0 / 12.0)?;
    if let Some(v) = s3_at_once {
        print::line(format!("    the same for four at once: {v:.3}"))?;
    }
    bound("S4", "memory (PSS) of the eighth clone / of a direct VM", s4, 0.2)?;
    bound("  ", "p50 of the first command in a clone / in a direct VM", run, 1.2)
}
