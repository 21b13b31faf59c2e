//! Named background tasks: one place spawns them, watches them and ends them.
//!
//! # Invariants
//! 1. A background task that panics, or ends although nobody asked it to, ends the process (systemd starts it again):
//!    half an appliance is worse than none. A panic in one request costs that request only.
//! 2. [`Supervisor::drain`] asks all tasks to end and waits until the deadline; then it goes on without them. Killed at
//!    any instruction instead, nothing that was acknowledged is lost.
//!
//! [`notify`] is the way to the service manager: readiness, reload, stop, and the watchdog that is fed by progress.

pub mod notify;

use std::future::Future;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Spawns and ends tasks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Supervisor {
    shutdown: CancellationToken,
    tasks: TaskTracker,
    failed: mpsc::Sender<&'static str>,
}

/// Tells when a task has died.
#[derive(Debug)]
pub struct Failures(mpsc::Receiver<&'static str>);

impl Failures {
    /// The name of the first task that ended unasked.
    pub async fn next(&mut self) -> &'static str {
        match self.0.recv().await {
            Some(name) => name,
            None => std::future::pending().await,
        }
    }
}

impl Supervisor {
    pub fn new() -> (Self, Failures) {
        // One failure ends the process; a few more may race for the report.
        let (failed, failures) = mpsc::channel(16);
        (Self { shutdown: CancellationToken::new(), tasks: TaskTracker::new(), failed }, Failures(failures))
    }

    /// Another group of tasks with a shutdown of its own, reporting to the same [`Failures`].
    pub fn sibling(&self) -> Self {
        Self { shutdown: CancellationToken::new(), tasks: TaskTracker::new(), failed: self.failed.clone() }
    }

    /// Cancelled when the process is to end: every loop selects on it.
    pub fn shutdown(&self) -> CancellationToken {
        self.shutdown.clone()
    }

    /// Runs `task` until it ends by itself after [`shutdown`](Self::shutdown).
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    pub fn spawn<F>(&self, name: &'static str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (shutdown, failed) = (self.shutdown.clone(), self.failed.clone());
        let inner = tokio::spawn(task);
        self.tasks.spawn(async move {
            let result = inner.await;
            if let Err(error) = &result {
                tracing::error!(task = name, %error, "a background task died");
            } else if !shutdown.is_cancelled() {
                tracing::error!(task = name, "a background task ended unasked");
            }
            if result.is_err() || !shutdown.is_cancelled() {
                // Full means that others have reported already.
                let _ = failed.try_send(name);
            }
        });
    }

    /// Asks all tasks to end and waits for them. `false` when the deadline came first.
    pub async fn drain(&self, deadline: Duration) -> bool {
        self.shutdown.cancel();
        self.tasks.close();
        tokio::time::timeout(deadline, self.tasks.wait()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_dies_is_reported() {
        let (supervisor, mut failures) = Supervisor::new();
        supervisor.spawn("good", {
            let shutdown = supervisor.shutdown();
            async move { shutdown.cancelled().await }
        });
        supervisor.spawn("bad", async { panic!("on purpose") });
        assert_eq!(failures.next().await, "bad");
        assert!(supervisor.drain(Duration::from_secs(5)).await);
    }
}
