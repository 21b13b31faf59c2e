//! Durable local queue for events on their way to the broker, and the local broker in the same store.
//!
//! `bridge` → **`outbox`** → `relay` → `payloads`, `broker`.
//!
//! # Invariants
//! 1. [`append`](Outbox::append) returns `Ok` only after the record is on disk. 202 is answered on that and on nothing else.
//! 2. A record leaves only by [`Settle::Confirm`], by [`cancel`](Outbox::cancel), or discarded by an operator after it was poisoned. Poisoned
//!    records are kept and counted.
//! 3. `bytes <= bytes_max`, `records <= count_max`, and `disk_free_min` stays free. At a limit `append` refuses; nothing is evicted.
//! 4. A record that fails its checksum is poisoned and never blocks the records behind it.
//! 5. Records of one ordering key are leased one at a time, in order.
//! 6. Sequences are never used twice.
//!
//! `tests.rs` has `invariant_N_*` for number N; the simulator checks them after every step, over seeds that it can replay.
//!
//! # Parts
//! [`store`] is the small interface to sled or SQLite (and the simulator's disk), [`packs`] how many records share a value, [`queue`] which one is
//! next, [`engine`] what each request changes, [`owner`] the one thread that owns it all and commits once for everyone who waits, [`open`] the
//! lock and the salvage, [`tools`] what `dealscale outbox` does to a closed folder. The format is described in [`packs`] and [`record`], and for
//! operators in `docs/on-disk-format.md`.
//!
//! # Failure
//! A failed write or sync is never retried on the same handle: all waiters get [`Error::Store`], the store is closed and opened again. Only
//! proven damage sets a folder aside ([`open`]); its readable records are salvaged, and status says `data_loss_possible` until somebody
//! acknowledges it.

mod engine;
mod open;
mod owner;
mod packs;
mod queue;
mod record;
mod store;
#[cfg(test)]
mod tests;
pub mod tools;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use bytes::Bytes as Body;
use tokio::sync::{Semaphore, oneshot};

use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::event::Event;
use crate::ids::{Environment, ExecutionId, Key, OrderingKey, Tenant, Topic};
use crate::seal::Seal;
use crate::units::Bytes;
use engine::Prepared;
use owner::{Command, Owner};

/// Requests that wait for the owner at once; more wait for a place. Twice its largest batch.
const REQUESTS_MAX: usize = 4_096;

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
    /// Its body is empty unless bodies were asked for.
    pub event: Event,
    pub body_bytes: u64,
    pub leased: bool,
    /// Why it was poisoned.
    pub poisoned: Option<String>,
}

/// A record of which only its place is known.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Unreadable {
    pub sequence: Sequence,
    pub tenant: String,
    /// Set aside already; otherwise it will be, when its turn comes.
    pub poisoned: bool,
    pub why: String,
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
    #[error("cannot open the outbox: {0}")]
    Open(Arc<str>),
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
            Self::Locked(_) | Self::Open(_) => Verdict::Broken,
        }
    }
}

/// Quota and weight of a tenant, from its declaration.
pub type TenantLimits = Arc<dyn Fn(&Tenant) -> (u64, Bytes) + Send + Sync>;

/// Handle to the thread that owns the store. Cheap to clone.
#[derive(Clone)]
pub struct Outbox {
    shared: Arc<Shared>,
}

struct Shared {
    commands: mpsc::Sender<Command>,
    places: Semaphore,
    status: Arc<Mutex<Status>>,
    seal: Option<Arc<Seal>>,
}

impl Outbox {
    /// Opens (or makes) the store and starts the owner thread. Blocking: up to seconds with a large backlog.
    ///
    /// # Errors
    /// The folder is open elsewhere, cannot be read, or has a newer format.
    pub fn open(
        config: &config::Outbox,
        environment: &Environment,
        limits: TenantLimits,
        clock: Clock,
    ) -> Result<Self, Error> {
        Self::open_with(config, environment, limits, clock, true)
    }

    /// With `salvage` off a damaged folder is an error and stays as it is.
    fn open_with(
        config: &config::Outbox,
        environment: &Environment,
        limits: TenantLimits,
        clock: Clock,
        salvage: bool,
    ) -> Result<Self, Error> {
        let settings = Arc::new(config.clone());
        let seal = open::seal(config)?;
        let lock = open::lock(&config.dir)?;
        let engine = match salvage {
            true => open::engine(&settings, &seal, &limits, &clock),
            false => open::engine_without_salvage(&settings, &seal, &limits),
        };
        let mut engine = engine.map_err(|failure| open::failed(&config.dir, &failure))?;
        let status = Arc::new(Mutex::new(engine.snapshot()));
        let (commands, receiver) = mpsc::channel();
        let reopen = {
            let (seal, clock) = (seal.clone(), clock.clone());
            Box::new(move |failure: &store::Failure| open::again(&settings, &seal, &limits, &clock, failure))
        };
        let owner = Owner {
            commands: receiver,
            reopen,
            dir: config.dir.clone(),
            clock,
            status: status.clone(),
            lock: Some(lock),
        };
        std::thread::Builder::new()
            .name(format!("outbox-{environment}"))
            .spawn(move || {
                if std::panic::catch_unwind(AssertUnwindSafe(|| owner.run(engine))).is_err() {
                    // Half an appliance is worse than none: systemd starts it again, and what was acknowledged is on disk.
                    tracing::error!("the outbox's thread panicked; the process ends");
                    std::process::abort();
                }
            })
            .map_err(|e| Error::Open(format!("its thread does not start: {e}").into()))?;
        Ok(Self { shared: Arc::new(Shared { commands, places: Semaphore::new(REQUESTS_MAX), status, seal }) })
    }

    /// Sends a request and waits for its answer. An owner that is gone has closed the outbox.
    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Command, bounded: bool) -> Result<T, Error> {
        let _place = match bounded {
            true => Some(self.shared.places.acquire().await.map_err(|_| Error::Closed)?),
            false => None,
        };
        let (reply, answer) = oneshot::channel();
        self.shared.commands.send(request(reply)).map_err(|_| Error::Closed)?;
        answer.await.map_err(|_| Error::Closed)
    }

    fn prepare(&self, append: Append) -> Prepared {
        let envelope = &append.event.envelope;
        let key = append.idempotency_key.map(|key| {
            // No tenant contains a zero byte, so tenant and key cannot run into each other.
            let text = [envelope.tenant.as_str().as_bytes(), b"\0", key.as_bytes()].concat();
            let hash = crate::ids::BodyHash::of(&text);
            (hash.0[..16].try_into().expect("half of a hash"), append.answer)
        });
        Prepared {
            tenant: envelope.tenant.clone(),
            execution_id: envelope.execution_id,
            body_hash: envelope.body_hash,
            bytes: record::encode(&append.event, self.shared.seal.as_deref()),
            key,
        }
    }

    /// On disk when this returns `Ok`.
    ///
    /// # Errors
    /// See [`Error`]; [`Error::verdict`] says what the caller may do.
    pub async fn append(&self, append: Append) -> Result<Appended, Error> {
        self.append_batch(vec![append]).await.pop().unwrap_or(Err(Error::Closed))
    }

    /// One result per item, in order; all share one sync.
    pub async fn append_batch(&self, items: Vec<Append>) -> Vec<Result<Appended, Error>> {
        let count = items.len();
        let prepared: Vec<_> = items.into_iter().map(|item| self.prepare(item)).collect();
        match self.ask(|reply| Command::Append(prepared, reply), true).await {
            Ok(results) => results
                .into_iter()
                .map(|result| {
                    result.map(|taken| Appended {
                        execution_id: taken.execution_id,
                        sequence: taken.sequence.map(Sequence),
                        duplicate: taken.duplicate,
                        answer: taken.answer,
                    })
                })
                .collect(),
            Err(error) => (0..count).map(|_| Err(error.clone())).collect(),
        }
    }

    /// Waits until at least one record is free, then takes up to `limit`, by weighted round robin over tenants.
    /// Records of one ordering key come one at a time: the next one only after the former is settled.
    ///
    /// # Errors
    /// The store failed, or the outbox is closed.
    pub async fn lease(&self, limit: LeaseLimit) -> Result<Vec<Leased>, Error> {
        let back = self.shared.commands.clone();
        Ok(self.ask(|reply| Command::Lease(limit, back, reply), false).await??.take())
    }

    /// Durable when it returns. Settling a record twice, or one whose lease ran out, changes nothing.
    ///
    /// # Errors
    /// The store failed: nothing of this call may have happened, or all of it.
    pub async fn settle(&self, settles: Vec<Settle>) -> Result<(), Error> {
        self.ask(|reply| Command::Settle(settles, reply), true).await?
    }

    /// A record that waits, by its event's key.
    ///
    /// # Errors
    /// The store failed.
    pub async fn find(&self, key: &Key) -> Result<Option<Found>, Error> {
        self.ask(|reply| Command::Find(key.clone(), reply), true).await?
    }

    /// Waiting (or poisoned) records after `after` without their bodies, at most `limit`. What cannot be read is not among them, see
    /// [`unreadable`](Self::unreadable).
    ///
    /// # Errors
    /// The store failed.
    pub async fn list(
        &self,
        tenant: Option<Tenant>,
        poisoned: bool,
        after: Option<Sequence>,
        limit: usize,
    ) -> Result<Vec<Found>, Error> {
        self.ask(|reply| Command::List(tenant, poisoned, after, limit, false, reply), true).await?
    }

    /// The same with bodies; fewer than `limit`, and at least one, where they are large. The last page is the empty one.
    ///
    /// # Errors
    /// The store failed.
    pub async fn list_with_bodies(
        &self,
        poisoned: bool,
        after: Option<Sequence>,
        limit: usize,
    ) -> Result<Vec<Found>, Error> {
        self.ask(|reply| Command::List(None, poisoned, after, limit, true, reply), true).await?
    }

    /// One record by its sequence, with its body.
    ///
    /// # Errors
    /// The store failed.
    pub async fn record(&self, sequence: Sequence) -> Result<Option<Found>, Error> {
        let after = sequence.0.checked_sub(1).map(Sequence);
        for poisoned in [false, true] {
            let found = self.list_with_bodies(poisoned, after, 1).await?.pop();
            if let Some(found) = found.filter(|f| f.sequence == sequence) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Records that cannot be read: those that were poisoned for it, or (`all`, which reads everything) every one.
    ///
    /// # Errors
    /// The store failed.
    pub async fn unreadable(&self, all: bool) -> Result<Vec<Unreadable>, Error> {
        self.ask(|reply| Command::Unreadable(all, reply), true).await?
    }

    /// Takes an event that the relay does not have out of the queue; what the relay gets in its place is the record that it is
    /// cancelled ([`Content::Done`](crate::event::Content)).
    ///
    /// # Errors
    /// The store failed.
    pub async fn cancel(&self, key: &Key) -> Result<Cancelled, Error> {
        self.ask(|reply| Command::Cancel(key.clone(), reply), true).await?
    }

    /// Puts a poisoned record back into the queue, or (`discard`) removes it for good. `false`: there is no such record.
    ///
    /// # Errors
    /// The store failed.
    pub async fn repair_poisoned(&self, sequence: Sequence, discard: bool) -> Result<bool, Error> {
        self.ask(|reply| Command::Repair(sequence, discard, reply), true).await?
    }

    /// An operator has looked into the salvage.
    ///
    /// # Errors
    /// The store failed.
    pub async fn acknowledge_data_loss(&self) -> Result<(), Error> {
        self.ask(Command::AcknowledgeLoss, true).await?
    }

    /// Writes the newest format from now on: the release before cannot read it any more. Answers the format before and now.
    ///
    /// # Errors
    /// The store failed.
    pub async fn finalize(&self) -> Result<(u8, u8), Error> {
        self.ask(Command::Finalize, true).await?
    }

    /// As of the last batch, half a second old at most.
    pub fn status(&self) -> Status {
        self.shared.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The broker that lives in the same store.
    pub fn local(&self) -> Local {
        Local { outbox: self.clone() }
    }

    /// Syncs, closes the store and ends the owner thread. Later calls get [`Error::Closed`].
    ///
    /// # Errors
    /// What was queued could not be written.
    pub async fn close(&self) -> Result<(), Error> {
        match self.ask(Command::Close, true).await {
            Ok(result) => result,
            // Closed before.
            Err(_) => Ok(()),
        }
    }
}

/// The local broker's half of the store: topics of forwarded messages with one competing-consumers subscription.
#[derive(Clone)]
pub struct Local {
    outbox: Outbox,
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
    ///
    /// # Errors
    /// The store failed.
    pub async fn publish(&self, messages: Vec<Forward>) -> Result<Vec<String>, Error> {
        self.outbox.ask(|reply| Command::Publish(messages, reply), true).await?
    }

    /// Waits until a message that is due is free and takes up to `max`. A message is given to one consumer at a time; messages of one ordering
    /// key one after the other; fair between tenants. `topics` decides which topics count (all topics that exist now or later for
    /// which it is true).
    ///
    /// # Errors
    /// The store failed, or the outbox is closed.
    pub async fn receive(
        &self,
        topics: Arc<dyn Fn(&Topic) -> bool + Send + Sync>,
        max: usize,
    ) -> Result<Vec<Held>, Error> {
        let back = self.outbox.shared.commands.clone();
        Ok(self.outbox.ask(|reply| Command::Receive(topics, max, back, reply), false).await??.take())
    }

    /// Durable when it returns; an acknowledged message is kept for a while (bounded by number), then collected.
    ///
    /// # Errors
    /// The store failed.
    pub async fn ack(&self, ids: Vec<String>) -> Result<(), Error> {
        self.outbox.ask(|reply| Command::Ack(ids, reply), true).await?
    }

    /// Gives messages back, to be received again after `after`.
    ///
    /// # Errors
    /// The store failed.
    pub async fn release(&self, ids: Vec<String>, after: Duration) -> Result<(), Error> {
        self.outbox.ask(|reply| Command::Release(ids, after, reply), true).await?
    }

    /// # Errors
    /// The store failed.
    pub async fn backlog(&self) -> Result<Vec<Backlog>, Error> {
        self.outbox.ask(Command::Backlog, true).await?
    }

    /// Messages of a topic (a dead-letter topic, say), acknowledged ones still in retention included.
    ///
    /// # Errors
    /// The store failed.
    pub async fn browse(&self, topic: &Topic, limit: usize) -> Result<Vec<Held>, Error> {
        self.outbox.ask(|reply| Command::Browse(topic.clone(), limit, reply), true).await?
    }
}
