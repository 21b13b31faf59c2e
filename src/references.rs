//! From an event to the reference that travels through the broker: one place, so that relay, timer, sweeper and replay
//! publish the same thing.
//!
//! Pure.

use std::collections::BTreeMap;

use crate::broker::{Claims, Outgoing};
use crate::clock::Timestamp;
use crate::config::EnvironmentConfig;
use crate::event::Envelope;

/// Name of the route, in a message's properties. Not covered by the signature: a hint for scheduling, never a decision.
pub const ROUTE: &str = "route";
/// Priority, a hint as well.
pub const PRIORITY: &str = "priority";

/// The reference to `envelope`, signed for from `now` on. `exp` is the later of now and `deliver_at`, plus the route's
/// `age_max`.
pub fn outgoing(config: &EnvironmentConfig, envelope: &Envelope, now: Timestamp) -> Outgoing {
    let route = config.route(&envelope.route);
    let from = envelope.deliver_at.map_or(now, |at| at.max(now));
    let mut properties = BTreeMap::from([
        (ROUTE.to_owned(), envelope.route.clone()),
        ("accepted_at".to_owned(), envelope.accepted_at.to_string()),
    ]);
    if envelope.priority != Envelope::PRIORITY {
        properties.insert(PRIORITY.to_owned(), envelope.priority.to_string());
    }
    if let Some(workflow) = &envelope.workflow {
        properties.insert("workflow".to_owned(), workflow.as_str().to_owned());
    }
    if let Some(trace) = &envelope.traceparent {
        properties.insert("traceparent".to_owned(), trace.clone());
    }
    Outgoing {
        claims: Claims {
            execution_id: envelope.execution_id,
            tenant_id: envelope.tenant.clone(),
            environment: config.name.clone(),
            topic: envelope.topic.clone(),
            payload_sha256: envelope.body_hash,
            iat: now.as_secs(),
            exp: from.plus(route.age_max.0).as_secs(),
        },
        ordering_key: envelope.ordering_key.clone(),
        properties,
        // Waiting is the ledger's: what is published is due.
        deliver_at: None,
    }
}
