//! What could not be delivered: look at it, run it again, or let it go.
//!
//! A dead letter is an event whose state is `dead`, or a record of the outbox that could never be relayed (error class
//! `poisoned`). Messages that were never ours (forged, altered) have no event; [`rejected`] shows them to operators of
//! all tenants.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Bridge;
use super::executions::{Cursor, Execution, POISONED, StateNow};
use super::replay::Job;
use super::request::{self, Limit};
use super::respond::{Kind, Problem};
use super::routes::{Asked, Asking, Right, SMALL, answer, body, expect_json, id, json, segment};
use crate::clock::Timestamp;
use crate::event::State as Phase;
use crate::ids::{ErrorClass, ExecutionId, Key, Tenant, Workflow};
use crate::outbox::Sequence;
use crate::payloads::Filter;

/// One page of dead letters.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeadLetterPage {
    pub dead_letters: Vec<Execution>,
    /// For `?cursor=` of the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// Dead letters, newest first; poisoned records come before the others.
#[utoipa::path(
    get, path = "/dead-letters", tag = "dead letters",
    params(
        ("tenant" = Option<Tenant>, Query, description = "Only this tenant's"),
        ("workflow" = Option<Workflow>, Query, description = "Only of this workflow"),
        ("error_class" = Option<ErrorClass>, Query, description = "Only with this class of error"),
        ("since" = Option<Timestamp>, Query, description = "Accepted at this time or later (RFC 3339)"),
        ("until" = Option<Timestamp>, Query, description = "Accepted before this time (RFC 3339)"),
        ("limit" = Option<Limit>, Query, description = "Events in a page; 50 when not given"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the former page"),
    ),
    responses((status = 200, description = "One page", body = DeadLetterPage))
)]
pub async fn list(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |head, _| async move {
        let asked = bridge.asked(&head, Right::Read).await?;
        let names = ["tenant", "workflow", "error_class", "since", "until", "limit", "cursor"];
        let asking = Asking::read(&head.uri, &names)?;
        let filter = Filter { states: vec![Phase::Dead], ..asked.filter(&asking)? };
        let page = asked.dead(filter, asking.text("cursor")).await?;
        Ok(json(StatusCode::OK, &page))
    })
    .await
}

impl Asked {
    async fn dead(&self, filter: Filter, cursor: Option<&str>) -> Result<DeadLetterPage, Problem> {
        let (limit, mut dead_letters) = (filter.limit, Vec::new());
        let cursor = match Cursor::read(cursor)? {
            Cursor::Ledger(cursor) => cursor,
            Cursor::Outbox(after) => {
                let wanted = filter.error_class.as_deref().is_none_or(|class| class == POISONED);
                if wanted && let Some(next) = self.waiting(&filter, true, after, &mut dead_letters).await? {
                    return Ok(DeadLetterPage { dead_letters, next_cursor: Some(next) });
                }
                if dead_letters.len() == limit {
                    return Ok(DeadLetterPage { dead_letters, next_cursor: Some("l".into()) });
                }
                None
            }
        };
        let page = self.room.parts.store.list(Filter { cursor, limit: limit - dead_letters.len(), ..filter }).await?;
        dead_letters.extend(page.rows.into_iter().map(|row| Execution::of_row(row, false)));
        Ok(DeadLetterPage { dead_letters, next_cursor: page.next.map(|next| format!("l{next}")) })
    }

    /// A dead letter of the caller's.
    ///
    /// # Errors
    /// 404 for what is not there, not the caller's, or not dead.
    async fn dead_letter(&self, head: &mut axum::http::request::Parts) -> Result<(Key, Execution), Problem> {
        let asking = Asking::read(&head.uri, &["tenant"])?;
        let (key, execution) = self.find(id(head).await?, &asking, true).await?;
        if execution.state == Phase::Dead { Ok((key, execution)) } else { Err(Problem::no_execution()) }
    }

    /// Where in the outbox a poisoned record lies.
    async fn poisoned(&self, key: &Key, execution: &Execution) -> Result<Option<Sequence>, Problem> {
        if execution.error_class.as_deref() != Some(POISONED) {
            return Ok(None);
        }
        let found = self.room.parts.outbox.find(key).await?;
        Ok(found.filter(|f| f.poisoned.is_some()).map(|f| f.sequence))
    }
}

/// One dead letter, with every attempt.
#[utoipa::path(
    get, path = "/dead-letters/{id}", tag = "dead letters",
    params(
        ("id" = ExecutionId, Path, description = "execution_id"),
        ("tenant" = Option<Tenant>, Query, description = "Whose it is; needed where two of the caller's tenants have the id"),
    ),
    responses((status = 200, description = "The dead letter", body = Execution))
)]
pub async fn show(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |mut head, _| async move {
        let asked = bridge.asked(&head, Right::Read).await?;
        let (_, execution) = asked.dead_letter(&mut head).await?;
        Ok(json(StatusCode::OK, &execution))
    })
    .await
}

/// Run a dead letter again, with a fresh count of attempts and the same `webhook-id`.
#[utoipa::path(
    post, path = "/dead-letters/{id}/replay", tag = "dead letters",
    params(
        ("id" = ExecutionId, Path, description = "execution_id"),
        ("tenant" = Option<Tenant>, Query, description = "Whose it is; needed where two of the caller's tenants have the id"),
    ),
    responses(
        (status = 202, description = "It is due now", body = StateNow),
        (status = 409, description = "Somebody else was faster: it is no dead letter any more"),
    )
)]
pub async fn replay(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |mut head, _| async move {
        let asked = bridge.asked(&head, Right::Operate).await?;
        let (key, execution) = asked.dead_letter(&mut head).await?;
        let (done, state) = match asked.poisoned(&key, &execution).await? {
            Some(sequence) => (asked.room.parts.outbox.repair_poisoned(sequence, false).await?, Phase::Accepted),
            None => (asked.room.parts.store.replay(&key).await?.unwrap_or(false), Phase::Relayed),
        };
        if !done {
            return Err(Problem::new(Kind::Conflict, "it is no dead letter any more"));
        }
        asked.caller.operated("replay", &key);
        Ok(json(StatusCode::ACCEPTED, &StateNow { execution_id: key.execution_id, state }))
    })
    .await
}

/// Let a dead letter go for good. Its state becomes `cancelled`, and its payload is collected later.
#[utoipa::path(
    delete, path = "/dead-letters/{id}", tag = "dead letters",
    params(
        ("id" = ExecutionId, Path, description = "execution_id"),
        ("tenant" = Option<Tenant>, Query, description = "Whose it is; needed where two of the caller's tenants have the id"),
    ),
    responses(
        (status = 200, description = "It is gone", body = StateNow),
        (status = 409, description = "Somebody else was faster: it is no dead letter any more"),
    )
)]
pub async fn discard(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |mut head, _| async move {
        let asked = bridge.asked(&head, Right::Operate).await?;
        let (key, execution) = asked.dead_letter(&mut head).await?;
        let done = match asked.poisoned(&key, &execution).await? {
            Some(sequence) => asked.room.parts.outbox.repair_poisoned(sequence, true).await?,
            None => asked.room.parts.store.discard(&key).await?.unwrap_or(false),
        };
        if !done {
            return Err(Problem::new(Kind::Conflict, "it is no dead letter any more"));
        }
        asked.caller.operated("discard", &key);
        Ok(json(StatusCode::OK, &StateNow { execution_id: key.execution_id, state: Phase::Cancelled }))
    })
    .await
}

/// Which dead letters to replay. All that are given must match; without any, all of the caller's.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ReplayRequest {
    #[serde(default)]
    pub tenant: Option<Tenant>,
    #[serde(default)]
    pub workflow: Option<Workflow>,
    #[serde(default)]
    pub error_class: Option<ErrorClass>,
    /// Accepted at this time or later.
    #[serde(default)]
    pub since: Option<Timestamp>,
    /// Accepted before this time.
    #[serde(default)]
    pub until: Option<Timestamp>,
    /// Only count.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a dry run found.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Counted {
    pub count: u64,
    /// Replayed per second by the job.
    pub rate: u64,
}

/// Replay many dead letters in the background, at `delivery.replay_rate` a second.
///
/// Poisoned records are replayed one by one only.
#[utoipa::path(
    post, path = "/dead-letters/replay", tag = "dead letters",
    request_body(content = ReplayRequest, content_type = "application/json"),
    responses(
        (status = 200, description = "Dry run: how many there are", body = Counted),
        (status = 202, description = "The job has begun", body = Job,
         headers(("Location" = String, description = "Where to ask how far it is"))),
    )
)]
pub async fn replay_many(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |head, sent| async move {
        let asked = bridge.asked(&head, Right::Operate).await?;
        expect_json(&head)?;
        let sent = body(sent, &head, SMALL, &asked.live).await?;
        let wanted: ReplayRequest = request::small(&sent, &asked.live.bridge)?;
        if let Some(tenant) = &wanted.tenant {
            asked.room.env.tenant(&asked.caller, tenant)?;
        }
        let now = bridge.0.clock.now();
        let filter = Filter {
            tenant: wanted.tenant,
            tenants: asked.caller.tenants().map(<[_]>::to_vec),
            states: vec![Phase::Dead],
            workflow: wanted.workflow,
            error_class: wanted.error_class.map(|class| class.to_string()),
            since: wanted.since,
            // What dies while the job runs is not its business.
            until: Some(wanted.until.map_or(now, |until| until.min(now))),
            cursor: None,
            limit: 500,
        };
        let count = asked.room.parts.store.count(filter.clone()).await?;
        let rate = asked.room.env.config.delivery.replay_rate;
        if wanted.dry_run {
            return Ok(json(StatusCode::OK, &Counted { count, rate }));
        }
        let job = bridge.replay_many(&asked, filter, count, rate)?;
        let mut response = json(StatusCode::ACCEPTED, &job);
        if let Ok(location) = HeaderValue::try_from(format!("/dead-letters/replays/{}", job.job_id)) {
            response.headers_mut().insert(header::LOCATION, location);
        }
        Ok(response)
    })
    .await
}

/// How far a replay job is. Jobs live in this process and are forgotten when it ends; what they replayed is durable.
#[utoipa::path(
    get, path = "/dead-letters/replays/{job}", tag = "dead letters",
    params(("job" = uuid::Uuid, Path, description = "job_id")),
    responses((status = 200, description = "The job", body = Job))
)]
pub async fn replay_status(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |mut head, _| async move {
        let asked = bridge.asked(&head, Right::Operate).await?;
        Asking::read(&head.uri, &[])?;
        let job = segment(&mut head).await.and_then(|text| text.parse().ok());
        let job = job.and_then(|job| bridge.0.replays.find(job, &asked.caller.name, &asked.room.env.config.name));
        Ok(json(StatusCode::OK, &job.ok_or_else(|| Problem::new(Kind::NotFound, "no such job"))?))
    })
    .await
}

/// A message that was refused at the door of delivery.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RejectedMessage {
    pub at: Timestamp,
    pub topic: String,
    pub message_id: String,
    pub reason: String,
    /// As it was found.
    pub raw: String,
}

/// Messages that were never delivered because they are not ours: forged, altered, on a wrong topic.
#[utoipa::path(
    get, path = "/dead-letters/rejected", tag = "dead letters",
    responses((status = 200, description = "The latest ones", body = Vec<RejectedMessage>))
)]
pub async fn rejected(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |head, _| async move {
        let asked = bridge.asked(&head, Right::Operate).await?;
        Asking::read(&head.uri, &[])?;
        if asked.caller.tenants().is_some() {
            return Err(Problem::new(Kind::Forbidden, "rejected messages have no tenant: only for operators of all"));
        }
        let found = asked.room.parts.store.rejected(500).await?;
        let shown: Vec<_> = found
            .into_iter()
            .map(|r| RejectedMessage {
                at: r.at,
                topic: r.topic.to_string(),
                message_id: r.message_id,
                reason: r.reason,
                raw: r.raw,
            })
            .collect();
        Ok(json(StatusCode::OK, &shown))
    })
    .await
}
