//! Group commit for a database that is asked by many callers at once: while one transaction is on its way, what comes in
//! waits, and goes together in the next. No delay of its own: an idle group sends a lone call at once.
//!
//! # Invariants
//! 1. Every caller gets the answers to its own items, in their order.
//! 2. A call that is refused fails alone: what went with it is sent again without it.
//! 3. A caller that gives up takes nobody down: the work runs on tasks of the group.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{Semaphore, oneshot};
use tokio_util::task::TaskTracker;

use super::Error;

/// Items of one transaction.
const ITEMS_MAX: usize = 512;
/// Calls that wait; further ones wait outside.
const CALLS_MAX: usize = 4096;

pub(super) struct Group<I, O> {
    doing: &'static str,
    /// Transactions under way at once. More than a few only make each smaller.
    workers_max: usize,
    state: Mutex<State<I, O>>,
    calls: Semaphore,
    tasks: TaskTracker,
}

struct State<I, O> {
    waiting: VecDeque<Call<I, O>>,
    workers: usize,
}

struct Call<I, O> {
    items: Vec<I>,
    reply: oneshot::Sender<Result<Vec<O>, Error>>,
}

impl<I, O> Group<I, O>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
{
    pub fn new(doing: &'static str, workers_max: usize) -> Arc<Self> {
        Arc::new(Self {
            doing,
            workers_max,
            state: Mutex::new(State { waiting: VecDeque::new(), workers: 0 }),
            calls: Semaphore::new(CALLS_MAX),
            tasks: TaskTracker::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State<I, O>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn closed(&self) -> Error {
        Error::Store { doing: self.doing, cause: "the payload store is closed".into() }
    }

    /// The answers to `items`, which `run` gets together with those of other callers.
    pub async fn submit<F, R>(self: &Arc<Self>, items: Vec<I>, run: F) -> Result<Vec<O>, Error>
    where
        F: Fn(Vec<I>) -> R + Send + 'static,
        R: Future<Output = Result<Vec<O>, Error>> + Send,
    {
        let _permit = self.calls.acquire().await.map_err(|_| self.closed())?;
        let (reply, answer) = oneshot::channel();
        let another = {
            let mut state = self.state();
            state.waiting.push_back(Call { items, reply });
            let another = state.workers < self.workers_max;
            state.workers += usize::from(another);
            another
        };
        if another {
            let worker = Worker(self.clone());
            self.tasks.spawn(async move { worker.run(run).await });
        }
        answer.await.map_err(|_| self.closed())?
    }

    pub async fn close(&self) {
        self.calls.close();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Counts itself out, even when it panics.
struct Worker<I, O>(Arc<Group<I, O>>);

impl<I, O> Drop for Worker<I, O> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).workers -= 1;
    }
}

impl<I, O> Worker<I, O>
where
    I: Clone + Send + 'static,
    O: Send + 'static,
{
    async fn run<F, R>(self, run: F)
    where
        F: Fn(Vec<I>) -> R + Send,
        R: Future<Output = Result<Vec<O>, Error>> + Send,
    {
        while let Some(calls) = self.next() {
            let items: Vec<I> = calls.iter().flat_map(|call| call.items.iter().cloned()).collect();
            match run(items).await {
                Ok(answers) => {
                    let mut answers = answers.into_iter();
                    for call in calls {
                        let own = answers.by_ref().take(call.items.len()).collect();
                        // Nobody waits any more when the caller gave up.
                        let _ = call.reply.send(Ok(own));
                    }
                }
                Err(Error::Refused(_)) if calls.len() > 1 => {
                    for call in calls {
                        let _ = call.reply.send(run(call.items).await);
                    }
                }
                Err(error) => calls.into_iter().for_each(|call| drop(call.reply.send(Err(error.clone())))),
            }
        }
    }

    /// What waits, as much as one transaction takes. `None`: nothing, and this worker ends; a later call sees that under
    /// the same lock and starts another one.
    fn next(&self) -> Option<Vec<Call<I, O>>> {
        let mut state = self.0.state();
        let (mut calls, mut items) = (Vec::new(), 0);
        while let Some(call) = state.waiting.front() {
            if !calls.is_empty() && items + call.items.len() > ITEMS_MAX {
                break;
            }
            items += call.items.len();
            calls.extend(state.waiting.pop_front());
        }
        (!calls.is_empty()).then_some(calls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[tokio::test]
    async fn invariants_1_and_2_answers_are_ones_own() {
        let group = Group::<u32, u32>::new("test", 2);
        let runs = Arc::new(AtomicUsize::new(0));
        let calls = (0..100u32).map(|n| {
            let (group, runs) = (group.clone(), runs.clone());
            async move {
                let run = move |items: Vec<u32>| {
                    runs.fetch_add(1, Ordering::SeqCst);
                    async move {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                        if items.contains(&42) {
                            return Err(Error::Refused("42".into()));
                        }
                        Ok(items.iter().map(|i| i * 2).collect())
                    }
                };
                (n, group.submit(vec![n, n + 1000], run).await)
            }
        });
        for (n, answer) in futures_util::future::join_all(calls).await {
            match n {
                42 => assert!(matches!(answer, Err(Error::Refused(_)))),
                n => assert_eq!(answer.unwrap(), [n * 2, (n + 1000) * 2]),
            }
        }
        // Two lone ones, one batch, and that batch one by one.
        assert!(runs.load(Ordering::SeqCst) <= 104, "{runs:?}");
        group.close().await;
        assert!(group.submit(vec![1], |items| async move { Ok(items) }).await.is_err());
    }

    #[tokio::test]
    async fn invariant_3_a_caller_that_gives_up_takes_nobody_down() {
        let group = Group::<u32, u32>::new("test", 1);
        let run = |items: Vec<u32>| async move {
            tokio::time::sleep(Duration::from_millis(30)).await;
            Ok(items)
        };
        let first = tokio::time::timeout(Duration::from_millis(5), group.submit(vec![1], run));
        let (first, second) = tokio::join!(first, group.submit(vec![2], run));
        assert!(first.is_err());
        assert_eq!(second.unwrap(), [2]);
    }
}
