//! `dealscale serve`: from a checked configuration to a running appliance and back.
//!
//! Start: check everything → bind → open state → ready. Stop (SIGTERM, SIGINT): see [`App::stop`]; a second one ends at once. SIGHUP reads the
//! configuration again.

use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Global, Outcome, load};
use crate::app::App;
use crate::config::{Config, Overrides};
use crate::observe::logs::{self, Logs};

/// Shells, `timeout` and their like signal a process and then its group: what comes so soon is the same wish.
const SECOND_AFTER: std::time::Duration = std::time::Duration::from_secs(1);

pub fn run(global: &Global) -> Outcome {
    let config = load(global)?;
    let logs = logs::init(&config.log)?;
    let overrides = super::overrides(global);
    raise_descriptors(config.bridge.connections_max);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("dealscale").build();
    let runtime = runtime.map_err(|e| format!("cannot start: {e}"))?;
    let outcome = runtime.block_on(Box::pin(serve(config, overrides, logs)));
    // Blocking reads that hang (a dead disk, say) must not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome
}

async fn serve(config: Config, overrides: Overrides, logs: Logs) -> Outcome {
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
    let (app, mut failures) = tokio::select! {
        started = App::start(config, overrides, logs) => started?,
        // Opening a large outbox may take its time; nothing was accepted yet.
        _ = &mut end => return Ok(()),
    };
    let mut reloading = None;
    let (mut terminate, mut interrupt) = loop {
        tokio::select! {
            signals = &mut end => break signals,
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
