//! What the outbox tells.

use std::path::Path;
use std::sync::LazyLock;

use prometheus::{IntCounter, IntGauge};

use crate::outbox::Status;

struct Gauges {
    records: IntGauge,
    bytes: IntGauge,
    leased: IntGauge,
    poisoned: IntGauge,
    disk_free: IntGauge,
    oldest: IntGauge,
}

static GAUGES: LazyLock<Gauges> = LazyLock::new(|| Gauges {
    records: super::gauge("dealscale_outbox_records", "Records that wait in the outboxes."),
    bytes: super::gauge("dealscale_outbox_bytes", "Bytes of records that wait in the outboxes."),
    leased: super::gauge("dealscale_outbox_leased_records", "Records that the relay works on."),
    poisoned: super::gauge("dealscale_outbox_poisoned_records", "Records that can never be relayed."),
    disk_free: super::gauge("dealscale_outbox_disk_free_bytes", "Free bytes of the outbox's disk."),
    oldest: super::gauge(
        "dealscale_outbox_oldest_timestamp_seconds",
        "When the oldest waiting record was accepted; 0 without one.",
    ),
});
static FAILURES: LazyLock<IntCounter> = LazyLock::new(|| {
    super::counter("dealscale_outbox_store_failures_total", "Failed writes, syncs and opens of the store.")
});
static SALVAGES: LazyLock<IntCounter> =
    LazyLock::new(|| super::counter("dealscale_outbox_salvages_total", "Damaged stores that were set aside."));

/// Figures after a batch.
pub fn gauges(status: &Status) {
    GAUGES.records.set(status.records as i64);
    GAUGES.bytes.set(status.bytes as i64);
    GAUGES.leased.set(status.leased as i64);
    GAUGES.poisoned.set(status.poisoned as i64);
    GAUGES.disk_free.set(status.disk_free as i64);
    GAUGES.oldest.set(status.oldest.map_or(0, |t| t.as_secs()));
}

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
