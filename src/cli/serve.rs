//! `dealscale serve`: from a checked configuration to a running appliance and back.
//!
//! Start: check everything → take the sockets → open state → ready. Stop (SIGTERM, SIGINT): see [`App::stop`]; a second one ends at once. SIGHUP
//! reads the configuration again.
//!
//! Under systemd a start that fails holds its end back, longer each time, so that the manager's constant `RestartSec=` becomes a backoff
//! (systemd has one of its own only from 254 on). A stop or restart by the operator ends the wait. A configuration that cannot work
//! is not waited for: exit code 78 is not started again at all.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Global, Outcome, load};
use crate::app::App;
use crate::config::{Config, Overrides};
use crate::listen::Sockets;
use crate::observe::logs::{self, Logs};
use crate::supervise::notify;

/// Shells, `timeout` and their like signal a process and then its group: what comes so soon is the same wish.
const SECOND_AFTER: Duration = Duration::from_secs(1);
/// The longest that a failed start holds its end back.
const BACKOFF_MAX: Duration = Duration::from_secs(60);

pub fn run(global: &Global) -> Outcome {
    let config = load(global).inspect_err(|_| {
        notify::status(
            "the configuration cannot work: see the lines above, or run `dealscale check` as root; then start it again",
        );
    })?;
    let logs = logs::init(&config.log)?;
    let (sockets, problems) = Sockets::take();
    for problem in problems {
        tracing::error!("{problem}");
    }
    let overrides = super::overrides(global);
    raise_descriptors(config.bridge.connections_max);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("dealscale").build();
    let runtime = runtime.map_err(|e| format!("cannot start: {e}"))?;
    let outcome = runtime.block_on(Box::pin(serve(config, overrides, logs, sockets)));
    // Blocking reads that hang (a dead disk, say) must not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn serve(config: Config, overrides: Overrides, logs: Logs, sockets: Sockets) -> Outcome {
    let (mut terminate, mut interrupt, mut hangup) =
        match (signal(SignalKind::terminate()), signal(SignalKind::interrupt()), signal(SignalKind::hangup())) {
            (Ok(terminate), Ok(interrupt), Ok(hangup)) => (terminate, interrupt, hangup),
            _ => return Err(Failure::from("cannot listen for signals")),
        };
    let mut end = Box::pin(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        (terminate, interrupt)
    });
    let failed_starts = FailedStarts::beside(&config.admin.socket);
    let started = tokio::select! {
        started = notify::starting(App::start(config, overrides, logs, sockets)) => started,
        // Opening a large outbox may take its time; nothing was accepted yet.
        _ = &mut end => return Ok(()),
    };
    let (app, mut failures) = match started {
        Ok(started) => started,
        Err(error) => {
            let wait = failed_starts.count();
            tracing::error!(tries_again_seconds = wait.as_secs(), "the start failed: {error}");
            notify::extend(&format!("the start failed: {error}"), wait + BACKOFF_MAX);
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = &mut end => {}
            }
            return Err(Failure::Message(error));
        }
    };
    failed_starts.forget();
    let mut ready = Some(Box::pin(app.ready()));
    let mut reloading = None;
    let (mut terminate, mut interrupt) = loop {
        tokio::select! {
            signals = &mut end => break signals,
            () = async { if let Some(ready) = &mut ready { ready.await } else { std::future::pending().await } } => ready = None,
            // One that comes during a reload is remembered.
            _ = hangup.recv(), if reloading.is_none() => reloading = Some(Box::pin(app.reload())),
            // What came of it stands in the log.
            _ = async { if let Some(reload) = &mut reloading { reload.await } else { std::future::pending().await } } => {
                reloading = None;
            }
            task = failures.next() => {
                // What was acknowledged is on disk; a fresh process is better than half of one.
                return Err(Failure::Message(format!("background task {task} ended unexpectedly; see the log above")));
            }
        }
    };
    drop(ready);
    let first = std::time::Instant::now();
    let second = async {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if first.elapsed() >= SECOND_AFTER {
                return;
            }
        }
    };
    tokio::select! {
        () = app.stop() => Ok(()),
        () = second => Err(Failure::from(
            "ended by a second signal, without waiting for work under way; what was accepted goes on after the next start",
        )),
    }
}

/// Connections want descriptors: the soft limit of a login shell (1,024) is far below what we are allowed.
fn raise_descriptors(connections_max: u64) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let limit = if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok() { hard } else { soft };
    // Stores, the broker, webhooks and the log beside them.
    let wanted = connections_max + 256;
    if limit < wanted {
        tracing::warn!(limit, wanted, "few file descriptors: connections beyond them wait (LimitNOFILE=, ulimit -n)");
    }
}

/// How many starts have failed one after the other: a file, none without systemd.
struct FailedStarts(Option<PathBuf>);

impl FailedStarts {
    /// Beside the admin socket, in a folder that a reboot empties.
    fn beside(socket: &Path) -> Self {
        Self(socket.parent().filter(|_| notify::is_managed()).map(|dir| dir.join("failed-starts")))
    }

    /// Counts one more, and says how long to wait: nothing the first time, then 2 s, 4 s, … [`BACKOFF_MAX`].
    fn count(&self) -> Duration {
        let Some(file) = &self.0 else { return Duration::ZERO };
        let before: u32 = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        // Without the file the manager's RestartSec= alone remains.
        let _ = std::fs::write(file, before.saturating_add(1).to_string());
        if before == 0 { Duration::ZERO } else { BACKOFF_MAX.min(Duration::from_secs(1 << before.min(6))) }
    }

    fn forget(&self) {
        if let Some(file) = &self.0 {
            let _ = std::fs::remove_file(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_starts_wait_longer_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let starts = FailedStarts(Some(dir.path().join("failed-starts")));
        let waits: Vec<_> = (0..8).map(|_| starts.count().as_secs()).collect();
        assert_eq!(waits, [0, 2, 4, 8, 16, 32, 60, 60]);
        starts.forget();
        assert_eq!(starts.count(), Duration::ZERO);
        assert_eq!(FailedStarts(None).count(), Duration::ZERO, "in a terminal nothing waits");
    }
}
