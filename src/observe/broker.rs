//! Events of the broker: log line and metric together.

use std::sync::LazyLock;

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use crate::ids::Topic;

use super::{counter, counters, gauge, gauges};

static PUBLISHED: LazyLock<IntCounterVec> =
    LazyLock::new(|| counters("dealscale_broker_published_total", "References that the broker confirmed", &["kind"]));
static PUBLISH_FAILED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_broker_publish_failed_total", "Sends that failed or whose outcome is unknown", &["kind"])
});
static ACKNOWLEDGED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_broker_acknowledged_total", "Messages acknowledged by this appliance", &["kind"])
});
static REJECTED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_broker_rejected_total", "Messages whose reference was refused, by cause", &["cause"])
});
static DEAD_LETTERED: LazyLock<IntCounter> =
    LazyLock::new(|| counter("dealscale_broker_dead_lettered_total", "Messages moved to a dead-letter topic"));
static CONNECTED: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("dealscale_broker_connected", "1 while the broker answers"));
static REBUILT: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_broker_rebuilt_total", "Connections, producers and consumers dropped and made again", &["what"])
});
static BACKLOG: LazyLock<IntGaugeVec> = LazyLock::new(|| {
    gauges("dealscale_broker_backlog_messages", "Messages that wait in the broker, by topic template", &["topic"])
});
static UNACKNOWLEDGED: LazyLock<IntGaugeVec> = LazyLock::new(|| {
    gauges("dealscale_broker_unacknowledged_messages", "Messages that consumers hold, by topic template", &["topic"])
});

/// Receipts arrived.
pub struct Published {
    pub kind: &'static str,
    pub count: usize,
}
impl Published {
    pub fn emit(&self) {
        PUBLISHED.with_label_values(&[self.kind]).inc_by(self.count as u64);
        tracing::trace!(count = self.count, "published");
    }
}

/// Sends of one topic failed; they are tried again.
pub struct PublishFailed<'a> {
    pub topic: &'a Topic,
    pub count: usize,
    pub cause: &'a str,
}
impl PublishFailed<'_> {
    pub fn emit(&self) {
        PUBLISH_FAILED.with_label_values(&["pulsar"]).inc_by(self.count as u64);
        tracing::warn!(topic = %self.topic, count = self.count, cause = self.cause, "cannot publish, will try again");
    }
}

/// Another appliance of the subscription has other signing keys: nothing is published or delivered here meanwhile.
pub struct KeysDiffer<'a> {
    pub cause: &'a str,
}
impl KeysDiffer<'_> {
    pub fn emit(&self) {
        tracing::error!(cause = self.cause, "the signing keys of the fleet differ: waiting");
    }
}

/// Messages are done with.
pub struct Acknowledged {
    pub kind: &'static str,
    pub count: usize,
}
impl Acknowledged {
    pub fn emit(&self) {
        ACKNOWLEDGED.with_label_values(&[self.kind]).inc_by(self.count as u64);
        tracing::trace!(count = self.count, "acknowledged");
    }
}

/// A message came out whose reference is not to be believed.
pub struct Rejected<'a> {
    pub topic: &'a Topic,
    /// A bounded word.
    pub kind: &'static str,
    pub cause: &'a dyn std::fmt::Display,
}
impl Rejected<'_> {
    pub fn emit(&self) {
        REJECTED.with_label_values(&[self.kind]).inc();
        tracing::warn!(topic = %self.topic, cause = %self.cause, "a message has no valid reference");
    }
}

/// A message was moved to its dead-letter topic, or could not be.
pub struct DeadLettered<'a> {
    pub topic: &'a Topic,
    pub reason: &'a str,
    pub ok: bool,
}
impl DeadLettered<'_> {
    pub fn emit(&self) {
        if self.ok {
            DEAD_LETTERED.inc();
            tracing::warn!(topic = %self.topic, reason = self.reason, "moved to the dead letters");
        } else {
            tracing::error!(topic = %self.topic, reason = self.reason, "cannot move to the dead letters");
        }
    }
}

/// The broker answers again, or no longer does.
pub struct Connection<'a> {
    pub up: bool,
    pub cause: Option<&'a str>,
}
impl Connection<'_> {
    pub fn emit(&self) {
        CONNECTED.set(i64::from(self.up));
        match self.cause {
            None => tracing::info!("connected to Pulsar"),
            Some(cause) => tracing::warn!(cause, "Pulsar does not answer"),
        }
    }
}

/// A connection, producer or consumer was dropped, to be made again.
pub struct Rebuilt<'a> {
    pub what: &'static str,
    pub topic: &'a str,
    pub cause: &'a str,
}
impl Rebuilt<'_> {
    pub fn emit(&self) {
        REBUILT.with_label_values(&[self.what]).inc();
        tracing::warn!(what = self.what, topic = self.topic, cause = self.cause, "dropped, is made again");
    }
}

/// A topic and its subscriptions were made.
pub struct TopicMade<'a> {
    pub topic: &'a Topic,
}
impl TopicMade<'_> {
    pub fn emit(&self) {
        tracing::info!(topic = %self.topic, "made the topic, its subscription and its dead letters");
    }
}

/// Figures of one topic template, summed over its tenants.
pub struct Backlog<'a> {
    pub template: &'a str,
    pub waiting: u64,
    pub unacknowledged: u64,
}
impl Backlog<'_> {
    pub fn emit(&self) {
        BACKLOG.with_label_values(&[self.template]).set(self.waiting as i64);
        UNACKNOWLEDGED.with_label_values(&[self.template]).set(self.unacknowledged as i64);
    }
}
