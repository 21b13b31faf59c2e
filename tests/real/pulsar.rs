//! The broker against a real Pulsar: what both brokers promise, and what only this one can get wrong.
#![allow(clippy::unwrap_used)] // a test fails by panicking, in its helpers too

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dealscale::broker::topology::{Severity, Topology};
use dealscale::broker::{Broker, Claims, Error, KeyRing, Rejection, Topics};
use dealscale::clock::Clock;
use dealscale::config;
use dealscale::config::Secret;
use dealscale::config::broker::{Pulsar, PulsarAuth};
use dealscale::ids::{Environment, ExecutionId, Tenant, Topic};
use dealscale::outbox::{LeaseLimit, Outbox};
use dealscale::units::{Bytes, Span};
use serde_json::{Value, json};

use super::support::variable;
use crate::conformance::{
    self, LONG, OF_TENANT, PATIENCE, World, close, id, publish, ready, receive, receive_one, silent, topics,
};

fn script(arguments: &[&str], settings: &[(&str, &str)]) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/servers/pulsar.sh");
    let output = Command::new(path).args(arguments).envs(settings.iter().copied()).output().unwrap();
    assert!(output.status.success(), "pulsar.sh {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A namespace of its own.
fn config() -> Pulsar {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::SeqCst);
    Pulsar {
        service_url: variable("DEALSCALE_TEST_PULSAR_URL"),
        http_url: variable("DEALSCALE_TEST_PULSAR_HTTP_URL"),
        tenant: format!("test-{}-{number}", std::process::id()),
        namespace: "production".into(),
        subscription: "dealscale".into(),
        auth: PulsarAuth::None,
        ca_file: None,
        operation_timeout: Span::secs(5),
        topics_file: None,
        create_topics: true,
        receive_queue: 1_000,
    }
}

fn environment() -> Environment {
    Environment::try_new("production").unwrap()
}

fn keys(dir: &Path) -> Arc<KeyRing> {
    let signing = config::Signing { active: None, keys: vec![], dir: dir.join("signing") };
    Arc::new(KeyRing::open(&signing).unwrap())
}

fn world(config: Pulsar, keys: Arc<KeyRing>) -> World<'static> {
    let open =
        move |topics: Topics| Broker::connect(&config, &environment(), keys.clone(), topics, Clock::System).unwrap();
    World { environment: environment(), clock: Clock::System, open: Box::new(open) }
}

fn run<F: Future<Output = ()>>(test: impl FnOnce(World<'static>, Pulsar, Arc<KeyRing>) -> F) {
    let dir = tempfile::tempdir().unwrap();
    let (config, keys) = (config(), keys(dir.path()));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(test(world(config.clone(), keys.clone()), config, keys));
}

macro_rules! conform {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            run(|world, _, _| async move { conformance::$name(&world).await });
        }
    )*};
}

conform!(
    competing_consumers_share_the_work,
    a_released_message_comes_again_later,
    a_dead_letter_keeps_its_properties,
    a_key_is_worked_on_in_order_and_alone,
    a_delayed_event_comes_when_it_is_due,
    the_backlog_and_what_is_retained_are_told,
    what_is_dropped_comes_again,
    a_tenant_that_is_new_is_received_without_a_restart,
);

/// The REST API, past our own client.
async fn rest(config: &Pulsar, method: reqwest::Method, path: &str, body: Option<Value>) -> (u16, Value) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut request = client.request(method, format!("{}/admin/v2{path}", config.http_url));
    if let Some(body) = body {
        request = request.json(&body);
    }
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    (status, serde_json::from_slice(&response.bytes().await.unwrap()).unwrap_or(Value::Null))
}

/// The same with a token and a whole URL.
async fn as_role(token: &str, method: reqwest::Method, url: &str, body: Value) -> (u16, String) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let response = client.request(method, url).bearer_auth(token).json(&body).send().await.unwrap();
    (response.status().as_u16(), response.text().await.unwrap())
}

/// A message as anybody could send it who may publish to the topic.
async fn send_raw(config: &Pulsar, topic: &str, payload: Vec<u8>) {
    let client = pulsar::Pulsar::builder(config.service_url.clone(), pulsar::TokioExecutor).build().await.unwrap();
    let topic = format!("persistent://{}/{}/{topic}", config.tenant, config.namespace);
    let mut producer = client.producer().with_topic(topic).build().await.unwrap();
    producer.send_non_blocking(payload).await.unwrap().await.unwrap();
}

#[test]
fn what_is_not_signed_for_here_comes_out_as_a_rejection() {
    run(|world, config, keys| async move {
        let broker = world.broker();
        ready(&world, &broker).await;
        let claims = world.event(LONG, "acme", None).claims;
        let good = keys.sign(&claims);
        let stranger = tempfile::tempdir().unwrap();
        let other_topic = Claims { topic: "dealscale.workflow.short".parse().unwrap(), ..claims.clone() };
        let other_place = Claims { environment: Environment::try_new("staging").unwrap(), ..claims.clone() };
        let altered = {
            let mine = Claims { tenant_id: Tenant::try_new("other").unwrap(), ..claims.clone() };
            let (mine, parts) = (keys.sign(&mine), good.split('.').collect::<Vec<_>>());
            [parts[0], mine.split('.').nth(1).unwrap(), parts[2]].join(".")
        };
        let found = Topic::try_new(LONG).unwrap();
        for (raw, expected) in [
            ("not a token".to_owned(), Rejection::Malformed("not three parts")),
            (altered, Rejection::Forged),
            (self::keys(stranger.path()).sign(&claims), Rejection::UnknownKey),
            (
                keys.sign(&other_topic),
                Rejection::Transplanted { signed: other_topic.topic.clone(), found: found.clone() },
            ),
            (keys.sign(&other_place), Rejection::Environment(other_place.environment.clone())),
        ] {
            send_raw(&config, LONG, raw.clone().into_bytes()).await;
            let message = receive_one(&broker).await;
            assert_eq!(message.reference, Err(expected));
            assert_eq!(message.raw, raw.as_bytes());
            broker.ack(vec![message]).await.unwrap();
        }
        // Signed by us, but one tenant's topic holds another one's event.
        let stray = world.event("dealscale.workflow.long.acme", "other", None);
        let (topic, tenant) = (stray.claims.topic.clone(), stray.claims.tenant_id.clone());
        publish(&broker, vec![stray]).await;
        let message = receive_one(&broker).await;
        assert_eq!(message.reference, Err(Rejection::Tenant { topic, tenant }));
        broker.ack(vec![message]).await.unwrap();
        // And a good one goes through.
        send_raw(&config, LONG, good.into_bytes()).await;
        assert_eq!(id(&receive_one(&broker).await), claims.execution_id);
        close([broker]).await;
    });
}

#[test]
fn the_first_event_of_a_new_tenant_waits_for_the_first_consumer() {
    run(|world, config, _| async move {
        let event = world.event("dealscale.workflow.long.newcomer", "newcomer", None);
        // This end consumes nothing of it.
        let sender = (world.open)(topics(&["dealscale.workflow.short"]));
        publish(&sender, vec![event.clone()]).await;
        close([sender]).await;
        let path = |topic: &str| format!("/persistent/{}/production/{topic}/subscriptions", config.tenant);
        for topic in ["dealscale.workflow.long.newcomer", "dealscale.deadletter.workflow.long.newcomer"] {
            let (_, subscriptions) = rest(&config, reqwest::Method::GET, &path(topic), None).await;
            assert_eq!(subscriptions, json!(["dealscale"]), "{topic}");
        }
        let receiver = (world.open)(topics(&[OF_TENANT]));
        assert_eq!(id(&receive_one(&receiver).await), event.claims.execution_id);
        close([receiver]).await;
    });
}

#[test]
fn without_leave_to_make_topics_the_outbox_waits_for_topology_apply() {
    run(|world, config, keys| async move {
        let strict = Pulsar { create_topics: false, ..config.clone() };
        // A route's own topic, which the topics file does not name.
        const OWN: &str = "acme.jobs";
        let broker = Broker::connect(&strict, &environment(), keys, topics(&[OWN]), Clock::System).unwrap();
        let event = world.event(OWN, "acme", None);
        let results = broker.publish(vec![event.clone()]).await;
        assert!(matches!(&results[0], Err(Error::Topic { .. })), "{results:?}");
        assert!(results[0].as_ref().unwrap_err().to_string().contains("topology apply"));
        let topology = Topology::open(&config, &topics(&[OWN]), vec![]).unwrap();
        let plan = topology.plan().await.unwrap();
        assert!(topology.apply(&plan).await.iter().all(|applied| applied.done));
        publish(&broker, vec![event.clone()]).await;
        assert_eq!(id(&receive_one(&broker).await), event.claims.execution_id);
        close([broker]).await;
    });
}

#[test]
fn topology_applied_twice_changes_nothing_the_second_time() {
    run(|_, config, _| async move {
        let topology = Topology::open(&config, &Topics::default(), vec![Tenant::try_new("acme").unwrap()]).unwrap();
        let plan = topology.plan().await.unwrap();
        assert!(!plan.clean());
        let applied = topology.apply(&plan).await;
        assert!(applied.iter().all(|applied| applied.done), "{applied:?}");
        let again = topology.plan().await.unwrap();
        assert!(again.clean() && again.findings.is_empty(), "{again:#?}");
        let namespace = format!("/namespaces/{}/production", config.tenant);
        let (_, policies) = rest(&config, reqwest::Method::GET, &namespace, None).await;
        assert_eq!(policies["retention_policies"]["retentionTimeInMinutes"], 1440);
        assert_eq!(policies["backlog_quota_map"]["destination_storage"]["policy"], "producer_request_hold");

        // Somebody lets Pulsar drop work.
        let set = |path: String, body: Value| {
            let config = config.clone();
            async move { rest(&config, reqwest::Method::POST, &path, Some(body)).await }
        };
        assert_eq!(set(format!("{namespace}/messageTTL"), json!(60)).await.0, 204);
        assert_eq!(set(format!("{namespace}/subscriptionExpirationTime"), json!(5)).await.0, 204);
        let quota = json!({ "limitSize": 1000, "limitTime": -1, "policy": "consumer_backlog_eviction" });
        assert_eq!(set(format!("{namespace}/backlogQuota?backlogQuotaType=destination_storage"), quota).await.0, 204);
        let inactive = json!({
            "inactiveTopicDeleteMode": "delete_when_subscriptions_caught_up",
            "maxInactiveDurationSeconds": 60, "deleteWhileInactive": true,
        });
        assert_eq!(set(format!("{namespace}/inactiveTopicPolicies"), inactive.clone()).await.0, 204);
        // And keeps less than was asked for.
        let short = json!({ "retentionTimeInMinutes": 5, "retentionSizeInMB": 20_480 });
        assert_eq!(set(format!("{namespace}/retention"), short.clone()).await.0, 204);
        let drifted = topology.plan().await.unwrap();
        assert!(!drifted.clean());
        assert_eq!(drifted.changes.len(), 5, "{drifted:#?}");
        let errors =
            drifted.findings.iter().filter(|f| f.severity == Severity::Error && f.object.starts_with("namespace"));
        assert_eq!(errors.count(), 4, "{drifted:#?}");
        assert!(topology.apply(&drifted).await.iter().all(|applied| applied.done));
        // Pulsar tells a topic of its namespace's policies a moment later.
        let begin = Instant::now();
        while !topology.plan().await.unwrap().clean() {
            assert!(begin.elapsed() < PATIENCE, "{:#?}", topology.plan().await.unwrap());
            tokio::time::sleep(Duration::from_millis(500)).await;
        }

        // On one topic it is not ours to remove, but an error; another retention is only shown.
        let topic = format!("/persistent/{}/production/{LONG}", config.tenant);
        let quota = json!({ "limitSize": 1000, "limitTime": -1, "policy": "consumer_backlog_eviction" });
        for (path, body, policy, severity, text) in [
            ("messageTTL?messageTTL=60", Value::Null, "messageTTL", Severity::Error, "message TTL"),
            ("backlogQuota", quota, "backlogQuota", Severity::Error, "backlog quota"),
            (
                "inactiveTopicPolicies",
                inactive,
                "inactiveTopicPolicies",
                Severity::Error,
                "deletion of inactive topics",
            ),
            ("retention", short, "retention", Severity::Drift, "acknowledged messages"),
        ] {
            let (status, answer) = set(format!("{topic}/{path}"), body).await;
            assert!(status < 300, "{path}: {status} {answer}");
            let begin = Instant::now();
            let plan = loop {
                let plan = topology.plan().await.unwrap();
                if !plan.findings.is_empty() {
                    break plan;
                }
                assert!(begin.elapsed() < PATIENCE, "the {policy} of a topic is not seen");
                tokio::time::sleep(Duration::from_millis(200)).await;
            };
            assert!(plan.changes.is_empty() && plan.findings.len() == 1, "{plan:#?}");
            assert!(plan.findings[0].severity == severity && plan.findings[0].text.contains(text), "{plan:#?}");
            assert_eq!(plan.clean(), severity == Severity::Drift);
            assert_eq!(rest(&config, reqwest::Method::DELETE, &format!("{topic}/{policy}"), None).await.0, 204);
            let begin = Instant::now();
            while !topology.plan().await.unwrap().findings.is_empty() {
                assert!(begin.elapsed() < PATIENCE, "the {policy} of a topic stays");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }

        // A topic of somebody else's is shown and left alone; partitions only grow.
        let other = format!("/persistent/{}/production/mine", config.tenant);
        assert_eq!(rest(&config, reqwest::Method::PUT, &other, None).await.0, 204);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("topics.toml");
        std::fs::write(&file, format!("[[topics]]\nname = \"{LONG}\"\npartitions = 3\nsubscriptions = [\"mine\"]\n"))
            .unwrap();
        let with_file = Pulsar { topics_file: Some(file), ..config.clone() };
        let more = Topology::open(&with_file, &Topics::default(), vec![]).unwrap();
        let plan = more.plan().await.unwrap();
        assert!(plan.findings.iter().any(|f| f.object == "topic mine" && f.severity == Severity::Drift));
        assert_eq!(plan.changes.len(), 2, "{plan:#?}");
        assert!(more.apply(&plan).await.iter().all(|applied| applied.done));
        assert!(more.plan().await.unwrap().clean());
        let shrunk = topology.plan().await.unwrap();
        assert!(shrunk.changes.is_empty(), "{shrunk:#?}");
        assert!(shrunk.findings.iter().any(|f| f.text.contains("cannot take partitions away")), "{shrunk:#?}");
    });
}

/// Publishes `count` events in pieces and receives until all have come at least once; `disturb` runs in the middle.
async fn stream(world: &World<'_>, broker: &Broker, count: usize, disturb: impl Future<Output = ()>) -> usize {
    let events: Vec<_> = (0..count).map(|n| world.event(LONG, "acme", (n % 10 == 0).then_some("key"))).collect();
    let wanted: std::collections::BTreeSet<_> = events.iter().map(|e| e.claims.execution_id).collect();
    let mut seen = std::collections::BTreeSet::new();
    let mut received = 0;
    let publishing = async {
        for chunk in events.chunks(20) {
            publish(broker, chunk.to_vec()).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let receiving = async {
        let begin = Instant::now();
        while !wanted.is_subset(&seen) {
            assert!(begin.elapsed() < 4 * PATIENCE, "{} of {count} came: {:?}", seen.len(), broker.status());
            if let Ok(messages) = tokio::time::timeout(Duration::from_secs(1), broker.receive(50)).await {
                received += messages.len();
                seen.extend(messages.iter().map(id));
                // Lost with its connection, an acknowledgement is a redelivery.
                let _ = broker.ack(messages).await;
            }
        }
    };
    tokio::join!(publishing, receiving, disturb);
    received - count
}

#[test]
fn a_broker_that_is_killed_in_mid_stream_loses_nothing() {
    run(|world, _, _| async move {
        let broker = world.broker();
        ready(&world, &broker).await;
        let duplicates = stream(&world, &broker, 2_000, async {
            for _ in 0..2 {
                tokio::time::sleep(Duration::from_millis(700)).await;
                script(&["kill"], &[]);
                tokio::time::sleep(Duration::from_secs(3)).await;
                tokio::task::spawn_blocking(|| script(&["start"], &[])).await.unwrap();
            }
        })
        .await;
        println!("killed twice: 2000 events, {duplicates} duplicates, {:?}", broker.status());
        let begin = Instant::now();
        while !broker.status().connected {
            assert!(begin.elapsed() < PATIENCE, "{:?}", broker.status());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(broker.status().rebuilt > 0 && broker.status().last_error.is_some());
        until_empty(&broker).await;
        close([broker]).await;
    });
}

#[test]
fn topics_that_move_and_subscriptions_that_vanish_are_found_again() {
    run(|world, config, _| async move {
        let broker = world.broker();
        ready(&world, &broker).await;
        let unload = format!("/namespaces/{}/production/unload", config.tenant);
        let duplicates = stream(&world, &broker, 1_000, async {
            for _ in 0..3 {
                tokio::time::sleep(Duration::from_millis(300)).await;
                assert_eq!(rest(&config, reqwest::Method::PUT, &unload, None).await.0, 204);
            }
        })
        .await;
        println!("unloaded three times: 1000 events, {duplicates} duplicates");
        until_empty(&broker).await;
        // The subscription goes away under the consumer: it is made again, with what is retained.
        let path = format!("/persistent/{}/production/{LONG}/subscription/dealscale?force=true", config.tenant);
        assert_eq!(rest(&config, reqwest::Method::DELETE, &path, None).await.0, 204);
        let event = world.event(LONG, "acme", None);
        let begin = Instant::now();
        publish(&broker, vec![event.clone()]).await;
        loop {
            let messages = receive(&broker, 100).await;
            let came = messages.iter().any(|message| id(message) == event.claims.execution_id);
            let _ = broker.ack(messages).await;
            if came {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "{:?}", broker.status());
        }
        close([broker]).await;
    });
}

#[test]
fn a_cluster_that_lost_its_data_is_furnished_again() {
    run(|world, _, _| async move {
        let broker = world.broker();
        ready(&world, &broker).await;
        publish(&broker, vec![world.event(LONG, "acme", None)]).await;
        let held = receive_one(&broker).await;
        tokio::task::spawn_blocking(|| {
            script(&["kill"], &[]);
            script(&["wipe"], &[]);
            script(&["start"], &[]);
        })
        .await
        .unwrap();
        let event = world.event(LONG, "acme", None);
        publish(&broker, vec![event.clone()]).await;
        // What an old acknowledgement says must not touch the new message in its place.
        let _ = broker.ack(vec![held]).await;
        assert_eq!(id(&receive_one(&broker).await), event.claims.execution_id);
        close([broker]).await;
    });
}

async fn until_empty(broker: &Broker) {
    let begin = Instant::now();
    loop {
        if let Ok(messages) = tokio::time::timeout(Duration::from_millis(500), broker.receive(100)).await {
            let _ = broker.ack(messages).await;
        }
        let figures = conformance::figures(broker).await;
        if figures.0 == 0 {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "messages stay: {figures:?}");
    }
}

#[test]
fn a_backlog_larger_than_the_queue_is_held_back_and_flows() {
    run(|world, config, keys| async move {
        let small = Pulsar { receive_queue: 20, ..config };
        let broker = Broker::connect(&small, &environment(), keys, topics(&[LONG]), Clock::System).unwrap();
        publish(&broker, (0..3_000).map(|_| world.event(LONG, "acme", None)).collect()).await;
        let mut seen = std::collections::BTreeSet::new();
        // Acknowledged from a single place, one after the other: reading must not wait for it, nor it for reading.
        while seen.len() < 3_000 {
            let messages = receive(&broker, 64).await;
            seen.extend(messages.iter().map(id));
            tokio::time::timeout(PATIENCE, broker.ack(messages)).await.expect("acknowledgements flow").unwrap();
        }
        silent(&broker, Duration::from_secs(1)).await;
        close([broker]).await;
    });
}

/// Of the REST API over TLS, which only the strict broker has.
fn https_port() -> u16 {
    variable("PULSAR_PORT").parse::<u16>().unwrap() + 30
}

/// A broker that knows no `anonymous`, beside the shared one.
struct Strict {
    settings: Vec<(&'static str, String)>,
    state: PathBuf,
    _dir: tempfile::TempDir,
}

impl Strict {
    /// `more` are further lines of the broker's configuration.
    fn start(more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("pulsar");
        let conf = dir.path().join("more.conf");
        let https = https_port();
        std::fs::write(&conf, format!("anonymousUserRole=\nsuperUserRoles=admin\nwebServicePortTls={https}\n{more}"))
            .unwrap();
        let port = |name: &str| (variable(name).parse::<u16>().unwrap() + 20).to_string();
        let mut settings =
            vec![("PULSAR_STATE", state.display().to_string()), ("PULSAR_CONF", conf.display().to_string())];
        for name in ["PULSAR_PORT", "PULSAR_HTTP_PORT", "PULSAR_TLS_PORT", "PULSAR_BOOKIE_PORT"] {
            settings.push((name, port(name)));
        }
        let strict = Self { settings, state, _dir: dir };
        strict.script(&["start"]);
        strict
    }
    fn script(&self, arguments: &[&str]) -> String {
        let settings: Vec<_> = self.settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
        script(arguments, &settings)
    }
    fn port(&self, name: &str) -> &str {
        &self.settings.iter().find(|(n, _)| *n == name).unwrap().1
    }
    fn config(&self, auth: PulsarAuth) -> Pulsar {
        Pulsar {
            service_url: format!("pulsar://127.0.0.1:{}", self.port("PULSAR_PORT")),
            http_url: format!("http://127.0.0.1:{}", self.port("PULSAR_HTTP_PORT")),
            auth,
            operation_timeout: Span::secs(3),
            ..config()
        }
    }
}

impl Drop for Strict {
    fn drop(&mut self) {
        self.script(&["kill"]);
    }
}

async fn round_trip(config: Pulsar, keys: Arc<KeyRing>) {
    let world = world(config, keys);
    let broker = world.broker();
    let event = world.event(LONG, "acme", None);
    publish(&broker, vec![event.clone()]).await;
    let message = receive_one(&broker).await;
    assert_eq!(id(&message), event.claims.execution_id);
    broker.ack(vec![message]).await.unwrap();
    close([broker]).await;
}

/// What `status` says once a broker cannot be used.
async fn refused(config: Pulsar, keys: Arc<KeyRing>) -> String {
    let broker = Broker::connect(&config, &environment(), keys, topics(&[LONG]), Clock::System).unwrap();
    let begin = Instant::now();
    let cause = loop {
        let status = broker.status();
        assert!(!status.connected, "connected without leave");
        if let Some(cause) = status.last_error {
            break cause;
        }
        assert!(begin.elapsed() < PATIENCE, "no error is told");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    close([broker]).await;
    cause
}

#[test]
fn tokens_oauth2_and_tls_let_us_in_and_nothing_else_does() {
    let strict = Strict::start("");
    run(|_, shared, keys| async move {
        let token = |text: String| PulsarAuth::Token(Secret::new(text));
        let admin = strict.script(&["token", "admin"]);
        round_trip(strict.config(token(admin.clone())), keys.clone()).await;
        // TLS with a private CA, on the wire and over REST.
        let tls = |config: Pulsar| Pulsar {
            service_url: format!("pulsar+ssl://127.0.0.1:{}", strict.port("PULSAR_TLS_PORT")),
            http_url: format!("https://127.0.0.1:{}", https_port()),
            ca_file: Some(strict.state.join("ca.pem")),
            ..config
        };
        round_trip(tls(strict.config(token(admin.clone()))), keys.clone()).await;
        let untrusted = Pulsar { ca_file: None, ..tls(strict.config(token(admin.clone()))) };
        refused(untrusted, keys.clone()).await;

        let wrong = refused(strict.config(token(format!("{admin}AAAA"))), keys.clone()).await;
        assert!(wrong.contains("does not accept our token") && !wrong.contains(&admin), "{wrong}");
        let none = refused(strict.config(PulsarAuth::None), keys.clone()).await;
        assert!(none.contains("does not accept our token"), "{none}");
        // Known, but without rights: said by name.
        let guest = strict.config(token(strict.script(&["token", "guest"])));
        let broker = Broker::connect(&guest, &environment(), keys.clone(), topics(&[LONG]), Clock::System).unwrap();
        let results = broker.publish(vec![world(guest.clone(), keys.clone()).event(LONG, "acme", None)]).await;
        assert!(results[0].as_ref().unwrap_err().to_string().contains("does not let our role"), "{results:?}");
        close([broker]).await;
        // With the least that an appliance needs, once an administrator made the rest: to produce and to consume.
        let admins = strict.config(token(admin.clone()));
        let topology = Topology::open(&admins, &Topics::default(), vec![]).unwrap();
        let plan = topology.plan().await.unwrap();
        assert!(topology.apply(&plan).await.iter().all(|applied| applied.done));
        let (status, text) = as_role(
            &admin,
            reqwest::Method::POST,
            &format!("{}/admin/v2/namespaces/{}/production/permissions/service", admins.http_url, admins.tenant),
            json!(["produce", "consume"]),
        )
        .await;
        assert_eq!(status, 204, "{text}");
        let service =
            Pulsar { auth: token(strict.script(&["token", "service"])), create_topics: false, ..admins.clone() };
        round_trip(service.clone(), keys.clone()).await;
        let broker = Broker::connect(&service, &environment(), keys.clone(), topics(&[LONG]), Clock::System).unwrap();
        assert!(broker.backlog().await.unwrap().iter().any(|b| b.topic == LONG));
        close([broker]).await;
        let denied =
            Topology::open(&service, &Topics::default(), vec![]).unwrap().plan().await.unwrap_err().to_string();
        assert!(denied.contains("does not let our role"), "{denied}");

        let issuer = Issuer::start(strict.state.join("token.key")).await;
        let oauth2 = |secret: &str| PulsarAuth::OAuth2 {
            issuer_url: issuer.url.clone(),
            audience: "urn:pulsar".into(),
            client_id: "dealscale".into(),
            client_secret: Secret::new(secret),
            scope: Some("publish".into()),
        };
        round_trip(strict.config(oauth2("s3cr:t&")), keys.clone()).await;
        let wrong = refused(strict.config(oauth2("wrong")), keys.clone()).await;
        assert!(wrong.contains("invalid_client") && !wrong.contains("wrong"), "{wrong}");
        // Tokens live for two seconds there: a connection that stays needs several.
        let world = world(strict.config(oauth2("s3cr:t&")), keys.clone());
        let broker = world.broker();
        let before = issuer.granted.load(Ordering::SeqCst);
        for _ in 0..4 {
            ready(&world, &broker).await;
            tokio::time::sleep(Duration::from_secs(1)).await;
            broker.backlog().await.unwrap();
        }
        assert!(issuer.granted.load(Ordering::SeqCst) >= before + 2);
        close([broker]).await;
        drop(shared);
    });
}

/// The least OAuth2 server: discovery and client credentials, RS256 tokens with Pulsar's key.
struct Issuer {
    url: String,
    granted: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Issuer {
    async fn start(key: PathBuf) -> Self {
        use axum::http::{HeaderMap, StatusCode};
        use axum::routing::{get, post};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let key = jsonwebtoken::EncodingKey::from_rsa_pem(&std::fs::read(key).unwrap()).unwrap();
        let granted = Arc::new(AtomicU64::new(0));
        let metadata = json!({ "issuer": url, "token_endpoint": format!("{url}/token") });
        let count = granted.clone();
        let token = move |headers: HeaderMap, body: String| async move {
            let form = reqwest::Url::parse(&format!("x:/?{body}")).unwrap();
            let form: std::collections::BTreeMap<_, _> = form.query_pairs().into_owned().collect();
            // `dealscale:s3cr:t&`, each part form-encoded (RFC 6749 section 2.3.1).
            let right = headers.get("authorization").is_some_and(|v| v == "Basic ZGVhbHNjYWxlOnMzY3IlM0F0JTI2")
                && form["grant_type"] == "client_credentials"
                && form["audience"] == "urn:pulsar"
                && form["scope"] == "publish";
            if !right {
                return (StatusCode::UNAUTHORIZED, axum::Json(json!({ "error": "invalid_client" })));
            }
            count.fetch_add(1, Ordering::SeqCst);
            let exp = Clock::System.now().as_secs() + 600;
            let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::RS256);
            let token = jsonwebtoken::encode(&header, &json!({ "sub": "admin", "exp": exp }), &key).unwrap();
            (StatusCode::OK, axum::Json(json!({ "access_token": token, "token_type": "Bearer", "expires_in": 2 })))
        };
        let app = axum::Router::new()
            .route("/.well-known/openid-configuration", get(move || async move { axum::Json(metadata) }))
            .route("/token", post(token));
        #[expect(clippy::disallowed_methods, reason = "a server of the test itself")]
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, granted, task }
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[test]
fn ten_thousand_events_flow() {
    run(|world, _, _| async move {
        let broker = world.broker();
        ready(&world, &broker).await;
        let events: Vec<_> = (0..10_000).map(|_| world.event(LONG, "acme", None)).collect();
        let begin = Instant::now();
        let publishing = async {
            for chunk in events.chunks(1_000) {
                publish(&broker, chunk.to_vec()).await;
            }
            begin.elapsed()
        };
        let mut seen = std::collections::BTreeSet::<ExecutionId>::new();
        let receiving = async {
            while seen.len() < events.len() {
                let messages = receive(&broker, 256).await;
                seen.extend(messages.iter().map(id));
                broker.ack(messages).await.unwrap();
            }
            begin.elapsed()
        };
        let (published, received) = tokio::join!(publishing, receiving);
        println!("10000 events: published in {published:?}, received and acknowledged in {received:?}");
        close([broker]).await;
    });
}

/// What a foreign worker asks of an appliance, answered from memory.
async fn doors(
    jwks: Value,
    payloads: std::collections::BTreeMap<String, Value>,
    results: tokio::sync::mpsc::UnboundedSender<(String, Value)>,
) -> String {
    use axum::extract::Path;
    use axum::http::{HeaderMap, StatusCode};
    use axum::routing::{get, post};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let bearer = |headers: &HeaderMap| {
        headers.get("authorization").is_some_and(|v| v.to_str().unwrap().starts_with("Bearer ey"))
    };
    let app = axum::Router::new()
        .route("/.well-known/jwks.json", get(move || async move { axum::Json(jwks) }))
        .route(
            "/executions/{id}/payload",
            get(move |Path(id): Path<String>, headers: HeaderMap| async move {
                assert!(bearer(&headers));
                payloads.get(&id).map(|payload| payload.to_string()).ok_or(StatusCode::NOT_FOUND)
            }),
        )
        .route(
            "/executions/{id}/result",
            post(move |Path(id): Path<String>, headers: HeaderMap, body: String| async move {
                assert!(bearer(&headers));
                results.send((id, serde_json::from_str(&body).unwrap())).unwrap();
                "{}"
            }),
        );
    #[expect(clippy::disallowed_methods, reason = "a server of the test itself")]
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    url
}

#[test]
fn a_foreign_worker_verifies_loads_and_answers() {
    const TOPIC: &str = "dealscale.ai.inference";
    run(|world, config, keys| async move {
        let sender = (world.open)(topics(&[LONG]));
        let event = |payload: &Value| {
            let mut event = world.event(TOPIC, "acme", None);
            event.claims.payload_sha256 = dealscale::ids::BodyHash::of(payload.to_string().as_bytes());
            event
        };
        let (fine, bad) = (json!({ "prompt": "hello" }), json!({ "fail": "permanently" }));
        let (good, failing, gone) = (event(&fine), event(&bad), event(&fine));
        let id = |event: &dealscale::broker::Outgoing| event.claims.execution_id.to_string();
        let payloads = [(id(&good), fine), (id(&failing), bad)].into_iter().collect();
        let (results, mut told) = tokio::sync::mpsc::unbounded_channel();
        let url = doors(keys.jwks(), payloads, results).await;
        publish(&sender, vec![good.clone(), failing.clone(), gone]).await;
        let stranger = tempfile::tempdir().unwrap();
        let forged = self::keys(stranger.path()).sign(&good.claims);
        send_raw(&config, TOPIC, forged.clone().into_bytes()).await;

        let worker = Path::new(env!("CARGO_MANIFEST_DIR")).join("appliance/workers/external_worker.py");
        let mut command = tokio::process::Command::new(variable("DEALSCALE_TEST_WORKER_PYTHON"));
        command
            .arg(worker)
            .env("PULSAR_SERVICE_URL", &config.service_url)
            .env("DEALSCALE_TOPIC", format!("persistent://{}/{}/{TOPIC}", config.tenant, config.namespace))
            .env("DEALSCALE_URL", url)
            .env("WORKER_COUNT", "4")
            .kill_on_drop(true);
        let ended = tokio::time::timeout(PATIENCE, command.status()).await.expect("the worker ends").unwrap();
        assert!(ended.success());
        let mut results = std::collections::BTreeMap::new();
        while let Ok((id, result)) = told.try_recv() {
            results.insert(id, result);
        }
        assert_eq!(results.len(), 2, "{results:?}");
        assert_eq!(results[&id(&good)]["state"], "succeeded");
        assert_eq!(
            (&results[&id(&failing)]["state"], &results[&id(&failing)]["error"]),
            (&json!("failed"), &json!("the payload asked for it"))
        );
        let letters = (world.open)(topics(&["dealscale.deadletter.ai.inference"]));
        let letter = receive_one(&letters).await;
        assert_eq!(letter.raw, forged.as_bytes());
        assert_eq!(letter.properties["dead_letter_reason"], "signed with an unknown key");
        assert_eq!(letter.properties["original_topic"], TOPIC);
        close([sender, letters]).await;
    });
}

#[test]
fn relaying_confirms_what_has_its_receipt_and_keeps_the_rest() {
    run(|world, config, keys| async move {
        let dir = tempfile::tempdir().unwrap();
        let settings = dealscale::config::parse(&format!("state_dir = {:?}", dir.path())).unwrap();
        let limits = Arc::new(|_: &_| (1, Bytes::gib(1)));
        let settings = &settings.environments[&environment()].outbox;
        let outbox = Outbox::open(settings, &environment(), limits, Clock::System).unwrap();
        let all = LeaseLimit { count: 1_000, bytes: Bytes::gib(1) };
        let sent = conformance::append(&world, &outbox, 200).await;
        let leased = outbox.lease(all).await.unwrap();
        let items =
            || leased.iter().zip(&sent).map(|(leased, sent)| (leased.sequence, sent.clone())).collect::<Vec<_>>();
        // Nobody there: an answer within the deadlines, and nothing leaves the outbox.
        let away =
            Pulsar { service_url: "pulsar://127.0.0.1:1".into(), operation_timeout: Span::secs(1), ..config.clone() };
        let broker = Broker::connect(&away, &environment(), keys, topics(&[LONG]), Clock::System).unwrap();
        let begin = Instant::now();
        let results = broker.relay(&outbox, items()).await;
        assert!(results.iter().all(|result| matches!(result, Err(Error::Unavailable { .. }))), "{results:?}");
        assert!(begin.elapsed() < Duration::from_secs(10), "it took {:?}", begin.elapsed());
        assert_eq!(outbox.status().records, 200);
        close([broker]).await;

        let broker = world.broker();
        let results = broker.relay(&outbox, items()).await;
        let receipts: std::collections::BTreeSet<_> = results.into_iter().map(|result| result.unwrap().0).collect();
        assert_eq!(receipts.len(), 200, "a receipt names one message");
        assert_eq!(outbox.status().records, 0);
        let mut seen = std::collections::BTreeMap::new();
        while seen.len() < 200 {
            let messages = receive(&broker, 100).await;
            seen.extend(messages.iter().map(|message| (message.message_id.clone(), id(message))));
            broker.ack(messages).await.unwrap();
        }
        // The ids of receipts are those that consumers see.
        assert_eq!(seen.keys().cloned().collect::<std::collections::BTreeSet<_>>(), receipts);
        close([broker]).await;
        outbox.close().await.unwrap();
    });
}

#[test]
fn a_real_oauth2_server_lets_us_in_for_longer_than_a_token_lives() {
    let issuer = variable("OIDC_ISSUER");
    let audience = variable("OIDC_AUDIENCE");
    let strict = Strict::start(&format!(
        "superUserRoles=admin,short-lived\nauthenticationRefreshCheckSeconds=1\n\
         authenticationProviders=org.apache.pulsar.broker.authentication.oidc.AuthenticationProviderOpenID,\
         org.apache.pulsar.broker.authentication.AuthenticationProviderToken\n\
         openIDAllowedTokenIssuers={issuer}\nopenIDAllowedAudiences={audience}\nopenIDRequireIssuersUseHttps=false\n"
    ));
    run(|_, _, keys| async move {
        let oauth2 = |secret: String| PulsarAuth::OAuth2 {
            issuer_url: issuer.clone(),
            audience: audience.clone(),
            client_id: "short-lived".into(),
            client_secret: Secret::new(secret),
            scope: None,
        };
        let right = oauth2(variable("OIDC_CLIENT_SECRET"));
        let world = world(strict.config(right), keys.clone());
        let broker = world.broker();
        // Its tokens live for five seconds, and the broker looks every second.
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(13) {
            let event = world.event(LONG, "acme", None);
            publish(&broker, vec![event.clone()]).await;
            loop {
                let messages = receive(&broker, 10).await;
                let came = messages.iter().any(|message| id(message) == event.claims.execution_id);
                let _ = broker.ack(messages).await;
                if came {
                    break;
                }
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        println!("three lives of a token: {:?}", broker.status());
        assert!(broker.status().connected);
        close([broker]).await;
        let wrong = refused(strict.config(oauth2("wrong".into())), keys.clone()).await;
        assert!(wrong.contains("invalid_client") && !wrong.contains("wrong"), "{wrong}");
    });
}

#[test]
fn appliances_with_other_keys_do_not_work_on_one_subscription() {
    run(|world, config, keys| async move {
        let old = world.broker();
        ready(&world, &old).await;
        let stranger = tempfile::tempdir().unwrap();
        let newcomer =
            Broker::connect(&config, &environment(), self::keys(stranger.path()), topics(&[LONG]), Clock::System)
                .unwrap();
        let theirs = world.event(LONG, "acme", None);
        let begin = Instant::now();
        // Nothing of it is published, which the other one would refuse.
        while !newcomer.status().last_error.is_some_and(|cause| cause.contains("signing.keys")) {
            let results = newcomer.publish(vec![theirs.clone()]).await;
            assert!(results[0].is_err(), "{results:?}");
            assert!(begin.elapsed() < PATIENCE, "{:?}", newcomer.status());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        // And nothing is taken, which it would refuse itself.
        for _ in 0..20 {
            let event = world.event(LONG, "acme", None);
            publish(&old, vec![event.clone()]).await;
            let message = tokio::select! {
                message = receive_one(&old) => message,
                taken = newcomer.receive(10) => panic!("received {taken:?}"),
            };
            old.ack(vec![message]).await.unwrap();
        }
        close([old]).await;
        // Alone it may.
        publish(&newcomer, vec![theirs.clone()]).await;
        let begin = Instant::now();
        loop {
            let messages = receive(&newcomer, 10).await;
            let came = messages.iter().any(|m| m.reference.as_ref().is_ok_and(|r| r.claims == theirs.claims));
            newcomer.ack(messages).await.unwrap();
            if came {
                break;
            }
            assert!(begin.elapsed() < PATIENCE);
        }
        close([newcomer]).await;
        drop(keys);
    });
}

#[test]
fn partitions_that_are_added_are_consumed_and_one_without_a_subscription_is_seen() {
    run(|world, config, keys| async move {
        let broker = world.broker();
        ready(&world, &broker).await;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("topics.toml");
        std::fs::write(&file, format!("[[topics]]\nname = \"{LONG}\"\npartitions = 4\n")).unwrap();
        let more = Pulsar { topics_file: Some(file), ..config.clone() };
        let topology = Topology::open(&more, &Topics::default(), vec![]).unwrap();
        let plan = topology.plan().await.unwrap();
        assert!(topology.apply(&plan).await.iter().all(|applied| applied.done));
        assert!(topology.plan().await.unwrap().clean());
        // The running one, which knows one partition, gets what another appliance spreads over all of them.
        let other =
            Broker::connect(&more, &environment(), keys.clone(), topics(&["dealscale.workflow.short"]), Clock::System)
                .unwrap();
        let events: Vec<_> = (0..40).map(|n| world.event(LONG, "acme", Some(&format!("key-{n}")))).collect();
        publish(&other, events.clone()).await;
        let mut missing: std::collections::BTreeSet<_> = events.iter().map(|e| e.claims.execution_id).collect();
        while !missing.is_empty() {
            let messages = receive(&broker, 10).await;
            missing.retain(|one| !messages.iter().any(|message| id(message) == *one));
            let _ = broker.ack(messages).await;
        }
        close([broker, other]).await;

        // One partition loses its subscription: what goes there would be stored for nobody.
        let path = |n| format!("/persistent/{}/production/{LONG}-partition-{n}/subscription", config.tenant);
        let (status, _) = rest(&config, reqwest::Method::DELETE, &format!("{}/dealscale", path(2)), None).await;
        assert_eq!(status, 204);
        let plan = topology.plan().await.unwrap();
        assert_eq!(plan.changes.len(), 1, "{plan:#?}");
        let strict = Pulsar { create_topics: false, ..more.clone() };
        let broker = Broker::connect(
            &strict,
            &environment(),
            keys.clone(),
            topics(&["dealscale.workflow.short"]),
            Clock::System,
        )
        .unwrap();
        let results = broker.publish(vec![world.event(LONG, "acme", None)]).await;
        assert!(matches!(&results[0], Err(Error::Topic { .. })), "{results:?}");
        close([broker]).await;
        assert!(topology.apply(&plan).await.iter().all(|applied| applied.done));
        assert!(topology.plan().await.unwrap().clean());
        let (_, subscriptions) = rest(&config, reqwest::Method::GET, &format!("{}s", path(2)), None).await;
        assert_eq!(subscriptions, json!(["dealscale"]));
    });
}

/// Its process id, while it runs.
fn pulsar_pid() -> nix::unistd::Pid {
    let text = std::fs::read_to_string(Path::new(&variable("PULSAR_STATE")).join("pulsar.pid")).unwrap();
    nix::unistd::Pid::from_raw(text.split_whitespace().next().unwrap().parse().unwrap())
}

#[test]
fn a_broker_that_hangs_is_noticed_and_costs_nothing_but_time() {
    use nix::sys::signal::{Signal, kill};
    run(|world, config, keys| async move {
        let quick = Pulsar { operation_timeout: Span::secs(1), ..config };
        let broker = Broker::connect(&quick, &environment(), keys, topics(&[LONG]), Clock::System).unwrap();
        ready(&world, &broker).await;
        let before = broker.status().rebuilt;
        // Stopped, it keeps every connection and answers nothing.
        kill(pulsar_pid(), Signal::SIGSTOP).unwrap();
        let event = world.event(LONG, "acme", None);
        let results = broker.publish(vec![event.clone()]).await;
        let begin = Instant::now();
        while broker.status().connected || broker.status().rebuilt == before {
            if begin.elapsed() > PATIENCE {
                kill(pulsar_pid(), Signal::SIGCONT).unwrap();
                panic!("nobody noticed: {:?}", broker.status());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        kill(pulsar_pid(), Signal::SIGCONT).unwrap();
        assert!(matches!(&results[0], Err(Error::Unavailable { .. })), "{results:?}");
        publish(&broker, vec![event.clone()]).await;
        let begin = Instant::now();
        loop {
            let messages = receive(&broker, 10).await;
            let came = messages.iter().any(|message| id(message) == event.claims.execution_id);
            let _ = broker.ack(messages).await;
            if came {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "{:?}", broker.status());
        }
        until_empty(&broker).await;
        close([broker]).await;
    });
}

#[test]
fn a_consumer_that_goes_silent_is_built_again() {
    run(|world, config, _| async move {
        let broker = world.broker();
        ready(&world, &broker).await;
        until_empty(&broker).await;
        // The broker hands out nothing, and everything else of it works: connection, statistics, permits.
        let rate = format!("/namespaces/{}/production/subscriptionDispatchRate", config.tenant);
        let none =
            json!({ "dispatchThrottlingRateInMsg": 1, "dispatchThrottlingRateInByte": 1, "ratePeriodInSecond": 3600 });
        assert_eq!(rest(&config, reqwest::Method::POST, &rate, Some(none)).await.0, 204);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let events: Vec<_> = (0..20).map(|_| world.event(LONG, "acme", None)).collect();
        let mut missing: std::collections::BTreeSet<_> = events.iter().map(|e| e.claims.execution_id).collect();
        let begin = Instant::now();
        for event in events {
            publish(&broker, vec![event]).await;
        }
        let said = |cause: &str| cause.contains("nothing came although");
        while !broker.status().last_error.is_some_and(|cause| said(&cause)) {
            if let Ok(messages) = tokio::time::timeout(Duration::from_millis(500), broker.receive(100)).await {
                missing.retain(|one| !messages.iter().any(|message| id(message) == *one));
                let _ = broker.ack(messages).await;
            }
            assert!(!missing.is_empty(), "the rate held nothing back");
            assert!(begin.elapsed() < 3 * PATIENCE, "{:?}", broker.status());
        }
        assert_eq!(rest(&config, reqwest::Method::DELETE, &rate, None).await.0, 204);
        let begin = Instant::now();
        while !missing.is_empty() {
            assert!(begin.elapsed() < 3 * PATIENCE, "{} are missing: {:?}", missing.len(), broker.status());
            if let Ok(messages) = tokio::time::timeout(Duration::from_secs(1), broker.receive(100)).await {
                missing.retain(|one| !messages.iter().any(|message| id(message) == *one));
                let _ = broker.ack(messages).await;
            }
        }
        close([broker]).await;
    });
}
