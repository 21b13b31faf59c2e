//! One suite for both stores, through the thread and the disk; and the simulator, which drives the engine step by step over a disk that
//! fails and forgets.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use super::engine::Engine;
use super::owner::{Parked, serve};
use super::store::simulated::{Disk, Fault};
use super::store::{Failure, Tree};
use super::*;
use crate::config::outbox::OutboxStore;
use crate::event::State;
use crate::event::{Content, Envelope};
use crate::ids::BodyHash;
use crate::units::Span;

const KINDS: [OutboxStore; 2] = [OutboxStore::Sled, OutboxStore::Sqlite];

fn settings(dir: &Path, store: OutboxStore) -> config::Outbox {
    config::Outbox {
        dir: dir.join("outbox"),
        store,
        bytes_max: Bytes::mib(64),
        count_max: 1_000_000,
        disk_free_min: Bytes(0),
        key_window: Span::hours(24),
        lease: Span::secs(120),
        encryption_key: None,
    }
}

fn tenant(name: &str) -> Tenant {
    Tenant::try_new(name).unwrap()
}

fn event(tenant_name: &str, body: &[u8]) -> Event {
    Event {
        envelope: Envelope {
            tenant: tenant(tenant_name),
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
            body_hash: BodyHash::of(body),
            content: Content::Json,
        },
        body: Body::copy_from_slice(body),
    }
}

fn append(event: &Event) -> Append {
    Append { event: event.clone(), idempotency_key: None, answer: Body::new() }
}

fn no_limits() -> TenantLimits {
    Arc::new(|_| (1, Bytes(u64::MAX)))
}

fn environment() -> Environment {
    Environment::try_new("test").unwrap()
}

fn open(settings: &config::Outbox) -> Outbox {
    Outbox::open(settings, &environment(), no_limits(), Clock::System).unwrap()
}

const ALL: LeaseLimit = LeaseLimit { count: 1_000, bytes: Bytes::gib(1) };

/// Leases until `n` records came.
async fn lease(outbox: &Outbox, n: usize) -> Vec<Leased> {
    let mut leased = Vec::new();
    while leased.len() < n {
        leased.extend(outbox.lease(LeaseLimit { count: n - leased.len(), ..ALL }).await.unwrap());
    }
    leased
}

async fn nothing_to_lease(outbox: &Outbox) {
    let waited = tokio::time::timeout(Duration::from_millis(100), outbox.lease(ALL)).await;
    assert!(waited.is_err(), "{waited:?}");
}

fn confirm(sequence: Sequence) -> Settle {
    Settle::Confirm { sequence, forward: None }
}

#[tokio::test]
async fn invariant_1_what_was_appended_is_there_after_a_new_open() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        let events: Vec<_> = [10, 1_000, 29 << 10, 300 << 10, 3 << 20]
            .into_iter()
            .enumerate()
            .map(|(n, size)| event("a", &vec![n as u8; size]))
            .collect();
        let outbox = open(&settings);
        for event in &events {
            assert!(!outbox.append(append(event)).await.unwrap().duplicate);
        }
        outbox.close().await.unwrap();
        assert!(matches!(outbox.append(append(&events[0])).await, Err(Error::Closed)));
        let outbox = open(&settings);
        let leased = lease(&outbox, events.len()).await;
        assert_eq!(leased.iter().map(|l| l.event.clone()).collect::<Vec<_>>(), events, "{kind:?}");
        for event in &events {
            assert_eq!(outbox.find(&event.key()).await.unwrap().unwrap().event, *event);
        }
    }
}

#[tokio::test]
async fn invariant_2_a_record_leaves_by_confirm_alone_in_any_order() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        let outbox = open(&settings);
        let events: Vec<_> = (0..50).map(|n| event("a", format!("{n}").as_bytes())).collect();
        for result in outbox.append_batch(events.iter().map(append).collect()).await {
            result.unwrap();
        }
        let leased = lease(&outbox, 50).await;
        nothing_to_lease(&outbox).await;
        let even = leased.iter().step_by(2).rev().map(|l| confirm(l.sequence)).collect();
        outbox.settle(even).await.unwrap();
        // Twice changes nothing.
        outbox.settle(vec![confirm(leased[0].sequence)]).await.unwrap();
        outbox.close().await.unwrap();
        let outbox = open(&settings);
        assert_eq!(outbox.status().records, 25);
        let again = lease(&outbox, 25).await;
        assert_eq!(
            again.iter().map(|l| l.event.key()).collect::<Vec<_>>(),
            events.iter().skip(1).step_by(2).map(Event::key).collect::<Vec<_>>()
        );
        outbox.settle(again.iter().map(|l| confirm(l.sequence)).collect()).await.unwrap();
        outbox.close().await.unwrap();
        let outbox = open(&settings);
        assert_eq!((outbox.status().records, outbox.status().bytes), (0, 0));
        // Invariant 6: numbers go on although everything was deleted.
        let next = outbox.append(append(&event("a", b"x"))).await.unwrap().sequence.unwrap();
        assert!(next > again.last().unwrap().sequence, "{next:?}");
    }
}

#[tokio::test]
async fn invariant_3_limits_refuse_and_evict_nothing() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let base = settings(dir.path(), kind);
        let small = config::Outbox { bytes_max: Bytes::kib(100), ..base.clone() };
        let quota: TenantLimits = Arc::new(|t| (1, if t.as_str() == "b" { Bytes::kib(10) } else { Bytes(u64::MAX) }));
        let outbox = Outbox::open(&small, &environment(), quota, Clock::System).unwrap();
        let mut taken = 0;
        let error = loop {
            match outbox.append(append(&event("a", &[0; 9_000]))).await {
                Ok(_) => taken += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::Full { .. }) && error.verdict() == Verdict::Later, "{error}");
        assert!(matches!(outbox.append(append(&event("a", &[0; 200_000]))).await, Err(Error::Oversized { .. })));
        assert_eq!(outbox.status().records, taken);
        outbox.settle(lease(&outbox, 8).await.iter().map(|l| confirm(l.sequence)).collect()).await.unwrap();
        outbox.append(append(&event("b", &[0; 9_000]))).await.unwrap();
        let error = outbox.append(append(&event("b", &[0; 9_000]))).await.unwrap_err();
        assert!(matches!(error, Error::Quota { .. }) && error.verdict() == Verdict::TenantLater, "{error}");
        outbox.close().await.unwrap();

        let counted = config::Outbox { count_max: 4, ..base.clone() };
        let outbox = open(&counted);
        let left = outbox.status().records;
        for _ in left..4 {
            outbox.append(append(&event("a", b"1"))).await.unwrap();
        }
        assert!(matches!(outbox.append(append(&event("a", b"1"))).await, Err(Error::FullCount { .. })));
        outbox.close().await.unwrap();

        let reserve = config::Outbox { disk_free_min: Bytes(u64::MAX), ..base };
        let outbox = open(&reserve);
        assert!(matches!(outbox.append(append(&event("a", b"1"))).await, Err(Error::Disk { .. })));
        // Confirming goes on.
        let leased = lease(&outbox, 1).await;
        outbox.settle(vec![confirm(leased[0].sequence)]).await.unwrap();
    }
}

#[tokio::test]
async fn invariant_4_a_damaged_record_is_poisoned_and_blocks_nothing() {
    // SQLite has no checksums of its own: what it reads is what lies there.
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path(), OutboxStore::Sqlite);
    let outbox = open(&settings);
    let events: Vec<_> = (0..9).map(|n| event("a", format!("body number {n}").as_bytes())).collect();
    outbox.append_batch(events.iter().map(append).collect()).await;
    outbox.close().await.unwrap();
    let file = settings.dir.join("outbox.sqlite");
    let mut raw = std::fs::read(&file).unwrap();
    let at = raw.windows(13).position(|w| w == b"body number 4").unwrap();
    raw[at] ^= 0x20;
    std::fs::write(&file, raw).unwrap();

    let report = tools::verify(&settings).unwrap();
    assert_eq!((report.records, report.damaged.len()), (9, 1), "{report:?}");
    let outbox = open(&settings);
    assert_eq!(outbox.unreadable(true).await.unwrap().len(), 1);
    assert_eq!(outbox.unreadable(false).await.unwrap(), [], "nobody has met it yet");
    let leased = lease(&outbox, 8).await;
    outbox.settle(leased.iter().map(|l| confirm(l.sequence)).collect()).await.unwrap();
    nothing_to_lease(&outbox).await;
    // It is kept, counted and told of, although its content cannot be shown.
    let poisoned = outbox.unreadable(false).await.unwrap();
    assert_eq!((poisoned.len(), poisoned[0].tenant.as_str(), outbox.status().poisoned), (1, "a", 1), "{poisoned:?}");
    assert!(poisoned[0].poisoned && poisoned[0].why.contains("checksum"), "{poisoned:?}");
    outbox.close().await.unwrap();
    let outbox = open(&settings);
    assert_eq!(outbox.unreadable(false).await.unwrap(), poisoned);
    assert!(outbox.repair_poisoned(poisoned[0].sequence, true).await.unwrap());
    assert_eq!((outbox.status().poisoned, outbox.status().records), (0, 0));
}

/// A mistake in the configuration must not poison a whole backlog.
#[tokio::test]
async fn records_wait_for_the_key_that_they_were_encrypted_with() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let plain = settings(dir.path(), kind);
        let key = |digit: &str| config::Outbox {
            encryption_key: Some(config::Secret::new(digit.repeat(64))),
            ..plain.clone()
        };
        let outbox = open(&key("1"));
        let sealed = event("a", b"very secret");
        outbox.append(append(&sealed)).await.unwrap();
        outbox.close().await.unwrap();
        for file in std::fs::read_dir(&plain.dir).unwrap() {
            let raw = std::fs::read(file.unwrap().path()).unwrap_or_default();
            assert!(!raw.windows(11).any(|w| w == b"very secret"), "it lies in the clear");
        }
        for wrong in [&plain, &key("2")] {
            let error = Outbox::open(wrong, &environment(), no_limits(), Clock::System).err().unwrap().to_string();
            assert!(error.contains("encryption_key") && error.contains("1 records"), "{error}");
            assert!(tools::verify(wrong).is_err());
        }
        let outbox = open(&key("1"));
        let leased = lease(&outbox, 1).await;
        assert_eq!(leased[0].event, sealed);
        outbox.settle(vec![confirm(leased[0].sequence)]).await.unwrap();
        outbox.close().await.unwrap();
        // Nothing waits any more: the key may change.
        let outbox = open(&key("2"));
        outbox.append(append(&sealed)).await.unwrap();
        assert_eq!(lease(&outbox, 1).await[0].event, sealed);
    }
}

#[tokio::test]
async fn invariant_5_an_ordering_key_is_leased_one_at_a_time_in_order() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let outbox = open(&settings(dir.path(), kind));
        for n in 0..6 {
            let mut event = event("a", format!("{n}").as_bytes());
            event.envelope.ordering_key = Some(OrderingKey::try_new(if n % 2 == 0 { "even" } else { "odd" }).unwrap());
            outbox.append(append(&event)).await.unwrap();
        }
        let first = lease(&outbox, 2).await;
        assert_eq!(first.iter().map(|l| &l.event.body[..]).collect::<Vec<_>>(), [b"0", b"1"]);
        nothing_to_lease(&outbox).await;
        // Released: the same one comes again, before its followers.
        outbox.settle(vec![Settle::Release { sequence: first[0].sequence }]).await.unwrap();
        assert_eq!(&lease(&outbox, 1).await[0].event.body[..], b"0");
        outbox.settle(vec![Settle::Poison { sequence: first[0].sequence, reason: "test".into() }]).await.unwrap();
        let next = lease(&outbox, 1).await;
        assert_eq!(&next[0].event.body[..], b"2");
        outbox.settle(vec![confirm(first[1].sequence), confirm(next[0].sequence)]).await.unwrap();
        let rest = lease(&outbox, 2).await;
        assert_eq!(rest.iter().map(|l| l.event.body[0]).collect::<BTreeSet<_>>(), BTreeSet::from([b'3', b'4']));
    }
}

#[tokio::test]
async fn keys_and_ids_make_duplicates_and_conflicts() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        let outbox = open(&settings);
        let first = event("a", b"1");
        let keyed = |event: &Event| Append {
            event: event.clone(),
            idempotency_key: Some("k".into()),
            answer: Body::from_static(b"answer"),
        };
        assert!(!outbox.append(keyed(&first)).await.unwrap().duplicate);
        let mut retry = event("a", b"1");
        retry.envelope.execution_id = first.envelope.execution_id;
        let again = outbox.append(keyed(&retry)).await.unwrap();
        assert_eq!((again.duplicate, again.answer.as_deref()), (true, Some(&b"answer"[..])));
        assert!(matches!(outbox.append(keyed(&event("a", b"2"))).await, Err(Error::KeyReused)));
        // Another tenant's key is another key; the same id without a key is a duplicate, with another body a conflict.
        assert!(!outbox.append(keyed(&event("b", b"2"))).await.unwrap().duplicate);
        assert!(outbox.append(append(&first)).await.unwrap().duplicate);
        let mut other = event("a", b"other");
        other.envelope.execution_id = first.envelope.execution_id;
        assert!(matches!(outbox.append(append(&other)).await, Err(Error::Conflict(_))));
        // Two of one batch.
        let twin = event("c", b"x");
        let results = outbox.append_batch(vec![append(&twin), append(&twin)]).await;
        assert_eq!(results.iter().map(|r| r.as_ref().unwrap().duplicate).collect::<Vec<_>>(), [false, true]);
        // The key outlives the record and the process.
        outbox.settle(lease(&outbox, 3).await.iter().map(|l| confirm(l.sequence)).collect()).await.unwrap();
        outbox.close().await.unwrap();
        let outbox = open(&settings);
        assert!(outbox.append(keyed(&retry)).await.unwrap().duplicate);
        assert_eq!(outbox.status().records, 0);
    }
}

#[tokio::test]
async fn keys_are_forgotten_after_their_window_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(Timestamp(1_000_000));
    let settings = settings(dir.path(), OutboxStore::Sled);
    let outbox = Outbox::open(&settings, &environment(), no_limits(), clock.clone()).unwrap();
    let keyed = |n: u32| Append {
        event: event("a", format!("{n}").as_bytes()),
        idempotency_key: Some("k".into()),
        answer: Body::new(),
    };
    outbox.append(keyed(1)).await.unwrap();
    clock.step(23 * 3_600_000);
    assert!(matches!(outbox.append(keyed(2)).await, Err(Error::KeyReused)));
    // A clock that goes back forgets nothing.
    clock.step(-100 * 3_600_000);
    assert!(matches!(outbox.append(keyed(2)).await, Err(Error::KeyReused)));
    clock.step(102 * 3_600_000);
    assert!(!outbox.append(keyed(2)).await.unwrap().duplicate);
}

#[tokio::test]
async fn tenants_take_turns() {
    let dir = tempfile::tempdir().unwrap();
    let limits: TenantLimits = Arc::new(|t| (if t.as_str() == "b" { 3 } else { 1 }, Bytes(u64::MAX)));
    let outbox = Outbox::open(&settings(dir.path(), OutboxStore::Sled), &environment(), limits, Clock::System).unwrap();
    for name in ["a", "b"] {
        let events: Vec<_> = (0..400).map(|n| append(&event(name, format!("{n}").as_bytes()))).collect();
        outbox.append_batch(events).await;
    }
    let leased = lease(&outbox, 256).await;
    let of_b = leased.iter().filter(|l| l.event.envelope.tenant.as_str() == "b").count();
    assert_eq!(of_b, 192, "three of four are the heavier tenant's");
}

#[tokio::test]
async fn a_lease_that_runs_out_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let short = config::Outbox { lease: Span::millis(50), ..settings(dir.path(), OutboxStore::Sled) };
    let outbox = open(&short);
    outbox.append(append(&event("a", b"1"))).await.unwrap();
    let first = lease(&outbox, 1).await;
    let second = lease(&outbox, 1).await;
    assert_eq!(first[0].sequence, second[0].sequence);
}

#[tokio::test]
async fn cancel_takes_what_the_relay_does_not_have() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let outbox = open(&settings(dir.path(), kind));
        let (one, two) = (event("a", b"1"), event("a", b"2"));
        outbox.append_batch(vec![append(&one), append(&two)]).await;
        // What is left of it is the record that the ledger will tell of it.
        for _ in 0..2 {
            assert_eq!(outbox.cancel(&two.key()).await.unwrap(), Cancelled::Done);
        }
        assert!(outbox.append(append(&two)).await.unwrap().duplicate, "a second publish does not revive it");
        let foreign = Key { tenant: tenant("b"), execution_id: one.envelope.execution_id };
        assert_eq!(outbox.cancel(&foreign).await.unwrap(), Cancelled::Absent);
        let leased = lease(&outbox, 2).await;
        assert_eq!(leased[0].event, one);
        assert!(
            matches!(leased[1].event.envelope.content, Content::Done { state: State::Cancelled, .. }),
            "{leased:?}"
        );
        assert_eq!(outbox.cancel(&one.key()).await.unwrap(), Cancelled::Leased);
        nothing_to_lease(&outbox).await;
        outbox.settle(leased.iter().map(|l| confirm(l.sequence)).collect()).await.unwrap();
        assert_eq!((outbox.status().records, outbox.status().bytes), (0, 0));
    }
}

#[tokio::test]
async fn a_poisoned_record_is_cancelled_without_a_trace_because_its_id_may_be_anothers() {
    let dir = tempfile::tempdir().unwrap();
    let outbox = open(&settings(dir.path(), OutboxStore::Sled));
    let one = event("a", b"1");
    outbox.append(append(&one)).await.unwrap();
    let sequence = lease(&outbox, 1).await[0].sequence;
    outbox.settle(vec![Settle::Poison { sequence, reason: "conflict".into() }]).await.unwrap();
    assert_eq!(outbox.cancel(&one.key()).await.unwrap(), Cancelled::Done);
    assert_eq!(outbox.cancel(&one.key()).await.unwrap(), Cancelled::Absent);
    assert_eq!((outbox.status().records, outbox.status().poisoned, outbox.status().bytes), (0, 0, 0));
}

/// Killed between the making of the files and the first record: no damage, and no alarm.
#[tokio::test]
async fn a_first_start_that_was_cut_short_is_no_damage() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        std::fs::create_dir(&settings.dir).unwrap();
        drop(store::open(kind, &settings.dir).unwrap());
        let outbox = open(&settings);
        assert_eq!(outbox.status().data_loss_possible, None, "{kind:?}");
        outbox.append(append(&event("a", b"1"))).await.unwrap();
        outbox.close().await.unwrap();
        // Once there was a record, an empty store is one that lost everything.
        for entry in std::fs::read_dir(&settings.dir).unwrap().map(|e| e.unwrap()) {
            let name = entry.file_name();
            if name != "lock" && name != "witness" {
                let path = entry.path();
                if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
            }
        }
        let outbox = open(&settings);
        let loss = outbox.status().data_loss_possible;
        assert!(loss.as_ref().is_some_and(|l| l.contains("0 records were salvaged")), "{kind:?}: {loss:?}");
        assert!(outbox.append(append(&event("a", b"2"))).await.unwrap().sequence.unwrap().0 >= 2);
    }
}

#[tokio::test]
async fn a_folder_of_the_other_kind_of_store_is_left_alone() {
    for (ours, other) in [(KINDS[0], KINDS[1]), (KINDS[1], KINDS[0])] {
        let dir = tempfile::tempdir().unwrap();
        let (ours, other) = (settings(dir.path(), ours), settings(dir.path(), other));
        let outbox = open(&ours);
        outbox.append(append(&event("a", b"1"))).await.unwrap();
        outbox.close().await.unwrap();
        let error = Outbox::open(&other, &environment(), no_limits(), Clock::System).err().unwrap().to_string();
        assert!(error.contains("outbox.store") && error.contains("export"), "{error}");
        let outbox = open(&ours);
        assert_eq!((outbox.status().records, outbox.status().data_loss_possible), (1, None));
    }
}

/// Requests that come one by one and wait together lie together.
#[tokio::test]
async fn what_waits_for_one_sync_shares_packs() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path(), OutboxStore::Sled);
    let outbox = open(&settings);
    let events: Vec<_> = (0..200).map(|n| event("a", format!("{n}").as_bytes())).collect();
    let appended = futures_util::future::join_all(events.iter().map(|e| outbox.append(append(e)))).await;
    let sequences: BTreeSet<_> = appended.into_iter().map(|a| a.unwrap().sequence.unwrap()).collect();
    assert_eq!(sequences.len(), 200);
    let syncs = outbox.status().syncs_total;
    outbox.close().await.unwrap();
    let packs = store::open(OutboxStore::Sled, &settings.dir).unwrap().scan(Tree::Index, None, 1_000).unwrap().len();
    // What one sync took is at most some 120 KiB, in packs of 30.
    assert!(packs as u64 <= syncs + 8 && packs < 200, "{packs} packs, {syncs} syncs");
}

// --- the owner over a disk that fails ---

/// An outbox over the simulated disk; `reopened` hears why it was opened again.
fn over(disk: &Disk, dir: &Path, clock: Clock, reopened: mpsc::Sender<Failure>) -> Outbox {
    let settings = Arc::new(settings(dir, OutboxStore::Sled));
    std::fs::create_dir_all(&settings.dir).unwrap();
    let engine = Engine::open(disk.open(), settings.clone(), None, no_limits()).unwrap();
    let status = Arc::new(Mutex::new(Status::default()));
    let (commands, receiver) = mpsc::channel();
    let (again, folder) = (disk.clone(), settings.dir.clone());
    let owner = Owner {
        commands: receiver,
        reopen: Box::new(move |failure| {
            let _ = reopened.send(failure.clone());
            again.heal();
            Engine::open(again.open(), settings.clone(), None, no_limits())
        }),
        dir: folder,
        clock,
        status: status.clone(),
        lock: None,
    };
    std::thread::spawn(move || owner.run(engine));
    Outbox { shared: Arc::new(Shared { commands, places: Semaphore::new(REQUESTS_MAX), status, seal: None }) }
}

#[tokio::test]
async fn a_failed_batch_is_unknown_to_everyone_in_it_and_the_store_is_opened_again() {
    for fault in [Fault::Lost, Fault::Written] {
        let (disk, dir, (reopened, why)) = (Disk::default(), tempfile::tempdir().unwrap(), mpsc::channel());
        let outbox = over(&disk, dir.path(), Clock::System, reopened);
        let (one, two) = (event("a", b"1"), event("a", b"2"));
        let first = outbox.append(append(&one)).await.unwrap().sequence.unwrap();
        disk.fail_next(fault);
        let error = outbox.append(append(&two)).await.unwrap_err();
        assert!(error.to_string().contains("the outcome is unknown"), "{error}");
        assert!(matches!(why.recv_timeout(Duration::from_secs(10)), Ok(Failure::Io(_))));
        // The retry is a duplicate where the batch had been written, and new where it had not.
        let retry = outbox.append(append(&two)).await.unwrap();
        assert_eq!(retry.duplicate, fault == Fault::Written);
        assert!(fault == Fault::Written || retry.sequence.unwrap().0 > first.0 + 1, "a number was used twice");
        assert_eq!(lease(&outbox, 2).await.len(), 2);
        assert_eq!(outbox.status().reopened, 1);
        assert!(why.try_recv().is_err(), "it was opened again once");
        outbox.close().await.unwrap();
        // The witness knows of nothing that the store does not.
        let next = Engine::open(disk.open(), Arc::new(settings(dir.path(), OutboxStore::Sled)), None, no_limits())
            .unwrap()
            .next;
        let witness = std::fs::read(dir.path().join("outbox/witness")).unwrap();
        assert!(u64::from_be_bytes(witness[..8].try_into().unwrap()) <= next);
    }
}

/// The witness is written after the failed batch as well: it must not know of numbers that only that batch had.
#[tokio::test]
async fn a_stop_right_after_a_failed_batch_is_no_damage() {
    let (disk, dir, (reopened, _why)) = (Disk::default(), tempfile::tempdir().unwrap(), mpsc::channel());
    let outbox = over(&disk, dir.path(), Clock::System, reopened);
    outbox.append(append(&event("a", b"1"))).await.unwrap();
    disk.fail_next(Fault::Lost);
    for result in outbox.append_batch((0..5).map(|n| append(&event("a", &[n]))).collect()).await {
        result.unwrap_err();
    }
    // Answered by the turn behind the one that failed. Then the process is gone.
    outbox.local().backlog().await.unwrap();
    let witness =
        u64::from_be_bytes(std::fs::read(dir.path().join("outbox/witness")).unwrap()[..8].try_into().unwrap());
    let settings = Arc::new(settings(dir.path(), OutboxStore::Sled));
    let next = Engine::open(disk.copy().open(), settings, None, no_limits()).unwrap().next;
    assert!(witness <= next, "the witness says {witness}, the store {next}");
}

#[tokio::test]
async fn damage_that_is_met_while_running_is_handed_to_the_salvage() {
    let (disk, dir, (reopened, why)) = (Disk::default(), tempfile::tempdir().unwrap(), mpsc::channel());
    let outbox = over(&disk, dir.path(), Clock::System, reopened);
    outbox.append(append(&event("a", b"1"))).await.unwrap();
    disk.damage();
    let local = outbox.local();
    let (leased, found, listed) =
        tokio::join!(outbox.lease(ALL), local.receive(everything(), 1).with_timeout(), outbox.unreadable(true));
    // Who waits for a record waits on, and has it after the store was opened again.
    let again = leased.iter().flatten().map(|l| Settle::Release { sequence: l.sequence }).collect();
    outbox.settle(again).await.unwrap();
    // Whoever asked in the failed turn hears of the failure; nobody is told that the outbox is closed.
    for error in [leased.map(drop).err(), found.and_then(|f| f.err()), listed.map(drop).err()].into_iter().flatten() {
        assert!(matches!(error, Error::Store { .. }), "{error}");
    }
    assert!(matches!(why.recv_timeout(Duration::from_secs(10)), Ok(Failure::Corrupt(_))));
    assert_eq!(lease(&outbox, 1).await.len(), 1, "after it was opened again");
}

#[test]
fn a_flipped_bit_of_the_bitmap_or_the_index_is_damage_and_not_a_lost_record() {
    for tree in [Tree::Done, Tree::Index] {
        let disk = Disk::default();
        let mut engine = Simulation::engine(&disk);
        let events: Vec<_> = (0..9).map(|n| event("a", &[n])).collect();
        engine.append(events.iter().map(prepared).collect(), Timestamp(1), Bytes(u64::MAX));
        engine.commit().unwrap();
        let leased = engine.lease(LeaseLimit { count: 1, ..ALL }, Instant::now()).unwrap();
        engine.settle(vec![confirm(leased[0].sequence)], Timestamp(1)).unwrap();
        engine.commit().unwrap();
        disk.flip(tree, 1);
        let settings = Arc::new(settings(Path::new("/nowhere"), OutboxStore::Sled));
        let opened = Engine::open(disk.open(), settings, None, no_limits());
        assert!(matches!(opened.err(), Some(Failure::Corrupt(_))), "{tree:?}");
    }
}

/// A message that is due while nobody receives (a breaker is open, say) must not keep the owner spinning.
#[test]
fn what_is_due_and_not_wanted_lets_the_owner_sleep() {
    let disk = Disk::default();
    let mut engine = Simulation::engine(&disk);
    let mut late = forward("a", 1);
    late.deliver_at = Some(Timestamp(5_000));
    engine.publish(vec![late, forward("a", 2)], Timestamp(1_000));
    engine.commit().unwrap();
    let start = Instant::now();
    let held = engine.receive(&*everything(), 9, Timestamp(1_000), start).unwrap();
    engine.give_back(&[held[0].id.clone()], start);
    assert!(engine.next_wake(Timestamp(6_000), start).is_some_and(|wake| wake.is_zero()));
    serve(&mut engine, &mut Parked::default(), &mut Vec::new(), Timestamp(6_000), start).unwrap();
    assert_eq!(engine.next_wake(Timestamp(6_000), start), None);
    assert_eq!(engine.receive(&*everything(), 9, Timestamp(6_000), start).unwrap().len(), 2);
}

/// So that a request that may wait for ever does not.
trait WithTimeout: Future + Sized {
    async fn with_timeout(self) -> Option<Self::Output> {
        tokio::time::timeout(Duration::from_millis(300), self).await.ok()
    }
}
impl<F: Future> WithTimeout for F {}

#[tokio::test]
async fn a_second_process_is_told_who_holds_the_folder() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        let outbox = open(&settings);
        let error = Outbox::open(&settings, &environment(), no_limits(), Clock::System).err().unwrap().to_string();
        assert!(error.contains("another process holds") && error.contains(&std::process::id().to_string()), "{error}");
        outbox.close().await.unwrap();
        open(&settings);
    }
}

fn forward(tenant_name: &str, n: u32) -> Forward {
    Forward {
        topic: Topic::try_new("dealscale.workflow.long").unwrap(),
        ordering_key: None,
        tenant: tenant(tenant_name),
        claims: format!("{n}").into_bytes(),
        properties: BTreeMap::from([("route".to_owned(), "default".to_owned())]),
        deliver_at: None,
    }
}

fn everything() -> Arc<dyn Fn(&Topic) -> bool + Send + Sync> {
    Arc::new(|_| true)
}

#[tokio::test]
async fn the_local_broker_gives_each_message_to_one_and_keeps_it_until_it_is_acknowledged() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        let outbox = open(&settings);
        let one = event("a", b"1");
        outbox.append(append(&one)).await.unwrap();
        let leased = lease(&outbox, 1).await;
        // Insert and confirm in one batch.
        outbox
            .settle(vec![Settle::Confirm { sequence: leased[0].sequence, forward: Some(forward("a", 0)) }])
            .await
            .unwrap();
        outbox.local().publish((1..10).map(|n| forward("a", n)).collect()).await.unwrap();
        let held = outbox.local().receive(everything(), 4).await.unwrap();
        let more = outbox.local().receive(everything(), 100).await.unwrap();
        assert_eq!((held.len(), more.len()), (4, 6));
        outbox.local().ack(held.iter().map(|h| h.id.clone()).collect()).await.unwrap();
        outbox.local().release(vec![more[0].id.clone()], Duration::from_millis(30)).await.unwrap();
        let again = outbox.local().receive(everything(), 100).await.unwrap();
        assert_eq!((again.len(), &again[0].id, again[0].redeliveries), (1, &more[0].id, 1));
        let backlog = outbox.local().backlog().await.unwrap();
        assert_eq!((backlog[0].waiting, backlog[0].unacknowledged, backlog[0].retained), (0, 6, 4));
        outbox.close().await.unwrap();
        let outbox = open(&settings);
        let rest = outbox.local().receive(everything(), 100).await.unwrap();
        assert_eq!(rest.len(), 6, "what was not acknowledged comes again");
        assert_eq!(rest[0].forward, forward("a", 4));
    }
}

#[tokio::test]
async fn local_messages_wait_for_their_time_their_key_and_their_topic() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::manual(Timestamp(1_000));
    let settings = settings(dir.path(), OutboxStore::Sled);
    let outbox = Outbox::open(&settings, &environment(), no_limits(), clock.clone()).unwrap();
    let mut late = forward("a", 1);
    late.deliver_at = Some(Timestamp(5_000));
    let key = |n| Forward { ordering_key: Some(OrderingKey::try_new("k").unwrap()), ..forward("a", n) };
    let dead = Forward { topic: Topic::try_new("dealscale.deadletter.workflow.long").unwrap(), ..forward("a", 9) };
    let topic = dead.topic.clone();
    outbox.local().publish(vec![late, key(2), key(3), dead]).await.unwrap();
    let work: Arc<dyn Fn(&Topic) -> bool + Send + Sync> = Arc::new(|t| !t.as_str().contains("deadletter"));
    let held = outbox.local().receive(work.clone(), 10).await.unwrap();
    assert_eq!(held.iter().map(|h| h.forward.claims[0]).collect::<Vec<_>>(), b"2");
    outbox.local().ack(vec![held[0].id.clone()]).await.unwrap();
    assert_eq!(outbox.local().receive(work.clone(), 10).await.unwrap()[0].forward.claims, b"3");
    clock.step(4_000);
    assert_eq!(outbox.local().receive(work, 10).await.unwrap()[0].forward.claims, b"1");
    assert_eq!(outbox.local().browse(&topic, 10).await.unwrap().len(), 1);
}

/// Damages the closed file at one place, opens, and counts what is left: nothing may be missing without a word.
#[tokio::test]
async fn a_damaged_store_is_set_aside_and_its_records_are_salvaged() {
    for kind in KINDS {
        // The head, which every open needs, and places all over the file.
        for place in [None, Some(1), Some(3), Some(6), Some(8)] {
            let dir = tempfile::tempdir().unwrap();
            let settings = settings(dir.path(), kind);
            let outbox = open(&settings);
            let events: Vec<_> = (0..300).map(|n| event("a", format!("{n:0>900}").as_bytes())).collect();
            let large = event("a", &vec![7; 100_000]);
            for chunk in events.chunks(10) {
                outbox.append_batch(chunk.iter().map(append).collect()).await;
            }
            outbox.append(append(&large)).await.unwrap();
            let highest = outbox.status().next_sequence;
            outbox.close().await.unwrap();
            let file = settings.dir.join(if kind == OutboxStore::Sled { "db" } else { "outbox.sqlite" });
            let mut raw = std::fs::read(&file).unwrap();
            let used = raw.iter().rposition(|b| *b != 0).unwrap();
            let (from, length) = place.map_or((0, 64), |tenths: usize| (used * tenths / 10, 16));
            raw[from..from + length].fill(0xa5);
            std::fs::write(&file, raw).unwrap();
            let at = format!("{kind:?} at {place:?}");
            let outbox = match Outbox::open(&settings, &environment(), no_limits(), Clock::System) {
                Ok(outbox) => outbox,
                Err(error) => panic!("{at}: {error}"),
            };
            let mut found = BTreeSet::new();
            while let Ok(Ok(leased)) = tokio::time::timeout(Duration::from_millis(200), outbox.lease(ALL)).await {
                found.extend(leased.into_iter().map(|l| l.event.key()));
            }
            // Lets the figures of what was poisoned while leasing arrive.
            let _ = outbox.find(&large.key()).await;
            let _ = outbox.find(&large.key()).await;
            let status = outbox.status();
            let missing = events.iter().chain([&large]).filter(|e| !found.contains(&e.key())).count();
            let loss = &status.data_loss_possible;
            assert!(
                missing == 0 || loss.is_some() || status.poisoned as usize >= missing,
                "{at}: {missing} lost without a word: {status:?}"
            );
            // One place of damage costs at most the pack, or the chunk, that it hit.
            assert!(missing <= 32, "{at}: {missing} of 301 are lost: {loss:?}");
            if loss.is_some() {
                let next = outbox.append(append(&event("a", b"new"))).await.unwrap().sequence.unwrap();
                assert!(next.0 >= highest.saturating_sub(32), "{at}: {next:?} is not above {highest}");
                outbox.acknowledge_data_loss().await.unwrap();
                outbox.close().await.unwrap();
                assert_eq!(open(&settings).status().data_loss_possible, None);
            }
        }
    }
}

fn main_file(settings: &config::Outbox) -> std::path::PathBuf {
    settings.dir.join(if settings.store == OutboxStore::Sled { "db" } else { "outbox.sqlite" })
}

fn damage_the_head(settings: &config::Outbox) {
    let file = main_file(settings);
    let mut raw = std::fs::read(&file).unwrap();
    raw[..64].fill(0xa5);
    std::fs::write(file, raw).unwrap();
}

/// Bodies that are larger than the window in which raw files are searched, in an outbox that is too small for what it once took.
#[tokio::test]
async fn a_salvage_takes_large_records_whole_and_knows_no_limits() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        let outbox = open(&settings);
        let mut events: Vec<_> = (0..3u8).map(|n| event("a", &vec![n + 1; 9 << 20])).collect();
        events.extend((0..40).map(|n| event("b", format!("{n}").as_bytes())));
        for event in &events {
            outbox.append(append(event)).await.unwrap();
        }
        outbox.close().await.unwrap();
        damage_the_head(&settings);
        let small = config::Outbox { bytes_max: Bytes::mib(1), count_max: 3, ..settings.clone() };
        let nothing: TenantLimits = Arc::new(|_| (1, Bytes(1)));
        let outbox = Outbox::open(&small, &environment(), nothing, Clock::System).unwrap();
        let status = outbox.status();
        assert!(status.data_loss_possible.is_some(), "{kind:?}");
        assert_eq!(status.records, 43, "{kind:?}: {:?}", status.data_loss_possible);
        let leased = lease(&outbox, 43).await;
        let mine = |name: &str| -> Vec<_> {
            leased.iter().filter(|l| l.event.envelope.tenant.as_str() == name).map(|l| l.event.clone()).collect()
        };
        // In the order in which they were accepted.
        assert_eq!((mine("a"), mine("b")), (events[..3].to_vec(), events[3..].to_vec()), "{kind:?}");
        // The limits hold again for what is new.
        assert!(matches!(outbox.append(append(&event("c", b"new"))).await, Err(Error::Full { .. })));
    }
}

#[tokio::test]
async fn a_salvage_that_was_killed_goes_on_at_the_next_start() {
    for kind in KINDS {
        // Killed before anything moved; after one file had moved; while the new store was being filled.
        for step in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let settings = settings(dir.path(), kind);
            let outbox = open(&settings);
            let events: Vec<_> = (0..50).map(|n| event("a", format!("{n}").as_bytes())).collect();
            outbox.append_batch(events.iter().map(append).collect()).await;
            outbox.close().await.unwrap();
            damage_the_head(&settings);
            let aside = dir.path().join("outbox.corrupt-1");
            let plan = serde_json::json!({ "aside": aside, "cause": "test", "next": 77, "moved": step == 2 });
            if step > 0 {
                std::fs::create_dir(&aside).unwrap();
            }
            if step == 1 {
                std::fs::rename(main_file(&settings), aside.join(main_file(&settings).file_name().unwrap())).unwrap();
            }
            if step == 2 {
                for entry in std::fs::read_dir(&settings.dir).unwrap().map(|e| e.unwrap()) {
                    if entry.file_name() != "lock" {
                        std::fs::rename(entry.path(), aside.join(entry.file_name())).unwrap();
                    }
                }
                let half = open(&settings);
                half.append_batch(events[..20].iter().map(append).collect()).await;
                half.close().await.unwrap();
            }
            std::fs::write(settings.dir.join("salvage"), plan.to_string()).unwrap();
            assert!(tools::verify(&settings).unwrap_err().to_string().contains("interrupted"));
            let outbox = open(&settings);
            let (status, at) = (outbox.status(), format!("{kind:?}, step {step}"));
            assert_eq!(status.records, 50, "{at}: {status:?}");
            assert!(status.data_loss_possible.is_some_and(|l| l.contains("50 records were salvaged")), "{at}");
            let first = lease(&outbox, 50).await[0].sequence;
            assert!(first.0 >= 77, "{at}: {first:?}");
            outbox.close().await.unwrap();
            assert!(!settings.dir.join("salvage").exists(), "{at}");
            assert_eq!(open(&settings).status().records, 50, "{at}: and it is done with");
        }
    }
}

#[tokio::test]
async fn a_damaged_folder_is_not_touched_without_the_key_of_its_records() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let plain = settings(dir.path(), kind);
        let keyed = config::Outbox { encryption_key: Some(config::Secret::new("1".repeat(64))), ..plain.clone() };
        let outbox = open(&keyed);
        outbox.append_batch((0..20).map(|n| append(&event("a", &[n]))).collect()).await;
        outbox.close().await.unwrap();
        damage_the_head(&keyed);
        let error = Outbox::open(&plain, &environment(), no_limits(), Clock::System).err().unwrap().to_string();
        assert!(error.contains("encryption_key"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was set aside");
        assert_eq!(open(&keyed).status().records, 20);
    }
}

/// Killed, or out of disk, while sled wrote what it keeps beside its log: no damage, and no alarm.
#[tokio::test]
async fn a_torn_snapshot_or_configuration_of_sled_is_no_damage() {
    for (name, content) in [
        ("snap.FFFFFFFFFFFFFF00.generating", &b""[..]),
        ("snap.FFFFFFFFFFFFFF00.generating", b"half of a snapshot"),
        ("snap.FFFFFFFFFFFFFF00", b""),
        ("snap.FFFFFFFFFFFFFF00", b"not a snapshot, and longer than twelve bytes"),
        ("conf", b"segment_size: 2097152\nuse_comp"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), OutboxStore::Sled);
        let outbox = open(&settings);
        outbox.append_batch((0..100).map(|n| append(&event("a", &[n; 900]))).collect()).await;
        outbox.close().await.unwrap();
        std::fs::write(settings.dir.join(name), content).unwrap();
        let outbox = open(&settings);
        assert_eq!((outbox.status().records, outbox.status().data_loss_possible), (100, None), "{name}");
        assert_eq!(lease(&outbox, 100).await.len(), 100);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{name}: nothing was set aside");
    }
}

/// sled cuts its log off where it is damaged, when it opens; looking must not cost what starting would have saved.
#[tokio::test]
async fn looking_at_a_damaged_folder_takes_nothing_from_the_salvage() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        let outbox = open(&settings);
        let events: Vec<_> = (0..300).map(|n| event("a", format!("{n:0>900}").as_bytes())).collect();
        for chunk in events.chunks(10) {
            outbox.append_batch(chunk.iter().map(append).collect()).await;
        }
        outbox.close().await.unwrap();
        let file = main_file(&settings);
        let mut raw = std::fs::read(&file).unwrap();
        let used = raw.iter().rposition(|b| *b != 0).unwrap();
        raw[used / 3..used / 3 + 16].fill(0xa5);
        std::fs::write(&file, raw).unwrap();
        for _ in 0..3 {
            let sound = tools::verify(&settings).is_ok_and(|report| report.is_sound());
            let alone = tools::open_alone(&settings, &environment(), false);
            if let Ok(outbox) = alone {
                outbox.close().await.unwrap();
            }
            assert!(!sound, "{kind:?}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{kind:?}: nothing was set aside");
        let outbox = open(&settings);
        let readable = outbox.status().records as usize - outbox.unreadable(true).await.unwrap().len();
        assert!(readable >= 300 - 32, "{kind:?}: {readable} of 300, {:?}", outbox.status().data_loss_possible);
    }
}

#[tokio::test]
async fn an_export_can_be_imported_elsewhere_and_damage_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let events: Vec<_> = (0..5).map(|n| event("a", &[n, 10, 13, 0])).collect();
    let target = dir.path().join("export");
    let mut export = tools::Export::create(&target).unwrap();
    for event in &events {
        export.write(event, None).unwrap();
    }
    assert_eq!(export.finish().unwrap(), 5);
    assert!(tools::Export::create(&target).is_err(), "a folder with something in it");
    let read: Vec<_> = tools::read_export(&target).unwrap().map(|e| e.unwrap().event).collect();
    assert_eq!(read, events);
    let one = std::fs::read_dir(&target).unwrap().map(|e| e.unwrap().path()).find(|p| p.extension().is_some()).unwrap();
    let mut raw = std::fs::read(&one).unwrap();
    *raw.last_mut().unwrap() ^= 1;
    std::fs::write(&one, raw).unwrap();
    assert_eq!(tools::read_export(&target).unwrap().filter(Result::is_err).count(), 1);
    assert!(tools::read_export(dir.path()).is_err());
}

#[tokio::test]
async fn verify_reads_every_record() {
    for kind in KINDS {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path(), kind);
        let outbox = open(&settings);
        outbox.append_batch((0..100).map(|n| append(&event("a", &[n; 500]))).collect()).await;
        assert!(matches!(tools::verify(&settings), Err(Error::Locked(_))));
        outbox.close().await.unwrap();
        let report = tools::verify(&settings).unwrap();
        assert!(report.is_sound() && report.records == 100, "{report:?}");
    }
}

// --- the simulator ---

/// What must be true, kept outside of the engine.
#[derive(Default)]
struct Model {
    /// Acknowledged and neither confirmed nor cancelled: must be there.
    waiting: BTreeMap<Key, Event>,
    /// Answered with "outcome unknown": may be there.
    maybe: BTreeMap<Key, Event>,
    /// Confirmed, but the answer was "outcome unknown".
    maybe_gone: BTreeSet<Key>,
    /// Confirmed or cancelled: must never come back.
    gone: BTreeSet<Key>,
    sequences: BTreeSet<u64>,
}

fn prepared(event: &Event) -> Prepared {
    Prepared {
        tenant: event.envelope.tenant.clone(),
        execution_id: event.envelope.execution_id,
        body_hash: event.envelope.body_hash,
        bytes: record::encode(event, None),
        key: None,
    }
}

struct Simulation {
    seed: u64,
    random: fastrand::Rng,
    disk: Disk,
    engine: Engine,
    model: Model,
    leased: Vec<Leased>,
    now: Timestamp,
}

impl Simulation {
    fn engine(disk: &Disk) -> Engine {
        let mut settings = settings(Path::new("/nowhere"), OutboxStore::Sled);
        settings.bytes_max = Bytes::mib(8);
        Engine::open(disk.open(), Arc::new(settings), None, no_limits()).unwrap()
    }

    fn new(seed: u64) -> Self {
        let disk = Disk::default();
        let engine = Self::engine(&disk);
        let random = fastrand::Rng::with_seed(seed);
        Self { seed, random, disk, engine, model: Model::default(), leased: Vec::new(), now: Timestamp(1_000) }
    }

    /// Commits as the owner does; after a failure the engine is built anew.
    fn commit(&mut self) -> bool {
        if self.random.u8(..) < 10 {
            self.disk.fail_next(if self.random.bool() { Fault::Lost } else { Fault::Written });
        }
        if self.engine.commit().is_ok() {
            return true;
        }
        self.reopen();
        false
    }

    fn reopen(&mut self) {
        let (next, next_message) = (self.engine.next, self.engine.next_message);
        self.engine = Self::engine(&self.disk);
        self.engine.skip_to(next, next_message);
        self.leased.clear();
    }

    fn step(&mut self) {
        // The wall clock jumps, in both directions.
        self.now = Timestamp(self.now.0 + self.random.i64(-5_000..10_000));
        match self.random.u8(..100) {
            0..40 => {
                let events: Vec<_> = (0..self.random.usize(1..12))
                    .map(|_| {
                        let size = if self.random.u8(..) < 20 { 9_000 } else { self.random.usize(1..400) };
                        let mut event = event(["a", "b", "c"][self.random.usize(..3)], &vec![self.random.u8(..); size]);
                        if self.random.u8(..) < 64 {
                            let key = ["k", "l"][self.random.usize(..2)];
                            event.envelope.ordering_key = Some(OrderingKey::try_new(key).unwrap());
                        }
                        event
                    })
                    .collect();
                let items = events.iter().map(prepared).collect();
                let results = self.engine.append(items, self.now, Bytes(u64::MAX));
                let durable = self.commit();
                for (event, result) in events.into_iter().zip(results) {
                    let Ok(taken) = result else { continue };
                    assert!(
                        self.model.sequences.insert(taken.sequence.unwrap()),
                        "seed {}: a sequence was used twice",
                        self.seed
                    );
                    let list = if durable { &mut self.model.waiting } else { &mut self.model.maybe };
                    list.insert(event.key(), event);
                }
            }
            40..60 => {
                let count = self.random.usize(1..20);
                let leased = self.engine.lease(LeaseLimit { count, bytes: Bytes::mib(1) }, Instant::now()).unwrap();
                for one in leased {
                    let twice = self.leased.iter().any(|l| l.sequence == one.sequence);
                    assert!(!twice, "seed {}: {:?} was leased twice", self.seed, one.sequence);
                    let envelope = &one.event.envelope;
                    if envelope.ordering_key.is_some() {
                        let busy = self.leased.iter().any(|l| {
                            l.event.envelope.ordering_key == envelope.ordering_key
                                && l.event.envelope.tenant == envelope.tenant
                        });
                        assert!(!busy, "seed {}: two of one ordering key are out", self.seed);
                    }
                    self.leased.push(one);
                }
                self.commit();
            }
            60..90 => {
                self.random.shuffle(&mut self.leased);
                let count = self.random.usize(0..=self.leased.len());
                let settled: Vec<_> = self.leased.drain(..count).collect();
                let settles = settled
                    .iter()
                    .map(|l| match l.sequence.0 % 7 {
                        0 => Settle::Release { sequence: l.sequence },
                        1 => Settle::Poison { sequence: l.sequence, reason: "test".into() },
                        _ => Settle::Confirm { sequence: l.sequence, forward: Some(forward("a", 0)) },
                    })
                    .collect();
                self.engine.settle(settles, self.now).unwrap();
                let durable = self.commit();
                for one in settled.into_iter().filter(|l| l.sequence.0 % 7 > 1) {
                    let key = one.event.key();
                    let waiting = self.model.waiting.remove(&key).or_else(|| self.model.maybe.remove(&key));
                    match (durable, waiting) {
                        (true, _) => drop(self.model.gone.insert(key)),
                        (false, Some(event)) => {
                            self.model.maybe_gone.insert(key.clone());
                            self.model.maybe.insert(key, event);
                        }
                        (false, None) => {}
                    }
                }
            }
            90..94 => {
                let key = self.model.waiting.keys().nth(self.random.usize(..8)).cloned();
                if let Some(key) = key
                    && self.engine.cancel(&key, self.now).unwrap() == Cancelled::Done
                {
                    let event = self.model.waiting.remove(&key).unwrap();
                    if self.commit() {
                        self.model.gone.insert(key);
                    } else {
                        self.model.maybe.insert(key, event);
                    }
                }
            }
            // An operator puts a poisoned record back, or lets it go.
            94..96 => {
                let discard = self.random.bool();
                let poisoned = self.engine.list(None, true, None, usize::MAX, true).unwrap();
                if let Some(found) = self.random.choice(poisoned) {
                    assert!(self.engine.repair(found.sequence.0, discard).unwrap());
                    let (durable, key) = (self.commit(), found.event.key());
                    match (discard, durable) {
                        (true, true) => {
                            self.model.waiting.remove(&key);
                            self.model.maybe.remove(&key);
                            self.model.gone.insert(key);
                        }
                        (true, false) => {
                            self.model.waiting.remove(&key);
                            self.model.maybe.insert(key, found.event);
                        }
                        (false, _) => {}
                    }
                }
            }
            96..98 => {
                // A crash: what was not committed is gone.
                self.engine.writes.clear();
                self.reopen();
            }
            _ => {
                self.engine.reclaim(Instant::now() + Duration::from_secs(1_000));
                self.leased.clear();
            }
        }
        self.check();
    }

    fn check(&mut self) {
        let seed = self.seed;
        let (good, bad) = self.engine.check_all().unwrap();
        assert!(bad.is_empty(), "seed {seed}: {bad:?}");
        let mut there = BTreeSet::new();
        let poisoned = self.engine.list(None, true, None, usize::MAX, true).unwrap();
        let waiting = self.engine.list(None, false, None, usize::MAX, true).unwrap();
        let mut cancelled = 0;
        for found in waiting.into_iter().chain(poisoned.iter().cloned()) {
            let key = found.event.key();
            // What is left of a cancelled event says that it is cancelled, and may stay until the relay has it.
            if matches!(found.event.envelope.content, Content::Done { .. }) {
                assert!(!self.model.waiting.contains_key(&key), "seed {seed}: {key} was cancelled by itself");
                cancelled += 1;
                continue;
            }
            assert!(!self.model.gone.contains(&key), "seed {seed}: {key} came back");
            let expected = self.model.waiting.get(&key).or_else(|| self.model.maybe.get(&key));
            assert_eq!(Some(&found.event), expected, "seed {seed}: {key} changed");
            there.insert(key);
        }
        for key in self.model.waiting.keys() {
            assert!(there.contains(key), "seed {seed}: {key} is lost");
        }
        assert_eq!(good as usize, there.len() + cancelled, "seed {seed}");
        let status = self.engine.snapshot();
        assert_eq!(
            status.records as usize,
            there.len() + cancelled - poisoned.len(),
            "seed {seed}: the count is wrong"
        );
        assert_eq!(self.engine.open_sequences().count(), there.len() + cancelled, "seed {seed}");
        // What the witness is told holds after any crash.
        if self.random.u8(..) < 16 {
            let stored = Self::engine(&self.disk);
            assert!(stored.next >= self.engine.durable_next, "seed {seed}: the store is behind the witness");
        }
    }
}

/// Replay one with `DEALSCALE_SEED=n`; more with `DEALSCALE_SEEDS=n`.
#[test]
fn any_interleaving_of_append_confirm_cancel_failure_and_crash_loses_and_revives_nothing() {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse::<u64>().ok());
    let seeds = match number("DEALSCALE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("DEALSCALE_SEEDS").unwrap_or(256),
    };
    for seed in seeds {
        let mut simulation = Simulation::new(seed);
        for _ in 0..60 {
            simulation.step();
        }
        // In the end everything that waits can be relayed.
        simulation.disk.heal();
        simulation.reopen();
        let mut settled = 0;
        for found in simulation.engine.list(None, true, None, usize::MAX, true).unwrap() {
            assert!(simulation.engine.repair(found.sequence.0, false).unwrap());
        }
        loop {
            let leased = simulation.engine.lease(ALL, Instant::now()).unwrap();
            if leased.is_empty() {
                break;
            }
            settled += leased.len();
            simulation.engine.settle(leased.iter().map(|l| confirm(l.sequence)).collect(), Timestamp(1)).unwrap();
            simulation.engine.commit().unwrap();
        }
        assert!(settled >= simulation.model.waiting.len(), "seed {seed}");
        assert_eq!(simulation.engine.snapshot().records, 0, "seed {seed}");
        assert_eq!(simulation.engine.snapshot().bytes, 0, "seed {seed}");
    }
}
