//! Watches n8n's executions to their end.
//!
//! All that are followed are asked for together, every `follow_interval`. Their claims are renewed meanwhile, so no other
//! appliance works on them; when this process dies, the claims run out, the sweeper publishes the events again, and whoever
//! takes them up finds the attempt's span in n8n and goes on following instead of calling.
//!
//! | n8n says | the event becomes |
//! |---|---|
//! | `success` | succeeded |
//! | `error` | again by the schedule with `redeliver_failed` (dead at its end), otherwise failed |
//! | `crashed` | again with `redeliver_crashed`, up to `crashes_max` times (dead then), otherwise failed |
//! | `canceled` | failed: somebody stopped it |
//! | nothing for `follow_lost_after` | unknown: n8n does not save it, or has deleted it |
//! | anything else | still followed, without a limit: n8n shows a crash as running until it starts again |
//!
//! While n8n's API or database cannot be read, nothing is concluded from not finding something.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use super::scheduler::Meta;
use super::verdict;
use super::work::{Ctx, Fate, letter, letter_anew};
use super::worker::Input;
use crate::broker::Received;
use crate::config::Route;
use crate::config::routes::OnDead;
use crate::event::State;
use crate::ids::Key;
use crate::n8n::{Execution, Lookup, Run};
use crate::observe;
use crate::payloads::{Attempt, Change, Row};

/// Between questions to a source that does not answer.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// An event whose execution is watched.
pub(super) struct Followed {
    pub key: Key,
    pub row: Row,
    pub token: i64,
    pub route: Route,
    /// The attempt that started the execution.
    pub attempt: Attempt,
    /// Kept while the event holds its ordering key.
    pub message: Option<(Meta, Received)>,
    pub permit: OwnedSemaphorePermit,
    /// The execution was found: its id is not only what an answer claimed.
    pub found: bool,
    /// Since when the execution is not found.
    pub missing_since: Option<Instant>,
}

/// What to do with one that ended. Pure.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Finish { state: State, class: Option<&'static str>, text: Option<String> },
    Again { crashed: bool, class: &'static str, text: String },
}

/// The table above.
fn end(run: Run, route: &Route, attempts: u32, crashes: u32) -> Option<End> {
    let finish = |state, class, text| Some(End::Finish { state, class: Some(class), text: Some(text) });
    match run {
        Run::Open => None,
        Run::Succeeded => Some(End::Finish { state: State::Succeeded, class: None, text: None }),
        Run::Cancelled => finish(State::Failed, "cancelled", "the execution was stopped in n8n".to_owned()),
        Run::Failed(text) if !route.redeliver_failed => finish(State::Failed, "error", text),
        Run::Failed(text) if u64::from(attempts) >= route.retry.attempts_max => finish(State::Dead, "error", text),
        Run::Failed(text) => Some(End::Again { crashed: false, class: "error", text }),
        Run::Crashed => {
            let text = "n8n died while it ran".to_owned();
            if !route.redeliver_crashed {
                finish(State::Failed, "crashed", text)
            } else if u64::from(crashes) >= route.crashes_max {
                finish(State::Dead, "crashed", format!("{text}, {} times", crashes + 1))
            } else {
                Some(End::Again { crashed: true, class: "crashed", text })
            }
        }
    }
}

pub(super) async fn follow_loop(ctx: Arc<Ctx>, mut incoming: mpsc::Receiver<Followed>) {
    let interval = ctx.config.delivery.follow_interval.0;
    let mut following: Vec<Followed> = Vec::new();
    let mut pause = interval;
    let mut next = Instant::now();
    loop {
        let stopping = ctx.shutdown.is_cancelled();
        tokio::select! {
            () = ctx.to_worker.closed() => {
                while let Ok(followed) = incoming.try_recv() {
                    following.push(followed);
                }
                return give_back(&ctx, following).await;
            }
            () = ctx.shutdown.cancelled(), if !stopping => give_back(&ctx, std::mem::take(&mut following)).await,
            Some(followed) = incoming.recv() => {
                if stopping {
                    give_back(&ctx, vec![followed]).await;
                    continue;
                }
                if following.is_empty() {
                    next = Instant::now() + interval.min(Duration::from_millis(500));
                }
                following.push(followed);
            }
            () = tokio::time::sleep_until(next), if !following.is_empty() => {
                let lookups: Vec<Lookup> = following.iter().map(lookup).collect();
                match ctx.n8n.look(&lookups).await {
                    Ok(found) => {
                        pause = interval;
                        following = looked(&ctx, following, found).await;
                    }
                    Err(error) => {
                        pause = (pause * 2).min(PAUSE_MAX.max(interval));
                        observe::n8n::LookupFailed { error: &error }.emit();
                        for followed in &mut following {
                            followed.missing_since = None;
                        }
                    }
                }
                next = Instant::now() + pause;
            }
        }
    }
}

fn lookup(followed: &Followed) -> Lookup {
    Lookup {
        id: followed.attempt.n8n_execution_id.clone(),
        traceparent: followed.attempt.traceparent.clone().filter(|_| !followed.found),
        not_before: followed.attempt.started_at,
    }
}

/// Ends what has ended and returns the rest.
async fn looked(ctx: &Ctx, following: Vec<Followed>, found: Vec<Option<Execution>>) -> Vec<Followed> {
    let mut rest = Vec::with_capacity(following.len());
    let mut ending = Vec::new();
    for (mut followed, execution) in following.into_iter().zip(found) {
        if !ctx.active().contains_key(&followed.key) {
            continue;
        }
        let ended = match execution {
            Some(Execution { id, run, .. }) => {
                (followed.missing_since, followed.found) = (None, true);
                followed.attempt.n8n_execution_id = Some(id);
                end(run, &followed.route, followed.row.attempts, followed.row.crashes)
            }
            None => {
                let since = *followed.missing_since.get_or_insert_with(Instant::now);
                (since.elapsed() >= ctx.config.delivery.follow_lost_after.0).then(|| End::Finish {
                    state: State::Unknown,
                    class: Some("lost"),
                    text: Some(
                        "n8n answered, but no execution of it can be found: n8n does not save it, or deleted it"
                            .to_owned(),
                    ),
                })
            }
        };
        match ended {
            Some(end) => ending.push(finish(ctx, followed, end)),
            None => rest.push(followed),
        }
    }
    // Together, so that their transitions share a transaction.
    join_all(ending).await;
    rest
}

async fn finish(ctx: &Ctx, followed: Followed, end: End) {
    let Followed { key, row, token, route, mut attempt, message, permit, .. } = followed;
    let (class, text) = match &end {
        End::Finish { class, text, .. } => (class.map(str::to_owned), text.clone()),
        End::Again { class, text, .. } => (Some((*class).to_owned()), Some(text.clone())),
    };
    attempt.error_class.clone_from(&class);
    attempt.error.clone_from(&text);
    let fate = match end {
        End::Finish { state, .. } => {
            let change = Change::Finish {
                n8n_execution_id: attempt.n8n_execution_id.clone(),
                attempt: Some(attempt),
                state,
                error_class: class.clone(),
                error: text.clone(),
            };
            let applied = ctx.settle(&key, token, change).await;
            if applied {
                ctx.ended(&key, &row, state, text.as_deref());
            }
            if applied && state == State::Dead {
                let reason =
                    format!("{}: {}", class.as_deref().unwrap_or("error"), text.as_deref().unwrap_or_default());
                match &message {
                    Some((_, message)) => drop(letter(ctx, message, &reason).await),
                    None => letter_anew(ctx, &row, &reason).await,
                }
            }
            match message {
                Some((meta, message)) if state == State::Dead && applied && route.on_dead == OnDead::Hold => {
                    Some((meta, Fate::Dead { message, key: key.clone() }))
                }
                Some((meta, message)) => {
                    ctx.ack(message).await;
                    Some((meta, Fate::Done))
                }
                None => None,
            }
        }
        End::Again { crashed, .. } => {
            let wait = verdict::wait(&route.retry, u64::from(row.attempts) + 1, None, fastrand::f64());
            let next_at = ctx.clock.now().plus(wait);
            let change = Change::Retry { attempt: Some(attempt), next_at, crashed, error_class: class, error: text };
            ctx.settle(&key, token, change).await;
            match message {
                Some((meta, message)) => Some((meta, Fate::Hold { message, at: Instant::now() + wait })),
                None => {
                    ctx.alarm.at(next_at);
                    None
                }
            }
        }
    };
    ctx.active().remove(&key);
    drop(permit);
    let input = match fate {
        Some((meta, fate)) => Input::Fate { meta, fate: Box::new(fate) },
        None => Input::FollowFreed,
    };
    let _ = ctx.to_worker.send(input).await;
}

/// The process ends: the claims end now, so that the next one takes the events up at once and follows on. (`Release` would
/// take the attempt back, which was made.)
async fn give_back(ctx: &Ctx, following: Vec<Followed>) {
    let until = ctx.clock.now();
    let releases = following.into_iter().map(|followed| async move {
        ctx.settle(&followed.key, followed.token, Change::Renew { until }).await;
        ctx.active().remove(&followed.key);
        if let Some((_, message)) = followed.message {
            ctx.broker.release(message, Duration::ZERO).await;
        }
    });
    join_all(releases).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(extra: &str) -> Route {
        let text = format!("state_dir = \"/nowhere\"\n[environments.test.default_route]\n{extra}");
        crate::config::parse(&text).unwrap().environments.into_values().next().unwrap().default_route
    }

    fn state(end: Option<End>) -> Result<State, bool> {
        match end.unwrap() {
            End::Finish { state, .. } => Ok(state),
            End::Again { crashed, .. } => Err(crashed),
        }
    }

    #[test]
    fn every_end_has_the_verdict_of_the_table() {
        let plain = route("");
        assert_eq!(end(Run::Open, &plain, 1, 0), None);
        assert_eq!(state(end(Run::Succeeded, &plain, 1, 0)), Ok(State::Succeeded));
        for run in [Run::Failed("x".into()), Run::Crashed, Run::Cancelled] {
            assert_eq!(state(end(run, &plain, 1, 0)), Ok(State::Failed));
        }
        let again = route("redeliver_crashed = true\ncrashes_max = 2\nredeliver_failed = true\nretry.attempts_max = 3");
        assert_eq!(state(end(Run::Crashed, &again, 9, 0)), Err(true));
        assert_eq!(state(end(Run::Crashed, &again, 9, 1)), Err(true));
        assert_eq!(state(end(Run::Crashed, &again, 9, 2)), Ok(State::Dead));
        assert_eq!(state(end(Run::Failed("x".into()), &again, 2, 0)), Err(false));
        assert_eq!(state(end(Run::Failed("x".into()), &again, 3, 0)), Ok(State::Dead));
        assert_eq!(state(end(Run::Cancelled, &again, 1, 0)), Ok(State::Failed));
    }
}
