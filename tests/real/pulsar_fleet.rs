//! Two appliances with one Pulsar subscription, one PostgreSQL and one key ring (DESIGN 11).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::postgres::cluster::Cluster;
use crate::shared::appliance::Appliance;
use crate::shared::receiver::Receiver;
use crate::support::variable;

const PATIENCE: Duration = Duration::from_secs(120);

/// The same for both but for their folders.
fn config(receiver: &Receiver, postgres: &Cluster) -> String {
    let key = "an HS256 key that both appliances have in their rings";
    format!(
        "[[signing.keys]]\nid = \"fleet\"\nalgorithm = \"HS256\"\nkey = {key:?}\n\
         [environments.production]\nwebhook = {:?}\n\
         [environments.production.delivery]\nclaim = \"3s\"\nsweep_after = \"3s\"\nsweep_interval = \"500ms\"\n\
         [environments.production.payloads]\nstore = \"postgres\"\nurl = {:?}\n\
         [environments.production.broker]\nkind = \"pulsar\"\nservice_url = {:?}\nhttp_url = {:?}\ntenant = \"fleet-{}\"\n",
        receiver.url("/webhook/x"),
        postgres.url(),
        variable("DEALSCALE_TEST_PULSAR_URL"),
        variable("DEALSCALE_TEST_PULSAR_HTTP_URL"),
        std::process::id(),
    )
}

async fn publish(appliance: &Appliance, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for n in 0..count {
        ids.push(appliance.publish("orders", json!(n)).await);
    }
    ids
}

async fn all_delivered(appliance: &Appliance, ids: &[String]) {
    for id in ids {
        appliance.wait_state(id, &["delivered"], PATIENCE).await;
    }
}

/// Calls by `webhook-id`.
fn calls(receiver: &Receiver) -> BTreeMap<String, usize> {
    receiver.seen().iter().fold(BTreeMap::new(), |mut calls, seen| {
        *calls.entry(seen.header("webhook-id").to_owned()).or_default() += 1;
        calls
    })
}

fn waiting(appliance: &Appliance) -> u64 {
    let (code, text) = appliance.cli(&["--json", "outbox", "status"]);
    assert_eq!(code, 0, "{text}");
    let status: Value = serde_json::from_str(&text).unwrap();
    status["records"].as_u64().unwrap_or_else(|| panic!("no count of records: {text}"))
}

async fn until(what: &str, mut met: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !met().await {
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn outage(cluster: &Arc<Cluster>, begins: bool) {
    let cluster = cluster.clone();
    let change = move || if begins { cluster.kill() } else { cluster.resume() };
    tokio::task::spawn_blocking(change).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_a_dead_members_outbox_has_comes_with_its_disk_or_is_imported_elsewhere() {
    let cluster = tokio::task::spawn_blocking(|| Arc::new(Cluster::start(&[]))).await.unwrap();
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let config = config(&receiver, &cluster);
    let at = |name: &str| dir.path().join(name);
    let mut a = Appliance::start(&at("a"), &config).await;
    let b = Appliance::start(&at("b"), &config).await;

    // PostgreSQL is away, so what a accepts is on its disk and nowhere else: it waits for that disk …
    outage(&cluster, true).await;
    let ids = publish(&a, 20).await;
    a.kill();
    outage(&cluster, false).await;
    until("b has its database again", async || b.get(&format!("/executions/{}?tenant=t1", ids[0])).await.0 == 404)
        .await;
    a.launch().await;
    all_delivered(&b, &ids).await;

    // … or is taken over elsewhere; the disk that returns later adds nothing.
    outage(&cluster, true).await;
    let ids = publish(&a, 20).await;
    a.kill();
    outage(&cluster, false).await;
    let export = at("export");
    let export = export.to_str().unwrap();
    let (code, text) = a.cli(&["outbox", "export", export]);
    assert!(code == 0 && text.contains("20"), "{code} {text}");
    let (code, text) = b.cli(&["outbox", "import", export]);
    assert_eq!(code, 0, "{text}");
    all_delivered(&b, &ids).await;
    let before = calls(&receiver);
    a.launch().await;
    until("a's outbox is empty", async || waiting(&a) == 0).await;
    all_delivered(&a, &ids).await;
    let after = calls(&receiver);
    assert!(ids.iter().all(|id| before[id] == 1 && after[id] == 1), "{before:?} {after:?}");
}
