//! `dealscale serve`: from a checked configuration to a running appliance and back.
//!
//! Start: check everything → bind → open state → ready. Stop (SIGTERM, SIGINT): see [`App::stop`]. SIGHUP reads the configuration again.

use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Global, Outcome, load};
use crate::app::App;
use crate::config::Overrides;
use crate::observe::logs;

pub fn run(global: &Global) -> Outcome {
    let config = load(global)?;
    let logs = logs::init(&config.log)?;
    let overrides = Overrides { file: global.config.clone(), state_dir: global.state_dir.clone() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("dealscale").build();
    let runtime = runtime.map_err(|e| format!("cannot start: {e}"))?;
    let outcome = runtime.block_on(async {
        let (mut terminate, mut interrupt, mut hangup) = match (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
            signal(SignalKind::hangup()),
        ) {
            (Ok(terminate), Ok(interrupt), Ok(hangup)) => (terminate, interrupt, hangup),
            _ => return Err(Failure::from("cannot listen for signals")),
        };
        let (app, mut failures) = App::start(config, overrides, logs).await?;
        loop {
            tokio::select! {
                _ = terminate.recv() => break,
                _ = interrupt.recv() => break,
                _ = hangup.recv() => drop(app.reload().await),
                task = failures.next() => {
                    // What was acknowledged is on disk; a fresh process is better than half of one.
                    return Err(Failure::Message(format!("background task {task} ended unexpectedly; see the log above")));
                }
            }
        }
        app.stop().await;
        Ok(())
    });
    // Blocking reads that hang (a dead disk, say) must not hold up the end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome
}
