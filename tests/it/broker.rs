//! The local broker: what both brokers promise (`tests/support/conformance.rs`), and its one batch with the outbox.
#![allow(clippy::unwrap_used)] // a test fails by panicking, in its helpers too

use std::sync::Arc;

use dealscale::broker::{Broker, KeyRing, Outgoing};
use dealscale::clock::{Clock, Timestamp};
use dealscale::config;
use dealscale::ids::Environment;
use dealscale::outbox::{LeaseLimit, Outbox};
use dealscale::units::Bytes;

use crate::conformance::{self, LONG, World, id, receive_one};

fn run<F: Future<Output = ()>>(test: impl FnOnce(World<'static>, Outbox) -> F) {
    let dir = tempfile::tempdir().unwrap();
    let config = config::parse(&format!("state_dir = {:?}", dir.path())).unwrap();
    let environment = Environment::try_new("production").unwrap();
    let settings = config.environments[&environment].clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let limits = Arc::new(|_: &_| (1, Bytes::gib(1)));
        let outbox = Outbox::open(&settings.outbox, &environment, limits, Clock::System).unwrap();
        let keys = Arc::new(KeyRing::open(&config.signing).unwrap());
        let (of, name) = (outbox.clone(), environment.clone());
        let open =
            move |topics| Broker::open(&settings.broker, &name, keys.clone(), topics, &of, Clock::System).unwrap();
        test(World { environment, clock: Clock::System, open: Box::new(open) }, outbox.clone()).await;
        outbox.close().await.unwrap();
    });
}

macro_rules! conform {
    ($($name:ident),* $(,)?) => {$(
        #[test]
        fn $name() {
            run(|world, _| async move { conformance::$name(&world).await });
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

#[test]
fn relaying_moves_a_record_from_the_outbox_to_the_broker() {
    run(|world, outbox| async move {
        let broker = world.broker();
        let sent = conformance::append(&world, &outbox, 3).await;
        let leased = outbox.lease(LeaseLimit { count: 10, bytes: Bytes::mib(1) }).await.unwrap();
        let items: Vec<_> = leased.iter().zip(&sent).map(|(leased, sent)| (leased.sequence, sent.clone())).collect();
        let results = broker.relay(&outbox, items).await;
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        assert_eq!(outbox.status().records, 0);
        for event in &sent {
            let message = receive_one(&broker).await;
            assert_eq!(id(&message), event.claims.execution_id);
            broker.ack(vec![message]).await.unwrap();
        }
    });
}

#[test]
fn an_expired_reference_is_flagged_and_comes_out() {
    run(|world, _| async move {
        let broker = world.broker();
        let mut event: Outgoing = world.event(LONG, "acme", None);
        event.claims.exp = Timestamp(0).as_secs();
        conformance::publish(&broker, vec![event]).await;
        let message = receive_one(&broker).await;
        assert!(message.reference.as_ref().unwrap().expired);
        broker.ack(vec![message]).await.unwrap();
    });
}
