//! `POST /pulsar/publish`: one event in, checked completely, then durable, then 202.
//!
//! # What an `Idempotency-Key` stands for
//! The payload's bytes, the tenant, the workflow or topic that was asked for, and the ordering key. The same key with another
//! of these is 422. `deliver_at`, `priority`, `metadata` and headers are left out on purpose: a client that computes them
//! anew when it retries ("in five minutes") still means the same event. The first request's values count.
//!
//! # The answer that is kept with a key
//! ```text
//! fingerprint (32 hexadecimal digits) | 202 body up to its "durability"
//! ```
//! so that a later request with the key is compared and answered without the event itself, which may have left long ago.

use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts as Head;
use axum::http::{HeaderValue, Response, StatusCode, header};
use bytes::Bytes;

use super::auth::Caller;
use super::request::{Hints, Publish};
use super::respond::{Kind, Problem};
use super::routes::{Asked, Right, answer, body, expect_json};
use super::{Bridge, Live, Room, short};
use crate::clock::Timestamp;
use crate::config::routes::{Ack, Class, Route};
use crate::event::{Content, Envelope, Event};
use crate::ids::{BodyHash, ExecutionId, Key};
use crate::observe::bridge as events;
use crate::observe::trace::{self, TraceContext};
use crate::outbox::{Append, Appended};
use crate::routing::{Input, Refused};

/// Publish one event.
///
/// Answered after the event is durable. `class = "short"` routes call n8n directly and answer with n8n's own response.
#[utoipa::path(
    post, path = "/pulsar/publish", tag = "publish",
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters, remembered for 24 hours per environment and tenant", min_length = 1, max_length = 255, pattern = "^[!-~]+$"),
        ("traceparent" = Option<String>, Header, description = "W3C trace context; a malformed one begins a new trace"),
        ("X-N8N-Execution-Id" = Option<String>, Header, description = "n8n's execution that publishes"),
        ("X-N8N-Workflow-Id" = Option<String>, Header, description = "n8n's workflow that publishes"),
    ),
    request_body(content = super::openapi::PublishRequest, content_type = "application/json"),
    responses(
        (status = 202, description = "The event is durable and will run", body = super::openapi::Accepted,
         headers(("Location" = String, description = "Where to ask what became of it"))),
        (status = 409, description = "execution_id belongs to another event"),
        (status = 422, description = "The Idempotency-Key belongs to another request"),
    )
)]
pub async fn publish(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |head, body| async move { bridge.publish(head, body).await }).await
}

/// A publish that passed every check that needs no disk.
pub(super) struct Decided<'r> {
    pub append: Append,
    pub route: &'r Route,
    pub reason: String,
    fingerprint: Option<String>,
    /// The caller chose the id or sent a key: the same call may come again.
    pub named: bool,
    started: Instant,
}

impl Bridge {
    async fn publish(&self, head: Head, request: Body) -> Result<Response<Body>, Problem> {
        let Asked { live, caller, room } = self.asked(&head, Right::Publish).await?;
        expect_json(&head)?;
        let hints = Hints::read(&head.headers)?;
        let body = body(request, &head, live.bridge.body_bytes_max, &live).await?;
        let now = self.0.clock.now();
        let publish = Publish::read(&body, &live.bridge, now)?;
        let decided = room.decide(&live, &caller, publish, hints, now)?;
        let slot = self.0.in_flight.enter(live.bridge.in_flight_max)?;
        if decided.route.class == Class::Short {
            if decided.append.event.envelope.deliver_at.is_some() {
                let detail = format!("route {:?} is short and calls n8n now: leave deliver_at out", decided.route.name);
                return Err(Problem::malformed(detail));
            }
            // A direct call waits for n8n, not for the outbox.
            drop(slot);
            return short::call(self, &live, &room, decided).await;
        }
        self.queue(&live, &room, decided).await
    }

    /// Through the outbox: durable when it answers.
    pub(super) async fn queue(
        &self,
        live: &Live,
        room: &Room,
        decided: Decided<'_>,
    ) -> Result<Response<Body>, Problem> {
        let Decided { append, route, reason, fingerprint, started, .. } = decided;
        let key = append.event.key();
        let shown = Shown::of(&append, route, reason);
        let receipt = (route.ack == Ack::Broker).then(|| room.parts.receipts.wait(&key));
        let appended = room.parts.outbox.append(append).await?;
        let accepted = shown.accepted(appended, fingerprint.as_deref())?;
        let mut durability = "disk";
        if let Some(mut receipt) = receipt {
            let confirmed = async {
                // A duplicate's receipt may be long gone: what has left the outbox, the broker has.
                if accepted.duplicate && matches!(room.parts.outbox.find(&key).await, Ok(None)) {
                    return;
                }
                receipt.notice().await;
            };
            if tokio::time::timeout(live.bridge.receipt_timeout.0, confirmed).await.is_ok() {
                durability = "broker";
            }
        }
        shown.emit(&accepted, durability, started);
        Ok(accepted.answer(&shown.tenant, durability))
    }
}

impl Room {
    /// Tenant, route, limits: everything that can be known before the disk is asked.
    pub(super) fn decide(
        &self,
        live: &Live,
        caller: &Caller,
        publish: Publish,
        hints: Hints,
        now: Timestamp,
    ) -> Result<Decided<'_>, Problem> {
        let started = Instant::now();
        self.env.tenant(caller, &publish.tenant)?;
        let fingerprint = hints.idempotency_key.is_some().then(|| fingerprint(&publish));
        let bytes = publish.payload.len() as u64;
        let decision = self
            .env
            .router
            .decide(Input {
                workflow: publish.workflow.as_ref(),
                topic: publish.topic.as_ref(),
                tenant: &publish.tenant,
                bytes,
                metadata: &publish.metadata,
            })
            .map_err(|refused| match refused {
                Refused::Topic(_) | Refused::Template { .. } => Problem::malformed(refused.to_string()),
            })?;
        let config = self.env.config.tenant(&publish.tenant).ok_or_else(Problem::no_tenant)?;
        self.env.rates.take(config, &publish.tenant)?;
        let named = publish.execution_id.is_some() || hints.idempotency_key.is_some();
        let execution_id = match (publish.execution_id, &hints.idempotency_key) {
            (Some(id), _) => id,
            (None, Some(key)) => ExecutionId::from_idempotency_key(&self.env.config.name, &publish.tenant, key),
            (None, None) => ExecutionId::new(),
        };
        let parent = hints.traceparent.as_deref().and_then(|t| t.parse::<TraceContext>().ok());
        let context =
            parent.map_or_else(|| TraceContext::new(fastrand::f64() < live.trace_sample), TraceContext::child);
        if trace::enabled() {
            trace::record(trace::Span {
                name: "publish",
                kind: trace::Kind::Producer,
                context,
                parent: parent.map(|p| p.span_id),
                started_at: now,
                duration: started.elapsed(),
                attributes: vec![
                    ("dealscale.execution_id", execution_id.to_string()),
                    ("dealscale.tenant", publish.tenant.to_string()),
                    ("dealscale.route", decision.route.name.clone()),
                    ("messaging.destination.name", decision.topic.to_string()),
                ],
                error: None,
            });
        }
        let envelope = Envelope {
            tenant: publish.tenant,
            execution_id,
            workflow: publish.workflow,
            topic: decision.topic,
            route: decision.route.name.clone(),
            accepted_at: now,
            deliver_at: publish.deliver_at,
            ordering_key: publish.ordering_key,
            priority: publish.priority.unwrap_or(Envelope::PRIORITY),
            metadata: publish.metadata,
            traceparent: Some(context.to_string()),
            source_execution: hints.source_execution,
            source_workflow: hints.source_workflow,
            body_hash: BodyHash::of(&publish.payload),
            content: Content::Json,
        };
        let answer = match &fingerprint {
            Some(fingerprint) => {
                let shown = head_of(execution_id, envelope.topic.as_str(), decision.route, &decision.reason);
                Bytes::from(format!("{fingerprint}{shown}"))
            }
            None => Bytes::new(),
        };
        // The payload is a slice of the whole request: kept alive with it, a few hundred bytes more, instead of copied.
        let event = Event { envelope, body: publish.payload };
        Ok(Decided {
            append: Append { event, idempotency_key: hints.idempotency_key, answer },
            route: decision.route,
            reason: decision.reason,
            fingerprint,
            named,
            started,
        })
    }
}

/// Of the request behind an idempotency key: 128 bits of SHA-256, in hexadecimal digits.
fn fingerprint(publish: &Publish) -> String {
    let mut hash = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let parts = [
        publish.workflow.as_ref().map(|w| w.as_str()),
        publish.topic.as_ref().map(|t| t.as_str()),
        publish.ordering_key.as_ref().map(|k| k.as_str()),
    ];
    for part in parts {
        // No name has a control character in it, so the parts cannot run into each other.
        hash.update(part.unwrap_or("\u{1}").as_bytes());
        hash.update(b"\0");
    }
    hash.update(&publish.payload);
    hash.finish().as_ref()[..FINGERPRINT / 2].iter().fold(String::with_capacity(FINGERPRINT), |mut text, byte| {
        use std::fmt::Write;
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Length of a fingerprint in digits.
const FINGERPRINT: usize = 32;

/// The 202 body without what can differ between the first request and its duplicates.
fn head_of(id: ExecutionId, topic: &str, route: &Route, reason: &str) -> String {
    // Names of topics need no escapes; a route's name and the reason may.
    let text = |t: &str| serde_json::to_string(t).unwrap_or_default();
    format!(
        r#"{{"execution_id":"{id}","topic":"{topic}","route":{{"name":{},"class":"{}","reason":{}}}"#,
        text(&route.name),
        route.class.as_str(),
        text(reason)
    )
}

/// What is said about an event after it was given to the outbox.
pub(super) struct Shown<'r> {
    pub tenant: crate::ids::Tenant,
    execution_id: ExecutionId,
    topic: crate::ids::Topic,
    route: &'r Route,
    reason: String,
}

/// An event that is durable.
pub(super) struct Accepted {
    pub execution_id: ExecutionId,
    pub duplicate: bool,
    /// As [`head_of`] made it.
    head: String,
}

impl<'r> Shown<'r> {
    pub fn of(append: &Append, route: &'r Route, reason: String) -> Self {
        let envelope = &append.event.envelope;
        Self {
            tenant: envelope.tenant.clone(),
            execution_id: envelope.execution_id,
            topic: envelope.topic.clone(),
            route,
            reason,
        }
    }

    /// # Errors
    /// 422: the key was used for another request.
    pub fn accepted(&self, appended: Appended, fingerprint: Option<&str>) -> Result<Accepted, Problem> {
        let kept = appended.answer.as_ref().filter(|_| appended.duplicate);
        let kept = kept.and_then(|a| std::str::from_utf8(a).ok()?.split_at_checked(FINGERPRINT));
        let head = match kept {
            Some((first, _)) if fingerprint.is_some_and(|f| f != first) => {
                let detail = "the Idempotency-Key was used with another workflow, topic, ordering key or payload";
                return Err(Problem::new(Kind::KeyReused, detail));
            }
            Some((_, head)) => head.to_owned(),
            None => head_of(appended.execution_id, self.topic.as_str(), self.route, &self.reason),
        };
        Ok(Accepted { execution_id: appended.execution_id, duplicate: appended.duplicate, head })
    }

    pub fn emit(&self, accepted: &Accepted, durability: &'static str, started: Instant) {
        events::Accepted {
            tenant: self.tenant.as_str(),
            execution_id: self.execution_id,
            route: &self.route.name,
            class: self.route.class.as_str(),
            topic: self.topic.as_str(),
            reason: &self.reason,
            durability,
            duplicate: accepted.duplicate,
            took: started.elapsed(),
        }
        .emit();
    }
}

impl Accepted {
    /// The 202 body.
    pub fn body(&self, durability: &str) -> String {
        format!(r#"{},"durability":"{durability}","duplicate":{}}}"#, self.head, self.duplicate)
    }

    pub fn answer(&self, tenant: &crate::ids::Tenant, durability: &str) -> Response<Body> {
        let mut response = Response::new(Body::from(self.body(durability)));
        *response.status_mut() = StatusCode::ACCEPTED;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let location = format!("/executions/{}?tenant={tenant}", self.execution_id);
        // A UUID and a tenant's name are visible ASCII.
        if let Ok(location) = HeaderValue::try_from(location) {
            headers.insert(header::LOCATION, location);
        }
        response
    }
}

impl Decided<'_> {
    pub fn key(&self) -> Key {
        self.append.event.key()
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }
}
