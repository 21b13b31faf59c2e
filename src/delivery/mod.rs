//! From the broker to n8n, and to the end of n8n's execution.
//!
//! `broker` → **`delivery`** → `payloads` (claim, ledger), `n8n` (webhook, executions) → `broker` (acknowledge).
//!
//! ```text
//! receive ─▶ scheduler ─▶ claim + begin + payload (one transaction for many) ─▶ webhook ─▶ ledger ─▶ acknowledge
//!    ▲          ▲ slots, tenants' turns, ordering keys, breaker                    │
//!    │          └── held: short waits, ordering keys                              ├─▶ follow ─▶ ledger
//!    └── timer: due retries, delayed events, replays; sweeper: what was lost  ◀────┘ long waits
//! ```
//!
//! # Invariants
//! 1. No call without a claim and a begun attempt in the ledger; no acknowledgement before the ledger has what came of it.
//! 2. A message whose reference, topic, tenant or body is not right is never delivered: dead letter, with the reason.
//! 3. While a server is down or the ledger does not answer, nothing is taken up and no attempt is counted
//!    ([`breaker`]: those that were running when it went down excepted).
//! 4. Slots, tenants' shares and ordering keys: [`scheduler`]. What each answer means: [`verdict`].
//! 5. An attempt whose outcome is unknown is looked up in n8n before the event is sent again, where n8n can be asked; a run
//!    that exists is followed instead.
//! 6. Everything is bounded: messages that wait, calls under way, executions followed; bodies in memory are those of calls
//!    under way.
//!
//! # Ordering keys
//! The key is taken from the moment its first event arrives until that event is final in the ledger: over retries (its message
//! is held in memory however long the wait is, and unacknowledged, so after a crash the broker gives it again before
//! later ones), while its execution is followed, and with `on_dead = "hold"` while it is a dead letter, until that is replayed or
//! discarded (asked of the ledger every 2 s; `dealscale_delivery_keys_held` and an error log say so). Later events of the key
//! wait in memory behind it, or in the local broker, which gives them one at a time. Two limits: a dead letter holds its key only
//! as long as the broker keeps its message, and beyond 20,000 messages behind held keys further ones go back to the broker for
//! 30 s at a time, which may change the order among them. A delayed event takes its place when it is due.
//!
//! # Failure
//! Killed anywhere: unacknowledged messages come again. Their rows say what happened: final → acknowledge; an attempt without an
//! end → look it up, otherwise call again with the same `webhook-id`. Followed events have no message any more; the sweeper
//! publishes them when their claim has run out, within a few seconds of that after a restart of this appliance.

mod batch;
pub mod breaker;
mod follow;
pub mod scheduler;
mod timer;
pub mod verdict;
mod webhook;
mod work;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Semaphore, mpsc};

pub use timer::Alarm;

use crate::broker::{self, Broker};
use crate::clock::Clock;
use crate::config::EnvironmentConfig;
use crate::event::State;
use crate::ids::Key;
use crate::n8n::{self, N8n};
use crate::payloads::{self, Store};
use crate::supervise::Supervisor;

/// Tells a state that an event reached for good (dead letters included).
pub type OnFinal = Arc<dyn Fn(&Key, State) + Send + Sync>;

/// What delivery works with.
#[derive(Clone)]
pub struct Parts {
    pub config: Arc<EnvironmentConfig>,
    pub store: Store,
    pub broker: Broker,
    pub n8n: N8n,
    pub clock: Clock,
    pub on_final: OnFinal,
    /// Shared with the relay, which knows of delayed events first.
    pub alarm: Alarm,
}

/// How it goes.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Status {
    /// Nothing is taken from the broker: all servers are down, the ledger does not answer, or enough waits already.
    pub paused: bool,
    /// For a slot.
    pub waiting: usize,
    pub behind_ordering_keys: usize,
    /// Retries of ordering keys that are held in memory.
    pub retry_waits: usize,
    pub working: usize,
    pub following: usize,
    /// Ordering keys that wait for a dead letter to be replayed or discarded.
    pub keys_held: usize,
    /// Servers that are not called at present.
    pub breakers_open: Vec<String>,
    pub last_error: Option<String>,
}

/// Handle to the running delivery. Cheap to clone.
#[derive(Clone)]
pub struct Delivery {
    status: Arc<Mutex<Status>>,
    owner: Arc<str>,
}

impl Delivery {
    /// Starts its tasks. After the supervisor's shutdown they take nothing new, finish what runs, and end.
    ///
    /// # Errors
    /// A setting that cannot be used, as text for people.
    pub fn start(parts: Parts, supervisor: &Supervisor) -> Result<Self, String> {
        let Parts { config, store, broker, n8n, clock, on_final, alarm } = parts;
        let signer = n8n::Signer::new(&config.delivery)?;
        // Unique per start: a claim of the former process is somebody else's.
        let owner = uuid::Uuid::new_v4().simple().to_string();
        let claim = config.delivery.claim.0;
        let gone = |what| move || payloads::Error::Store { doing: what, cause: "the process ends".into() };
        let takes = {
            let (store, clock, owner) = (store.clone(), clock.clone(), owner.clone());
            batch::Batch::start("delivery.claims", supervisor, gone("claim events"), move |takes| {
                let (store, until, owner) = (store.clone(), clock.now().plus(claim), owner.clone());
                async move { store.claim_and_begin(&owner, takes, until).await }
            })
        };
        let transitions = {
            let store = store.clone();
            batch::Batch::start("delivery.ledger", supervisor, gone("write to the ledger"), move |transitions| {
                let store = store.clone();
                async move { store.apply(transitions).await }
            })
        };
        let acks = {
            let broker = broker.clone();
            let gone = || broker::Error::Unavailable { doing: "acknowledge", cause: "the process ends".into() };
            batch::Batch::start("delivery.acks", supervisor, gone, move |messages: Vec<broker::Received>| {
                let (broker, count) = (broker.clone(), messages.len());
                async move { broker.ack(messages).await.map(|()| vec![(); count]) }
            })
        };
        let looks = {
            let n8n = n8n.clone();
            let gone = || n8n::Error::Unreachable("the process ends".into());
            batch::Batch::start("delivery.looks", supervisor, gone, move |lookups: Vec<n8n::Lookup>| {
                let n8n = n8n.clone();
                async move { n8n.look(&lookups).await }
            })
        };
        let concurrency = config.delivery.concurrency as usize;
        let follow_max = config.delivery.follow_max as usize;
        // Each task under way and each followed event has at most one message to the worker.
        let (to_worker, inputs) = mpsc::channel(concurrency + follow_max + 16);
        let (to_follower, followed) = mpsc::channel(follow_max);
        let ctx = Arc::new(work::Ctx {
            config,
            store,
            broker,
            n8n,
            clock,
            on_final,
            signer,
            takes,
            transitions,
            acks,
            looks,
            active: Mutex::default(),
            held: Mutex::default(),
            foreign: Mutex::default(),
            to_worker,
            to_follower,
            follow_slots: Arc::new(Semaphore::new(follow_max)),
            alarm,
            shutdown: supervisor.shutdown(),
        });
        let status = Arc::new(Mutex::new(Status::default()));
        let room = Arc::new(worker::Room::default());
        // One batch under way: what waits belongs into the broker, not into a channel.
        let (to_messages, messages) = mpsc::channel(1);
        supervisor.spawn("delivery.receive", worker::receive_loop(ctx.clone(), room.clone(), to_messages));
        supervisor.spawn("delivery.worker", worker::worker_loop(ctx.clone(), room, status.clone(), messages, inputs));
        supervisor.spawn("delivery.follow", follow::follow_loop(ctx.clone(), followed));
        supervisor.spawn("delivery.timer", timer::due_loop(ctx.clone()));
        supervisor.spawn("delivery.sweeper", timer::sweep_loop(ctx.clone()));
        supervisor.spawn("delivery.renew", timer::renew_loop(ctx.clone()));
        supervisor.spawn("delivery.collect", timer::collect_loop(ctx));
        Ok(Self { status, owner: owner.into() })
    }

    pub fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The name under which this process claims events.
    pub fn owner(&self) -> &str {
        &self.owner
    }
}
