//! One event from the broker's message to its acknowledgement: the only place that decides what happens to a message.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::batch::Batch;
use super::breaker::Trial;
use super::follow::Followed;
use super::scheduler::Meta;
use super::timer::Alarm;
use super::verdict::{self, Judged, Verdict};
use super::webhook::{self, Attempted};
use super::worker::Input;
use crate::broker::{self, Broker, Received, Verified};
use crate::clock::{Clock, Timestamp};
use crate::config::routes::{ConsumerKind, OnDead};
use crate::config::{EnvironmentConfig, Route};
use crate::event::State;
use crate::ids::{BodyHash, Key};
use crate::n8n::{self, Execution, Lookup, N8n, Signer};
use crate::observe::delivery as events;
use crate::observe::trace::{self, TraceContext};
use crate::payloads::{self, Attempt, Change, ClaimRequest, Claimed, Row, Store, Take, Taken, Transition};
use crate::references;

/// Tries to put a dead letter into the broker's topic, which is for people: the ledger has it already.
const DEAD_LETTER_TRIES: u32 = 3;
/// A message that nothing can be done with at the moment comes back after this.
const LATER: Duration = Duration::from_secs(2);
/// Clocks of broker, ledger and appliance round differently: a little later is due for all of them.
const DUE_SLACK: Duration = Duration::from_millis(20);

/// What everything here works with.
pub(super) struct Ctx {
    pub config: Arc<EnvironmentConfig>,
    pub store: Store,
    pub broker: Broker,
    pub n8n: N8n,
    pub clock: Clock,
    pub on_final: super::OnFinal,
    pub signer: Signer,
    pub takes: Batch<Take, Taken, payloads::Error>,
    pub transitions: Batch<Transition, bool, payloads::Error>,
    pub acks: Batch<Received, (), broker::Error>,
    pub looks: Batch<Lookup, Option<Execution>, n8n::Error>,
    /// Events that this process works on or follows, with their claims: renewed together, and duplicates are told by it.
    pub active: Mutex<HashMap<Key, Active>>,
    /// Events whose message this process, or the broker for it, holds until then: the timer need not publish them.
    pub held: Mutex<HashMap<Key, Instant>>,
    /// Claims of others that were met: met again with a later end, their owner is alive.
    pub foreign: Mutex<HashMap<Key, Timestamp>>,
    pub to_worker: mpsc::Sender<Input>,
    pub to_follower: mpsc::Sender<Followed>,
    pub follow_slots: Arc<Semaphore>,
    pub alarm: Alarm,
    pub shutdown: CancellationToken,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Active {
    pub token: i64,
    pub since: Instant,
    /// Its message was acknowledged: the ledger's row remembers it.
    pub following: bool,
}

/// Entries of [`Ctx::held`] and [`Ctx::foreign`] before the old ones are dropped: both only save work.
const NOTES_MAX: usize = 10_000;

impl Ctx {
    pub fn active(&self) -> MutexGuard<'_, HashMap<Key, Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the message of `key` is kept until `until`.
    fn hold(&self, key: &Key, until: Instant) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.len() >= NOTES_MAX {
            let now = Instant::now();
            held.retain(|_, until| *until > now);
        }
        if held.len() < NOTES_MAX {
            held.insert(key.clone(), until);
        }
    }

    pub fn is_held(&self, key: &Key) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        // Past its time the message should have come: the timer may publish again.
        held.get(key).is_some_and(|until| *until + LATER > Instant::now()) || self.active().contains_key(key)
    }

    /// Whether the owner of a claim was met before with an earlier end, and so is alive.
    fn owner_lives(&self, key: &Key, until: Timestamp) -> bool {
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        if foreign.len() >= NOTES_MAX {
            foreign.clear();
        }
        foreign.insert(key.clone(), until).is_some_and(|before| before < until)
    }

    pub fn span_until(&self, at: Timestamp) -> Duration {
        at.since(self.clock.now())
    }

    /// Writes a transition, again and again until the ledger answers. `false`: the claim is somebody else's by now.
    pub async fn settle(&self, key: &Key, token: i64, change: Change) -> bool {
        let mut pause = Duration::from_millis(50);
        loop {
            let transition = Transition { key: key.clone(), token, change: change.clone() };
            match self.transitions.call(transition).await {
                Ok(applied) => return applied,
                Err(error) => {
                    events::Waiting { what: "ledger", error: &error.to_string() }.emit();
                    tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                    pause = (pause * 2).min(LATER);
                }
            }
        }
    }

    /// A message that cannot be acknowledged comes again, and its row says that it is done.
    pub async fn ack(&self, message: Received) {
        if let Err(error) = self.acks.call(message).await {
            events::Waiting { what: "broker", error: &error.to_string() }.emit();
        }
    }

    pub fn ended(&self, key: &Key, row: &Row, state: State, error: Option<&str>) {
        let after = self.clock.now().since(row.envelope.accepted_at);
        events::Ended { key, route: &self.config.route(&row.envelope.route).name, state, after, error }.emit();
        (self.on_final)(key, state);
    }
}

/// A slot of the scheduler, with what was taken up together with it. The worker gets it back with the event's fate.
pub(super) struct Slot {
    pub meta: Meta,
    pub trial: Option<Trial>,
    /// Taken before the event of a route that follows.
    pub follow: Option<OwnedSemaphorePermit>,
    /// The slot was given back as soon as the call was over.
    pub freed: bool,
}

impl Slot {
    async fn free(&mut self, ctx: &Ctx, healthy: Option<bool>) {
        self.freed = true;
        let input = Input::Called { meta: self.meta.clone(), trial: self.trial.take(), healthy };
        // The worker ends after the last slot is back.
        let _ = ctx.to_worker.send(input).await;
    }

    fn ordered(&self) -> bool {
        self.meta.order.is_some()
    }
}

/// What is left to do with the message.
pub(super) enum Fate {
    /// Nothing: acknowledged, or given back to the broker.
    Done,
    /// Its ordering key waits for it: try again then.
    Hold { message: Received, at: Instant },
    /// It is dead and holds its ordering key.
    Dead { message: Received, key: Key },
    /// The ledger does not answer: again after a pause.
    Again { message: Received, error: String },
    /// The follower has it, with its message when it holds an ordering key.
    Followed,
}

/// Ends an event's entry in [`Ctx::active`].
struct Working<'a> {
    ctx: &'a Ctx,
    key: &'a Key,
    kept: bool,
}

impl<'a> Working<'a> {
    fn new(ctx: &'a Ctx, key: &'a Key, token: i64) -> Self {
        ctx.active().insert(key.clone(), Active { token, since: Instant::now(), following: false });
        Self { ctx, key, kept: false }
    }
}

impl Drop for Working<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.ctx.active().remove(self.key);
        }
    }
}

/// A granted event on its way.
struct Granted {
    row: Row,
    token: i64,
    route: Route,
    message: Received,
    /// The attempt as it was begun.
    attempt: Attempt,
}

pub(super) async fn work(ctx: &Ctx, slot: &mut Slot, message: Received) -> Fate {
    let Verified { claims, expired } = match &message.reference {
        Ok(verified) => verified.clone(),
        Err(rejection) => {
            let reason = rejection.to_string();
            return reject(ctx, slot, message, "reference", &reason).await;
        }
    };
    let key = claims.key();
    let active = ctx.active().get(&key).copied();
    if let Some(active) = active {
        // A second message of what is being done here. It may be the very same one, given again after a reconnect: before the
        // ledger remembers the event, acknowledging it could leave nothing behind.
        if active.following {
            ctx.ack(message).await;
            return Fate::Done;
        }
        return later(ctx, slot, message, &key, LATER).await;
    }
    let (now, taken_at) = (ctx.clock.now(), Instant::now());
    // Not covered by the signature: a wrong one spoils a trace, nothing else.
    let parent = TraceContext::from_header(message.properties.get("traceparent").map(String::as_str), 0.0);
    let attempt = Attempt {
        number: 0,
        started_at: now,
        duration_ms: None,
        status: None,
        error_class: None,
        error: None,
        n8n_execution_id: None,
        message_id: Some(message.message_id.clone()),
        traceparent: Some(parent.child().to_string()),
    };
    let take = Take {
        request: ClaimRequest { key: key.clone(), body_hash: claims.payload_sha256 },
        begin: Some(attempt.clone()),
    };
    let taken = match ctx.takes.call(take).await {
        Ok(taken) => taken,
        Err(error) => return Fate::Again { message, error: error.to_string() },
    };
    let (row, token) = match taken.claimed {
        Claimed::Granted { row, token } => (*row, token),
        Claimed::Final(state) => return already(ctx, slot, message, key, state).await,
        Claimed::Held(until) => return held(ctx, slot, message, &key, until).await,
        Claimed::NotDue(at) => return not_due(ctx, slot, message, &key, at).await,
        Claimed::Unknown => {
            let (kind, reason) = if expired {
                ("expired_unknown", "the reference is expired and the ledger has no such event")
            } else {
                ("unknown", "the ledger has no such event, although its row is written before its reference is sent")
            };
            return reject(ctx, slot, message, kind, reason).await;
        }
        Claimed::Mismatch => {
            let reason = "the ledger has this event with another body than the reference was signed for";
            return reject(ctx, slot, message, "mismatch", reason).await;
        }
    };
    let mut working = Working::new(ctx, &key, token);
    if row.envelope.topic != claims.topic {
        ctx.settle(&key, token, Change::Release).await;
        let reason =
            format!("the event belongs to topic {}, the reference is signed for {}", row.envelope.topic, claims.topic);
        return reject(ctx, slot, message, "topic", &reason).await;
    }
    let route = ctx.config.route(&row.envelope.route).clone();
    if route.consumer == ConsumerKind::External || ctx.shutdown.is_cancelled() {
        ctx.settle(&key, token, Change::Release).await;
        ctx.broker.release(message, if ctx.shutdown.is_cancelled() { Duration::ZERO } else { LATER }).await;
        return Fate::Done;
    }
    let attempt = Attempt { number: row.attempts, ..attempt };
    let mut granted = Granted { row, token, route, message, attempt };
    match earlier_run(ctx, &granted, taken.begun).await {
        Earlier::None if taken.begun => {}
        Earlier::None => {
            if granted.row.attempts as u64 >= granted.route.retry.attempts_max {
                let text = "the last attempt was interrupted, and no run of it is known";
                return dead(ctx, slot, granted, None, "interrupted", text.to_owned()).await;
            }
            granted.attempt.number = granted.row.attempts + 1;
            if !ctx.settle(&key, token, Change::Begin(granted.attempt.clone())).await {
                return lost(ctx, slot, granted.message, &key).await;
            }
        }
        Earlier::Run { id, traceparent, started_at } => {
            // The run of the former attempt stands for this one: nothing is called.
            slot.free(ctx, None).await;
            let attempt = Attempt {
                number: if taken.begun { granted.row.attempts } else { granted.row.attempts.max(1) },
                started_at,
                duration_ms: Some(0),
                traceparent,
                n8n_execution_id: id,
                ..granted.attempt.clone()
            };
            return answered(ctx, slot, granted, attempt, &mut working).await;
        }
        Earlier::AskAgain(error) => {
            events::Waiting { what: "n8n", error: &error }.emit();
            ctx.settle(&key, token, Change::Release).await;
            return later(ctx, slot, granted.message, &key, LATER).await;
        }
    }
    let Some(body) = taken.body else {
        return dead(ctx, slot, granted, None, "payload_missing", "its payload is not in the store".to_owned()).await;
    };
    if BodyHash::of(&body) != claims.payload_sha256 {
        let text = "the stored payload is not the one that was accepted (SHA-256 differs)".to_owned();
        events::Rejected {
            topic: &granted.message.topic,
            message_id: &granted.message.message_id,
            kind: "mismatch",
            reason: &text,
        }
        .emit();
        return dead(ctx, slot, granted, None, "payload_mismatch", text).await;
    }
    let traceparent = granted.attempt.traceparent.clone().unwrap_or_default();
    let attempted = Attempted {
        envelope: &granted.row.envelope,
        body,
        number: granted.attempt.number,
        traceparent: &traceparent,
        now: ctx.clock.now(),
    };
    let call = match webhook::call(&ctx.n8n, &granted.route, &ctx.signer, attempted) {
        Ok(call) => call,
        Err(text) => return dead(ctx, slot, granted, None, "config", text).await,
    };
    // Stopped or suspended since: somebody else may have the event by now.
    if taken_at.elapsed() >= ctx.config.delivery.claim.0 {
        let until = ctx.clock.now().plus(ctx.config.delivery.claim.0);
        if !ctx.settle(&key, token, Change::Renew { until }).await {
            return lost(ctx, slot, granted.message, &key).await;
        }
    }
    let trial = slot.trial.is_some();
    let begun = Instant::now();
    let outcome = ctx.n8n.call(call).await;
    let took = begun.elapsed();
    let judged = verdict::judge(&outcome, ctx.clock.now());
    slot.free(ctx, judged.healthy).await;
    tell(&key, &granted, parent, &judged, took);
    let mut attempt = Attempt {
        duration_ms: Some(took.as_millis() as u64),
        status: judged.status,
        error_class: judged.class.map(str::to_owned),
        error: judged.text.clone(),
        ..granted.attempt.clone()
    };
    match judged.verdict {
        Verdict::Delivered => {
            attempt.n8n_execution_id = outcome.ok().as_ref().and_then(verdict::execution_id);
            answered(ctx, slot, granted, attempt, &mut working).await
        }
        Verdict::Dead => {
            let (class, text) = (judged.class.unwrap_or("http_4xx"), judged.text.unwrap_or_default());
            dead(ctx, slot, granted, Some(attempt), class, text).await
        }
        // The one event that went first to a server that is still down has spent no attempt: nobody has seen it.
        Verdict::Retry { .. } if trial && judged.class == Some("connect") => {
            ctx.settle(&key, token, Change::Release).await;
            later(ctx, slot, granted.message, &key, ctx.config.delivery.breaker_open.0).await
        }
        Verdict::Retry { after } => {
            // Neither is it the end of one that was answered "down" or "less": it was sent to find out.
            let may_end = !(trial && judged.healthy == Some(false));
            retry(ctx, slot, granted, attempt, after, may_end, &judged_error(&judged)).await
        }
    }
}

fn judged_error(judged: &Judged) -> (&'static str, String) {
    (judged.class.unwrap_or("error"), judged.text.clone().unwrap_or_default())
}

/// Log, metrics and span of an attempt.
fn tell(key: &Key, granted: &Granted, parent: TraceContext, judged: &Judged, took: Duration) {
    let class = judged.class.unwrap_or("2xx");
    let shown = match class {
        "http_3xx" => "3xx",
        "http_4xx" => "4xx",
        "http_5xx" => "5xx",
        other => other,
    };
    crate::observe::n8n::Called { class: shown, took }.emit();
    let (route, number) = (granted.route.name.as_str(), granted.attempt.number);
    events::Attempted { key, route, number, status: judged.status, class: judged.class, took }.emit();
    if trace::enabled()
        && let Some(context) = granted.attempt.traceparent.as_deref().and_then(|t| t.parse::<TraceContext>().ok())
    {
        trace::record(trace::Span {
            name: "deliver",
            kind: trace::Kind::Client,
            context,
            parent: Some(parent.span_id),
            started_at: granted.attempt.started_at,
            duration: took,
            attributes: vec![
                ("dealscale.execution_id", key.execution_id.to_string()),
                ("dealscale.tenant", key.tenant.to_string()),
                ("dealscale.route", route.to_owned()),
                ("dealscale.attempt", number.to_string()),
                ("http.response.status_code", judged.status.map_or_else(String::new, |s| s.to_string())),
            ],
            error: judged.class.map(str::to_owned),
        });
    }
}

/// What is known about the attempt before this one.
enum Earlier {
    /// It did not happen, had an outcome that is known, or cannot be looked up.
    None,
    Run {
        id: Option<String>,
        traceparent: Option<String>,
        started_at: Timestamp,
    },
    /// n8n cannot tell at the moment.
    AskAgain(String),
}

/// Whether the attempt before this one is running, or ran, in n8n although nobody knows its answer.
async fn earlier_run(ctx: &Ctx, granted: &Granted, begun: bool) -> Earlier {
    let row = &granted.row;
    // A granted row brings the attempt that is open: ours when it was begun, or what an earlier owner left.
    let earlier = if !begun {
        row.history.last().cloned()
    } else if row.attempts > 1 && ctx.n8n.can_follow() && row.error_class.as_deref().is_some_and(verdict::is_ambiguous)
    {
        match ctx.store.get(&row.envelope.key(), true).await {
            Ok(row) => row.and_then(|row| row.history.into_iter().rev().nth(1)),
            Err(error) => return Earlier::AskAgain(error.to_string()),
        }
    } else {
        None
    };
    let Some(earlier) = earlier else { return Earlier::None };
    let answered = earlier.error_class.is_none() && earlier.duration_ms.is_some();
    let run = |id: Option<String>| Earlier::Run {
        id,
        traceparent: earlier.traceparent.clone(),
        started_at: earlier.started_at,
    };
    if answered {
        // It was answered 2xx and then followed by an owner that is gone.
        return run(earlier.n8n_execution_id.clone());
    }
    let unknown = earlier.duration_ms.is_none() || earlier.error_class.as_deref().is_some_and(verdict::is_ambiguous);
    if !unknown || !ctx.n8n.can_follow() || earlier.traceparent.is_none() {
        return Earlier::None;
    }
    let lookup = Lookup { id: None, traceparent: earlier.traceparent.clone(), not_before: earlier.started_at };
    match ctx.looks.call(lookup).await {
        Ok(Some(execution)) => run(Some(execution.id)),
        Ok(None) => Earlier::None,
        Err(error) => {
            // A source that never answers must not hold the event for ever: sent twice is better than not at all.
            let patience = ctx.config.delivery.follow_lost_after.0 + granted.route.timeout.0;
            if ctx.clock.now().since(earlier.started_at) > patience {
                Earlier::None
            } else {
                Earlier::AskAgain(error.to_string())
            }
        }
    }
}

/// n8n has it: final, or on to be followed.
async fn answered(ctx: &Ctx, slot: &mut Slot, granted: Granted, attempt: Attempt, working: &mut Working<'_>) -> Fate {
    let Granted { row, token, route, message, .. } = granted;
    let key = row.envelope.key();
    let permit = match slot.follow.take() {
        _ if !(route.follow && ctx.n8n.can_follow()) => None,
        Some(permit) => Some(permit),
        // The message named another route than the event has.
        None => ctx.follow_slots.clone().acquire_owned().await.ok(),
    };
    let Some(permit) = permit else {
        let finish = Change::Finish {
            n8n_execution_id: attempt.n8n_execution_id.clone(),
            attempt: Some(attempt),
            state: State::Delivered,
            error_class: None,
            error: None,
        };
        if !ctx.settle(&key, token, finish).await {
            return lost(ctx, slot, message, &key).await;
        }
        ctx.ended(&key, &row, State::Delivered, None);
        ctx.ack(message).await;
        return Fate::Done;
    };
    let until = ctx.clock.now().plus(ctx.config.delivery.claim.0);
    if !ctx.settle(&key, token, Change::Follow { attempt: attempt.clone(), until }).await {
        return lost(ctx, slot, message, &key).await;
    }
    let message = if slot.ordered() {
        Some((slot.meta.clone(), message))
    } else {
        // From here on the ledger's row is what remembers it.
        if let Some(active) = ctx.active().get_mut(&key) {
            active.following = true;
        }
        ctx.ack(message).await;
        None
    };
    let followed = Followed { key, row, token, route, attempt, message, permit, found: false, missing_since: None };
    working.kept = true;
    if ctx.to_follower.send(followed).await.is_err() {
        working.kept = false;
    }
    Fate::Followed
}

/// Again by the schedule, or dead when the schedule is at its end and this may be the last attempt.
async fn retry(
    ctx: &Ctx,
    slot: &Slot,
    granted: Granted,
    attempt: Attempt,
    after: Option<Duration>,
    may_end: bool,
    error: &(&'static str, String),
) -> Fate {
    let (class, text) = error;
    let number = u64::from(attempt.number);
    if may_end && number >= granted.route.retry.attempts_max {
        let text = format!("{text} (attempt {number} of {})", granted.route.retry.attempts_max);
        return dead(ctx, slot, granted, Some(attempt), class, text).await;
    }
    let key = granted.row.envelope.key();
    let wait = verdict::wait(&granted.route.retry, number + 1, after, fastrand::f64());
    let next_at = ctx.clock.now().plus(wait);
    ctx.hold(&key, Instant::now() + wait);
    let change = Change::Retry {
        attempt: Some(attempt),
        next_at,
        crashed: false,
        error_class: Some((*class).to_owned()),
        error: Some(text.clone()),
    };
    if !ctx.settle(&key, granted.token, change).await {
        return lost(ctx, slot, granted.message, &key).await;
    }
    not_due(ctx, slot, granted.message, &key, next_at).await
}

/// Dead: durable in the ledger first, then in the broker's dead-letter topic.
async fn dead(ctx: &Ctx, slot: &Slot, granted: Granted, attempt: Option<Attempt>, class: &str, text: String) -> Fate {
    let Granted { row, token, route, message, attempt: begun, .. } = granted;
    let key = row.envelope.key();
    // An attempt that was begun and made no call ends here too.
    let attempt = attempt.unwrap_or_else(|| Attempt {
        duration_ms: Some(0),
        error_class: Some(class.to_owned()),
        error: Some(text.clone()),
        ..begun
    });
    let finish = Change::Finish {
        attempt: Some(attempt),
        state: State::Dead,
        error_class: Some(class.to_owned()),
        error: Some(text.clone()),
        n8n_execution_id: None,
    };
    if !ctx.settle(&key, token, finish).await {
        return lost(ctx, slot, message, &key).await;
    }
    ctx.ended(&key, &row, State::Dead, Some(&text));
    letter(ctx, &message, &format!("{class}: {text}")).await;
    if slot.ordered() && route.on_dead == OnDead::Hold {
        return Fate::Dead { message, key };
    }
    ctx.ack(message).await;
    Fate::Done
}

/// Into the broker's dead-letter topic. `false`: it would not go.
pub(super) async fn letter(ctx: &Ctx, message: &Received, reason: &str) -> bool {
    repeat(|| ctx.broker.dead_letter(&message.topic, &message.raw, message.dead_letter_properties(), reason)).await
}

/// The same for an event that was followed, whose message is gone.
pub(super) async fn letter_anew(ctx: &Ctx, row: &Row, reason: &str) {
    let out = references::outgoing(&ctx.config, &row.envelope, ctx.clock.now());
    repeat(|| ctx.broker.dead_letter_anew(out.clone(), reason)).await;
}

async fn repeat<F: Future<Output = Result<(), broker::Error>>>(send: impl Fn() -> F) -> bool {
    for n in 1..=DEAD_LETTER_TRIES {
        match send().await {
            Ok(()) => return true,
            Err(error) => {
                events::Waiting { what: "broker", error: &error.to_string() }.emit();
                tokio::time::sleep(Duration::from_millis(100) * n).await;
            }
        }
    }
    false
}

/// Never delivered: into the dead letters with the reason, in the ledger's database and in the broker.
async fn reject(ctx: &Ctx, slot: &Slot, message: Received, kind: &'static str, reason: &str) -> Fate {
    events::Rejected { topic: &message.topic, message_id: &message.message_id, kind, reason }.emit();
    let kept = ctx.store.reject(&message.topic, &message.message_id, reason, &message.raw).await;
    if let Err(error) = kept {
        return Fate::Again { message, error: error.to_string() };
    }
    if !letter(ctx, &message, reason).await {
        let key = message.reference.as_ref().map(|v| v.claims.key());
        return match key {
            Ok(key) => later(ctx, slot, message, &key, LATER).await,
            Err(_) => {
                ctx.broker.release(message, LATER).await;
                Fate::Done
            }
        };
    }
    ctx.ack(message).await;
    Fate::Done
}

/// A message of an event that is final.
async fn already(ctx: &Ctx, slot: &Slot, message: Received, key: Key, state: State) -> Fate {
    let route = message.properties.get(references::ROUTE).map_or("", String::as_str);
    if state == State::Dead && slot.ordered() && ctx.config.route(route).on_dead == OnDead::Hold {
        // After a restart: the dead letter still holds its key.
        return Fate::Dead { message, key };
    }
    ctx.ack(message).await;
    Fate::Done
}

/// Somebody else's claim. Its end is waited for once; an owner that renewed it lives and does the work.
async fn held(ctx: &Ctx, slot: &Slot, message: Received, key: &Key, until: Timestamp) -> Fate {
    if ctx.owner_lives(key, until) && !slot.ordered() {
        ctx.ack(message).await;
        return Fate::Done;
    }
    // Spread, so that a dead owner's events do not come back in one moment.
    let wait = ctx.span_until(until) + DUE_SLACK + Duration::from_millis(fastrand::u64(0..500));
    later(ctx, slot, message, key, wait).await
}

/// Its time has not come: a short wait keeps the message, a long one is the ledger's, and an ordering key never lets go.
async fn not_due(ctx: &Ctx, slot: &Slot, message: Received, key: &Key, at: Timestamp) -> Fate {
    let wait = ctx.span_until(at) + DUE_SLACK;
    if slot.ordered() || wait <= ctx.config.delivery.hold_max.0 {
        return later(ctx, slot, message, key, wait).await;
    }
    ctx.held.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    ctx.ack(message).await;
    ctx.alarm.at(at);
    Fate::Done
}

async fn later(ctx: &Ctx, slot: &Slot, message: Received, key: &Key, wait: Duration) -> Fate {
    let at = Instant::now() + wait;
    ctx.hold(key, at);
    if slot.ordered() {
        return Fate::Hold { message, at };
    }
    ctx.broker.release(message, wait).await;
    Fate::Done
}

/// The claim ran out and somebody else has it: what was done here changes nothing any more.
async fn lost(ctx: &Ctx, slot: &Slot, message: Received, key: &Key) -> Fate {
    tracing::warn!(tenant = %key.tenant, execution_id = %key.execution_id, "the claim was lost to another owner");
    later(ctx, slot, message, key, LATER).await
}
