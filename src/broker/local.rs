//! The local broker: the outbox's own store with the contract of a broker.
//!
//! A message is inserted in the same batch that lets its record leave the outbox, so there is no moment in which it is in
//! neither, and no outcome that is unknown. References are not signed: they never leave our own files.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::{Clock, Timestamp};
use crate::ids::{Environment, Tenant, Topic};
use crate::observe::broker as events;
use crate::outbox::{self, Forward, Held, Outbox, Sequence, Settle};

use super::{Claims, Error, Handle, Outgoing, Receipt, Received, Rejection, Status, Topics, Verified};

/// Between two tries to read from a store that failed. It is reopened by its owner thread meanwhile.
const RETRY: Duration = Duration::from_millis(200);

pub(super) struct Local {
    environment: Environment,
    topics: Topics,
    store: outbox::Local,
    clock: Clock,
    opened: Timestamp,
    last_error: Mutex<Option<String>>,
    dropped: Arc<Mutex<Vec<String>>>,
}

/// A message that is out. Dropped unsettled it is given back by the next `receive`.
#[derive(Debug)]
pub(super) struct Lease {
    id: Option<String>,
    dropped: Arc<Mutex<Vec<String>>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.dropped.lock().unwrap_or_else(PoisonError::into_inner).push(id);
        }
    }
}

impl Local {
    pub(super) fn new(environment: Environment, topics: Topics, store: outbox::Local, clock: Clock) -> Self {
        let opened = clock.now();
        Self { environment, topics, store, clock, opened, last_error: Mutex::default(), dropped: Arc::default() }
    }

    pub(super) async fn relay(&self, outbox: &Outbox, items: Vec<(Sequence, Outgoing)>) -> Vec<Result<Receipt, Error>> {
        let count = items.len();
        let ids: Vec<_> = items.iter().map(|(s, out)| Receipt(format!("{}:{}", out.claims.topic, s.0))).collect();
        let settles = items
            .into_iter()
            .map(|(sequence, out)| Settle::Confirm { sequence, forward: Some(forward(out)) })
            .collect();
        match outbox.settle(settles).await {
            Ok(()) => {
                events::Published { kind: "local", count }.emit();
                ids.into_iter().map(Ok).collect()
            }
            Err(error) => {
                self.failed(&error);
                (0..count).map(|_| Err(Error::Outbox(error.clone()))).collect()
            }
        }
    }

    pub(super) async fn publish(&self, items: Vec<Outgoing>) -> Vec<Result<Receipt, Error>> {
        let count = items.len();
        match self.store.publish(items.into_iter().map(forward).collect()).await {
            Ok(ids) => {
                events::Published { kind: "local", count }.emit();
                ids.into_iter().map(|id| Ok(Receipt(id))).collect()
            }
            Err(error) => {
                self.failed(&error);
                (0..count).map(|_| Err(Error::Outbox(error.clone()))).collect()
            }
        }
    }

    pub(super) async fn dead_letter(
        &self,
        topic: &Topic,
        raw: &[u8],
        properties: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let tenant = serde_json::from_slice::<Claims>(raw)
            .map(|claims| claims.tenant_id)
            .unwrap_or_else(|_| Tenant::try_new("unknown").expect("a valid name"));
        let letter = Forward {
            topic: topic.dead_letter(),
            ordering_key: None,
            tenant,
            claims: raw.to_vec(),
            properties,
            deliver_at: None,
        };
        self.store.publish(vec![letter]).await.map(drop).map_err(|error| {
            self.failed(&error);
            Error::Outbox(error)
        })
    }

    pub(super) async fn receive(&self, max: usize) -> Vec<Received> {
        let topics = self.topics.clone();
        let ours: Arc<dyn Fn(&Topic) -> bool + Send + Sync> = Arc::new(move |topic| topics.tenant_of(topic).is_some());
        loop {
            let dropped = std::mem::take(&mut *self.dropped.lock().unwrap_or_else(PoisonError::into_inner));
            if !dropped.is_empty()
                && let Err(error) = self.store.release(dropped.clone(), Duration::ZERO).await
            {
                self.failed(&error);
                self.dropped.lock().unwrap_or_else(PoisonError::into_inner).extend(dropped);
            }
            match self.store.receive(ours.clone(), max.max(1)).await {
                Ok(held) if held.is_empty() => tokio::task::yield_now().await,
                Ok(held) => return held.into_iter().map(|held| self.received(held)).collect(),
                Err(outbox::Error::Closed) => std::future::pending().await,
                Err(error) => {
                    self.failed(&error);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    fn received(&self, held: Held) -> Received {
        let reference = self.check(&held);
        if let Err(rejection) = &reference {
            events::Rejected { topic: &held.topic, kind: rejection.kind(), cause: rejection }.emit();
        }
        Received {
            message_id: held.id.clone(),
            topic: held.topic,
            reference,
            raw: held.forward.claims,
            ordering_key: held.forward.ordering_key,
            properties: held.forward.properties,
            redeliveries: held.redeliveries,
            published_at: Some(held.published_at),
            handle: Handle::Local(Lease { id: Some(held.id), dropped: self.dropped.clone() }),
        }
    }

    /// Our own file: what can be wrong is damage, or a route that changed its topic since.
    fn check(&self, held: &Held) -> Result<Verified, Rejection> {
        let claims: Claims = serde_json::from_slice(&held.forward.claims)
            .map_err(|_| Rejection::Malformed("the claims cannot be read"))?;
        if claims.environment != self.environment {
            return Err(Rejection::Environment(claims.environment));
        }
        if claims.topic != held.topic {
            return Err(Rejection::Transplanted { signed: claims.topic, found: held.topic.clone() });
        }
        if !self.topics.allow(&held.topic, &claims.tenant_id) {
            return Err(Rejection::Tenant { topic: held.topic.clone(), tenant: claims.tenant_id });
        }
        let expired = claims.exp < self.clock.now().as_secs();
        Ok(Verified { claims, expired })
    }

    pub(super) async fn ack(&self, messages: Vec<Received>) -> Result<(), Error> {
        let count = messages.len();
        self.store.ack(messages.into_iter().filter_map(id).collect()).await.map_err(|error| {
            self.failed(&error);
            Error::Outbox(error)
        })?;
        events::Acknowledged { kind: "local", count }.emit();
        Ok(())
    }

    pub(super) async fn release(&self, message: Received, after: Duration) {
        let ids: Vec<_> = id(message).into_iter().collect();
        // A message that is not given back stays held until the store is opened again: try as long as it lives.
        while let Err(error) = self.store.release(ids.clone(), after).await {
            self.failed(&error);
            if matches!(error, outbox::Error::Closed) {
                return;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    pub(super) async fn backlog(&self) -> Result<Vec<outbox::Backlog>, Error> {
        Ok(self.store.backlog().await?)
    }

    pub(super) fn status(&self) -> Status {
        let last_error = self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Status { kind: "local", connected: true, since: Some(self.opened), last_error, rebuilt: 0 }
    }

    fn failed(&self, error: &outbox::Error) {
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }
}

fn forward(out: Outgoing) -> Forward {
    Forward {
        topic: out.claims.topic.clone(),
        ordering_key: out.ordering_key,
        tenant: out.claims.tenant_id.clone(),
        claims: serde_json::to_vec(&out.claims).expect("claims are plain data"),
        properties: out.properties,
        deliver_at: out.deliver_at,
    }
}

fn id(message: Received) -> Option<String> {
    match message.handle {
        Handle::Local(mut lease) => lease.id.take(),
        Handle::Pulsar(_) => None,
    }
}
