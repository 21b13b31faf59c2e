//! What the payload store and the ledger tell.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::{HistogramVec, IntCounterVec, IntGaugeVec};

use super::{counters, gauges, histograms};
use crate::ids::Environment;

static REACHABLE: LazyLock<IntGaugeVec> =
    LazyLock::new(|| gauges("dealscale_payloads_reachable", "Whether the ledger's database answers", &["environment"]));
static SECONDS: LazyLock<HistogramVec> = LazyLock::new(|| {
    histograms("dealscale_payloads_seconds", "Time of one transaction of the ledger", &["environment", "doing"])
});
static ITEMS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters(
        "dealscale_payloads_items_total",
        "Events that transactions of the ledger carried",
        &["environment", "doing"],
    )
});
static ERRORS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_payloads_errors_total", "Operations of the ledger that failed", &["environment", "doing"])
});
static COLLECTED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_payloads_collected_total", "Payloads and rows deleted by age", &["environment", "what"])
});
static REJECTED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters(
        "dealscale_payloads_rejected_total",
        "Messages without a row: kept, or refused at the limit",
        &["environment", "kept"],
    )
});
static DAMAGED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_payloads_damaged_total", "Rows or payloads that could not be read", &["environment"])
});
static REOPENED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters(
        "dealscale_payloads_reopened_total",
        "Times the file was opened anew after a failed write",
        &["environment"],
    )
});

/// One transaction of the ledger ended well.
pub struct Done<'a> {
    pub environment: &'a Environment,
    pub doing: &'static str,
    pub items: usize,
    pub took: Duration,
}

impl Done<'_> {
    pub fn emit(&self) {
        let labels = [self.environment.as_str(), self.doing];
        SECONDS.with_label_values(&labels).observe(self.took.as_secs_f64());
        ITEMS.with_label_values(&labels).inc_by(self.items as u64);
    }
}

/// One operation failed.
pub struct Failed<'a> {
    pub environment: &'a Environment,
    pub doing: &'static str,
    pub cause: &'a str,
}

impl Failed<'_> {
    pub fn emit(&self) {
        ERRORS.with_label_values(&[self.environment.as_str(), self.doing]).inc();
        tracing::debug!(environment = %self.environment, doing = self.doing, cause = self.cause, "the ledger failed");
    }
}

/// The database answers again, or no longer. Said once per change.
pub struct Reachable<'a> {
    pub environment: &'a Environment,
    pub kind: &'static str,
    pub cause: Option<&'a str>,
}

impl Reachable<'_> {
    pub fn emit(&self) {
        let Self { environment, kind, cause } = self;
        REACHABLE.with_label_values(&[environment.as_str()]).set(i64::from(cause.is_none()));
        match cause {
            None => tracing::info!(%environment, kind, "the payload store works"),
            Some(cause) => {
                tracing::warn!(%environment, kind, cause, "the payload store does not work; events wait in the outbox")
            }
        }
    }
}

/// The database's tables are those of this release.
pub struct Migrated<'a> {
    pub environment: &'a Environment,
    pub kind: &'static str,
    pub applied: usize,
    pub took: Duration,
}

impl Migrated<'_> {
    pub fn emit(&self) {
        let (environment, kind, applied) = (self.environment, self.kind, self.applied);
        tracing::info!(%environment, kind, applied, seconds = self.took.as_secs_f64(), "the ledger's tables are up to date");
    }
}

/// Age took payloads or rows of complete events.
pub struct Collected<'a> {
    pub environment: &'a Environment,
    pub payloads: u64,
    pub rows: u64,
    pub rejected: u64,
}

impl Collected<'_> {
    pub fn emit(&self) {
        let Self { environment, payloads, rows, rejected } = self;
        for (what, count) in [("payload", payloads), ("row", rows), ("rejected", rejected)] {
            COLLECTED.with_label_values(&[environment.as_str(), what]).inc_by(*count);
        }
        if payloads + rows + rejected > 0 {
            tracing::info!(%environment, payloads, rows, rejected, "deleted what is past its age");
        }
    }
}

/// A message that has no row was kept for people to look at.
pub struct Rejected<'a> {
    pub environment: &'a Environment,
    pub topic: &'a str,
    pub message_id: &'a str,
    pub reason: &'a str,
}

impl Rejected<'_> {
    pub fn emit(&self) {
        let Self { environment, topic, message_id, reason } = self;
        REJECTED.with_label_values(&[environment.as_str(), "true"]).inc();
        tracing::warn!(%environment, topic, message_id, reason, "a message was rejected and kept");
    }
}

/// No room for another one: the broker keeps it until somebody has looked.
pub struct RejectedFull<'a> {
    pub environment: &'a Environment,
    pub kept_max: u64,
}

impl RejectedFull<'_> {
    pub fn emit(&self) {
        let Self { environment, kept_max } = self;
        REJECTED.with_label_values(&[environment.as_str(), "false"]).inc();
        tracing::error!(%environment, kept_max, "the list of rejected messages is full: find out who sends them");
    }
}

/// A row or payload could not be read; its neighbours are not affected.
pub struct Damaged<'a> {
    pub environment: &'a Environment,
    pub key: String,
    pub cause: &'a str,
}

impl Damaged<'_> {
    pub fn emit(&self) {
        let Self { environment, key, cause } = self;
        DAMAGED.with_label_values(&[environment.as_str()]).inc();
        tracing::error!(%environment, key, cause, "a row of the payload store cannot be read");
    }
}

/// A write or sync failed, and what the handle believed can no longer be trusted.
pub struct Reopened<'a> {
    pub environment: &'a Environment,
    pub cause: &'a str,
}

impl Reopened<'_> {
    pub fn emit(&self) {
        let Self { environment, cause } = self;
        REOPENED.with_label_values(&[environment.as_str()]).inc();
        tracing::error!(%environment, cause, "a write to the payload store failed; the file is opened anew");
    }
}
