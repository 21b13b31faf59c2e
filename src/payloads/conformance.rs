//! What every payload store has to do, whichever database is behind it. `tests.rs` runs it on SQLite,
//! `tests/real/postgres/payloads.rs` on PostgreSQL. The clock is one that the tests move.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;

use super::dealscale::clock::{Clock, Timestamp};
use super::dealscale::config::routes::Pattern;
use super::dealscale::event::{Content, Envelope, Event, State};
use super::dealscale::ids::{BodyHash, ExecutionId, Key, Tenant, Topic, Workflow};
use super::dealscale::payloads::{
    Admitted, Attempt, Change, ClaimRequest, Claimed, Collected, Error, Filter, Store, Take, Transition,
};
use super::dealscale::units::Span;

/// Ages that the worlds are set up with.
pub const PAYLOAD_AGE: Span = Span::days(3);
pub const LEDGER_AGE: Span = Span::days(30);

pub const START: Timestamp = Timestamp(1_795_478_400_000);

/// A store of its own, and the clock it goes by.
pub struct World {
    pub store: Store,
    pub clock: Clock,
    /// Whatever has to live as long as the store.
    pub keep: Box<dyn std::any::Any + Send + Sync>,
}

/// One test per case, on the worlds that `$open` makes.
macro_rules! conformance_tests {
    ($open:path: $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let world = $open(stringify!($case)).await;
                conformance::$case(&world).await;
                world.store.close().await;
                drop(world.keep);
            }
        )*
    };
    ($open:path) => {
        conformance_tests! { $open:
            invariant_1_an_event_is_admitted_once
            invariant_1_a_batch_meets_itself
            invariant_1_two_tenants_with_one_id_do_not_meet
            invariant_2_of_many_claimers_one_wins
            invariant_2_a_claim_that_ran_out_goes_to_the_next
            invariant_2_claims_answer_why_not
            invariant_3_an_old_token_changes_nothing
            invariant_3_a_repeated_step_is_known
            invariant_4_concurrent_writers_all_get_their_own_answers
            invariant_5_payloads_go_by_age_after_completion
            invariant_5_dead_letters_keep_their_payloads
            invariant_6_pages_hold_under_inserts
            a_delivery_leaves_its_history
            a_crashed_attempt_stays_visible
            a_release_undoes_a_begin
            a_call_already_made_is_a_final_row
            a_retry_is_due_once
            a_delayed_event_waits_for_its_time
            what_the_broker_lost_is_stale
            an_event_is_cancelled_only_while_it_waits
            a_dead_letter_is_replayed_or_discarded
            an_external_consumer_ends_an_event
            filters_select_and_hide
            rejected_messages_are_kept_once
            bodies_come_back_whole
            strange_text_and_times_come_back
            status_counts_by_state
        }
    };
}

pub fn tenant(name: &str) -> Tenant {
    Tenant::try_new(name).unwrap()
}

pub fn event(clock: &Clock, owner: &str, body: &[u8]) -> Event {
    let envelope = Envelope {
        tenant: tenant(owner),
        execution_id: ExecutionId::new(),
        workflow: Some(Workflow::try_new("orders").unwrap()),
        topic: Topic::try_new("dealscale.workflow.long").unwrap(),
        route: "default".into(),
        accepted_at: clock.now(),
        deliver_at: None,
        ordering_key: None,
        priority: Envelope::PRIORITY,
        metadata: BTreeMap::from([("customer".to_owned(), "Zoë & Söhne".to_owned())]),
        traceparent: None,
        source_execution: None,
        source_workflow: None,
        body_hash: BodyHash::of(body),
        content: Content::Json,
    };
    Event { envelope, body: Bytes::copy_from_slice(body) }
}

pub fn attempt(clock: &Clock) -> Attempt {
    Attempt {
        number: 0,
        started_at: clock.now(),
        duration_ms: None,
        status: None,
        error_class: None,
        error: None,
        n8n_execution_id: None,
        message_id: Some("1:2:3".into()),
        traceparent: Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into()),
    }
}

pub fn request(event: &Event) -> ClaimRequest {
    ClaimRequest { key: event.key(), body_hash: event.envelope.body_hash }
}

impl World {
    pub fn now(&self) -> Timestamp {
        self.clock.now()
    }
    fn later(&self, seconds: u64) -> Timestamp {
        self.now().plus(Duration::from_secs(seconds))
    }
    pub async fn admitted(&self, owner: &str, body: &[u8]) -> Event {
        let event = event(&self.clock, owner, body);
        assert_eq!(self.store.admit(vec![event.clone()]).await.unwrap(), [Admitted::New]);
        event
    }
    async fn claim(&self, owner: &str, event: &Event) -> Claimed {
        self.store.claim(owner, vec![request(event)], self.later(60)).await.unwrap().remove(0)
    }
    async fn granted(&self, owner: &str, event: &Event) -> i64 {
        match self.claim(owner, event).await {
            Claimed::Granted { token, .. } => token,
            other => panic!("not granted: {other:?}"),
        }
    }
    async fn apply(&self, event: &Event, token: i64, change: Change) -> bool {
        self.store.apply(vec![Transition { key: event.key(), token, change }]).await.unwrap().remove(0)
    }
    pub async fn finished(&self, event: &Event, state: State) {
        let token = self.granted("a", event).await;
        assert!(self.apply(event, token, Change::Begin(attempt(&self.clock))).await);
        assert!(self.apply(event, token, finish(state, None)).await);
    }
    async fn state(&self, event: &Event) -> State {
        self.store.get(&event.key(), false).await.unwrap().unwrap().state
    }
    async fn loads(&self, event: &Event) -> bool {
        self.store.load(vec![event.key()]).await.unwrap()[0].is_some()
    }
    fn step(&self, span: Span) {
        self.clock.step(span.as_millis());
    }
}

pub fn finish(state: State, attempt: Option<Attempt>) -> Change {
    let (error_class, error) = match state {
        State::Dead => (Some("http_4xx".to_owned()), Some("410 Gone".to_owned())),
        _ => (None, None),
    };
    Change::Finish { attempt, state, error_class, error, n8n_execution_id: None }
}

fn retry(next_at: Timestamp) -> Change {
    Change::Retry {
        attempt: None,
        next_at,
        crashed: false,
        error_class: Some("timeout".into()),
        error: Some("30s".into()),
    }
}

/// All at once, on tasks of their own.
async fn together<T: Send + 'static>(
    tasks: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let mut set = tokio::task::JoinSet::new();
    tasks.into_iter().for_each(|task| drop(set.spawn(task)));
    set.join_all().await
}

pub async fn invariant_1_an_event_is_admitted_once(w: &World) {
    let first = w.admitted("acme", b"{\"n\":1}").await;
    assert_eq!(w.store.admit(vec![first.clone()]).await.unwrap(), [Admitted::Same { state: State::Relayed }]);
    let mut other = event(&w.clock, "acme", b"{\"n\":2}");
    other.envelope.execution_id = first.envelope.execution_id;
    assert_eq!(w.store.admit(vec![other.clone()]).await.unwrap(), [Admitted::Conflict]);
    assert_eq!(w.store.load(vec![first.key()]).await.unwrap(), [Some(first.clone())]);
    let row = w.store.get(&first.key(), true).await.unwrap().unwrap();
    assert_eq!((row.envelope, row.state, row.attempts), (first.envelope.clone(), State::Relayed, 0));
    assert_eq!((row.relayed_at, row.body_bytes, row.claim), (w.now(), 7, None));
    w.finished(&first, State::Delivered).await;
    assert_eq!(
        w.store.admit(vec![first, other]).await.unwrap(),
        [Admitted::Same { state: State::Delivered }, Admitted::Conflict]
    );
    assert_eq!(w.store.load(vec![event(&w.clock, "acme", b"").key()]).await.unwrap(), [None]);
}

pub async fn invariant_1_a_batch_meets_itself(w: &World) {
    let (one, two) = (event(&w.clock, "acme", b"1"), event(&w.clock, "acme", b"2"));
    let mut other = event(&w.clock, "acme", b"3");
    other.envelope.execution_id = one.envelope.execution_id;
    let batch = vec![one.clone(), two.clone(), one.clone(), other];
    assert_eq!(
        w.store.admit(batch).await.unwrap(),
        [Admitted::New, Admitted::New, Admitted::Same { state: State::Relayed }, Admitted::Conflict]
    );
    assert_eq!(w.store.load(vec![two.key(), one.key()]).await.unwrap(), [Some(two), Some(one)]);
    // Two relays with the same events, in opposite orders.
    for _ in 0..10 {
        let events: Vec<_> = (0..50u8).map(|n| event(&w.clock, "acme", &[n])).collect();
        let reversed: Vec<_> = events.iter().rev().cloned().collect();
        let answers = together([events, reversed].map(|events| {
            let store = w.store.clone();
            async move { store.admit(events).await.unwrap() }
        }))
        .await;
        let new = answers.iter().flatten().filter(|a| **a == Admitted::New).count();
        assert_eq!((new, answers.concat().len()), (50, 100));
        assert!(!answers.concat().contains(&Admitted::Conflict));
    }
}

pub async fn invariant_1_two_tenants_with_one_id_do_not_meet(w: &World) {
    let ours = w.admitted("acme", b"ours").await;
    let mut theirs = event(&w.clock, "other", b"theirs");
    theirs.envelope.execution_id = ours.envelope.execution_id;
    assert_eq!(w.store.admit(vec![theirs.clone()]).await.unwrap(), [Admitted::New]);
    w.finished(&ours, State::Dead).await;
    assert_eq!(w.state(&theirs).await, State::Relayed);
    assert_eq!(w.store.load(vec![ours.key(), theirs.key()]).await.unwrap(), [Some(ours), Some(theirs.clone())]);
    let stranger = Key { tenant: tenant("nobody"), ..theirs.key() };
    assert!(w.store.get(&stranger, true).await.unwrap().is_none());
    assert_eq!(w.store.cancel(&stranger).await.unwrap(), None);
    assert_eq!(w.store.discard(&stranger).await.unwrap(), None);
}

pub async fn invariant_2_of_many_claimers_one_wins(w: &World) {
    let mut events = Vec::new();
    for n in 0..20u8 {
        events.push(w.admitted("acme", &[n]).await);
    }
    let until = w.later(60);
    let answers = together((0..16).map(|owner| {
        let (store, mut events, clock) = (w.store.clone(), events.clone(), w.clock.clone());
        events.rotate_left(owner);
        async move {
            let takes =
                events.iter().map(|e| Take { request: request(e), begin: Some(attempt(&clock)) }).collect::<Vec<_>>();
            let taken = store.claim_and_begin(&format!("owner-{owner}"), takes, until).await.unwrap();
            events.iter().zip(taken).map(|(e, t)| (e.key(), t)).collect::<Vec<_>>()
        }
    }))
    .await;
    let mut winners: BTreeMap<Key, usize> = BTreeMap::new();
    for (key, taken) in answers.into_iter().flatten() {
        match taken.claimed {
            Claimed::Granted { row, .. } => {
                assert!(taken.begun && taken.body.is_some() && row.attempts == 1 && row.state == State::Delivering);
                *winners.entry(key).or_default() += 1;
            }
            Claimed::Held(at) => assert_eq!(at, until),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(winners.len(), 20);
    assert!(winners.values().all(|n| *n == 1), "{winners:?}");
}

pub async fn invariant_2_a_claim_that_ran_out_goes_to_the_next(w: &World) {
    let event = w.admitted("acme", b"x").await;
    let first = w.granted("a", &event).await;
    // Not even its owner gets it twice.
    assert!(matches!(w.claim("a", &event).await, Claimed::Held(until) if until == w.later(60)));
    w.step(Span::secs(59));
    assert!(w.apply(&event, first, Change::Renew { until: w.later(60) }).await);
    w.step(Span::secs(59));
    assert!(matches!(w.claim("b", &event).await, Claimed::Held(_)));
    w.step(Span::secs(2));
    let second = w.granted("b", &event).await;
    assert!(second > first);
    let claim = w.store.get(&event.key(), false).await.unwrap().unwrap().claim.unwrap();
    assert_eq!((claim.owner.as_str(), claim.token, claim.until), ("b", second, w.later(60)));
}

pub async fn invariant_2_claims_answer_why_not(w: &World) {
    let (open, done) = (w.admitted("acme", b"open").await, w.admitted("acme", b"done").await);
    w.finished(&done, State::Succeeded).await;
    let mut wrong = request(&open);
    wrong.body_hash = BodyHash::of(b"forged");
    let unknown = request(&event(&w.clock, "acme", b"unknown"));
    let twice = vec![wrong, unknown, request(&done), request(&open), request(&open)];
    let answers = w.store.claim("a", twice, w.later(60)).await.unwrap();
    assert!(matches!(answers[0], Claimed::Mismatch));
    assert!(matches!(answers[1], Claimed::Unknown));
    assert!(matches!(answers[2], Claimed::Final(State::Succeeded)));
    let granted = answers[3..].iter().filter(|a| matches!(a, Claimed::Granted { .. })).count();
    let held = answers[3..].iter().filter(|a| matches!(a, Claimed::Held(_))).count();
    assert_eq!((granted, held), (1, 1));
}

pub async fn invariant_3_an_old_token_changes_nothing(w: &World) {
    let event = w.admitted("acme", b"x").await;
    let old = w.granted("a", &event).await;
    w.step(Span::secs(61));
    let new = w.granted("b", &event).await;
    let until = w.later(60);
    let before = w.store.get(&event.key(), true).await.unwrap().unwrap();
    for change in [
        Change::Begin(attempt(&w.clock)),
        Change::Follow { attempt: attempt(&w.clock), until },
        finish(State::Dead, Some(attempt(&w.clock))),
        retry(until),
        Change::Release,
        Change::Renew { until: w.later(600) },
    ] {
        assert!(!w.apply(&event, old, change.clone()).await, "{change:?}");
        assert!(!w.apply(&event, new + 1, change.clone()).await, "{change:?}");
    }
    let after = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!(serde_json::to_string(&before).unwrap(), serde_json::to_string(&after).unwrap());
    assert!(w.apply(&event, new, finish(State::Delivered, None)).await);
    assert!(!w.apply(&event, new, finish(State::Dead, None)).await);
    assert!(!w.apply(&event, new, Change::Begin(attempt(&w.clock))).await);
    assert!(matches!(w.claim("c", &event).await, Claimed::Final(State::Delivered)));
    // Of two steps under one token in one batch the second sees the first.
    let event = w.admitted("acme", b"y").await;
    let token = w.granted("a", &event).await;
    let steps = [finish(State::Delivered, None), finish(State::Dead, None), Change::Renew { until }]
        .map(|change| Transition { key: event.key(), token, change });
    assert_eq!(w.store.apply(steps.into()).await.unwrap(), [true, false, false]);
    assert!(matches!(
        w.store.apply(vec![Transition { key: event.key(), token, change: finish(State::Relayed, None) }]).await,
        Err(Error::Refused(_))
    ));
}

pub async fn invariant_3_a_repeated_step_is_known(w: &World) {
    let event = w.admitted("acme", b"x").await;
    let token = w.granted("a", &event).await;
    let begin = Change::Begin(attempt(&w.clock));
    assert!(w.apply(&event, token, begin.clone()).await);
    assert!(w.apply(&event, token, begin).await);
    assert_eq!(w.store.get(&event.key(), true).await.unwrap().unwrap().attempts, 1);
    let again = retry(w.later(5));
    assert!(w.apply(&event, token, again.clone()).await);
    assert!(w.apply(&event, token, again).await);
    w.step(Span::secs(5));
    let token = w.granted("a", &event).await;
    let end = finish(State::Delivered, Some(attempt(&w.clock)));
    assert!(w.apply(&event, token, end.clone()).await);
    assert!(w.apply(&event, token, end).await);
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.history.len()), (State::Delivered, 2));
}

pub async fn invariant_4_concurrent_writers_all_get_their_own_answers(w: &World) {
    let counts = together((0..24u8).map(|n| {
        let (store, clock, until) = (w.store.clone(), w.clock.clone(), w.later(60));
        async move {
            let mut good = 0;
            for m in 0..8u8 {
                let event = event(&clock, "acme", &[n, m]);
                assert_eq!(store.admit(vec![event.clone()]).await.unwrap(), [Admitted::New]);
                let take = Take { request: request(&event), begin: Some(attempt(&clock)) };
                let taken = store.claim_and_begin("a", vec![take], until).await.unwrap().remove(0);
                let Claimed::Granted { row, token } = taken.claimed else { panic!("not granted") };
                assert_eq!(
                    (row.envelope.execution_id, taken.body),
                    (event.envelope.execution_id, Some(event.body.clone()))
                );
                // Every other one with a token of nobody.
                let token = if m % 2 == 0 { token } else { token + 1 };
                let ended = Transition { key: event.key(), token, change: finish(State::Delivered, None) };
                assert_eq!(store.apply(vec![ended]).await.unwrap(), [m % 2 == 0]);
                good += usize::from(store.get(&event.key(), false).await.unwrap().unwrap().state == State::Delivered);
            }
            good
        }
    }))
    .await;
    assert_eq!(counts, [4; 24]);
    let delivered = Filter { states: vec![State::Delivered], ..Filter::default() };
    assert_eq!(w.store.count(delivered).await.unwrap(), 96);
}

pub async fn invariant_5_payloads_go_by_age_after_completion(w: &World) {
    let (open, done) = (w.admitted("acme", b"open").await, w.admitted("acme", b"done").await);
    w.step(LEDGER_AGE);
    w.step(LEDGER_AGE);
    // However old it is, age counts from completion.
    w.finished(&done, State::Delivered).await;
    w.step(Span(Duration::from(PAYLOAD_AGE) - Duration::from_millis(1)));
    assert_eq!(w.store.collect(100).await.unwrap(), Collected::default());
    w.step(Span::millis(1));
    assert_eq!(w.store.collect(100).await.unwrap(), Collected { payloads: 1, rows: 0 });
    assert!(!w.loads(&done).await && w.loads(&open).await);
    assert_eq!(w.state(&done).await, State::Delivered);
    // Known still: it is not taken for a new event.
    assert_eq!(w.store.admit(vec![done.clone()]).await.unwrap(), [Admitted::Same { state: State::Delivered }]);
    w.step(LEDGER_AGE);
    assert_eq!(w.store.collect(100).await.unwrap(), Collected { payloads: 0, rows: 1 });
    assert!(w.store.get(&done.key(), true).await.unwrap().is_none());
    assert_eq!(w.state(&open).await, State::Relayed);
    assert!(w.loads(&open).await);
    // In bounded bites.
    let mut many = Vec::new();
    for n in 0..5u8 {
        many.push(w.admitted("acme", &[n]).await);
        w.finished(&many[many.len() - 1], State::Succeeded).await;
    }
    w.step(PAYLOAD_AGE);
    for left in [2, 2, 1, 0] {
        assert_eq!(w.store.collect(2).await.unwrap().payloads, left);
    }
}

pub async fn invariant_5_dead_letters_keep_their_payloads(w: &World) {
    let dead = w.admitted("acme", b"dead").await;
    w.finished(&dead, State::Dead).await;
    w.step(LEDGER_AGE);
    w.step(LEDGER_AGE);
    assert_eq!(w.store.collect(100).await.unwrap(), Collected::default());
    assert!(w.loads(&dead).await);
    assert_eq!(w.store.discard(&dead.key()).await.unwrap(), Some(true));
    assert_eq!(w.store.collect(100).await.unwrap(), Collected::default());
    w.step(PAYLOAD_AGE);
    assert_eq!(w.store.collect(100).await.unwrap().payloads, 1);
}

pub async fn invariant_6_pages_hold_under_inserts(w: &World) {
    let mut expected = Vec::new();
    for n in 0..23u8 {
        expected.push(w.admitted("acme", &[n]).await.envelope.execution_id);
        // Several share a millisecond.
        w.step(Span::millis(u64::from(n % 3 == 0)));
    }
    let (mut seen, mut cursor, mut pages) = (Vec::new(), None, 0);
    loop {
        let filter = Filter { limit: 5, cursor: cursor.take(), ..Filter::default() };
        let page = w.store.list(filter).await.unwrap();
        let times: Vec<_> = page.rows.iter().map(|r| r.envelope.accepted_at).collect();
        assert!(times.is_sorted_by(|a, b| a >= b));
        seen.extend(page.rows.iter().map(|r| r.envelope.execution_id));
        pages += 1;
        // Newer ones come in at the front, in a millisecond that is listed already, too.
        w.admitted("acme", &[200, pages]).await;
        match page.next {
            Some(next) => cursor = Some(next),
            None => break,
        }
    }
    assert_eq!(seen.len(), 23, "no row twice, none of the inserted");
    assert_eq!(seen.iter().collect::<BTreeSet<_>>(), expected.iter().collect());
    assert_eq!(pages, 5);
    let bad = Filter { cursor: Some("nonsense".into()), limit: 5, ..Filter::default() };
    assert!(matches!(w.store.list(bad).await, Err(Error::Refused(_))));
}

pub async fn a_delivery_leaves_its_history(w: &World) {
    let event = w.admitted("acme", b"x").await;
    let token = w.granted("a", &event).await;
    assert_eq!(w.state(&event).await, State::Relayed);
    assert!(w.apply(&event, token, Change::Begin(attempt(&w.clock))).await);
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts, row.history.len()), (State::Delivering, 1, 1));
    assert_eq!((row.history[0].number, row.history[0].duration_ms), (1, None));
    assert_eq!(row.message_id.as_deref(), Some("1:2:3"));
    let failed = Attempt {
        number: 1,
        duration_ms: Some(30_000),
        error_class: Some("timeout".into()),
        error: Some("no answer within 30s".into()),
        ..attempt(&w.clock)
    };
    w.step(Span::secs(30));
    let change = Change::Retry {
        attempt: Some(failed.clone()),
        next_at: w.later(10),
        crashed: true,
        error_class: Some("timeout".into()),
        error: Some("no answer".into()),
    };
    assert!(w.apply(&event, token, change).await);
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts, row.crashes, row.claim), (State::Relayed, 1, 1, None));
    assert_eq!(
        (row.next_at, row.error.as_deref(), row.error_class.as_deref()),
        (Some(w.later(10)), Some("no answer"), Some("timeout"))
    );
    assert!(matches!(w.claim("b", &event).await, Claimed::NotDue(at) if at == w.later(10)));
    w.step(Span::secs(10));
    let token = w.granted("b", &event).await;
    let second = Attempt { started_at: w.now(), ..attempt(&w.clock) };
    assert!(w.apply(&event, token, Change::Begin(second.clone())).await);
    let followed = Attempt { number: 2, status: Some(200), n8n_execution_id: Some("77".into()), ..second };
    assert!(w.apply(&event, token, Change::Follow { attempt: followed.clone(), until: w.later(60) }).await);
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.n8n_execution_id.as_deref()), (State::Delivering, Some("77")));
    assert_eq!(row.history, [failed.clone(), followed.clone()]);
    w.step(Span::secs(30));
    assert!(w.apply(&event, token, finish(State::Succeeded, None)).await);
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.finished_at, row.error, row.error_class), (State::Succeeded, Some(w.now()), None, None));
    assert_eq!((row.history, row.claim), (vec![failed, followed], None));
    assert_eq!(row.n8n_execution_id.as_deref(), Some("77"));
}

pub async fn a_crashed_attempt_stays_visible(w: &World) {
    let event = w.admitted("acme", b"x").await;
    let token = w.granted("a", &event).await;
    assert!(w.apply(&event, token, Change::Begin(attempt(&w.clock))).await);
    w.step(Span::secs(61));
    let take = Take { request: request(&event), begin: Some(attempt(&w.clock)) };
    let taken = w.store.claim_and_begin("b", vec![take], w.later(60)).await.unwrap().remove(0);
    let Claimed::Granted { row, token } = taken.claimed else { panic!("not granted") };
    // Somebody else may have called already: look before calling again.
    assert!(!taken.begun);
    assert_eq!((row.state, row.attempts, row.history.len()), (State::Delivering, 1, 1));
    assert_eq!(row.history[0].traceparent, attempt(&w.clock).traceparent);
    assert!(w.apply(&event, token, Change::Begin(attempt(&w.clock))).await);
    let ended = Attempt { status: Some(200), duration_ms: Some(5), ..attempt(&w.clock) };
    assert!(w.apply(&event, token, finish(State::Delivered, Some(ended))).await);
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    let shown: Vec<_> = row.history.iter().map(|a| (a.number, a.status)).collect();
    assert_eq!(shown, [(1, None), (2, Some(200))]);
}

pub async fn a_release_undoes_a_begin(w: &World) {
    let event = w.admitted("acme", b"x").await;
    let take = Take { request: request(&event), begin: Some(attempt(&w.clock)) };
    let taken = w.store.claim_and_begin("a", vec![take], w.later(60)).await.unwrap().remove(0);
    let Claimed::Granted { token, .. } = taken.claimed else { panic!("not granted") };
    assert!(w.apply(&event, token, Change::Release).await);
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts, row.claim, row.history.len()), (State::Relayed, 0, None, 0));
    let token = w.granted("b", &event).await;
    assert!(w.apply(&event, token, Change::Release).await);
    assert_eq!(w.state(&event).await, State::Relayed);
    // What an earlier owner began is not undone.
    let token = w.granted("a", &event).await;
    assert!(w.apply(&event, token, Change::Begin(attempt(&w.clock))).await);
    w.step(Span::secs(61));
    let token = w.granted("b", &event).await;
    assert!(w.apply(&event, token, Change::Release).await);
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts, row.history.len()), (State::Delivering, 1, 1));
}

pub async fn a_call_already_made_is_a_final_row(w: &World) {
    let mut called = event(&w.clock, "acme", b"x");
    called.envelope.content = Content::Done {
        state: State::Failed,
        status: Some(500),
        started_at: w.now(),
        duration_ms: 12,
        error: Some("Error in workflow".into()),
        n8n_execution_id: Some("9".into()),
    };
    assert_eq!(w.store.admit(vec![called.clone()]).await.unwrap(), [Admitted::New]);
    let row = w.store.get(&called.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts, row.history.len()), (State::Failed, 1, 1));
    assert_eq!((row.error_class.as_deref(), row.error.as_deref()), (Some("http_5xx"), Some("Error in workflow")));
    assert_eq!((row.history[0].status, row.history[0].duration_ms, row.history[0].number), (Some(500), Some(12), 1));
    assert!(matches!(w.claim("a", &called).await, Claimed::Final(State::Failed)));
    assert!(w.store.stale(w.later(1000), 10).await.unwrap().is_empty());
    w.step(PAYLOAD_AGE);
    assert_eq!(w.store.collect(10).await.unwrap().payloads, 1);
}

pub async fn a_retry_is_due_once(w: &World) {
    let event = w.admitted("acme", b"x").await;
    assert!(w.store.due(10).await.unwrap().is_empty(), "the relay publishes it");
    let token = w.granted("a", &event).await;
    assert!(w.apply(&event, token, Change::Begin(attempt(&w.clock))).await);
    assert!(w.apply(&event, token, retry(w.later(10))).await);
    assert!(w.store.due(10).await.unwrap().is_empty());
    w.step(Span::secs(10));
    let found = together((0..6).map(|_| {
        let store = w.store.clone();
        async move { store.due(10).await.unwrap() }
    }))
    .await
    .concat();
    assert_eq!(found.len(), 1, "two appliances would publish it twice");
    assert_eq!((found[0].envelope.clone(), found[0].attempts), (event.envelope.clone(), 1));
    w.step(Span::secs(59));
    assert!(w.store.due(10).await.unwrap().is_empty());
    w.step(Span::secs(2));
    assert_eq!(w.store.due(10).await.unwrap().len(), 1);
    // Claimed: nothing to publish. Begun: not any more.
    w.step(Span::secs(130));
    let token = w.granted("a", &event).await;
    assert!(w.store.due(10).await.unwrap().is_empty());
    assert!(w.apply(&event, token, Change::Begin(attempt(&w.clock))).await);
    w.step(Span::hours(1));
    assert!(w.store.due(10).await.unwrap().is_empty());
}

pub async fn a_delayed_event_waits_for_its_time(w: &World) {
    let mut delayed = event(&w.clock, "acme", b"x");
    delayed.envelope.deliver_at = Some(w.later(3600));
    w.store.admit(vec![delayed.clone()]).await.unwrap();
    assert!(matches!(w.claim("a", &delayed).await, Claimed::NotDue(at) if at == w.later(3600)));
    assert!(w.store.stale(w.later(1), 10).await.unwrap().is_empty());
    w.step(Span::hours(1));
    assert_eq!(w.store.due(10).await.unwrap().len(), 1);
    w.granted("a", &delayed).await;
}

pub async fn what_the_broker_lost_is_stale(w: &World) {
    let (lost, held) = (w.admitted("acme", b"lost").await, w.admitted("acme", b"held").await);
    let done = w.admitted("acme", b"done").await;
    w.finished(&done, State::Delivered).await;
    w.step(Span::secs(300));
    let token = w.granted("a", &held).await;
    w.step(Span::secs(1));
    let found = w.store.stale(w.now().minus(Duration::from_secs(300)), 10).await.unwrap();
    assert_eq!(found.iter().map(|d| d.envelope.execution_id).collect::<Vec<_>>(), [lost.envelope.execution_id]);
    assert!(w.store.stale(w.now().minus(Duration::from_secs(300)), 10).await.unwrap().is_empty(), "published just now");
    // Its owner died.
    assert!(w.apply(&held, token, Change::Begin(attempt(&w.clock))).await);
    w.step(Span::secs(301));
    let found = w.store.stale(w.now().minus(Duration::from_secs(300)), 10).await.unwrap();
    assert_eq!(found.len(), 2);
    assert_eq!(w.store.stale(w.now(), 1).await.unwrap().len(), 1, "bounded");
}

pub async fn an_event_is_cancelled_only_while_it_waits(w: &World) {
    let event = w.admitted("acme", b"x").await;
    let token = w.granted("a", &event).await;
    assert_eq!(w.store.cancel(&event.key()).await.unwrap(), Some(State::Relayed), "somebody works on it");
    w.step(Span::secs(61));
    assert_eq!(w.store.cancel(&event.key()).await.unwrap(), Some(State::Cancelled));
    assert_eq!(w.store.cancel(&event.key()).await.unwrap(), Some(State::Cancelled));
    assert!(!w.apply(&event, token, Change::Begin(attempt(&w.clock))).await, "the late owner finds out");
    assert!(matches!(w.claim("a", &event).await, Claimed::Final(State::Cancelled)));
    assert!(w.store.stale(w.later(1000), 10).await.unwrap().is_empty());
    let done = w.admitted("acme", b"y").await;
    w.finished(&done, State::Delivered).await;
    assert_eq!(w.store.cancel(&done.key()).await.unwrap(), Some(State::Delivered));
}

pub async fn a_dead_letter_is_replayed_or_discarded(w: &World) {
    let event = w.admitted("acme", b"x").await;
    assert_eq!(w.store.replay(&event.key()).await.unwrap(), Some(false));
    w.finished(&event, State::Dead).await;
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.error_class.as_deref(), row.error.as_deref()), (Some("http_4xx"), Some("410 Gone")));
    w.step(Span::days(1));
    assert_eq!(w.store.replay(&event.key()).await.unwrap(), Some(true));
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts, row.replays, row.error), (State::Relayed, 0, 1, None));
    assert_eq!(row.history.len(), 1, "what happened stays known");
    assert_eq!(w.store.due(10).await.unwrap().len(), 1);
    w.finished(&event, State::Dead).await;
    assert_eq!(w.store.discard(&event.key()).await.unwrap(), Some(true));
    assert_eq!(w.store.discard(&event.key()).await.unwrap(), Some(false));
    assert_eq!(w.store.replay(&event.key()).await.unwrap(), Some(false));
    assert_eq!(w.state(&event).await, State::Cancelled);
}

pub async fn an_external_consumer_ends_an_event(w: &World) {
    let event = w.admitted("acme", b"x").await;
    let token = w.granted("appliance", &event).await;
    let worked = Attempt { duration_ms: Some(7), error: Some("boom".into()), ..attempt(&w.clock) };
    let ended =
        w.store.finish_external(&event.key(), State::Failed, worked.clone(), Some("boom".into())).await.unwrap();
    assert_eq!(ended, Some(State::Failed));
    let row = w.store.get(&event.key(), true).await.unwrap().unwrap();
    assert_eq!((row.state, row.attempts, row.claim, row.history.len()), (State::Failed, 1, None, 1));
    assert_eq!((row.error.as_deref(), row.history[0].number), (Some("boom"), 1));
    assert!(!w.apply(&event, token, finish(State::Delivered, None)).await);
    let again = w.store.finish_external(&event.key(), State::Succeeded, worked.clone(), None).await.unwrap();
    assert_eq!(again, Some(State::Failed), "the first word counts");
    let unknown = Key { tenant: tenant("nobody"), ..event.key() };
    assert_eq!(w.store.finish_external(&unknown, State::Succeeded, worked, None).await.unwrap(), None);
}

pub async fn filters_select_and_hide(w: &World) {
    for (owner, state) in
        [("acme", Some(State::Dead)), ("acme", None), ("acme-eu", Some(State::Delivered)), ("other", Some(State::Dead))]
    {
        let event = w.admitted(owner, owner.as_bytes()).await;
        if let Some(state) = state {
            w.finished(&event, state).await;
        }
        w.step(Span::secs(10));
    }
    let owners = |filter: Filter| {
        let store = w.store.clone();
        async move {
            let count = store.count(filter.clone()).await.unwrap();
            let page = store.list(Filter { limit: 100, ..filter }).await.unwrap();
            assert_eq!(count as usize, page.rows.len());
            page.rows.iter().map(|r| r.envelope.tenant.to_string()).collect::<Vec<_>>()
        }
    };
    let all = Filter::default();
    assert_eq!(owners(all.clone()).await, ["other", "acme-eu", "acme", "acme"]);
    let tenants = |patterns: &[&str]| Filter {
        tenants: Some(patterns.iter().map(|p| Pattern::new(p)).collect()),
        ..Filter::default()
    };
    assert_eq!(owners(tenants(&["acme*"])).await, ["acme-eu", "acme", "acme"]);
    assert_eq!(owners(tenants(&["acme", "other"])).await, ["other", "acme", "acme"]);
    assert_eq!(owners(tenants(&["*"])).await.len(), 4);
    for nobody in [&[][..], &["ACME*"], &["acm_*"], &["%*"], &["[a]*"], &["?cme*"], &["' OR '1'='1*"], &["\\*"]] {
        assert!(owners(tenants(nobody)).await.is_empty(), "{nobody:?}");
    }
    assert_eq!(owners(Filter { tenant: Some(tenant("acme")), ..tenants(&["other"]) }).await, [""; 0]);
    assert_eq!(owners(Filter { tenant: Some(tenant("acme")), ..all.clone() }).await.len(), 2);
    assert_eq!(owners(Filter { states: vec![State::Dead], ..all.clone() }).await, ["other", "acme"]);
    assert_eq!(owners(Filter { states: vec![State::Relayed, State::Delivering], ..all.clone() }).await, ["acme"]);
    assert_eq!(owners(Filter { states: vec![State::Dead, State::Delivered], ..all.clone() }).await.len(), 3);
    assert_eq!(owners(Filter { error_class: Some("http_4xx".into()), ..all.clone() }).await.len(), 2);
    let workflow = |name: &str| Some(Workflow::try_new(name).unwrap());
    assert_eq!(owners(Filter { workflow: workflow("orders"), ..all.clone() }).await.len(), 4);
    assert_eq!(owners(Filter { workflow: workflow("order"), ..all.clone() }).await.len(), 0);
    let (since, until) = (Some(START.plus(Duration::from_secs(10))), Some(START.plus(Duration::from_secs(30))));
    assert_eq!(owners(Filter { since, until, ..all }).await, ["acme-eu", "acme"]);
}

pub async fn rejected_messages_are_kept_once(w: &World) {
    let topic = Topic::try_new("dealscale.workflow.long").unwrap();
    for id in ["1:1", "1:2", "1:1"] {
        w.store.reject(&topic, id, "the signature is wrong", b"ey\xff...").await.unwrap();
        w.step(Span::secs(1));
    }
    let kept = w.store.rejected(10).await.unwrap();
    assert_eq!(kept.iter().map(|r| r.message_id.as_str()).collect::<Vec<_>>(), ["1:2", "1:1"]);
    assert_eq!((kept[0].topic.clone(), kept[0].reason.as_str()), (topic, "the signature is wrong"));
    assert_eq!((kept[0].raw.as_str(), kept[1].at), ("ey\u{fffd}...", START));
    assert_eq!(w.store.rejected(1).await.unwrap().len(), 1);
    w.store.collect(10).await.unwrap();
    assert_eq!(w.store.rejected(10).await.unwrap().len(), 2);
    w.step(LEDGER_AGE);
    w.store.collect(10).await.unwrap();
    assert!(w.store.rejected(10).await.unwrap().is_empty());
}

pub async fn bodies_come_back_whole(w: &World) {
    let big: Vec<u8> = (0..5_000_000u32).flat_map(|n| n.to_le_bytes()).take(16 << 20).collect();
    let events: Vec<_> = [&b""[..], b"\0\xff\0", &big].map(|body| event(&w.clock, "acme", body)).into();
    assert_eq!(w.store.admit(events.clone()).await.unwrap(), [Admitted::New, Admitted::New, Admitted::New]);
    let loaded = w.store.load(events.iter().map(Event::key).collect()).await.unwrap();
    assert!(loaded.into_iter().map(Option::unwrap).eq(events.clone()));
    let takes = events.iter().map(|e| Take { request: request(e), begin: Some(attempt(&w.clock)) }).collect();
    let taken = w.store.claim_and_begin("a", takes, w.later(60)).await.unwrap();
    assert!(taken.iter().zip(&events).all(|(taken, event)| taken.body.as_ref() == Some(&event.body)));
}

pub async fn strange_text_and_times_come_back(w: &World) {
    let bodies: [&[u8]; 4] = [
        br#"{"nul":"\u0000","lone":"\ud800","a":1,"a":2,"big":1e999999,"digits":123456789012345678901234567890}"#,
        b"{\"raw\":\"\0\"}",
        "{\"\u{fffe}\":\"\u{10ffff}'; DROP TABLE events; --\"}".as_bytes(),
        b"\xff\xfe",
    ];
    // The furthest times that RFC 3339 can say.
    let times = ["0001-01-01T00:00:00Z", "9999-12-30T22:00:00Z", "1970-01-01T00:00:00Z", "2026-03-29T02:30:00+02:00"];
    let mut events = Vec::new();
    for (body, time) in bodies.into_iter().zip(times) {
        let mut event = event(&w.clock, "acme", body);
        event.envelope.deliver_at = Some(time.parse().unwrap());
        event.envelope.metadata =
            BTreeMap::from([("nul\0".into(), "\0\u{7f}\u{2028}".into()), (String::new(), String::new())]);
        event.envelope.source_execution = Some("\0".into());
        events.push(event);
    }
    assert_eq!(w.store.admit(events.clone()).await.unwrap(), vec![Admitted::New; 4]);
    let keys: Vec<_> = events.iter().map(Event::key).collect();
    assert!(w.store.load(keys.clone()).await.unwrap().into_iter().map(Option::unwrap).eq(events.clone()));
    let row = w.store.get(&keys[1], true).await.unwrap().unwrap();
    assert_eq!(row.next_at, events[1].envelope.deliver_at);
    // What is long past is due, and only that.
    let due = w.store.due(10).await.unwrap();
    assert_eq!(due.len(), 3, "{due:?}");
    assert!(w.store.due(10).await.unwrap().is_empty());
    // What n8n and workers say may hold anything as well.
    let token = w.granted("a", &events[0]).await;
    let nul = || Some("a\0b".to_owned());
    let said =
        Attempt { error_class: nul(), error: nul(), n8n_execution_id: nul(), message_id: nul(), ..attempt(&w.clock) };
    assert!(w.apply(&events[0], token, Change::Begin(said.clone())).await);
    let end = Change::Finish {
        attempt: Some(said.clone()),
        state: State::Failed,
        error_class: nul(),
        error: nul(),
        n8n_execution_id: nul(),
    };
    assert!(w.apply(&events[0], token, end).await);
    let row = w.store.get(&keys[0], true).await.unwrap().unwrap();
    assert_eq!((row.error, row.error_class.as_deref()), (nul(), Some("a\u{fffd}b")));
    assert_eq!(row.history.last().unwrap().error, nul());
    let ended = w.store.finish_external(&keys[2], State::Failed, said, nul()).await.unwrap();
    assert_eq!(ended, Some(State::Failed));
    let filter = Filter { error_class: nul(), limit: 10, ..Filter::default() };
    assert_eq!(w.store.count(filter.clone()).await.unwrap(), 2);
    let far = Filter { since: Some(Timestamp(i64::MIN)), until: Some(Timestamp(i64::MAX)), ..filter };
    assert_eq!(w.store.list(far).await.unwrap().rows.len(), 2);
}

pub async fn status_counts_by_state(w: &World) {
    let event = w.admitted("acme", b"x").await;
    w.admitted("acme", b"y").await;
    w.finished(&event, State::Dead).await;
    let status = w.store.status().await;
    assert!(status.reachable && status.last_error.is_none() && status.since.is_some());
    assert_eq!(status.states, BTreeMap::from([("dead".to_owned(), 1), ("relayed".to_owned(), 1)]));
}

/// The ledger's part of an event's way, as relay and delivery use it: batches of 64 admitted in a row, 32 deliveries at
/// once. 1 KiB bodies.
pub async fn events_per_second(store: &Store, events: usize) -> f64 {
    let clock = Clock::System;
    let body = [b'x'; 1024];
    let (queue, admitted) = tokio::sync::mpsc::channel::<Event>(4096);
    let admitted = std::sync::Arc::new(tokio::sync::Mutex::new(admitted));
    let start = std::time::Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    {
        let (store, clock) = (store.clone(), clock.clone());
        tasks.spawn(async move {
            for _ in 0..events / 64 {
                let batch: Vec<_> = (0..64).map(|_| event(&clock, "acme", &body)).collect();
                store.admit(batch.clone()).await.unwrap();
                for event in batch {
                    queue.send(event).await.unwrap();
                }
            }
        });
    }
    for _ in 0..32 {
        let (store, clock, admitted) = (store.clone(), clock.clone(), admitted.clone());
        tasks.spawn(async move {
            loop {
                let Some(event) = admitted.lock().await.recv().await else { return };
                let until = clock.now().plus(Duration::from_secs(60));
                let take = Take { request: request(&event), begin: Some(attempt(&clock)) };
                let taken = store.claim_and_begin("a", vec![take], until).await.unwrap().remove(0);
                let Claimed::Granted { token, .. } = taken.claimed else { panic!("not granted") };
                let ended = Attempt { number: 1, status: Some(200), duration_ms: Some(3), ..attempt(&clock) };
                let change = finish(State::Delivered, Some(ended));
                assert_eq!(store.apply(vec![Transition { key: event.key(), token, change }]).await.unwrap(), [true]);
            }
        });
    }
    tasks.join_all().await;
    (events / 64 * 64) as f64 / start.elapsed().as_secs_f64()
}
