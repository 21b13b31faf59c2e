//! From the outbox to payload store and broker.
//!
//! `outbox` → **`relay`** → `payloads` (payload and ledger row), then `broker` (reference) → `delivery`.
//!
//! ```text
//! lease ─▶ admit (one transaction) ─▶ channel of 2 batches ─▶ publish, up to 4 batches at once ─▶ confirm (by the broker)
//!             │ conflict: poison          │ final, recorded only,                │ failed: parked, tried again
//!             │ refused: one by one       │ or not due: confirm                  │ lease old: released
//! ```
//!
//! # Invariants
//! 1. A record is confirmed only when payload and ledger row are durable, and the broker has the reference or none is needed:
//!    the event is final, was recorded only (`Content::Done`), or waits in the ledger for its `deliver_at`.
//! 2. Nothing leaves silently: another body under a known id, and what the store can never take, is poisoned with the reason.
//! 3. One bad record, or one topic that cannot be published to, never blocks the others.
//! 4. A failure is followed by a pause with jitter (100 ms up to 5 s), never by a spin; the outbox fills meanwhile.
//! 5. Memory is bounded: at most 7 batches of [`LEASE_COUNT`] records or [`LEASE_BYTES`], and [`PARKED_MAX`] references.
//!
//! # Failure
//! Killed anywhere: the leases are gone with the process, the records come again; a row that is there already answers
//! `Same`, and its reference is published a second time, which the ledger's claim makes harmless.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::broker::{self, Broker, Outgoing, Receipt};
use crate::clock::{Clock, Timestamp};
use crate::config::EnvironmentConfig;
use crate::event::{Content, State};
use crate::ids::Key;
use crate::observe::relay as events;
use crate::outbox::{LeaseLimit, Leased, Outbox, Sequence, Settle};
use crate::payloads::{Admitted, Store};
use crate::references;
use crate::supervise::Supervisor;
use crate::units::Bytes;

/// Records of one batch. Larger ones gain nothing more from sharing a transaction.
pub const LEASE_COUNT: usize = 256;
/// Bodies of one batch.
pub const LEASE_BYTES: Bytes = Bytes::mib(4);
/// Batches that wait between the two halves.
const CHANNEL: usize = 2;
/// Batches that the broker works on at once. The outbox leases only one record per ordering key, so they cannot overtake.
const PIPELINE: usize = 4;
/// References that failed and wait for their next try. Beyond, nothing new is taken.
pub const PARKED_MAX: usize = 10_000;
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Message ids are for people: they are written together this often.
const IDS_EVERY: Duration = Duration::from_millis(500);

/// Tells a state that an event reached for good.
pub type OnFinal = Arc<dyn Fn(&Key, State) + Send + Sync>;
/// Tells that the broker has an event, with its message id.
pub type OnReceipt = Arc<dyn Fn(&Key, &str) + Send + Sync>;
/// Tells when a delayed event is due, so that the timer wakes for it.
pub type OnDelayed = Arc<dyn Fn(Timestamp) + Send + Sync>;

/// What the relay works with.
#[derive(Clone)]
pub struct Parts {
    pub config: Arc<EnvironmentConfig>,
    pub outbox: Outbox,
    pub store: Store,
    pub broker: Broker,
    pub clock: Clock,
    pub on_final: OnFinal,
    pub on_receipt: OnReceipt,
    pub on_delayed: OnDelayed,
}

/// How it goes.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Status {
    pub failing: bool,
    /// Since when it is failing, or works.
    pub since: Option<Timestamp>,
    pub last_error: Option<String>,
    pub relayed_total: u64,
    /// References whose topic or broker failed and that are tried again.
    pub parked: u64,
}

/// Handle to the running relay. Cheap to clone.
#[derive(Clone)]
pub struct Relay {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    status: Mutex<Status>,
}

/// A record whose payload is durable, on its way to the broker.
struct Item {
    sequence: Sequence,
    outgoing: Outgoing,
    leased_at: Instant,
}

type Published = (Vec<Item>, Vec<Result<Receipt, broker::Error>>, Instant);

impl Relay {
    /// Starts its tasks; they end by themselves after the supervisor's shutdown.
    pub fn start(parts: Parts, supervisor: &Supervisor) -> Self {
        let inner = Arc::new(Inner {
            status: Mutex::new(Status { since: Some(parts.clock.now()), ..Status::default() }),
            parts,
        });
        let (to_publish, admitted) = mpsc::channel(CHANNEL);
        let (to_ids, ids) = mpsc::channel(LEASE_COUNT * 16);
        let shutdown = supervisor.shutdown();
        supervisor.spawn("relay.admit", inner.clone().admit_loop(to_publish, shutdown.clone()));
        supervisor.spawn("relay.publish", inner.clone().publish_loop(admitted, to_ids, shutdown.clone()));
        supervisor.spawn("relay.ids", inner.clone().ids_loop(ids, shutdown));
        Self { inner }
    }

    pub fn status(&self) -> Status {
        self.inner.status().clone()
    }
}

impl Inner {
    fn status(&self) -> std::sync::MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn failing(&self, side: &'static str, error: &str, pause: Duration) {
        events::Failing { side, error, again_in: pause }.emit();
        let mut status = self.status();
        if !status.failing {
            status.failing = true;
            status.since = Some(self.parts.clock.now());
        }
        status.last_error = Some(format!("{side}: {error}"));
    }

    fn works(&self) {
        let mut status = self.status();
        if status.failing {
            status.failing = false;
            status.since = Some(self.parts.clock.now());
            drop(status);
            events::Recovered.emit();
        }
    }

    async fn admit_loop(self: Arc<Self>, to_publish: mpsc::Sender<Vec<Item>>, shutdown: CancellationToken) {
        let mut pause = Pause::default();
        // Records still to be taken one by one, after the store refused a batch for one of them.
        let mut singly = 0usize;
        loop {
            // While the store fails one record finds out whether it is back: reading a whole batch from the disk only to release it again
            // would hold up the outbox's owner, and with it whoever publishes.
            let count = if singly > 0 || pause.failures > 0 { 1 } else { LEASE_COUNT };
            let leased = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                leased = self.parts.outbox.lease(LeaseLimit { count, bytes: LEASE_BYTES }) => leased,
            };
            let error = match leased {
                Ok(leased) => match self.admit(leased).await {
                    Ok(items) => {
                        pause.reset();
                        singly = singly.saturating_sub(1);
                        if items.is_empty() {
                            continue;
                        }
                        let sent = tokio::select! {
                            () = shutdown.cancelled() => return,
                            sent = to_publish.send(items) => sent,
                        };
                        if sent.is_err() {
                            return shutdown.cancelled().await;
                        }
                        continue;
                    }
                    Err(Refused::Batch(size)) => {
                        singly = size;
                        continue;
                    }
                    Err(Refused::Later(error)) => ("payloads", error),
                },
                Err(error) => ("outbox", error.to_string()),
            };
            let wait = pause.next();
            self.failing(error.0, &error.1, wait);
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Payload and ledger row of each; what needs no reference is settled here. Returns the rest.
    async fn admit(&self, leased: Vec<Leased>) -> Result<Vec<Item>, Refused> {
        let leased_at = Instant::now();
        let now = self.parts.clock.now();
        let mut facts = Vec::with_capacity(leased.len());
        let mut records = Vec::with_capacity(leased.len());
        for Leased { sequence, event } in leased {
            let recorded = match &event.envelope.content {
                Content::Done { state, .. } => Some(*state),
                _ => None,
            };
            let outgoing = references::outgoing(&self.parts.config, &event.envelope, now);
            let due = event.envelope.deliver_at.filter(|at| *at > now);
            facts.push((sequence, outgoing, recorded, due));
            records.push(event);
        }
        let admitted = match self.parts.store.admit(records).await {
            Ok(admitted) => admitted,
            Err(error) if error.is_transient() => {
                self.settle(facts.iter().map(|fact| Settle::Release { sequence: fact.0 }).collect()).await;
                return Err(Refused::Later(error.to_string()));
            }
            Err(error) => match &facts[..] {
                [(sequence, outgoing, ..)] => {
                    let reason = format!("the payload store refused it: {error}");
                    events::Poisoned { key: &outgoing.claims.key(), reason: &reason }.emit();
                    self.settle(vec![Settle::Poison { sequence: *sequence, reason }]).await;
                    return Ok(Vec::new());
                }
                _ => {
                    self.settle(facts.iter().map(|fact| Settle::Release { sequence: fact.0 }).collect()).await;
                    return Err(Refused::Batch(facts.len()));
                }
            },
        };
        let mut items = Vec::with_capacity(facts.len());
        let mut settles = Vec::new();
        let mut finals = Vec::new();
        for ((sequence, outgoing, recorded, due), admitted) in facts.into_iter().zip(admitted) {
            let confirm = Settle::Confirm { sequence, forward: None };
            let key = outgoing.claims.key();
            match (admitted, recorded) {
                (Admitted::Conflict, _) => {
                    let reason = "execution_id is already used by an event with another body".to_owned();
                    events::Poisoned { key: &key, reason: &reason }.emit();
                    settles.push(Settle::Poison { sequence, reason });
                }
                (Admitted::Same { state }, _) if state.is_final() => {
                    events::Settled { reason: "already_final" }.emit();
                    settles.push(confirm);
                    finals.push((key, state));
                }
                // Cancelled in the outbox while the ledger had it, from before a crash.
                (Admitted::Same { .. }, Some(State::Cancelled)) => match self.parts.store.cancel(&key).await {
                    Ok(state) => {
                        events::Settled { reason: "recorded" }.emit();
                        settles.push(confirm);
                        finals.extend(state.filter(|state| state.is_final()).map(|state| (key, state)));
                    }
                    Err(error) => {
                        self.failing("payloads", &error.to_string(), PAUSE_MIN);
                        settles.push(Settle::Release { sequence });
                    }
                },
                (_, Some(state)) => {
                    events::Settled { reason: "recorded" }.emit();
                    settles.push(confirm);
                    finals.push((key, state));
                }
                (_, None) => match due {
                    Some(at) => {
                        events::Settled { reason: "delayed" }.emit();
                        settles.push(confirm);
                        (self.parts.on_delayed)(at);
                    }
                    None => items.push(Item { sequence, outgoing, leased_at }),
                },
            }
        }
        self.settle(settles).await;
        for (key, state) in finals {
            (self.parts.on_final)(&key, state);
        }
        Ok(items)
    }

    /// What cannot be settled comes again when its lease runs out.
    async fn settle(&self, settles: Vec<Settle>) {
        if settles.is_empty() {
            return;
        }
        if let Err(error) = self.parts.outbox.settle(settles).await {
            self.failing("outbox", &error.to_string(), Duration::ZERO);
        }
    }

    async fn publish_loop(
        self: Arc<Self>,
        mut admitted: mpsc::Receiver<Vec<Item>>,
        to_ids: mpsc::Sender<(Key, String)>,
        shutdown: CancellationToken,
    ) {
        let mut pause = Pause::default();
        let mut publishing = FuturesUnordered::new();
        let mut parked: Vec<Item> = Vec::new();
        let mut retry_at = Instant::now();
        // The broker as a whole fails: nothing new is taken until a try went well.
        let mut down = false;
        loop {
            let free = publishing.len() < PIPELINE;
            tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                Some(published) = publishing.next(), if !publishing.is_empty() => {
                    match self.published(published, &mut parked, &to_ids) {
                        Health::Works => {
                            down = false;
                            pause.reset();
                            self.works();
                        }
                        Health::Topic(error) => {
                            let wait = pause.next();
                            retry_at = Instant::now() + wait;
                            self.failing("topic", &error, wait);
                        }
                        Health::Down(error) => {
                            down = true;
                            let wait = pause.next();
                            retry_at = Instant::now() + wait;
                            self.failing("broker", &error, wait);
                        }
                    }
                    self.give_back(&mut parked).await;
                    if parked.is_empty() && publishing.is_empty() && down {
                        // Nothing left to try with: the next batch is the probe.
                        down = false;
                        tokio::select! {
                            () = shutdown.cancelled() => return,
                            () = tokio::time::sleep_until(retry_at) => {}
                        }
                    }
                    self.status().parked = parked.len() as u64;
                }
                () = tokio::time::sleep_until(retry_at), if free && !parked.is_empty() => {
                    self.give_back(&mut parked).await;
                    let again: Vec<Item> = parked.drain(..parked.len().min(LEASE_COUNT)).collect();
                    if !again.is_empty() {
                        publishing.push(self.publish(again));
                    }
                    // The rest waits for how this goes.
                    retry_at = Instant::now() + PAUSE_MIN;
                }
                Some(batch) = admitted.recv(), if free && !down && parked.len() < PARKED_MAX => {
                    publishing.push(self.publish(batch));
                }
            }
        }
    }

    async fn publish(&self, items: Vec<Item>) -> Published {
        let started = Instant::now();
        let outgoing = items.iter().map(|item| (item.sequence, item.outgoing.clone())).collect();
        let results = self.parts.broker.relay(&self.parts.outbox, outgoing).await;
        (items, results, started)
    }

    fn published(&self, done: Published, parked: &mut Vec<Item>, to_ids: &mpsc::Sender<(Key, String)>) -> Health {
        let (items, results, started) = done;
        let mut health = Health::Works;
        let mut count = 0;
        for (item, result) in items.into_iter().zip(results) {
            match result {
                Ok(receipt) => {
                    count += 1;
                    let key = item.outgoing.claims.key();
                    (self.parts.on_receipt)(&key, &receipt.0);
                    // Full: the id of this one is not written; its attempts have it.
                    let _ = to_ids.try_send((key, receipt.0));
                }
                Err(error) => {
                    parked.push(item);
                    health = match (error, health) {
                        (broker::Error::Topic { topic, cause }, Health::Works) => {
                            Health::Topic(format!("{topic}: {cause}"))
                        }
                        (broker::Error::Topic { .. }, health) => health,
                        (error, _) => Health::Down(error.to_string()),
                    };
                }
            }
        }
        if count > 0 {
            events::Relayed { events: count, took: started.elapsed() }.emit();
            self.status().relayed_total += count as u64;
        }
        health
    }

    /// Returns to the outbox what was leased long ago, before the lease ends by itself.
    async fn give_back(&self, parked: &mut Vec<Item>) {
        let old = self.parts.config.outbox.lease.0.mul_f64(0.6);
        let mut settles = Vec::new();
        parked.retain(|item| {
            let keep = item.leased_at.elapsed() < old;
            if !keep {
                settles.push(Settle::Release { sequence: item.sequence });
            }
            keep
        });
        self.settle(settles).await;
    }

    /// Message ids into the ledger, together and later than everything else.
    async fn ids_loop(self: Arc<Self>, mut ids: mpsc::Receiver<(Key, String)>, shutdown: CancellationToken) {
        // The local broker's ids mean nothing outside, and each attempt has its own: not worth a write per event.
        let wanted = self.parts.broker.status().kind != "local";
        let mut batch = Vec::with_capacity(LEASE_COUNT);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                n = ids.recv_many(&mut batch, LEASE_COUNT * 4) => if n == 0 {
                    return shutdown.cancelled().await;
                },
            }
            let ready = std::mem::take(&mut batch);
            if wanted && let Err(error) = self.parts.store.set_message_ids(ready).await {
                tracing::debug!(%error, "message ids were not written");
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(IDS_EVERY) => {}
            }
        }
    }
}

/// Why [`Inner::admit`] has nothing.
enum Refused {
    Later(String),
    /// One of so many records is refused: take them one by one.
    Batch(usize),
}

enum Health {
    Works,
    Topic(String),
    Down(String),
}

/// Exponential pause with jitter.
#[derive(Default)]
struct Pause {
    failures: u32,
}

impl Pause {
    fn next(&mut self) -> Duration {
        let top = PAUSE_MIN.saturating_mul(1 << self.failures.min(10)).min(PAUSE_MAX);
        self.failures += 1;
        // At least half, so that it never spins.
        top.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
    fn reset(&mut self) {
        self.failures = 0;
    }
}
