//! What the clock starts: due events, the sweeper, the renewal of claims, the collection of old rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::work::Ctx;
use crate::broker::Outgoing;
use crate::clock::Timestamp;
use crate::config::routes::ConsumerKind;
use crate::event::{Envelope, State};
use crate::observe::delivery as events;
use crate::payloads::{Change, Due, Transition};
use crate::references;

/// References of one round.
const ROUND: usize = 500;
/// Rounds of one sweep: a long backlog in the broker is open work too, and looking through it must not keep the ledger busy.
const SWEEP_ROUNDS: usize = 20;
/// Due events remembered while their message is held here.
const SKIPPED_MAX: usize = 10_000;
/// The ledger is asked for due events at least this often: another appliance, a replay or an earlier run of this one may
/// have made them.
const POLL: Duration = Duration::from_secs(1);
/// Not more often than this, however many alarms there are.
const POLL_MIN: Duration = Duration::from_millis(50);
/// Old rows are looked for this often, and deleted in bites with pauses, so that the database stays free for the work.
const COLLECT_EVERY: Duration = Duration::from_secs(60);
const COLLECT_BITE: usize = 500;
const COLLECT_PAUSE: Duration = Duration::from_millis(100);

/// Wakes the timer at a time. Cheap to clone.
#[derive(Clone)]
pub struct Alarm {
    next: Arc<AtomicI64>,
    changed: Arc<Notify>,
}

impl Default for Alarm {
    fn default() -> Self {
        Self { next: Arc::new(AtomicI64::new(i64::MAX)), changed: Arc::default() }
    }
}

impl Alarm {
    /// Something is due at `at`.
    pub fn at(&self, at: Timestamp) {
        if self.next.fetch_min(at.0, Ordering::AcqRel) > at.0 {
            self.changed.notify_one();
        }
    }

    /// Something is due now.
    pub fn now(&self) {
        self.at(Timestamp(0));
    }
}

/// Publishes again what is due: retries that were parked, delayed events, replays.
pub(super) async fn due_loop(ctx: Arc<Ctx>) {
    let mut unpublished: Vec<Due> = Vec::new();
    // Due, but this process held their message, or was just letting go of it.
    let mut skipped: Vec<Due> = Vec::new();
    loop {
        let next = Timestamp(ctx.alarm.next.load(Ordering::Acquire));
        let wait = if next.0 == i64::MAX { POLL } else { ctx.span_until(next).min(POLL) };
        tokio::select! {
            () = ctx.shutdown.cancelled() => return,
            () = tokio::time::sleep(wait.max(POLL_MIN)) => {}
            () = ctx.alarm.changed.notified() => {
                // The new alarm may lie in the future: look at it before asking the ledger.
                let next = Timestamp(ctx.alarm.next.load(Ordering::Acquire));
                if ctx.span_until(next) > POLL_MIN {
                    continue;
                }
            }
        }
        ctx.alarm.next.store(i64::MAX, Ordering::Release);
        // What was marked as handed out is kept until the broker has it.
        while !unpublished.is_empty() {
            unpublished = publish(&ctx, std::mem::take(&mut unpublished), "timer").await;
            if !unpublished.is_empty() && pause(&ctx, POLL).await {
                return;
            }
        }
        match ctx.store.due(ROUND).await {
            Ok(due) => {
                if due.len() == ROUND {
                    ctx.alarm.now();
                }
                let again = still_due(&ctx, &mut skipped).await;
                let (held, free): (Vec<_>, Vec<_>) = due.into_iter().partition(|due| ctx.is_held(&due.envelope.key()));
                skipped.extend(held);
                // Beyond, the ledger itself names them again after a minute.
                skipped.truncate(SKIPPED_MAX);
                unpublished = publish(&ctx, free.into_iter().chain(again).collect(), "timer").await;
            }
            Err(error) => {
                events::Waiting { what: "ledger", error: &error.to_string() }.emit();
                if pause(&ctx, POLL).await {
                    return;
                }
            }
        }
    }
}

/// Of what was skipped and is held no more: what the ledger still says is due, such as an event that was replayed while this
/// process was still letting go of it.
async fn still_due(ctx: &Ctx, skipped: &mut Vec<Due>) -> Vec<Due> {
    let mut still = Vec::new();
    for due in std::mem::take(skipped) {
        let key = due.envelope.key();
        if ctx.is_held(&key) {
            skipped.push(due);
            continue;
        }
        match ctx.store.get(&key, false).await {
            Ok(Some(row)) if row.state == State::Relayed && row.next_at.is_none_or(|at| at <= ctx.clock.now()) => {
                still.push(due);
            }
            Ok(_) => {}
            Err(_) => skipped.push(due),
        }
    }
    still
}

/// Publishes again what is open although the broker has nothing of it: after the loss of a broker's data, after a crash
/// between two steps, after the death of whoever followed it.
pub(super) async fn sweep_loop(ctx: Arc<Ctx>) {
    let config = &ctx.config.delivery;
    let started = ctx.clock.now();
    let first = Instant::now();
    // What a former process of this appliance left behind shows when its claims have run out.
    let reconcile = config.claim.0 + config.sweep_interval.0 * 2;
    let mut every = Duration::from_secs(1).min(config.sweep_interval.0);
    loop {
        if pause(&ctx, every).await {
            return;
        }
        let fresh = first.elapsed() < reconcile;
        every = if fresh { config.sweep_interval.0.min(config.claim.0 / 2) } else { config.sweep_interval.0 };
        let before = ctx.clock.now().minus(config.sweep_after.0);
        let before = if fresh { started.max(before) } else { before };
        if let Err(error) = sweep(&ctx, before).await {
            events::Waiting { what: "ledger", error: &error }.emit();
        }
    }
}

async fn sweep(ctx: &Ctx, before: Timestamp) -> Result<(), String> {
    // Topics in which something waits: what was never tried stands in that line, and is not lost.
    let backlog = ctx.broker.backlog().await.map_err(|error| error.to_string())?;
    let waits = |envelope: &Envelope| {
        let external = ctx.config.route(&envelope.route).consumer == ConsumerKind::External;
        backlog
            .iter()
            .filter(|b| b.topic == envelope.topic.as_str())
            .any(|b| b.waiting > 0 || (external && b.unacknowledged > 0))
    };
    for _ in 0..SWEEP_ROUNDS {
        let stale = ctx.store.stale(before, ROUND).await.map_err(|error| error.to_string())?;
        let full = stale.len() == ROUND;
        let lost: Vec<Due> = stale
            .into_iter()
            .filter(|due| !ctx.is_held(&due.envelope.key()) && (due.attempts > 0 || !waits(&due.envelope)))
            .collect();
        let count = lost.len();
        // What the broker does not take comes again when its window is over.
        let failed = publish(ctx, lost, "sweeper").await;
        if !full || (count > 0 && failed.len() == count) || ctx.shutdown.is_cancelled() {
            break;
        }
    }
    Ok(())
}

/// Publishes references anew and returns what the broker did not take.
async fn publish(ctx: &Ctx, due: Vec<Due>, by: &'static str) -> Vec<Due> {
    if due.is_empty() {
        return due;
    }
    let now = ctx.clock.now();
    let outgoing: Vec<Outgoing> = due.iter().map(|due| references::outgoing(&ctx.config, &due.envelope, now)).collect();
    let results = ctx.broker.publish(outgoing).await;
    let mut failed = Vec::new();
    let mut count = 0;
    for (due, result) in due.into_iter().zip(results) {
        match result {
            Ok(_) => count += 1,
            Err(error) => {
                if failed.is_empty() {
                    events::Waiting { what: "broker", error: &error.to_string() }.emit();
                }
                failed.push(due);
            }
        }
    }
    if count > 0 {
        events::Republished { by, count }.emit();
    }
    failed
}

/// Keeps the claims of everything that takes longer than a third of a claim.
pub(super) async fn renew_loop(ctx: Arc<Ctx>) {
    let claim = ctx.config.delivery.claim.0;
    loop {
        // Goes on while the drain lets running attempts finish.
        tokio::select! {
            () = tokio::time::sleep(claim / 4) => {}
            () = ctx.to_worker.closed() => return,
        }
        let until = ctx.clock.now().plus(claim);
        let transitions: Vec<Transition> = ctx
            .active()
            .iter()
            .filter(|(_, active)| active.since.elapsed() > claim / 5)
            .map(|(key, active)| Transition { key: key.clone(), token: active.token, change: Change::Renew { until } })
            .collect();
        for part in transitions.chunks(ROUND) {
            // Who lost its claim finds out at its next step; who cannot renew now tries again in a moment.
            if let Err(error) = ctx.store.apply(part.to_vec()).await {
                events::Waiting { what: "ledger", error: &error.to_string() }.emit();
            }
        }
    }
}

pub(super) async fn collect_loop(ctx: Arc<Ctx>) {
    while !pause(&ctx, COLLECT_EVERY).await {
        loop {
            match ctx.store.collect(COLLECT_BITE).await {
                Ok(collected) if (collected.payloads.max(collected.rows) as usize) < COLLECT_BITE => break,
                Ok(_) => {}
                Err(error) => {
                    events::Waiting { what: "ledger", error: &error.to_string() }.emit();
                    break;
                }
            }
            if pause(&ctx, COLLECT_PAUSE).await {
                return;
            }
        }
    }
}

/// `true` when the process is to end.
async fn pause(ctx: &Ctx, wait: Duration) -> bool {
    tokio::select! {
        () = ctx.shutdown.cancelled() => true,
        () = tokio::time::sleep(wait) => false,
    }
}
