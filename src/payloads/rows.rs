//! What goes into both databases, made ready before any transaction is open: serialised, sealed, numbered.
//!
//! Pure: no database here. Sealing and JSON happen on the caller's thread, so the writer's transaction stays short.

use bytes::Bytes as Body;
use uuid::Uuid;

use super::codec::{self, Codec, Columns, frame};
use super::{Attempt, Change, Claimed, Error, Take, Transition};
use crate::clock::Timestamp;
use crate::event::{Content, Envelope, Event, State};
use crate::ids::Key;

/// A ledger row with its payload, to insert.
pub(super) struct NewRow {
    pub id: Uuid,
    pub tenant: String,
    pub body_hash: [u8; 32],
    pub body_bytes: i64,
    pub workflow: Option<String>,
    pub accepted_at: i64,
    pub deliver_at: Option<i64>,
    pub state: i16,
    pub phase: i16,
    pub envelope: Vec<u8>,
    pub body: Body,
    pub sealed: i16,
    /// Of a call that was already made.
    pub finished_at: Option<i64>,
    pub history: Option<Vec<u8>>,
    pub error_class: Option<String>,
    pub error: Option<Vec<u8>>,
    pub n8n_execution_id: Option<String>,
}

impl NewRow {
    pub fn new(codec: &Codec, event: &Event) -> Result<Self, Error> {
        let (envelope, key) = (&event.envelope, event.key());
        let (body, sealed) = codec.body_in(&key, &event.body)?;
        let mut row = Self {
            id: key.execution_id.0,
            tenant: key.tenant.as_str().to_owned(),
            body_hash: envelope.body_hash.0,
            body_bytes: event.body.len() as i64,
            workflow: envelope.workflow.as_ref().map(|w| w.as_str().to_owned()),
            accepted_at: envelope.accepted_at.0,
            deliver_at: envelope.deliver_at.map(|t| t.0),
            state: codec::state_code(State::Relayed),
            phase: codec::OPEN,
            envelope: codec.envelope_in(envelope)?,
            body,
            sealed,
            finished_at: None,
            history: None,
            error_class: None,
            error: None,
            n8n_execution_id: None,
        };
        if let Content::Done { state, status, started_at, duration_ms, error, n8n_execution_id } = &envelope.content {
            // Whatever it says, the call is over: an open state would wait for a delivery that never comes.
            let state = if state.is_final() { *state } else { State::Unknown };
            if let Some(attempt) = Attempt::of_call(envelope) {
                row.history = Some(frame(1, &codec.attempt_in(&key, &attempt)?));
            }
            row.error = codec.error_in(&key, error.as_deref())?;
            row.error_class = call_error_class(*status, error.as_deref());
            row.n8n_execution_id = n8n_execution_id.clone().map(clean);
            row.finished_at = Some(started_at.0.saturating_add_unsigned(*duration_ms));
            row.state = codec::state_code(state);
            row.phase = codec::phase_of(state, 0, 0).0;
            row.deliver_at = None;
        }
        Ok(row)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub(super) enum Op {
    Begin = 0,
    Follow = 1,
    Finish = 2,
    Retry = 3,
    Release = 4,
    Renew = 5,
}

/// A [`Transition`], ready for the database.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub id: Uuid,
    pub tenant: String,
    pub token: i64,
    pub op: Op,
    /// Of `Finish`.
    pub state: i16,
    /// Of the attempt; 0: the row's count.
    pub number: u32,
    /// The attempt's frame without its number.
    pub tail: Option<Vec<u8>>,
    pub begun_at: i64,
    /// `until` or `next_at`, by the caller's clock.
    pub at: Option<i64>,
    pub crashed: bool,
    pub error_class: Option<String>,
    pub error: Option<Vec<u8>>,
    pub n8n_execution_id: Option<String>,
    pub message_id: Option<String>,
}

impl Step {
    pub fn new(codec: &Codec, transition: Transition) -> Result<Self, Error> {
        let Transition { key, token, change } = transition;
        let mut step = Self {
            id: key.execution_id.0,
            tenant: key.tenant.as_str().to_owned(),
            token,
            op: Op::Renew,
            state: 0,
            number: 0,
            tail: None,
            begun_at: 0,
            at: None,
            crashed: false,
            error_class: None,
            error: None,
            n8n_execution_id: None,
            message_id: None,
        };
        match change {
            Change::Begin(attempt) => {
                step.op = Op::Begin;
                step.begun_at = attempt.started_at.0;
                step.attempt(codec, &key, attempt)?;
            }
            Change::Follow { attempt, until } => {
                step.op = Op::Follow;
                step.at = Some(until.0);
                step.attempt(codec, &key, attempt)?;
            }
            Change::Finish { attempt, state, error_class, error, n8n_execution_id } => {
                if !state.is_final() {
                    return Err(Error::Refused(format!("an event cannot finish as {state}")));
                }
                step.op = Op::Finish;
                step.state = codec::state_code(state);
                if let Some(attempt) = attempt {
                    step.attempt(codec, &key, attempt)?;
                }
                step.error = codec.error_in(&key, error.as_deref())?;
                step.error_class = error_class.map(clean);
                step.n8n_execution_id = n8n_execution_id.map(clean).or(step.n8n_execution_id);
            }
            Change::Retry { attempt, next_at, crashed, error_class, error } => {
                step.op = Op::Retry;
                step.at = Some(next_at.0);
                step.crashed = crashed;
                if let Some(attempt) = attempt {
                    step.attempt(codec, &key, attempt)?;
                }
                step.error = codec.error_in(&key, error.as_deref())?;
                step.error_class = error_class.map(clean);
            }
            Change::Release => step.op = Op::Release,
            Change::Renew { until } => step.at = Some(until.0),
        }
        Ok(step)
    }

    fn attempt(&mut self, codec: &Codec, key: &Key, attempt: Attempt) -> Result<(), Error> {
        self.tail = Some(codec.attempt_in(key, &attempt)?);
        self.number = attempt.number;
        self.n8n_execution_id = attempt.n8n_execution_id.map(clean);
        self.message_id = attempt.message_id.map(clean);
        Ok(())
    }

    /// The caller repeats what an earlier, unanswered call had done already: the claim ended by this very step.
    pub fn was_applied(&self, state: i16, token: i64, claim_until: Option<i64>) -> bool {
        token == self.token
            && claim_until.is_none()
            && match self.op {
                Op::Finish => state == self.state,
                Op::Retry => state == codec::state_code(State::Relayed),
                Op::Release => state <= codec::state_code(State::Delivering),
                Op::Begin | Op::Follow | Op::Renew => false,
            }
    }
}

/// A [`Take`], ready for the database.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub key: Key,
    pub body_hash: [u8; 32],
    pub owner: String,
    pub until: i64,
    /// The attempt's frame without its number, and when it starts.
    pub begin: Option<(Vec<u8>, i64)>,
    pub message_id: Option<String>,
    pub with_body: bool,
}

impl Ask {
    pub fn new(codec: &Codec, owner: &str, until: Timestamp, take: Take, with_body: bool) -> Result<Self, Error> {
        let Take { request, begin } = take;
        let message_id = begin.as_ref().and_then(|a| a.message_id.clone()).map(clean);
        let begin = match begin {
            Some(attempt) => Some((codec.attempt_in(&request.key, &attempt)?, attempt.started_at.0)),
            None => None,
        };
        let (owner, until) = (owner.to_owned(), until.0);
        Ok(Self { key: request.key, body_hash: request.body_hash.0, owner, until, begin, message_id, with_body })
    }
}

/// What became of an [`Ask`].
pub(super) enum Answer {
    Granted {
        columns: Box<Columns>,
        begun: bool,
        /// Body and whether it is sealed.
        body: Option<RawBody>,
    },
    Other(Claimed),
}

/// PostgreSQL's text takes every character but NUL, and one of those would hold up a whole batch.
pub(super) fn clean(text: String) -> String {
    if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text }
}

/// Why a row cannot be claimed now; `None`: it can.
pub(super) fn obstacle(state: State, claim_until: Option<i64>, next_at: Option<i64>, now: i64) -> Option<Claimed> {
    if state.is_final() {
        return Some(Claimed::Final(state));
    }
    if let Some(until) = claim_until.filter(|until| *until > now) {
        return Some(Claimed::Held(Timestamp(until)));
    }
    next_at.filter(|at| *at > now).map(|at| Claimed::NotDue(Timestamp(at)))
}

/// The timer publishes a row again when it was not claimed within this. The wait doubles with the row's lateness, so that
/// a long backlog in the broker is not multiplied by it.
pub(super) const TIMER_AGAIN_MS: i64 = 60_000;

/// Dead letters without a row that are kept. Beyond it somebody floods us; the broker keeps the rest.
pub(super) const REJECTED_MAX: u64 = 100_000;

/// Of a rejected message's raw reference. Ours are below 2 KiB.
pub(super) const REJECTED_BYTES_MAX: usize = 64 << 10;

/// A body as it lies in the store, and whether it is sealed.
pub(super) type RawBody = (Vec<u8>, i16);

/// An event as it lies in the store.
pub(super) struct Stored {
    pub envelope: Vec<u8>,
    pub body: Option<Vec<u8>>,
    pub sealed: i16,
}

pub(super) struct RejectedRow {
    pub at: i64,
    pub topic: String,
    pub message_id: String,
    pub reason: String,
    pub raw: Vec<u8>,
}

fn call_error_class(status: Option<u16>, error: Option<&str>) -> Option<String> {
    match (status, error) {
        (Some(status), _) if status >= 400 => Some(format!("http_{}xx", status / 100)),
        (_, Some(_)) => Some("error".to_owned()),
        _ => None,
    }
}

impl Attempt {
    /// The one attempt of a call that was already made ([`Content::Done`]). What was cancelled before anybody tried has none.
    pub fn of_call(envelope: &Envelope) -> Option<Self> {
        match &envelope.content {
            Content::Done { state: State::Cancelled, .. } | Content::Json | Content::Request { .. } => None,
            Content::Done { status, started_at, duration_ms, error, n8n_execution_id, .. } => Some(Self {
                number: 1,
                started_at: *started_at,
                duration_ms: Some(*duration_ms),
                status: *status,
                error_class: call_error_class(*status, error.as_deref()),
                error: error.clone(),
                n8n_execution_id: n8n_execution_id.clone(),
                message_id: None,
                traceparent: envelope.traceparent.clone(),
            }),
        }
    }
}
