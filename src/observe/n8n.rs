//! Calls to n8n's webhooks and look-ups of its executions.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec};

use super::{counter, counters, histogram};

static CALLS: LazyLock<IntCounterVec> =
    LazyLock::new(|| counters("dealscale_n8n_calls_total", "Webhook calls by class of their outcome.", &["class"]));
static CALL_SECONDS: LazyLock<Histogram> =
    LazyLock::new(|| histogram("dealscale_n8n_call_seconds", "From the first byte sent to the last one received."));
static LOOKUP_ERRORS: LazyLock<IntCounter> = LazyLock::new(|| {
    counter("dealscale_n8n_lookup_errors_total", "Failed questions to n8n's API or database about executions.")
});

/// A webhook call ended, however it did. `class` is bounded: `2xx`, `3xx`, `4xx`, `5xx`, `connect`, `timeout`, `reset`.
pub struct Called {
    pub class: &'static str,
    pub took: Duration,
}

impl Called {
    pub fn emit(&self) {
        CALLS.with_label_values(&[self.class]).inc();
        CALL_SECONDS.observe(self.took.as_secs_f64());
    }
}

/// n8n's executions cannot be read.
pub struct LookupFailed<'a> {
    pub error: &'a dyn std::fmt::Display,
}

impl LookupFailed<'_> {
    pub fn emit(&self) {
        LOOKUP_ERRORS.inc();
        tracing::warn!(error = %self.error, "cannot look up executions in n8n");
    }
}
