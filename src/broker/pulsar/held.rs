//! The messages that one consumer has of one topic (or partition): which wait, which are out, which hold their key.
//!
//! Pure state: time comes in as an argument, and nothing is awaited. A message is known from its arrival until it is settled,
//! across rebuilds of the consumer.
//!
//! # Invariants
//! 1. A message is out at most once at a time. What the broker delivers again while we have it changes nothing.
//! 2. Of the messages of one ordering key only the oldest is out or delayed; the next one follows when it is settled.
//! 3. An entry of the broker is acknowledged when all messages of its batch are settled, never before: an
//!    acknowledgement without a bit set counts for the whole entry, and would lose its neighbours.
//! 4. An acknowledgement goes out only on the connection that delivered the message. One that missed it waits for the
//!    redelivery: after a cluster lost its data, the same ledger and entry may be another message.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crate::clock::Timestamp;
use crate::ids::OrderingKey;

/// Acknowledgements that wait for a redelivery which may never come (another appliance got it). Beyond this the oldest is
/// forgotten: its message is delivered again and the ledger says that it is done.
const PARKED_MAX: usize = 100_000;

/// An entry of the broker's log. The publish time tells incarnations of a topic apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    pub ledger: u64,
    pub entry: u64,
    pub published: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    pub entry: Entry,
    /// Place in the entry's batch; -1 for a message of its own.
    pub index: i32,
}

#[derive(Debug)]
pub struct Message {
    pub id: Id,
    /// Messages in the entry's batch.
    pub batch: u32,
    pub raw: Vec<u8>,
    pub ordering_key: Option<OrderingKey>,
    pub properties: Vec<(String, String)>,
    pub published_at: Timestamp,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Arrived {
    New,
    /// We have it already.
    Known,
    /// It was settled when its connection was gone: acknowledge it now.
    Acknowledge(Entry),
}

#[derive(Debug, Default)]
pub struct Held {
    messages: HashMap<Id, Slot>,
    ready: VecDeque<Id>,
    delayed: BTreeSet<(Instant, Id)>,
    /// Messages of a key in their order; the first one holds it.
    keys: HashMap<OrderingKey, VecDeque<Id>>,
    /// Settled places of entries of which others are still open.
    batches: HashMap<Entry, BTreeSet<i32>>,
    parked: BTreeSet<Entry>,
    /// Counts the consumers that were built.
    connection: u64,
    waiting: usize,
}

#[derive(Debug)]
struct Slot {
    message: Arc<Message>,
    place: Place,
    /// How often it was given out.
    given: u32,
    connection: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Ready,
    /// Its key is held by an older one.
    Behind,
    Out,
    Delayed(Instant),
}

impl Held {
    /// A new consumer was built: whatever is not settled will be delivered again, here or elsewhere.
    pub fn connected(&mut self) {
        self.connection += 1;
    }

    pub fn arrived(&mut self, message: Message) -> Arrived {
        let id = message.id;
        if self.parked.remove(&id.entry) {
            return Arrived::Acknowledge(id.entry);
        }
        if let Some(slot) = self.messages.get_mut(&id) {
            slot.connection = self.connection;
            return Arrived::Known;
        }
        if self.batches.get(&id.entry).is_some_and(|settled| settled.contains(&id.index)) {
            return Arrived::Known;
        }
        let place = match &message.ordering_key {
            Some(key) => {
                let queue = self.keys.entry(key.clone()).or_default();
                queue.push_back(id);
                if queue.len() == 1 { Place::Ready } else { Place::Behind }
            }
            None => Place::Ready,
        };
        if place == Place::Ready {
            self.ready.push_back(id);
        }
        self.waiting += 1;
        let slot = Slot { message: Arc::new(message), place, given: 0, connection: self.connection };
        self.messages.insert(id, slot);
        Arrived::New
    }

    /// The next message to give out, and how often it had been given out before.
    pub fn take(&mut self, now: Instant) -> Option<(Arc<Message>, u32)> {
        while let Some((due, id)) = self.delayed.first().copied().filter(|(due, _)| *due <= now) {
            self.delayed.remove(&(due, id));
            if let Some(slot) = self.messages.get_mut(&id) {
                slot.place = Place::Ready;
                self.ready.push_front(id);
            }
        }
        let id = self.ready.pop_front()?;
        let slot = self.messages.get_mut(&id)?;
        slot.place = Place::Out;
        slot.given += 1;
        self.waiting -= 1;
        Some((slot.message.clone(), slot.given - 1))
    }

    /// Gives a message back, to be taken again from `until` on. It keeps its key.
    pub fn release(&mut self, id: Id, until: Instant) {
        if let Some(slot) = self.messages.get_mut(&id).filter(|slot| slot.place == Place::Out) {
            slot.place = Place::Delayed(until);
            self.delayed.insert((until, id));
            self.waiting += 1;
        }
    }

    /// Done with it. Some entry: acknowledge it now.
    pub fn settle(&mut self, id: Id) -> Settled {
        let Some(slot) = self.messages.remove(&id) else { return Settled::Nothing };
        match slot.place {
            Place::Delayed(until) => {
                self.delayed.remove(&(until, id));
            }
            Place::Ready => self.ready.retain(|other| *other != id),
            Place::Out | Place::Behind => {}
        }
        if slot.place != Place::Out {
            self.waiting -= 1;
        }
        if let Some(key) = &slot.message.ordering_key {
            self.free(key, id);
        }
        let entry = id.entry;
        if slot.message.batch > 1 {
            let settled = self.batches.entry(entry).or_default();
            settled.insert(id.index);
            if settled.len() < slot.message.batch as usize {
                return Settled::Nothing;
            }
            self.batches.remove(&entry);
        }
        if slot.connection == self.connection {
            return Settled::Acknowledge(entry);
        }
        self.park(entry);
        Settled::Parked
    }

    /// The acknowledgement could not be sent: it is, when the message comes again.
    pub fn park(&mut self, entry: Entry) {
        self.parked.insert(entry);
        if self.parked.len() > PARKED_MAX {
            self.parked.pop_first();
        }
    }

    fn free(&mut self, key: &OrderingKey, id: Id) {
        let Some(queue) = self.keys.get_mut(key) else { return };
        let first = queue.front() == Some(&id);
        queue.retain(|other| *other != id);
        match queue.front().copied() {
            None => drop(self.keys.remove(key)),
            Some(next) if first => {
                if let Some(slot) = self.messages.get_mut(&next).filter(|slot| slot.place == Place::Behind) {
                    slot.place = Place::Ready;
                    self.ready.push_front(next);
                }
            }
            Some(_) => {}
        }
    }

    /// Messages that are here and not out.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// When the next delayed message is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.delayed.first().map(|(due, _)| *due)
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum Settled {
    /// Others of its batch are open, or it was settled before.
    Nothing,
    Acknowledge(Entry),
    /// Its connection is gone: acknowledged when it is delivered again.
    Parked,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn entry(n: u64) -> Entry {
        Entry { ledger: 1, entry: n, published: n }
    }
    fn message(n: u64, index: i32, batch: u32, key: Option<&str>) -> Message {
        Message {
            id: Id { entry: entry(n), index },
            batch,
            raw: vec![],
            ordering_key: key.map(|k| OrderingKey::try_new(k).unwrap()),
            properties: vec![],
            published_at: Timestamp(0),
        }
    }
    fn single(n: u64, key: Option<&str>) -> Message {
        message(n, -1, 1, key)
    }
    fn take(held: &mut Held) -> Option<Id> {
        held.take(Instant::now()).map(|(message, _)| message.id)
    }

    #[test]
    fn invariant_1_what_is_delivered_again_is_out_once() {
        let mut held = Held::default();
        assert_eq!(held.arrived(single(1, None)), Arrived::New);
        held.connected();
        assert_eq!(held.arrived(single(1, None)), Arrived::Known);
        let id = take(&mut held).unwrap();
        assert_eq!(held.arrived(single(1, None)), Arrived::Known);
        assert_eq!(take(&mut held), None);
        assert_eq!(held.settle(id), Settled::Acknowledge(entry(1)));
        assert_eq!(held.settle(id), Settled::Nothing);
        assert!(held.is_empty() && held.waiting() == 0);
    }

    #[test]
    fn invariant_2_a_key_is_held_until_its_message_is_settled() {
        let mut held = Held::default();
        for n in 1..=3 {
            held.arrived(single(n, Some("k")));
        }
        held.arrived(single(4, Some("other")));
        let first = take(&mut held).unwrap();
        assert_eq!(first.entry, entry(1));
        assert_eq!(take(&mut held).unwrap().entry, entry(4));
        assert_eq!(take(&mut held), None);
        let later = Instant::now() + Duration::from_secs(60);
        held.release(first, later);
        assert_eq!(take(&mut held), None);
        assert_eq!(held.next_due(), Some(later));
        let (again, given) = held.take(later).unwrap();
        assert_eq!((again.id, given), (first, 1));
        held.settle(first);
        assert_eq!(take(&mut held).unwrap().entry, entry(2));
        assert_eq!(held.waiting(), 1);
    }

    #[test]
    fn invariant_3_a_batch_is_acknowledged_when_all_of_it_is_settled() {
        let mut held = Held::default();
        for index in 0..3 {
            held.arrived(message(7, index, 3, None));
        }
        let ids: Vec<_> = std::iter::from_fn(|| take(&mut held)).collect();
        assert_eq!(held.settle(ids[2]), Settled::Nothing);
        assert_eq!(held.settle(ids[0]), Settled::Nothing);
        // Redelivered as a whole: what is settled stays so.
        held.connected();
        let again: Vec<_> = (0..3).map(|index| held.arrived(message(7, index, 3, None))).collect();
        assert_eq!(again, [Arrived::Known, Arrived::Known, Arrived::Known]);
        assert_eq!(take(&mut held), None);
        assert_eq!(held.settle(ids[1]), Settled::Acknowledge(entry(7)));
    }

    #[test]
    fn invariant_4_an_acknowledgement_that_missed_its_connection_waits_for_the_message() {
        let mut held = Held::default();
        held.arrived(single(1, None));
        let id = take(&mut held).unwrap();
        held.connected();
        assert_eq!(held.settle(id), Settled::Parked);
        // The same place in a topic that was made anew is another message.
        let mut other = single(1, None);
        other.id.entry.published = 99;
        assert_eq!(held.arrived(other), Arrived::New);
        assert_eq!(held.arrived(single(1, None)), Arrived::Acknowledge(entry(1)));
        assert_eq!(held.arrived(single(1, None)), Arrived::New);
    }
}
