//! Events of the bridge.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge};

use super::{counter, counters, gauge, histogram, histograms};

static PUBLISHED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters(
        "dealscale_bridge_published_total",
        "Events that were accepted, by route, class and what the acceptance is worth (disk, broker, duplicate).",
        &["route", "class", "durability"],
    )
});
static ACCEPT_SECONDS: LazyLock<Histogram> =
    LazyLock::new(|| histogram("dealscale_bridge_accept_seconds", "From the whole body read to the answer 202."));
static REFUSED: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_bridge_refused_total", "Requests that were refused, by problem.", &["problem", "status"])
});
static LOGIN_FAILURES: LazyLock<IntCounterVec> =
    LazyLock::new(|| counters("dealscale_bridge_login_failures_total", "Failed logins, by reason.", &["reason"]));
static SHORT_SECONDS: LazyLock<HistogramVec> = LazyLock::new(|| {
    histograms("dealscale_bridge_short_seconds", "Duration of direct calls to n8n, by outcome.", &["outcome"])
});
static SHORT_UNRECORDED: LazyLock<IntCounter> = LazyLock::new(|| {
    counter("dealscale_bridge_short_unrecorded_total", "Direct calls whose record the outbox could not take.")
});
static CONNECTIONS: LazyLock<IntGauge> = LazyLock::new(|| gauge("dealscale_bridge_connections", "Open connections."));
static ACCEPT_ERRORS: LazyLock<IntCounter> =
    LazyLock::new(|| counter("dealscale_bridge_accept_errors_total", "Connections that could not be taken."));
static JWKS: LazyLock<IntCounterVec> = LazyLock::new(|| {
    counters("dealscale_bridge_jwks_refreshes_total", "Fetches of an issuer's keys, by result.", &["issuer", "result"])
});
static REPLAYED: LazyLock<IntCounter> =
    LazyLock::new(|| counter("dealscale_bridge_replayed_total", "Dead letters that were replayed."));

/// A publish was decided and accepted.
#[derive(Debug)]
pub struct Accepted<'a> {
    pub tenant: &'a str,
    pub execution_id: crate::ids::ExecutionId,
    pub route: &'a str,
    pub class: &'static str,
    pub topic: &'a str,
    pub reason: &'a str,
    pub durability: &'static str,
    pub duplicate: bool,
    pub took: Duration,
}

impl Accepted<'_> {
    pub fn emit(&self) {
        tracing::info!(
            target: "dealscale::decision",
            tenant = self.tenant,
            execution_id = %self.execution_id,
            route = self.route,
            class = self.class,
            topic = self.topic,
            reason = self.reason,
            durability = self.durability,
            duplicate = self.duplicate,
            "accepted"
        );
        let durability = if self.duplicate { "duplicate" } else { self.durability };
        PUBLISHED.with_label_values(&[self.route, self.class, durability]).inc();
        ACCEPT_SECONDS.observe(self.took.as_secs_f64());
    }
}

/// A request was refused. `detail` is the caller's own text only where it names a field.
#[derive(Debug)]
pub struct Refused<'a> {
    pub kind: &'static str,
    pub status: u16,
    pub detail: &'a str,
    pub path: &'a str,
}

impl Refused<'_> {
    pub fn emit(&self) {
        tracing::info!(problem = self.kind, status = self.status, detail = self.detail, path = self.path, "refused");
        REFUSED.with_label_values(&[self.kind, itoa(self.status)]).inc();
    }
}

/// The few statuses that problems have, without an allocation.
fn itoa(status: u16) -> &'static str {
    match status {
        400 => "400",
        401 => "401",
        403 => "403",
        404 => "404",
        405 => "405",
        408 => "408",
        409 => "409",
        413 => "413",
        415 => "415",
        422 => "422",
        429 => "429",
        500 => "500",
        502 => "502",
        503 => "503",
        504 => "504",
        _ => "other",
    }
}

/// Credentials were wrong. The address is for the log only.
#[derive(Debug)]
pub struct LoginFailed {
    pub reason: &'static str,
    pub address: Option<std::net::IpAddr>,
}

impl LoginFailed {
    pub fn emit(&self) {
        match self.address {
            Some(address) => tracing::warn!(reason = self.reason, %address, "login refused"),
            None => tracing::warn!(reason = self.reason, "login refused"),
        }
        LOGIN_FAILURES.with_label_values(&[self.reason]).inc();
    }
}

/// An issuer's keys were fetched, or could not be.
#[derive(Debug)]
pub struct KeysFetched<'a> {
    pub issuer: &'a str,
    pub result: Result<usize, &'a str>,
}

impl KeysFetched<'_> {
    pub fn emit(&self) {
        match self.result {
            Ok(keys) => tracing::info!(issuer = self.issuer, keys, "fetched the issuer's keys"),
            Err(error) => tracing::warn!(issuer = self.issuer, error, "cannot fetch the issuer's keys"),
        }
        JWKS.with_label_values(&[self.issuer, if self.result.is_ok() { "ok" } else { "error" }]).inc();
    }
}

/// A direct call to n8n ended.
#[derive(Debug)]
pub struct ShortCalled<'a> {
    pub tenant: &'a str,
    pub execution_id: crate::ids::ExecutionId,
    pub route: &'a str,
    pub reason: &'a str,
    /// `answered`, `failed`, `broken`, `timeout`, `unreachable`, `queued`.
    pub outcome: &'static str,
    pub status: Option<u16>,
    pub took: Duration,
}

impl ShortCalled<'_> {
    pub fn emit(&self) {
        tracing::info!(
            target: "dealscale::decision",
            tenant = self.tenant,
            execution_id = %self.execution_id,
            route = self.route,
            class = "short",
            reason = self.reason,
            outcome = self.outcome,
            status = self.status,
            "called n8n"
        );
        SHORT_SECONDS.with_label_values(&[self.outcome]).observe(self.took.as_secs_f64());
    }
}

/// A direct call was made, but the outbox could not take its record.
#[derive(Debug)]
pub struct ShortUnrecorded<'a> {
    pub execution_id: crate::ids::ExecutionId,
    pub error: &'a (dyn std::error::Error + 'static),
}

impl ShortUnrecorded<'_> {
    pub fn emit(&self) {
        tracing::error!(execution_id = %self.execution_id, error = self.error, "a direct call is missing in the ledger");
        SHORT_UNRECORDED.inc();
    }
}

/// The listener could not take a connection.
#[derive(Debug)]
pub struct AcceptFailed<'a> {
    pub error: &'a std::io::Error,
}

impl AcceptFailed<'_> {
    pub fn emit(&self) {
        tracing::warn!(error = %self.error, "cannot take a connection; trying again");
        ACCEPT_ERRORS.inc();
    }
}

/// Counts an open connection while it lives.
#[derive(Debug)]
pub struct Connection(());

impl Connection {
    pub fn opened() -> Self {
        CONNECTIONS.inc();
        Self(())
    }
}
impl Drop for Connection {
    fn drop(&mut self) {
        CONNECTIONS.dec();
    }
}

/// An operator's act on the dead letters.
#[derive(Debug)]
pub struct Operated<'a> {
    pub account: &'a str,
    /// `replay`, `discard`, `cancel`, `replay_many`.
    pub act: &'static str,
    pub tenant: Option<&'a str>,
    pub execution_id: Option<crate::ids::ExecutionId>,
    pub count: u64,
}

impl Operated<'_> {
    pub fn emit(&self) {
        let id = self.execution_id.map(|id| id.to_string());
        tracing::info!(
            account = self.account,
            act = self.act,
            tenant = self.tenant,
            execution_id = id,
            count = self.count,
            "operated"
        );
        if self.act.starts_with("replay") {
            REPLAYED.inc_by(self.count);
        }
    }
}
