//! What became of an event: one, many, waiting for its end, cancelling it.
//!
//! An answer merges the outbox (events that the relay has not taken yet: `accepted`, and poisoned ones) with the ledger
//! (everything later). An event moves from the one to the other at any moment, so both are asked until one knows it.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::request::Parts as Head;
use axum::http::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::auth::Caller;
use super::request::{Limit, Wait};
use super::respond::{Kind, Problem};
use super::routes::{Asked, Asking, Right, answer, id, json};
use super::{Bridge, Live, Room};
use crate::clock::Timestamp;
use crate::event::{Content, Envelope, State as Phase};
use crate::ids::{ErrorClass, ExecutionId, Key, Tenant, Workflow};
use crate::observe::bridge as events;
use crate::outbox::{Cancelled, Found, Sequence};
use crate::payloads::{Attempt, Filter, Row};

/// An event and what became of it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Execution {
    pub execution_id: ExecutionId,
    pub tenant_id: Tenant,
    pub state: Phase,
    /// Nothing more happens unless an operator acts.
    pub r#final: bool,
    pub workflow: Option<Workflow>,
    pub topic: String,
    pub route: String,
    pub priority: u8,
    pub ordering_key: Option<String>,
    pub metadata: std::collections::BTreeMap<String, String>,
    pub accepted_at: Timestamp,
    pub deliver_at: Option<Timestamp>,
    /// Attempts that were begun.
    pub attempts: u32,
    /// When the next attempt is due, if one is.
    pub next_at: Option<Timestamp>,
    pub updated_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    /// Why it is dead, failed or unknown.
    pub error_class: Option<String>,
    pub error: Option<String>,
    /// n8n's execution that ran it.
    pub n8n_execution_id: Option<String>,
    /// The broker's id of the reference.
    pub message_id: Option<String>,
    /// n8n's execution and workflow that published it.
    pub source_execution: Option<String>,
    pub source_workflow: Option<String>,
    pub traceparent: Option<String>,
    pub replays: u32,
    pub body_bytes: u64,
    /// Every attempt, oldest first; only when one event is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<Vec<Attempt>>,
}

/// One page of a list.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ExecutionPage {
    pub executions: Vec<Execution>,
    /// For `?cursor=` of the next page; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// Error class of a record that can never be relayed.
pub(super) const POISONED: &str = "poisoned";

impl Execution {
    fn new(envelope: Envelope, state: Phase, body_bytes: u64) -> Self {
        Self {
            execution_id: envelope.execution_id,
            tenant_id: envelope.tenant,
            state,
            r#final: state.is_final(),
            workflow: envelope.workflow,
            topic: envelope.topic.to_string(),
            route: envelope.route,
            priority: envelope.priority,
            ordering_key: envelope.ordering_key.map(|k| k.to_string()),
            metadata: envelope.metadata,
            accepted_at: envelope.accepted_at,
            deliver_at: envelope.deliver_at,
            attempts: 0,
            next_at: None,
            updated_at: None,
            finished_at: None,
            error_class: None,
            error: None,
            n8n_execution_id: None,
            message_id: None,
            source_execution: envelope.source_execution,
            source_workflow: envelope.source_workflow,
            traceparent: envelope.traceparent,
            replays: 0,
            body_bytes,
            history: None,
        }
    }

    pub(super) fn of_row(row: Row, history: bool) -> Self {
        Self {
            attempts: row.attempts,
            next_at: row.next_at,
            updated_at: Some(row.updated_at),
            finished_at: row.finished_at,
            error_class: row.error_class,
            error: row.error,
            n8n_execution_id: row.n8n_execution_id,
            message_id: row.message_id,
            replays: row.replays,
            history: history.then_some(row.history),
            ..Self::new(row.envelope, row.state, row.body_bytes)
        }
    }

    /// A record of the outbox: `accepted`, or `dead` when it was poisoned.
    pub(super) fn of_record(found: Found, history: bool) -> Self {
        let (envelope, bytes) = (found.event.envelope, found.body_bytes);
        let state = match (&found.poisoned, &envelope.content) {
            (Some(_), _) => Phase::Dead,
            // Over already, only not in the ledger yet.
            (None, Content::Done { state, .. }) => *state,
            (None, _) => Phase::Accepted,
        };
        let call = Attempt::of_call(&envelope);
        let poisoned = found.poisoned.as_ref().map(|_| POISONED.to_owned());
        Self {
            attempts: u32::from(call.is_some()),
            error_class: poisoned.or_else(|| call.as_ref()?.error_class.clone()),
            error: found.poisoned.or_else(|| call.as_ref()?.error.clone()),
            n8n_execution_id: call.as_ref().and_then(|call| call.n8n_execution_id.clone()),
            history: history.then(|| call.into_iter().collect()),
            ..Self::new(envelope, state, bytes)
        }
    }
}

/// What became of one event, with every attempt.
#[utoipa::path(
    get, path = "/executions/{id}", tag = "executions",
    params(
        ("id" = ExecutionId, Path, description = "execution_id"),
        ("tenant" = Option<Tenant>, Query, description = "Whose it is; needed where two of the caller's tenants have the id"),
    ),
    responses((status = 200, description = "The event", body = Execution))
)]
pub async fn show(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |mut head, _| async move {
        let asked = bridge.asked(&head, Right::Read).await?;
        let asking = Asking::read(&head.uri, &["tenant"])?;
        let (_, execution) = asked.find(id(&mut head).await?, &asking, true).await?;
        Ok(json(StatusCode::OK, &execution))
    })
    .await
}

/// Tenants with events in the outbox that are asked for an id without a tenant. Events are there for milliseconds, or all
/// of them while the ledger is away.
const WAITING_TENANTS_MAX: usize = 1_000;

impl Asked {
    /// The tenants of the caller's that have this id, as far as that can be known before the events are read: an id without
    /// `?tenant=` may belong to any tenant that a pattern admits.
    async fn candidates(&self, id: ExecutionId) -> Result<BTreeSet<Tenant>, Problem> {
        if let Some(only) = self.caller.only_tenant() {
            return Ok(BTreeSet::from([only]));
        }
        let parts = &self.room.parts;
        let mut found = BTreeSet::new();
        // First the outbox, then the ledger: between the two an event moves in this direction only.
        let exact = self.room.env.config.tenants.iter().map(|t| t.pattern.as_str());
        let exact = exact.chain(self.caller.grant.tenants.iter().map(|p| p.as_str()));
        let mut waiting: BTreeSet<_> = exact.filter_map(|name| Tenant::try_new(name).ok()).collect();
        waiting.extend(parts.outbox.status().tenants.keys().filter_map(|name| Tenant::try_new(name).ok()));
        for tenant in waiting.into_iter().filter(|t| self.caller.may_use(t)).take(WAITING_TENANTS_MAX) {
            let key = Key { tenant, execution_id: id };
            if parts.outbox.find(&key).await?.is_some() {
                found.insert(key.tenant);
            }
        }
        match parts.store.tenants_of(id).await {
            Ok(tenants) => found.extend(tenants.into_iter().filter(|t| self.caller.may_use(t))),
            // The ledger is down: what the outbox knows is true, and better than nothing.
            Err(_) if !found.is_empty() => {}
            Err(error) => return Err(error.into()),
        }
        Ok(found)
    }

    /// The event with this id, as far as the caller may see it.
    ///
    /// # Errors
    /// 404 for what is not there and for what belongs to others; 400 when two of the caller's tenants have the id.
    pub(super) async fn find(
        &self,
        id: ExecutionId,
        asking: &Asking,
        history: bool,
    ) -> Result<(Key, Execution), Problem> {
        let tenants = match asking.parse::<Tenant>("tenant")? {
            Some(tenant) if self.caller.may_use(&tenant) => BTreeSet::from([tenant]),
            Some(_) => return Err(Problem::no_execution()),
            None => self.candidates(id).await?,
        };
        let mut found = None;
        for tenant in tenants {
            let key = Key { tenant, execution_id: id };
            if let Some(execution) = self.room.look(&key, history).await?
                && found.replace((key, execution)).is_some()
            {
                return Err(Problem::malformed("several tenants have this id: name one with ?tenant="));
            }
        }
        found.ok_or_else(Problem::no_execution)
    }
}

impl Room {
    /// Ledger and outbox together. The outbox is asked first and last: between the two an event may have moved on.
    pub(super) async fn look(&self, key: &Key, history: bool) -> Result<Option<Execution>, Problem> {
        let first = self.parts.outbox.find(key).await?;
        if let Some(found) = first.as_ref().filter(|f| !f.leased) {
            // A record that nobody has leased has no row, except as the loser of a conflict; then the row is older.
            if found.poisoned.is_none() {
                return Ok(Some(Execution::of_record(found.clone(), history)));
            }
        }
        match self.parts.store.get(key, history).await {
            Ok(Some(row)) => Ok(Some(Execution::of_row(row, history))),
            Ok(None) => {
                let found = match first {
                    Some(found) => Some(found),
                    None => self.parts.outbox.find(key).await?,
                };
                Ok(found.map(|f| Execution::of_record(f, history)))
            }
            // The ledger is down: what the outbox knows is true, and better than nothing.
            Err(_) if first.is_some() => Ok(first.map(|f| Execution::of_record(f, history))),
            Err(error) => Err(error.into()),
        }
    }
}

/// Events, newest first; those still in the outbox come before those in the ledger.
#[utoipa::path(
    get, path = "/executions", tag = "executions",
    params(
        ("tenant" = Option<Tenant>, Query, description = "Only this tenant's"),
        ("state" = Option<Phase>, Query, description = "Only in this state"),
        ("workflow" = Option<Workflow>, Query, description = "Only of this workflow"),
        ("since" = Option<Timestamp>, Query, description = "Accepted at this time or later (RFC 3339)"),
        ("until" = Option<Timestamp>, Query, description = "Accepted before this time (RFC 3339)"),
        ("limit" = Option<Limit>, Query, description = "Events in a page; 50 when not given"),
        ("cursor" = Option<String>, Query, description = "`next_cursor` of the former page"),
    ),
    responses((status = 200, description = "One page", body = ExecutionPage))
)]
pub async fn list(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |head, _| async move {
        let asked = bridge.asked(&head, Right::Read).await?;
        let names = ["tenant", "state", "workflow", "since", "until", "limit", "cursor"];
        let asking = Asking::read(&head.uri, &names)?;
        let filter = asked.filter(&asking)?;
        let page = asked.page(filter, asking.text("cursor")).await?;
        Ok(json(StatusCode::OK, &page))
    })
    .await
}

/// Where a list goes on: in the outbox after a sequence, or in the ledger after its own cursor.
pub(super) enum Cursor {
    Outbox(Option<Sequence>),
    Ledger(Option<String>),
}

impl Cursor {
    pub(super) fn read(text: Option<&str>) -> Result<Self, Problem> {
        const BAD: &str = "query parameter cursor: not one of this API's";
        let Some(text) = text else { return Ok(Self::Outbox(None)) };
        let bad = || Problem::malformed(BAD);
        match text.split_at_checked(1).ok_or_else(bad)? {
            ("o", sequence) => Ok(Self::Outbox(Some(Sequence(u64::from_str_radix(sequence, 36).map_err(|_| bad())?)))),
            ("l", "") => Ok(Self::Ledger(None)),
            ("l", cursor) => Ok(Self::Ledger(Some(cursor.to_owned()))),
            _ => Err(bad()),
        }
    }
}

/// Base 36, short and safe in a URL.
fn base36(mut n: u64) -> String {
    let mut digits = Vec::new();
    loop {
        digits.push(char::from_digit((n % 36) as u32, 36).unwrap_or('0'));
        n /= 36;
        if n == 0 {
            return digits.into_iter().rev().collect();
        }
    }
}

impl Asked {
    /// What lists have in common: tenant, workflow, time, page.
    pub(super) fn filter(&self, asking: &Asking) -> Result<Filter, Problem> {
        let tenant = asking.parse::<Tenant>("tenant")?;
        if let Some(tenant) = &tenant {
            self.room.env.tenant(&self.caller, tenant)?;
        }
        let limit = asking.parse("limit")?.unwrap_or(Limit::DEFAULT).0;
        Ok(Filter {
            tenant,
            tenants: self.caller.tenants().map(<[_]>::to_vec),
            states: asking.parse::<Phase>("state")?.into_iter().collect(),
            workflow: asking.parse("workflow")?,
            error_class: asking.parse::<ErrorClass>("error_class")?.map(|class| class.to_string()),
            since: asking.parse("since")?,
            until: asking.parse("until")?,
            cursor: None,
            limit,
        })
    }

    async fn page(&self, filter: Filter, cursor: Option<&str>) -> Result<ExecutionPage, Problem> {
        let limit = filter.limit;
        let mut executions = Vec::new();
        let ledger = match Cursor::read(cursor)? {
            Cursor::Ledger(cursor) => cursor,
            Cursor::Outbox(after) => {
                let wanted = |states: &[Phase]| states.is_empty() || states.contains(&Phase::Accepted);
                if wanted(&filter.states)
                    && let Some(next) = self.waiting(&filter, false, after, &mut executions).await?
                {
                    return Ok(ExecutionPage { executions, next_cursor: Some(next) });
                }
                if executions.len() == limit {
                    return Ok(ExecutionPage { executions, next_cursor: Some("l".into()) });
                }
                None
            }
        };
        let only_outbox = filter.states == [Phase::Accepted];
        if only_outbox {
            return Ok(ExecutionPage { executions, next_cursor: None });
        }
        let page =
            self.room.parts.store.list(Filter { cursor: ledger, limit: limit - executions.len(), ..filter }).await?;
        executions.extend(page.rows.into_iter().map(|row| Execution::of_row(row, false)));
        Ok(ExecutionPage { executions, next_cursor: page.next.map(|next| format!("l{next}")) })
    }

    /// Adds waiting (or poisoned) events of the outbox; the cursor when there are more than fit.
    pub(super) async fn waiting(
        &self,
        filter: &Filter,
        poisoned: bool,
        mut after: Option<Sequence>,
        into: &mut Vec<Execution>,
    ) -> Result<Option<String>, Problem> {
        // A backlog of other tenants is stepped over piece by piece, not for ever in one request.
        const PIECES_MAX: usize = 20;
        for _ in 0..PIECES_MAX {
            let piece = filter.limit;
            let found = self.room.parts.outbox.list(filter.tenant.clone(), poisoned, after, piece).await?;
            let last = found.len() < piece;
            for record in found {
                after = Some(record.sequence);
                let envelope = &record.event.envelope;
                let fits = self.caller.may_use(&envelope.tenant)
                    && filter.workflow.as_ref().is_none_or(|w| envelope.workflow.as_ref() == Some(w))
                    && filter.since.is_none_or(|t| envelope.accepted_at >= t)
                    && filter.until.is_none_or(|t| envelope.accepted_at < t);
                let execution = Execution::of_record(record, false);
                if fits && (filter.states.is_empty() || filter.states.contains(&execution.state)) {
                    into.push(execution);
                    if into.len() == filter.limit {
                        return Ok((!last).then(|| after.map(|s| format!("o{}", base36(s.0)))).flatten());
                    }
                }
            }
            if last {
                return Ok(None);
            }
        }
        Ok(after.map(|s| format!("o{}", base36(s.0))))
    }
}

/// The state after a cancel.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StateNow {
    pub execution_id: ExecutionId,
    pub state: Phase,
}

/// Cancel an event that is not yet delivered.
///
/// Repeating it answers the same. 409 when it is too late.
#[utoipa::path(
    delete, path = "/executions/{id}", tag = "executions",
    params(
        ("id" = ExecutionId, Path, description = "execution_id"),
        ("tenant" = Option<Tenant>, Query, description = "Whose it is; needed where two of the caller's tenants have the id"),
    ),
    responses(
        (status = 200, description = "It is cancelled", body = StateNow),
        (status = 409, description = "It is being delivered, or was"),
    )
)]
pub async fn cancel(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |mut head, _| async move {
        // Who may publish may take back; operators may as well.
        let asked = match bridge.asked(&head, Right::Publish).await {
            Err(problem) if problem.kind == Kind::Forbidden => bridge.asked(&head, Right::Operate).await?,
            asked => asked?,
        };
        let asking = Asking::read(&head.uri, &["tenant"])?;
        let (key, _) = asked.find(id(&mut head).await?, &asking, false).await?;
        let state = asked.room.cancel(&key).await?;
        if state != Phase::Cancelled {
            let detail = format!("the event is {state} and can no longer be cancelled");
            return Err(Problem::new(Kind::Conflict, detail));
        }
        asked.room.parts.finals.notify(&key, state);
        asked.caller.operated("cancel", &key);
        Ok(json(StatusCode::OK, &StateNow { execution_id: key.execution_id, state }))
    })
    .await
}

/// How long a cancel waits for the relay, which holds a record for milliseconds.
const RELAY_WAIT: Duration = Duration::from_secs(2);

impl Room {
    async fn cancel(&self, key: &Key) -> Result<Phase, Problem> {
        let deadline = tokio::time::Instant::now() + RELAY_WAIT;
        loop {
            match self.parts.outbox.cancel(key).await? {
                // After a crash the ledger may have it as well, and the broker even have delivered it: then the ledger decides.
                Cancelled::Done => {
                    let known = self.parts.store.cancel(key).await;
                    return Ok(known.ok().flatten().unwrap_or(Phase::Cancelled));
                }
                Cancelled::Absent => {
                    return self.parts.store.cancel(key).await?.ok_or_else(Problem::no_execution);
                }
                Cancelled::Leased => {
                    // The relay may hold it for as long as the broker is down. Once the ledger has it, the ledger can cancel it.
                    if let Ok(Some(state)) = self.parts.store.cancel(key).await {
                        return Ok(state);
                    }
                    if tokio::time::Instant::now() < deadline {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                    let detail = "the event is on its way to the ledger; try again in a moment";
                    return Err(Problem::new(Kind::LedgerUnavailable, detail));
                }
            }
        }
    }
}

impl Caller {
    /// An operator's act on one event.
    pub(super) fn operated(&self, act: &'static str, key: &Key) {
        let (tenant, id) = (Some(key.tenant.as_str()), Some(key.execution_id));
        events::Operated { account: &self.name, act, tenant, execution_id: id, count: 1 }.emit();
    }
}

/// Wait until an event is final.
///
/// 200 with the event when it is, 202 with the event as it stands when the time is over.
#[utoipa::path(
    get, path = "/executions/{id}/wait", tag = "executions",
    params(
        ("id" = ExecutionId, Path, description = "execution_id"),
        ("tenant" = Option<Tenant>, Query, description = "Whose it is; needed where two of the caller's tenants have the id"),
        ("timeout" = Option<Wait>, Query, description = "`30`, `30s` or `500ms`, at most `bridge.wait_max`; that when not given"),
    ),
    responses(
        (status = 200, description = "It is final", body = Execution),
        (status = 202, description = "Not yet", body = Execution),
    )
)]
pub async fn wait(State(bridge): State<Bridge>, request: Request) -> Response<Body> {
    answer(request, |head, _| async move { bridge.wait(head).await }).await
}

/// How often the ledger is asked beside the notices of this process: in a fleet another appliance may finish the event.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Bridge {
    async fn wait(&self, mut head: Head) -> Result<Response<Body>, Problem> {
        let asked = self.asked(&head, Right::Read).await?;
        let asking = Asking::read(&head.uri, &["tenant", "timeout"])?;
        let timeout = timeout(asking.parse("timeout")?, &asked.live)?;
        let deadline = tokio::time::Instant::now() + timeout;
        let (key, mut execution) = asked.find(id(&mut head).await?, &asking, true).await?;
        // Subscribed before the look that decides, so that no end falls between the two.
        let mut ticket = asked.room.parts.finals.wait(&key);
        let mut noticed = false;
        loop {
            // Collected meanwhile, or the ledger is away for a moment: what was seen last stands.
            if let Ok(Some(now)) = asked.room.look(&key, true).await {
                execution = now;
            }
            if execution.r#final {
                return Ok(json(StatusCode::OK, &execution));
            }
            tokio::select! {
                biased;
                () = self.0.draining.cancelled() => break,
                () = tokio::time::sleep_until(deadline) => break,
                _ = ticket.notice(), if !noticed => noticed = true,
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
        Ok(json(StatusCode::ACCEPTED, &execution))
    }
}

fn timeout(wanted: Option<Wait>, live: &Live) -> Result<Duration, Problem> {
    let max = live.bridge.wait_max;
    match wanted {
        None => Ok(max.0),
        Some(Wait(span)) if span <= max => Ok(span.0),
        Some(_) => Err(Problem::malformed(format!("query parameter timeout: at most {max}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_reads_what_it_prints() {
        for n in [0, 1, 35, 36, u64::MAX] {
            let text = format!("o{}", base36(n));
            assert!(matches!(Cursor::read(Some(&text)), Ok(Cursor::Outbox(Some(Sequence(m)))) if m == n), "{text}");
        }
        assert!(matches!(Cursor::read(Some("labc")), Ok(Cursor::Ledger(Some(c))) if c == "abc"));
        for bad in ["", "x1", "o", "o-", "ä"] {
            assert!(Cursor::read(Some(bad)).is_err(), "{bad}");
        }
    }
}
