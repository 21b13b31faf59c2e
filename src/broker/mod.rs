//! The broker is an enum of two real ones: `Local` (in the outbox's own store) and `Pulsar`. (Contract.)

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::ids::{BodyHash, Environment, ExecutionId, Key, OrderingKey, Tenant, Topic};
use crate::outbox::{Outbox, Sequence};

/// What a reference says, and what its signature covers. Names as in RFC 7519 where it has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    pub execution_id: ExecutionId,
    pub tenant_id: Tenant,
    pub environment: Environment,
    pub topic: Topic,
    /// SHA-256 of the body.
    pub payload_sha256: BodyHash,
    pub iat: i64,
    pub exp: i64,
}

impl Claims {
    pub fn key(&self) -> Key {
        Key { tenant: self.tenant_id.clone(), execution_id: self.execution_id }
    }
}

/// A reference to publish. `Pulsar` signs it; in `Local` it never leaves our own store.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub claims: Claims,
    pub ordering_key: Option<OrderingKey>,
    /// `traceparent`, `route`, `workflow`, `accepted_at`, … – never the body.
    pub properties: BTreeMap<String, String>,
    pub deliver_at: Option<Timestamp>,
}

/// The broker has it. The id is for the ledger and for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt(pub String);

/// Why a message is not to be delivered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("not a signed reference: {0}")]
    Malformed(&'static str),
    #[error("signed with an unknown key")]
    UnknownKey,
    #[error("the signature is wrong")]
    Forged,
    #[error("signed for topic {signed}, found on {found}")]
    Transplanted { signed: Topic, found: Topic },
    #[error("signed for environment {0}")]
    Environment(Environment),
    #[error("topic {topic} is not one of tenant {tenant}")]
    Tenant { topic: Topic, tenant: Tenant },
}

/// A reference whose signature was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub claims: Claims,
    /// Authentic, but `exp` is past: deliver only what the ledger knows as open.
    pub expired: bool,
}

/// A message that this consumer holds until it settles it.
#[derive(Debug)]
pub struct Received {
    /// For the ledger: Pulsar's `ledger:entry:partition:batch`, or the local broker's.
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
pub(super) enum Handle {}

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

/// The topics that this environment consumes: literal names and `{tenant}` templates of its routes.
#[derive(Clone, Debug, Default)]
pub struct Topics {
    pub templates: Vec<String>,
}

impl Topics {
    /// Whether `topic` is one of them, and which tenant its name belongs to where it has one.
    pub fn tenant_of(&self, _topic: &Topic) -> Option<Option<Tenant>> {
        unimplemented!()
    }
}

/// One of two real brokers. Cheap to clone.
#[derive(Clone)]
pub struct Broker {
    _private: Arc<()>,
}

impl Broker {
    /// Returns at once; Pulsar may be down and is connected to in the background.
    pub fn open(
        _config: &config::Broker,
        _environment: &Environment,
        _keys: Arc<KeyRing>,
        _topics: Topics,
        _outbox: &Outbox,
        _clock: Clock,
    ) -> Result<Self, Error> {
        unimplemented!()
    }
    /// The relay's last step: publishes, and confirms each record in the outbox when its receipt is there (for `Local`
    /// in the same batch). Ordered per ordering key; otherwise pipelined and confirmed out of order. One result per item;
    /// what failed is still leased in the outbox and for the caller to release.
    pub async fn relay(&self, _outbox: &Outbox, _items: Vec<(Sequence, Outgoing)>) -> Vec<Result<Receipt, Error>> {
        unimplemented!()
    }
    /// Publishes without an outbox record (timer, sweeper, replay).
    pub async fn publish(&self, _items: Vec<Outgoing>) -> Vec<Result<Receipt, Error>> {
        unimplemented!()
    }
    /// Moves a message to `topic.dead_letter()` with its original properties and the reason (`dead_letter_reason`, `original_topic`,
    /// `original_message_id`). The caller acknowledges the message afterwards.
    pub async fn dead_letter(
        &self,
        _topic: &Topic,
        _raw: &[u8],
        _properties: BTreeMap<String, String>,
        _reason: &str,
    ) -> Result<(), Error> {
        unimplemented!()
    }
    /// Messages of all topics of the environment, those of tenants that come later included. Waits for at least one, takes up to `max`.
    /// Never ends, never fails: an outage is waited out (see [`status`](Self::status)).
    pub async fn receive(&self, _max: usize) -> Vec<Received> {
        unimplemented!()
    }
    /// Done with it. `Ok` when the broker was told durably (`Pulsar`: sent and flushed; a lost acknowledgement is a redelivery).
    pub async fn ack(&self, _messages: Vec<Received>) -> Result<(), Error> {
        unimplemented!()
    }
    /// Give it to somebody again after `after` (held by this consumer meanwhile; for waits up to `hold_max`).
    pub async fn release(&self, _message: Received, _after: Duration) {
        unimplemented!()
    }
    /// Signs claims for an external consumer or an expired reference.
    pub fn sign(&self, _claims: &Claims) -> String {
        unimplemented!()
    }
    pub async fn backlog(&self) -> Result<Vec<crate::outbox::Backlog>, Error> {
        unimplemented!()
    }
    pub fn status(&self) -> Status {
        unimplemented!()
    }
    /// Flushes acknowledgements and leaves.
    pub async fn close(&self) {
        unimplemented!()
    }
}

/// Signing and verification keys.
pub struct KeyRing {
    _private: (),
}

impl KeyRing {
    /// From the configuration, or the key in `STATE_DIR/signing/` (made at the first start, mode 0600).
    pub fn open(_config: &config::Signing) -> Result<Self, String> {
        unimplemented!()
    }
    /// A compact JWS (RFC 7515) with `alg`, `kid`, `typ: "JWT"`.
    pub fn sign(&self, _claims: &Claims) -> String {
        unimplemented!()
    }
    /// Checks form, key, algorithm, signature, environment and topic; `now` decides `expired`.
    pub fn verify(
        &self,
        _token: &[u8],
        _environment: &Environment,
        _found_on: Option<&Topic>,
        _now: Timestamp,
    ) -> Result<Verified, Rejection> {
        unimplemented!()
    }
    /// Public keys as a JWK set (RFC 7517), for external consumers (`GET /.well-known/jwks.json`).
    pub fn jwks(&self) -> serde_json::Value {
        unimplemented!()
    }
}
