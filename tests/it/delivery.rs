//! Relay and delivery over the embedded stores, in this process, against a receiver in n8n's place.

#![allow(clippy::unwrap_used)] // helpers of tests are not seen as tests

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dealscale::broker::{Broker, KeyRing, Topics};
use dealscale::clock::Clock;
use dealscale::config::{Config, EnvironmentConfig};
use dealscale::delivery::{Alarm, Delivery};
use dealscale::event::{Content, Envelope, Event, State};
use dealscale::ids::{BodyHash, ExecutionId, Key, OrderingKey, Tenant, Topic, Workflow};
use dealscale::n8n::N8n;
use dealscale::outbox::{Append, Outbox};
use dealscale::payloads::{Row, Store};
use dealscale::relay::Relay;
use dealscale::supervise::Supervisor;
use dealscale::{delivery, outbox, relay};

use crate::support::receiver::{Receiver, Reply, Seen};

const LIMIT: Duration = Duration::from_secs(20);

/// Stores and brokers, which outlive the processes of a test.
struct World {
    config: Arc<EnvironmentConfig>,
    outbox: Outbox,
    store: Store,
    broker: Broker,
    finals: Arc<Mutex<Vec<(Key, State)>>>,
    /// Kept until the end: the files lie in it.
    dir: tempfile::TempDir,
}

/// One start of relay and delivery.
struct Process {
    runtime: Option<tokio::runtime::Runtime>,
    supervisor: Supervisor,
    relay: Relay,
    delivery: Delivery,
}

const QUICK: &str = r#"
[environments.test.delivery]
claim = "1s"
sweep_interval = "200ms"
breaker_open = "200ms"
follow_interval = "50ms"
follow_lost_after = "1s"
[environments.test.default_route.retry]
min = "20ms"
max = "100ms"
"#;

impl World {
    async fn new(receiver: &Receiver, extra: &str) -> Self {
        Self::at(&receiver.url(""), extra, |_| String::new()).await
    }

    async fn at(url: &str, extra: &str, n8n: impl FnOnce(&Path) -> String) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::tempdir().unwrap();
        let text = format!(
            "state_dir = {:?}\n[environments.test]\n[environments.test.tenants.\"*\"]\n[environments.test.n8n]\nurl = {url:?}\n{}\n{extra}",
            dir.path(),
            n8n(dir.path()),
        );
        let config: Config = dealscale::config::parse(&text).unwrap_or_else(|problems| panic!("{problems:?}\n{text}"));
        let signing = config.signing.clone();
        let config = Arc::new(config.environments.into_values().next().unwrap());
        std::fs::create_dir_all(&config.dir).unwrap();
        let limits: outbox::TenantLimits = Arc::new(|_| (1, dealscale::units::Bytes::gib(1)));
        let (outbox_config, name) = (config.outbox.clone(), config.name.clone());
        let outbox = tokio::task::spawn_blocking(move || Outbox::open(&outbox_config, &name, limits, Clock::System))
            .await
            .unwrap()
            .unwrap();
        let store = Store::open(&config.payloads, &config.outbox, &config.name, Clock::System).await.unwrap();
        let keys = Arc::new(KeyRing::open(&signing).unwrap());
        let broker =
            Broker::open(&config.broker, &config.name, keys, Topics::of(&config), &outbox, Clock::System).unwrap();
        Self { config, outbox, store, broker, finals: Arc::default(), dir }
    }

    /// In a runtime of its own, so that it can be killed between two instructions.
    fn start(&self) -> Process {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let guard = runtime.enter();
        let (supervisor, mut failures) = Supervisor::new();
        let alarm = Alarm::default();
        let finals = self.finals.clone();
        let on_final: relay::OnFinal =
            Arc::new(move |key: &Key, state| finals.lock().unwrap().push((key.clone(), state)));
        let wake = alarm.clone();
        let relay = Relay::start(
            relay::Parts {
                config: self.config.clone(),
                outbox: self.outbox.clone(),
                store: self.store.clone(),
                broker: self.broker.clone(),
                clock: Clock::System,
                on_final: on_final.clone(),
                on_receipt: Arc::new(|_, _| {}),
                on_delayed: Arc::new(move |at| wake.at(at)),
            },
            &supervisor,
        );
        let delivery = Delivery::start(
            delivery::Parts {
                config: self.config.clone(),
                store: self.store.clone(),
                broker: self.broker.clone(),
                n8n: N8n::new(&self.config.n8n).unwrap(),
                clock: Clock::System,
                on_final,
                alarm,
            },
            &supervisor,
        )
        .unwrap();
        runtime.spawn(async move {
            let name = failures.next().await;
            eprintln!("task {name} died");
            std::process::abort();
        });
        drop(guard);
        Process { runtime: Some(runtime), supervisor, relay, delivery }
    }

    async fn publish(&self, tenant: &str, n: u32, change: impl FnOnce(&mut Envelope)) -> Key {
        let body = format!(r#"{{"n":{n}}}"#);
        let mut envelope = Envelope {
            tenant: Tenant::try_new(tenant).unwrap(),
            execution_id: ExecutionId::new(),
            workflow: Some(Workflow::try_new("w").unwrap()),
            topic: Topic::try_new("dealscale.workflow.long").unwrap(),
            route: "default".into(),
            accepted_at: Clock::System.now(),
            deliver_at: None,
            ordering_key: None,
            priority: Envelope::PRIORITY,
            metadata: BTreeMap::new(),
            traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
            source_execution: None,
            source_workflow: None,
            body_hash: BodyHash::of(body.as_bytes()),
            content: Content::Json,
        };
        change(&mut envelope);
        let key = envelope.key();
        let event = Event { envelope, body: body.into() };
        self.outbox.append(Append { event, idempotency_key: None, answer: Default::default() }).await.unwrap();
        key
    }

    async fn row(&self, key: &Key) -> Option<Row> {
        self.store.get(key, true).await.unwrap()
    }

    /// Waits for dead letters in the broker.
    async fn letters(&self, n: u64) {
        let end = Instant::now() + LIMIT;
        loop {
            let backlog = self.broker.backlog().await.unwrap();
            let waiting: u64 = backlog.iter().filter(|b| b.topic.contains("deadletter")).map(|b| b.waiting).sum();
            if waiting == n {
                return;
            }
            assert!(Instant::now() < end, "{backlog:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits for a state and answers the row with its attempts.
    async fn until(&self, key: &Key, state: State) -> Row {
        let end = Instant::now() + LIMIT;
        loop {
            let row = self.row(key).await;
            if let Some(row) = row.as_ref().filter(|row| row.state == state) {
                return row.clone();
            }
            assert!(Instant::now() < end, "not {state} within {LIMIT:?}: {row:#?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Nothing is left to do: outbox and broker are empty.
    async fn empty(&self) {
        let end = Instant::now() + LIMIT;
        loop {
            let records = self.outbox.status().records;
            let backlog: u64 = self
                .broker
                .backlog()
                .await
                .unwrap()
                .iter()
                .filter(|b| !b.topic.contains("deadletter"))
                .map(|b| b.waiting + b.unacknowledged)
                .sum();
            if records == 0 && backlog == 0 {
                return;
            }
            assert!(Instant::now() < end, "{records} records, {backlog} messages are left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Process {
    /// As SIGKILL: every task stops where it waits.
    fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }

    /// The status is made a few times a second.
    async fn wait_for(&self, is: impl Fn(&delivery::Status) -> bool) {
        let end = Instant::now() + LIMIT;
        loop {
            let status = self.delivery.status();
            if is(&status) {
                return;
            }
            assert!(Instant::now() < end, "{status:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// As SIGSTOP: no task of it runs until then. Answers what turns true when it is over.
    fn stop_for(&self, time: Duration) -> Arc<std::sync::atomic::AtomicBool> {
        let awake: Arc<std::sync::atomic::AtomicBool> = Arc::default();
        let both = Arc::new(std::sync::Barrier::new(2));
        for _ in 0..2 {
            let (awake, both) = (awake.clone(), both.clone());
            self.runtime.as_ref().unwrap().spawn(async move {
                both.wait();
                std::thread::sleep(time);
                awake.store(true, std::sync::atomic::Ordering::Release);
            });
        }
        awake
    }

    async fn drain(mut self) -> bool {
        let drained = self.supervisor.drain(Duration::from_secs(5)).await;
        self.runtime.take().unwrap().shutdown_background();
        drained
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn calls(receiver: &Receiver) -> Vec<Seen> {
    receiver.seen().into_iter().filter(|seen| !seen.uri.path().starts_with("/healthz")).collect()
}

async fn wait_calls(receiver: &Receiver, n: usize) -> Vec<Seen> {
    let end = Instant::now() + LIMIT;
    loop {
        let seen = calls(receiver);
        if seen.len() >= n {
            return seen;
        }
        assert!(Instant::now() < end, "{} of {n} calls: {seen:#?}", seen.len());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn number(seen: &Seen) -> u64 {
    serde_json::from_slice::<serde_json::Value>(&seen.body).unwrap()["n"].as_u64().unwrap()
}

fn numbers(seen: &[Seen]) -> Vec<u64> {
    seen.iter().map(number).collect()
}

fn ordered(key: &str) -> impl FnOnce(&mut Envelope) {
    let key = OrderingKey::try_new(key).unwrap();
    move |envelope| envelope.ordering_key = Some(key)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_arrives_once_with_its_identity() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    let process = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    let row = world.until(&key, State::Delivered).await;
    world.empty().await;
    let seen = calls(&receiver);
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].header("webhook-id"), key.execution_id.to_string());
    assert_eq!(seen[0].header("x-dealscale-attempt"), "1");
    assert!(seen[0].header("traceparent").starts_with("00-0af7651916cd43dd8448eb211c80319c-"));
    assert_eq!(&seen[0].body[..], b"{\"n\":1}");
    assert_eq!(row.history.len(), 1);
    assert_eq!(
        (row.history[0].status, row.history[0].traceparent.as_deref()),
        (Some(200), Some(seen[0].header("traceparent")))
    );
    assert!(row.history[0].message_id.is_some());
    assert_eq!(*world.finals.lock().unwrap(), [(key, State::Delivered)]);
    assert_eq!(process.relay.status().relayed_total, 1);
    assert!(process.drain().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_attempts_are_repeated_by_the_schedule() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    receiver.script([Reply::status(500), Reply::status(404), Reply::status(429).header("retry-after", "1")]);
    let _process = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    let row = world.until(&key, State::Delivered).await;
    let seen = calls(&receiver);
    assert_eq!(
        seen.iter().map(|s| s.header("x-dealscale-attempt").to_owned()).collect::<Vec<_>>(),
        ["1", "2", "3", "4"]
    );
    assert!(seen.iter().all(|s| s.header("webhook-id") == key.execution_id.to_string()));
    assert!(seen[3].at - seen[2].at >= Duration::from_secs(1), "Retry-After was not kept");
    let classes: Vec<_> = row.history.iter().map(|a| (a.status, a.error_class.as_deref())).collect();
    let expected = [
        (Some(500), Some("http_5xx")),
        (Some(404), Some("http_4xx")),
        (Some(429), Some("http_4xx")),
        (Some(200), None),
    ];
    assert_eq!(classes, expected);
    // Each attempt has a span of its own.
    let spans: std::collections::HashSet<_> = seen.iter().map(|s| s.header("traceparent").to_owned()).collect();
    assert_eq!(spans.len(), 4);
    world.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_waits_are_the_ledgers_and_the_timer_publishes_again() {
    let receiver = Receiver::start().await;
    let world = World::new(
        &receiver,
        &format!("{QUICK}\n[environments.test.broker]\n")
            .replace("claim = \"1s\"", "claim = \"1s\"\nhold_max = \"0ms\""),
    )
    .await;
    receiver.script([Reply::status(503), Reply::status(503)]);
    let _process = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    world.until(&key, State::Delivered).await;
    assert_eq!(calls(&receiver).len(), 3);
    world.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gone_is_dead_at_once_and_can_be_replayed() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    receiver.script([Reply::status(410).body("no more")]);
    let _process = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    let row = world.until(&key, State::Dead).await;
    assert_eq!(row.error_class.as_deref(), Some("http_4xx"));
    assert_eq!(row.error.as_deref(), Some("HTTP 410 Gone: no more"));
    world.empty().await;
    let letters = Topic::try_new("dealscale.deadletter.workflow.long").unwrap();
    assert_eq!(world.outbox.local().browse(&letters, 10).await.unwrap().len(), 1);
    assert_eq!(world.store.replay(&key).await.unwrap(), Some(true));
    world.until(&key, State::Delivered).await;
    assert_eq!(calls(&receiver).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schedule_ends_in_the_dead_letters() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, &format!("{QUICK}attempts_max = 3\n")).await;
    receiver.default_reply(Reply::status(500));
    let _process = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    let row = world.until(&key, State::Dead).await;
    assert_eq!((row.attempts, row.history.len(), calls(&receiver).len()), (3, 3, 3));
    world.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_n8n_burns_few_attempts_and_its_return_delivers_all() {
    let address = {
        // A port that is free now, for an n8n that comes later.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let extra = QUICK.replace("breaker_open", "concurrency = 4\nbreaker_failures = 3\nbreaker_open");
    let world = World::at(&format!("http://{address}"), &extra, |_| String::new()).await;
    let process = world.start();
    let mut keys = Vec::new();
    for n in 0..40 {
        keys.push(world.publish("acme", n, |_| {}).await);
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    process.wait_for(|status| status.breakers_open == [format!("http://{address}")]).await;
    let mut begun = 0;
    for key in &keys {
        begun += world.row(key).await.map_or(0, |row| row.attempts);
    }
    // Three failures open it; the others were under way.
    assert!((3..=3 + 4).contains(&begun), "{begun} attempts were burnt");
    let receiver = Receiver::start_on(address).await;
    for key in &keys {
        world.until(key, State::Delivered).await;
    }
    assert_eq!(calls(&receiver).len(), 40);
    world.empty().await;
    process.wait_for(|status| status.breakers_open.is_empty()).await;
}

/// As an n8n whose process is stopped: connections are accepted by the kernel, and nothing answers.
#[tokio::test(flavor = "multi_thread")]
async fn an_n8n_that_hangs_burns_few_attempts() {
    let hung = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = hung.local_addr().unwrap();
    let extra = "[environments.test.default_route]\ntimeout = \"100ms\"\nretry.attempts_max = 4\n";
    let config = QUICK
        .replace("breaker_open", "breaker_failures = 2\nbreaker_open")
        .replace("[environments.test.default_route.retry]\nmin = \"20ms\"\nmax = \"100ms\"\n", extra);
    let world =
        World::at(&format!("http://{addr}"), &format!("{config}retry.min = \"20ms\"\n"), |_| String::new()).await;
    let mut keys = Vec::new();
    for n in 0..30 {
        keys.push(world.publish("acme", n, |_| {}).await);
    }
    let process = world.start();
    process.wait_for(|status| !status.breakers_open.is_empty()).await;
    drop(hung);
    let _receiver = Receiver::start_on(addr).await;
    for key in &keys {
        world.until(key, State::Delivered).await;
    }
}

/// A server that takes connections and answers "down", such as a proxy before a dead n8n, is not known to be down by a probe.
#[tokio::test(flavor = "multi_thread")]
async fn trials_of_a_server_that_is_still_down_end_no_event() {
    let receiver = Receiver::start().await;
    receiver.script((0..25).map(|n| Reply::status(if n % 2 == 0 { 503 } else { 502 })));
    let extra = format!(
        "[environments.test.default_route]\nwebhook = {:?}\nconcurrency = 1\nretry.attempts_max = 2\n\
         retry.min = \"10ms\"\nretry.max = \"20ms\"\n",
        receiver.url("/hook")
    );
    let config = QUICK.split("[environments.test.default_route.retry]").next().unwrap();
    let config = config.replace("breaker_open = \"200ms\"", "breaker_failures = 1\nbreaker_open = \"50ms\"");
    let world = World::at("http://127.0.0.1:1", &format!("{config}{extra}"), |_| String::new()).await;
    let mut keys = Vec::new();
    for n in 0..5 {
        keys.push(world.publish("acme", n, |_| {}).await);
    }
    let _process = world.start();
    for key in &keys {
        world.until(key, State::Delivered).await;
    }
    assert_eq!(calls(&receiver).len(), 30);
}

/// The process sleeps longer than its claim while its call is under way, and another one takes the event over.
#[tokio::test(flavor = "multi_thread")]
async fn who_slept_longer_than_the_claim_ends_nothing() {
    let receiver = Receiver::start().await;
    receiver.script([Reply::status(410).after(Duration::from_millis(500))]);
    let world = World::new(&receiver, &QUICK.replace("claim = \"1s\"", "claim = \"1s\"\nsweep_after = \"1s\"")).await;
    let sleeper = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    wait_calls(&receiver, 1).await;
    let awake = sleeper.stop_for(Duration::from_secs(6));
    let _other = world.start();
    world.until(&key, State::Delivered).await;
    assert!(!awake.load(std::sync::atomic::Ordering::Acquire), "it slept too short for this test");
    while !awake.load(std::sync::atomic::Ordering::Acquire) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // It learns of its answer only now: gone, and so a dead letter. It is not asked any more.
    assert!(sleeper.drain().await);
    let row = world.row(&key).await.unwrap();
    assert_eq!((row.state, row.claim), (State::Delivered, None));
    assert_eq!(*world.finals.lock().unwrap(), [(key, State::Delivered)]);
    assert_eq!(calls(&receiver).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_right_is_never_delivered() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    let process = world.start();
    // Unknown to the ledger, authentic otherwise.
    let mut unknown = None;
    let known = world.publish("acme", 1, |envelope| unknown = Some(envelope.clone())).await;
    world.until(&known, State::Delivered).await;
    let envelope = Envelope { execution_id: ExecutionId::new(), ..unknown.unwrap() };
    let outgoing = dealscale::references::outgoing(&world.config, &envelope, Clock::System.now());
    let mut other_hash = outgoing.clone();
    other_hash.claims.execution_id = known.execution_id;
    other_hash.claims.payload_sha256 = BodyHash::of(b"another");
    let mut other_tenant = outgoing.clone();
    other_tenant.claims.tenant_id = Tenant::try_new("other").unwrap();
    other_tenant.claims.execution_id = known.execution_id;
    let mut expired = outgoing.clone();
    expired.claims.exp = 1;
    for result in world.broker.publish(vec![outgoing, other_hash, other_tenant, expired]).await {
        result.unwrap();
    }
    world.empty().await;
    let reasons: Vec<String> = world.store.rejected(10).await.unwrap().into_iter().map(|r| r.reason).collect();
    assert_eq!(reasons.len(), 4, "{reasons:#?}");
    assert_eq!(reasons.iter().filter(|r| r.contains("no such event")).count(), 3, "{reasons:#?}");
    assert_eq!(reasons.iter().filter(|r| r.contains("another body")).count(), 1, "{reasons:#?}");
    assert_eq!(calls(&receiver).len(), 1);
    process.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_that_was_altered_is_a_dead_letter() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    let at = Clock::System.now().plus(Duration::from_secs(2));
    let process = world.start();
    let key = world.publish("acme", 1, |envelope| envelope.deliver_at = Some(at)).await;
    world.until(&key, State::Relayed).await;
    let dealscale::config::payloads::PayloadStore::Sqlite { file } = &world.config.payloads.store else {
        unreachable!()
    };
    let database = rusqlite::Connection::open(file).unwrap();
    assert_eq!(database.execute("UPDATE contents SET body = CAST('{\"n\":2}' AS BLOB)", []).unwrap(), 1);
    let row = world.until(&key, State::Dead).await;
    assert_eq!(row.error_class.as_deref(), Some("payload_mismatch"));
    assert!(calls(&receiver).is_empty());
    process.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_keeps_its_order_over_failures() {
    let receiver = Receiver::start().await;
    // Long waits too stay in order: nothing is parked for an ordering key.
    let world = World::new(&receiver, &QUICK.replace("claim = \"1s\"", "claim = \"1s\"\nhold_max = \"0ms\"")).await;
    receiver.script([Reply::status(503), Reply::status(500), Reply::status(500)]);
    let _process = world.start();
    let mut keys = Vec::new();
    for n in 0..6 {
        keys.push(world.publish("acme", n, ordered("customer-1")).await);
    }
    for key in &keys {
        world.until(key, State::Delivered).await;
    }
    assert_eq!(numbers(&calls(&receiver)), [0, 0, 0, 0, 1, 2, 3, 4, 5]);
    world.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_holds_its_key_over_a_restart_until_it_is_discarded() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    receiver.script([Reply::status(410)]);
    let process = world.start();
    let first = world.publish("acme", 0, ordered("k")).await;
    let second = world.publish("acme", 1, ordered("k")).await;
    world.until(&first, State::Dead).await;
    let other = world.publish("acme", 2, ordered("another")).await;
    world.until(&other, State::Delivered).await;
    assert!(process.drain().await);
    let process = world.start();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(world.row(&second).await.unwrap().state, State::Relayed);
    process.wait_for(|status| status.keys_held == 1).await;
    assert_eq!(world.store.discard(&first).await.unwrap(), Some(true));
    world.until(&second, State::Delivered).await;
    world.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_dead_letter_goes_before_what_it_held() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    receiver.script([Reply::status(410)]);
    let _process = world.start();
    let first = world.publish("acme", 0, ordered("k")).await;
    let second = world.publish("acme", 1, ordered("k")).await;
    world.until(&first, State::Dead).await;
    assert_eq!(world.store.replay(&first).await.unwrap(), Some(true));
    world.until(&second, State::Delivered).await;
    assert_eq!(numbers(&calls(&receiver)), [0, 0, 1]);
    world.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_skip_a_dead_letter_lets_its_key_go() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, &format!("{QUICK}[environments.test.default_route]\non_dead = \"skip\"\n")).await;
    receiver.script([Reply::status(410)]);
    let _process = world.start();
    let first = world.publish("acme", 0, ordered("k")).await;
    let second = world.publish("acme", 1, ordered("k")).await;
    world.until(&second, State::Delivered).await;
    assert_eq!(world.row(&first).await.unwrap().state, State::Dead);
    world.empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tenants_backlog_does_not_delay_another() {
    let receiver = Receiver::start().await;
    receiver.default_reply(Reply::status(200).after(Duration::from_millis(10)));
    let world = World::new(&receiver, &QUICK.replace("claim = \"1s\"", "claim = \"5s\"\nconcurrency = 2")).await;
    for n in 0..300 {
        world.publish("noisy", n, |_| {}).await;
    }
    let _process = world.start();
    wait_calls(&receiver, 20).await;
    let mut quiet = Vec::new();
    for n in 0..5 {
        quiet.push(world.publish("quiet", 1_000 + n, |_| {}).await);
    }
    for key in &quiet {
        world.until(key, State::Delivered).await;
    }
    let done = calls(&receiver).len();
    assert!(done < 150, "{done} calls were made before five of a quiet tenant");
}

/// More of one tenant than there is room for, on a route that takes none of it up.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_whose_route_is_stuck_does_not_fill_the_room_of_another() {
    let receiver = Receiver::start().await;
    receiver.default_reply(Reply::status(200));
    let stuck = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let route = format!(
        "[[environments.test.routes]]\nname = \"stuck\"\nconcurrency = 1\ntimeout = \"1h\"\nwebhook = \"http://{}/\"\n",
        stuck.local_addr().unwrap()
    );
    let world = World::new(&receiver, &format!("{QUICK}{route}")).await;
    let process = world.start();
    let noisy = |n| world.publish("noisy", n, |envelope| envelope.route = "stuck".into());
    futures_util::future::join_all((0..1_500).map(noisy)).await;
    process.wait_for(|status| status.waiting >= 768).await;
    for n in 0..5 {
        let quiet = world.publish("quiet", n, |_| {}).await;
        world.until(&quiet, State::Delivered).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_event_arrives_at_its_time() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    let _process = world.start();
    let started = Instant::now();
    let at = Clock::System.now().plus(Duration::from_secs(3));
    let late = world.publish("acme", 1, |envelope| envelope.deliver_at = Some(at)).await;
    let soon = world.publish("acme", 2, |_| {}).await;
    world.until(&soon, State::Delivered).await;
    assert!(Clock::System.now() < at, "an event that was not delayed took as long");
    world.until(&late, State::Delivered).await;
    let waited = started.elapsed();
    assert!(waited >= Duration::from_millis(2_950) && waited < Duration::from_secs(8), "{waited:?}");
    assert_eq!(numbers(&calls(&receiver)), [2, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_event_is_not_delivered() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    let _process = world.start();
    let at = Clock::System.now().plus(Duration::from_secs(1));
    let key = world.publish("acme", 1, |envelope| envelope.deliver_at = Some(at)).await;
    world.until(&key, State::Relayed).await;
    assert_eq!(world.store.cancel(&key).await.unwrap(), Some(State::Cancelled));
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(calls(&receiver).is_empty());
    world.empty().await;
}

/// Cancelled while it waited in the outbox: new to the ledger, and known to it from before a crash between the two.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_cancelled_in_the_outbox_is_an_end_in_the_ledger_and_never_delivered() {
    let receiver = Receiver::start().await;
    // Soon enough to find what a relay left open.
    let world = World::new(&receiver, &QUICK.replace("claim = \"1s\"", "claim = \"1s\"\nsweep_after = \"1s\"")).await;
    let (fresh, known) = (world.publish("acme", 1, |_| {}).await, world.publish("acme", 2, |_| {}).await);
    let record = world.outbox.find(&known).await.unwrap().unwrap();
    world.store.admit(vec![record.event]).await.unwrap();
    for key in [&fresh, &known] {
        assert_eq!(world.outbox.cancel(key).await.unwrap(), outbox::Cancelled::Done);
    }
    let process = world.start();
    for key in [&fresh, &known] {
        let row = world.until(key, State::Cancelled).await;
        assert_eq!((row.attempts, row.history.len()), (0, 0), "{row:#?}");
    }
    world.empty().await;
    let told = world.finals.lock().unwrap().clone();
    assert!([&fresh, &known].iter().all(|key| told.contains(&((*key).clone(), State::Cancelled))), "{told:?}");
    // Whatever is published behind them comes, and they do not.
    let next = world.publish("acme", 3, |_| {}).await;
    world.until(&next, State::Delivered).await;
    assert_eq!(numbers(&calls(&receiver)), [3]);
    process.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_mid_call_everything_arrives_with_the_same_id() {
    let receiver = Receiver::start().await;
    receiver.default_reply(Reply::status(200).after(Duration::from_millis(30)));
    // The broker of this test does not die with the process, and so never gives again what a dead process held: all of it is
    // up to the sweeper, as when a broker lost its data.
    let world = World::new(&receiver, &QUICK.replace("claim = \"1s\"", "claim = \"1s\"\nsweep_after = \"1s\"")).await;
    let mut keys = Vec::new();
    for n in 0..60 {
        keys.push(world.publish("acme", n, |_| {}).await);
    }
    for round in 1..=3 {
        let process = world.start();
        wait_calls(&receiver, round * 8).await;
        process.kill();
    }
    let _process = world.start();
    for key in &keys {
        world.until(key, State::Delivered).await;
    }
    let mut bodies: BTreeMap<u64, std::collections::HashSet<String>> = BTreeMap::new();
    for seen in calls(&receiver) {
        bodies.entry(number(&seen)).or_default().insert(seen.header("webhook-id").to_owned());
    }
    assert_eq!(bodies.len(), 60);
    assert!(bodies.values().all(|ids| ids.len() == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_body_under_a_known_id_is_poisoned() {
    let receiver = Receiver::start().await;
    let world = World::new(&receiver, QUICK).await;
    let process = world.start();
    let first = world.publish("acme", 1, |_| {}).await;
    world.until(&first, State::Delivered).await;
    world.empty().await;
    // Through another appliance, say: this one's outbox does not remember the id.
    let other = Event {
        envelope: Envelope { body_hash: BodyHash::of(b"{}"), ..world.row(&first).await.unwrap().envelope },
        body: "{}".into(),
    };
    let appended =
        world.outbox.append(Append { event: other, idempotency_key: None, answer: Default::default() }).await;
    if appended.is_ok() {
        let end = Instant::now() + LIMIT;
        while world.outbox.status().poisoned == 0 {
            assert!(Instant::now() < end, "it was not poisoned");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert_eq!(calls(&receiver).len(), 1);
    process.drain().await;
}

/// n8n's database, as far as following needs it.
struct Executions(rusqlite::Connection);

impl Executions {
    fn new(file: &Path) -> Self {
        let connection = rusqlite::Connection::open(file).unwrap();
        connection
            .execute_batch(
                r#"PRAGMA journal_mode = WAL;
                CREATE TABLE execution_entity (id INTEGER PRIMARY KEY AUTOINCREMENT, status VARCHAR NOT NULL,
                "createdAt" DATETIME(3) NOT NULL, "startedAt" DATETIME(3), "tracingContext" TEXT)"#,
            )
            .unwrap();
        Self(connection)
    }

    fn run(&self, seen: &Seen, status: &str) -> i64 {
        let context = serde_json::json!({ "traceparent": seen.header("traceparent") }).to_string();
        self.0
            .execute(
                r#"INSERT INTO execution_entity (status, "createdAt", "startedAt", "tracingContext")
                VALUES (?1, strftime('%Y-%m-%d %H:%M:%f', 'now'), strftime('%Y-%m-%d %H:%M:%f', 'now'), ?2)"#,
                (status, context),
            )
            .unwrap();
        self.0.last_insert_rowid()
    }

    fn set(&self, id: i64, status: &str) {
        self.0.execute("UPDATE execution_entity SET status = ?2 WHERE id = ?1", (id, status)).unwrap();
    }
}

async fn followed(receiver: &Receiver, extra: &str) -> (World, Executions) {
    let world = World::at(&receiver.url(""), &format!("{QUICK}{extra}"), |dir| {
        format!("database_file = {:?}", dir.join("n8n.sqlite"))
    })
    .await;
    let executions = Executions::new(&world.dir.path().join("n8n.sqlite"));
    (world, executions)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_execution_is_followed_to_its_end() {
    let receiver = Receiver::start().await;
    let (world, executions) = followed(&receiver, "").await;
    let process = world.start();
    let mut keys = Vec::new();
    for n in 0..4 {
        keys.push(world.publish("acme", n, |_| {}).await);
    }
    let seen = wait_calls(&receiver, 4).await;
    let mut ids = BTreeMap::new();
    for seen in &seen {
        if number(seen) < 3 {
            ids.insert(number(seen), executions.run(seen, "running"));
        }
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    for key in &keys[..3] {
        assert_eq!(world.row(key).await.unwrap().state, State::Delivering);
    }
    process.wait_for(|status| status.following >= 3).await;
    for (n, status) in [(0, "success"), (1, "error"), (2, "crashed")] {
        executions.set(ids[&n], status);
    }
    let row = world.until(&keys[0], State::Succeeded).await;
    assert_eq!(row.n8n_execution_id, Some(ids[&0].to_string()));
    world.until(&keys[1], State::Failed).await;
    assert_eq!(world.until(&keys[2], State::Failed).await.error_class.as_deref(), Some("crashed"));
    // n8n does not save it.
    world.until(&keys[3], State::Unknown).await;
    assert_eq!(calls(&receiver).len(), 4);
    process.wait_for(|status| status.following == 0).await;
    world.empty().await;
}

/// A workflow that answers with what it got from somewhere else.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_names_somebody_elses_execution_is_not_believed() {
    let receiver = Receiver::start().await;
    let (world, executions) = followed(&receiver, "").await;
    let _process = world.start();
    let first = world.publish("acme", 1, |_| {}).await;
    let seen = wait_calls(&receiver, 1).await;
    let others = executions.run(&seen[0], "success");
    world.until(&first, State::Succeeded).await;
    receiver.default_reply(Reply::status(200).body(&format!(r#"{{"executionId":"{others}"}}"#)));
    let second = world.publish("globex", 2, |_| {}).await;
    let seen = wait_calls(&receiver, 2).await;
    let own = executions.run(&seen[1], "error");
    let row = world.until(&second, State::Failed).await;
    assert_eq!(row.n8n_execution_id, Some(own.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crashed_execution_is_delivered_again_up_to_its_limit() {
    let receiver = Receiver::start().await;
    let (world, executions) =
        followed(&receiver, "[environments.test.default_route]\nredeliver_crashed = true\ncrashes_max = 2\n").await;
    let _process = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    for n in 1..=3 {
        let seen = wait_calls(&receiver, n).await;
        executions.run(&seen[n - 1], "crashed");
    }
    let row = world.until(&key, State::Dead).await;
    assert_eq!((row.attempts, row.crashes), (3, 2));
    world.letters(1).await;
    assert!(calls(&receiver).iter().all(|s| s.header("webhook-id") == key.execution_id.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_timed_out_is_followed_and_not_called_again() {
    let receiver = Receiver::start().await;
    let (world, executions) = followed(&receiver, "[environments.test.default_route]\ntimeout = \"300ms\"\n").await;
    receiver.script([Reply::status(200).after(Duration::from_secs(2))]);
    let _process = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    let seen = wait_calls(&receiver, 1).await;
    let id = executions.run(&seen[0], "running");
    tokio::time::sleep(Duration::from_millis(800)).await;
    executions.set(id, "success");
    let row = world.until(&key, State::Succeeded).await;
    assert_eq!(calls(&receiver).len(), 1);
    assert_eq!(row.history[0].error_class.as_deref(), Some("timeout"));
    assert_eq!(row.n8n_execution_id, Some(id.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn following_goes_on_after_a_kill_and_after_a_drain() {
    let receiver = Receiver::start().await;
    let (world, executions) = followed(&receiver, "").await;
    let process = world.start();
    let key = world.publish("acme", 1, |_| {}).await;
    let seen = wait_calls(&receiver, 1).await;
    let id = executions.run(&seen[0], "running");
    tokio::time::sleep(Duration::from_millis(500)).await;
    process.kill();
    let process = world.start();
    process.wait_for(|status| status.following == 1).await;
    assert!(process.drain().await);
    let row = world.row(&key).await.unwrap();
    assert_eq!((row.state, row.attempts), (State::Delivering, 1));
    let _process = world.start();
    executions.set(id, "success");
    world.until(&key, State::Succeeded).await;
    assert_eq!(calls(&receiver).len(), 1);
}
