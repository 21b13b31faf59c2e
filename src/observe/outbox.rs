//! What the outbox tells.

use std::path::Path;
use std::sync::LazyLock;

use prometheus::{IntCounter, IntGaugeVec};

/// What is in one environment's outbox, and how much room is left.
pub struct Figures<'a> {
    pub environment: &'a str,
    pub records: u64,
    pub bytes: u64,
    pub leased: u64,
    pub poisoned: u64,
    pub disk_free: u64,
    pub oldest_seconds: i64,
}

static GAUGES: LazyLock<[IntGaugeVec; 6]> = LazyLock::new(|| {
    let gauge = |name: &str, help: &str| super::gauges(name, help, &["environment"]);
    [
        gauge("dealscale_outbox_records", "Records that wait in the outbox."),
        gauge("dealscale_outbox_bytes", "Bytes of records that wait in the outbox."),
        gauge("dealscale_outbox_leased_records", "Records that the relay works on."),
        gauge("dealscale_outbox_poisoned_records", "Records that can never be relayed."),
        gauge("dealscale_outbox_disk_free_bytes", "Free bytes of the outbox's disk."),
        gauge(
            "dealscale_outbox_oldest_timestamp_seconds",
            "When the oldest waiting record was accepted; 0 without one.",
        ),
    ]
});

impl Figures<'_> {
    pub fn set(&self) {
        let unsigned = [self.records, self.bytes, self.leased, self.poisoned, self.disk_free];
        let values = unsigned.map(|n| n as i64).into_iter().chain([self.oldest_seconds]);
        for (gauge, value) in GAUGES.iter().zip(values) {
            gauge.with_label_values(&[self.environment]).set(value);
        }
    }
}

static FAILURES: LazyLock<IntCounter> = LazyLock::new(|| {
    super::counter("dealscale_outbox_store_failures_total", "Failed writes, syncs and opens of the store.")
});
static SALVAGES: LazyLock<IntCounter> =
    LazyLock::new(|| super::counter("dealscale_outbox_salvages_total", "Damaged stores that were set aside."));

/// A write, a sync or an open failed; the store is opened again.
pub struct StoreFailed<'a> {
    pub dir: &'a Path,
    pub error: &'a dyn std::fmt::Display,
}

impl StoreFailed<'_> {
    pub fn emit(&self) {
        FAILURES.inc();
        tracing::error!(dir = %self.dir.display(), error = %self.error, "the outbox's store failed; it is opened again");
    }
}

/// A damaged store was set aside.
pub struct Salvaged<'a> {
    pub dir: &'a Path,
    pub aside: &'a Path,
    pub records: u64,
    pub unreadable: u64,
}

impl Salvaged<'_> {
    pub fn emit(&self) {
        SALVAGES.inc();
        tracing::error!(
            dir = %self.dir.display(), aside = %self.aside.display(), records = self.records, unreadable = self.unreadable,
            "the outbox's store was damaged; its readable records were salvaged, data loss is possible"
        );
    }
}
