//! Durable local queue for events on their way to the broker. (Contract; see the header of the house for the invariants.)

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes as Body;

use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::event::Event;
use crate::ids::{Environment, ExecutionId, Key, OrderingKey, Tenant, Topic};
use crate::units::Bytes;

/// Position of a record: grows by one per accepted event, never reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Sequence(pub u64);

/// An event to append.
#[derive(Clone, Debug)]
pub struct Append {
    pub event: Event,
    /// The caller's `Idempotency-Key`.
    pub idempotency_key: Option<String>,
    /// What the key answers later, kept in the same batch as the record (the 202 body without `duplicate`).
    pub answer: Body,
}

/// The record is on disk (or was already).
#[derive(Clone, Debug)]
pub struct Appended {
    pub execution_id: ExecutionId,
    /// `None` for a duplicate whose record has already left.
    pub sequence: Option<Sequence>,
    pub duplicate: bool,
    /// The first request's answer when this one is a duplicate by idempotency key.
    pub answer: Option<Body>,
}

/// A record that the relay works on. Dropping it releases nothing: settle it, or the lease runs out.
#[derive(Clone, Debug)]
pub struct Leased {
    pub sequence: Sequence,
    pub event: Event,
}

/// What becomes of a leased record. All of one call are one batch.
#[derive(Clone, Debug)]
pub enum Settle {
    /// Payload store and broker have it. With `forward`, the local broker gets the message in the same batch.
    Confirm { sequence: Sequence, forward: Option<Forward> },
    /// It can never be relayed: kept, counted, listed.
    Poison { sequence: Sequence, reason: String },
    /// Back to the queue, at its old place.
    Release { sequence: Sequence },
}

/// A message for the local broker.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Forward {
    pub topic: Topic,
    pub ordering_key: Option<OrderingKey>,
    pub tenant: Tenant,
    /// The reference's claims, see `broker::Claims`.
    pub claims: Vec<u8>,
    pub properties: BTreeMap<String, String>,
    /// Not before this time.
    pub deliver_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug)]
pub struct LeaseLimit {
    pub count: usize,
    pub bytes: Bytes,
}

/// A record as `outbox ls|show` and the API see it.
#[derive(Clone, Debug)]
pub struct Found {
    pub sequence: Sequence,
    pub event: Event,
    pub leased: bool,
    /// Why it was poisoned.
    pub poisoned: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    Done,
    /// The relay has it: ask the ledger in a moment.
    Leased,
    Absent,
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Status {
    pub records: u64,
    pub bytes: u64,
    pub bytes_max: u64,
    pub count_max: u64,
    pub leased: u64,
    pub poisoned: u64,
    pub oldest: Option<Timestamp>,
    pub disk_free: u64,
    pub next_sequence: u64,
    pub tenants: BTreeMap<String, TenantStatus>,
    /// Salvage after corruption: records found and lost, until an operator acknowledges it.
    pub data_loss_possible: Option<String>,
    /// The last failed write or sync, and how often the store was reopened after one.
    pub last_error: Option<String>,
    pub reopened: u64,
    pub appended_total: u64,
    pub confirmed_total: u64,
    pub syncs_total: u64,
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct TenantStatus {
    pub records: u64,
    pub bytes: u64,
}

/// What the caller of the bridge may do about an error. `bridge/respond.rs` turns it into a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// 503 and `Retry-After`.
    Later,
    /// 429 and `Retry-After`.
    TenantLater,
    /// 413: sending it again cannot help.
    TooLarge,
    /// 409: the id is taken by another body.
    Conflict,
    /// 422: the key was used with another body.
    KeyReused,
    /// 500.
    Broken,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("the outbox holds {used} of {max}")]
    Full { used: Bytes, max: Bytes },
    #[error("the outbox holds {used} of at most {max} records")]
    FullCount { used: u64, max: u64 },
    #[error("only {free} of disk are free, {min} are kept in reserve")]
    Disk { free: Bytes, min: Bytes },
    #[error("tenant {tenant} has {used} waiting of its quota of {max}")]
    Quota { tenant: Tenant, used: Bytes, max: Bytes },
    #[error("the record is {size}, the limit is {max}")]
    Oversized { size: Bytes, max: Bytes },
    #[error("execution_id {0} is already used by an event with another body")]
    Conflict(ExecutionId),
    #[error("this Idempotency-Key was used with another body")]
    KeyReused,
    #[error("cannot {doing}: {cause}; the outcome is unknown, retry with the same key")]
    Store { doing: &'static str, cause: Arc<str> },
    #[error("another process holds {0}: stop it, or let it do the work (`dealscale status`)")]
    Locked(String),
    #[error("the outbox is closed")]
    Closed,
}

impl Error {
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Full { .. } | Self::FullCount { .. } | Self::Disk { .. } | Self::Store { .. } | Self::Closed => {
                Verdict::Later
            }
            Self::Quota { .. } => Verdict::TenantLater,
            Self::Oversized { .. } => Verdict::TooLarge,
            Self::Conflict(_) => Verdict::Conflict,
            Self::KeyReused => Verdict::KeyReused,
            Self::Locked(_) => Verdict::Broken,
        }
    }
}

/// Quota and weight of a tenant, from its declaration.
pub type TenantLimits = Arc<dyn Fn(&Tenant) -> (u64, Bytes) + Send + Sync>;

/// Handle to the thread that owns the store. Cheap to clone.
#[derive(Clone)]
pub struct Outbox {
    _private: Arc<()>,
}

impl Outbox {
    /// Opens (or makes) the store and starts the owner thread. Blocking: up to seconds with a large backlog.
    pub fn open(
        _config: &config::Outbox,
        _environment: &Environment,
        _limits: TenantLimits,
        _clock: Clock,
    ) -> Result<Self, Error> {
        unimplemented!()
    }
    /// On disk when this returns `Ok`.
    pub async fn append(&self, _append: Append) -> Result<Appended, Error> {
        unimplemented!()
    }
    /// One result per item, in order; all share one sync.
    pub async fn append_batch(&self, _items: Vec<Append>) -> Vec<Result<Appended, Error>> {
        unimplemented!()
    }
    /// Waits until at least one record is free, then takes up to `limit`, by weighted round robin over tenants.
    /// Records of one ordering key come one at a time: the next one only after the former is settled.
    pub async fn lease(&self, _limit: LeaseLimit) -> Result<Vec<Leased>, Error> {
        unimplemented!()
    }
    /// Durable when it returns. Settling a record twice, or one whose lease ran out, changes nothing.
    pub async fn settle(&self, _settles: Vec<Settle>) -> Result<(), Error> {
        unimplemented!()
    }
    pub async fn find(&self, _key: &Key) -> Result<Option<Found>, Error> {
        unimplemented!()
    }
    /// Waiting (or poisoned) records after `after`, at most `limit`.
    pub async fn list(
        &self,
        _tenant: Option<Tenant>,
        _poisoned: bool,
        _after: Option<Sequence>,
        _limit: usize,
    ) -> Result<Vec<Found>, Error> {
        unimplemented!()
    }
    pub async fn cancel(&self, _key: &Key) -> Result<Cancelled, Error> {
        unimplemented!()
    }
    /// Puts a poisoned record back into the queue, or (`discard`) removes it for good.
    pub async fn repair_poisoned(&self, _sequence: Sequence, _discard: bool) -> Result<bool, Error> {
        unimplemented!()
    }
    pub async fn acknowledge_data_loss(&self) -> Result<(), Error> {
        unimplemented!()
    }
    pub fn status(&self) -> Status {
        unimplemented!()
    }
    /// The broker that lives in the same store.
    pub fn local(&self) -> Local {
        unimplemented!()
    }
    /// Syncs, closes the store and ends the owner thread. Later calls get [`Error::Closed`].
    pub async fn close(&self) -> Result<(), Error> {
        unimplemented!()
    }
}

/// The local broker's half of the store: topics of forwarded messages with one competing-consumers subscription.
#[derive(Clone)]
pub struct Local {
    _private: Arc<()>,
}

/// A message that a consumer of the local broker holds.
#[derive(Clone, Debug)]
pub struct Held {
    /// `topic:sequence`, unique in the environment.
    pub id: String,
    pub topic: Topic,
    pub forward: Forward,
    pub redeliveries: u32,
    pub published_at: Timestamp,
}

#[derive(Clone, Debug, serde::Serialize)]
pub struct Backlog {
    pub topic: String,
    pub waiting: u64,
    pub unacknowledged: u64,
    pub oldest: Option<Timestamp>,
    pub retained: u64,
}

impl Local {
    /// Durable when it returns.
    pub async fn publish(&self, _messages: Vec<Forward>) -> Result<Vec<String>, Error> {
        unimplemented!()
    }
    /// Waits until a message that is due is free and takes up to `max`. A message is given to one consumer at a time; messages
    /// of one ordering key one after the other; fair between tenants. `topics` decides which topics count (all topics
    /// that exist now or later for which it is true).
    pub async fn receive(
        &self,
        _topics: Arc<dyn Fn(&Topic) -> bool + Send + Sync>,
        _max: usize,
    ) -> Result<Vec<Held>, Error> {
        unimplemented!()
    }
    /// Durable when it returns; an acknowledged message is kept for the retention time, then collected.
    pub async fn ack(&self, _ids: Vec<String>) -> Result<(), Error> {
        unimplemented!()
    }
    /// Gives messages back, to be received again after `after`.
    pub async fn release(&self, _ids: Vec<String>, _after: std::time::Duration) -> Result<(), Error> {
        unimplemented!()
    }
    pub async fn backlog(&self) -> Result<Vec<Backlog>, Error> {
        unimplemented!()
    }
    /// Messages of a topic (a dead-letter topic, say), acknowledged ones still in retention included.
    pub async fn browse(&self, _topic: &Topic, _limit: usize) -> Result<Vec<Held>, Error> {
        unimplemented!()
    }
}

/// (Contract.)
pub mod tools {
    use std::path::Path;

    use super::{Error, Outbox};
    use crate::config;
    use crate::event::Event;
    use crate::ids::Environment;

    pub struct Entry {
        pub event: Event,
        pub poisoned: Option<String>,
    }
    #[derive(serde::Serialize)]
    pub struct Report {
        pub records: u64,
    }
    impl Report {
        pub fn is_sound(&self) -> bool {
            unimplemented!()
        }
    }
    pub fn verify(_config: &config::Outbox) -> Result<Report, Error> {
        unimplemented!()
    }
    pub fn open_alone(_config: &config::Outbox, _environment: &Environment) -> Result<Outbox, Error> {
        unimplemented!()
    }
    pub struct Export {}
    impl Export {
        pub fn create(_dir: &Path) -> std::io::Result<Self> {
            unimplemented!()
        }
        pub fn write(&mut self, _event: &Event, _poisoned: Option<&str>) -> std::io::Result<()> {
            unimplemented!()
        }
        pub fn finish(self) -> std::io::Result<u64> {
            unimplemented!()
        }
    }
    pub fn read_export(_dir: &Path) -> std::io::Result<Box<dyn Iterator<Item = std::io::Result<Entry>>>> {
        unimplemented!()
    }
}
