//! `vmcache bench --advise RATE`: how large a pool has to be, from the refill measured
//! here and the claims that are expected.
//!
//! A VM's place in the pool is empty from its claim until another VM is ready. With
//! claims that come at random, at a mean rate λ, and refills that take T on average, at
//! most `c` of them at a time, the refills that are due are the customers of a queue with
//! `c` servers: a claim that finds the pool empty waits, and has a VM made, too. So a
//! claim waits when as many refills are due as the pool has places, or more.
//!
//! That is Erlang's second formula (C) where all of a pool's VMs can be made at once. His
//! first (B) would be for claims that go away instead of waiting: it promises too much here.
//!
//! Source: M/M/c.

use std::time::Duration;

use serde_json::{json, Value};

use super::{claims, wait_full, Measured};
use crate::cli::args::Bench;
use crate::cli::output::{Failure, FAILED, USAGE};
use crate::cli::print;
use crate::cli::progress::Progress;
use crate::config::{MAX_POOL, QEMU_MIB};
use crate::factory::grpccache::GrpcCache;

/// The part of claims that may wait.
const MAY_WAIT: f64 = 0.01;

/// What the advice rests on.
struct Basis {
    /// Claims a second.
    rate: f64,
    /// Of one VM.
    refill: Duration,
    /// How many refills that is the mean of.
    measured: u64,
    /// Refills at a time.
    parallel: usize,
    /// Of one VM, MiB.
    memory: u64,
}

/// The part of claims that find no VM, of a pool of `places`; all of them when claims come
/// faster than VMs are made.
fn waits(b: &Basis, places: usize) -> f64 {
    let load = b.rate * b.refill.as_secs_f64();
    // A pool has no more workers than VMs.
    let servers = b.parallel.min(places);
    let spare = 1.0 - load / servers as f64;
    if spare <= 0.0 {
        return 1.0;
    }
    // So many refills due, each from one fewer; the sums are kept within what numbers hold.
    let (mut term, mut below, mut from) = (1.0_f64, 0.0_f64, 0.0_f64);
    for due in 0..=places {
        if due > 0 {
            term *= load / due.min(servers) as f64;
        }
        match due < places {
            true => below += term,
            false => from += term,
        }
        let sum = below + from;
        if sum > 1e100 {
            (term, below, from) = (term / sum, below / sum, from / sum);
        }
    }
    // All that come after the last are a geometric series.
    from += term * (1.0 - spare) / spare;
    from / (below + from)
}

/// The smallest pool that will do.
fn smallest(b: &Basis) -> Option<usize> {
    (1..=MAX_POOL as usize).find(|n| waits(b, *n) <= MAY_WAIT)
}

/// Claims a second, from `0.5`, `30/min` or `1800/h`.
fn rate(text: &str) -> Option<f64> {
    let (number, unit) = text.split_once('/').unwrap_or((text, "s"));
    let seconds = match unit.trim() {
        "s" => 1.0,
        "min" | "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    let rate = number.trim().parse::<f64>().ok()? / seconds;
    (rate.is_finite() && rate > 0.0 && rate < 1e6).then_some(rate)
}

fn made(status: &Value) -> (u64, f64) {
    let of = |source: &str| {
        let histogram = &status["latency"][source];
        let (count, sum) = (histogram["count"].as_u64(), histogram["sum"].as_f64());
        (count.unwrap_or(0), sum.unwrap_or(0.0))
    };
    let (direct, template) = (of("direct"), of("template"));
    (direct.0 + template.0, direct.1 + template.1)
}

/// Measures the refill, and advises.
pub fn advise(server: &GrpcCache, b: &Bench, text: &str) -> Result<u8, Failure> {
    let Some(rate) = rate(text) else {
        let text = format!("--advise {text:?}: claims, as 0.5 (a second), 30/min or 1800/h");
        return Err(Failure::new(USAGE, text));
    };
    let progress = Progress::start("measuring the refill");
    let before = wait_full(server)?;
    let target = before["pool"]["target"].as_u64().unwrap_or(1) as usize;
    claims(server, b.n.max(target), &mut Measured::default())?;
    let after = wait_full(server)?;
    drop(progress);
    let ((count, sum), (n, all)) = (made(&before), made(&after));
    let measured = n.saturating_sub(count);
    if measured == 0 {
        let text = "no VM was made while the refill was measured: was the server restarted?";
        return Err(Failure::new(FAILED, text));
    }
    let memory = after["vms"][0]["memory_mib"].as_u64().unwrap_or(0) + QEMU_MIB;
    let refill = Duration::from_secs_f64(((all - sum) / measured as f64).max(1e-6));
    let parallel = after["pool"]["parallel"].as_u64().unwrap_or(1).max(1) as usize;
    report(b, &Basis { rate, refill, measured, parallel, memory })
}

fn report(b: &Bench, basis: &Basis) -> Result<u8, Failure> {
    let advice = smallest(basis);
    let refill = basis.refill.as_secs_f64();
    let most = basis.parallel as f64 / refill;
    let around = advice.unwrap_or(1);
    let sizes: Vec<usize> = [around / 2, around.saturating_sub(1), around, around + 1, around * 2]
        .into_iter()
        .filter(|n| *n > 0)
        .collect::<std::collections::BTreeSet<_>>()
        .into_iter()
        .collect();
    if b.json.json {
        let pools: Vec<Value> = sizes
            .iter()
            .map(|n| json!({"vm_cache_number": n, "wait": waits(basis, *n), "memory_mib": basis.memory * *n as u64}))
            .collect();
        let out = json!({
            "claims_per_second": basis.rate, "refill_s": refill, "refills": basis.measured,
            "parallel": basis.parallel, "most_per_second": most, "may_wait": MAY_WAIT,
            "vm_cache_number": advice, "pools": pools,
        });
        print::json(&out)?;
        return Ok(u8::from(advice.is_none()));
    }
    print::line(format!(
        "refill  {refill:.2} s a VM (mean of {}), {} at a time: {most:.2} VMs a second at most",
        basis.measured, basis.parallel
    ))?;
    print::block(format!("claims  {:.3} a second\n\n", basis.rate))?;
    let Some(advice) = advice else {
        let text = "no pool is large enough: claims come faster than VMs are made; make clones \
                    (enable_template), raise boot_parallel where processors are idle, or spread \
                    the claims over more nodes";
        return Err(Failure::new(FAILED, text));
    };
    let mut rows =
        vec![["VM_CACHE_NUMBER", "CLAIMS THAT WAIT", "MEMORY"].map(String::from).to_vec()];
    for n in sizes {
        rows.push(vec![
            n.to_string(),
            format!("{:.2} %", 100.0 * waits(basis, n)),
            format!("{} MiB", basis.memory * n as u64),
        ]);
    }
    print::table(&rows)?;
    let share = 100.0 * MAY_WAIT;
    print::block(format!(
        "\nvm_cache_number = {advice}: no more than {share:.0} of 100 claims wait for a VM\n"
    ))?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basis(rate: f64, seconds: f64, parallel: usize) -> Basis {
        let refill = Duration::from_secs_f64(seconds);
        Basis { rate, refill, measured: 1, parallel, memory: 320 }
    }

    #[test]
    fn with_as_many_refills_as_places_it_is_erlangs_table() {
        // C(2, 1) and C(5, 3), from his table.
        assert!((waits(&basis(1.0, 1.0, 2), 2) - 1.0 / 3.0).abs() < 1e-9);
        assert!((waits(&basis(3.0, 1.0, 5), 5) - 0.2362).abs() < 1e-4);
        assert!((waits(&basis(2.0, 1.0, 200), 7) - 0.0048).abs() < 1e-4);
        assert_eq!(smallest(&basis(2.0, 1.0, 200)), Some(7));
    }

    #[test]
    fn with_one_refill_at_a_time_it_is_the_queue_of_one_server() {
        // M/M/1: so many or more with the load to that power.
        assert!((waits(&basis(0.5, 1.0, 1), 4) - 0.5_f64.powi(4)).abs() < 1e-12);
        assert_eq!(smallest(&basis(0.9, 1.0, 1)), Some(44));
        assert_eq!(smallest(&basis(2.0, 1.0, 2)), None);
        assert!(waits(&basis(900.0, 1.0, 1000), 4000) <= 1.0);
    }

    #[test]
    fn rates_are_read_by_the_second_the_minute_and_the_hour() {
        assert_eq!(rate("0.5"), Some(0.5));
        assert_eq!(rate("30/min"), Some(0.5));
        assert_eq!(rate("1800/h"), Some(0.5));
        for bad in ["", "0", "-1", "x", "1/day", "inf"] {
            assert_eq!(rate(bad), None, "{bad}");
        }
    }
}
