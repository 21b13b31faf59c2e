//! Latencies and their percentiles.

use std::time::Duration;

#[derive(Default)]
pub struct Latencies(Vec<Duration>);

impl Latencies {
    pub fn add(&mut self, latency: Duration) {
        self.0.push(latency);
    }

    /// Adds `{prefix}p50_ms` and its neighbours to `json`.
    pub fn write(&self, prefix: &str, json: &mut serde_json::Value) {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        for (name, share) in [("p50_ms", 0.50), ("p90_ms", 0.90), ("p99_ms", 0.99), ("p999_ms", 0.999), ("max_ms", 1.0)]
        {
            // Nearest rank.
            let rank = (share * sorted.len() as f64).ceil() as usize;
            let value = sorted.get(rank.saturating_sub(1)).map(|d| d.as_secs_f64() * 1_000.0);
            json[format!("{prefix}{name}")] = value.into();
        }
    }
}
