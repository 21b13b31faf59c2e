//! The outbox without its thread: what each request changes, as writes to commit and answers to give when they are durable.
//!
//! Every method is synchronous and takes the time as an argument, so that the simulator drives it step by step.
//!
//! # Invariants
//! 1. Nothing is answered before its writes are committed; the owner does that.
//! 2. `bytes <= bytes_max` and `records <= count_max`; nothing is evicted.
//! 3. After a failed commit the engine is thrown away and built anew from the store; only its sequences are carried on.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes as Body;

use super::packs::{New, Open, Packs, Trees};
use super::queue::Queue;
use super::record::{self, Bad};
use super::store::{Failure, Kv, Tree, Write};
use super::{
    Backlog, Cancelled, Error, Forward, Found, Held, LeaseLimit, Leased, Sequence, Settle, Status, TenantLimits,
    Unreadable,
};
use crate::clock::Timestamp;
use crate::config;
use crate::event::{Content, Event, State};
use crate::ids::{BodyHash, ExecutionId, Key, Tenant, Topic};
use crate::seal::Seal;
use crate::units::Bytes;

const RECORDS: Trees = Trees { packs: Tree::Packs, index: Tree::Index, done: Tree::Done, chunks: Tree::Chunks };
const MESSAGES: Trees =
    Trees { packs: Tree::LocalPacks, index: Tree::LocalIndex, done: Tree::LocalDone, chunks: Tree::LocalChunks };
/// Acknowledged packs of the local broker that are kept for `browse`: bounded by number as well as by age.
const RETAINED_MAX: usize = 64;
/// Expired idempotency keys that are forgotten with one batch: their deletes ride along, they never dominate it.
const EXPIRE_MAX: usize = 256;
/// Bodies of one list: the answer ends early rather than fill the memory.
const LIST_BYTES: Bytes = Bytes::mib(32);

/// A record ready to append: encoded in the caller's task, not in the owner's thread.
pub struct Prepared {
    pub tenant: Tenant,
    pub execution_id: ExecutionId,
    pub body_hash: BodyHash,
    pub bytes: Vec<u8>,
    /// Hash of the tenant and the key, and the answer to keep.
    pub key: Option<([u8; 16], Body)>,
}

/// What an append came to, once its batch is durable.
#[derive(Clone, Debug)]
pub struct Taken {
    pub execution_id: ExecutionId,
    pub sequence: Option<u64>,
    pub duplicate: bool,
    pub answer: Option<Body>,
}

struct Lease {
    at: Instant,
    size: u64,
    tenant: Tenant,
    id: ExecutionId,
}

/// A message that is out, or waits for its time.
struct Out {
    redeliveries: u32,
    held: bool,
}

/// A key of this batch or of the store.
struct KnownKey {
    body_hash: BodyHash,
    execution_id: ExecutionId,
    answer: Body,
}

pub struct Engine {
    pub kv: Box<dyn Kv>,
    settings: Arc<config::Outbox>,
    seal: Option<Arc<Seal>>,
    limits: TenantLimits,
    records: Packs,
    messages: Packs,
    queue: Queue,
    local: Queue,
    pub next: u64,
    pub next_message: u64,
    /// What `next` will be at least after the next open: for the witness, which must never be ahead of the store.
    pub durable_next: u64,
    leased: HashMap<u64, Lease>,
    /// Fingerprint of (tenant, id) → sequence. A collision (one in 2^64 pairs) only hides one of the two from lookups.
    ids: HashMap<u64, u64>,
    poisoned: BTreeMap<u64, String>,
    out: HashMap<u64, Out>,
    /// Messages that are not due yet.
    delayed: BTreeSet<(Timestamp, u64)>,
    released: BTreeSet<(Instant, u64)>,
    retained: std::collections::VecDeque<(Timestamp, u64)>,
    retention: Duration,
    pub status: Status,
    /// Of the batch that is being built.
    pub writes: Vec<Write>,
    batch_keys: HashMap<[u8; 16], KnownKey>,
    /// Ids of the batch: their records cannot be read before it is committed.
    batch_ids: HashMap<u64, BodyHash>,
}

pub fn fingerprint(tenant: &Tenant, id: &ExecutionId) -> u64 {
    use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
    BuildHasherDefault::<DefaultHasher>::default().hash_one((tenant.as_str(), id.0.as_bytes()))
}

fn fingerprint_raw(tenant: &str, id: &[u8; 16]) -> u64 {
    use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
    BuildHasherDefault::<DefaultHasher>::default().hash_one((tenant, id))
}

/// The tenant and the topic of a group of messages.
fn message_group(forward: &Forward) -> String {
    format!("{}\n{}", forward.tenant, forward.topic)
}

impl Engine {
    pub fn open(
        kv: Box<dyn Kv>,
        settings: Arc<config::Outbox>,
        seal: Option<Arc<Seal>>,
        limits: TenantLimits,
    ) -> Result<Self, Failure> {
        let mut status = Status { bytes_max: settings.bytes_max.0, count_max: settings.count_max, ..Status::default() };
        let mut poisoned = BTreeMap::new();
        let mut after: Option<Vec<u8>> = None;
        loop {
            let entries = kv.scan(Tree::Poison, after.as_deref(), 256)?;
            let Some((last, _)) = entries.last() else { break };
            after = Some(last.clone());
            for (key, value) in entries {
                if let Ok(key) = key.as_slice().try_into() {
                    poisoned.insert(u64::from_be_bytes(key), String::from_utf8_lossy(&value).into_owned());
                }
            }
        }
        let (mut queue, mut local, mut ids) = (Queue::default(), Queue::default(), HashMap::new());
        let (mut next, mut next_message) = (1, 1);
        let records = Packs::open(RECORDS, &*kv, |group, at, open: Open| {
            let size = u64::from(open.size);
            status.records += 1;
            status.bytes += size;
            status.oldest = Some(status.oldest.map_or(at, |o: Timestamp| o.min(at)));
            let tenant = match status.tenants.get_mut(&**group) {
                Some(tenant) => tenant,
                None => status.tenants.entry(group.to_string()).or_default(),
            };
            tenant.records += 1;
            tenant.bytes += size;
            ids.insert(fingerprint_raw(group, &open.id), open.sequence);
        })?;
        for (first, pack) in &records.packs {
            next = next.max(first + u64::from(pack.count));
            if pack.left > 0 {
                queue.pack(&pack.group, *first);
            }
        }
        let messages = Packs::open(MESSAGES, &*kv, |_, _, _| {})?;
        let mut retained = std::collections::VecDeque::new();
        for (first, pack) in &messages.packs {
            next_message = next_message.max(first + u64::from(pack.count));
            if pack.left > 0 {
                local.pack(&pack.group, *first);
            } else {
                retained.push_back((pack.at, *first));
            }
        }
        let stored = |key: &[u8]| -> Result<u64, Failure> {
            let value = kv.get(Tree::Meta, key)?;
            Ok(value.and_then(|v| v.as_slice().try_into().ok()).map_or(1, u64::from_be_bytes))
        };
        next = next.max(stored(b"next")?);
        next_message = next_message.max(stored(b"next message")?);
        status.data_loss_possible = kv.get(Tree::Meta, b"loss")?.map(|v| String::from_utf8_lossy(&v).into_owned());
        Ok(Self {
            kv,
            settings,
            seal,
            limits,
            records,
            messages,
            queue,
            local,
            next,
            next_message,
            durable_next: next,
            leased: HashMap::new(),
            ids,
            poisoned,
            out: HashMap::new(),
            delayed: BTreeSet::new(),
            released: BTreeSet::new(),
            retained,
            retention: Duration::from_secs(86_400),
            status,
            writes: Vec::new(),
            batch_keys: HashMap::new(),
            batch_ids: HashMap::new(),
        })
    }

    /// Numbers below these are not used again, and that is written with the next batch.
    pub fn skip_to(&mut self, next: u64, next_message: u64) {
        if next > self.next || next_message > self.next_message {
            self.next = self.next.max(next);
            self.next_message = self.next_message.max(next_message);
            self.persist_next();
        }
    }

    // --- appending ---

    /// Adds to the batch. `disk_free` is a recent figure of the folder's disk.
    pub fn append(&mut self, items: Vec<Prepared>, now: Timestamp, disk_free: Bytes) -> Vec<Result<Taken, Error>> {
        let mut results = Vec::with_capacity(items.len());
        let mut groups: BTreeMap<Tenant, Vec<(usize, Prepared)>> = BTreeMap::new();
        let mut expiring = Vec::new();
        for (n, item) in items.into_iter().enumerate() {
            match self.judge(&item, now, disk_free) {
                Err(error) => results.push(Err(error)),
                Ok(Some(taken)) => results.push(Ok(taken)),
                Ok(None) => {
                    let size = item.bytes.len() as u64;
                    self.status.records += 1;
                    self.status.bytes += size;
                    let tenant = self.status.tenants.entry(item.tenant.to_string()).or_default();
                    tenant.records += 1;
                    tenant.bytes += size;
                    self.status.appended_total += 1;
                    self.batch_ids.insert(fingerprint(&item.tenant, &item.execution_id), item.body_hash);
                    if let Some((key, answer)) = &item.key {
                        let expiry = now.plus(self.settings.key_window.0);
                        let mut value = expiry.0.to_be_bytes().to_vec();
                        value.extend_from_slice(&item.body_hash.0);
                        value.extend_from_slice(item.execution_id.0.as_bytes());
                        value.extend_from_slice(answer);
                        self.writes.push(Write { tree: Tree::Keys, key: key.to_vec(), value: Some(value) });
                        expiring.extend_from_slice(key);
                        let known = KnownKey {
                            body_hash: item.body_hash,
                            execution_id: item.execution_id,
                            answer: answer.clone(),
                        };
                        self.batch_keys.insert(*key, known);
                    }
                    results.push(Ok(Taken {
                        execution_id: item.execution_id,
                        sequence: None,
                        duplicate: false,
                        answer: None,
                    }));
                    groups.entry(item.tenant.clone()).or_default().push((n, item));
                }
            }
        }
        for (tenant, items) in groups {
            let mut entries = Vec::with_capacity(items.len());
            for (n, item) in items {
                let sequence = self.next;
                self.next += 1;
                self.ids.insert(fingerprint(&item.tenant, &item.execution_id), sequence);
                if let Ok(taken) = &mut results[n] {
                    taken.sequence = Some(sequence);
                }
                entries.push(New { id: *item.execution_id.0.as_bytes(), bytes: item.bytes });
            }
            self.enqueue(&tenant, entries, now);
        }
        if self.status.oldest.is_none() && self.status.records > 0 {
            self.status.oldest = Some(now);
        }
        if !expiring.is_empty() {
            let mut key = now.plus(self.settings.key_window.0).0.to_be_bytes().to_vec();
            key.extend_from_slice(&self.next.to_be_bytes());
            for (n, part) in expiring.chunks(self.kv.value_max() / 16 * 16).enumerate() {
                let mut key = key.clone();
                key.extend_from_slice(&(n as u16).to_be_bytes());
                self.writes.push(Write { tree: Tree::Expiry, key, value: Some(part.to_vec()) });
            }
        }
        results
    }

    /// Packs of one tenant, whose entries have had the last sequences.
    fn enqueue(&mut self, tenant: &Tenant, entries: Vec<New>, now: Timestamp) {
        let first = self.next - entries.len() as u64;
        let value_max = self.kv.value_max();
        self.records.append(first, tenant.as_str(), now, entries, value_max, &mut self.writes);
        let Self { records, queue, .. } = self;
        for (first, pack) in records.packs.range(first..) {
            queue.pack(&pack.group, *first);
        }
    }

    /// A refusal, a duplicate, or `None`: take it.
    fn judge(&mut self, item: &Prepared, now: Timestamp, disk_free: Bytes) -> Result<Option<Taken>, Error> {
        if let Some((key, _)) = &item.key
            && let Some(known) = self.known_key(key, now)?
        {
            if known.body_hash != item.body_hash {
                return Err(Error::KeyReused);
            }
            let answer = Some(known.answer);
            return Ok(Some(Taken { execution_id: known.execution_id, sequence: None, duplicate: true, answer }));
        }
        let print = fingerprint(&item.tenant, &item.execution_id);
        if let Some(hash) = self.batch_ids.get(&print) {
            return self.same_or_conflict(*hash, item, None);
        }
        if let Some(sequence) = self.ids.get(&print).copied()
            && let Some(event) = self.event(sequence)?
            && event.envelope.execution_id == item.execution_id
            && event.envelope.tenant == item.tenant
        {
            return self.same_or_conflict(event.envelope.body_hash, item, Some(sequence));
        }
        let size = item.bytes.len() as u64;
        // All of the outbox, or what sixteen bits of chunk numbers hold.
        let largest = self.settings.bytes_max.0.min((self.kv.value_max() as u64 - 64) * u64::from(u16::MAX));
        if size > largest {
            return Err(Error::Oversized { size: Bytes(size), max: Bytes(largest) });
        }
        if self.status.bytes + size > self.settings.bytes_max.0 {
            return Err(Error::Full { used: Bytes(self.status.bytes), max: self.settings.bytes_max });
        }
        if self.status.records >= self.settings.count_max {
            return Err(Error::FullCount { used: self.status.records, max: self.settings.count_max });
        }
        if disk_free < self.settings.disk_free_min {
            return Err(Error::Disk { free: disk_free, min: self.settings.disk_free_min });
        }
        let (_, quota) = (self.limits)(&item.tenant);
        let used = self.status.tenants.get(item.tenant.as_str()).map_or(0, |t| t.bytes);
        if used + size > quota.0 {
            return Err(Error::Quota { tenant: item.tenant.clone(), used: Bytes(used), max: quota });
        }
        Ok(None)
    }

    fn same_or_conflict(&self, hash: BodyHash, item: &Prepared, sequence: Option<u64>) -> Result<Option<Taken>, Error> {
        if hash != item.body_hash {
            return Err(Error::Conflict(item.execution_id));
        }
        Ok(Some(Taken { execution_id: item.execution_id, sequence, duplicate: true, answer: None }))
    }

    fn known_key(&self, key: &[u8; 16], now: Timestamp) -> Result<Option<KnownKey>, Error> {
        if let Some(known) = self.batch_keys.get(key) {
            let KnownKey { body_hash, execution_id, answer } = known;
            return Ok(Some(KnownKey { body_hash: *body_hash, execution_id: *execution_id, answer: answer.clone() }));
        }
        let value = self.kv.get(Tree::Keys, key).map_err(|e| failed("read an idempotency key", &e))?;
        Ok(value.and_then(|v| {
            // One that expired counts no more, whether or not it is its turn to be deleted.
            if i64::from_be_bytes(v.get(..8)?.try_into().ok()?) <= now.0 {
                return None;
            }
            Some(KnownKey {
                body_hash: BodyHash(v.get(8..40)?.try_into().ok()?),
                execution_id: ExecutionId(uuid::Uuid::from_bytes(v.get(40..56)?.try_into().ok()?)),
                answer: Body::copy_from_slice(v.get(56..)?),
            })
        }))
    }

    /// Forgets expired keys, a few with each batch.
    pub fn expire_keys(&mut self, now: Timestamp) -> Result<(), Failure> {
        let mut left = EXPIRE_MAX;
        for (key, keys) in self.kv.scan(Tree::Expiry, None, 4)? {
            let Some(expiry) = key.get(..8).and_then(|e| e.try_into().ok()).map(i64::from_be_bytes) else { continue };
            if expiry > now.0 || keys.len() / 16 > left.max(1) && left < EXPIRE_MAX {
                break;
            }
            left = left.saturating_sub(keys.len() / 16);
            for hash in keys.chunks(16) {
                // The key may have been used again since, after it expired.
                let value = self.kv.get(Tree::Keys, hash)?;
                let stored = value.and_then(|v| v.get(..8)?.try_into().ok()).map(i64::from_be_bytes);
                if stored.is_some_and(|stored| stored <= now.0) {
                    self.writes.push(Write { tree: Tree::Keys, key: hash.to_vec(), value: None });
                }
            }
            self.writes.push(Write { tree: Tree::Expiry, key, value: None });
        }
        Ok(())
    }

    // --- leasing and settling ---

    /// Records to work on. What cannot be read is poisoned in the batch that follows.
    pub fn lease(&mut self, limit: LeaseLimit, now: Instant) -> Result<Vec<Leased>, Failure> {
        let (mut out, mut bytes) = (Vec::new(), 0);
        while out.len() < limit.count.max(1) && bytes < limit.bytes.0.max(1) {
            let Self { queue, records, leased, poisoned, limits, .. } = self;
            let weight = |group: &str| Tenant::try_new(group).map_or(1, |tenant| limits(&tenant).0);
            let skip = |s: u64| leased.contains_key(&s) || poisoned.contains_key(&s) || !records.is_open(s);
            let Some(sequence) = queue.next(records, |_| true, weight, skip) else { break };
            let raw = match self.records.read(sequence, &*self.kv)? {
                Ok(raw) => raw,
                Err(bad) => {
                    self.poison(sequence, format!("the record cannot be read: {bad}"))?;
                    continue;
                }
            };
            let event = match record::decode(&raw, self.seal.as_deref()) {
                Ok(event) => event,
                Err(bad) => {
                    self.poison(sequence, format!("the record cannot be read: {bad}"))?;
                    continue;
                }
            };
            let envelope = &event.envelope;
            if let Some(key) = &envelope.ordering_key
                && !self.queue.enter(&envelope.tenant, key, sequence)
            {
                continue;
            }
            bytes += raw.len() as u64;
            let lease =
                Lease { at: now, size: raw.len() as u64, tenant: envelope.tenant.clone(), id: envelope.execution_id };
            self.leased.insert(sequence, lease);
            out.push(Leased { sequence: Sequence(sequence), event });
        }
        Ok(out)
    }

    /// Leases that ran out go back to the queue.
    pub fn reclaim(&mut self, now: Instant) {
        let old: Vec<u64> = self
            .leased
            .iter()
            .filter(|(_, lease)| now.saturating_duration_since(lease.at) >= self.settings.lease.0)
            .map(|(sequence, _)| *sequence)
            .collect();
        for sequence in old {
            self.release(sequence);
        }
    }

    fn release(&mut self, sequence: u64) {
        if self.leased.remove(&sequence).is_some()
            && let Some((first, _)) = self.records.locate(sequence)
        {
            let group = self.records.packs[&first].group.clone();
            self.queue.again(&group, sequence);
        }
    }

    pub fn settle(&mut self, settles: Vec<Settle>, now: Timestamp) -> Result<(), Failure> {
        let (mut done, mut forwards) = (Vec::new(), Vec::new());
        for settle in settles {
            match settle {
                Settle::Confirm { sequence, forward } => {
                    // A lease that ran out, or a second confirm: somebody else has it, or had.
                    if let Some(lease) = self.leased.remove(&sequence.0) {
                        self.forget(sequence.0, lease.size, &lease.tenant, &lease.id);
                        done.push(sequence.0);
                        forwards.extend(forward);
                        self.status.confirmed_total += 1;
                    }
                }
                Settle::Poison { sequence, reason } => {
                    if self.leased.contains_key(&sequence.0) {
                        self.poison(sequence.0, reason)?;
                    }
                }
                Settle::Release { sequence } => self.release(sequence.0),
            }
        }
        self.finish(&done)?;
        self.publish(forwards, now);
        Ok(())
    }

    /// Marks records done and passes their ordering keys on.
    fn finish(&mut self, sequences: &[u64]) -> Result<(), Failure> {
        let Self { records, poisoned, kv, writes, .. } = self;
        let keep = |first: u64, count: u16| poisoned.range(first..first + u64::from(count)).next().is_some();
        records.finish(sequences, keep, &**kv, writes)?;
        let firsts: BTreeSet<u64> =
            sequences.iter().filter_map(|s| records.locate(*s).map(|(first, _)| first)).collect();
        for first in firsts {
            records.compact(first, &**kv, writes)?;
        }
        self.persist_next();
        for sequence in sequences {
            let Self { queue, records, .. } = self;
            queue.leave(*sequence, |s| records.locate(s).map(|(first, _)| records.packs[&first].group.clone()));
        }
        Ok(())
    }

    /// The next sequence must survive the deletion of all packs.
    fn persist_next(&mut self) {
        for (key, next) in [(&b"next"[..], self.next), (b"next message", self.next_message)] {
            let value = Some(next.to_be_bytes().to_vec());
            self.writes.push(Write { tree: Tree::Meta, key: key.to_vec(), value });
        }
    }

    fn forget(&mut self, sequence: u64, size: u64, tenant: &Tenant, id: &ExecutionId) {
        self.status.records = self.status.records.saturating_sub(1);
        self.status.bytes = self.status.bytes.saturating_sub(size);
        if let Some(of_tenant) = self.status.tenants.get_mut(tenant.as_str()) {
            of_tenant.records = of_tenant.records.saturating_sub(1);
            of_tenant.bytes = of_tenant.bytes.saturating_sub(size);
            if of_tenant.records == 0 {
                self.status.tenants.remove(tenant.as_str());
            }
        }
        let print = fingerprint(tenant, id);
        if self.ids.get(&print) == Some(&sequence) {
            self.ids.remove(&print);
        }
        if self.status.records == 0 {
            self.status.oldest = None;
        }
    }

    /// Sets a record aside, kept and counted. It still counts against the limits until somebody repairs it.
    fn poison(&mut self, sequence: u64, reason: String) -> Result<(), Failure> {
        self.leased.remove(&sequence);
        let value = Some(reason.clone().into_bytes());
        self.writes.push(Write { tree: Tree::Poison, key: sequence.to_be_bytes().to_vec(), value });
        self.poisoned.insert(sequence, reason);
        let Self { queue, records, .. } = self;
        queue.leave(sequence, |s| records.locate(s).map(|(first, _)| records.packs[&first].group.clone()));
        Ok(())
    }

    pub fn repair(&mut self, sequence: u64, discard: bool) -> Result<bool, Failure> {
        if self.poisoned.remove(&sequence).is_none() {
            return Ok(false);
        }
        self.writes.push(Write { tree: Tree::Poison, key: sequence.to_be_bytes().to_vec(), value: None });
        let Some((first, _)) = self.records.locate(sequence) else { return Ok(true) };
        let group = self.records.packs[&first].group.clone();
        if !discard {
            self.queue.again(&group, sequence);
            return Ok(true);
        }
        match self.records.read(sequence, &*self.kv)?.ok().and_then(|raw| {
            let event = record::decode(&raw, self.seal.as_deref()).ok()?;
            Some((raw.len() as u64, event))
        }) {
            Some((size, event)) => {
                let Event { envelope, .. } = event;
                self.forget(sequence, size, &envelope.tenant, &envelope.execution_id);
            }
            // Unreadable: its size is known again after the next open.
            None => {
                if let Ok(tenant) = Tenant::try_new(&group) {
                    self.forget(sequence, 0, &tenant, &ExecutionId(uuid::Uuid::nil()));
                }
            }
        }
        self.finish(&[sequence])?;
        Ok(true)
    }

    /// Takes an event out of the queue and leaves, in the same batch, the record that the ledger will tell of it: "cancelled" is an
    /// end that somebody may ask for, and a second publish of the same id meets it.
    pub fn cancel(&mut self, key: &Key, now: Timestamp) -> Result<Cancelled, Failure> {
        let Some(sequence) = self.sequence_of(key) else { return Ok(Cancelled::Absent) };
        if self.leased.contains_key(&sequence) {
            return Ok(Cancelled::Leased);
        }
        let Ok(raw) = self.records.read(sequence, &*self.kv)? else { return Ok(Cancelled::Absent) };
        let mut event = match record::decode(&raw, self.seal.as_deref()) {
            Ok(event) if event.key() == *key => event,
            _ => return Ok(Cancelled::Absent),
        };
        match &event.envelope.content {
            Content::Done { state: State::Cancelled, .. } => return Ok(Cancelled::Done),
            // A call that was made: the ledger will say what came of it.
            Content::Done { .. } => return Ok(Cancelled::Leased),
            _ => {}
        }
        let poisoned = self.poisoned.remove(&sequence).is_some();
        if poisoned {
            self.writes.push(Write { tree: Tree::Poison, key: sequence.to_be_bytes().to_vec(), value: None });
        }
        self.forget(sequence, raw.len() as u64, &key.tenant, &key.execution_id);
        self.finish(&[sequence])?;
        // A poisoned record's id may be another event's, which is not cancelled.
        if !poisoned {
            event.envelope.content = Content::Done {
                state: State::Cancelled,
                status: None,
                started_at: now,
                duration_ms: 0,
                error: None,
                n8n_execution_id: None,
            };
            let bytes = record::encode(&event, self.seal.as_deref());
            let size = bytes.len() as u64;
            self.status.records += 1;
            self.status.bytes += size;
            let tenant = self.status.tenants.entry(key.tenant.to_string()).or_default();
            tenant.records += 1;
            tenant.bytes += size;
            self.ids.insert(fingerprint(&key.tenant, &key.execution_id), self.next);
            self.next += 1;
            self.enqueue(&key.tenant, vec![New { id: *key.execution_id.0.as_bytes(), bytes }], now);
        }
        Ok(Cancelled::Done)
    }

    // --- reading ---

    fn sequence_of(&self, key: &Key) -> Option<u64> {
        let sequence = *self.ids.get(&fingerprint(&key.tenant, &key.execution_id))?;
        self.records.is_open(sequence).then_some(sequence)
    }

    fn event(&mut self, sequence: u64) -> Result<Option<Event>, Error> {
        let raw = self.records.read(sequence, &*self.kv).map_err(|e| failed("read a record", &e))?;
        Ok(raw.ok().and_then(|raw| record::decode(&raw, self.seal.as_deref()).ok()))
    }

    fn found(&mut self, sequence: u64, bodies: bool) -> Result<Option<Found>, Error> {
        let Some(mut event) = self.event(sequence)? else { return Ok(None) };
        let body_bytes = event.body.len() as u64;
        if !bodies {
            event.body = Body::new();
        }
        let leased = self.leased.contains_key(&sequence);
        let poisoned = self.poisoned.get(&sequence).cloned();
        Ok(Some(Found { sequence: Sequence(sequence), event, body_bytes, leased, poisoned }))
    }

    /// Records that nobody can read: those that were poisoned for it, or (`all`) whatever is found by reading everything.
    pub fn unreadable(&mut self, all: bool) -> Result<Vec<Unreadable>, Failure> {
        let sequences: Vec<u64> =
            if all { self.open_sequences().collect() } else { self.poisoned.keys().copied().collect() };
        let mut found = Vec::new();
        for sequence in sequences {
            let raw = self.records.read(sequence, &*self.kv)?;
            if let Err(bad) = raw.and_then(|raw| record::decode(&raw, self.seal.as_deref()).map(drop)) {
                let tenant =
                    self.records.locate(sequence).map(|(first, _)| self.records.packs[&first].group.to_string());
                let poisoned = self.poisoned.contains_key(&sequence);
                let tenant = tenant.unwrap_or_default();
                found.push(Unreadable { sequence: Sequence(sequence), tenant, poisoned, why: bad.to_string() });
            }
        }
        Ok(found)
    }

    pub fn find(&mut self, key: &Key) -> Result<Option<Found>, Error> {
        let Some(sequence) = self.sequence_of(key) else { return Ok(None) };
        Ok(self.found(sequence, true)?.filter(|found| found.event.key() == *key))
    }

    pub fn list(
        &mut self,
        tenant: Option<&Tenant>,
        poisoned: bool,
        after: Option<Sequence>,
        limit: usize,
        bodies: bool,
    ) -> Result<Vec<Found>, Error> {
        let full = |found: &[Found]| {
            let bytes: usize = found.iter().map(|f| f.event.body.len()).sum();
            found.len() >= limit || bytes as u64 >= LIST_BYTES.0
        };
        let from = after.map_or(0, |a| a.0.saturating_add(1));
        let mut found = Vec::new();
        if poisoned {
            let sequences: Vec<u64> = self.poisoned.range(from..).map(|(s, _)| *s).collect();
            for sequence in sequences {
                if full(&found) {
                    break;
                }
                let one = self.found(sequence, bodies)?;
                found.extend(one.filter(|f| tenant.is_none_or(|t| *t == f.event.envelope.tenant)));
            }
            return Ok(found);
        }
        let start = self.records.packs.range(..=from).next_back().map_or(0, |(first, _)| *first);
        let mut next = Some(start);
        while let Some(at) = next {
            let Some((first, pack)) = self.records.packs.range(at..).next() else { break };
            let (first, count) = (*first, pack.count);
            next = first.checked_add(1);
            if tenant.is_some_and(|t| t.as_str() != &*pack.group) {
                continue;
            }
            for n in 0..count {
                let sequence = first + u64::from(n);
                if sequence < from || !self.records.is_open(sequence) || self.poisoned.contains_key(&sequence) {
                    continue;
                }
                found.extend(self.found(sequence, bodies)?);
                if full(&found) {
                    return Ok(found);
                }
            }
        }
        Ok(found)
    }

    /// For `status`: figures that are counted on demand.
    pub fn snapshot(&mut self) -> Status {
        let mut status = self.status.clone();
        status.leased = self.leased.len() as u64;
        status.poisoned = self.poisoned.len() as u64;
        status.records = status.records.saturating_sub(status.poisoned);
        status.next_sequence = self.next;
        status.oldest = self.records.packs.values().find(|p| p.left > 0).map(|p| p.at);
        status
    }

    pub fn acknowledge_loss(&mut self) {
        self.status.data_loss_possible = None;
        self.writes.push(Write { tree: Tree::Meta, key: b"loss".to_vec(), value: None });
    }

    /// From now on the newest format; answers the one before and the one now.
    pub fn finalize(&mut self) -> Result<(u8, u8), Failure> {
        let before = self.kv.get(Tree::Meta, b"format")?.and_then(|bytes| bytes.first().copied()).unwrap_or(0);
        self.writes.push(Write { tree: Tree::Meta, key: b"format".to_vec(), value: Some(vec![super::open::FORMAT]) });
        Ok((before, super::open::FORMAT))
    }

    // --- the local broker ---

    /// Adds messages to the batch and answers their ids.
    pub fn publish(&mut self, messages: Vec<Forward>, now: Timestamp) -> Vec<String> {
        let mut ids = Vec::with_capacity(messages.len());
        let mut groups: BTreeMap<String, Vec<(usize, Forward)>> = BTreeMap::new();
        for (n, message) in messages.into_iter().enumerate() {
            ids.push(String::new());
            groups.entry(message_group(&message)).or_default().push((n, message));
        }
        let value_max = self.kv.value_max();
        for (group, messages) in groups {
            let first = self.next_message;
            let mut entries = Vec::with_capacity(messages.len());
            for (n, message) in messages {
                ids[n] = format!("{}:{}", message.topic, self.next_message);
                self.next_message += 1;
                entries.push(New { id: [0; 16], bytes: record::encode_message(&message, now) });
            }
            self.messages.append(first, &group, now, entries, value_max, &mut self.writes);
            let Self { messages, local, .. } = self;
            for (first, pack) in messages.packs.range(first..) {
                local.pack(&pack.group, *first);
            }
        }
        ids
    }

    /// Messages of allowed topics that are due and free.
    pub fn receive(
        &mut self,
        topics: &(dyn Fn(&Topic) -> bool + Send + Sync),
        max: usize,
        now: Timestamp,
        instant: Instant,
    ) -> Result<Vec<Held>, Failure> {
        self.wake(now, instant);
        let mut held = Vec::new();
        while held.len() < max.max(1) {
            let Self { local, messages, out, limits, .. } = self;
            let split =
                |group: &str| group.split_once('\n').map(|(tenant, topic)| (tenant.to_owned(), topic.to_owned()));
            let allowed = |group: &str| {
                split(group).and_then(|(_, topic)| Topic::try_new(&topic).ok()).is_some_and(|topic| topics(&topic))
            };
            let weight = |group: &str| {
                split(group).and_then(|(tenant, _)| Tenant::try_new(&tenant).ok()).map_or(1, |tenant| limits(&tenant).0)
            };
            let skip = |s: u64| out.get(&s).is_some_and(|o| o.held) || !messages.is_open(s);
            let Some(sequence) = local.next(messages, allowed, weight, skip) else { break };
            let message = match self.messages.read(sequence, &*self.kv)? {
                Ok(raw) => record::decode_message(&raw),
                Err(bad) => Err(bad),
            };
            let (forward, published_at) = match message {
                Ok(message) => message,
                Err(bad) => {
                    // The ledger has the event open: its sweeper publishes the reference again.
                    tracing::error!(sequence, %bad, "a message of the local broker cannot be read; it is dropped");
                    self.drop_message(sequence)?;
                    continue;
                }
            };
            if let Some(key) = &forward.ordering_key
                && !self.local.enter(&forward.tenant, key, sequence)
            {
                continue;
            }
            if let Some(at) = forward.deliver_at.filter(|at| *at > now) {
                self.delayed.insert((at, sequence));
                continue;
            }
            let state = self.out.entry(sequence).or_insert(Out { redeliveries: 0, held: false });
            state.held = true;
            let id = format!("{}:{sequence}", forward.topic);
            let redeliveries = state.redeliveries;
            held.push(Held { id, topic: forward.topic.clone(), forward, redeliveries, published_at });
        }
        Ok(held)
    }

    /// Puts messages whose time has come back into the queue.
    pub fn wake(&mut self, now: Timestamp, instant: Instant) -> bool {
        let mut woken = Vec::new();
        while let Some((at, sequence)) = self.delayed.first().copied().filter(|(at, _)| *at <= now) {
            self.delayed.remove(&(at, sequence));
            woken.push(sequence);
        }
        while let Some((at, sequence)) = self.released.first().copied().filter(|(at, _)| *at <= instant) {
            self.released.remove(&(at, sequence));
            woken.push(sequence);
        }
        for sequence in &woken {
            if let Some(group) = self.message_group_of(*sequence) {
                self.local.again(&group, *sequence);
            }
        }
        !woken.is_empty()
    }

    /// How long until a message wakes.
    pub fn next_wake(&self, now: Timestamp, instant: Instant) -> Option<Duration> {
        let delayed = self.delayed.first().map(|(at, _)| at.since(now));
        let released = self.released.first().map(|(at, _)| at.saturating_duration_since(instant));
        delayed.into_iter().chain(released).min()
    }

    fn message_group_of(&self, sequence: u64) -> Option<Arc<str>> {
        self.messages.locate(sequence).map(|(first, _)| self.messages.packs[&first].group.clone())
    }

    fn drop_message(&mut self, sequence: u64) -> Result<(), Failure> {
        self.finish_messages(&[sequence], Timestamp(i64::MAX))
    }

    pub fn ack(&mut self, ids: &[String], now: Timestamp) -> Result<(), Failure> {
        let sequences: Vec<u64> = ids.iter().filter_map(|id| sequence_in(id)).collect();
        self.finish_messages(&sequences, now)
    }

    fn finish_messages(&mut self, sequences: &[u64], now: Timestamp) -> Result<(), Failure> {
        let Self { messages, kv, writes, .. } = self;
        let complete = messages.finish(sequences, |_, _| true, &**kv, writes)?;
        self.retained.extend(complete.into_iter().map(|first| (now, first)));
        self.persist_next();
        for sequence in sequences {
            self.out.remove(sequence);
            let Self { local, messages, .. } = self;
            local.leave(*sequence, |s| messages.locate(s).map(|(first, _)| messages.packs[&first].group.clone()));
        }
        while let Some((at, first)) = self.retained.front().copied() {
            if self.retained.len() <= RETAINED_MAX && now.since(at) < self.retention {
                break;
            }
            self.retained.pop_front();
            let Self { messages, kv, writes, .. } = self;
            messages.remove(first, &**kv, writes)?;
        }
        Ok(())
    }

    pub fn give_back(&mut self, ids: &[String], at: Instant) {
        for sequence in ids.iter().filter_map(|id| sequence_in(id)) {
            if let Some(out) = self.out.get_mut(&sequence).filter(|out| out.held) {
                out.held = false;
                out.redeliveries += 1;
                self.released.insert((at, sequence));
            }
        }
    }

    pub fn backlog(&self) -> Vec<Backlog> {
        let mut topics: BTreeMap<&str, Backlog> = BTreeMap::new();
        for pack in self.messages.packs.values() {
            let topic = pack.group.split_once('\n').map_or("", |(_, topic)| topic);
            let entry = topics.entry(topic).or_insert_with(|| Backlog {
                topic: topic.to_owned(),
                waiting: 0,
                unacknowledged: 0,
                oldest: None,
                retained: 0,
            });
            entry.waiting += u64::from(pack.left);
            entry.retained += u64::from(pack.count - pack.left);
            if pack.left > 0 {
                entry.oldest = Some(entry.oldest.map_or(pack.at, |o| o.min(pack.at)));
            }
        }
        for (sequence, _) in self.out.iter().filter(|(_, out)| out.held) {
            if let Some(group) = self.message_group_of(*sequence)
                && let Some(entry) = group.split_once('\n').and_then(|(_, topic)| topics.get_mut(topic))
            {
                entry.waiting = entry.waiting.saturating_sub(1);
                entry.unacknowledged += 1;
            }
        }
        topics.into_values().collect()
    }

    pub fn browse(&mut self, topic: &Topic, limit: usize) -> Result<Vec<Held>, Failure> {
        let firsts: Vec<(u64, u16)> = self
            .messages
            .packs
            .iter()
            .filter(|(_, pack)| pack.group.split_once('\n').is_some_and(|(_, t)| t == topic.as_str()))
            .map(|(first, pack)| (*first, pack.count))
            .collect();
        let mut found = Vec::new();
        for (first, count) in firsts {
            for sequence in first..first + u64::from(count) {
                if found.len() == limit {
                    return Ok(found);
                }
                if let Ok(raw) = self.messages.read(sequence, &*self.kv)?
                    && let Ok((forward, published_at)) = record::decode_message(&raw)
                {
                    let id = format!("{topic}:{sequence}");
                    let redeliveries = self.out.get(&sequence).map_or(0, |out| out.redeliveries);
                    found.push(Held { id, topic: topic.clone(), forward, redeliveries, published_at });
                }
            }
        }
        Ok(found)
    }

    // --- the batch ---

    /// Commits what has gathered.
    pub fn commit(&mut self) -> Result<(), Failure> {
        self.batch_keys.clear();
        self.batch_ids.clear();
        let writes = std::mem::take(&mut self.writes);
        if writes.is_empty() {
            return Ok(());
        }
        self.records.forget_cache_if_written(&writes);
        self.messages.forget_cache_if_written(&writes);
        self.kv.commit(writes)?;
        self.durable_next = self.next;
        self.status.syncs_total += 1;
        Ok(())
    }

    /// Every record that is in the store: waiting, leased and poisoned ones.
    pub fn open_sequences(&self) -> impl Iterator<Item = u64> + '_ {
        self.records
            .packs
            .iter()
            .flat_map(|(first, pack)| (0..pack.count).filter(|n| !pack.is_done(*n)).map(move |n| first + u64::from(n)))
    }

    /// Reads every open record: for `verify` and tests.
    pub fn check_all(&mut self) -> Result<(u64, Vec<(u64, Bad)>), Failure> {
        let sequences: Vec<u64> = self.open_sequences().collect();
        let (mut good, mut bad) = (0, Vec::new());
        for sequence in sequences {
            let raw = self.records.read(sequence, &*self.kv)?;
            match raw.and_then(|raw| record::decode(&raw, self.seal.as_deref()).map(drop)) {
                Ok(()) => good += 1,
                Err(problem) => bad.push((sequence, problem)),
            }
        }
        Ok((good, bad))
    }
}

fn sequence_in(id: &str) -> Option<u64> {
    id.rsplit_once(':')?.1.parse().ok()
}

pub fn failed(doing: &'static str, failure: &Failure) -> Error {
    Error::Store { doing, cause: failure.to_string().into() }
}
