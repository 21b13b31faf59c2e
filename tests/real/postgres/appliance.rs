//! An appliance whose ledger is in PostgreSQL.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::cluster::Cluster;
use crate::shared::appliance::Appliance;
use crate::shared::receiver::Receiver;

const PATIENCE: Duration = Duration::from_secs(120);

async fn until(what: &str, mut met: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !met().await {
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Records that wait in the outbox, and poisoned ones.
fn outbox(appliance: &Appliance) -> (u64, usize) {
    let ask = |arguments: &[&str]| -> Value {
        let (code, text) = appliance.cli(arguments);
        assert_eq!(code, 0, "{text}");
        serde_json::from_str(&text).unwrap()
    };
    let status = ask(&["--json", "outbox", "status"]);
    let waiting = status["records"].as_u64().unwrap_or_else(|| panic!("no count of records: {status}"));
    (waiting, ask(&["--json", "outbox", "ls", "--poisoned"]).as_array().unwrap().len())
}

/// The database as a whole is refused: no event is to blame, so all of them wait for the operator, and none is poisoned.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_wait_for_a_database_that_is_refused() {
    let cluster = tokio::task::spawn_blocking(|| Arc::new(Cluster::start(&[]))).await.unwrap();
    assert!(cluster.psql("ALTER SYSTEM SET synchronous_commit = off").0);
    cluster.psql("SELECT pg_reload_conf()");
    let (dir, receiver) = (tempfile::tempdir().unwrap(), Receiver::start().await);
    let config = format!(
        "[environments.production]\nwebhook = {:?}\n[environments.production.payloads]\nstore = \"postgres\"\nurl = {:?}\n",
        receiver.url("/webhook/x"),
        cluster.url()
    );
    let appliance = Appliance::start(dir.path(), &config).await;
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(appliance.publish("orders", json!(n)).await);
    }
    until("the relay has tried", async || {
        let (_, text) = appliance.cli(&["--json", "status"]);
        text.contains("synchronous_commit is off")
    })
    .await;
    assert_eq!(outbox(&appliance), (5, 0));
    assert_eq!(appliance.get("/executions?tenant=t1&state=relayed").await.0, 503);
    assert!(cluster.psql("ALTER SYSTEM RESET synchronous_commit").0);
    cluster.psql("SELECT pg_reload_conf()");
    for id in &ids {
        appliance.wait_state(id, &["delivered"], PATIENCE).await;
    }
    until("the outbox is empty", async || outbox(&appliance) == (0, 0)).await;
}
