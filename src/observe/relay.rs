//! From the outbox to payload store and broker.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::{counter, counters, gauge, histogram};
use crate::ids::Key;

static RELAYED: LazyLock<IntCounter> =
    LazyLock::new(|| counter("dealscale_relay_events_total", "Events that payload store and broker have confirmed."));
static SETTLED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_relay_settled_total", "Events that left the outbox without the broker.", &["reason"])
});
static FAILURES: LazyLock<IntCounterVec> =
    LazyLock::new(|| counters("dealscale_relay_failures_total", "Failed tries, by the side that failed.", &["side"]));
static BATCH_SECONDS: LazyLock<Histogram> =
    LazyLock::new(|| histogram("dealscale_relay_batch_seconds", "From the lease of a batch to its last receipt."));
static FAILING: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("dealscale_relay_failing", "1 while payload store, broker or outbox fail the relay."));

/// A batch went through (all of it, or what the broker took).
pub struct Relayed {
    pub events: usize,
    pub took: Duration,
}

impl Relayed {
    pub fn emit(&self) {
        RELAYED.inc_by(self.events as u64);
        BATCH_SECONDS.observe(self.took.as_secs_f64());
        tracing::debug!(events = self.events, took_ms = self.took.as_millis() as u64, "relayed");
    }
}

/// An event left the outbox without being published: already known, recorded only, or waiting for its time in the ledger.
pub struct Settled {
    pub reason: &'static str,
}

impl Settled {
    pub fn emit(&self) {
        SETTLED.with_label_values(&[self.reason]).inc();
    }
}

/// A record can never be relayed.
pub struct Poisoned<'a> {
    pub key: &'a Key,
    pub reason: &'a str,
}

impl Poisoned<'_> {
    pub fn emit(&self) {
        SETTLED.with_label_values(&["poisoned"]).inc();
        tracing::error!(tenant = %self.key.tenant, execution_id = %self.key.execution_id, reason = self.reason, "poisoned");
    }
}

/// Something behind the outbox does not work: the outbox fills meanwhile.
pub struct Failing<'a> {
    pub side: &'static str,
    pub error: &'a str,
    pub again_in: Duration,
}

impl Failing<'_> {
    pub fn emit(&self) {
        FAILURES.with_label_values(&[self.side]).inc();
        FAILING.set(1);
        let again_in_ms = self.again_in.as_millis() as u64;
        tracing::warn!(side = self.side, error = self.error, again_in_ms, "the relay waits");
    }
}

/// It works again.
pub struct Recovered;

impl Recovered {
    pub fn emit(&self) {
        FAILING.set(0);
        tracing::info!("the relay works again");
    }
}
