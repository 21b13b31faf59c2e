//! What the appliance tells about itself: events (log line and metric together), traces, health.
//!
//! Layer 2. Each part has one file here with one struct per event; `emit()` writes the log line **and** moves the metric,
//! so that the two cannot disagree. Labels are bounded: route and topic template names, classes, states; never ids, never
//! tenants (unless declared by exact name), never text from a request.
//!
//! Metric names follow Prometheus: `dealscale_<part>_<what>_<unit>` with `_total`, `_seconds`, `_bytes`.

pub mod bridge;
pub mod broker;
pub mod delivery;
pub mod health;
pub mod logs;
pub mod n8n;
pub mod outbox;
pub mod payloads;
pub mod relay;
pub mod trace;

use std::sync::LazyLock;

use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

static REGISTRY: LazyLock<Registry> = LazyLock::new(Registry::new);

/// All metrics of the process.
pub fn registry() -> &'static Registry {
    &REGISTRY
}

fn register<M: prometheus::core::Collector + Clone + 'static>(metric: prometheus::Result<M>) -> M {
    // Names and labels are literals of ours: a mistake shows in the first test that touches the metric.
    let metric = metric.expect("a valid metric");
    REGISTRY.register(Box::new(metric.clone())).expect("a metric of its own name");
    metric
}

/// Makes and registers a metric. Call once per name, from a `LazyLock`.
pub fn counter(name: &str, help: &str) -> IntCounter {
    register(IntCounter::new(name, help))
}
pub fn counters(name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(IntCounterVec::new(Opts::new(name, help), labels))
}
pub fn gauge(name: &str, help: &str) -> IntGauge {
    register(IntGauge::new(name, help))
}
pub fn gauges(name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    register(IntGaugeVec::new(Opts::new(name, help), labels))
}
pub fn gauge_f64(name: &str, help: &str) -> Gauge {
    register(Gauge::new(name, help))
}
/// Seconds from 0.5 ms to a minute.
pub fn histogram(name: &str, help: &str) -> Histogram {
    register(Histogram::with_opts(HistogramOpts::new(name, help).buckets(seconds())))
}
pub fn histograms(name: &str, help: &str, labels: &[&str]) -> HistogramVec {
    register(HistogramVec::new(HistogramOpts::new(name, help).buckets(seconds()), labels))
}

fn seconds() -> Vec<f64> {
    vec![0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0]
}

/// Which program this is and since when it runs. Once per process.
pub fn started() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let info = gauges("dealscale_build_info", "1, with the version of the program.", &["version"]);
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let start = gauge("dealscale_start_timestamp_seconds", "When this process started.");
        start.set(crate::clock::Clock::System.now().as_secs());
    });
}

/// The Prometheus text format, version 0.0.4.
pub fn render() -> String {
    let mut text = String::new();
    let encoder = prometheus::TextEncoder::new();
    if let Err(error) = encoder.encode_utf8(&REGISTRY.gather(), &mut text) {
        tracing::error!(%error, "cannot render the metrics");
    }
    text
}
