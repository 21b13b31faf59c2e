//! Takes events from the broker, gives them slots, and keeps what waits: the owner of scheduler, breakers and held messages.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Status;
use super::breaker::{Breaker, Trial};
use super::scheduler::{Limits, Meta, RouteIndex, Scheduler};
use super::work::{Ctx, Fate, Slot, work};
use crate::broker::Received;
use crate::config::Route;
use crate::config::routes::ConsumerKind;
use crate::ids::Key;
use crate::observe::delivery as events;
use crate::references;

/// Messages that wait for a slot. Enough for turns among tenants, small enough to hand over quickly at the end.
const WAITING_MAX: usize = 1_024;
/// Taken back out of a full room at once, and for how long: the room must not be held by one tenant whose events cannot be taken
/// up as fast as they come (its route is slow, or so much is followed already), while others' stand behind it in the broker.
const THIN_OUT: usize = WAITING_MAX / 16;
const THIN_OUT_AGAIN: Duration = Duration::from_secs(5);
/// Of one server that is down: beyond it its messages go back to the broker, so that they do not fill the room of others.
const WAITING_FOR_DOWN_MAX: usize = WAITING_MAX / 4;
/// Messages that wait behind another one of their ordering key (a reference is about a kilobyte). Beyond it they go back to
/// the broker for a while, and the order among those that went back is the broker's.
const BEHIND_MAX: usize = 20_000;
const BEHIND_AGAIN: Duration = Duration::from_secs(30);
/// Messages of one call to the broker.
const RECEIVE_MAX: usize = 256;
/// Held keys are looked up in the ledger this often, at most so many at once.
const DEAD_POLL: Duration = Duration::from_secs(2);
const DEAD_POLL_MAX: usize = 200;
/// Pauses after the ledger did not answer.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// Breakers and figures are looked at this often.
const TICK: Duration = Duration::from_millis(250);

/// What tells the worker something.
pub(super) enum Input {
    /// A call is over: the slot is free, and the server's health known (or not).
    Called { meta: Meta, trial: Option<Trial>, healthy: Option<bool> },
    /// The follower is done with an event that holds an ordering key.
    Fate { meta: Meta, fate: Box<Fate> },
    /// The follower has room again.
    FollowFreed,
    /// A server was probed.
    Probed { server: usize, there: bool },
    /// These dead letters are none any more.
    Revived(Vec<Key>),
}

/// How much the receiver may take, shared with it.
#[derive(Default)]
pub(super) struct Room {
    waiting: AtomicUsize,
    paused: AtomicBool,
    changed: Notify,
}

/// Takes messages while there is room. A task of its own, since waiting for messages must not be interrupted.
pub(super) async fn receive_loop(ctx: Arc<Ctx>, room: Arc<Room>, to_worker: mpsc::Sender<Vec<Received>>) {
    loop {
        let waiting = room.waiting.load(Ordering::Acquire);
        if room.paused.load(Ordering::Acquire) || waiting >= WAITING_MAX {
            tokio::select! {
                () = ctx.shutdown.cancelled() => return,
                () = room.changed.notified() => continue,
            }
        }
        let messages = tokio::select! {
            biased;
            // What was taken and not yet handed over is unacknowledged: the broker gives it to the next process.
            () = ctx.shutdown.cancelled() => return,
            messages = ctx.broker.receive((WAITING_MAX - waiting).min(RECEIVE_MAX)) => messages,
        };
        room.waiting.fetch_add(messages.len(), Ordering::AcqRel);
        if to_worker.send(messages).await.is_err() {
            return;
        }
    }
}

/// A server that webhooks live on.
struct Server {
    name: String,
    url: reqwest::Url,
    breaker: Breaker,
}

struct Worker {
    ctx: Arc<Ctx>,
    room: Arc<Room>,
    status: Arc<Mutex<Status>>,
    scheduler: Scheduler<Received>,
    servers: Vec<Server>,
    /// Server of each route.
    server_of: Vec<usize>,
    /// Whether a route's events are followed.
    follows: Vec<bool>,
    route_of: HashMap<String, RouteIndex>,
    external: Vec<bool>,
    tasks: JoinSet<(Slot, Fate)>,
    /// Probes and polls, which answer by [`Input`].
    chores: JoinSet<()>,
    /// Events that were taken up since the last tick.
    picked: usize,
    timed: BinaryHeap<Reverse<(Instant, u64)>>,
    timed_items: HashMap<u64, (Meta, Received)>,
    next: u64,
    dead: HashMap<Key, (Meta, Received)>,
    paused_until: Option<Instant>,
    pause: Duration,
    last_error: Option<String>,
}

/// Ends when the process is to end and everything that was taken up is done.
pub(super) async fn worker_loop(
    ctx: Arc<Ctx>,
    room: Arc<Room>,
    status: Arc<Mutex<Status>>,
    mut messages: mpsc::Receiver<Vec<Received>>,
    mut inputs: mpsc::Receiver<Input>,
) {
    let mut worker = Worker::new(ctx, room, status);
    let shutdown = worker.ctx.shutdown.clone();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut poll = tokio::time::interval(DEAD_POLL);
    poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    while !shutdown.is_cancelled() {
        worker.fill();
        tokio::select! {
            () = shutdown.cancelled() => break,
            Some(input) = inputs.recv() => worker.input(input),
            Some(done) = worker.tasks.join_next(), if !worker.tasks.is_empty() => worker.done(done),
            Some(batch) = messages.recv() => worker.arrived(batch).await,
            _ = tick.tick() => worker.tick(),
            _ = poll.tick(), if !worker.dead.is_empty() => worker.poll_dead(),
        }
        // What is ready at once needs no turn of its own.
        while let Ok(input) = inputs.try_recv() {
            worker.input(input);
        }
        while let Some(done) = worker.tasks.try_join_next() {
            worker.done(done);
        }
    }
    // Nothing new; what runs finishes, as long as the supervisor waits.
    worker.give_back(&mut messages).await;
    while !worker.tasks.is_empty() {
        tokio::select! {
            Some(input) = inputs.recv() => worker.input(input),
            Some(done) = worker.tasks.join_next() => worker.done(done),
        }
    }
    worker.give_back(&mut messages).await;
}

impl Worker {
    fn new(ctx: Arc<Ctx>, room: Arc<Room>, status: Arc<Mutex<Status>>) -> Self {
        let config = ctx.config.clone();
        let routes: Vec<&Route> = config.routes.iter().chain([&config.default_route]).collect();
        let mut servers: Vec<Server> = Vec::new();
        let mut server_of = Vec::new();
        for route in &routes {
            // A route without a usable URL has no server of its own: its events end as dead letters with the reason.
            let url = ctx.n8n.webhook_url(&route.webhook, Some("w"), "t").unwrap_or_else(|_| ctx.n8n.base().clone());
            let name = url.origin().ascii_serialization();
            let at = servers.iter().position(|s| s.name == name).unwrap_or_else(|| {
                let breaker = Breaker::new(config.delivery.breaker_failures, config.delivery.breaker_open.0);
                servers.push(Server { name, url, breaker });
                servers.len() - 1
            });
            server_of.push(at);
        }
        let limits = Limits {
            all: config.delivery.concurrency as usize,
            tenant: config.delivery.tenant_concurrency as usize,
            routes: routes.iter().map(|route| route.concurrency as usize).collect(),
        };
        Self {
            scheduler: Scheduler::new(limits),
            servers,
            server_of,
            follows: routes.iter().map(|route| route.follow && ctx.n8n.can_follow()).collect(),
            route_of: routes.iter().enumerate().map(|(n, route)| (route.name.clone(), n)).collect(),
            external: routes.iter().map(|route| route.consumer == ConsumerKind::External).collect(),
            tasks: JoinSet::new(),
            chores: JoinSet::new(),
            picked: 0,
            timed: BinaryHeap::new(),
            timed_items: HashMap::new(),
            next: 0,
            dead: HashMap::new(),
            paused_until: None,
            pause: PAUSE_MIN,
            last_error: None,
            ctx,
            room,
            status,
        }
    }

    fn meta(&self, message: &Received) -> Meta {
        let default = self.server_of.len() - 1;
        let hint = message.properties.get(references::ROUTE).and_then(|name| self.route_of.get(name));
        let tenant = match &message.reference {
            Ok(verified) => verified.claims.tenant_id.clone(),
            Err(_) => rejected_tenant(),
        };
        let weight = self.ctx.config.tenant(&tenant).map_or(1, |t| t.weight);
        let priority = message.properties.get(references::PRIORITY).and_then(|p| p.parse().ok());
        Meta {
            weight,
            route: hint.copied().unwrap_or(default),
            priority: priority.unwrap_or(crate::event::Envelope::PRIORITY),
            order: message.ordering_key.clone().filter(|_| message.reference.is_ok()).map(|key| (tenant.clone(), key)),
            tenant,
        }
    }

    async fn arrived(&mut self, messages: Vec<Received>) {
        self.room.waiting.fetch_sub(messages.len(), Ordering::AcqRel);
        for message in messages {
            let meta = self.meta(&message);
            let server = &self.servers[self.server_of[meta.route]];
            let behind = meta.order.as_ref().is_some_and(|key| self.scheduler.is_key_busy(key));
            let down = server.breaker.is_down() && self.scheduler.waiting_for(meta.route) >= WAITING_FOR_DOWN_MAX;
            if self.external[meta.route] || (behind && self.scheduler.behind() >= BEHIND_MAX) {
                self.ctx.broker.release(message, BEHIND_AGAIN).await;
            } else if down && !behind && self.servers.len() > 1 {
                self.ctx.broker.release(message, self.ctx.config.delivery.breaker_open.0).await;
            } else {
                self.scheduler.push(meta, message);
            }
        }
    }

    /// Takes up whatever may be taken up now, and tells the receiver how much room there is.
    fn fill(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((at, id))) = self.timed.peek().copied() {
            if at > now {
                break;
            }
            self.timed.pop();
            if let Some((meta, message)) = self.timed_items.remove(&id) {
                self.scheduler.requeue(meta, message);
            }
        }
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
        }
        let paused = self.paused_until.is_some();
        loop {
            if paused {
                break;
            }
            let room_to_follow = self.ctx.follow_slots.available_permits() > 0;
            let (servers, server_of, follows) = (&self.servers, &self.server_of, &self.follows);
            let allows =
                |route: RouteIndex| servers[server_of[route]].breaker.allows() && (room_to_follow || !follows[route]);
            let Some((meta, message)) = self.scheduler.pick(allows) else { break };
            self.picked += 1;
            let trial = self.servers[self.server_of[meta.route]].breaker.taken();
            let follow =
                if self.follows[meta.route] { self.ctx.follow_slots.clone().try_acquire_owned().ok() } else { None };
            let mut slot = Slot { meta, trial, follow, freed: false };
            let ctx = self.ctx.clone();
            self.tasks.spawn(async move {
                let fate = work(&ctx, &mut slot, message).await;
                (slot, fate)
            });
        }
        // The receiver counts what it has handed over and we have not seen yet; add what waits here.
        let all_down = self.servers.iter().all(|s| !s.breaker.allows());
        let stop = paused || all_down || self.scheduler.waiting() >= WAITING_MAX;
        if self.room.paused.swap(stop, Ordering::AcqRel) && !stop {
            self.room.changed.notify_one();
        }
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Called { meta, trial, healthy } => {
                self.scheduler.slot_free(&meta);
                let server = &mut self.servers[self.server_of[meta.route]];
                if let Some(closed) = server.breaker.answered(std::time::Instant::now(), healthy, trial) {
                    events::Breaker { server: &server.name, open: !closed }.emit();
                }
                self.probe();
            }
            Input::Fate { meta, fate } => self.fate(meta, *fate),
            Input::FollowFreed => {}
            Input::Probed { server, there } => {
                let server = &mut self.servers[server];
                if server.breaker.probed(std::time::Instant::now(), there) {
                    events::Breaker { server: &server.name, open: true }.emit();
                }
            }
            Input::Revived(keys) => {
                for key in keys {
                    if let Some((meta, message)) = self.dead.remove(&key) {
                        events::KeyHeld { tenant: &key.tenant, held: false, keys: self.dead.len() }.emit();
                        self.scheduler.requeue(meta, message);
                    }
                }
            }
        }
    }

    fn done(&mut self, done: Result<(Slot, Fate), tokio::task::JoinError>) {
        let (slot, fate) = match done {
            Ok(done) => done,
            // The task's slot and message are gone with it: the process starts anew.
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => return,
            },
        };
        if !slot.freed {
            self.scheduler.slot_free(&slot.meta);
            if let Some(trial) = slot.trial {
                self.servers[self.server_of[slot.meta.route]].breaker.abandoned(trial);
            }
        }
        self.fate(slot.meta, fate);
    }

    fn fate(&mut self, meta: Meta, fate: Fate) {
        if !matches!(fate, Fate::Again { .. }) {
            self.pause = PAUSE_MIN;
        }
        match fate {
            Fate::Done => {
                if let Some(key) = &meta.order {
                    self.scheduler.key_done(key);
                }
            }
            Fate::Followed => {}
            Fate::Hold { message, at } => {
                self.next += 1;
                self.timed.push(Reverse((at, self.next)));
                self.timed_items.insert(self.next, (meta, message));
            }
            Fate::Dead { message, key } => {
                events::KeyHeld { tenant: &key.tenant, held: true, keys: self.dead.len() + 1 }.emit();
                self.dead.insert(key, (meta, message));
            }
            Fate::Again { message, error } => {
                if self.paused_until.is_none() {
                    events::Waiting { what: "ledger", error: &error }.emit();
                    self.paused_until = Some(Instant::now() + self.pause.mul_f64(0.5 + fastrand::f64() / 2.0));
                    self.pause = (self.pause * 2).min(PAUSE_MAX);
                }
                self.last_error = Some(error);
                self.scheduler.requeue(meta, message);
            }
        }
    }

    /// Looks after servers whose time it is.
    fn probe(&mut self) {
        let now = std::time::Instant::now();
        for (server, at) in self.servers.iter_mut().zip(0..) {
            if server.breaker.probe(now) {
                let (n8n, url, to_worker) = (self.ctx.n8n.clone(), server.url.clone(), self.ctx.to_worker.clone());
                self.chores.spawn(async move {
                    let there = n8n.reachable(&url).await;
                    let _ = to_worker.send(Input::Probed { server: at, there }).await;
                });
            }
        }
    }

    fn tick(&mut self) {
        while self.chores.try_join_next().is_some() {}
        self.probe();
        // A room that empties quickly lets others in by itself.
        if std::mem::take(&mut self.picked) < THIN_OUT / 4 && self.scheduler.waiting() >= WAITING_MAX {
            let out = self.scheduler.thin_out(THIN_OUT);
            let broker = self.ctx.broker.clone();
            self.chores.spawn(async move {
                for message in out {
                    broker.release(message, THIN_OUT_AGAIN).await;
                }
            });
        }
        let (waiting, behind, working) = (self.scheduler.waiting(), self.scheduler.behind(), self.tasks.len());
        let following = self.ctx.config.delivery.follow_max as usize - self.ctx.follow_slots.available_permits();
        events::Queue { waiting, behind, working, following }.emit();
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        *status = Status {
            paused: self.room.paused.load(Ordering::Acquire),
            waiting,
            behind_ordering_keys: behind,
            retry_waits: self.timed_items.len(),
            working,
            following,
            keys_held: self.dead.len(),
            breakers_open: self.servers.iter().filter(|s| s.breaker.is_down()).map(|s| s.name.clone()).collect(),
            last_error: self.last_error.clone(),
        };
    }

    /// Asks the ledger which dead letters that hold a key were replayed or discarded.
    fn poll_dead(&mut self) {
        let start = fastrand::usize(..self.dead.len());
        let keys: Vec<Key> =
            self.dead.keys().cycle().skip(start).take(self.dead.len().min(DEAD_POLL_MAX)).cloned().collect();
        let ctx = self.ctx.clone();
        self.chores.spawn(async move {
            let mut revived = Vec::new();
            for key in keys {
                // An error says nothing: the next round asks again.
                if let Ok(row) = ctx.store.get(&key, false).await
                    && row.is_none_or(|row| row.state != crate::event::State::Dead)
                {
                    revived.push(key);
                }
            }
            if !revived.is_empty() {
                let _ = ctx.to_worker.send(Input::Revived(revived)).await;
            }
        });
    }

    /// Everything that was not begun goes back to the broker.
    async fn give_back(&mut self, messages: &mut mpsc::Receiver<Vec<Received>>) {
        let mut all = self.scheduler.drain();
        all.extend(std::mem::take(&mut self.timed_items).into_values().map(|(_, message)| message));
        all.extend(std::mem::take(&mut self.dead).into_values().map(|(_, message)| message));
        while let Ok(batch) = messages.try_recv() {
            all.extend(batch);
        }
        for message in all {
            self.ctx.broker.release(message, Duration::ZERO).await;
        }
    }
}

/// Messages without a valid reference share one turn.
fn rejected_tenant() -> crate::ids::Tenant {
    crate::ids::Tenant::try_new("0").expect("a valid name")
}
