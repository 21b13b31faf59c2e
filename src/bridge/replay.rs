//! Replays of many dead letters, beside the requests and at a bounded rate.
//!
//! # Invariants
//! 1. A job walks its list once, newest first: a dead letter that dies again is not replayed again by the same job.
//! 2. At most [`RUNNING_MAX`] jobs run, and [`KEPT_MAX`] are remembered.
//! 3. A job ends early when the appliance stops; what it replayed is durable, the rest is still dead and can be replayed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Bridge;
use super::respond::{Kind, Problem};
use super::routes::Asked;
use crate::clock::Timestamp;
use crate::ids::Environment;
use crate::observe::bridge as events;
use crate::payloads::{Filter, Store};

/// Jobs under way at once. More only compete for the same rate of n8n.
const RUNNING_MAX: usize = 4;
/// Jobs whose figures can still be asked for.
const KEPT_MAX: usize = 100;

/// Where a replay job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    Running,
    Done,
    /// The ledger failed, or the appliance stopped.
    Failed,
}

/// A replay of many dead letters.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Job {
    #[schema(value_type = uuid::Uuid)]
    pub job_id: Uuid,
    pub state: Progress,
    /// Dead letters that matched when it began.
    pub count: u64,
    pub replayed: u64,
    /// Were no dead letters any more when their turn came.
    pub skipped: u64,
    pub started_at: Timestamp,
    pub finished_at: Option<Timestamp>,
    pub error: Option<String>,
}

#[derive(Debug)]
struct Kept {
    job: Job,
    account: String,
    environment: Environment,
}

/// Jobs of this process, newest last.
#[derive(Clone, Debug, Default)]
pub struct Jobs(Arc<Mutex<VecDeque<Kept>>>);

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job of this account and environment.
    pub fn find(&self, id: Uuid, account: &str, environment: &Environment) -> Option<Job> {
        let jobs = self.lock();
        let kept = jobs.iter().find(|k| k.job.job_id == id)?;
        (kept.account == account && kept.environment == *environment).then(|| kept.job.clone())
    }

    fn begin(&self, kept: Kept) -> Result<(), Problem> {
        let mut jobs = self.lock();
        if jobs.iter().filter(|k| k.job.state == Progress::Running).count() >= RUNNING_MAX {
            return Err(Problem::new(Kind::Busy, "other replays are under way").retry_after(10));
        }
        if jobs.len() >= KEPT_MAX
            && let Some(n) = jobs.iter().position(|k| k.job.state != Progress::Running)
        {
            jobs.remove(n);
        }
        jobs.push_back(kept);
        Ok(())
    }

    fn change(&self, id: Uuid, change: impl FnOnce(&mut Job)) {
        if let Some(kept) = self.lock().iter_mut().find(|k| k.job.job_id == id) {
            change(&mut kept.job);
        }
    }
}

impl Bridge {
    /// Begins a job.
    pub(super) fn replay_many(&self, asked: &Asked, filter: Filter, count: u64, rate: u64) -> Result<Job, Problem> {
        let job = Job {
            job_id: Uuid::now_v7(),
            state: Progress::Running,
            count,
            replayed: 0,
            skipped: 0,
            started_at: self.0.clock.now(),
            finished_at: None,
            error: None,
        };
        let (account, environment) = (asked.caller.name.clone(), asked.room.env.config.name.clone());
        self.0.replays.begin(Kept { job: job.clone(), account: account.clone(), environment })?;
        let (bridge, store, id) = (self.clone(), asked.room.parts.store.clone(), job.job_id);
        self.0.tasks.spawn(async move {
            let result = bridge.replay_all(&store, filter, rate, id).await;
            let now = bridge.0.clock.now();
            bridge.0.replays.change(id, |job| {
                job.finished_at = Some(now);
                job.state = if result.is_ok() { Progress::Done } else { Progress::Failed };
                job.error = result.err();
            });
            let count = bridge.0.replays.lock().iter().find(|k| k.job.job_id == id).map_or(0, |k| k.job.replayed);
            events::Operated { account: &account, act: "replay_many", tenant: None, execution_id: None, count }.emit();
        });
        Ok(job)
    }

    async fn replay_all(&self, store: &Store, mut filter: Filter, rate: u64, id: Uuid) -> Result<(), String> {
        // Missed ticks are caught up with, so that rates beyond the timer's millisecond hold on average.
        let mut ticks = tokio::time::interval(Duration::from_nanos(1_000_000_000 / rate.max(1)));
        loop {
            let page = store.list(filter.clone()).await.map_err(|e| shown(&e))?;
            for row in page.rows {
                tokio::select! {
                    biased;
                    () = self.0.draining.cancelled() => return Err("the appliance is stopping".into()),
                    _ = ticks.tick() => {}
                }
                let replayed = store.replay(&row.envelope.key()).await.map_err(|e| shown(&e))? == Some(true);
                self.0.replays.change(id, |job| if replayed { job.replayed += 1 } else { job.skipped += 1 });
            }
            match page.next {
                Some(next) => filter.cursor = Some(next),
                None => return Ok(()),
            }
        }
    }
}

fn shown(error: &crate::payloads::Error) -> String {
    tracing::warn!(%error, "a replay ends early");
    "the ledger's database failed; replay again".into()
}
