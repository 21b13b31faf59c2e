//! Who waits for an event hears when something of it becomes true: its final state, its receipt.
//!
//! `relay`, `delivery` → **`finals`** → `bridge` (long polls, `ack = "broker"`).
//!
//! # Invariants
//! 1. A notice is a hint, never the truth: it lives in this process only. Who waits subscribes first, then looks into the
//!    outbox or the ledger, then waits, and looks again now and then (another appliance of the fleet may have finished it).
//! 2. Nothing is kept for keys that nobody waits for; a waiter that goes away leaves nothing behind.
//! 3. With no waiter at all a notice costs one atomic load.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::event::State;
use crate::ids::Key;

/// Final states of the events of one environment.
#[derive(Clone, Debug, Default)]
pub struct Finals(Board<State>);

/// Receipts (the broker's message ids) of the events of one environment.
#[derive(Clone, Debug, Default)]
pub struct Receipts(Board<Arc<str>>);

impl Finals {
    /// The event reached `state`; for delivery to call after the ledger row is durable.
    pub fn notify(&self, key: &Key, state: State) {
        self.0.notify(key, || state);
    }

    /// Subscribes from now on.
    pub fn wait(&self, key: &Key) -> Ticket<State> {
        self.0.wait(key)
    }
}

impl Receipts {
    /// The broker has the event; for the relay to call when the receipt is there.
    pub fn notify(&self, key: &Key, message_id: &str) {
        self.0.notify(key, || message_id.into());
    }

    /// Subscribes from now on.
    pub fn wait(&self, key: &Key) -> Ticket<Arc<str>> {
        self.0.wait(key)
    }
}

#[derive(Debug)]
struct Board<T>(Arc<Inner<T>>);

impl<T> Clone for Board<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}
impl<T> Default for Board<T> {
    fn default() -> Self {
        Self(Arc::new(Inner { keys: AtomicUsize::new(0), waiting: Mutex::new(HashMap::new()) }))
    }
}

#[derive(Debug)]
struct Inner<T> {
    /// Length of `waiting`, readable without the lock.
    keys: AtomicUsize,
    waiting: Mutex<HashMap<Key, watch::Sender<Option<T>>>>,
}

impl<T> Inner<T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, watch::Sender<Option<T>>>> {
        // Every change of the map is one call that cannot panic half-way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Clone> Board<T> {
    fn notify(&self, key: &Key, value: impl FnOnce() -> T) {
        if self.0.keys.load(Ordering::SeqCst) == 0 {
            return;
        }
        if let Some(sender) = self.0.lock().get(key) {
            sender.send_replace(Some(value()));
        }
    }

    fn wait(&self, key: &Key) -> Ticket<T> {
        let mut waiting = self.0.lock();
        let receiver = match waiting.entry(key.clone()) {
            Entry::Occupied(entry) => entry.get().subscribe(),
            Entry::Vacant(entry) => entry.insert(watch::Sender::new(None)).subscribe(),
        };
        self.0.keys.store(waiting.len(), Ordering::SeqCst);
        Ticket { receiver: Some(receiver), key: key.clone(), board: self.0.clone() }
    }
}

/// A place in the queue of those who wait. Dropping it leaves the queue.
#[derive(Debug)]
pub struct Ticket<T> {
    receiver: Option<watch::Receiver<Option<T>>>,
    key: Key,
    board: Arc<Inner<T>>,
}

impl<T: Clone> Ticket<T> {
    /// The first notice since the subscription. Safe to cancel and to call again.
    pub async fn notice(&mut self) -> T {
        if let Some(receiver) = &mut self.receiver
            && let Ok(value) = receiver.wait_for(Option::is_some).await
            && let Some(value) = value.clone()
        {
            return value;
        }
        // The sender outlives every ticket, so this is only reached while dropping.
        std::future::pending().await
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        let mut waiting = self.board.lock();
        drop(self.receiver.take());
        if waiting.get(&self.key).is_some_and(|sender| sender.receiver_count() == 0) {
            waiting.remove(&self.key);
        }
        self.board.keys.store(waiting.len(), Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ExecutionId, Tenant};

    fn key() -> Key {
        Key { tenant: Tenant::try_new("acme").unwrap(), execution_id: ExecutionId::new() }
    }

    #[tokio::test]
    async fn everybody_who_waits_for_a_key_hears_it_and_nobody_else() {
        let (finals, a, b) = (Finals::default(), key(), key());
        let (mut one, mut two, mut other) = (finals.wait(&a), finals.wait(&a), finals.wait(&b));
        finals.notify(&a, State::Succeeded);
        assert_eq!((one.notice().await, two.notice().await), (State::Succeeded, State::Succeeded));
        let quiet = tokio::time::timeout(std::time::Duration::from_millis(20), other.notice()).await;
        assert!(quiet.is_err());
    }

    #[tokio::test]
    async fn invariant_2_a_waiter_that_goes_away_leaves_nothing() {
        let (receipts, a) = (Receipts::default(), key());
        receipts.notify(&a, "before anybody waited");
        let (one, mut two) = (receipts.wait(&a), receipts.wait(&a));
        drop(one);
        receipts.notify(&a, "1:2:3");
        assert_eq!(&*two.notice().await, "1:2:3");
        drop(two);
        assert!(receipts.0.0.lock().is_empty());
        assert_eq!(receipts.0.0.keys.load(Ordering::SeqCst), 0);
    }
}
