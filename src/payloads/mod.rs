//! The payload store and the ledger: one database, SQLite or PostgreSQL. (Contract.)

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes as Body;
use serde::{Deserialize, Serialize};

use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::event::{Envelope, Event, State};
use crate::ids::{BodyHash, Environment, Key, Tenant, Topic, Workflow};

/// What happened to one event of [`Store::admit`].
#[derive(Clone, Debug, PartialEq)]
pub enum Admitted {
    /// Payload and ledger row (`relayed`) are durable now.
    New,
    /// They were there already with the same body: publish the reference again unless `state` is final.
    Same { state: State },
    /// The id belongs to another body: poison the record, with this reason.
    Conflict,
}

/// One row of the ledger.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub envelope: Envelope,
    pub state: State,
    /// Attempts begun so far.
    pub attempts: u32,
    pub crashes: u32,
    /// Not before this time (`deliver_at`, retry wait); `None`: now.
    pub next_at: Option<Timestamp>,
    pub relayed_at: Timestamp,
    pub updated_at: Timestamp,
    pub finished_at: Option<Timestamp>,
    /// Why it is dead, failed or unknown: class and text for people.
    pub error_class: Option<String>,
    pub error: Option<String>,
    /// n8n's execution that is followed, or was.
    pub n8n_execution_id: Option<String>,
    pub message_id: Option<String>,
    pub claim: Option<Claim>,
    pub replays: u32,
    pub body_bytes: u64,
    /// Filled by `get` with `attempts = true`.
    #[serde(default)]
    pub history: Vec<Attempt>,
}

/// The right to work on an event. A later claim has a greater token, and an older token changes nothing any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub owner: String,
    pub token: i64,
    pub until: Timestamp,
}

/// One try.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Attempt {
    pub number: u32,
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    pub duration_ms: Option<u64>,
    /// HTTP status of n8n's answer.
    pub status: Option<u16>,
    /// `timeout`, `connect`, `reset`, `http_4xx`, `http_5xx`, `crashed`, `error`, `cancelled`, `lost` …
    pub error_class: Option<String>,
    pub error: Option<String>,
    pub n8n_execution_id: Option<String>,
    pub message_id: Option<String>,
    /// `traceparent` that this attempt sent: its own span in the event's trace.
    pub traceparent: Option<String>,
}

/// Result of asking for a claim.
#[derive(Clone, Debug)]
pub enum Claimed {
    /// Ours, durably. The row is as it was before (its `state` may be `Delivering` when an earlier owner died: look at
    /// its last attempt before calling again).
    Granted { row: Box<Row>, token: i64 },
    /// Nothing to do: acknowledge the message.
    Final(State),
    /// Somebody else works on it until then.
    Held(Timestamp),
    /// Its time has not come (retry wait, `deliver_at`): acknowledge; the timer publishes it again.
    NotDue(Timestamp),
    /// No such row.
    Unknown,
    /// The row is there with another body hash than the reference says.
    Mismatch,
}

#[derive(Clone, Debug)]
pub struct ClaimRequest {
    pub key: Key,
    pub body_hash: BodyHash,
}

/// A change under a claim. Refused (`false`) when the token is no longer the row's.
#[derive(Clone, Debug)]
pub struct Transition {
    pub key: Key,
    pub token: i64,
    pub change: Change,
}

#[derive(Clone, Debug)]
pub enum Change {
    /// The attempt is about to be made: counts it and writes its row (`Attempt` without an end).
    Begin(Attempt),
    /// The attempt ended, the event goes on to be followed under the same claim (`until` renewed).
    Follow { attempt: Attempt, until: Timestamp },
    /// Final or dead. Ends the claim.
    Finish {
        attempt: Option<Attempt>,
        state: State,
        error_class: Option<String>,
        error: Option<String>,
        n8n_execution_id: Option<String>,
    },
    /// Again at `next_at`. Ends the claim. `crashed` counts into `crashes`.
    Retry {
        attempt: Option<Attempt>,
        next_at: Timestamp,
        crashed: bool,
        error_class: Option<String>,
        error: Option<String>,
    },
    /// Not begun after all (breaker opened, no slot): gives the claim back, counts nothing.
    Release,
    /// Still at it.
    Renew { until: Timestamp },
}

#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// `None`: all that the caller may see, see `tenants`.
    pub tenant: Option<Tenant>,
    pub tenants: Option<Vec<config::routes::Pattern>>,
    pub states: Vec<State>,
    pub workflow: Option<Workflow>,
    pub error_class: Option<String>,
    /// By `accepted_at`, inclusive / exclusive.
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
    /// Opaque, from the former page.
    pub cursor: Option<String>,
    pub limit: usize,
}

#[derive(Clone, Debug)]
pub struct Page {
    /// Newest first.
    pub rows: Vec<Row>,
    pub next: Option<String>,
}

/// What the timer and the sweeper publish again.
#[derive(Clone, Debug)]
pub struct Due {
    pub envelope: Envelope,
    pub attempts: u32,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {doing}: {cause}")]
    Store { doing: &'static str, cause: Arc<str> },
    #[error("the database is not reachable: {0}")]
    Unreachable(Arc<str>),
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// Trying again later can help.
    pub fn is_transient(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    pub kind: &'static str,
    pub reachable: bool,
    pub last_error: Option<String>,
    pub since: Option<Timestamp>,
    pub states: BTreeMap<String, u64>,
}

/// SQLite or PostgreSQL. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    _private: Arc<()>,
}

impl Store {
    /// SQLite: opens, migrates. PostgreSQL: makes the pool and returns at once; the database may come later.
    pub async fn open(
        _config: &config::Payloads,
        _outbox: &config::Outbox,
        _environment: &Environment,
        _clock: Clock,
    ) -> Result<Self, Error> {
        unimplemented!()
    }
    /// One transaction, multi-row inserts. `Content::Done` events become a final row with its one attempt.
    pub async fn admit(&self, _events: Vec<Event>) -> Result<Vec<Admitted>, Error> {
        unimplemented!()
    }
    pub async fn load(&self, _keys: Vec<Key>) -> Result<Vec<Option<Event>>, Error> {
        unimplemented!()
    }
    /// `owner` is this process; a claim that it already holds is not granted twice while it is valid. With `with_body`
    /// the event of each granted row comes along (saves a round trip).
    pub async fn claim(
        &self,
        _owner: &str,
        _requests: Vec<ClaimRequest>,
        _until: Timestamp,
    ) -> Result<Vec<Claimed>, Error> {
        unimplemented!()
    }
    /// One transaction; concurrent callers share it (group commit). Durable when it returns. One answer per transition:
    /// `false` when the token is stale.
    pub async fn apply(&self, _transitions: Vec<Transition>) -> Result<Vec<bool>, Error> {
        unimplemented!()
    }
    /// Rows whose `next_at` has come, marked so that they are returned once per `sweep` window.
    pub async fn due(&self, _limit: usize) -> Result<Vec<Due>, Error> {
        unimplemented!()
    }
    /// Rows that are open, unclaimed (or whose claim ran out), due, and have not moved since `before`: published again.
    pub async fn stale(&self, _before: Timestamp, _limit: usize) -> Result<Vec<Due>, Error> {
        unimplemented!()
    }
    pub async fn set_message_ids(&self, _ids: Vec<(Key, String)>) -> Result<(), Error> {
        unimplemented!()
    }
    pub async fn get(&self, _key: &Key, _history: bool) -> Result<Option<Row>, Error> {
        unimplemented!()
    }
    pub async fn list(&self, _filter: Filter) -> Result<Page, Error> {
        unimplemented!()
    }
    pub async fn count(&self, _filter: Filter) -> Result<u64, Error> {
        unimplemented!()
    }
    /// `relayed` and not under a valid claim → `cancelled`. Answers the state it found or made; `None`: no such row.
    pub async fn cancel(&self, _key: &Key) -> Result<Option<State>, Error> {
        unimplemented!()
    }
    /// `dead` → `relayed`, attempts from zero, due now (the timer publishes it). `None`: no such row; `Some(false)`: not dead.
    pub async fn replay(&self, _key: &Key) -> Result<Option<bool>, Error> {
        unimplemented!()
    }
    /// `dead` → `cancelled`.
    pub async fn discard(&self, _key: &Key) -> Result<Option<bool>, Error> {
        unimplemented!()
    }
    /// Ends an event that an external consumer worked on. `None`: no such row; `Some(state)`: its state now.
    pub async fn finish_external(
        &self,
        _key: &Key,
        _state: State,
        _attempt: Attempt,
        _error: Option<String>,
    ) -> Result<Option<State>, Error> {
        unimplemented!()
    }
    /// Dead letters that never had a row of their own (forged, unknown): kept with reason and raw reference for `dead-letters`.
    pub async fn reject(&self, _topic: &Topic, _message_id: &str, _reason: &str, _raw: &[u8]) -> Result<(), Error> {
        unimplemented!()
    }
    pub async fn rejected(&self, _limit: usize) -> Result<Vec<Rejected>, Error> {
        unimplemented!()
    }
    /// Deletes payloads and rows past their age, at most `limit` of each; never of events that are not complete.
    pub async fn collect(&self, _limit: usize) -> Result<Collected, Error> {
        unimplemented!()
    }
    pub async fn status(&self) -> Status {
        unimplemented!()
    }
    pub async fn close(&self) {
        unimplemented!()
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct Rejected {
    pub at: Timestamp,
    pub topic: Topic,
    pub message_id: String,
    pub reason: String,
    pub raw: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    pub payloads: u64,
    pub rows: u64,
}

/// Keeps `Body` in the signature of `Event` honest.
pub type _Body = Body;
