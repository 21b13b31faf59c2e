//! For foreign workers that take references from Pulsar themselves (`consumer = "external"`).
//!
//! The reference that came through Pulsar is the credential: whoever holds it may load that one payload and end that one
//! event, nothing else. A worker verifies it with the keys of `/.well-known/jwks.json` (EdDSA; `docs/api.md` has the
//! recipe), loads the body, works, and says how it ended.
//!
//! # Invariants
//! 1. A reference opens only the event that it names, only in its environment, and only while its route is external.
//! 2. An expired reference is good for what the ledger knows as open, as everywhere.
//! 3. What comes out is what the reference's hash says, or nothing.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts as Head;
use axum::http::{HeaderValue, Response, StatusCode, header};
use axum::response::IntoResponse;
use base64::Engine;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::auth::bearer;
use super::executions::StateNow;
use super::request::{self, Whole};
use super::respond::{Kind, Problem};
use super::routes::{Asking, SMALL, address, answer, body, expect_json, id, json};
use super::{Bridge, Env, Parts};
use crate::broker::{Claims, Rejection};
use crate::config::routes::ConsumerKind;
use crate::event::{Content, State as Phase};
use crate::ids::{BodyHash, ExecutionId};
use crate::payloads::{Attempt, Row};

/// Public keys that verify references (RFC 7517).
#[utoipa::path(
    get, path = "/.well-known/jwks.json", tag = "external workers",
    responses((status = 200, description = "A JWK set", body = serde_json::Value, content_type = "application/json")),
    security(())
)]
pub async fn keys(State(bridge): State<Bridge>) -> Response<Body> {
    let mut keys: Vec<serde_json::Value> = Vec::new();
    for parts in bridge.0.parts.values() {
        let set = parts.keys.jwks();
        for key in set.get("keys").and_then(|k| k.as_array()).into_iter().flatten() {
            if !keys.contains(key) {
                keys.push(key.clone());
            }
        }
    }
    let mut response = json(StatusCode::OK, &serde_json::json!({ "keys": keys }));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=300"));
    response
}

/// The body of the event that the bearer's reference names.
#[utoipa::path(
    get, path = "/executions/{id}/payload", tag = "external workers",
    params(("id" = ExecutionId, Path, description = "execution_id of the reference")),
    responses(
        (status = 200, description = "The body, with its own content type", body = serde_json::Value, content_type = "application/json",
         headers(("Content-Digest" = String, description = "RFC 9530"), ("X-Dealscale-Payload-Sha256" = String, description = "As in the reference"))),
        (status = 409, description = "The event is final: acknowledge the message, there is nothing to do"),
    ),
    security(("reference" = []))
)]
pub async fn payload(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |mut head, _| async move {
        let (_, parts, row, claims) = bridge.referred(&mut head).await?;
        if row.state.is_final() {
            let detail = format!("the event is {}: acknowledge the message", row.state);
            return Err(Problem::new(Kind::Conflict, detail));
        }
        let event = parts.store.load(vec![claims.key()]).await?.pop().flatten().ok_or_else(Problem::no_execution)?;
        if BodyHash::of(&event.body) != claims.payload_sha256 {
            tracing::error!(key = %claims.key(), "a payload is not what its reference says");
            return Err(Problem::new(Kind::Internal, "the payload is damaged"));
        }
        let kind = match &event.envelope.content {
            Content::Request { headers, .. } => headers
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case("content-type"))
                .and_then(|(_, value)| HeaderValue::try_from(value).ok())
                .unwrap_or(HeaderValue::from_static("application/octet-stream")),
            Content::Json | Content::Done { .. } => HeaderValue::from_static("application/json"),
        };
        let mut response = Response::new(Body::from(event.body));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, kind);
        let digest = base64::engine::general_purpose::STANDARD.encode(claims.payload_sha256.0);
        for (name, value) in [
            ("content-digest", format!("sha-256=:{digest}:")),
            ("x-dealscale-payload-sha256", claims.payload_sha256.to_string()),
            ("x-dealscale-tenant", claims.tenant_id.to_string()),
        ] {
            if let Ok(value) = HeaderValue::try_from(value) {
                headers.insert(name, value);
            }
        }
        Ok(response)
    })
    .await
}

/// How the work of a foreign worker ended.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResultRequest {
    pub state: Ended,
    /// What went wrong, for people; at most 4,000 characters are kept.
    #[serde(default)]
    pub error: Option<String>,
    /// With `failed`: the attempt is written down, and the event stays open. The worker gives the message back to Pulsar
    /// (negative acknowledgement), and its next delivery is the next attempt.
    #[serde(default)]
    pub retry: bool,
    /// How long the work took.
    #[schema(value_type = Option<u64>, minimum = 0, maximum = 31_622_400_000_u64)]
    #[serde(default)]
    pub duration_ms: Option<Whole>,
    /// At most 200 characters are kept.
    #[serde(default)]
    pub n8n_execution_id: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    Succeeded,
    Failed,
}

const ERROR_MAX: usize = 4_000;
const N8N_ID_MAX: usize = 200;
/// A leap year; no reference lives as long. Also keeps the time when the work began within what a time can be.
pub(super) const DURATION_MAX_MS: u64 = 366 * 86_400_000;

/// The beginning of a worker's text, without control characters but for line ends and tabs: databases refuse some of them.
fn kept(text: &str, max: usize) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).take(max).collect()
}

/// End the event that the bearer's reference names. Repeating it answers the same.
#[utoipa::path(
    post, path = "/executions/{id}/result", tag = "external workers",
    params(("id" = ExecutionId, Path, description = "execution_id of the reference")),
    request_body(content = ResultRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "Its state now", body = StateNow),
        (status = 409, description = "It ended otherwise before"),
    ),
    security(("reference" = []))
)]
pub async fn result(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |mut head, sent| async move {
        let (_, parts, row, claims) = bridge.referred(&mut head).await?;
        expect_json(&head)?;
        let live = bridge.live();
        let sent = body(sent, &head, SMALL, &live).await?;
        let ended: ResultRequest = request::small(&sent, &live.bridge)?;
        if ended.retry && ended.state == Ended::Succeeded {
            return Err(Problem::malformed("retry goes with state \"failed\""));
        }
        if ended.duration_ms.is_some_and(|took| took.0 > DURATION_MAX_MS) {
            return Err(Problem::malformed(format!("duration_ms is at most {DURATION_MAX_MS}")));
        }
        let wanted = match (ended.state, ended.retry) {
            (Ended::Succeeded, _) => Phase::Succeeded,
            (Ended::Failed, false) => Phase::Failed,
            (Ended::Failed, true) => Phase::Relayed,
        };
        if row.state.is_final() {
            return settled(&claims, row.state, wanted);
        }
        let error = ended.error.map(|e| kept(&e, ERROR_MAX));
        let duration_ms = ended.duration_ms.map(|took| took.0);
        let took = duration_ms.unwrap_or(0);
        let attempt = Attempt {
            number: row.attempts + 1,
            started_at: bridge.0.clock.now().minus(std::time::Duration::from_millis(took)),
            duration_ms,
            status: None,
            error_class: (ended.state == Ended::Failed).then(|| "error".to_owned()),
            error: error.clone(),
            n8n_execution_id: ended.n8n_execution_id.map(|id| kept(&id, N8N_ID_MAX)),
            message_id: row.message_id,
            traceparent: row.envelope.traceparent,
        };
        let key = claims.key();
        let state = parts.store.finish_external(&key, wanted, attempt, error).await?;
        let state = state.ok_or_else(Problem::no_execution)?;
        if state.is_final() {
            parts.finals.notify(&key, state);
        }
        settled(&claims, state, wanted)
    })
    .await
}

fn settled(claims: &Claims, state: Phase, wanted: Phase) -> Result<Response<Body>, Problem> {
    if state == wanted {
        Ok(json(StatusCode::OK, &StateNow { execution_id: claims.execution_id, state }).into_response())
    } else {
        Err(Problem::new(Kind::Conflict, format!("the event is {state} already")))
    }
}

impl Bridge {
    /// What the bearer's reference names, checked against the path, the ledger and the route.
    async fn referred(&self, head: &mut Head) -> Result<(std::sync::Arc<Env>, Parts, Row, Claims), Problem> {
        Asking::read(&head.uri, &[])?;
        let refused = |reason| {
            let problem = Problem::new(Kind::Unauthorized, "send the reference: Authorization: Bearer REFERENCE");
            self.0.auth.failed(address(head), reason, problem)
        };
        let token = match bearer(&head.headers) {
            Ok(Some(token)) => token,
            Ok(None) => {
                return Err(Problem::new(Kind::Unauthorized, "send the reference: Authorization: Bearer REFERENCE"));
            }
            Err(_) => return Err(refused("malformed")),
        };
        let (live, now) = (self.live(), self.0.clock.now());
        let mut found = None;
        for (environment, parts) in &self.0.parts {
            match parts.keys.verify(token.as_bytes(), environment, None, now) {
                Ok(verified) => found = Some((environment, parts, verified)),
                Err(Rejection::Environment(_)) => {}
                Err(_) if self.0.parts.len() > 1 => {}
                Err(_) => return Err(refused("reference")),
            }
        }
        let Some((environment, parts, verified)) = found else { return Err(refused("reference")) };
        let claims = verified.claims;
        if id(head).await? != claims.execution_id {
            return Err(Problem::new(Kind::Forbidden, "the reference is for another event"));
        }
        let env = live.environments.get(environment).ok_or_else(Problem::no_execution)?;
        let row = parts.store.get(&claims.key(), false).await?.ok_or_else(Problem::no_execution)?;
        if row.envelope.body_hash != claims.payload_sha256 || (verified.expired && row.state.is_final()) {
            return Err(Problem::no_execution());
        }
        if env.config.route(&row.envelope.route).consumer != ConsumerKind::External {
            return Err(Problem::new(Kind::Forbidden, "the appliance delivers this event itself"));
        }
        Ok((env.clone(), parts.clone(), row, claims))
    }
}
