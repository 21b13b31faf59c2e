//! From the broker to n8n, and what became of it.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::{HistogramVec, IntCounterVec, IntGauge, IntGaugeVec};

use super::{counters, gauge, gauges, histograms};
use crate::event::State;
use crate::ids::{Key, Tenant, Topic};

static ATTEMPTS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_delivery_attempts_total", "Attempts by route and class of their outcome.", &["route", "class"])
});
static ENDS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_delivery_ends_total", "Events by route and final state.", &["route", "state"])
});
static SECONDS: LazyLock<HistogramVec> = LazyLock::new(|| {
    histograms("dealscale_delivery_seconds", "From acceptance to the answer of n8n that ended delivery.", &["route"])
});
static REJECTED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters(
        "dealscale_delivery_rejected_total",
        "Messages that were not delivered because of what they are.",
        &["kind"],
    )
});
static BREAKER: LazyLock<IntGaugeVec> =
    LazyLock::new(|| gauges("dealscale_delivery_breaker_open", "1 while a server is not called.", &["server"]));
static KEYS_HELD: LazyLock<IntGauge> = LazyLock::new(|| {
    gauge(
        "dealscale_delivery_keys_held",
        "Ordering keys whose events wait for a dead letter to be replayed or discarded.",
    )
});
static QUEUE: LazyLock<IntGaugeVec> = LazyLock::new(|| {
    gauges("dealscale_delivery_events", "Events that this appliance holds, by what they wait for.", &["where"])
});
static REPUBLISHED: LazyLock<IntCounterVec> =
    LazyLock::new(|| counters("dealscale_delivery_republished_total", "References published again.", &["by"]));
static STORE_WAITS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_delivery_waits_total", "Times that delivery waited for something that failed.", &["for"])
});

/// An attempt ended.
pub struct Attempted<'a> {
    pub key: &'a Key,
    pub route: &'a str,
    pub number: u32,
    pub status: Option<u16>,
    pub class: Option<&'static str>,
    pub took: Duration,
}

impl Attempted<'_> {
    pub fn emit(&self) {
        ATTEMPTS.with_label_values(&[self.route, self.class.unwrap_or("ok")]).inc();
        let took_ms = self.took.as_millis() as u64;
        if let Some(class) = self.class {
            tracing::info!(
                tenant = %self.key.tenant, execution_id = %self.key.execution_id, route = self.route, attempt = self.number,
                status = self.status, class, took_ms, "attempt failed"
            );
        } else {
            tracing::debug!(
                tenant = %self.key.tenant, execution_id = %self.key.execution_id, route = self.route, attempt = self.number,
                status = self.status, took_ms, "attempt answered"
            );
        }
    }
}

/// An event reached its final state (dead letters included).
pub struct Ended<'a> {
    pub key: &'a Key,
    pub route: &'a str,
    pub state: State,
    /// Since it was accepted.
    pub after: Duration,
    pub error: Option<&'a str>,
}

impl Ended<'_> {
    pub fn emit(&self) {
        ENDS.with_label_values(&[self.route, self.state.as_str()]).inc();
        SECONDS.with_label_values(&[self.route]).observe(self.after.as_secs_f64());
        let (tenant, execution_id, route, state) = (&self.key.tenant, self.key.execution_id, self.route, self.state);
        match (state, self.error) {
            (State::Dead, error) => {
                tracing::error!(%tenant, %execution_id, route, error, "dead letter");
            }
            (_, Some(error)) => tracing::warn!(%tenant, %execution_id, route, %state, error, "ended"),
            _ => tracing::info!(%tenant, %execution_id, route, %state, "ended"),
        }
    }
}

/// A message that is not to be delivered at all: forged, altered, of another tenant, or unknown to the ledger.
pub struct Rejected<'a> {
    pub topic: &'a Topic,
    pub message_id: &'a str,
    /// Bounded: `reference`, `expired_unknown`, `unknown`, `mismatch`, `topic`.
    pub kind: &'static str,
    pub reason: &'a str,
}

impl Rejected<'_> {
    pub fn emit(&self) {
        REJECTED.with_label_values(&[self.kind]).inc();
        tracing::error!(
            audit = true, topic = %self.topic, message_id = self.message_id, kind = self.kind, reason = self.reason,
            "message rejected, never delivered"
        );
    }
}

/// A breaker opened or closed.
pub struct Breaker<'a> {
    pub server: &'a str,
    pub open: bool,
}

impl Breaker<'_> {
    pub fn emit(&self) {
        BREAKER.with_label_values(&[self.server]).set(i64::from(self.open));
        if self.open {
            tracing::warn!(server = self.server, "not reachable: its events wait, no attempt is counted");
        } else {
            tracing::info!(server = self.server, "reachable again: delivery goes on");
        }
    }
}

/// A dead letter holds its ordering key, or let it go.
pub struct KeyHeld<'a> {
    pub tenant: &'a Tenant,
    pub held: bool,
    pub keys: usize,
}

impl KeyHeld<'_> {
    pub fn emit(&self) {
        KEYS_HELD.set(self.keys as i64);
        if self.held {
            tracing::error!(
                tenant = %self.tenant, keys_held = self.keys,
                "a dead letter holds its ordering key: later events wait until it is replayed or discarded (on_dead = \"hold\")"
            );
        } else {
            tracing::info!(tenant = %self.tenant, keys_held = self.keys, "an ordering key is free again");
        }
    }
}

/// What waits where.
pub struct Queue {
    pub waiting: usize,
    pub behind: usize,
    pub working: usize,
    pub following: usize,
}

impl Queue {
    pub fn emit(&self) {
        let places = [
            ("slot", self.waiting),
            ("ordering_key", self.behind),
            ("working", self.working),
            ("following", self.following),
        ];
        for (place, count) in places {
            QUEUE.with_label_values(&[place]).set(count as i64);
        }
    }
}

/// References were published again.
pub struct Republished {
    /// `timer` or `sweeper`.
    pub by: &'static str,
    pub count: usize,
}

impl Republished {
    pub fn emit(&self) {
        REPUBLISHED.with_label_values(&[self.by]).inc_by(self.count as u64);
        if self.by == "sweeper" {
            tracing::warn!(count = self.count, "references that the broker had nothing of were published again");
        } else {
            tracing::debug!(count = self.count, "due references were published");
        }
    }
}

/// Ledger or broker failed a step that is tried again.
pub struct Waiting<'a> {
    /// `ledger`, `broker`, `n8n`.
    pub what: &'static str,
    pub error: &'a str,
}

impl Waiting<'_> {
    pub fn emit(&self) {
        STORE_WAITS.with_label_values(&[self.what]).inc();
        tracing::warn!(what = self.what, error = self.error, "delivery waits");
    }
}
