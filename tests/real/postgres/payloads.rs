//! The payload store and the ledger in PostgreSQL.

// The suite names the crate by its parent, because it is a part of the crate in `src/payloads/tests.rs`.
extern crate dealscale;

#[macro_use]
#[path = "../../../src/payloads/conformance.rs"]
mod conformance;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dealscale::clock::{Clock, Timestamp};
use dealscale::config::outbox::OutboxStore;
use dealscale::config::payloads::{PayloadStore, Postgres};
use dealscale::config::{self, Secret};
use dealscale::event::State;
use dealscale::ids::Environment;
use dealscale::payloads::{Admitted, Change, Claimed, Error, Store, Take, Transition};
use dealscale::units::{Bytes, Span};

use self::conformance::{LEDGER_AGE, PAYLOAD_AGE, START, World, attempt, event, finish, request};
use super::cluster::Cluster;

async fn open(
    url: &str,
    schema: &str,
    key: Option<&str>,
    clock: Clock,
    ca_file: Option<PathBuf>,
) -> Result<Store, Error> {
    let config = config::Payloads {
        store: PayloadStore::Postgres(Postgres {
            url: Secret::new(url),
            schema: schema.to_owned(),
            connections_max: 6,
            ca_file,
            connect_timeout: Span::secs(3),
            statement_timeout: Span::secs(10),
        }),
        payload_age_max: PAYLOAD_AGE,
        ledger_age_max: LEDGER_AGE,
    };
    let outbox = config::Outbox {
        dir: "/nowhere".into(),
        store: OutboxStore::Sled,
        bytes_max: Bytes::gib(1),
        count_max: 1000,
        disk_free_min: Bytes(0),
        key_window: Span::hours(24),
        lease: Span::secs(120),
        encryption_key: key.map(|key| Secret::new(key.repeat(32))),
    };
    Store::open(&config, &outbox, &Environment::try_new("production").unwrap(), clock).await
}

async fn world(schema: String, key: Option<&str>) -> World {
    let cluster = tokio::task::spawn_blocking(Cluster::shared).await.unwrap();
    let clock = Clock::manual(START);
    let store = open(&cluster.url(), &schema, key, clock.clone(), None).await.unwrap();
    World { store, clock, keep: Box::new(cluster) }
}

async fn plain(case: &str) -> World {
    // A name is at most 63 bytes long.
    world(format!("p_{}", &case[..case.len().min(60)]), None).await
}

async fn sealed(case: &str) -> World {
    world(format!("s_{}", &case[..case.len().min(60)]), Some("a1")).await
}

mod plainly {
    use super::*;
    conformance_tests!(plain);
}

mod sealed_with_a_key {
    use super::*;
    conformance_tests!(sealed);
}

async fn own(settings: &'static [&'static str]) -> Arc<Cluster> {
    tokio::task::spawn_blocking(|| Arc::new(Cluster::start(settings))).await.unwrap()
}

async fn kill(cluster: &Arc<Cluster>) {
    let cluster = cluster.clone();
    tokio::task::spawn_blocking(move || cluster.kill()).await.unwrap();
}

async fn resume(cluster: &Arc<Cluster>) {
    let cluster = cluster.clone();
    tokio::task::spawn_blocking(move || cluster.resume()).await.unwrap();
}

/// Repeats what the store calls worth repeating.
async fn insist<T, R: Future<Output = Result<T, Error>>>(what: impl Fn() -> R) -> T {
    let mut last = None;
    for _ in 0..600 {
        match what().await {
            Ok(value) => return value,
            Err(error) => {
                assert!(error.is_transient(), "{error}");
                last = Some(error);
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("still: {last:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invariant_4_what_was_confirmed_survives_kill_9_of_the_server() {
    let cluster = own(&[]).await;
    let store = open(&cluster.url(), "ledger", None, Clock::System, None).await.unwrap();
    let clock = Clock::System;
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..8u8 {
        let (store, clock) = (store.clone(), clock.clone());
        tasks.spawn(async move {
            let mut delivered = Vec::new();
            for n in 0..250u8 {
                let event = event(&clock, "acme", &[task, n]);
                // Whether the killed transaction was committed or not, repeating it comes to the same.
                let admitted = insist(|| store.admit(vec![event.clone()])).await;
                assert!(matches!(admitted[0], Admitted::New | Admitted::Same { .. }), "{admitted:?}");
                let taken = loop {
                    let until = clock.now().plus(Duration::from_secs(2));
                    let take = Take { request: request(&event), begin: Some(attempt(&clock)) };
                    let taken = insist(|| store.claim_and_begin("a", vec![take.clone()], until)).await.remove(0);
                    match taken.claimed {
                        Claimed::Granted { token, .. } => break token,
                        // The claim was committed, and its answer lost.
                        Claimed::Held(_) => tokio::time::sleep(Duration::from_millis(200)).await,
                        other => panic!("{other:?}"),
                    }
                };
                let end = Transition { key: event.key(), token: taken, change: finish(State::Delivered, None) };
                assert_eq!(insist(|| store.apply(vec![end.clone()])).await, [true]);
                delivered.push(event);
            }
            delivered
        });
    }
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        kill(&cluster).await;
        // Counts of some seconds ago do not ask the server: what fails next tells.
        let begin = std::time::Instant::now();
        loop {
            let status = store.status().await;
            if !status.reachable {
                assert!(status.last_error.is_some(), "{status:?}");
                break;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "{status:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        resume(&cluster).await;
    }
    let delivered = tasks.join_all().await.concat();
    kill(&cluster).await;
    resume(&cluster).await;
    assert_eq!(delivered.len(), 2000);
    for event in &delivered {
        let key = event.key();
        let row = insist(|| store.get(&key, true)).await.unwrap();
        assert_eq!((row.state, row.envelope), (State::Delivered, event.envelope.clone()));
    }
    let loaded = store.load(delivered.iter().map(|e| e.key()).collect()).await.unwrap();
    assert!(loaded.into_iter().map(Option::unwrap).eq(delivered));
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_may_come_later() {
    let cluster = own(&[]).await;
    kill(&cluster).await;
    let store = open(&cluster.url(), "ledger", None, Clock::System, None).await.unwrap();
    let event = event(&Clock::System, "acme", b"x");
    let error = store.admit(vec![event.clone()]).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable(_)), "{error}");
    assert!(!store.status().await.reachable);
    resume(&cluster).await;
    assert_eq!(store.admit(vec![event]).await.unwrap(), [Admitted::New]);
    assert!(store.status().await.reachable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_may_lose_commits_is_refused() {
    for (setting, fix) in
        [(&["synchronous_commit=off"][..], "SET synchronous_commit = on"), (&["fsync=off"], "Set fsync = on")]
    {
        let cluster = own(setting).await;
        let store = open(&cluster.url(), "ledger", None, Clock::System, None).await.unwrap();
        let error = store.admit(vec![event(&Clock::System, "acme", b"x")]).await.unwrap_err();
        assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains(fix), "{error}");
        assert!(!store.status().await.reachable);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appliances_that_start_at_once_migrate_once() {
    let cluster = tokio::task::spawn_blocking(Cluster::shared).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..6u8 {
        let url = cluster.url();
        tasks.spawn(async move {
            let store = open(&url, "together", None, Clock::System, None).await.unwrap();
            store.admit(vec![event(&Clock::System, "acme", &[n])]).await.unwrap()
        });
    }
    assert_eq!(tasks.join_all().await, vec![[Admitted::New]; 6]);
    let (_, migrations) = cluster.psql("SELECT count(*) FROM together.refinery_schema_history");
    assert_eq!(migrations, "1");
    // A newer release has been here, and leaves room for ours.
    cluster.psql("INSERT INTO together.refinery_schema_history VALUES (99, 'later', '2027-01-01T00:00:00Z', '1')");
    let store = open(&cluster.url(), "together", None, Clock::System, None).await.unwrap();
    assert_eq!(store.admit(vec![event(&Clock::System, "acme", b"x")]).await.unwrap(), [Admitted::New]);
    // Until it does not any more.
    cluster.psql("UPDATE together.format SET oldest_reader = 99");
    let store = open(&cluster.url(), "together", None, Clock::System, None).await.unwrap();
    let error = store.admit(vec![event(&Clock::System, "acme", b"y")]).await.unwrap_err();
    assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains("newer release"), "{error}");
    // Or it is another environment's.
    cluster.psql("UPDATE together.format SET oldest_reader = 1, environment = 'staging'");
    let store = open(&cluster.url(), "together", None, Clock::System, None).await.unwrap();
    let error = store.admit(vec![event(&Clock::System, "acme", b"y")]).await.unwrap_err();
    let words = "belongs to environment staging, and this is production";
    assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains(words), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_key_or_encoding_is_found_before_anything_is_written() {
    let cluster = tokio::task::spawn_blocking(Cluster::shared).await.unwrap();
    let one = event(&Clock::System, "acme", b"x");
    let store = open(&cluster.url(), "keyed", Some("a1"), Clock::System, None).await.unwrap();
    store.admit(vec![one.clone()]).await.unwrap();
    for (key, words) in [(Some("a2"), "another encryption key"), (None, "encryption_key is not set")] {
        let store = open(&cluster.url(), "keyed", key, Clock::System, None).await.unwrap();
        let error = store.admit(vec![event(&Clock::System, "acme", b"y")]).await.unwrap_err();
        assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains(words), "{error}");
    }
    assert_eq!(cluster.psql("SELECT count(*) FROM keyed.events").1, "1");
    assert_eq!(store.load(vec![one.key()]).await.unwrap(), [Some(one)]);
    cluster.psql("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0");
    let url = cluster.url().replace("/postgres", "/latin");
    let store = open(&url, "ledger", None, Clock::System, None).await.unwrap();
    let error = store.admit(vec![event(&Clock::System, "acme", b"y")]).await.unwrap_err();
    assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains("ENCODING 'UTF8'"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_only_reads_is_left_for_one_that_writes() {
    let cluster = own(&[]).await;
    let store = open(&cluster.url(), "ledger", None, Clock::System, None).await.unwrap();
    store.admit(vec![event(&Clock::System, "acme", b"x")]).await.unwrap();
    let backends = || cluster.psql("SELECT pid FROM pg_stat_activity WHERE application_name = 'dealscale'").1;
    let before = backends();
    // What a failover leaves behind where it does not cut connections.
    cluster.psql("ALTER SYSTEM SET default_transaction_read_only = on");
    cluster.psql("SELECT pg_reload_conf()");
    let one = event(&Clock::System, "acme", b"y");
    let error = loop {
        // The reload arrives a moment later.
        if let Err(error) = store.admit(vec![event(&Clock::System, "acme", b"z")]).await {
            break error;
        }
    };
    assert!(error.is_transient() && error.to_string().contains("standby"), "{error}");
    let begin = std::time::Instant::now();
    while !before.is_empty() && backends().lines().any(|pid| before.lines().any(|old| old == pid)) {
        assert!(begin.elapsed() < Duration::from_secs(30), "the connection is kept");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(!store.status().await.reachable);
    assert!(cluster.psql("ALTER SYSTEM RESET default_transaction_read_only").0);
    cluster.psql("SELECT pg_reload_conf()");
    assert!(matches!(insist(|| store.admit(vec![one.clone()])).await[..], [Admitted::New | Admitted::Same { .. }]));
    assert!(store.status().await.reachable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commits_stay_durable_when_the_server_is_configured_otherwise() {
    let cluster = own(&[]).await;
    let url = Secret::new(cluster.url());
    let options = dealscale::postgres::Options {
        url: &url,
        ca_file: None,
        schema: None,
        connections_max: 1,
        connect_timeout: Span::secs(3),
        statement_timeout: Span::secs(10),
        durable: true,
    };
    let pool = dealscale::postgres::Pool::new(&options).unwrap();
    let client = pool.get().await.unwrap();
    // Something that a reload does change, to see that it has arrived.
    for setting in ["ALTER SYSTEM SET synchronous_commit = off", "ALTER SYSTEM SET log_min_duration_statement = 77"] {
        assert!(cluster.psql(setting).0);
    }
    cluster.psql("SELECT pg_reload_conf()");
    loop {
        let shown = client
            .query_one(
                "SELECT current_setting('log_min_duration_statement'), current_setting('synchronous_commit')",
                &[],
            )
            .await
            .unwrap();
        assert_eq!(shown.get::<_, &str>(1), "on");
        if shown.get::<_, &str>(0) == "77ms" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(client);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_went_away_holds_up_nobody() {
    let cluster = own(&[]).await;
    let store = open(&cluster.url(), "ledger", None, Clock::System, None).await.unwrap();
    let event = event(&Clock::System, "acme", b"x");
    store.admit(vec![event.clone()]).await.unwrap();
    let (locker, connection) = tokio_postgres::connect(&cluster.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    locker.batch_execute("BEGIN; LOCK TABLE ledger.events IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let key = event.key();
    for _ in 0..6 {
        let gave_up = tokio::time::timeout(Duration::from_millis(100), store.get(&key, false)).await;
        assert!(gave_up.is_err());
    }
    // Every connection of the pool would stand behind such a statement, until the server ends it after ten seconds.
    let other = tokio::time::timeout(Duration::from_secs(6), store.rejected(1)).await;
    assert!(matches!(other, Ok(Ok(_))), "{other:?}");
    locker.batch_execute("ROLLBACK").await.unwrap();
    assert!(insist(|| store.get(&key, false)).await.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn collecting_reads_only_what_is_old() {
    let cluster = own(&[]).await;
    let store = open(&cluster.url(), "ledger", None, Clock::System, None).await.unwrap();
    let done = |n: u16| {
        let mut event = event(&Clock::System, "acme", &n.to_be_bytes());
        event.envelope.content = dealscale::event::Content::Done {
            state: State::Succeeded,
            status: Some(200),
            started_at: Clock::System.now(),
            duration_ms: 1,
            error: None,
            n8n_execution_id: None,
        };
        event
    };
    store.admit((0..2000).map(done).collect()).await.unwrap();
    // Two of them are past their age.
    let (changed, text) = cluster.psql("UPDATE ledger.events SET phase_at = 0 WHERE seq <= 2; SELECT pg_stat_reset()");
    assert!(changed, "{text}");
    for _ in 0..10 {
        store.collect(500).await.unwrap();
    }
    assert_eq!(cluster.psql("SELECT count(*) FROM ledger.events").1, "1998");
    store.close().await;
    // Our own questions above go through no index.
    let sql = "SELECT idx_tup_fetch FROM pg_stat_user_tables WHERE schemaname = 'ledger' AND relname = 'events'";
    let read: u64 = loop {
        // The statistics arrive with the end of the session.
        match cluster.psql(sql).1.parse() {
            Ok(0) | Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            Ok(read) => break read,
        }
    };
    // Ten rounds that look at each complete event would read 20,000.
    assert!(read < 100, "{read}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_may_only_use_the_tables_is_enough() {
    let cluster = tokio::task::spawn_blocking(Cluster::shared).await.unwrap();
    let store = open(&cluster.url(), "granted", None, Clock::System, None).await.unwrap();
    store.admit(vec![event(&Clock::System, "acme", b"x")]).await.unwrap();
    let (done, text) = cluster.psql(
        "CREATE ROLE worker LOGIN; GRANT USAGE ON SCHEMA granted TO worker; \
         GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA granted TO worker",
    );
    assert!(done, "{text}");
    let url = cluster.url().replace("dealscale@", "worker@");
    let store = open(&url, "granted", None, Clock::System, None).await.unwrap();
    assert_eq!(store.admit(vec![event(&Clock::System, "acme", b"y")]).await.unwrap(), [Admitted::New]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_go_by_the_databases_clock() {
    let cluster = tokio::task::spawn_blocking(Cluster::shared).await.unwrap();
    let store = open(&cluster.url(), "clocks", None, Clock::System, None).await.unwrap();
    let event = event(&Clock::System, "acme", b"x");
    store.admit(vec![event.clone()]).await.unwrap();
    let until = Clock::System.now().plus(Duration::from_millis(400));
    let granted = store.claim("a", vec![request(&event)], until).await.unwrap().remove(0);
    assert!(matches!(granted, Claimed::Granted { .. }));
    let held = store.claim("b", vec![request(&event)], until).await.unwrap().remove(0);
    assert!(matches!(held, Claimed::Held(_)), "{held:?}");
    tokio::time::sleep(Duration::from_millis(600)).await;
    let until = Clock::System.now().plus(Duration::from_secs(60));
    let Claimed::Granted { token, row } = store.claim("b", vec![request(&event)], until).await.unwrap().remove(0)
    else {
        panic!("not granted")
    };
    let skew = row.claim.unwrap().until.0 - until.0;
    assert!(skew.abs() < 1000, "the same machine: {skew} ms");
    let change = Change::Renew { until: Timestamp(until.0 + 60_000) };
    assert_eq!(store.apply(vec![Transition { key: event.key(), token, change }]).await.unwrap(), [true]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_is_what_sslmode_says() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    // A CA of our own, and a certificate for localhost by it.
    let script = "set -e; openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=test-ca -days 2 \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign; \
        openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost; \
        printf 'subjectAltName=DNS:localhost\\n' > ext; \
        openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out server.pem";
    let made = std::process::Command::new("sh").args(["-c", script]).current_dir(dir.path()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let cluster = own(&[]).await;
    for name in ["server.pem", "server.key"] {
        let (data, own) = (cluster.data().join(name), std::fs::metadata(cluster.data()).unwrap());
        std::fs::copy(file(name), &data).unwrap();
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        std::os::unix::fs::chown(&data, Some(own.uid()), Some(own.gid())).unwrap();
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let (_, text) = cluster.psql("ALTER SYSTEM SET ssl_cert_file = 'server.pem'");
    cluster.psql("ALTER SYSTEM SET ssl_key_file = 'server.key'");
    cluster.psql("ALTER SYSTEM SET ssl = on");
    cluster.psql("SELECT pg_reload_conf()");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let encrypted =
        "SELECT bool_or(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = 'dealscale'";
    let ca = || Some(file("ca.pem"));
    let cases = [
        ("127.0.0.1", "disable", None, Ok("f")),
        ("127.0.0.1", "prefer", None, Ok("t")),
        ("localhost", "require", ca(), Ok("t")),
        ("localhost", "prefer", ca(), Ok("t")),
        // The certificate is not for this name, or nobody of ours signed it.
        ("127.0.0.1", "require", ca(), Err(())),
        ("localhost", "require", None, Err(())),
    ];
    for (host, mode, ca_file, expected) in cases {
        let url = format!("{}?sslmode={mode}", cluster.url().replace("127.0.0.1", host));
        let what = format!("{host} {mode} {ca_file:?} {text}");
        let opened = open(&url, "tls", None, Clock::System, ca_file).await;
        let admitted = match &opened {
            Ok(store) => store.admit(vec![event(&Clock::System, "acme", b"x")]).await,
            Err(error) => Err(error.clone()),
        };
        match expected {
            Ok(ssl) => {
                assert!(admitted.is_ok(), "{what}: {admitted:?}");
                assert_eq!(cluster.psql(encrypted).1, ssl, "{what}");
            }
            Err(()) => assert!(admitted.is_err(), "{what}"),
        }
        if let Ok(store) = opened {
            store.close().await;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Not a promise but a figure: `cargo test --release --test real -- --ignored --nocapture postgres::payloads::figure`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a figure"]
async fn figure_events_per_second() {
    let cluster = own(&[]).await;
    let store = open(&cluster.url(), "figure", None, Clock::System, None).await.unwrap();
    let figure = conformance::events_per_second(&store, 20_000).await;
    println!("PostgreSQL: {figure:.0} events/s (admit, claim and begin, finish; 1 KiB)");
    assert!(figure > 100.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invariant_3_rows_are_met_by_their_keys_however_long_the_backlog() {
    let world = plain("rows_by_key").await;
    let cluster = Cluster::shared();
    // The statements are planned while there is nothing.
    let nobody = event(&world.clock, "acme", b"");
    for _ in 0..4 {
        world.store.claim("a", vec![request(&nobody)], START).await.unwrap();
        let end = Transition { key: nobody.key(), token: 1, change: finish(State::Delivered, None) };
        world.store.apply(vec![end]).await.unwrap();
    }
    let backlog: Vec<_> = (0..2000u16).map(|n| event(&world.clock, "acme", &n.to_be_bytes())).collect();
    world.store.admit(backlog.clone()).await.unwrap();
    for event in &backlog[..150] {
        let take = Take { request: request(event), begin: Some(attempt(&world.clock)) };
        let until = world.clock.now().plus(Duration::from_secs(60));
        let taken = world.store.claim_and_begin("a", vec![take], until).await.unwrap().remove(0);
        let Claimed::Granted { token, .. } = taken.claimed else { panic!("not granted") };
        let end = Transition { key: event.key(), token, change: finish(State::Delivered, None) };
        assert_eq!(world.store.apply(vec![end]).await.unwrap(), [true]);
    }
    world.store.close().await;
    // The statistics arrive with the end of the sessions.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let sql = "SELECT idx_tup_fetch, seq_scan, n_tup_hot_upd, n_tup_upd FROM pg_stat_user_tables \
        WHERE schemaname = 'p_rows_by_key' AND relname = 'events'";
    let (_, found) = cluster.psql(sql);
    let numbers: Vec<u64> = found.split('|').map(|n| n.parse().unwrap()).collect();
    assert_eq!(numbers[3], 300, "{found}");
    // Walking the backlog would be 600,000 rows, or 300 scans.
    assert!(numbers[0] < 3000 && numbers[1] < 20, "{found}");
    // None at all if a claim touched an indexed column.
    assert!(numbers[2] >= 100, "claims are heap-only updates: {found}");
}
