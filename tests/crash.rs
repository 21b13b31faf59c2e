//! kill -9 in a loop: what the outbox acknowledged is there after every kill.
//!
//! The test starts itself as a child that appends (and leases, confirms, forwards to the local broker) as fast as it can and prints each
//! acknowledgement on a pipe; the parent keeps the acknowledged ids outside, kills the child at a random moment, and in the end reads the
//! folder. `DEALSCALE_KILLS=5000 cargo test --test crash` is the longer run.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods)] // all of it is tests, helpers included

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use dealscale::clock::{Clock, Timestamp};
use dealscale::config::{Outbox as Settings, outbox::OutboxStore};
use dealscale::event::{Content, Envelope, Event};
use dealscale::ids::{BodyHash, Environment, ExecutionId, Key, Tenant, Topic};
use dealscale::outbox::{Append, Forward, LeaseLimit, Outbox, Settle};
use dealscale::units::{Bytes, Span};

/// Kills in `make test`, over both stores together.
const KILLS: usize = 220;

fn settings(dir: &Path, store: OutboxStore) -> Settings {
    Settings {
        dir: dir.to_owned(),
        store,
        bytes_max: Bytes::gib(1),
        count_max: 10_000_000,
        disk_free_min: Bytes(0),
        key_window: Span::hours(24),
        lease: Span::secs(120),
        encryption_key: None,
    }
}

fn open(dir: &Path, store: OutboxStore) -> Outbox {
    let environment = Environment::try_new("test").unwrap();
    Outbox::open(&settings(dir, store), &environment, Arc::new(|_| (1, Bytes(u64::MAX))), Clock::System).unwrap()
}

fn event(n: u64) -> Event {
    // Now and then one that does not fit into a value.
    let body = format!("{n}:").into_bytes().repeat(if n.is_multiple_of(17) { 20_000 } else { 60 });
    Event {
        envelope: Envelope {
            tenant: Tenant::try_new(["a", "b"][n as usize % 2]).unwrap(),
            execution_id: ExecutionId::new(),
            workflow: None,
            topic: Topic::try_new("dealscale.workflow.long").unwrap(),
            route: "default".into(),
            accepted_at: Timestamp(1),
            deliver_at: None,
            ordering_key: None,
            priority: 5,
            metadata: BTreeMap::new(),
            traceparent: None,
            source_execution: None,
            source_workflow: None,
            body_hash: BodyHash::of(&body),
            content: Content::Json,
        },
        body: body.into(),
    }
}

fn forward(event: &Event) -> Forward {
    Forward {
        topic: event.envelope.topic.clone(),
        ordering_key: None,
        tenant: event.envelope.tenant.clone(),
        claims: event.envelope.execution_id.to_string().into_bytes(),
        properties: BTreeMap::new(),
        deliver_at: None,
    }
}

/// The child: never ends by itself.
async fn child(dir: &Path, store: OutboxStore, first: u64) {
    let outbox = open(dir, store);
    println!("open");
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        // A parent that is gone wants nothing more.
        if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
            std::process::exit(0);
        }
    };
    let append = async {
        for n in first.. {
            let events: Vec<_> = (0..4).map(|i| event(n * 4 + i)).collect();
            let items =
                events.iter().map(|e| Append { event: e.clone(), idempotency_key: None, answer: Default::default() });
            for (result, event) in outbox.append_batch(items.collect()).await.into_iter().zip(&events) {
                let sequence = result.unwrap().sequence.unwrap().0;
                say(format!("ack {sequence} {} {}", event.envelope.tenant, event.envelope.execution_id));
            }
        }
    };
    let relay = async {
        loop {
            let leased = outbox.lease(LeaseLimit { count: 5, bytes: Bytes::mib(1) }).await.unwrap();
            // Half of what comes moves on to the local broker, in one batch with its confirmation.
            let settles = leased
                .iter()
                .map(|l| match l.sequence.0 % 2 {
                    0 => Settle::Confirm { sequence: l.sequence, forward: Some(forward(&l.event)) },
                    _ => Settle::Release { sequence: l.sequence },
                })
                .collect();
            outbox.settle(settles).await.unwrap();
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    };
    tokio::join!(append, relay);
}

fn store_of(name: &str) -> OutboxStore {
    if name == "sled" { OutboxStore::Sled } else { OutboxStore::Sqlite }
}

/// Not a test of its own: what the child runs.
#[tokio::test]
async fn child_process() {
    let Ok(dir) = std::env::var("DEALSCALE_CRASH_DIR") else { return };
    let first = std::env::var("DEALSCALE_CRASH_FIRST").unwrap().parse().unwrap();
    child(Path::new(&dir), store_of(&std::env::var("DEALSCALE_CRASH_STORE").unwrap()), first).await;
}

fn kills_lose_nothing(store: &str) {
    let kills = std::env::var("DEALSCALE_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(KILLS) / 2;
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: BTreeMap<(String, String), u64> = BTreeMap::new();
    let mut sequences = std::collections::BTreeSet::new();
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_process", "--exact", "--nocapture"])
            .env("DEALSCALE_CRASH_DIR", dir.path().join("outbox"))
            .env("DEALSCALE_CRASH_STORE", store)
            .env("DEALSCALE_CRASH_FIRST", (kill * 1_000_000).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let opened = lines.by_ref().map_while(Result::ok).any(|line| line.ends_with("open"));
        if !opened {
            let output = child.wait_with_output().unwrap();
            panic!("kill {kill}: it did not open again: {}", String::from_utf8_lossy(&output.stderr));
        }
        let pid = child.id();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(fastrand::u64(500..40_000)));
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::Signal::SIGKILL).unwrap();
        });
        for line in lines.map_while(Result::ok) {
            // The last line may be cut short.
            let parts: Vec<_> = line.split(' ').collect();
            if let ["ack", sequence, tenant, id] = parts[..]
                && id.len() == 36
            {
                let sequence: u64 = sequence.parse().unwrap();
                assert!(sequences.insert(sequence), "kill {kill}: sequence {sequence} was used twice");
                acknowledged.insert((tenant.to_owned(), id.to_owned()), sequence);
            }
        }
        killer.join().unwrap();
        child.wait().unwrap();
    }
    assert!(
        acknowledged.len() > kills,
        "only {} acknowledgements in {kills} lives: this proves nothing",
        acknowledged.len()
    );

    // Every acknowledged event is in the outbox or in the local broker, and in one of them only.
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let outbox = open(&dir.path().join("outbox"), store_of(store));
        assert_eq!(outbox.status().data_loss_possible, None);
        let messages =
            outbox.local().browse(&Topic::try_new("dealscale.workflow.long").unwrap(), usize::MAX).await.unwrap();
        let mut forwarded = std::collections::BTreeSet::new();
        for message in messages {
            let id = String::from_utf8(message.forward.claims.clone()).unwrap();
            assert!(forwarded.insert((message.forward.tenant.to_string(), id.clone())), "{id} was forwarded twice");
        }
        let mut waiting = 0;
        for ((tenant, id), sequence) in &acknowledged {
            let key = Key { tenant: Tenant::try_new(tenant).unwrap(), execution_id: id.parse().unwrap() };
            let found = outbox.find(&key).await.unwrap();
            let moved = forwarded.contains(&(tenant.clone(), id.clone()));
            assert!(
                found.is_some() != moved,
                "{id} (sequence {sequence}): in the outbox {}, forwarded {moved}",
                found.is_some()
            );
            if let Some(found) = found {
                assert_eq!(BodyHash::of(&found.event.body), found.event.envelope.body_hash);
                waiting += 1;
            }
        }
        println!(
            "{store}: {kills} kills, {} acknowledged, {waiting} wait, {} forwarded, none lost",
            acknowledged.len(),
            forwarded.len()
        );
        outbox.close().await.unwrap();
    });
}

#[test]
fn sled_loses_nothing_that_was_acknowledged_to_kill_9() {
    kills_lose_nothing("sled");
}

#[test]
fn sqlite_loses_nothing_that_was_acknowledged_to_kill_9() {
    kills_lose_nothing("sqlite");
}
