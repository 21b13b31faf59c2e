//! What the service manager is told (sd_notify(3)), and its watchdog. Without systemd every call does nothing.
//!
//! # Invariants
//! 1. READY is sent once the listeners are taken and the state is open, and never before.
//! 2. The watchdog is fed only after [`Progress`] came to its end: a process whose outbox no longer answers is started again.
//! 3. Where something is known to take long (opening a large state, draining), the manager's deadline is moved, by a bounded time.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use systemd::daemon;
use tokio_util::sync::CancellationToken;

/// Ends when the parts that matter have answered; hangs as they hang. With a text for the manager's status line.
pub type Progress = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = String> + Send>> + Send + Sync>;

/// Without a watchdog the status line is still renewed this often.
const STATUS_EVERY: Duration = Duration::from_secs(10);
/// A start that is under way asks for this much more, and asks again at half of it.
const START_MORE: Duration = Duration::from_secs(30);
/// A start that takes longer than this hangs.
const START_MAX: Duration = Duration::from_secs(3_600);

/// Whether a service manager waits for our notifications.
pub fn is_managed() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

fn send(state: &[(&str, &str)]) {
    if is_managed()
        && let Err(error) = daemon::notify(state.iter())
    {
        tracing::warn!(%error, "the service manager cannot be notified");
    }
}

/// A line of text: a line break would begin another assignment.
fn line(text: &str) -> String {
    text.replace(['\n', '\r', '\0'], " ")
}

fn micros(span: Duration) -> String {
    span.as_micros().to_string()
}

pub fn ready(status: &str) {
    send(&[(daemon::STATE_READY, "1"), (daemon::STATE_STATUS, &line(status))]);
}

pub fn status(text: &str) {
    send(&[(daemon::STATE_STATUS, &line(text))]);
}

/// A reload has begun; [`ready`] ends it, applied or refused.
pub fn reloading() {
    send(&[(daemon::STATE_RELOADING, "1"), (daemon::STATE_STATUS, "reads the configuration again")]);
}

/// The stop has begun and may take `within`.
pub fn stopping(status: &str, within: Duration) {
    send(&[
        (daemon::STATE_STOPPING, "1"),
        (daemon::STATE_STATUS, &line(status)),
        (daemon::STATE_EXTEND_TIMEOUT_USEC, &micros(within)),
    ]);
}

/// What is under way may take `within` from now on.
pub fn extend(status: &str, within: Duration) {
    send(&[(daemon::STATE_STATUS, &line(status)), (daemon::STATE_EXTEND_TIMEOUT_USEC, &micros(within))]);
}

/// Runs `start` and keeps the manager's start deadline ahead of it, for an hour at most.
pub async fn starting<T>(start: impl Future<Output = T>) -> T {
    tokio::pin!(start);
    let begin = tokio::time::Instant::now();
    loop {
        tokio::select! {
            started = &mut start => return started,
            () = tokio::time::sleep(START_MORE / 2), if begin.elapsed() < START_MAX => {
                let status = format!("opens its state since {} s", begin.elapsed().as_secs());
                extend(&status, START_MORE);
            }
        }
    }
}

/// The watchdog's period, where the manager has one for us.
fn watchdog() -> Option<Duration> {
    match daemon::watchdog_enabled() {
        Ok(0) | Err(_) => None,
        Ok(micros) => Some(Duration::from_micros(micros)),
    }
}

/// Feeds the watchdog and renews the status line until `shutdown`.
pub async fn watch(progress: Progress, shutdown: CancellationToken) {
    if !is_managed() {
        return shutdown.cancelled().await;
    }
    let period = watchdog();
    // Several chances within a period, as sd_watchdog_enabled(3) recommends at least two.
    let every = period.map_or(STATUS_EVERY, |period| period / 4);
    let mut shown = String::new();
    loop {
        let made = tokio::select! {
            () = shutdown.cancelled() => return,
            status = progress() => Some(status),
            () = tokio::time::sleep(every * 2) => None,
        };
        match made {
            Some(status) => {
                if period.is_some() {
                    send(&[(daemon::STATE_WATCHDOG, "1")]);
                }
                if status != shown {
                    self::status(&status);
                    shown = status;
                }
            }
            None => tracing::error!("the outbox does not answer; without progress the service manager starts us again"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_stays_one_line() {
        assert_eq!(line("a\nREADY=1"), "a READY=1");
    }
}
