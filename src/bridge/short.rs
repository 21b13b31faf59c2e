//! `class = "short"`: n8n is called while the caller waits, and n8n's own response is the answer.
//!
//! # Invariants
//! 1. n8n is called at most once. Only a refused connection, when n8n has seen nothing, may become a queued event
//!    (`fallback = "queue"`); after a timeout or a broken connection the outcome is unknown and stays so.
//! 2. A call that carries an `execution_id` or an `Idempotency-Key` runs at most once for all its repetitions: while it is
//!    under way and after it was recorded, the same id is 409.
//! 3. Every call that reached n8n is recorded through the outbox when it ended, however it ended, and also when the caller
//!    went away.
//!
//! n8n's status, headers and body are passed on as they come; hop-by-hop headers (RFC 9110, section 7.6.1) are not. The
//! header `X-Dealscale-Execution-Id` names the record.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, header};
use bytes::Bytes;
use futures_util::Stream;

use super::publish::Decided;
use super::respond::{Kind, Problem};
use super::{Bridge, Live, Room};
use crate::clock::Timestamp;
use crate::config::routes::Fallback;
use crate::event::{Content, Event, State};
use crate::ids::Key;
use crate::n8n::{Call, CallError, authorize};
use crate::observe::bridge as events;
use crate::observe::trace::TraceContext;
use crate::outbox::{Append, Outbox};

/// Named calls that n8n works on now.
#[derive(Clone, Debug, Default)]
pub struct UnderWay(Arc<Mutex<HashSet<Key>>>);

/// The right to make a named call; given back when dropped.
#[derive(Debug)]
struct Turn(UnderWay, Key);

impl UnderWay {
    fn enter(&self, key: &Key) -> Option<Turn> {
        let entered = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
        entered.then(|| Turn(self.clone(), key.clone()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

/// Calls n8n for a decided event.
pub(super) async fn call(
    bridge: &Bridge,
    live: &Live,
    room: &Room,
    decided: Decided<'_>,
) -> Result<Response<Body>, Problem> {
    let key = decided.key();
    let turn = if decided.named { Some(turn(bridge, room, &key).await?) } else { None };
    let request = request(bridge, room, &decided)?;
    let (route, reason) = (decided.route.name.clone(), decided.reason.clone());
    let mut record = Record {
        bridge: bridge.clone(),
        outbox: room.parts.outbox.clone(),
        append: Some(decided.append.clone()),
        route: route.clone(),
        reason: reason.clone(),
        started_at: bridge.0.clock.now(),
        started: Instant::now(),
        state: State::Unknown,
        status: None,
        outcome: "broken",
        error: Some("the caller went away before n8n answered".into()),
        _turn: turn,
    };
    match room.parts.n8n.call_streamed(request).await {
        Ok(answer) => {
            let status = answer.status();
            record.status = Some(status.as_u16());
            record.error = Some("the answer broke off".into());
            let mut response = Response::new(Body::empty());
            *response.status_mut() = status;
            pass_on(answer.headers(), response.headers_mut());
            named(response.headers_mut(), &key);
            // The record is written when the body's last byte has gone through, or when the body is dropped.
            let left = answer.content_length();
            let mut body = Recorded { left, inner: Box::pin(answer.bytes_stream()), record: Some(record) };
            body.end_if_complete();
            *response.body_mut() = Body::from_stream(body);
            Ok(response)
        }
        Err(CallError::Connect(cause)) => {
            record.cancel();
            let took = record.started.elapsed();
            let outcome = if decided.route.fallback == Fallback::Queue { "queued" } else { "unreachable" };
            let called = events::ShortCalled {
                tenant: key.tenant.as_str(),
                execution_id: key.execution_id,
                route: &route,
                reason: &reason,
                outcome,
                status: None,
                took,
            };
            called.emit();
            tracing::warn!(cause, "n8n cannot be reached for a direct call");
            if decided.route.fallback == Fallback::Queue {
                let _slot = bridge.0.in_flight.enter(live.bridge.in_flight_max)?;
                return bridge.queue(live, room, decided).await;
            }
            Err(Problem::new(Kind::N8nUnavailable, "n8n has seen nothing of this call; retry it"))
        }
        Err(error) => {
            let timeout = error == CallError::Timeout;
            record.error = Some(error.to_string());
            record.outcome = if timeout { "timeout" } else { "broken" };
            drop(record);
            let detail = format!("n8n may have run it; it is not called again. execution_id {}", key.execution_id);
            Err(Problem::new(if timeout { Kind::GatewayTimeout } else { Kind::BadGateway }, detail))
        }
    }
}

/// Invariant 2.
async fn turn(bridge: &Bridge, room: &Room, key: &Key) -> Result<Turn, Problem> {
    let conflict = |state: &str| {
        let detail = format!("this call is {state}, and a short call runs once; see /executions/{}", key.execution_id);
        Problem::new(Kind::Conflict, detail)
    };
    let turn = bridge.0.short_calls.enter(key).ok_or_else(|| conflict("under way"))?;
    match room.look(key, false).await? {
        Some(execution) => Err(conflict(execution.state.as_str())),
        None => Ok(turn),
    }
}

fn request(bridge: &Bridge, room: &Room, decided: &Decided<'_>) -> Result<Call, Problem> {
    let envelope = &decided.append.event.envelope;
    let (route, n8n) = (decided.route, &room.parts.n8n);
    let workflow = envelope.workflow.as_ref().map(|w| w.as_str());
    let url = n8n.webhook_url(&route.webhook, workflow, envelope.tenant.as_str()).map_err(|error| {
        tracing::error!(route = route.name, error, "the route's webhook is no URL");
        Problem::new(Kind::Internal, "the route's webhook cannot be used")
    })?;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let id = envelope.execution_id.to_string();
    let span = envelope.traceparent.as_deref().and_then(|t| t.parse::<TraceContext>().ok()).map(TraceContext::child);
    for (name, value) in [
        ("x-dealscale-execution-id", Some(id.clone())),
        ("x-dealscale-tenant", Some(envelope.tenant.to_string())),
        ("traceparent", span.map(|s| s.to_string())),
    ] {
        if let Some(value) = value.and_then(|v| HeaderValue::try_from(v).ok()) {
            headers.insert(name, value);
        }
    }
    let (now, body) = (bridge.0.clock.now(), decided.append.event.body.clone());
    room.env.signer.sign(&mut headers, &id, now, &body);
    authorize(&mut headers, &route.webhook_auth, now);
    Ok(Call { method: Method::POST, url, headers, body, timeout: route.timeout.0 })
}

fn named(headers: &mut HeaderMap, key: &Key) {
    if let Ok(value) = HeaderValue::try_from(key.execution_id.to_string()) {
        headers.insert("x-dealscale-execution-id", value);
    }
}

/// Headers of one connection only, which end at a proxy.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

fn pass_on(from: &HeaderMap, to: &mut HeaderMap) {
    let nominated: Vec<String> = from
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    for (name, value) in from {
        let dropped = HOP_BY_HOP.contains(name)
            || matches!(name.as_str(), "keep-alive" | "proxy-connection")
            || nominated.iter().any(|n| n == name.as_str());
        if !dropped {
            to.append(name, value.clone());
        }
    }
}

/// What is to be written down about a call; written when dropped.
struct Record {
    bridge: Bridge,
    outbox: Outbox,
    append: Option<Append>,
    route: String,
    reason: String,
    started_at: Timestamp,
    started: Instant,
    state: State,
    status: Option<u16>,
    outcome: &'static str,
    error: Option<String>,
    _turn: Option<Turn>,
}

impl Record {
    /// n8n has seen nothing: there is nothing to write down.
    fn cancel(&mut self) {
        self.append = None;
    }

    /// The whole answer went through.
    fn complete(&mut self) {
        let good = self.status.is_some_and(|s| s < 400);
        self.state = if good { State::Delivered } else { State::Failed };
        self.outcome = if good { "answered" } else { "failed" };
        self.error = self.status.filter(|_| !good).map(|s| format!("n8n answered {s}"));
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let Some(Append { event, idempotency_key, answer }) = self.append.take() else { return };
        let took = self.started.elapsed();
        let (tenant, execution_id) = (event.envelope.tenant.clone(), event.envelope.execution_id);
        events::ShortCalled {
            tenant: tenant.as_str(),
            execution_id,
            route: &self.route,
            reason: &self.reason,
            outcome: self.outcome,
            status: self.status,
            took,
        }
        .emit();
        let mut envelope = event.envelope;
        envelope.deliver_at = None;
        envelope.content = Content::Done {
            state: self.state,
            status: self.status,
            started_at: self.started_at,
            duration_ms: took.as_millis() as u64,
            error: self.error.take(),
            n8n_execution_id: None,
        };
        let append = Append { event: Event { envelope, body: event.body }, idempotency_key, answer };
        let (outbox, turn) = (self.outbox.clone(), self._turn.take());
        self.bridge.0.tasks.spawn(async move {
            if let Err(error) = outbox.append(append).await {
                events::ShortUnrecorded { execution_id, error: &error }.emit();
            }
            // Only now may the same id be asked about and found.
            drop(turn);
        });
    }
}

type Chunks = Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>;

/// n8n's body on its way to the caller.
struct Recorded {
    inner: Chunks,
    /// Bytes to come, where n8n announced them: the server drops a body that has come to its length without asking it
    /// for its end.
    left: Option<u64>,
    record: Option<Record>,
}

impl Recorded {
    fn end_if_complete(&mut self) {
        if self.left == Some(0)
            && let Some(mut record) = self.record.take()
        {
            record.complete();
        }
    }
}

impl Stream for Recorded {
    type Item = reqwest::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let chunk = self.inner.as_mut().poll_next(cx);
        match &chunk {
            Poll::Ready(Some(Ok(bytes))) => {
                self.left = self.left.map(|left| left.saturating_sub(bytes.len() as u64));
                self.end_if_complete();
            }
            Poll::Ready(None) => {
                if let Some(mut record) = self.record.take() {
                    record.complete();
                }
            }
            Poll::Ready(Some(Err(_))) => drop(self.record.take()),
            Poll::Pending => {}
        }
        chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_one_connection_end_here() {
        let mut from = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-private"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("content-security-policy", "sandbox"),
        ] {
            from.append(name, HeaderValue::from_static(value));
        }
        let mut to = HeaderMap::new();
        pass_on(&from, &mut to);
        assert_eq!(to.len(), 3, "{to:?}");
        assert_eq!(to.get_all("set-cookie").iter().count(), 2);
        assert!(to.contains_key("content-security-policy"));
    }
}
