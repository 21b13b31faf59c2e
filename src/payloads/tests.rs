//! The invariants of the payload store, against SQLite. `conformance.rs` is the part that PostgreSQL has to pass as well
//! (`tests/real/postgres/payloads.rs`).

use crate as dealscale;

#[macro_use]
#[path = "conformance.rs"]
mod conformance;

use std::path::Path;

use self::conformance::{LEDGER_AGE, PAYLOAD_AGE, START, World};
use super::*;
use crate::config::outbox::OutboxStore;
use crate::config::payloads::PayloadStore;
use crate::config::{self, Secret};
use crate::units::Bytes;

fn outbox(dir: &Path, key: Option<&str>) -> config::Outbox {
    config::Outbox {
        dir: dir.join("outbox"),
        store: OutboxStore::Sled,
        bytes_max: Bytes::gib(1),
        count_max: 1000,
        disk_free_min: Bytes(0),
        key_window: Span::hours(24),
        lease: Span::secs(120),
        encryption_key: key.map(|key| Secret::new(key.repeat(32))),
    }
}

async fn open(dir: &Path, key: Option<&str>, clock: Clock) -> Result<Store, Error> {
    let config = config::Payloads {
        store: PayloadStore::Sqlite { file: dir.join("state/payloads.sqlite") },
        payload_age_max: PAYLOAD_AGE,
        ledger_age_max: LEDGER_AGE,
    };
    Store::open(&config, &outbox(dir, key), &Environment::try_new("production").unwrap(), clock).await
}

async fn world_with(key: Option<&str>) -> (World, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let clock = Clock::manual(START);
    let store = open(&path, key, clock.clone()).await.unwrap();
    (World { store, clock, keep: Box::new(dir) }, path)
}

async fn plain(_case: &str) -> World {
    world_with(None).await.0
}

async fn sealed(_case: &str) -> World {
    world_with(Some("a1")).await.0
}

mod sqlite {
    use super::*;
    conformance_tests!(plain);
}

mod sqlite_sealed {
    use super::*;
    conformance_tests!(sealed);
}

/// Not a promise but a figure: `cargo test --release --lib -- --ignored --nocapture payloads::tests::figure`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a figure"]
async fn figure_events_per_second() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None, Clock::System).await.unwrap();
    let figure = conformance::events_per_second(&store, 40_000).await;
    println!("SQLite: {figure:.0} events/s (admit, claim and begin, finish; 1 KiB)");
    assert!(figure > 100.0);
}

#[tokio::test]
async fn what_is_closed_opens_with_all_that_was_confirmed() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let store = open(dir.path(), None, clock.clone()).await.unwrap();
    let event = conformance::event(&clock, "acme", b"x");
    store.admit(vec![event.clone()]).await.unwrap();
    store.close().await;
    let error = store.admit(vec![event.clone()]).await.unwrap_err();
    assert!(error.to_string().contains("closed"), "{error}");
    assert!(store.get(&event.key(), false).await.is_err());
    let store = open(dir.path(), None, clock).await.unwrap();
    assert_eq!(store.load(vec![event.key()]).await.unwrap(), [Some(event)]);
}

#[tokio::test]
async fn a_wrong_key_is_a_clear_error_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(START);
    let event = conformance::event(&clock, "acme", b"{\"iban\":\"DE02120300000000202051\"}");
    let store = open(dir.path(), Some("a1"), clock.clone()).await.unwrap();
    store.admit(vec![event.clone()]).await.unwrap();
    store.close().await;
    let file = std::fs::read(dir.path().join("state/payloads.sqlite")).unwrap();
    for secret in ["DE0212", "Söhne"] {
        assert!(!file.windows(secret.len()).any(|w| w == secret.as_bytes()), "{secret} is in the file");
    }
    for (key, words) in [(Some("a2"), "another encryption key"), (None, "encryption_key is not set")] {
        let error = open(dir.path(), key, clock.clone()).await.map(drop).unwrap_err();
        assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains(words), "{error}");
    }
    // A row of another key behind ours: found when it is read.
    let newer = Clock::manual(START.plus(Duration::from_secs(1)));
    let store = open(dir.path(), Some("a1"), newer.clone()).await.unwrap();
    store.admit(vec![conformance::event(&newer, "acme", b"x")]).await.unwrap();
    store.close().await;
    let db = rusqlite::Connection::open(dir.path().join("state/payloads.sqlite")).unwrap();
    let other = "UPDATE contents SET envelope = CAST(X'0100000000' || substr(envelope, 6) AS BLOB) WHERE seq = 1";
    let was: Vec<u8> = db.query_row("SELECT envelope FROM contents WHERE seq = 1", [], |row| row.get(0)).unwrap();
    assert_eq!(db.execute(other, []).unwrap(), 1);
    let store = open(dir.path(), Some("a1"), clock.clone()).await.unwrap();
    for error in [
        store.load(vec![event.key()]).await.unwrap_err(),
        store.claim("a", vec![conformance::request(&event)], START).await.unwrap_err(),
        store.list(Filter { limit: 10, ..Filter::default() }).await.unwrap_err(),
    ] {
        let words = "another encryption key";
        assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains(words), "{error}");
    }
    store.close().await;
    assert_eq!(db.execute("UPDATE contents SET envelope = ?1 WHERE seq = 1", [was]).unwrap(), 1);
    let store = open(dir.path(), Some("a1"), clock).await.unwrap();
    assert_eq!(store.load(vec![event.key()]).await.unwrap(), [Some(event)]);
}

#[tokio::test]
async fn a_damaged_row_is_a_dead_letter_and_its_neighbour_goes_on() {
    let (w, dir) = world_with(Some("a1")).await;
    let (bad, good) = (w.admitted("acme", b"bad").await, w.admitted("acme", b"good").await);
    let db = rusqlite::Connection::open(dir.join("state/payloads.sqlite")).unwrap();
    // A body that somebody copied behind another event's name.
    let copied = "UPDATE contents SET body = (SELECT body FROM contents WHERE seq = 2) WHERE seq = 1";
    assert_eq!(db.execute(copied, []).unwrap(), 1);
    let take = |event| Take { request: conformance::request(event), begin: Some(conformance::attempt(&w.clock)) };
    let taken = w.store.claim_and_begin("a", vec![take(&bad), take(&good)], w.now().plus(Duration::from_secs(9))).await;
    let taken = taken.unwrap();
    assert!(matches!(taken[0].claimed, Claimed::Final(State::Dead)) && taken[0].body.is_none());
    assert!(matches!(taken[1].claimed, Claimed::Granted { .. }) && taken[1].body.is_some());
    let row = w.store.get(&bad.key(), false).await.unwrap().unwrap();
    assert_eq!((row.state, row.error_class.as_deref()), (State::Dead, Some("damaged")));
    assert_eq!(w.store.load(vec![bad.key()]).await.unwrap(), [None]);
}

#[tokio::test]
async fn files_that_cannot_be_used_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state/payloads.sqlite");
    std::fs::create_dir(dir.path().join("state")).unwrap();
    std::fs::write(&file, "this is no database, but long enough to look at the header of".repeat(100)).unwrap();
    let error = open(dir.path(), None, Clock::System).await.map(drop).unwrap_err();
    assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains("restore it from a backup"), "{error}");
    std::fs::remove_file(&file).unwrap();
    let store = open(dir.path(), None, Clock::System).await.unwrap();
    store.close().await;
    let db = rusqlite::Connection::open(&file).unwrap();
    db.execute("UPDATE format SET oldest_reader = 99", []).unwrap();
    let error = open(dir.path(), None, Clock::System).await.map(drop).unwrap_err();
    assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains("newer release"), "{error}");
    // It is another environment's.
    db.execute("UPDATE format SET oldest_reader = 1, environment = 'staging'", []).unwrap();
    let error = open(dir.path(), None, Clock::System).await.map(drop).unwrap_err();
    let words = "belongs to environment staging, and this is production";
    assert!(matches!(error, Error::Unusable(_)) && error.to_string().contains(words), "{error}");
}

#[tokio::test]
async fn a_count_that_nobody_waits_for_any_more_serves_the_next() {
    let (w, _dir) = world_with(None).await;
    w.admitted("acme", b"x").await;
    // As long as counting lasts.
    let counting = w.store.shared.counts.lock().await;
    let status = w.store.status().await;
    assert!(status.reachable && status.states.is_empty(), "{status:?}");
    drop(counting);
    let end = Instant::now() + Duration::from_secs(60);
    while w.store.shared.counts.lock().await.is_none() {
        assert!(Instant::now() < end, "the count was given up with its caller");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(w.store.status().await.states, BTreeMap::from([("relayed".to_owned(), 1)]));
}

#[tokio::test]
async fn a_full_disk_fails_whole_and_passes() {
    let (w, dir) = world_with(None).await;
    let file = dir.join("state/payloads.sqlite");
    // The writer's own connection gets the limit; it is the nearest to a full disk that needs no disk.
    w.store.limit_pages(64).await;
    let big = vec![7u8; 1 << 20];
    let (small, large) = (event(&w, b"small"), event(&w, &big));
    let error = w.store.admit(vec![small.clone(), large.clone()]).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("full"), "{error}");
    assert!(w.store.get(&small.key(), false).await.unwrap().is_none(), "half of a batch");
    assert!(!w.store.status().await.reachable);
    w.store.limit_pages(1 << 20).await;
    assert_eq!(w.store.admit(vec![small, large]).await.unwrap(), [Admitted::New, Admitted::New]);
    assert!(file.exists());
}

#[tokio::test]
async fn large_payloads_are_collected_in_bites_and_all_of_them() {
    let (w, dir) = world_with(None).await;
    let big = vec![7u8; 20 << 20];
    let events: Vec<_> = [&big[..], &big, b"small", &big, b""].map(|body| event(&w, body)).into();
    for event in &events {
        w.store.admit(vec![event.clone()]).await.unwrap();
        w.finished(event, State::Delivered).await;
    }
    w.clock.step(PAYLOAD_AGE.as_millis());
    assert_eq!(w.store.collect(500).await.unwrap(), Collected { payloads: 5, rows: 0 });
    assert_eq!(w.store.collect(500).await.unwrap(), Collected::default());
    let db = rusqlite::Connection::open(dir.join("state/payloads.sqlite")).unwrap();
    let kept: i64 = db.query_row("SELECT count(*) FROM contents WHERE body IS NOT NULL", [], |row| row.get(0)).unwrap();
    assert_eq!(kept, 0);
}

fn event(w: &World, body: &[u8]) -> Event {
    conformance::event(&w.clock, "acme", body)
}

#[tokio::test]
async fn reads_do_not_wait_for_the_writer() {
    let (w, dir) = world_with(None).await;
    let known = w.admitted("acme", b"x").await;
    let other = rusqlite::Connection::open(dir.join("state/payloads.sqlite")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE; UPDATE events SET crashes = 7").unwrap();
    let late = event(&w, b"late");
    let (store, admitted) =
        (w.store.clone(), tokio::time::timeout(Duration::from_millis(300), w.store.admit(vec![late])));
    assert!(admitted.await.is_err(), "somebody else writes");
    let row = store.get(&known.key(), false).await.unwrap().unwrap();
    assert_eq!(row.crashes, 0);
    other.execute_batch("ROLLBACK").unwrap();
}
