//! The broker carries references from the relay to delivery. It is an enum of two real ones.
//!
//! relay → **`broker`** → delivery. [`local`] is a thin coat over the outbox's own store: no other server, and a message is
//! inserted in the same batch that lets its record leave the outbox. [`pulsar`] is Apache Pulsar, shared by a fleet.
//! [`topology`] and [`admin`] are what we ask of a Pulsar cluster over REST, [`keyring`] signs and verifies references.
//!
//! # Invariants
//! 1. A record is confirmed in the outbox only after the broker's receipt (`Local`: in the same batch).
//! 2. Nothing is published to a Pulsar topic before its subscription was seen to exist: Pulsar keeps nothing without one.
//! 3. A message comes out with a [`Verified`] reference or a [`Rejection`], never with claims that nobody checked.
//! 4. Messages of one ordering key come out one after the other: the next one after the former is settled.
//! 5. [`receive`](Broker::receive) neither ends nor fails. An outage is waited out, and visible in [`status`](Broker::status).
//!
//! # Failure
//! A send whose outcome is unknown is reported as failed and sent again later: consumers recognise the duplicate by the
//! ledger. A lost acknowledgement is a redelivery. Neither loses work.

pub mod admin;
pub mod auth;
pub mod keyring;
mod local;
mod pulsar;
pub mod reference;
pub mod topics;
pub mod topology;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

pub use keyring::KeyRing;
pub use reference::{Claims, Rejection, Verified};
pub use topics::Topics;

use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::ids::{Environment, OrderingKey, Topic};
use crate::outbox::{Outbox, Sequence};

/// A reference to publish. `Pulsar` signs it; in `Local` it never leaves our own store.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub claims: Claims,
    pub ordering_key: Option<OrderingKey>,
    /// `traceparent`, `route`, `workflow`, `accepted_at`, … – never the body.
    pub properties: BTreeMap<String, String>,
    pub deliver_at: Option<Timestamp>,
}

/// The broker has it. The id is for the ledger and for people: Pulsar's `ledger:entry:batch index`, or the
/// local broker's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt(pub String);

/// A message that this consumer holds until it settles it.
#[derive(Debug)]
pub struct Received {
    /// For the ledger: Pulsar's `ledger:entry:batch index`, or the local broker's.
    pub message_id: String,
    pub topic: Topic,
    pub reference: Result<Verified, Rejection>,
    /// As received, for the dead letters.
    pub raw: Vec<u8>,
    pub ordering_key: Option<OrderingKey>,
    pub properties: BTreeMap<String, String>,
    pub redeliveries: u32,
    pub published_at: Option<Timestamp>,
    handle: Handle,
}

/// How a message is given back to the broker it came from.
#[derive(Debug)]
enum Handle {
    Local(local::Lease),
    Pulsar(pulsar::Lease),
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The outcome is unknown when a send missed its deadline: send again, consumers tell duplicates by the ledger.
    #[error("cannot {doing}: {cause}")]
    Unavailable { doing: &'static str, cause: Arc<str> },
    /// The topic has no subscription, and making one is not allowed or failed: Pulsar would store nothing.
    #[error("topic {topic}: {cause}")]
    Topic { topic: Topic, cause: Arc<str> },
    #[error(transparent)]
    Outbox(#[from] crate::outbox::Error),
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Status {
    pub kind: &'static str,
    pub connected: bool,
    pub since: Option<Timestamp>,
    pub last_error: Option<String>,
    pub rebuilt: u64,
}

/// One of two real brokers. Cheap to clone.
#[derive(Clone)]
pub struct Broker {
    inner: Inner,
    keys: Arc<KeyRing>,
}

#[derive(Clone)]
enum Inner {
    Local(Arc<local::Local>),
    Pulsar(Arc<pulsar::Pulsar>),
}

impl Broker {
    /// Returns at once; Pulsar may be down and is connected to in the background. Must run inside a Tokio runtime.
    ///
    /// # Errors
    /// `Unavailable` when a file of the configuration (private CA, topics) cannot be read.
    pub fn open(
        config: &config::Broker,
        environment: &Environment,
        keys: Arc<KeyRing>,
        topics: Topics,
        outbox: &Outbox,
        clock: Clock,
    ) -> Result<Self, Error> {
        let inner = match config {
            config::Broker::Local { .. } => {
                Inner::Local(Arc::new(local::Local::new(environment.clone(), topics, outbox.local(), clock)))
            }
            config::Broker::Pulsar(config) => return Self::connect(config, environment, keys, topics, clock),
        };
        Ok(Self { inner, keys })
    }

    /// Pulsar, for those who have no outbox: an appliance's tools.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn connect(
        config: &config::broker::Pulsar,
        environment: &Environment,
        keys: Arc<KeyRing>,
        topics: Topics,
        clock: Clock,
    ) -> Result<Self, Error> {
        let pulsar = pulsar::Pulsar::open(config, environment.clone(), keys.clone(), topics, clock)?;
        Ok(Self { inner: Inner::Pulsar(pulsar), keys })
    }

    /// The relay's last step: publishes, and confirms each record in the outbox when its receipt is there (for `Local`
    /// in the same batch). Ordered per ordering key; otherwise pipelined and confirmed out of order. One result per item;
    /// what failed is still leased in the outbox and for the caller to release.
    pub async fn relay(&self, outbox: &Outbox, items: Vec<(Sequence, Outgoing)>) -> Vec<Result<Receipt, Error>> {
        match &self.inner {
            Inner::Local(local) => local.relay(outbox, items).await,
            Inner::Pulsar(pulsar) => pulsar.relay(outbox, items).await,
        }
    }

    /// Publishes without an outbox record (timer, sweeper, replay).
    pub async fn publish(&self, items: Vec<Outgoing>) -> Vec<Result<Receipt, Error>> {
        match &self.inner {
            Inner::Local(local) => local.publish(items).await,
            Inner::Pulsar(pulsar) => pulsar.publish(items).await,
        }
    }

    /// As [`dead_letter`](Self::dead_letter), for an event whose message is gone: its reference is made anew.
    ///
    /// # Errors
    /// The broker does not take it.
    pub async fn dead_letter_anew(&self, out: Outgoing, reason: &str) -> Result<(), Error> {
        let raw = match &self.inner {
            Inner::Local(_) => serde_json::to_vec(&out.claims).expect("claims are plain data"),
            Inner::Pulsar(pulsar) => pulsar.sign(&out.claims),
        };
        self.dead_letter(&out.claims.topic, &raw, out.properties, reason).await
    }

    /// Moves a message to `topic.dead_letter()` with its original properties and the reason (`dead_letter_reason`, `original_topic`,
    /// `original_message_id`). The caller acknowledges the message afterwards.
    ///
    /// `original_message_id` is taken from `properties` when the caller has set it (see [`Received::dead_letter_properties`]).
    pub async fn dead_letter(
        &self,
        topic: &Topic,
        raw: &[u8],
        mut properties: BTreeMap<String, String>,
        reason: &str,
    ) -> Result<(), Error> {
        properties.insert(property::REASON.into(), reason.into());
        properties.entry(property::TOPIC.into()).or_insert_with(|| topic.to_string());
        let result = match &self.inner {
            Inner::Local(local) => local.dead_letter(topic, raw, properties).await,
            Inner::Pulsar(pulsar) => pulsar.dead_letter(topic, raw, properties).await,
        };
        crate::observe::broker::DeadLettered { topic, reason, ok: result.is_ok() }.emit();
        result
    }

    /// Messages of all topics of the environment, those of tenants that come later included. Waits for at least one, takes up to `max`.
    /// Never ends, never fails: an outage is waited out (see [`status`](Self::status)).
    ///
    /// A message that is dropped without [`ack`](Self::ack) or [`release`](Self::release) is given out again.
    pub async fn receive(&self, max: usize) -> Vec<Received> {
        match &self.inner {
            Inner::Local(local) => local.receive(max).await,
            Inner::Pulsar(pulsar) => pulsar.receive(max).await,
        }
    }

    /// Done with it. `Ok` when the broker was told durably (`Pulsar`: sent and flushed; a lost acknowledgement is a redelivery).
    pub async fn ack(&self, messages: Vec<Received>) -> Result<(), Error> {
        match &self.inner {
            Inner::Local(local) => local.ack(messages).await,
            Inner::Pulsar(pulsar) => pulsar.ack(messages).await,
        }
    }

    /// Give it to somebody again after `after` (held by this consumer meanwhile; for waits up to `hold_max`).
    pub async fn release(&self, message: Received, after: Duration) {
        match &self.inner {
            Inner::Local(local) => local.release(message, after).await,
            Inner::Pulsar(pulsar) => pulsar.release(message, after),
        }
    }

    /// Signs claims for an external consumer or an expired reference.
    pub fn sign(&self, claims: &Claims) -> String {
        self.keys.sign(claims)
    }

    pub async fn backlog(&self) -> Result<Vec<crate::outbox::Backlog>, Error> {
        match &self.inner {
            Inner::Local(local) => local.backlog().await,
            Inner::Pulsar(pulsar) => pulsar.backlog().await,
        }
    }

    pub fn status(&self) -> Status {
        match &self.inner {
            Inner::Local(local) => local.status(),
            Inner::Pulsar(pulsar) => pulsar.status(),
        }
    }

    /// Resolves with the name of a background task of this broker that died: the process should end then, as for any
    /// other task ([`crate::supervise`]). Never resolves otherwise.
    pub async fn failed(&self) -> &'static str {
        match &self.inner {
            Inner::Local(_) => std::future::pending().await,
            Inner::Pulsar(pulsar) => pulsar.failed().await,
        }
    }

    /// Flushes acknowledgements and leaves.
    pub async fn close(&self) {
        match &self.inner {
            Inner::Local(_) => {}
            Inner::Pulsar(pulsar) => pulsar.close().await,
        }
    }
}

impl Received {
    /// The properties for [`Broker::dead_letter`]: its own, and where it came from.
    pub fn dead_letter_properties(&self) -> BTreeMap<String, String> {
        let mut properties = self.properties.clone();
        properties.insert(property::MESSAGE_ID.into(), self.message_id.clone());
        properties.insert(property::TOPIC.into(), self.topic.to_string());
        properties
    }
}

/// Names of message properties that this room reads or writes.
pub mod property {
    /// Why a message is a dead letter.
    pub const REASON: &str = "dead_letter_reason";
    /// The topic that a dead letter comes from.
    pub const TOPIC: &str = "original_topic";
    /// The id that a dead letter had there.
    pub const MESSAGE_ID: &str = "original_message_id";
    /// How often a message had been received before it was published again.
    pub const REDELIVERIES: &str = "redeliveries";
}
