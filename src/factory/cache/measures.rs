//! How long things take: histograms, for whoever reads them from status.

use std::time::Duration;

use serde_json::{json, Value};

/// Upper bounds, in microseconds; beyond the last: all that take longer.
pub const BOUNDS: [u64; 18] = [
    50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 500_000, 1_000_000,
    2_000_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000,
];

/// How many took how long.
#[derive(Clone, Copy, Debug, Default)]
pub struct Histogram {
    /// By the first bound that is no shorter; the last for all beyond.
    counts: [u64; BOUNDS.len() + 1],
    sum: Duration,
}

impl Histogram {
    /// One more, which took so long.
    pub fn add(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let at = BOUNDS.iter().position(|b| micros <= *b).unwrap_or(BOUNDS.len());
        self.counts[at] += 1;
        self.sum = self.sum.saturating_add(took);
    }

    /// Seconds, and how many took no longer; the last for all.
    pub fn json(&self) -> Value {
        let mut all = 0;
        let buckets: Vec<Value> = self
            .counts
            .iter()
            .enumerate()
            .map(|(n, count)| {
                all += count;
                json!({"le": BOUNDS.get(n).map(|b| *b as f64 / 1e6), "count": all})
            })
            .collect();
        json!({"buckets": buckets, "count": all, "sum": self.sum.as_secs_f64()})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_count_all_that_took_no_longer() {
        let mut histogram = Histogram::default();
        for micros in [50, 51, 3_000, 90_000_000] {
            histogram.add(Duration::from_micros(micros));
        }
        let json = histogram.json();
        let count = |n: usize| json["buckets"][n]["count"].as_u64().unwrap();
        assert_eq!((count(0), count(1), count(5), count(6)), (1, 2, 2, 3));
        assert_eq!((count(BOUNDS.len()), json["count"].as_u64().unwrap()), (4, 4));
        assert_eq!(json["buckets"][BOUNDS.len()]["le"], Value::Null);
        assert_eq!(json["buckets"][0]["le"], 0.00005);
        assert!((json["sum"].as_f64().unwrap() - 90.003_101).abs() < 1e-9);
    }
}
