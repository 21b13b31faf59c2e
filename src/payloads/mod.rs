//! The payload store and the ledger: one database, SQLite or PostgreSQL.
//!
//! relay, delivery, `bridge` → **`payloads`** → SQLite file | PostgreSQL schema. Behind the outbox the ledger is the truth:
//! what it says about an event is what happened to it.
//!
//! # Invariants
//! 1. [`admit`](Store::admit) makes payload and row durable together, or neither. Same id with the same body is the same
//!    event; with another body it is a conflict and changes nothing. Two tenants with one id are two events.
//! 2. Of any number of callers that ask for a claim at once, at most one gets it. A claim that ran out goes to the next
//!    caller, with a greater token.
//! 3. A transition under a token that is not the row's newest, or whose claim has ended, changes nothing and answers
//!    `false` – except that repeating a step which already ended this claim answers `true` (its first answer was lost).
//! 4. Whatever answers `Ok` is on disk. An error means: unknown, repeat it.
//! 5. [`collect`](Store::collect) takes payloads only of complete events, and only after their age; rows only after their
//!    payloads. A dead letter keeps both until it is replayed or discarded.
//! 6. A list goes on behind its cursor whatever is inserted in between: no row twice, none left out.
//!
//! `tests.rs` proves them against SQLite, `tests/real` the same file against PostgreSQL.
//!
//! # Clocks
//! SQLite: the appliance's. PostgreSQL: **the database's**, for claims, waits and ages, because the appliances of a fleet
//! have clocks of their own; a time that a caller computed (`until`, `next_at`) is taken as a distance from the
//! caller's now. `deliver_at` was asked for by wall time and stays as it is.
//!
//! # Layout
//! `appliance/migrations/`: `events` (narrow, moves), `contents` (envelope and body, never change), `rejected`.
//! What stands in the binary columns: [`codec`].
//!
//! # Failure
//! Everything but [`Error::Refused`] is worth another try; [`Error::Unusable`] only after an operator did something, and no
//! event is to blame for it. A row that cannot be read any more becomes a dead letter of its own with class `damaged`; its
//! neighbours go on. A wrong encryption key, and a database of another environment, are found before anything is written.

mod codec;
mod group;
mod postgres;
mod query;
mod rows;
mod sqlite;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes as Body;
use serde::{Deserialize, Serialize};
use tokio_util::task::TaskTracker;

use self::codec::{Codec, Columns, Unreadable};
use self::postgres::Postgres;
use self::query::Dialect;
use self::rows::{Answer, Ask, NewRow, RawBody, RejectedRow, Step, Stored};
use self::sqlite::Sqlite;
use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::event::{Envelope, Event, State};
use crate::ids::{BodyHash, Environment, Key, Tenant, Topic, Workflow};
use crate::observe::payloads as observe;
use crate::seal::Seal;
use crate::units::Span;

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

/// A claim to ask for, and the attempt to begin with it.
#[derive(Clone, Debug)]
pub struct Take {
    pub request: ClaimRequest,
    /// Begun in the same transaction, unless an earlier owner left an attempt open (`Delivering`). Its number is counted
    /// by the store.
    pub begin: Option<Attempt>,
}

/// What came of a [`Take`].
#[derive(Clone, Debug)]
pub struct Taken {
    /// A granted row shows what it is now: with `begun`, `Delivering`, its attempt counted and last in `history`.
    pub claimed: Claimed,
    /// The attempt is on the row, durably: make it. `false` with a granted claim: look at the last attempt of `history`,
    /// which an earlier owner left open, then `Change::Begin`.
    pub begun: bool,
    /// The body of a granted row.
    pub body: Option<Body>,
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
    /// The database as a whole cannot be used as it is: commits that can be lost, a newer release's tables, another
    /// environment's, a damaged file, a wrong key. Only an operator can change that, and whatever is asked for waits.
    #[error("{0}")]
    Unusable(String),
    /// What was asked for can never be done; its own fault.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// The same call can work later, if need be after an operator did something.
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
    shared: Arc<Shared>,
    backend: Backend,
}

#[derive(Clone)]
enum Backend {
    Sqlite(Arc<Sqlite>),
    Postgres(Arc<Postgres>),
}

/// What both databases need to know.
struct Shared {
    environment: Environment,
    clock: Clock,
    codec: Codec,
    payload_age_max: Span,
    ledger_age_max: Span,
    kind: &'static str,
    health: Mutex<Health>,
    counts: tokio::sync::Mutex<Option<Counts>>,
    counting: TaskTracker,
}

#[derive(Default)]
struct Health {
    reachable: Option<bool>,
    since: Option<Timestamp>,
    last_error: Option<String>,
    /// A write failed (a full disk, say): reads that work do not make up for it, the next write that works does.
    held: bool,
}

/// What has to work for the appliance to do its work.
const WRITES: [&str; 3] = ["admit", "claim", "apply"];

/// Rows by state, as they were a moment ago.
#[derive(Clone)]
struct Counts {
    at: Instant,
    took: Duration,
    /// `None`: they could not be counted.
    states: Option<BTreeMap<String, u64>>,
}

/// Counting reads the whole ledger: not more often than this, and never more than a twentieth of the time.
const COUNTS_AGE_MIN: Duration = Duration::from_secs(2);
const COUNTS_SHARE: u32 = 20;
/// Status has to answer even when counting takes longer.
const COUNTS_WAIT: Duration = Duration::from_secs(2);

impl Shared {
    /// Passes `result` on, after telling metrics and health about it.
    fn note<T>(&self, doing: &'static str, items: usize, start: Instant, result: Result<T, Error>) -> Result<T, Error> {
        let environment = &self.environment;
        match &result {
            Ok(_) => observe::Done { environment, doing, items, took: start.elapsed() }.emit(),
            Err(error) => observe::Failed { environment, doing, cause: &error.to_string() }.emit(),
        }
        let writes = WRITES.contains(&doing);
        let mut health = self.health.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let cause = match &result {
            Ok(_) if health.held && !writes => return result,
            Ok(_) => None,
            Err(error) => {
                let cause = error.to_string();
                health.last_error = Some(cause.clone());
                match error {
                    Error::Store { .. } | Error::Unusable(_) if writes => health.held = true,
                    Error::Unreachable(_) | Error::Unusable(_) => {}
                    // One call's affair.
                    Error::Store { .. } | Error::Refused(_) => return result,
                }
                Some(cause)
            }
        };
        if cause.is_none() {
            health.held = false;
        }
        if health.reachable != Some(cause.is_none()) {
            health.reachable = Some(cause.is_none());
            health.since = Some(self.clock.now());
            observe::Reachable { environment, kind: self.kind, cause: cause.as_deref() }.emit();
        }
        result
    }
}

/// The migrations that the binary carries, oldest first.
fn migrations(files: &[(&str, &str)]) -> Result<Vec<refinery::Migration>, Error> {
    let read = |(name, sql): &(&str, &str)| refinery::Migration::unapplied(name, sql);
    files
        .iter()
        .map(read)
        .collect::<Result<_, _>>()
        .map_err(|error| Error::Unusable(format!("cannot read a migration: {error}")))
}

fn check_format(oldest_reader: i64, ours: i64) -> Result<(), Error> {
    if oldest_reader <= ours {
        return Ok(());
    }
    Err(Error::Unusable(format!(
        "the payload store was finalized by a newer release (it needs {oldest_reader}, this one reads {ours}): install that release"
    )))
}

/// The rows do not say their environment: the database as a whole belongs to the one that used it first.
fn check_environment(owner: Option<&str>, ours: &Environment) -> Result<(), Error> {
    match owner {
        Some(owner) if owner != ours.as_str() => Err(Error::Unusable(format!(
            "the payload store belongs to environment {owner}, and this is {ours}: give it a schema or file of its own \
             ([environments.{ours}.payloads])"
        ))),
        _ => Ok(()),
    }
}

/// The newest event, to see whether our key is the one it was sealed with.
const NEWEST: &str = "SELECT e.id, e.tenant, c.envelope FROM events e JOIN contents c ON c.seq = e.seq \
    ORDER BY e.accepted_at DESC, e.seq DESC LIMIT 1";

impl Store {
    /// SQLite: opens, migrates. PostgreSQL: makes the pool and returns at once; the database may come later.
    ///
    /// # Errors
    /// [`Error::Unusable`] for a wrong key, a damaged file, a newer format or another environment's file; otherwise why the
    /// file cannot be opened. What is wrong with a PostgreSQL is told by the calls that need it.
    pub async fn open(
        config: &config::Payloads,
        outbox: &config::Outbox,
        environment: &Environment,
        clock: Clock,
    ) -> Result<Self, Error> {
        let seal = match &outbox.encryption_key {
            Some(key) => {
                Some(Seal::new(key).map_err(|error| Error::Unusable(format!("outbox.encryption_key: {error}")))?)
            }
            None => None,
        };
        let shared = Arc::new(Shared {
            environment: environment.clone(),
            clock,
            codec: Codec::new(seal),
            payload_age_max: config.payload_age_max,
            ledger_age_max: config.ledger_age_max,
            kind: match &config.store {
                config::payloads::PayloadStore::Sqlite { .. } => "sqlite",
                config::payloads::PayloadStore::Postgres(_) => "postgres",
            },
            health: Mutex::default(),
            counts: tokio::sync::Mutex::default(),
            counting: TaskTracker::new(),
        });
        let backend = match &config.store {
            config::payloads::PayloadStore::Sqlite { file } => {
                let (start, file, inner) = (Instant::now(), file.clone(), shared.clone());
                let opened =
                    tokio::task::spawn_blocking(move || Sqlite::open(&file, inner)).await.unwrap_or_else(|error| {
                        Err(Error::Store { doing: "open the payload store", cause: error.to_string().into() })
                    });
                Backend::Sqlite(Arc::new(shared.note("open the payload store", 1, start, opened)?))
            }
            config::payloads::PayloadStore::Postgres(postgres) => {
                Backend::Postgres(Arc::new(Postgres::open(postgres, shared.clone())?))
            }
        };
        Ok(Self { shared, backend })
    }

    /// One transaction, multi-row inserts. `Content::Done` events become a final row with its one attempt.
    pub async fn admit(&self, events: Vec<Event>) -> Result<Vec<Admitted>, Error> {
        let (start, items) = (Instant::now(), events.len());
        if events.is_empty() {
            return Ok(Vec::new());
        }
        let codec = &self.shared.codec;
        let rows = Arc::new(events.iter().map(|event| NewRow::new(codec, event)).collect::<Result<Vec<_>, _>>()?);
        drop(events);
        let result = match &self.backend {
            Backend::Sqlite(db) => db.admit(rows).await,
            Backend::Postgres(db) => db.admit(rows).await,
        };
        self.shared.note("admit", items, start, result)
    }

    /// `None`: no such event, its payload was collected, or it cannot be read any more (which is logged).
    pub async fn load(&self, keys: Vec<Key>) -> Result<Vec<Option<Event>>, Error> {
        let (start, items) = (Instant::now(), keys.len());
        let result = match &self.backend {
            Backend::Sqlite(db) => db.load(keys.clone()).await,
            Backend::Postgres(db) => db.load(&keys).await,
        };
        let found = self.shared.note("load", items, start, result)?;
        keys.iter().zip(found).map(|(key, stored)| stored.map_or(Ok(None), |stored| self.event(key, stored))).collect()
    }

    fn event(&self, key: &Key, stored: Stored) -> Result<Option<Event>, Error> {
        let Some(body) = stored.body else { return Ok(None) };
        let codec = &self.shared.codec;
        let read = || -> Result<Event, Unreadable> {
            let envelope = codec.envelope_out(key.tenant.as_str(), key.execution_id.0, &stored.envelope)?;
            Ok(Event { envelope, body: codec.body_out(key, body, stored.sealed)? })
        };
        self.readable(key, read())
    }

    /// Damage is this row's own affair; a wrong key is everybody's.
    fn readable<T>(&self, key: &Key, read: Result<T, Unreadable>) -> Result<Option<T>, Error> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(Unreadable::Damaged(cause)) => {
                observe::Damaged { environment: &self.shared.environment, key: key.to_string(), cause }.emit();
                Ok(None)
            }
            Err(key) => Err(key.into()),
        }
    }

    /// `owner` is this process (unique per start); a claim that it already holds is not granted twice while it is valid.
    pub async fn claim(
        &self,
        owner: &str,
        requests: Vec<ClaimRequest>,
        until: Timestamp,
    ) -> Result<Vec<Claimed>, Error> {
        let takes = requests.into_iter().map(|request| Take { request, begin: None }).collect();
        Ok(self.take(owner, takes, until, false).await?.into_iter().map(|taken| taken.claimed).collect())
    }

    /// Claims, begins and loads in one transaction: what delivery does for almost every event.
    pub async fn claim_and_begin(&self, owner: &str, takes: Vec<Take>, until: Timestamp) -> Result<Vec<Taken>, Error> {
        self.take(owner, takes, until, true).await
    }

    async fn take(
        &self,
        owner: &str,
        takes: Vec<Take>,
        until: Timestamp,
        with_body: bool,
    ) -> Result<Vec<Taken>, Error> {
        let (start, items) = (Instant::now(), takes.len());
        if takes.is_empty() {
            return Ok(Vec::new());
        }
        let keys: Vec<_> = takes.iter().map(|take| take.request.key.clone()).collect();
        let codec = &self.shared.codec;
        let asks = takes
            .into_iter()
            .map(|take| Ask::new(codec, owner, until, take, with_body))
            .collect::<Result<Vec<_>, _>>()?;
        let result = match &self.backend {
            Backend::Sqlite(db) => db.claim(asks).await,
            Backend::Postgres(db) => db.claim(asks).await,
        };
        let answers = self.shared.note("claim", items, start, result)?;
        let mut all = Vec::with_capacity(items);
        for (key, answer) in keys.iter().zip(answers) {
            all.push(match answer {
                Answer::Other(claimed) => Taken { claimed, begun: false, body: None },
                Answer::Granted { columns, begun, body } => {
                    let token = columns.token;
                    match self.granted(key, *columns, begun, body, with_body)? {
                        Some(taken) => taken,
                        None => self.bury(key, token).await?,
                    }
                }
            });
        }
        Ok(all)
    }

    fn granted(
        &self,
        key: &Key,
        columns: Columns,
        begun: bool,
        body: Option<RawBody>,
        with_body: bool,
    ) -> Result<Option<Taken>, Error> {
        let codec = &self.shared.codec;
        let read = || -> Result<Taken, Unreadable> {
            let token = columns.token;
            let row = codec.row(columns, false)?;
            let body = match body {
                Some((body, sealed)) => Some(codec.body_out(key, body, sealed)?),
                None if with_body => return Err(Unreadable::Damaged("its payload is gone")),
                None => None,
            };
            Ok(Taken { claimed: Claimed::Granted { row: Box::new(row), token }, begun, body })
        };
        self.readable(key, read())
    }

    /// A row that cannot be read is a dead letter: its message would come again for ever.
    async fn bury(&self, key: &Key, token: i64) -> Result<Taken, Error> {
        let change = Change::Finish {
            attempt: None,
            state: State::Dead,
            error_class: Some("damaged".into()),
            error: Some("the row or its payload cannot be read any more".into()),
            n8n_execution_id: None,
        };
        self.apply(vec![Transition { key: key.clone(), token, change }]).await?;
        Ok(Taken { claimed: Claimed::Final(State::Dead), begun: false, body: None })
    }

    /// One transaction; concurrent callers share it (group commit). Durable when it returns. One answer per transition:
    /// `false` when the token is stale.
    pub async fn apply(&self, transitions: Vec<Transition>) -> Result<Vec<bool>, Error> {
        let (start, items) = (Instant::now(), transitions.len());
        if transitions.is_empty() {
            return Ok(Vec::new());
        }
        let codec = &self.shared.codec;
        let steps = transitions.into_iter().map(|t| Step::new(codec, t)).collect::<Result<Vec<_>, _>>()?;
        let result = match &self.backend {
            Backend::Sqlite(db) => db.apply(steps).await,
            Backend::Postgres(db) => db.apply(steps).await,
        };
        self.shared.note("apply", items, start, result)
    }

    /// Rows whose `next_at` has come, at most `limit`, each marked so that it comes again only after a minute, and ever later
    /// the later it is. Two appliances never get the same row.
    pub async fn due(&self, limit: usize) -> Result<Vec<Due>, Error> {
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.due(limit).await,
            Backend::Postgres(db) => db.due(limit).await,
        };
        let found = self.shared.note("due", 0, start, result)?;
        self.dues(found)
    }

    /// Rows that are open, unclaimed (or whose claim ran out), due, and neither moved nor were published since `before`
    /// (by our clock); they count as published now.
    pub async fn stale(&self, before: Timestamp, limit: usize) -> Result<Vec<Due>, Error> {
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.stale(before.0, limit).await,
            Backend::Postgres(db) => db.stale(before.0, limit).await,
        };
        let found = self.shared.note("stale", 0, start, result)?;
        self.dues(found)
    }

    fn dues(&self, found: Vec<Columns>) -> Result<Vec<Due>, Error> {
        let mut dues = Vec::with_capacity(found.len());
        for columns in found {
            let envelope = self.shared.codec.envelope_out(&columns.tenant, columns.id, &columns.envelope);
            match envelope {
                Ok(envelope) => dues.push(Due { envelope, attempts: columns.attempts.max(0) as u32 }),
                Err(Unreadable::Damaged(cause)) => {
                    let key = format!("{}/{}", columns.tenant, columns.id);
                    observe::Damaged { environment: &self.shared.environment, key, cause }.emit();
                }
                Err(key) => return Err(key.into()),
            }
        }
        Ok(dues)
    }

    /// Not needed for events whose attempts carry their message id: the row takes it from there.
    pub async fn set_message_ids(&self, ids: Vec<(Key, String)>) -> Result<(), Error> {
        let (start, items) = (Instant::now(), ids.len());
        if ids.is_empty() {
            return Ok(());
        }
        let result = match &self.backend {
            Backend::Sqlite(db) => db.set_message_ids(ids).await,
            Backend::Postgres(db) => db.set_message_ids(ids).await,
        };
        self.shared.note("message_ids", items, start, result)
    }

    pub async fn get(&self, key: &Key, history: bool) -> Result<Option<Row>, Error> {
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.get(key.clone()).await,
            Backend::Postgres(db) => db.get(key).await,
        };
        match self.shared.note("get", 1, start, result)? {
            None => Ok(None),
            Some(columns) => Ok(Some(self.shared.codec.row(columns, history)?)),
        }
    }

    /// At most 1,000 rows a page. A row that cannot be read is left out, and logged.
    pub async fn list(&self, filter: Filter) -> Result<Page, Error> {
        let start = Instant::now();
        let (query, limit) = query::list(self.dialect(), &filter)?;
        let result = match &self.backend {
            Backend::Sqlite(db) => db.list(query).await,
            Backend::Postgres(db) => db.list(query).await,
        };
        let mut found = self.shared.note("list", 1, start, result)?;
        let more = found.len() > limit;
        found.truncate(limit);
        let next = found.last().filter(|_| more).map(|last| codec::cursor_in(last.accepted_at, last.seq));
        let mut rows = Vec::with_capacity(found.len());
        for mut columns in found {
            let (key, _) = (format!("{}/{}", columns.tenant, columns.id), columns.current.take());
            match self.shared.codec.row(columns, false) {
                Ok(row) => rows.push(row),
                Err(Unreadable::Damaged(cause)) => {
                    observe::Damaged { environment: &self.shared.environment, key, cause }.emit();
                }
                Err(wrong_key) => return Err(wrong_key.into()),
            }
        }
        Ok(Page { rows, next })
    }

    /// Rows that `filter` matches, whatever its cursor and limit.
    pub async fn count(&self, filter: Filter) -> Result<u64, Error> {
        let start = Instant::now();
        let query = query::count(self.dialect(), &filter);
        let result = match &self.backend {
            Backend::Sqlite(db) => db.count(query).await,
            Backend::Postgres(db) => db.count(query).await,
        };
        self.shared.note("count", 1, start, result)
    }

    fn dialect(&self) -> Dialect {
        match &self.backend {
            Backend::Sqlite(_) => Dialect::Sqlite,
            Backend::Postgres(_) => Dialect::Postgres,
        }
    }

    /// `relayed` and not under a valid claim → `cancelled`. Answers the state it found or made; `None`: no such row.
    pub async fn cancel(&self, key: &Key) -> Result<Option<State>, Error> {
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.cancel(key.clone()).await,
            Backend::Postgres(db) => db.cancel(key).await,
        };
        self.shared.note("cancel", 1, start, result)
    }

    /// `dead` → `relayed`, attempts from zero, due now (the timer publishes it). `None`: no such row; `Some(false)`: not dead.
    pub async fn replay(&self, key: &Key) -> Result<Option<bool>, Error> {
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.replay(key.clone()).await,
            Backend::Postgres(db) => db.replay(key).await,
        };
        self.shared.note("replay", 1, start, result)
    }

    /// `dead` → `cancelled`.
    pub async fn discard(&self, key: &Key) -> Result<Option<bool>, Error> {
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.discard(key.clone()).await,
            Backend::Postgres(db) => db.discard(key).await,
        };
        self.shared.note("discard", 1, start, result)
    }

    /// Ends an event that an external consumer worked on, whoever holds a claim. `None`: no such row; `Some(state)`: its
    /// state now, which is not `state` when it had ended before.
    pub async fn finish_external(
        &self,
        key: &Key,
        state: State,
        attempt: Attempt,
        error: Option<String>,
    ) -> Result<Option<State>, Error> {
        let start = Instant::now();
        let (error_class, n8n_execution_id) = (attempt.error_class.clone(), attempt.n8n_execution_id.clone());
        let change = Change::Finish { attempt: Some(attempt), state, error_class, error, n8n_execution_id };
        let step = Step::new(&self.shared.codec, Transition { key: key.clone(), token: 0, change })?;
        let result = match &self.backend {
            Backend::Sqlite(db) => db.finish_external(key.clone(), step).await,
            Backend::Postgres(db) => db.finish_external(key, step).await,
        };
        self.shared.note("finish_external", 1, start, result)
    }

    /// Dead letters that never had a row of their own (forged, unknown): kept with reason and raw reference for
    /// `dead-letters`, each message once, until `ledger_age_max`. Of a raw reference the first 64 KiB are kept.
    ///
    /// # Errors
    /// [`Error::Refused`] when 100,000 are kept already: nothing is evicted, the broker keeps the message.
    pub async fn reject(&self, topic: &Topic, message_id: &str, reason: &str, raw: &[u8]) -> Result<(), Error> {
        let start = Instant::now();
        let environment = &self.shared.environment;
        let rejected = Rejected {
            at: self.shared.clock.now(),
            topic: topic.clone(),
            message_id: rows::clean(message_id.to_owned()),
            reason: rows::clean(reason.to_owned()),
            raw: String::new(),
        };
        let kept = raw[..raw.len().min(rows::REJECTED_BYTES_MAX)].to_vec();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.reject(rejected, kept).await,
            Backend::Postgres(db) => db.reject(rejected, kept).await,
        };
        if self.shared.note("reject", 1, start, result)? {
            observe::Rejected { environment, topic: topic.as_str(), message_id, reason }.emit();
            return Ok(());
        }
        observe::RejectedFull { environment, kept_max: rows::REJECTED_MAX }.emit();
        Err(Error::Refused(format!("{} rejected messages are kept already", rows::REJECTED_MAX)))
    }

    /// Newest first.
    pub async fn rejected(&self, limit: usize) -> Result<Vec<Rejected>, Error> {
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.rejected(limit).await,
            Backend::Postgres(db) => db.rejected(limit).await,
        };
        let found = self.shared.note("rejected", 1, start, result)?;
        let shown = |row: RejectedRow| {
            let topic = Topic::try_new(&row.topic).ok()?;
            let raw = String::from_utf8_lossy(&row.raw).into_owned();
            Some(Rejected { at: Timestamp(row.at), topic, message_id: row.message_id, reason: row.reason, raw })
        };
        Ok(found.into_iter().filter_map(shown).collect())
    }

    /// Deletes payloads and rows past their age, at most `limit` of each; never of events that are not complete.
    pub async fn collect(&self, limit: usize) -> Result<Collected, Error> {
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.collect(limit).await,
            Backend::Postgres(db) => db.collect(limit).await,
        };
        let (collected, rejected) = self.shared.note("collect", 0, start, result)?;
        let (payloads, rows) = (collected.payloads, collected.rows);
        observe::Collected { environment: &self.shared.environment, payloads, rows, rejected }.emit();
        Ok(collected)
    }

    /// Counts are up to some seconds old in a large ledger, and left out while the first count runs.
    pub async fn status(&self) -> Status {
        // On a task of its own: a count that takes longer than anybody waits for goes on, and serves those who ask next.
        let counting = self.shared.counting.spawn({
            let this = self.clone();
            async move { this.counts().await }
        });
        let states = tokio::time::timeout(COUNTS_WAIT, counting).await.ok().and_then(Result::ok).flatten();
        let states = states.unwrap_or_default();
        let health = self.shared.health.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        Status {
            kind: self.shared.kind,
            reachable: health.reachable.unwrap_or(false),
            last_error: health.last_error.clone(),
            since: health.since,
            states,
        }
    }

    async fn counts(&self) -> Option<BTreeMap<String, u64>> {
        let mut counts = self.shared.counts.lock().await;
        if let Some(known) = &*counts
            && known.at.elapsed() < COUNTS_AGE_MIN.max(known.took * COUNTS_SHARE)
        {
            return known.states.clone();
        }
        let start = Instant::now();
        let result = match &self.backend {
            Backend::Sqlite(db) => db.states().await,
            Backend::Postgres(db) => db.states().await,
        };
        let found = self.shared.note("status", 1, start, result);
        let states = found.ok().map(|found| {
            let named = |(code, count): (i16, i64)| {
                Some((codec::state_of(code).ok()?.as_str().to_owned(), count.max(0) as u64))
            };
            found.into_iter().filter_map(named).collect::<BTreeMap<_, _>>()
        });
        // A failure is remembered as well: where counting takes longer than it may, each try costs as much as a success.
        *counts = Some(Counts { at: Instant::now(), took: start.elapsed(), states: states.clone() });
        states
    }

    #[cfg(test)]
    async fn limit_pages(&self, pages: u32) {
        if let Backend::Sqlite(db) = &self.backend {
            db.limit_pages(pages).await;
        }
    }

    /// Ends what is under way; later calls fail.
    pub async fn close(&self) {
        self.shared.counting.close();
        match &self.backend {
            Backend::Sqlite(db) => db.close().await,
            Backend::Postgres(db) => db.close().await,
        }
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
