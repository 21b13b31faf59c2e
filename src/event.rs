//! What a caller publishes, and what becomes of it: the words that every later room uses.
//!
//! Layer 0. An [`Event`] is immutable from the moment it is accepted. Its states are those of the ledger:
//!
//! ```text
//! accepted ─▶ relayed ─▶ delivering ─▶ delivered | succeeded | failed | unknown
//!                 ▲           │
//!                 └─ retry ───┴──────▶ dead ─▶ (replayed: relayed)          cancelled
//! ```
//! `accepted` exists only in the outbox; everything behind it is a ledger row.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::ids::{BodyHash, ExecutionId, Key, OrderingKey, Tenant, Topic, Workflow};

/// Everything about an event except its body. Written as JSON in front of the body in the outbox and in the payload
/// store, so every field that a later release adds needs a default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    pub tenant: Tenant,
    pub execution_id: ExecutionId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workflow: Option<Workflow>,
    pub topic: Topic,
    /// Name of the route that took it. Settings of the route are looked up again at each attempt.
    pub route: String,
    pub accepted_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deliver_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordering_key: Option<OrderingKey>,
    /// 0 (first) to 9 (last); 5 when the caller says nothing. Orders events of one tenant that wait for a slot.
    #[serde(default = "Envelope::default_priority")]
    pub priority: u8,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// W3C trace context of the publish call (`00-…-…-01`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// n8n's execution and workflow that published it (`X-N8N-Execution-Id`, `X-N8N-Workflow-Id`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_execution: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_workflow: Option<String>,
    pub body_hash: BodyHash,
    #[serde(default)]
    pub content: Content,
}

impl Envelope {
    pub const PRIORITY: u8 = 5;
    fn default_priority() -> u8 {
        Self::PRIORITY
    }
    pub fn key(&self) -> Key {
        Key { tenant: self.tenant.clone(), execution_id: self.execution_id }
    }
}

/// What the body is, and hence how it is delivered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Content {
    /// A JSON payload from `/pulsar/publish`: delivered as `POST` with `content-type: application/json`.
    #[default]
    Json,
    /// A request as it came in (webhook capture): delivered with its own method, path, query, headers and binary body.
    Request {
        method: String,
        path: String,
        #[serde(default)]
        query: Option<String>,
        headers: Vec<(String, String)>,
    },
    /// A `short` call that was already made: never delivered, only recorded in the ledger.
    Done {
        state: State,
        status: Option<u16>,
        started_at: Timestamp,
        duration_ms: u64,
        #[serde(default)]
        error: Option<String>,
        #[serde(default)]
        n8n_execution_id: Option<String>,
    },
}

/// An event with its body.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub envelope: Envelope,
    pub body: Bytes,
}

impl Event {
    pub fn key(&self) -> Key {
        self.envelope.key()
    }
}

/// Where an event is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// On disk in the outbox, not yet in the payload store.
    Accepted,
    /// In the payload store; waits for its (next) attempt.
    Relayed,
    /// An attempt is under way, or its execution is being followed.
    Delivering,
    /// n8n answered 2xx; what its execution came to is not followed.
    Delivered,
    /// n8n's execution was followed to its success.
    Succeeded,
    /// n8n's execution was followed to its error, crash or cancellation, and the route does not deliver it again.
    Failed,
    /// n8n took it, but no execution can be found (n8n does not save it).
    Unknown,
    /// In the dead letters, until somebody replays or discards it.
    Dead,
    /// Cancelled before it was delivered, or discarded from the dead letters.
    Cancelled,
}

impl State {
    pub const ALL: [State; 9] = [
        State::Accepted,
        State::Relayed,
        State::Delivering,
        State::Delivered,
        State::Succeeded,
        State::Failed,
        State::Unknown,
        State::Dead,
        State::Cancelled,
    ];

    /// Nothing more happens unless an operator acts.
    pub fn is_final(self) -> bool {
        !matches!(self, Self::Accepted | Self::Relayed | Self::Delivering)
    }

    /// Its payload may be collected after a while. A dead letter is not completion.
    pub fn is_complete(self) -> bool {
        self.is_final() && self != Self::Dead
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Relayed => "relayed",
            Self::Delivering => "delivering",
            Self::Delivered => "delivered",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for State {
    type Err = crate::ids::Invalid;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|s| s.as_str() == text).ok_or(crate::ids::Invalid {
            what: "a state",
            rule: "accepted, relayed, delivering, delivered, succeeded, failed, unknown, dead or cancelled",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_read_what_they_print() {
        for state in State::ALL {
            assert_eq!(state.to_string().parse(), Ok(state));
        }
        assert!(!State::Dead.is_complete() && State::Dead.is_final());
    }
}
