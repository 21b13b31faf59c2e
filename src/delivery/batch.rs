//! Many tasks, one call: whoever waits while a call is under way shares the next one.
//!
//! There is no delay to gather a batch: with one caller a batch has one item, under load it grows by itself to what came
//! in during the former call.

use std::future::Future;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use crate::supervise::Supervisor;

/// Items of one call. Larger transactions gain nothing more and keep others waiting.
const BATCH_MAX: usize = 512;

type Waiting<T, R, E> = (T, oneshot::Sender<Result<R, E>>);

/// Collects items for one kind of call. Its task ends when the last clone is dropped.
pub(super) struct Batch<T, R, E> {
    queue: mpsc::Sender<Waiting<T, R, E>>,
    /// For who asks after the task is gone.
    gone: Arc<dyn Fn() -> E + Send + Sync>,
}

impl<T, R, E> Batch<T, R, E>
where
    T: Send + 'static,
    R: Send + 'static,
    E: Clone + Send + 'static,
{
    /// `call` answers one result per item, in order.
    pub fn start<F, Fut>(
        name: &'static str,
        supervisor: &Supervisor,
        gone: impl Fn() -> E + Send + Sync + 'static,
        call: F,
    ) -> Self
    where
        F: Fn(Vec<T>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<Vec<R>, E>> + Send,
    {
        let (queue, mut waiting) = mpsc::channel::<Waiting<T, R, E>>(BATCH_MAX);
        let shutdown = supervisor.shutdown();
        supervisor.spawn(name, async move {
            let mut batch = Vec::new();
            while waiting.recv_many(&mut batch, BATCH_MAX).await > 0 {
                let (items, answers): (Vec<T>, Vec<_>) = batch.drain(..).unzip();
                // Who does not wait any more was stopped: nobody to tell.
                match call(items).await {
                    Ok(results) => {
                        for (answer, result) in answers.into_iter().zip(results) {
                            let _ = answer.send(Ok(result));
                        }
                    }
                    Err(error) => {
                        for answer in answers {
                            let _ = answer.send(Err(error.clone()));
                        }
                    }
                }
            }
            // All callers are gone, which happens at the end only; the supervisor wants to see that.
            shutdown.cancelled().await;
        });
        Self { queue, gone: Arc::new(gone) }
    }

    pub async fn call(&self, item: T) -> Result<R, E> {
        let (answer, result) = oneshot::channel();
        if self.queue.send((item, answer)).await.is_err() {
            return Err((self.gone)());
        }
        result.await.unwrap_or_else(|_| Err((self.gone)()))
    }
}
