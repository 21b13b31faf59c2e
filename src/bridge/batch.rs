//! `POST /pulsar/publish/batch`: many events, one request, one sync, one result for each in order.
//!
//! 202 when every item was accepted, 207 when at least one was not: the caller looks at the items only then. What is
//! wrong with the request as a whole (account, size, not an array) is a problem document, and nothing was accepted.
//!
//! Items are independent: an accepted one stays accepted whatever the others come to. `Idempotency-Key` belongs to a single
//! publish and is refused here; a batch is made safe to repeat by an `execution_id` in each item.

use std::collections::HashSet;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts as Head;
use axum::http::{HeaderValue, Response, StatusCode, header};

use super::Bridge;
use super::publish::{Decided, Shown};
use super::request::{Hints, Publish, split_batch};
use super::respond::{Kind, Problem};
use super::routes::{Asked, Right, answer, body, expect_json, expect_plain, media_type};
use crate::config::routes::Class;

/// Publish many events.
///
/// One result per item, in order. Items for `short` routes are refused: they have an answer of their own.
#[utoipa::path(
    post, path = "/pulsar/publish/batch", tag = "publish",
    params(
        ("traceparent" = Option<String>, Header, description = "W3C trace context of all items"),
        ("X-N8N-Execution-Id" = Option<String>, Header, description = "n8n's execution that publishes"),
        ("X-N8N-Workflow-Id" = Option<String>, Header, description = "n8n's workflow that publishes"),
    ),
    request_body(content(
        (Vec<super::openapi::PublishRequest> = "application/json"),
        (String = "application/x-ndjson"),
    )),
    responses(
        (status = 202, description = "Every item is durable", body = super::openapi::BatchResult),
        (status = 207, description = "At least one item was refused", body = super::openapi::BatchResult),
    )
)]
pub async fn publish_batch(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |head, body| async move { bridge.publish_batch(head, body).await }).await
}

impl Bridge {
    async fn publish_batch(&self, head: Head, request: Body) -> Result<Response<Body>, Problem> {
        let Asked { live, caller, room } = self.asked(&head, Right::Publish).await?;
        let ndjson = match media_type(&head).as_deref() {
            Some("application/x-ndjson" | "application/ndjson" | "application/jsonl") => {
                expect_plain(&head)?;
                true
            }
            _ => {
                expect_json(&head)?;
                false
            }
        };
        let hints = Hints::read(&head.headers)?;
        if hints.idempotency_key.is_some() {
            return Err(Problem::malformed("Idempotency-Key is for a single publish; give each item an execution_id"));
        }
        let body = body(request, &head, live.bridge.batch_bytes_max, &live).await?;
        let items = split_batch(&body, ndjson, &live.bridge)?;
        let now = self.0.clock.now();
        let _slot = self.0.in_flight.enter(live.bridge.in_flight_max)?;

        let decide = |item: &bytes::Bytes| -> Result<Decided<'_>, Problem> {
            if item.len() as u64 > live.bridge.body_bytes_max.0 {
                let max = live.bridge.body_bytes_max;
                return Err(Problem::new(Kind::TooLarge, format!("the item is larger than {max}")));
            }
            let publish = Publish::read(item, &live.bridge, now)?;
            let hints = Hints {
                idempotency_key: None,
                traceparent: hints.traceparent.clone(),
                source_execution: hints.source_execution.clone(),
                source_workflow: hints.source_workflow.clone(),
            };
            let decided = room.decide(&live, &caller, publish, hints, now)?;
            if decided.route.class == Class::Short {
                let detail = format!("route {:?} is short and answers by itself: publish it alone", decided.route.name);
                return Err(Problem::malformed(detail));
            }
            Ok(decided)
        };
        let mut results: Vec<Option<Result<String, Problem>>> = Vec::with_capacity(items.len());
        let (mut appends, mut shown, mut keys) = (Vec::new(), Vec::new(), HashSet::new());
        for (n, item) in items.iter().enumerate() {
            match decide(item) {
                // One id twice in a batch is a mistake that later looks like a lost event.
                Ok(decided) if !keys.insert(decided.key()) => {
                    results.push(Some(Err(Problem::new(Kind::Conflict, "execution_id is given twice in this batch"))));
                }
                Ok(decided) => {
                    let started = decided.started();
                    shown.push((n, Shown::of(&decided.append, decided.route, decided.reason), started));
                    appends.push(decided.append);
                    results.push(None);
                }
                Err(problem) => results.push(Some(Err(problem))),
            }
        }
        let appended = match appends.is_empty() {
            true => Vec::new(),
            false => room.parts.outbox.append_batch(appends).await,
        };
        for ((n, shown, started), appended) in shown.into_iter().zip(appended) {
            let result = appended.map_err(Problem::from).and_then(|a| shown.accepted(a, None));
            results[n] = Some(result.map(|accepted| {
                shown.emit(&accepted, "disk", started);
                accepted.body("disk")
            }));
        }
        Ok(respond(&head, results))
    }
}

fn respond(head: &Head, results: Vec<Option<Result<String, Problem>>>) -> Response<Body> {
    let mut accepted = 0usize;
    let mut text = String::with_capacity(results.len() * 256);
    for result in &results {
        text.push_str(if text.is_empty() { "" } else { "," });
        match result {
            Some(Ok(body)) => {
                accepted += 1;
                text.push_str(r#"{"status":202,"accepted":"#);
                text.push_str(body);
            }
            refused => {
                // The outbox answers every item; a missing answer would be its defect and is not an acceptance.
                let missing = Problem::new(Kind::Internal, "the outbox did not answer for this item");
                let problem = match refused {
                    Some(Err(problem)) => problem,
                    _ => &missing,
                };
                let document = problem.document(None);
                text.push_str(&format!(r#"{{"status":{},"problem":"#, document.status));
                text.push_str(&serde_json::to_string(&document).unwrap_or_default());
            }
        }
        text.push('}');
    }
    let refused = results.len() - accepted;
    if refused > 0 {
        tracing::info!(accepted, refused, path = head.uri.path(), "a batch was accepted in part");
    }
    let body = format!(r#"{{"accepted":{accepted},"refused":{refused},"results":[{text}]}}"#);
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = if refused == 0 { StatusCode::ACCEPTED } else { StatusCode::MULTI_STATUS };
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
