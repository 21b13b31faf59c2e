//! W3C trace context through every hop, and spans by OTLP.
//!
//! The ids that travel in headers and properties are made here, so the span that is exported for an attempt is exactly
//! the one whose `traceparent` n8n stored. Spans are recorded when they end ([`record`]); without `trace.otlp_endpoint`
//! recording costs one atomic load.
//!
//! # Failure
//! The exporter has a bounded queue. When the collector is slow or down, spans are dropped and counted
//! (`dealscale_trace_spans_dropped_total`): telemetry never holds up work.

use std::fmt;
use std::str::FromStr;
use std::sync::{LazyLock, OnceLock};
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use prometheus::IntCounter;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::clock::Timestamp;
use crate::config;

/// A position in a trace (W3C Trace Context, level 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: u128,
    pub span_id: u64,
    pub sampled: bool,
}

impl TraceContext {
    /// A new trace.
    pub fn new(sampled: bool) -> Self {
        // Neither id may be zero (W3C Trace Context 2.2.2).
        Self { trace_id: fastrand::u128(1..), span_id: fastrand::u64(1..), sampled }
    }

    /// The caller's position, or a new trace where it sent none or a malformed one.
    pub fn from_header(header: Option<&str>, sample: f64) -> Self {
        header.and_then(|h| h.parse().ok()).unwrap_or_else(|| Self::new(fastrand::f64() < sample))
    }

    /// A new span of the same trace.
    pub fn child(self) -> Self {
        Self { span_id: fastrand::u64(1..), ..self }
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

/// Not a `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent header as in W3C Trace Context")]
pub struct ParseError;

impl FromStr for TraceContext {
    type Err = ParseError;
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let lower = |t: &str| t.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let mut parts = text.splitn(5, '-');
        let mut part = |len: usize| parts.next().filter(|p| p.len() == len && lower(p)).ok_or(ParseError);
        let (version, trace, span, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        // Version ff is forbidden; version 00 has no further parts, later versions may.
        if version == "ff" || (version == "00" && parts.next().is_some()) {
            return Err(ParseError);
        }
        let trace_id = u128::from_str_radix(trace, 16).map_err(|_| ParseError)?;
        let span_id = u64::from_str_radix(span, 16).map_err(|_| ParseError)?;
        let flags = u8::from_str_radix(flags, 16).map_err(|_| ParseError)?;
        if trace_id == 0 || span_id == 0 {
            return Err(ParseError);
        }
        Ok(Self { trace_id, span_id, sampled: flags & 1 == 1 })
    }
}

/// A span that ended.
#[derive(Debug)]
pub struct Span {
    pub name: &'static str,
    pub kind: SpanKind,
    pub context: TraceContext,
    pub parent: Option<u64>,
    pub started_at: Timestamp,
    pub duration: Duration,
    pub attributes: Vec<(&'static str, String)>,
    /// What went wrong, if it did.
    pub error: Option<String>,
}

pub use opentelemetry::trace::SpanKind as Kind;

static QUEUE: OnceLock<mpsc::Sender<SpanData>> = OnceLock::new();
static DROPPED: LazyLock<IntCounter> = LazyLock::new(|| {
    super::counter("dealscale_trace_spans_dropped_total", "Spans that the OTLP exporter could not take in time.")
});

/// Whether spans are exported: lets callers skip building their attributes.
pub fn enabled() -> bool {
    QUEUE.get().is_some()
}

/// Hands a span to the exporter, if there is one and the trace is sampled.
pub fn record(span: Span) {
    let Some(queue) = QUEUE.get().filter(|_| span.context.sampled) else { return };
    let start_time = SystemTime::UNIX_EPOCH + Duration::from_millis(span.started_at.0.max(0) as u64);
    let data = SpanData {
        span_context: SpanContext::new(
            TraceId::from(span.context.trace_id),
            SpanId::from(span.context.span_id),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        ),
        parent_span_id: span.parent.map_or(SpanId::INVALID, SpanId::from),
        parent_span_is_remote: true,
        span_kind: span.kind,
        name: span.name.into(),
        start_time,
        end_time: start_time + span.duration,
        attributes: span.attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect(),
        dropped_attributes_count: 0,
        events: Default::default(),
        links: Default::default(),
        status: span.error.map_or(Status::Ok, Status::error),
        instrumentation_scope: InstrumentationScope::builder("dealscale").build(),
    };
    if queue.try_send(data).is_err() {
        DROPPED.inc();
    }
}

/// Makes the exporter, when an endpoint is configured; the returned task runs until `shutdown` and flushes at the end.
///
/// # Errors
/// The endpoint cannot be used at all. A collector that is merely down is no error.
pub fn exporter(
    config: &config::Trace,
    shutdown: CancellationToken,
) -> Result<Option<impl Future<Output = ()> + Send + 'static>, String> {
    let Some(endpoint) = &config.otlp_endpoint else { return Ok(None) };
    let client = reqwest::Client::builder()
        .timeout(Duration::from_secs(5))
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|e| format!("cannot make the OTLP client: {e}"))?;
    let mut exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(Client(client))
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .build()
        .map_err(|e| format!("cannot make the OTLP exporter: {e}"))?;
    let resource = opentelemetry_sdk::Resource::builder()
        .with_service_name("dealscale")
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    exporter.set_resource(&resource.build());
    // About half a minute of 100 events a second with four spans each.
    let (sender, mut receiver) = mpsc::channel(8_192);
    if QUEUE.set(sender).is_err() {
        return Err("the OTLP exporter was made twice".into());
    }
    Ok(Some(async move {
        let mut failing = false;
        loop {
            let mut batch = Vec::new();
            tokio::select! {
                () = shutdown.cancelled() => {
                    while let Ok(span) = receiver.try_recv() {
                        batch.push(span);
                    }
                    if !batch.is_empty() {
                        let _ = tokio::time::timeout(Duration::from_secs(2), exporter.export(batch)).await;
                    }
                    return;
                }
                n = receiver.recv_many(&mut batch, 512) => if n == 0 { return },
            }
            let count = batch.len() as u64;
            match exporter.export(batch).await {
                Ok(()) if failing => {
                    tracing::info!("spans reach the OTLP collector again");
                    failing = false;
                }
                Ok(()) => {}
                Err(error) => {
                    DROPPED.inc_by(count);
                    if !failing {
                        tracing::warn!(%error, "spans do not reach the OTLP collector; they are dropped and counted");
                    }
                    failing = true;
                }
            }
            // Lets a batch gather instead of sending span by span.
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }))
}

#[derive(Debug)]
struct Client(reqwest::Client);

#[async_trait::async_trait]
impl opentelemetry_http::HttpClient for Client {
    async fn send_bytes(
        &self,
        request: http::Request<bytes::Bytes>,
    ) -> Result<http::Response<bytes::Bytes>, opentelemetry_http::HttpError> {
        let mut response = self.0.execute(request.try_into()?).await?;
        let (status, headers) = (response.status(), std::mem::take(response.headers_mut()));
        let mut answer = http::Response::new(response.bytes().await?);
        *answer.status_mut() = status;
        *answer.headers_mut() = headers;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_reads_what_it_prints() {
        let context = TraceContext::new(true);
        assert_eq!(context.to_string().parse(), Ok(context));
        let child = context.child();
        assert_eq!(child.trace_id, context.trace_id);
        assert_ne!(child.span_id, context.span_id);
    }

    #[test]
    fn a_malformed_traceparent_begins_a_new_trace() {
        for bad in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x",
        ] {
            assert!(bad.parse::<TraceContext>().is_err(), "{bad}");
        }
        assert!("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x".parse::<TraceContext>().is_ok());
        assert_ne!(TraceContext::from_header(Some("x"), 1.0).trace_id, 0);
    }
}
