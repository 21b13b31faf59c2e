//! Apache Pulsar as the broker: what a fleet of appliances shares.
//!
//! [`link`] is the connection, [`produce`] sends, [`consume`] receives, [`held`] is the pure state of what was received,
//! [`fleet`] compares signing keys with the other appliances.
//! The crate `pulsar` is not trusted to recover alone: every operation has a deadline, and what misses it is dropped and built
//! again with backoff (`docs/topology.md` lists the crate's and the broker's traps and our answers).
//!
//! # Background tasks
//! One that looks for topics every [`DISCOVER`] (and is the heartbeat behind `status`), and one consumer per topic or
//! partition ([`consume`]).

mod consume;
mod fleet;
mod held;
mod link;
mod produce;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ::pulsar::message::proto::command_get_topics_of_namespace::Mode;
use ::pulsar::producer::Message;
use ::pulsar::proto::CommandSendReceipt;
use arc_swap::ArcSwap;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Notify, mpsc};

pub use consume::Lease;
use consume::{Names, Partition, Task};
use fleet::{Fleet, Keys};
use held::Settled;
use link::Link;
use produce::{Kind, Outlet, Sent};

use super::admin::{self, Admin};
use super::auth::Auth;
use super::topology::{Topology, base};
use super::{Error, Handle, KeyRing, Outgoing, Receipt, Received, Rejection, Status, Topics, Verified, property};
use crate::clock::Clock;
use crate::config::broker::Pulsar as Config;
use crate::ids::{Environment, OrderingKey, Topic};
use crate::observe::broker as events;
use crate::outbox::{Backlog, Outbox, Sequence, Settle};
use crate::supervise::{Failures, Supervisor};

/// How often topics are looked for: the longest wait of a new tenant's first event. Also the heartbeat.
const DISCOVER: Duration = Duration::from_secs(2);
/// How often subscriptions that were seen are looked at again.
const RECHECK: Duration = Duration::from_secs(30);
/// Topics whose consumers are asked for their keys: an appliance consumes all of them, so one would do.
const ASKED: usize = 3;
/// An item by its place, and what became of it.
type Outcome = (usize, Result<Receipt, Error>);

/// REST requests at once, so that many tenants' figures do not burden a broker.
const REST: usize = 8;

pub(super) struct Pulsar {
    shared: Arc<Shared>,
    supervisor: Supervisor,
    failures: tokio::sync::Mutex<Failures>,
}

struct Shared {
    config: Config,
    environment: Environment,
    keys: Arc<KeyRing>,
    topics: Topics,
    clock: Clock,
    link: Arc<Link>,
    admin: Admin,
    topology: Topology,
    /// Topics whose subscriptions were seen, and when.
    seen: Mutex<HashMap<Topic, Instant>>,
    fleet: Fleet,
    /// One makes topics at a time; the others find them made.
    making: tokio::sync::Mutex<()>,
    outlets: Mutex<HashMap<Topic, Arc<Outlet>>>,
    partitions: ArcSwap<Vec<Arc<Partition>>>,
    /// Where the next `receive` begins.
    turn: AtomicUsize,
    ready: Arc<Notify>,
    /// A topic was made: look for it now.
    look: Notify,
    consumer_name: String,
}

impl Pulsar {
    pub(super) fn open(
        config: &Config,
        environment: Environment,
        keys: Arc<KeyRing>,
        topics: Topics,
        clock: Clock,
    ) -> Result<Arc<Self>, Error> {
        let fail = |cause: String| Error::Unavailable { doing: "open the broker", cause: cause.into() };
        let auth = Auth::new(&config.auth, config.ca_file.as_deref(), config.operation_timeout.0).map_err(fail)?;
        let admin = Admin::new(config, auth.clone()).map_err(fail)?;
        let topology = Topology::with(config, admin.clone(), &topics, Vec::new()).map_err(fail)?;
        let link = Arc::new(Link::new(config, auth, admin.clone(), clock.clone()).map_err(fail)?);
        let shared = Arc::new(Shared {
            config: config.clone(),
            environment,
            keys,
            topics,
            clock,
            link,
            admin,
            topology,
            seen: Mutex::default(),
            fleet: Fleet::default(),
            making: tokio::sync::Mutex::default(),
            outlets: Mutex::default(),
            partitions: ArcSwap::default(),
            turn: AtomicUsize::new(0),
            ready: Arc::new(Notify::new()),
            look: Notify::new(),
            consumer_name: format!("dealscale-{}", uuid::Uuid::new_v4()),
        });
        let (supervisor, failures) = Supervisor::new();
        let discovery = Discovery { shared: shared.clone(), supervisor: supervisor.clone(), known: BTreeSet::new() };
        supervisor.spawn("broker discovery", discovery.run());
        Ok(Arc::new(Self { shared, supervisor, failures: tokio::sync::Mutex::new(failures) }))
    }

    pub(super) async fn relay(&self, outbox: &Outbox, items: Vec<(Sequence, Outgoing)>) -> Vec<Result<Receipt, Error>> {
        let (sequences, items): (Vec<_>, Vec<_>) = items.into_iter().unzip();
        let (results, mut arriving) = self.shared.start(items);
        let confirming = async {
            let mut confirmed: Vec<Option<Result<Receipt, Error>>> = sequences.iter().map(|_| None).collect();
            let mut group = Vec::new();
            // One sync for everything that came while the last one was under way.
            while arriving.recv_many(&mut group, sequences.len().max(1)).await > 0 {
                let settles: Vec<_> = group
                    .iter()
                    .filter(|(_, result)| result.is_ok())
                    .map(|(at, _)| Settle::Confirm { sequence: sequences[*at], forward: None })
                    .collect();
                let settled = if settles.is_empty() { Ok(()) } else { outbox.settle(settles).await };
                for (at, result) in group.drain(..) {
                    let result = match &settled {
                        Err(error) if result.is_ok() => Err(Error::Outbox(error.clone())),
                        _ => result,
                    };
                    confirmed[at] = Some(result);
                }
            }
            confirmed
        };
        let ((), confirmed) = tokio::join!(results, confirming);
        confirmed.into_iter().map(|result| result.unwrap_or_else(|| Err(lost()))).collect()
    }

    pub(super) async fn publish(&self, items: Vec<Outgoing>) -> Vec<Result<Receipt, Error>> {
        let count = items.len();
        let (results, mut arriving) = self.shared.start(items);
        let collecting = async {
            let mut all: Vec<Option<Result<Receipt, Error>>> = (0..count).map(|_| None).collect();
            while let Some((at, result)) = arriving.recv().await {
                all[at] = Some(result);
            }
            all
        };
        let ((), all) = tokio::join!(results, collecting);
        all.into_iter().map(|result| result.unwrap_or_else(|| Err(lost()))).collect()
    }

    /// The reference as it travels.
    pub(super) fn sign(&self, claims: &super::Claims) -> Vec<u8> {
        self.shared.keys.sign(claims).into_bytes()
    }

    pub(super) async fn dead_letter(
        &self,
        topic: &Topic,
        raw: &[u8],
        properties: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let letters = topic.dead_letter();
        self.shared.ensure(&letters).await?;
        let message =
            Message { payload: raw.to_vec(), properties: properties.into_iter().collect(), ..Message::default() };
        let outlet = self.shared.outlet(&letters);
        let mut sent = outlet.send(Kind::Single, vec![message]).await;
        let result = match sent.pop() {
            Some(Ok(sent)) => outlet.receipt(sent).await,
            Some(Err(cause)) => Err(cause),
            None => Err("nothing was sent".into()),
        };
        match result {
            Ok(_) => Ok(()),
            Err(cause) => {
                self.shared.forget(&letters);
                events::PublishFailed { topic: &letters, count: 1, cause: &cause }.emit();
                Err(Error::Unavailable { doing: "publish a dead letter", cause })
            }
        }
    }

    pub(super) async fn receive(&self, max: usize) -> Vec<Received> {
        let shared = &self.shared;
        loop {
            let ready = shared.ready.notified();
            tokio::pin!(ready);
            ready.as_mut().enable();
            let received = shared.take(max.max(1));
            if !received.is_empty() {
                return received;
            }
            let due = shared.partitions.load().iter().filter_map(|partition| partition.next_due()).min();
            let sleep = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = ready => {}
                () = sleep => {}
            }
        }
    }

    pub(super) async fn ack(&self, messages: Vec<Received>) -> Result<(), Error> {
        let count = messages.len();
        let mut parked = false;
        let mut groups: Vec<(Arc<Partition>, Vec<held::Entry>)> = Vec::new();
        for message in messages {
            let Handle::Pulsar(lease) = message.handle else { continue };
            let (partition, settled) = lease.settle();
            match settled {
                Settled::Nothing => {}
                Settled::Parked => parked = true,
                Settled::Acknowledge(entry) => {
                    match groups.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &partition)) {
                        Some((_, entries)) => entries.push(entry),
                        None => groups.push((partition, vec![entry])),
                    }
                }
            }
        }
        let mut flushes: FuturesUnordered<_> =
            groups.iter_mut().map(|(partition, entries)| partition.acknowledge(std::mem::take(entries))).collect();
        let mut failed: Option<Arc<str>> = parked.then(|| "the connection that delivered it is gone".into());
        while let Some(result) = flushes.next().await {
            failed = failed.or(result.err());
        }
        events::Acknowledged { kind: "pulsar", count }.emit();
        match failed {
            None => Ok(()),
            Some(cause) => {
                Err(Error::Unavailable { doing: "acknowledge now; it is done when the message comes again", cause })
            }
        }
    }

    pub(super) fn release(&self, message: Received, after: Duration) {
        if let Handle::Pulsar(lease) = message.handle {
            lease.release(after);
        }
    }

    /// Figures of every topic of the namespace, dead letters included.
    pub(super) async fn backlog(&self) -> Result<Vec<Backlog>, Error> {
        let shared = &self.shared;
        let unavailable =
            |error: admin::Error| Error::Unavailable { doing: "read the backlog", cause: error.to_string().into() };
        let names = shared.admin.topics().await.map_err(unavailable)?;
        let mut topics: BTreeMap<String, Backlog> = BTreeMap::new();
        let mut figures = futures_util::stream::iter(names.into_iter().filter(|name| !name.starts_with("__")).map(
            |name| async move {
                let figures = tokio::try_join!(shared.admin.stats(&name), shared.admin.entries(&name));
                (name, figures)
            },
        ))
        .buffer_unordered(REST);
        while let Some((name, figures)) = figures.next().await {
            let (stats, entries) = figures.map_err(unavailable)?;
            let topic = base(&name).to_owned();
            let sum = topics.entry(topic.clone()).or_insert_with(|| Backlog {
                topic,
                waiting: 0,
                unacknowledged: 0,
                oldest: None,
                retained: 0,
            });
            let Some(own) = stats.unwrap_or_default().subscriptions.remove(&shared.config.subscription) else {
                continue;
            };
            let (backlog, held) = (own.msg_backlog.max(0) as u64, own.unacked_messages.max(0) as u64);
            sum.waiting += backlog.saturating_sub(held);
            sum.unacknowledged += held;
            sum.oldest = [sum.oldest, own.oldest()].into_iter().flatten().min();
            sum.retained += entries.saturating_sub(backlog);
        }
        let mut templates: BTreeMap<&str, (u64, u64)> =
            shared.topics.all().map(|template| (template, (0, 0))).collect();
        for figure in topics.values() {
            let Ok(topic) = Topic::try_new(&figure.topic) else { continue };
            for (template, sum) in &mut templates {
                if *template == figure.topic || super::topics::tenant_in(template, &topic).is_some() {
                    sum.0 += figure.waiting;
                    sum.1 += figure.unacknowledged;
                }
            }
        }
        for (template, (waiting, unacknowledged)) in templates {
            events::Backlog { template, waiting, unacknowledged }.emit();
        }
        Ok(topics.into_values().collect())
    }

    pub(super) fn status(&self) -> Status {
        self.shared.link.status()
    }

    pub(super) async fn failed(&self) -> &'static str {
        self.failures.lock().await.next().await
    }

    pub(super) async fn close(&self) {
        // Each consumer flushes, then closes: two operations, in parallel.
        self.supervisor.drain(self.shared.link.timeout() * 2).await;
    }
}

impl Shared {
    fn full_name(&self, name: &str) -> String {
        format!("persistent://{}/{}/{name}", self.config.tenant, self.config.namespace)
    }

    fn outlet(&self, topic: &Topic) -> Arc<Outlet> {
        let mut outlets = self.outlets.lock().unwrap_or_else(PoisonError::into_inner);
        outlets
            .entry(topic.clone())
            .or_insert_with(|| {
                Arc::new(Outlet::new(topic.to_string(), self.full_name(topic.as_str()), self.link.clone()))
            })
            .clone()
    }

    /// Sends everything; results come out of the channel as they are known, and it ends after the last one.
    fn start(&self, items: Vec<Outgoing>) -> (impl Future<Output = ()>, mpsc::Receiver<Outcome>) {
        let (results, arriving) = mpsc::channel(items.len().max(1));
        let mut topics: BTreeMap<Topic, Vec<(usize, Outgoing)>> = BTreeMap::new();
        for (at, item) in items.into_iter().enumerate() {
            topics.entry(item.claims.topic.clone()).or_default().push((at, item));
        }
        let sending = async move {
            let mut sends: FuturesUnordered<_> =
                topics.into_iter().map(|(topic, items)| self.send(topic, items, results.clone())).collect();
            while sends.next().await.is_some() {}
            drop(results);
        };
        (sending, arriving)
    }

    async fn send(&self, topic: Topic, items: Vec<(usize, Outgoing)>, results: mpsc::Sender<Outcome>) {
        if let Err(error) = self.ensure(&topic).await {
            self.link.failed(&error);
            events::PublishFailed { topic: &topic, count: items.len(), cause: &error.to_string() }.emit();
            for (at, _) in items {
                // The receiver outlives the senders.
                let _ = results.send((at, Err(error.clone()))).await;
            }
            return;
        }
        let outlet = self.outlet(&topic);
        let (mut batched, mut single) = (Vec::new(), Vec::new());
        // Messages of one key follow each other: one at a time on the way.
        let mut chains: HashMap<OrderingKey, Vec<(usize, Message)>> = HashMap::new();
        for (n, (at, item)) in items.into_iter().enumerate() {
            if n % 64 == 63 {
                // Signing 64 references takes a millisecond or two.
                tokio::task::yield_now().await;
            }
            let message = self.message(&item);
            match item.ordering_key {
                Some(key) => chains.entry(key).or_default().push((at, message)),
                None if item.deliver_at.is_some() => single.push((at, message)),
                None => batched.push((at, message)),
            }
        }
        let failed = Mutex::new((0, Arc::<str>::from("")));
        let (outlet, results, failed, topic) = (&*outlet, &results, &failed, &topic);
        let confirmed = AtomicUsize::new(0);
        let confirmed = &confirmed;
        let finish = move |at: usize, result: Result<CommandSendReceipt, Arc<str>>| async move {
            let result = match result {
                Ok(receipt) => {
                    confirmed.fetch_add(1, Ordering::Relaxed);
                    Ok(Receipt(shown(&receipt)))
                }
                Err(cause) => {
                    let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                    *failed = (failed.0 + 1, cause.clone());
                    Err(Error::Unavailable { doing: "publish", cause })
                }
            };
            let ok = result.is_ok();
            let _ = results.send((at, result)).await;
            ok
        };
        let pipelined = |kind: Kind, messages: Vec<(usize, Message)>| async move {
            let (at, messages): (Vec<_>, Vec<_>) = messages.into_iter().unzip();
            if messages.is_empty() {
                return;
            }
            let sent = outlet.send(kind, messages).await;
            let mut waiting: FuturesUnordered<_> = at
                .into_iter()
                .zip(sent)
                .map(|(at, sent): (usize, Result<Sent, Arc<str>>)| async move {
                    let result = match sent {
                        Ok(sent) => outlet.receipt(sent).await,
                        Err(cause) => Err(cause),
                    };
                    finish(at, result).await
                })
                .collect();
            let mut works = false;
            while let Some(ok) = waiting.next().await {
                works |= ok;
            }
            if works {
                outlet.works(kind).await;
            }
        };
        let chained = |messages: Vec<(usize, Message)>| async move {
            let mut broken: Option<Arc<str>> = None;
            for (at, message) in messages {
                if let Some(cause) = &broken {
                    finish(at, Err(cause.clone())).await;
                    continue;
                }
                let mut sent = outlet.send(Kind::Single, vec![message]).await;
                let result = match sent.pop() {
                    Some(Ok(sent)) => outlet.receipt(sent).await,
                    Some(Err(cause)) => Err(cause),
                    None => Err("nothing was sent".into()),
                };
                broken = result.as_ref().err().map(|_| "an older event of its ordering key was not sent".into());
                if finish(at, result).await {
                    outlet.works(Kind::Single).await;
                }
            }
        };
        let chains: FuturesUnordered<_> = chains.into_values().map(chained).collect();
        tokio::join!(pipelined(Kind::Batched, batched), pipelined(Kind::Single, single), chains.collect::<Vec<()>>());
        let confirmed = confirmed.load(Ordering::Relaxed);
        if confirmed > 0 {
            events::Published { kind: "pulsar", count: confirmed }.emit();
        }
        let (count, cause) = failed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if count > 0 {
            // The topic may be gone: look again before the next send.
            self.forget(topic);
            events::PublishFailed { topic, count, cause: &cause }.emit();
        }
    }

    fn message(&self, item: &Outgoing) -> Message {
        Message {
            payload: self.keys.sign(&item.claims).into_bytes(),
            properties: item.properties.clone().into_iter().collect(),
            partition_key: item.ordering_key.as_ref().map(|key| key.as_str().to_owned()),
            deliver_at_time: item.deliver_at.map(|at| at.0),
            ..Message::default()
        }
    }

    /// Compares our keys with those of the appliances that are on the subscription. What may not be asked is no obstacle.
    async fn compare(&self) -> Result<(), admin::Error> {
        let asked = async {
            let names = self.admin.topics().await?;
            let ours = names
                .iter()
                .filter(|name| Topic::try_new(base(name)).is_ok_and(|topic| self.topics.tenant_of(&topic).is_some()));
            let mut consumers = Vec::new();
            for name in ours.take(ASKED) {
                let mut stats = self.admin.stats(name).await?.unwrap_or_default();
                consumers.extend(stats.subscriptions.remove(&self.config.subscription).unwrap_or_default().consumers);
            }
            Ok(fleet::compare(&self.keys, &self.consumer_name, &consumers))
        };
        let keys = match asked.await {
            Ok(keys) => keys,
            Err(error @ (admin::Error::Forbidden { .. } | admin::Error::Refused { .. })) if !error.is_unreachable() => {
                tracing::debug!(%error, "cannot compare signing keys with other appliances");
                Keys::Agree
            }
            Err(error) => return Err(error),
        };
        if let Keys::Differ(cause) = &keys {
            self.link.note(cause);
        }
        if self.fleet.set(keys.clone()) {
            match &keys {
                Keys::Differ(cause) => events::KeysDiffer { cause }.emit(),
                // What was held back may go.
                _ => self.ready.notify_one(),
            }
        }
        Ok(())
    }

    /// Nothing is published while another appliance would refuse it.
    async fn agreed(&self) -> Result<(), Error> {
        let unavailable = |cause: Arc<str>| Error::Unavailable { doing: "publish", cause };
        if self.fleet.keys() == Keys::Unknown {
            self.compare().await.map_err(|error| unavailable(error.to_string().into()))?;
        }
        match self.fleet.keys() {
            Keys::Differ(cause) => Err(unavailable(cause)),
            Keys::Unknown | Keys::Agree => Ok(()),
        }
    }

    /// Sees that the topic and its subscriptions exist; makes them where that is allowed.
    async fn ensure(&self, topic: &Topic) -> Result<(), Error> {
        self.agreed().await?;
        if self.was_seen(topic) {
            return Ok(());
        }
        let _one = self.making.lock().await;
        if self.was_seen(topic) {
            return Ok(());
        }
        match self.topology.ensure(topic, self.config.create_topics).await {
            Ok(true) => {
                self.lock_seen().insert(topic.clone(), Instant::now());
                self.look.notify_one();
                Ok(())
            }
            Ok(false) if self.config.create_topics => {
                Err(Error::Topic { topic: topic.clone(), cause: "Pulsar does not show what was just made".into() })
            }
            Ok(false) => Err(Error::Topic {
                topic: topic.clone(),
                cause:
                    "it or a subscription of it is missing, and create_topics is false: run `dealscale topology apply`"
                        .into(),
            }),
            Err(error) if error.is_unreachable() => {
                Err(Error::Unavailable { doing: "look for the topic", cause: error.to_string().into() })
            }
            Err(error) => Err(Error::Topic { topic: topic.clone(), cause: error.to_string().into() }),
        }
    }

    fn was_seen(&self, topic: &Topic) -> bool {
        self.lock_seen().contains_key(topic)
    }

    fn forget(&self, topic: &Topic) {
        self.lock_seen().remove(topic);
    }

    fn lock_seen(&self) -> std::sync::MutexGuard<'_, HashMap<Topic, Instant>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks again at topics that were seen a while ago. What cannot be asked stays as it was.
    async fn recheck(&self) {
        let old: Vec<Topic> =
            self.lock_seen().iter().filter(|(_, at)| at.elapsed() > RECHECK).map(|(topic, _)| topic.clone()).collect();
        for topic in old {
            match self.topology.ensure(&topic, false).await {
                Ok(true) => {
                    if let Some(at) = self.lock_seen().get_mut(&topic) {
                        *at = Instant::now();
                    }
                }
                Ok(false) => self.forget(&topic),
                Err(_) => return,
            }
        }
    }

    fn take(&self, max: usize) -> Vec<Received> {
        let partitions = self.partitions.load();
        let count = partitions.len();
        if count == 0 || matches!(self.fleet.keys(), Keys::Differ(_)) {
            return Vec::new();
        }
        let now = Instant::now();
        let start = self.turn.fetch_add(1, Ordering::Relaxed);
        let mut taken = Vec::new();
        // First everybody's fair share, then whoever has more.
        for share in [(max / count).max(1), max] {
            for at in 0..count {
                let partition = &partitions[start.wrapping_add(at) % count];
                let room = share.min(max - taken.len());
                if room > 0 {
                    taken.extend(partition.take(room, now).into_iter().map(|t| (partition.clone(), t)));
                }
            }
        }
        if taken.len() == max && partitions.iter().any(|partition| partition.is_ready()) {
            // There is more for another receiver.
            self.ready.notify_one();
        }
        taken
            .into_iter()
            .map(|(partition, (message, given, lease))| self.received(&partition, &message, given, lease))
            .collect()
    }

    fn received(&self, partition: &Partition, message: &held::Message, given: u32, lease: Lease) -> Received {
        let reference = self.check(&partition.topic, &message.raw);
        if let Err(rejection) = &reference {
            events::Rejected { topic: &partition.topic, kind: rejection.kind(), cause: rejection }.emit();
        }
        let mut properties: BTreeMap<String, String> = message.properties.iter().cloned().collect();
        let before: u32 = properties.get(property::REDELIVERIES).and_then(|n| n.parse().ok()).unwrap_or(0);
        let redeliveries = before.saturating_add(given);
        if redeliveries > 0 {
            // Whoever publishes it again with these properties keeps the count.
            properties.insert(property::REDELIVERIES.into(), redeliveries.to_string());
        }
        let id = message.id;
        Received {
            message_id: message_id(id.entry.ledger, id.entry.entry, id.index),
            topic: partition.topic.clone(),
            reference,
            raw: message.raw.clone(),
            ordering_key: message.ordering_key.clone(),
            properties,
            redeliveries,
            published_at: Some(message.published_at),
            handle: Handle::Pulsar(lease),
        }
    }

    fn check(&self, topic: &Topic, raw: &[u8]) -> Result<Verified, Rejection> {
        let verified = self.keys.verify(raw, &self.environment, Some(topic), self.clock.now())?;
        if !self.topics.allow(topic, &verified.claims.tenant_id) {
            return Err(Rejection::Tenant { topic: topic.clone(), tenant: verified.claims.tenant_id });
        }
        Ok(verified)
    }
}

/// `ledger:entry:batch index`, -1 without a batch. A receipt does not say the partition; a ledger is of one partition only,
/// so the id is unique in a cluster without it.
fn message_id(ledger: u64, entry: u64, index: i32) -> String {
    format!("{ledger}:{entry}:{index}")
}

fn shown(receipt: &CommandSendReceipt) -> String {
    match &receipt.message_id {
        Some(id) => message_id(id.ledger_id, id.entry_id, id.batch_index.unwrap_or(-1)),
        None => String::new(),
    }
}

fn lost() -> Error {
    Error::Unavailable { doing: "publish", cause: "the send ended without a result".into() }
}

/// Finds topics and starts their consumers.
struct Discovery {
    shared: Arc<Shared>,
    supervisor: Supervisor,
    known: BTreeSet<String>,
}

impl Discovery {
    async fn run(mut self) {
        let shutdown = self.supervisor.shutdown();
        let mut rechecked = Instant::now();
        let mut made = false;
        while !shutdown.is_cancelled() {
            let shared = self.shared.clone();
            let round = async {
                match Box::pin(self.look()).await {
                    Ok(()) => shared.link.up(),
                    Err(cause) => {
                        shared.link.down(&cause);
                        // After an outage the cluster may be another one.
                        made = false;
                    }
                }
                if shared.link.status().connected && !made {
                    made = self.make().await;
                }
                if matches!(shared.fleet.keys(), Keys::Differ(_)) {
                    // Until they agree, at every turn.
                    let _ = shared.compare().await;
                }
                if rechecked.elapsed() > RECHECK {
                    rechecked = Instant::now();
                    let _ = shared.compare().await;
                    made &= self.all_literal_seen();
                    shared.recheck().await;
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = round => {}
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = shared.look.notified() => {}
                () = tokio::time::sleep(DISCOVER) => {}
            }
        }
    }

    /// Makes the topics that exist whether or not somebody has published yet.
    async fn make(&self) -> bool {
        if !self.shared.config.create_topics {
            return true;
        }
        let mut all = true;
        for topic in self.shared.topics.literal() {
            if let Err(error) = self.shared.ensure(&topic).await {
                self.shared.link.failed(&error);
                tracing::debug!(%topic, %error, "cannot make the topic yet");
                all = false;
            }
        }
        all
    }

    fn all_literal_seen(&self) -> bool {
        self.shared.topics.literal().all(|topic| self.shared.was_seen(&topic))
    }

    async fn look(&mut self) -> Result<(), Arc<str>> {
        let (number, client) = self.shared.link.client().await?;
        let namespace = self.shared.admin.namespace();
        let listing = client.get_topics_of_namespace(namespace.clone(), Mode::Persistent);
        let names = match tokio::time::timeout(self.shared.link.timeout(), Box::pin(listing)).await {
            Ok(Ok(names)) => names,
            Ok(Err(error)) if is_missing(&error) => Vec::new(),
            Ok(Err(error)) => {
                self.shared.link.drop_client(number).await;
                return Err(error.to_string().into());
            }
            Err(_) => {
                self.shared.link.drop_client(number).await;
                return Err("no answer within the operation timeout".into());
            }
        };
        if self.shared.fleet.keys() == Keys::Unknown {
            self.shared.compare().await.map_err(|error| Arc::from(error.to_string()))?;
        }
        if matches!(self.shared.fleet.keys(), Keys::Differ(_)) {
            // A consumer would be handed work that it may not do.
            return Ok(());
        }
        let prefix = format!("persistent://{namespace}/");
        for name in names {
            let Some(name) = name.strip_prefix(&prefix) else { continue };
            if self.known.contains(name) {
                continue;
            }
            if let Ok(topic) = Topic::try_new(base(name))
                && self.shared.topics.tenant_of(&topic).is_some()
            {
                self.consume(name.to_owned(), topic);
            }
        }
        Ok(())
    }

    fn consume(&mut self, name: String, topic: Topic) {
        let shared = &self.shared;
        let names = Names {
            full_name: shared.full_name(&name),
            name: name.clone(),
            topic,
            subscription: shared.config.subscription.clone(),
            consumer_name: shared.consumer_name.clone(),
            metadata: fleet::metadata(&shared.keys),
        };
        let queue = usize::try_from(shared.config.receive_queue).unwrap_or(usize::MAX);
        let task = Task::new(names, queue, shared.link.clone(), shared.ready.clone(), self.supervisor.shutdown());
        let mut partitions = shared.partitions.load().to_vec();
        partitions.push(task.partition.clone());
        shared.partitions.store(Arc::new(partitions));
        self.known.insert(name);
        self.supervisor.spawn("broker consumer", task.run());
    }
}

/// The namespace is not there yet: an empty cluster, not an outage.
fn is_missing(error: &::pulsar::Error) -> bool {
    let text = error.to_string();
    text.contains("TopicNotFound") || text.contains("not found") || text.contains("does not exist")
}
