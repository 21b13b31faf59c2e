//! What both brokers promise, as tests that either must pass: `tests/it/broker.rs` runs them on the local broker,
//! `tests/real/pulsar.rs` on a real Pulsar.
#![allow(clippy::unwrap_used)] // a test fails by panicking, in its helpers too

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dealscale::broker::{Broker, Claims, Outgoing, Received, Topics};
use dealscale::clock::{Clock, Timestamp};
use dealscale::event::Event;
use dealscale::ids::{BodyHash, Environment, ExecutionId, OrderingKey, Tenant, Topic};
use dealscale::outbox::{Append, Outbox};

/// Patience for what has to happen; nothing waits so long on purpose.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const LONG: &str = "dealscale.workflow.long";
pub const OF_TENANT: &str = "dealscale.workflow.long.{tenant}";

/// A broker of its own, empty, that any number of consumers can be opened on.
pub struct World<'w> {
    pub environment: Environment,
    pub clock: Clock,
    /// Opens another appliance's end of it.
    pub open: Box<dyn Fn(Topics) -> Broker + 'w>,
}

impl World<'_> {
    pub fn broker(&self) -> Broker {
        (self.open)(topics(&[LONG, OF_TENANT]))
    }

    pub fn event(&self, topic: &str, tenant: &str, key: Option<&str>) -> Outgoing {
        let now = self.clock.now();
        Outgoing {
            claims: Claims {
                execution_id: ExecutionId::new(),
                tenant_id: Tenant::try_new(tenant).unwrap(),
                environment: self.environment.clone(),
                topic: topic.parse().unwrap(),
                payload_sha256: BodyHash::of(b"{}"),
                iat: now.as_secs(),
                exp: now.as_secs() + 600,
            },
            ordering_key: key.map(|key| OrderingKey::try_new(key).unwrap()),
            properties: BTreeMap::from([("route".to_owned(), "default".to_owned())]),
            deliver_at: None,
        }
    }
}

pub fn topics(templates: &[&str]) -> Topics {
    Topics { templates: templates.iter().map(|t| (*t).to_owned()).collect(), ..Topics::default() }
}

/// Publishes until everything has its receipt. What has none yet is sent again, as the relay does.
pub async fn publish(broker: &Broker, mut items: Vec<Outgoing>) {
    let begin = Instant::now();
    while !items.is_empty() {
        let results = broker.publish(items.clone()).await;
        let failed: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).take(1).cloned().collect();
        items = items.into_iter().zip(results).filter(|(_, result)| result.is_err()).map(|(item, _)| item).collect();
        assert!(begin.elapsed() < 3 * PATIENCE, "{} are not published: {failed:?}", items.len());
        if !items.is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

pub async fn receive(broker: &Broker, max: usize) -> Vec<Received> {
    tokio::time::timeout(PATIENCE, broker.receive(max)).await.unwrap_or_else(|_| {
        panic!("nothing was received within {PATIENCE:?}: {:?}", broker.status());
    })
}

pub async fn receive_one(broker: &Broker) -> Received {
    receive(broker, 1).await.pop().expect("at least one")
}

/// Nothing comes for a while.
pub async fn silent(broker: &Broker, span: Duration) {
    if let Ok(received) = tokio::time::timeout(span, broker.receive(10)).await {
        panic!("received {received:?}");
    }
}

pub fn id(received: &Received) -> ExecutionId {
    received.reference.as_ref().expect("a good reference").claims.execution_id
}

pub async fn competing_consumers_share_the_work(world: &World<'_>) {
    let (one, two) = (world.broker(), world.broker());
    let events: Vec<_> = (0..200).map(|_| world.event(LONG, "acme", None)).collect();
    let ids: BTreeSet<_> = events.iter().map(|e| e.claims.execution_id).collect();
    // Both are there before the first event.
    for broker in [&one, &two] {
        ready(world, broker).await;
    }
    let got: [Mutex<Vec<ExecutionId>>; 2] = Default::default();
    let consume = |n: usize, broker: Broker| {
        let (got, ids) = (&got, &ids);
        async move {
            loop {
                let received = broker.receive(8).await;
                // Events of `ready` may still be on their way.
                got[n].lock().unwrap().extend(received.iter().map(id).filter(|id| ids.contains(id)));
                broker.ack(received).await.unwrap();
            }
        }
    };
    let publishing = async {
        for chunk in events.chunks(5) {
            publish(&one, chunk.to_vec()).await;
        }
        let begin = Instant::now();
        while got.iter().map(|got| got.lock().unwrap().len()).sum::<usize>() < 200 && begin.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = publishing => {}
        () = consume(0, one.clone()) => {}
        () = consume(1, two.clone()) => {}
    }
    let [first, second] = got.map(|got| got.into_inner().unwrap());
    assert!(!first.is_empty() && !second.is_empty(), "one consumer did all: {} and {}", first.len(), second.len());
    assert_eq!(first.len() + second.len(), 200, "something came twice");
    assert_eq!(first.into_iter().chain(second).collect::<BTreeSet<_>>(), ids);
    close([one, two]).await;
}

/// Publishes and receives one event, so that the consumer is known to be subscribed.
pub async fn ready(world: &World<'_>, broker: &Broker) {
    // With two consumers the other one may get it: each looks until it has had one.
    let begin = Instant::now();
    loop {
        publish(broker, vec![world.event(LONG, "acme", None)]).await;
        match tokio::time::timeout(Duration::from_secs(1), broker.receive(10)).await {
            Ok(received) => return broker.ack(received).await.unwrap(),
            Err(_) => assert!(begin.elapsed() < PATIENCE, "the consumer gets nothing: {:?}", broker.status()),
        }
    }
}

pub async fn close<const N: usize>(brokers: [Broker; N]) {
    for broker in brokers {
        broker.close().await;
    }
}

pub async fn a_released_message_comes_again_later(world: &World<'_>) {
    let broker = world.broker();
    let event = world.event(LONG, "acme", None);
    publish(&broker, vec![event.clone()]).await;
    let first = receive_one(&broker).await;
    assert_eq!((id(&first), first.redeliveries), (event.claims.execution_id, 0));
    assert_eq!(first.reference.as_ref().unwrap().claims, event.claims);
    assert_eq!(first.properties.get("route").map(String::as_str), Some("default"));
    let message_id = first.message_id.clone();
    let released = Instant::now();
    broker.release(first, Duration::from_millis(700)).await;
    let again = receive_one(&broker).await;
    assert!(released.elapsed() >= Duration::from_millis(700), "it came after {:?}", released.elapsed());
    assert_eq!((id(&again), &again.message_id), (event.claims.execution_id, &message_id));
    assert_eq!(again.redeliveries, 1);
    broker.ack(vec![again]).await.unwrap();
    silent(&broker, Duration::from_millis(500)).await;
    close([broker]).await;
}

pub async fn a_dead_letter_keeps_its_properties(world: &World<'_>) {
    let broker = world.broker();
    publish(&broker, vec![world.event(LONG, "acme", None)]).await;
    let message = receive_one(&broker).await;
    let (raw, message_id) = (message.raw.clone(), message.message_id.clone());
    broker.dead_letter(&message.topic, &raw, message.dead_letter_properties(), "410 Gone").await.unwrap();
    broker.ack(vec![message]).await.unwrap();
    let letters = (world.open)(topics(&["dealscale.deadletter.workflow.long"]));
    let letter = receive_one(&letters).await;
    assert_eq!(letter.topic, Topic::try_new(LONG).unwrap().dead_letter());
    assert_eq!(letter.raw, raw);
    for (name, value) in [
        ("route", "default"),
        ("dead_letter_reason", "410 Gone"),
        ("original_topic", LONG),
        ("original_message_id", &message_id),
    ] {
        assert_eq!(letter.properties.get(name).map(String::as_str), Some(value), "{name}");
    }
    letters.ack(vec![letter]).await.unwrap();
    close([broker, letters]).await;
}

pub async fn a_key_is_worked_on_in_order_and_alone(world: &World<'_>) {
    const KEYS: [&str; 4] = ["a", "b", "c", "d"];
    let (one, two) = (world.broker(), world.broker());
    for broker in [&one, &two] {
        ready(world, broker).await;
    }
    let mut events = Vec::new();
    for _ in 0..15 {
        events.extend(KEYS.map(|key| world.event(LONG, "acme", Some(key))));
    }
    let order = |key: &str| -> Vec<ExecutionId> {
        let of_key = |e: &&Outgoing| e.ordering_key.as_ref().is_some_and(|k| k.as_str() == key);
        events.iter().filter(of_key).map(|e| e.claims.execution_id).collect()
    };
    let busy: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let done: Arc<Mutex<BTreeMap<String, Vec<ExecutionId>>>> = Arc::default();
    let consume = |broker: Broker| {
        let (busy, done) = (busy.clone(), done.clone());
        async move {
            let mut working = futures_util::stream::FuturesUnordered::new();
            loop {
                tokio::select! {
                    received = broker.receive(8) => for message in received {
                        let Some(key) = message.ordering_key.as_ref().map(ToString::to_string) else {
                            // An event of `ready`.
                            broker.ack(vec![message]).await.unwrap();
                            continue;
                        };
                        assert!(busy.lock().unwrap().insert(key.clone()), "two of key {key} at once");
                        let (broker, busy, done) = (broker.clone(), busy.clone(), done.clone());
                        working.push(async move {
                            tokio::time::sleep(Duration::from_millis(fastrand::u64(0..10))).await;
                            if message.redeliveries == 0 && fastrand::u8(0..5) == 0 {
                                // A retry holds the key.
                                busy.lock().unwrap().remove(&key);
                                return broker.release(message, Duration::from_millis(30)).await;
                            }
                            done.lock().unwrap().entry(key.clone()).or_default().push(id(&message));
                            busy.lock().unwrap().remove(&key);
                            broker.ack(vec![message]).await.unwrap();
                        });
                    },
                    Some(()) = futures_util::StreamExt::next(&mut working), if !working.is_empty() => {}
                }
            }
        }
    };
    let finished = async {
        publish(&one, events.clone()).await;
        let begin = Instant::now();
        while done.lock().unwrap().values().map(Vec::len).sum::<usize>() < events.len() {
            assert!(begin.elapsed() < PATIENCE, "only {:?} are done", done.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = finished => {}
        () = consume(one.clone()) => {}
        () = consume(two.clone()) => {}
    }
    for key in KEYS {
        assert_eq!(done.lock().unwrap()[key], order(key), "key {key}");
    }
    close([one, two]).await;
}

pub async fn a_delayed_event_comes_when_it_is_due(world: &World<'_>) {
    let broker = world.broker();
    ready(world, &broker).await;
    let due = world.clock.now().plus(Duration::from_secs(3));
    let delayed = Outgoing { deliver_at: Some(due), ..world.event(LONG, "acme", None) };
    let prompt = world.event(LONG, "acme", None);
    publish(&broker, vec![delayed.clone(), prompt.clone()]).await;
    let first = receive_one(&broker).await;
    assert_eq!(id(&first), prompt.claims.execution_id, "a delayed event holds up the others");
    broker.ack(vec![first]).await.unwrap();
    let second = receive_one(&broker).await;
    assert_eq!(id(&second), delayed.claims.execution_id);
    let now = world.clock.now();
    assert!(now >= due.minus(Duration::from_millis(50)), "it came at {now}, due is {due}");
    assert!(now <= due.plus(Duration::from_secs(5)), "it came at {now}, due is {due}");
    broker.ack(vec![second]).await.unwrap();
    close([broker]).await;
}

/// Waiting and unacknowledged messages, and what is retained of acknowledged ones.
pub async fn figures(broker: &Broker) -> (u64, u64, Option<Timestamp>) {
    let all = broker.backlog().await.unwrap();
    let own = all.into_iter().find(|backlog| backlog.topic == LONG);
    own.map_or((0, 0, None), |own| (own.waiting + own.unacknowledged, own.retained, own.oldest))
}

pub async fn the_backlog_and_what_is_retained_are_told(world: &World<'_>) {
    let broker = world.broker();
    publish(&broker, (0..5).map(|_| world.event(LONG, "acme", None)).collect()).await;
    until("five wait", &broker, |(open, _, oldest)| open == 5 && oldest.is_some()).await;
    let mut got = Vec::new();
    while got.len() < 5 {
        got.extend(receive(&broker, 5).await);
    }
    until("five are held", &broker, |(open, ..)| open == 5).await;
    broker.ack(got).await.unwrap();
    until("none is open, and some are retained", &broker, |(open, retained, _)| open == 0 && retained > 0).await;
    close([broker]).await;
}

async fn until(what: &str, broker: &Broker, met: impl Fn((u64, u64, Option<Timestamp>)) -> bool) {
    let begin = Instant::now();
    loop {
        let figures = figures(broker).await;
        if met(figures) {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{what}: {figures:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

pub async fn what_is_dropped_comes_again(world: &World<'_>) {
    let broker = world.broker();
    let event = world.event(LONG, "acme", None);
    publish(&broker, vec![event.clone()]).await;
    drop(receive_one(&broker).await);
    let again = receive_one(&broker).await;
    assert_eq!(id(&again), event.claims.execution_id);
    broker.ack(vec![again]).await.unwrap();
    close([broker]).await;
}

pub async fn a_tenant_that_is_new_is_received_without_a_restart(world: &World<'_>) {
    let broker = world.broker();
    ready(world, &broker).await;
    let event = world.event("dealscale.workflow.long.late", "late", None);
    publish(&broker, vec![event.clone()]).await;
    let message = receive_one(&broker).await;
    assert_eq!(id(&message), event.claims.execution_id);
    assert_eq!(message.topic.as_str(), "dealscale.workflow.long.late");
    broker.ack(vec![message]).await.unwrap();
    close([broker]).await;
}

/// Accepts events into the outbox; what the relay would publish of them.
pub async fn append(world: &World<'_>, outbox: &Outbox, count: usize) -> Vec<Outgoing> {
    let mut sent = Vec::new();
    for n in 0..count {
        let mut outgoing = world.event(LONG, "acme", None);
        let body = bytes::Bytes::from(format!("{{\"n\":{n}}}"));
        outgoing.claims.payload_sha256 = BodyHash::of(&body);
        let envelope = serde_json::json!({
            "tenant": "acme", "execution_id": outgoing.claims.execution_id, "topic": LONG, "route": "default",
            "accepted_at": world.clock.now(), "body_hash": outgoing.claims.payload_sha256,
        });
        let event = Event { envelope: serde_json::from_value(envelope).unwrap(), body };
        let append = Append { event, idempotency_key: None, answer: bytes::Bytes::new() };
        outbox.append(append).await.unwrap();
        sent.push(outgoing);
    }
    sent
}
