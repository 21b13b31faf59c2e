//! Durable local queue for events on their way to the broker. (Contract; see the header of the house for the invariants.)

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes as Body;

use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::event::Event;
use crate::ids::{Environment, ExecutionId, Key, OrderingKey, Tenant, Topic};
use crate::units::Bytes;

/// Position of a record: grows by one per accepted event, never reused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Sequence(pub u64);

/// An event to append.
#[derive(Clone, Debug)]
pub struct Append {
    pub event: Event,
    /// The caller's `Idempotency-Key`.
    pub idempotency_key: Option<String>,
    /// What the key answers later, kept in the same batch as the record (the 202 body without `duplicate`).
    pub answer: Body,
}

/// The record is on disk (or was already).
#[derive(Clone, Debug)]
pub struct Appended {
    pub execution_id: ExecutionId,
    /// `None` for a duplicate whose record has already left.
    pub sequence: Option<Sequence>,
    pub duplicate: bool,
    /// The first request's answer when this one is a duplicate by idempotency key.
    pub answer: Option<Body>,
}

/// A record that the relay works on. Dropping it releases nothing: settle it, or the lease runs out.
#[derive(Clone, Debug)]
pub struct Leased {
    pub sequence: Sequence,
    pub event: Event,
}

/// What becomes of a leased record. All of one call are one batch.
#[derive(Clone, Debug)]
pub enum Settle {
    /// Payload store and broker have it. With `forward`, the local broker gets the message in the same batch.
    Confirm { sequence: Sequence, forward: Option<Forward> },
    /// It can never be relayed: kept, counted, listed.
    Poison { sequence: Sequence, reason: String },
    /// Back to the queue, at its old place.
    Release { sequence: Sequence },
}

/// A message for the local broker.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Forward {
    pub topic: Topic,
    pub ordering_key: Option<OrderingKey>,
    pub tenant: Tenant,
    /// The reference's claims, see `broker::Claims`.
    pub claims: Vec<u8>,
    pub properties: BTreeMap<String, String>,
    /// Not before this time.
    pub deliver_at: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug)]
pub struct LeaseLimit {
    pub count: usize,
    pub bytes: Bytes,
}

/// A record as `outbox ls|show` and the API see it.
#[derive(Clone, Debug)]
pub struct Found {
    pub sequence: Sequence,
    pub event: Event,
    pub leased: bool,
    /// Why it was poisoned.
    pub poisoned: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    Done,
    /// The relay has it: ask the ledger in a moment.
    Leased,
    Absent,
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Status {
    pub records: u64,
    pub bytes: u64,
    pub bytes_max: u64,
    pub count_max: u64,
    pub leased: u64,
    pub poisoned: u64,
    pub oldest: Option<Timestamp>,
    pub disk_free: u64,
    pub next_sequence: u64,
    pub tenants: BTreeMap<String, TenantStatus>,
    /// Salvage after corruption: records found and lost, until an operator acknowledges it.
    pub data_loss_possible: Option<String>,
    /// The last failed write or sync, and how often the store was reopened after one.
    pub last_error: Option<String>,
    pub reopened: u64,
    pub appended_total: u64,
    pub confirmed_total: u64,
    pub syncs_total: u64,
}

#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct TenantStatus {
    pub records: u64,
    pub bytes: u64,
}

/// What the caller of the bridge may do about an error. `bridge/respond.rs` turns it into a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// 503 and `Retry-After`.
    Later,
    /// 429 and `Retry-After`.
    TenantLater,
    /// 413: sending it again cannot help.
    TooLarge,
    /// 409: the id is taken by another body.
    Conflict,
    /// 422: the key was used with another body.
    KeyReused,
    /// 500.
    Broken,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("the outbox holds {used} of {max}")]
    Full { used: Bytes, max: Bytes },
    #[error("the outbox holds {used} of at most {max} records")]
    FullCount { used: u64, max: u64 },
    #[error("only {free} of disk are free, {min} are kept in reserve")]
    Disk { free: Bytes, min: Bytes },
    #[error("tenant {tenant} has {used} waiting of its quota of {max}")]
    Quota { tenant: Tenant, used: Bytes, max: Bytes },
    #[error("the record is {size}, the limit is {max}")]
    Oversized { size: Bytes, max: Bytes },
    #[error("execution_id {0} is already used by an event with another body")]
    Conflict(ExecutionId),
    #[error("this Idempotency-Key was used with another body")]
    KeyReused,
    #[error("cannot {doing}: {cause}; the outcome is unknown, retry with the same key")]
    Store { doing: &'static str, cause: Arc<str> },
    #[error("another process holds {0}: stop it, or let it do the work (`dealscale status`)")]
    Locked(String),
    #[error("the outbox is closed")]
    Closed,
}

impl Error {
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Full { .. } | Self::FullCount { .. } | Self::Disk { .. } | Self::Store { .. } | Self::Closed => {
                Verdict::Later
            }
            Self::Quota { .. } => Verdict::TenantLater,
            Self::Oversized { .. } => Verdict::TooLarge,
            Self::Conflict(_) => Verdict::Conflict,
            Self::KeyReused => Verdict::KeyReused,
            Self::Locked(_) => Verdict::Broken,
        }
    }
}

/// Quota and weight of a tenant, from its declaration.
pub type TenantLimits = Arc<dyn Fn(&Tenant) -> (u64, Bytes) + Send + Sync>;


use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};

struct Waiting { tenant: Tenant, bytes: u64, key: Option<OrderingKey>, id: ExecutionId, at: Timestamp }
struct Msg { forward: Forward, held: Option<Instant>, not_before: Option<Instant>, redeliveries: u32, at: Timestamp }
struct St {
    db: sled::Db,
    next: u64,
    waiting: BTreeMap<u64, Waiting>,
    leased: HashMap<u64, Instant>,
    busy: HashSet<(Tenant, OrderingKey)>,
    ids: HashMap<(Tenant, ExecutionId), u64>,
    poisoned: BTreeMap<u64, String>,
    msgs: BTreeMap<u64, Msg>,
    mbusy: HashSet<(Tenant, OrderingKey)>,
    next_msg: u64,
    status: Status,
    pending: Vec<oneshot::Sender<()>>,
    closed: bool,
}
struct Shared { st: Mutex<St>, wake: Condvar, records: Notify, messages: Notify, clock: Clock, settings: config::Outbox, file: std::fs::File, limits: TenantLimits }
#[derive(Clone)]
pub struct Outbox { s: Arc<Shared> }
#[derive(Clone)]
pub struct Local { s: Arc<Shared> }

fn enc(e: &Event) -> Vec<u8> { let h = serde_json::to_vec(&e.envelope).expect("plain"); let mut v = (h.len() as u32).to_be_bytes().to_vec(); v.extend(h); v.extend_from_slice(&e.body); v }
fn dec(v: &[u8]) -> Event { let n = u32::from_be_bytes(v[..4].try_into().expect("4")) as usize; Event { envelope: serde_json::from_slice(&v[4..4 + n]).expect("ours"), body: Body::copy_from_slice(&v[4 + n..]) } }

impl Shared {
    fn st(&self) -> MutexGuard<'_, St> { self.st.lock().unwrap_or_else(PoisonError::into_inner) }
    fn sync(&self, st: &mut St) -> oneshot::Receiver<()> { let (t, r) = oneshot::channel(); st.pending.push(t); self.wake.notify_one(); r }
}

impl Outbox {
    pub fn open(c: &config::Outbox, _e: &Environment, limits: TenantLimits, clock: Clock) -> Result<Self, Error> {
        let err = |e: String| Error::Store { doing: "open", cause: e.into() };
        std::fs::create_dir_all(&c.dir).map_err(|e| err(e.to_string()))?;
        let db = sled::Config::new().path(&c.dir).segment_size(2 << 20).open().map_err(|e| if e.to_string().contains("lock") { Error::Locked(c.dir.display().to_string()) } else { err(e.to_string()) })?;
        let file = std::fs::File::open(c.dir.join("db")).map_err(|e| err(e.to_string()))?;
        let mut st = St { next: 1, waiting: BTreeMap::new(), leased: HashMap::new(), busy: HashSet::new(), ids: HashMap::new(), poisoned: BTreeMap::new(), msgs: BTreeMap::new(), mbusy: HashSet::new(), next_msg: 1, status: Status { bytes_max: c.bytes_max.0, count_max: c.count_max, ..Status::default() }, pending: Vec::new(), closed: false, db };
        let t = st.db.open_tree("rec").map_err(|e| err(e.to_string()))?;
        for kv in t.iter() { let (k, v) = kv.map_err(|e| err(e.to_string()))?; let seq = u64::from_be_bytes(k.as_ref().try_into().expect("8")); let e = dec(&v); st.add(seq, &e); }
        let p = st.db.open_tree("poison").map_err(|e| err(e.to_string()))?;
        for kv in p.iter() { let (k, v) = kv.map_err(|e| err(e.to_string()))?; st.poisoned.insert(u64::from_be_bytes(k.as_ref().try_into().expect("8")), String::from_utf8_lossy(&v).into_owned()); }
        let m = st.db.open_tree("msg").map_err(|e| err(e.to_string()))?;
        for kv in m.iter() { let (k, v) = kv.map_err(|e| err(e.to_string()))?; let n = u64::from_be_bytes(k.as_ref().try_into().expect("8")); st.msgs.insert(n, Msg { forward: serde_json::from_slice(&v).expect("ours"), held: None, not_before: None, redeliveries: 0, at: clock.now() }); st.next_msg = n + 1; }
        if let Some(v) = st.db.get("next").map_err(|e| err(e.to_string()))? { st.next = u64::from_be_bytes(v.as_ref().try_into().expect("8")); }
        let s = Arc::new(Shared { st: Mutex::new(st), wake: Condvar::new(), records: Notify::new(), messages: Notify::new(), clock, settings: c.clone(), file, limits });
        let weak = Arc::downgrade(&s);
        std::thread::spawn(move || loop {
            let Some(s) = weak.upgrade() else { return };
            let (pending, db) = { let st = s.st(); let (mut st, _) = s.wake.wait_timeout(st, Duration::from_secs(1)).unwrap_or_else(PoisonError::into_inner); (std::mem::take(&mut st.pending), st.db.clone()) };
            if pending.is_empty() { continue; }
            let _ = db.flush(); let _ = s.file.sync_data();
            for p in pending { let _ = p.send(()); }
        });
        Ok(Self { s })
    }
    pub async fn append(&self, a: Append) -> Result<Appended, Error> { self.append_batch(vec![a]).await.pop().expect("one") }
    pub async fn append_batch(&self, items: Vec<Append>) -> Vec<Result<Appended, Error>> {
        let (out, r) = { let mut st = self.s.st(); if st.closed { return items.iter().map(|_| Err(Error::Closed)).collect(); }
            let out: Vec<_> = items.into_iter().map(|a| { let size = a.event.body.len() as u64;
                if st.status.bytes + size > self.s.settings.bytes_max.0 { return Err(Error::Full { used: Bytes(st.status.bytes), max: self.s.settings.bytes_max }); }
                let (_, quota) = (self.s.limits)(&a.event.envelope.tenant); let used = st.status.tenants.get(a.event.envelope.tenant.as_str()).map_or(0, |t| t.bytes);
                if used + size > quota.0 { return Err(Error::Quota { tenant: a.event.envelope.tenant.clone(), used: Bytes(used), max: quota }); }
                let kt = st.db.open_tree("keys").expect("tree");
                let kk = a.idempotency_key.as_ref().map(|k| format!("{}\n{k}", a.event.envelope.tenant));
                if let Some(kk) = &kk && let Ok(Some(v)) = kt.get(kk) { if v[..32] != a.event.envelope.body_hash.0 { return Err(Error::KeyReused); } return Ok(Appended { execution_id: a.event.envelope.execution_id, sequence: None, duplicate: true, answer: Some(Body::copy_from_slice(&v[32..])) }); }
                let id = (a.event.envelope.tenant.clone(), a.event.envelope.execution_id);
                if let Some(seq) = st.ids.get(&id).copied() { let old = st.read(seq); if old.envelope.body_hash != a.event.envelope.body_hash { return Err(Error::Conflict(id.1)); } return Ok(Appended { execution_id: id.1, sequence: Some(Sequence(seq)), duplicate: true, answer: None }); }
                let seq = st.next; st.next += 1;
                if let Some(kk) = kk { let mut v = a.event.envelope.body_hash.0.to_vec(); v.extend_from_slice(&a.answer); let _ = kt.insert(kk, v); }
                let _ = st.db.open_tree("rec").expect("tree").insert(seq.to_be_bytes(), enc(&a.event)); let next = st.next; let _ = st.db.insert("next", &next.to_be_bytes());
                st.add(seq, &a.event); st.status.appended_total += 1;
                Ok(Appended { execution_id: id.1, sequence: Some(Sequence(seq)), duplicate: false, answer: None }) }).collect();
            let r = self.s.sync(&mut st); (out, r) };
        let _ = r.await; self.s.records.notify_waiters(); out
    }
    pub async fn lease(&self, limit: LeaseLimit) -> Result<Vec<Leased>, Error> { loop { let n = self.s.records.notified(); tokio::pin!(n); n.as_mut().enable();
        { let mut st = self.s.st(); if st.closed { return Err(Error::Closed); } let seqs: Vec<u64> = st.waiting.keys().copied().filter(|q| !st.leased.contains_key(q) && !st.poisoned.contains_key(q)).take(limit.count).collect(); let mut out = Vec::new();
            for q in seqs { let w = &st.waiting[&q]; if let Some(k) = &w.key { let k = (w.tenant.clone(), k.clone()); if !st.busy.insert(k) { continue; } } st.leased.insert(q, Instant::now()); out.push(Leased { sequence: Sequence(q), event: st.read(q) }); }
            if !out.is_empty() { return Ok(out); } }
        n.await; } }
    pub async fn settle(&self, settles: Vec<Settle>) -> Result<(), Error> { let r = { let mut st = self.s.st(); for x in settles { match x {
            Settle::Confirm { sequence, forward } => { if st.leased.remove(&sequence.0).is_none() { continue; } st.gone(sequence.0); st.status.confirmed_total += 1; if let Some(f) = forward { let now = self.s.clock.now(); st.put(f, now); } }
            Settle::Poison { sequence, reason } => { st.leased.remove(&sequence.0); st.unbusy(sequence.0); let _ = st.db.open_tree("poison").expect("tree").insert(sequence.0.to_be_bytes(), reason.as_bytes()); st.poisoned.insert(sequence.0, reason); }
            Settle::Release { sequence } => { st.leased.remove(&sequence.0); st.unbusy(sequence.0); } } } self.s.sync(&mut st) }; let _ = r.await; self.s.records.notify_waiters(); self.s.messages.notify_waiters(); Ok(()) }
    pub async fn find(&self, key: &Key) -> Result<Option<Found>, Error> { let st = self.s.st(); Ok(st.ids.get(&(key.tenant.clone(), key.execution_id)).map(|q| st.found(*q))) }
    pub async fn list(&self, tenant: Option<Tenant>, poisoned: bool, after: Option<Sequence>, limit: usize) -> Result<Vec<Found>, Error> { let st = self.s.st(); Ok(st.waiting.range(after.map_or(0, |a| a.0 + 1)..).filter(|(q, w)| tenant.as_ref().is_none_or(|t| *t == w.tenant) && st.poisoned.contains_key(q) == poisoned).take(limit).map(|(q, _)| st.found(*q)).collect()) }
    pub async fn cancel(&self, key: &Key) -> Result<Cancelled, Error> { let r = { let mut st = self.s.st(); let Some(q) = st.ids.get(&(key.tenant.clone(), key.execution_id)).copied() else { return Ok(Cancelled::Absent) }; if st.leased.contains_key(&q) { return Ok(Cancelled::Leased); } st.gone(q); self.s.sync(&mut st) }; let _ = r.await; Ok(Cancelled::Done) }
    pub async fn repair_poisoned(&self, s: Sequence, discard: bool) -> Result<bool, Error> { { let mut st = self.s.st(); if st.poisoned.remove(&s.0).is_none() { return Ok(false); } let _ = st.db.open_tree("poison").expect("tree").remove(s.0.to_be_bytes()); if discard { st.gone(s.0); } } self.s.records.notify_waiters(); Ok(true) }
    pub async fn acknowledge_data_loss(&self) -> Result<(), Error> { Ok(()) }
    pub fn status(&self) -> Status { let st = self.s.st(); let mut x = st.status.clone(); x.records = st.waiting.len() as u64; x.leased = st.leased.len() as u64; x.poisoned = st.poisoned.len() as u64; x.oldest = st.waiting.values().next().map(|w| w.at); x }
    pub fn local(&self) -> Local { Local { s: self.s.clone() } }
    pub async fn close(&self) -> Result<(), Error> { let r = { let mut st = self.s.st(); st.closed = true; self.s.sync(&mut st) }; let _ = r.await; self.s.records.notify_waiters(); self.s.messages.notify_waiters(); Ok(()) }
}
impl St {
    fn add(&mut self, q: u64, e: &Event) { let n = e.body.len() as u64; self.status.bytes += n; let t = self.status.tenants.entry(e.envelope.tenant.to_string()).or_default(); t.bytes += n; t.records += 1; self.ids.insert((e.envelope.tenant.clone(), e.envelope.execution_id), q); self.waiting.insert(q, Waiting { tenant: e.envelope.tenant.clone(), bytes: n, key: e.envelope.ordering_key.clone(), id: e.envelope.execution_id, at: e.envelope.accepted_at }); if q >= self.next { self.next = q + 1; } }
    fn unbusy(&mut self, q: u64) { if let Some(w) = self.waiting.get(&q) && let Some(k) = &w.key { self.busy.remove(&(w.tenant.clone(), k.clone())); } }
    fn gone(&mut self, q: u64) { self.unbusy(q); if let Some(w) = self.waiting.remove(&q) { self.status.bytes -= w.bytes; if let Some(t) = self.status.tenants.get_mut(w.tenant.as_str()) { t.bytes -= w.bytes; t.records -= 1; } self.ids.remove(&(w.tenant, w.id)); } let _ = self.db.open_tree("rec").expect("tree").remove(q.to_be_bytes()); }
    fn read(&self, q: u64) -> Event { dec(&self.db.open_tree("rec").expect("tree").get(q.to_be_bytes()).expect("read").expect("there")) }
    fn found(&self, q: u64) -> Found { Found { sequence: Sequence(q), event: self.read(q), leased: self.leased.contains_key(&q), poisoned: self.poisoned.get(&q).cloned() } }
    fn put(&mut self, f: Forward, now: Timestamp) -> String { let n = self.next_msg; self.next_msg += 1; let id = format!("{}:{n}", f.topic); let _ = self.db.open_tree("msg").expect("tree").insert(n.to_be_bytes(), serde_json::to_vec(&f).expect("plain")); self.msgs.insert(n, Msg { forward: f, held: None, not_before: None, redeliveries: 0, at: now }); id }
}
/// A message that a consumer of the local broker holds.
#[derive(Clone, Debug)]
pub struct Held {
    /// `topic:sequence`, unique in the environment.
    pub id: String,
    pub topic: Topic,
    pub forward: Forward,
    pub redeliveries: u32,
    pub published_at: Timestamp,
}

#[derive(Clone, Debug, serde::Serialize)]
pub struct Backlog {
    pub topic: String,
    pub waiting: u64,
    pub unacknowledged: u64,
    pub oldest: Option<Timestamp>,
    pub retained: u64,
}


impl Local {
    pub async fn publish(&self, messages: Vec<Forward>) -> Result<Vec<String>, Error> { let (ids, r) = { let mut st = self.s.st(); let now = self.s.clock.now(); let ids = messages.into_iter().map(|f| st.put(f, now)).collect(); (ids, self.s.sync(&mut st)) }; let _ = r.await; self.s.messages.notify_waiters(); Ok(ids) }
    pub async fn receive(&self, topics: Arc<dyn Fn(&Topic) -> bool + Send + Sync>, max: usize) -> Result<Vec<Held>, Error> { loop { let n = self.s.messages.notified(); tokio::pin!(n); n.as_mut().enable();
        { let mut st = self.s.st(); if st.closed { return Err(Error::Closed); } let now = Instant::now(); let wall = self.s.clock.now(); let st = &mut *st; let mut out = Vec::new(); let mut blocked: BTreeSet<(Tenant, OrderingKey)> = BTreeSet::new();
            for (q, m) in &mut st.msgs { if out.len() >= max { break; } if m.held.is_some() || !topics(&m.forward.topic) { continue; } let k = m.forward.ordering_key.clone().map(|k| (m.forward.tenant.clone(), k)); if let Some(k) = &k && (st.mbusy.contains(k) || blocked.contains(k)) { continue; } if m.not_before.is_some_and(|t| t > now) || m.forward.deliver_at.is_some_and(|t| t > wall) { if let Some(k) = k { blocked.insert(k); } continue; } if let Some(k) = k { st.mbusy.insert(k); } m.held = Some(now); out.push(Held { id: format!("{}:{q}", m.forward.topic), topic: m.forward.topic.clone(), forward: m.forward.clone(), redeliveries: m.redeliveries, published_at: m.at }); }
            if !out.is_empty() { return Ok(out); } }
        let _ = tokio::time::timeout(Duration::from_millis(100), n).await; } }
    pub async fn ack(&self, ids: Vec<String>) -> Result<(), Error> { let r = { let mut st = self.s.st(); for id in ids { let Some(q) = id.rsplit(':').next().and_then(|q| q.parse().ok()) else { continue }; let q: u64 = q; if let Some(m) = st.msgs.remove(&q) { if let Some(k) = m.forward.ordering_key { st.mbusy.remove(&(m.forward.tenant, k)); } let _ = st.db.open_tree("msg").expect("tree").remove(q.to_be_bytes()); } } self.s.sync(&mut st) }; let _ = r.await; self.s.messages.notify_waiters(); Ok(()) }
    pub async fn release(&self, ids: Vec<String>, after: Duration) -> Result<(), Error> { { let mut st = self.s.st(); let st = &mut *st; for id in ids { let Some(q) = id.rsplit(':').next().and_then(|q| q.parse().ok()) else { continue }; let q: u64 = q; if let Some(m) = st.msgs.get_mut(&q) { m.held = None; m.redeliveries += 1; m.not_before = Some(Instant::now() + after); if let Some(k) = &m.forward.ordering_key { st.mbusy.remove(&(m.forward.tenant.clone(), k.clone())); } } } } self.s.messages.notify_waiters(); Ok(()) }
    pub async fn backlog(&self) -> Result<Vec<Backlog>, Error> { let st = self.s.st(); let mut all: BTreeMap<String, Backlog> = BTreeMap::new(); for m in st.msgs.values() { let b = all.entry(m.forward.topic.to_string()).or_insert(Backlog { topic: m.forward.topic.to_string(), waiting: 0, unacknowledged: 0, oldest: Some(m.at), retained: 0 }); if m.held.is_some() { b.unacknowledged += 1; } else { b.waiting += 1; } } Ok(all.into_values().collect()) }
    pub async fn browse(&self, topic: &Topic, limit: usize) -> Result<Vec<Held>, Error> { let st = self.s.st(); Ok(st.msgs.iter().filter(|(_, m)| m.forward.topic == *topic).take(limit).map(|(q, m)| Held { id: format!("{topic}:{q}"), topic: topic.clone(), forward: m.forward.clone(), redeliveries: m.redeliveries, published_at: m.at }).collect()) }
}

/// (Contract.)
pub mod tools {
    use std::path::Path;

    use super::{Error, Outbox};
    use crate::config;
    use crate::event::Event;
    use crate::ids::Environment;

    pub struct Entry {
        pub event: Event,
        pub poisoned: Option<String>,
    }
    #[derive(serde::Serialize)]
    pub struct Report {
        pub records: u64,
    }
    impl Report {
        pub fn is_sound(&self) -> bool {
            unimplemented!()
        }
    }
    pub fn verify(_config: &config::Outbox) -> Result<Report, Error> {
        unimplemented!()
    }
    pub fn open_alone(_config: &config::Outbox, _environment: &Environment) -> Result<Outbox, Error> {
        unimplemented!()
    }
    pub struct Export {}
    impl Export {
        pub fn create(_dir: &Path) -> std::io::Result<Self> {
            unimplemented!()
        }
        pub fn write(&mut self, _event: &Event, _poisoned: Option<&str>) -> std::io::Result<()> {
            unimplemented!()
        }
        pub fn finish(self) -> std::io::Result<u64> {
            unimplemented!()
        }
    }
    pub fn read_export(_dir: &Path) -> std::io::Result<Box<dyn Iterator<Item = std::io::Result<Entry>>>> {
        unimplemented!()
    }
}
