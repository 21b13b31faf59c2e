//! `/admin/outbox/*`: the running outbox for `dealscale outbox`.

use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Admin, Peer, problem};
use crate::event::{Envelope, Event};
use crate::ids::Tenant;
use crate::outbox::{Append, Error, Found, Sequence};

pub(super) fn router() -> Router<Admin> {
    Router::new()
        .route("/admin/outbox/status", get(status))
        // Records are as large as `bridge.body_max` allows, and who may open the socket may do more than fill the memory.
        .route("/admin/outbox/records", get(list).post(import).layer(DefaultBodyLimit::disable()))
        .route("/admin/outbox/unreadable", get(unreadable))
        .route("/admin/outbox/records/{sequence}", get(show).delete(discard))
        .route("/admin/outbox/records/{sequence}/requeue", post(requeue))
        .route("/admin/outbox/acknowledge-loss", post(acknowledge))
        .route("/admin/outbox/finalize", post(finalize))
}

/// A record as it travels between the appliance and the command line, and in an export.
#[derive(Debug, Serialize, Deserialize)]
pub struct RecordView {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    #[serde(default)]
    pub leased: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub poisoned: Option<String>,
    pub bytes: u64,
    pub envelope: Envelope,
    /// Base64; only where it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
}

impl RecordView {
    pub fn new(found: &Found, body: bool) -> Self {
        Self {
            sequence: Some(found.sequence.0),
            leased: found.leased,
            poisoned: found.poisoned.clone(),
            bytes: found.body_bytes,
            envelope: found.event.envelope.clone(),
            body: body.then(|| STANDARD.encode(&found.event.body)),
        }
    }

    /// An event to import.
    pub fn of(event: &Event) -> Self {
        Self {
            sequence: None,
            leased: false,
            poisoned: None,
            bytes: event.body.len() as u64,
            envelope: event.envelope.clone(),
            body: Some(STANDARD.encode(&event.body)),
        }
    }

    /// Back into an event. The body must be the one that was hashed.
    ///
    /// # Errors
    /// No body, or not the right one.
    pub fn into_event(self) -> Result<Event, String> {
        let id = self.envelope.execution_id;
        let body = self.body.ok_or_else(|| format!("record {id} has no body"))?;
        let body = STANDARD.decode(body).map_err(|_| format!("the body of record {id} is not base64"))?;
        if crate::ids::BodyHash::of(&body) != self.envelope.body_hash {
            return Err(format!("the body of record {id} does not have the hash of its envelope"));
        }
        Ok(Event { envelope: self.envelope, body: body.into() })
    }
}

fn failed(error: &Error) -> Response {
    problem(StatusCode::SERVICE_UNAVAILABLE, "The outbox cannot do it", &error.to_string())
}

async fn status(State(admin): State<Admin>, headers: HeaderMap) -> Result<Response, Response> {
    Ok(Json(admin.outbox(&headers)?.status()).into_response())
}

#[derive(Deserialize)]
struct ListQuery {
    tenant: Option<Tenant>,
    #[serde(default)]
    poisoned: bool,
    after: Option<u64>,
    #[serde(default = "hundred")]
    limit: usize,
    #[serde(default)]
    body: bool,
}

fn hundred() -> usize {
    100
}

async fn list(
    State(admin): State<Admin>,
    headers: HeaderMap,
    Query(query): Query<ListQuery>,
) -> Result<Response, Response> {
    let limit = query.limit.clamp(1, 1_000);
    let (outbox, after) = (admin.outbox(&headers)?, query.after.map(Sequence));
    let found = match query.body {
        true => outbox.list_with_bodies(query.poisoned, after, limit).await,
        false => outbox.list(query.tenant, query.poisoned, after, limit).await,
    };
    let found = found.map_err(|e| failed(&e))?;
    let records: Vec<_> = found.iter().map(|f| RecordView::new(f, query.body)).collect();
    Ok(Json(json!({ "records": records })).into_response())
}

async fn show(State(admin): State<Admin>, headers: HeaderMap, Path(sequence): Path<u64>) -> Result<Response, Response> {
    let outbox = admin.outbox(&headers)?;
    match outbox.record(Sequence(sequence)).await.map_err(|e| failed(&e))? {
        Some(found) => Ok(Json(RecordView::new(&found, true)).into_response()),
        None => {
            let why = absent(outbox, sequence).await.map_err(|e| failed(&e))?;
            Err(problem(StatusCode::NOT_FOUND, "No such record", &why))
        }
    }
}

/// Why there is nothing to show of a sequence.
pub async fn absent(outbox: &crate::outbox::Outbox, sequence: u64) -> Result<String, Error> {
    let unreadable = outbox.unreadable(false).await?.into_iter().find(|record| record.sequence.0 == sequence);
    Ok(match unreadable {
        Some(record) => format!(
            "record {sequence} of tenant {} is there and cannot be read ({}); `dealscale outbox repair --discard {sequence}` lets it go",
            record.tenant, record.why
        ),
        None => format!("record {sequence} has left the outbox, or never was; see `dealscale executions`"),
    })
}

/// What was poisoned because nobody can read it.
async fn unreadable(State(admin): State<Admin>, headers: HeaderMap) -> Result<Response, Response> {
    let records = admin.outbox(&headers)?.unreadable(false).await.map_err(|e| failed(&e))?;
    Ok(Json(json!({ "records": records })).into_response())
}

async fn repair(
    admin: &Admin,
    headers: &HeaderMap,
    peer: Peer,
    sequence: u64,
    discard: bool,
) -> Result<Response, Response> {
    let done = admin.outbox(headers)?.repair_poisoned(Sequence(sequence), discard).await.map_err(|e| failed(&e))?;
    if !done {
        return Err(problem(StatusCode::NOT_FOUND, "No such poisoned record", "see `dealscale outbox ls --poisoned`"));
    }
    tracing::warn!(target: "dealscale::audit", sequence, discard, uid = ?peer.uid, "a poisoned record was repaired");
    Ok(Json(json!({ "sequence": sequence, "done": if discard { "discarded" } else { "requeued" } })).into_response())
}

async fn requeue(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    headers: HeaderMap,
    Path(sequence): Path<u64>,
) -> Result<Response, Response> {
    repair(&admin, &headers, peer, sequence, false).await
}

async fn discard(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    headers: HeaderMap,
    Path(sequence): Path<u64>,
) -> Result<Response, Response> {
    repair(&admin, &headers, peer, sequence, true).await
}

async fn acknowledge(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    headers: HeaderMap,
) -> Result<Response, Response> {
    admin.outbox(&headers)?.acknowledge_data_loss().await.map_err(|e| failed(&e))?;
    tracing::warn!(target: "dealscale::audit", uid = ?peer.uid, "possible data loss was acknowledged");
    Ok(Json(json!({ "acknowledged": true })).into_response())
}

/// The newest on-disk format from now on.
async fn finalize(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    headers: HeaderMap,
) -> Result<Response, Response> {
    let (before, now) = admin.outbox(&headers)?.finalize().await.map_err(|e| failed(&e))?;
    if before != now {
        tracing::warn!(target: "dealscale::audit", before, now, uid = ?peer.uid, "the on-disk format was raised; there is no way back");
    }
    Ok(Json(json!({ "format_before": before, "format": now })).into_response())
}

/// Takes exported records: each keeps its id, so what is here already is a duplicate, not a second event.
async fn import(
    State(admin): State<Admin>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    headers: HeaderMap,
    Json(records): Json<Vec<RecordView>>,
) -> Result<Response, Response> {
    let outbox = admin.outbox(&headers)?;
    let mut items = Vec::with_capacity(records.len());
    let mut ids = Vec::with_capacity(records.len());
    for record in records {
        ids.push(record.envelope.execution_id);
        let event = record.into_event().map_err(|e| problem(StatusCode::BAD_REQUEST, "Not an exported record", &e))?;
        items.push(Append { event, idempotency_key: None, answer: Default::default() });
    }
    let (mut imported, mut duplicates, mut refused) = (0, 0, Vec::new());
    for (result, id) in outbox.append_batch(items).await.into_iter().zip(ids) {
        match result {
            Ok(appended) if appended.duplicate => duplicates += 1,
            Ok(_) => imported += 1,
            Err(error) => refused.push(format!("{id}: {error}")),
        }
    }
    tracing::warn!(target: "dealscale::audit", imported, duplicates, refused = refused.len(), uid = ?peer.uid, "records were imported");
    Ok(Json(json!({ "imported": imported, "duplicates": duplicates, "refused": refused })).into_response())
}
