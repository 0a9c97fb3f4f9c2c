//! Durations: quantiles, a row of a table, a histogram.

use std::time::Duration;

use serde_json::{json, Value};

use crate::cli::print;

/// Width of a histogram's longest bar.
const BAR: usize = 40;

/// What was measured.
#[derive(Default)]
pub struct Samples(Vec<Duration>);

impl Samples {
    /// Adds one.
    pub fn add(&mut self, d: Duration) {
        self.0.push(d);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The smallest that so large a part does not exceed.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let mut sorted = self.0.clone();
        sorted.sort();
        let rank = (sorted.len() as f64 * part).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied()
    }

    fn four(&self) -> [Duration; 4] {
        [0.5, 0.9, 0.99, 1.0].map(|q| self.quantile(q).unwrap_or_default())
    }

    /// A row: name, count, p50, p90, p99, max.
    pub fn row(&self, name: &str) -> Vec<String> {
        let mut row = vec![name.to_string(), self.len().to_string()];
        row.extend(self.four().map(show));
        row
    }

    /// The same as JSON, in microseconds.
    pub fn json(&self) -> Value {
        let [p50, p90, p99, max] = self.four().map(|d| d.as_micros() as u64);
        json!({"n": self.len(), "p50_us": p50, "p90_us": p90, "p99_us": p99, "max_us": max})
    }

    /// A histogram with four buckets to each doubling.
    pub fn histogram(&self) -> String {
        let bucket = |d: &Duration| (d.as_secs_f64().max(1e-9).log2() * 4.0).floor() as i32;
        let mut counts = std::collections::BTreeMap::new();
        for d in &self.0 {
            *counts.entry(bucket(d)).or_insert(0usize) += 1;
        }
        let most = counts.values().copied().max().unwrap_or(1);
        let mut out = String::new();
        for (b, n) in counts {
            let upper = Duration::from_secs_f64(2f64.powf(f64::from(b + 1) / 4.0));
            let bar = "#".repeat((n * BAR).div_ceil(most));
            out.push_str(&format!("  up to {:>9}  {n:>4}  {bar}\n", show(upper)));
        }
        out
    }
}

/// A duration with three digits that count.
pub fn show(d: Duration) -> String {
    let us = d.as_secs_f64() * 1e6;
    match us {
        0.0..1e3 => format!("{us:.0} µs"),
        1e3..1e4 => format!("{:.2} ms", us / 1e3),
        1e4..1e6 => format!("{:.0} ms", us / 1e3),
        _ => format!("{:.2} s", us / 1e6),
    }
}

/// Prints a figure of the specification beside its bound.
///
/// # Errors
/// As [`print::line`].
pub fn bound(name: &str, what: &str, value: Option<f64>, bound: f64) -> print::Printed {
    let Some(v) = value else { return Ok(()) };
    let verdict = if v <= bound { "met" } else { "NOT met" };
    let digits = if bound < 0.1 { 3 } else { 2 };
    print::line(format!("{name}  {what}: {v:.3} (at most {bound:.digits$}: {verdict})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_was_added() {
        let mut s = Samples::default();
        assert_eq!(s.quantile(0.5), None);
        for ms in (1..=100).rev() {
            s.add(Duration::from_millis(ms));
        }
        assert_eq!(s.quantile(0.5), Some(Duration::from_millis(50)));
        assert_eq!(s.quantile(0.99), Some(Duration::from_millis(99)));
        assert_eq!(s.quantile(1.0), Some(Duration::from_millis(100)));
        assert_eq!(show(Duration::from_micros(123)), "123 µs");
        assert_eq!(show(Duration::from_millis(1500)), "1.50 s");
        assert!(s.histogram().lines().count() > 10);
    }
}
