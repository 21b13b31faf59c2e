//! Whole appliances on a real Pulsar: foreign workers, the loss of the cluster's data, what is not ours, and a fleet.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::postgres::cluster::Cluster;
use crate::shared::appliance::Appliance;
use crate::shared::receiver::{Receiver, Reply};
use crate::support::variable;

const PATIENCE: Duration = Duration::from_secs(120);
const LONG: &str = "dealscale.workflow.long";

/// A namespace of its own, which appliances of one fleet share.
struct Place {
    namespace: String,
}

impl Place {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        Self { namespace: format!("appliance-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::SeqCst)) }
    }

    fn broker(&self) -> String {
        format!(
            "[environments.production.broker]\nkind = \"pulsar\"\nservice_url = {:?}\nhttp_url = {:?}\n\
             tenant = \"dealscale\"\nnamespace = {:?}\n",
            variable("DEALSCALE_TEST_PULSAR_URL"),
            variable("DEALSCALE_TEST_PULSAR_HTTP_URL"),
            self.namespace
        )
    }

    fn topic(&self, topic: &str) -> String {
        format!("persistent://dealscale/{}/{topic}", self.namespace)
    }

    async fn client(&self) -> pulsar::Pulsar<pulsar::TokioExecutor> {
        pulsar::Pulsar::builder(variable("DEALSCALE_TEST_PULSAR_URL"), pulsar::TokioExecutor).build().await.unwrap()
    }

    /// As anybody could who may publish to the topic.
    async fn send(&self, topic: &str, payload: &str) {
        let mut producer = self.client().await.producer().with_topic(self.topic(topic)).build().await.unwrap();
        producer.send_non_blocking(payload.as_bytes().to_vec()).await.unwrap().await.unwrap();
    }

    /// The first message that waits on a topic: text and properties.
    async fn first(&self, topic: &str) -> (String, BTreeMap<String, String>) {
        use futures_util::StreamExt;
        let options =
            pulsar::ConsumerOptions::default().with_initial_position(pulsar::consumer::InitialPosition::Earliest);
        let mut consumer: pulsar::Consumer<Vec<u8>, _> = self
            .client()
            .await
            .consumer()
            .with_topic(self.topic(topic))
            .with_subscription("dealscale")
            .with_subscription_type(pulsar::SubType::KeyShared)
            .with_options(options)
            .build()
            .await
            .unwrap();
        let message = tokio::time::timeout(PATIENCE, consumer.next()).await.expect("a message").unwrap().unwrap();
        let properties = message.payload.metadata.properties.into_iter().map(|p| (p.key, p.value)).collect();
        (String::from_utf8(message.payload.data).unwrap(), properties)
    }
}

fn pulsar_sh(verb: &str) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/servers/pulsar.sh");
    let output = Command::new(script).arg(verb).output().unwrap();
    assert!(output.status.success(), "pulsar.sh {verb}: {}", String::from_utf8_lossy(&output.stderr));
}

fn worker(place: &Place, appliance: &Appliance, count: usize) -> tokio::process::Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("appliance/workers/external_worker.py");
    let mut command = tokio::process::Command::new(variable("DEALSCALE_TEST_WORKER_PYTHON"));
    command
        .arg(script)
        .env("PULSAR_SERVICE_URL", variable("DEALSCALE_TEST_PULSAR_URL"))
        .env("DEALSCALE_TOPIC", place.topic("dealscale.ai.inference"))
        .env("DEALSCALE_URL", format!("http://{}", appliance.bridge))
        .env("WORKER_COUNT", count.to_string())
        .kill_on_drop(true);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_worker_ends_what_the_appliance_accepted() {
    let (dir, place, receiver) = (tempfile::tempdir().unwrap(), Place::new(), Receiver::start().await);
    let appliance = Appliance::start(
        dir.path(),
        &format!(
            "[environments.production]\nwebhook = {:?}\n{}[[environments.production.routes]]\nname = \"inference\"\n\
             when.workflow = \"infer-*\"\nclass = \"ai\"\nconsumer = \"external\"\n",
            receiver.url("/webhook/x"),
            place.broker()
        ),
    )
    .await;
    // Before the worker comes: the appliance itself is there all the time, and must not take what is not its own.
    let mut ids = Vec::new();
    for n in 0..20 {
        ids.push(appliance.publish("infer-text", json!({ "prompt": n })).await);
    }
    let failing = appliance.publish("infer-text", json!({ "fail": "permanently" })).await;
    let own = appliance.publish("orders", json!(1)).await;
    appliance.wait_state(&own, &["delivered"], PATIENCE).await;
    for junk in [
        "not a reference",
        // A header that is a list of the right names, one whose kid is no text, and one without an end.
        "WyJhbGciLCJraWQiLCJ0eXAiXQ.e30.AA",
        "eyJhbGciOiJFZERTQSIsImtpZCI6W10sInR5cCI6IkpXVCJ9.e30.AA",
        &format!("{}.e30.AA", "W1tb".repeat(1_900)),
    ] {
        place.send("dealscale.ai.inference", junk).await;
    }
    let mut working = worker(&place, &appliance, 25).spawn().unwrap();
    let ended = tokio::time::timeout(PATIENCE, working.wait()).await.expect("the worker ends everything").unwrap();
    assert!(ended.success());
    for id in &ids {
        let event = appliance.wait_state(id, &["succeeded"], Duration::ZERO).await;
        assert_eq!(event["attempts"], 1, "{event}");
    }
    let event = appliance.wait_state(&failing, &["failed"], Duration::ZERO).await;
    assert!(event.to_string().contains("the payload asked for it"), "{event}");
    let (letter, properties) = place.first("dealscale.deadletter.ai.inference").await;
    assert_eq!((letter.as_str(), properties["dead_letter_reason"].as_str()), ("not a reference", "not a reference"));
    assert_eq!(receiver.seen().len(), 1, "n8n got what a worker had to do");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_in_mid_work_leaves_it_to_the_next() {
    let (dir, place) = (tempfile::tempdir().unwrap(), Place::new());
    let appliance = Appliance::start(
        dir.path(),
        &format!(
            "{}[[environments.production.routes]]\nname = \"inference\"\nwhen.workflow = \"*\"\nclass = \"ai\"\n\
             consumer = \"external\"\n",
            place.broker()
        ),
    )
    .await;
    let mut ids = BTreeSet::new();
    for n in 0..30 {
        ids.insert(appliance.publish("infer", json!(n)).await);
    }
    // Killed while it holds some: it has ten at a time in its queue.
    let mut first = worker(&place, &appliance, 1_000).spawn().unwrap();
    let begin = Instant::now();
    loop {
        let (_, page) = appliance.get("/executions?tenant=t1&state=succeeded").await;
        if page["executions"].as_array().is_some_and(|done| !done.is_empty()) {
            break;
        }
        assert!(begin.elapsed() < PATIENCE, "the worker does nothing");
    }
    first.kill().await.unwrap();
    let _second = worker(&place, &appliance, 1_000).spawn().unwrap();
    for id in &ids {
        appliance.wait_state(id, &["succeeded"], PATIENCE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_in_flight_survive_the_loss_of_pulsars_data() {
    const EVENTS: usize = 200;
    let (dir, place, receiver) = (tempfile::tempdir().unwrap(), Place::new(), Receiver::start().await);
    receiver.default_reply(Reply::status(503));
    // A reference's trust runs out after a second: every one of them is expired when n8n works at last, or signed anew.
    let appliance = Appliance::start(
        dir.path(),
        &format!(
            "[environments.production]\nwebhook = {:?}\n{}[environments.production.delivery]\nclaim = \"2s\"\n\
             sweep_after = \"3s\"\nsweep_interval = \"1s\"\nbreaker_open = \"1s\"\n[environments.production.default_route]\n\
             age_max = \"1s\"\n[environments.production.default_route.retry]\nmin = \"500ms\"\nmax = \"1s\"\nattempts_max = 100\n",
            receiver.url("/webhook/x"),
            place.broker()
        ),
    )
    .await;
    let mut ids = BTreeSet::new();
    for n in 0..EVENTS / 2 {
        ids.insert(appliance.publish("orders", json!(n)).await);
    }
    // All of them have left the outbox, and no other place than Pulsar and the ledger knows them.
    for id in &ids {
        appliance.wait_state(id, &["relayed", "delivering"], PATIENCE).await;
    }
    receiver.wait_for(1, PATIENCE).await;
    tokio::task::spawn_blocking(|| {
        pulsar_sh("kill");
        pulsar_sh("wipe");
    })
    .await
    .unwrap();
    for n in EVENTS / 2..EVENTS {
        ids.insert(appliance.publish("orders", json!(n)).await);
    }
    tokio::task::spawn_blocking(|| pulsar_sh("start")).await.unwrap();
    receiver.default_reply(Reply::status(200));
    for id in &ids {
        appliance.wait_state(id, &["delivered"], PATIENCE).await;
    }
    let called: BTreeSet<_> = receiver.seen().iter().map(|seen| seen.header("webhook-id").to_owned()).collect();
    assert_eq!(called, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ours_ends_as_a_dead_letter_and_is_never_delivered() {
    let (dir, place, receiver) = (tempfile::tempdir().unwrap(), Place::new(), Receiver::start().await);
    let appliance = Appliance::start(
        dir.path(),
        &format!("[environments.production]\nwebhook = {:?}\n{}", receiver.url("/webhook/x"), place.broker()),
    )
    .await;
    let good = appliance.publish("orders", json!(1)).await;
    appliance.wait_state(&good, &["delivered"], PATIENCE).await;
    place.send(LONG, "{\"execution_id\":\"forged\"}").await;
    let (letter, properties) = place.first("dealscale.deadletter.workflow.long").await;
    assert_eq!(letter, "{\"execution_id\":\"forged\"}");
    assert_eq!(properties["original_topic"], LONG);
    assert!(properties["dead_letter_reason"].contains("not a signed reference"), "{properties:?}");
    let (_, rejected) = appliance.get("/dead-letters/rejected").await;
    assert!(rejected.to_string().contains("not a signed reference"), "{rejected}");
    assert_eq!(receiver.seen().len(), 1);
}

/// One of a fleet: the shared ledger, the shared subscription, the shared keys.
async fn member(dir: &Path, place: &Place, postgres: &Cluster, receiver: &Receiver) -> Appliance {
    let text = format!(
        "[environments.production]\nwebhook = {:?}\n{}[environments.production.payloads]\nstore = \"postgres\"\nurl = {:?}\n\
         schema = {:?}\n[environments.production.delivery]\nclaim = \"2s\"\nsweep_after = \"3s\"\nsweep_interval = \"1s\"\n\
         [[signing.keys]]\nid = \"shared\"\nalgorithm = \"HS256\"\nkey = \"0123456789abcdef0123456789abcdef\"\n",
        receiver.url("/webhook/x"),
        place.broker(),
        postgres.url(),
        place.namespace.replace('-', "_"),
    );
    Appliance::start(dir, &text).await
}

fn ids_of(receiver: &Receiver) -> BTreeSet<String> {
    receiver.seen().iter().map(|seen| seen.header("webhook-id").to_owned()).collect()
}

async fn until_called(receivers: [&Receiver; 2], ids: &BTreeSet<String>) {
    let begin = Instant::now();
    loop {
        let called: BTreeSet<_> = receivers.iter().flat_map(|receiver| ids_of(receiver)).collect();
        if ids.is_subset(&called) {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{} of {} were called", called.len(), ids.len());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_shares_its_work_and_loses_nothing_with_a_member() {
    let (postgres, place) = (Cluster::start(&[]), Place::new());
    let (dir_one, dir_two, dir_three) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // A receiver for each, so that the test sees who worked.
    let (by_one, by_two) = (Receiver::start().await, Receiver::start().await);
    for receiver in [&by_one, &by_two] {
        receiver.default_reply(Reply::status(200).after(Duration::from_millis(20)));
    }
    let mut one = member(dir_one.path(), &place, &postgres, &by_one).await;
    let two = member(dir_two.path(), &place, &postgres, &by_two).await;
    let mut ids = BTreeSet::new();
    for n in 0..200 {
        ids.insert(one.publish("orders", json!(n)).await);
    }
    until_called([&by_one, &by_two], &ids).await;
    assert!(!by_one.seen().is_empty() && !by_two.seen().is_empty(), "one did all the work");

    // Killed in the middle of a second load, of which everything is relayed.
    for receiver in [&by_one, &by_two] {
        receiver.default_reply(Reply::status(200).after(Duration::from_millis(200)));
    }
    let mut relayed = BTreeSet::new();
    for n in 0..200 {
        relayed.insert(one.publish("orders", json!({ "second": n })).await);
    }
    for id in &relayed {
        one.wait_state(id, &["relayed", "delivering", "delivered"], PATIENCE).await;
    }
    one.kill();
    for id in &relayed {
        two.wait_state(id, &["delivered"], PATIENCE).await;
    }
    until_called([&by_one, &by_two], &relayed).await;

    // What is only in an outbox waits for its disk …
    tokio::task::spawn_blocking(|| pulsar_sh("kill")).await.unwrap();
    one.launch().await;
    let mut waiting = BTreeSet::new();
    for n in 0..20 {
        waiting.insert(one.publish("orders", json!({ "third": n })).await);
    }
    one.kill();
    tokio::task::spawn_blocking(|| pulsar_sh("start")).await.unwrap();
    // … or is taken elsewhere.
    let plain = dir_three.path().join("export");
    let (code, text) = one.cli(&["outbox", "export", plain.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = two.cli(&["outbox", "import", plain.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    for id in &waiting {
        two.wait_state(id, &["delivered"], PATIENCE).await;
    }
    // The disk returns as well: nothing is delivered twice because of it.
    let calls = |id: &String| {
        by_one.seen().iter().chain(&by_two.seen()).filter(|seen| seen.header("webhook-id") == id.as_str()).count()
    };
    let before: Vec<usize> = waiting.iter().map(calls).collect();
    one.launch().await;
    let begin = Instant::now();
    while outbox_records(&one) > 0 {
        assert!(begin.elapsed() < PATIENCE, "its outbox does not run empty");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let last = one.publish("orders", json!("last")).await;
    one.wait_state(&last, &["delivered"], PATIENCE).await;
    assert_eq!(waiting.iter().map(calls).collect::<Vec<_>>(), before);
}

fn outbox_records(appliance: &Appliance) -> u64 {
    let (code, text) = appliance.cli(&["--json", "outbox", "status"]);
    assert_eq!(code, 0, "{text}");
    let status: Value = serde_json::from_str(&text).unwrap();
    fn find(value: &Value) -> Option<u64> {
        match value {
            Value::Object(members) => {
                members.get("records").and_then(Value::as_u64).or_else(|| members.values().find_map(find))
            }
            Value::Array(items) => items.iter().find_map(find),
            _ => None,
        }
    }
    find(&status).unwrap_or_else(|| panic!("no records in {status}"))
}
