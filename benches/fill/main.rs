//! Fills an environment's outbox with waiting records through the library itself, for the figures about a large backlog.
//!
//! `bench-fill --config FILE --state-dir DIR --records N`: 1 KiB bodies, every second record with an idempotency key.

#![allow(clippy::print_stdout, reason = "a program of the bench: its output is its result")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes as Body;
use clap::Parser;
use dealscale::clock::Clock;
use dealscale::config::{self, Overrides};
use dealscale::event::{Content, Envelope, Event};
use dealscale::ids::{BodyHash, Environment, ExecutionId, Tenant, Topic, Workflow};
use dealscale::outbox::{Append, Outbox};
use dealscale::units::Bytes;

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    config: PathBuf,
    #[arg(long)]
    state_dir: PathBuf,
    #[arg(long)]
    records: u64,
}

type Failure = Box<dyn std::error::Error>;

/// Records of one append: large enough that syncs do not decide, small enough for the outbox's own bounds.
const BATCH: u64 = 500;

fn main() -> Result<(), Failure> {
    // What `cargo bench` passes: there is nothing to measure without the script.
    if std::env::args().any(|a| a == "--bench") {
        println!("see benches/run.sh");
        return Ok(());
    }
    let arguments = Arguments::parse();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(fill(arguments))
}

async fn fill(arguments: Arguments) -> Result<(), Failure> {
    let overrides = Overrides { file: Some(arguments.config), state_dir: Some(arguments.state_dir) };
    let config = config::load(&overrides, &|_| None).map_err(|problems| format!("{problems:?}"))?;
    let (name, environment) = config.environments.iter().next().ok_or("no environment")?;
    let clock = Clock::System;
    // No tenant may be refused here: the quota is the bridge's business.
    let outbox = Outbox::open(&environment.outbox, name, Arc::new(|_| (1, Bytes::gib(1_024))), clock.clone())?;
    let begin = Instant::now();
    let mut number = 0;
    while number < arguments.records {
        // Two batches under way: the next one is packed while the former is synced.
        let until = (number + 2 * BATCH).min(arguments.records);
        let half = number + (until - number) / 2;
        let (first, second) = tokio::join!(
            outbox.append_batch(events(name, &clock, number..half)?),
            outbox.append_batch(events(name, &clock, half..until)?)
        );
        for result in first.into_iter().chain(second) {
            result?;
        }
        if until % 100_000 < 2 * BATCH {
            eprintln!("   {until} of {} records, {:.0} s", arguments.records, begin.elapsed().as_secs_f64());
        }
        number = until;
    }
    let (status, seconds) = (outbox.status(), begin.elapsed().as_secs_f64());
    outbox.close().await?;
    println!("{}", serde_json::json!({ "records": status.records, "bytes": status.bytes, "seconds": seconds }));
    Ok(())
}

fn events(environment: &Environment, clock: &Clock, numbers: std::ops::Range<u64>) -> Result<Vec<Append>, Failure> {
    let (tenant, topic) = (Tenant::try_new("t1")?, Topic::try_new("dealscale.workflow.long")?);
    let workflow = "bench".parse::<Workflow>()?;
    let event = |n: u64| {
        let body = Body::from(format!(r#"{{"n":"{n:012}","note":"{}"}}"#, "waiting for its turn; ".repeat(45)));
        let idempotency_key = (n % 2 == 1).then(|| format!("fill-{n}"));
        let execution_id = match &idempotency_key {
            Some(key) => ExecutionId::from_idempotency_key(environment, &tenant, key),
            None => ExecutionId::new(),
        };
        let answer = Body::from(format!(
            r#"{{"execution_id":"{execution_id}","topic":"{topic}","route":"default","durability":"disk"}}"#
        ));
        let envelope = Envelope {
            tenant: tenant.clone(),
            execution_id,
            workflow: Some(workflow.clone()),
            topic: topic.clone(),
            route: "default".to_owned(),
            accepted_at: clock.now(),
            deliver_at: None,
            ordering_key: None,
            priority: Envelope::PRIORITY,
            metadata: Default::default(),
            traceparent: None,
            source_execution: None,
            source_workflow: None,
            body_hash: BodyHash::of(&body),
            content: Content::Json,
        };
        Append { event: Event { envelope, body }, idempotency_key, answer }
    };
    Ok(numbers.map(event).collect())
}
