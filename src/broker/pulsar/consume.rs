//! One consumer per topic or partition, built again whenever it ends, fails or goes silent.
//!
//! The crate's consumer over several partitions can lose one of them without any error, so each has its own task. The task
//! moves messages into [`Held`], sends acknowledgements, and asks the broker every [`PROBE`] whether it still knows us.
//!
//! The crate stops reading acknowledgements while its message channel is full. That channel is therefore made larger than
//! what a broker hands to one consumer (`unacknowledged_max` of the topics file, 50,000 by default), and the bound on what is
//! held here is `receive_queue` plus that.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::pulsar::consumer::InitialPosition;
use ::pulsar::message::proto::MessageIdData;
use ::pulsar::{Consumer, ConsumerOptions, SubType, TokioExecutor};
use futures_util::StreamExt;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::held::{Arrived, Entry, Held, Id, Message, Settled};
use super::link::{Link, backoff};
use crate::clock::Timestamp;
use crate::ids::{OrderingKey, Topic};

/// How often a consumer is asked for its statistics, which fails when connection or broker have lost it.
const PROBE: Duration = Duration::from_secs(5);
/// A consumer that got nothing for so long although the broker has a backlog and permits is built again. Delayed messages
/// count as backlog, so this must not be short.
const SILENT: Duration = Duration::from_secs(60);
/// More than a broker hands out unacknowledged, see the header.
const CHANNEL: u32 = 100_000;
/// Acknowledgement calls that may wait for the task.
const COMMANDS: usize = 256;
/// A message that was dropped unsettled is given out again after this.
const DROPPED: Duration = Duration::from_secs(1);

type Messages = Consumer<Vec<u8>, TokioExecutor>;

/// What is shared by the task, `receive` and the leases.
#[derive(Debug)]
pub struct Partition {
    /// `dealscale.workflow.long-partition-0`.
    pub name: String,
    pub topic: Topic,
    /// -1 without partitions.
    pub number: i32,
    held: Mutex<Held>,
    commands: mpsc::Sender<Command>,
    /// Rung when the task may poll again.
    room: Notify,
    /// Rung when there is something to take, in any partition.
    ready: Arc<Notify>,
}

#[derive(Debug)]
struct Command {
    entries: Vec<Entry>,
    done: oneshot::Sender<Result<(), Arc<str>>>,
}

/// A message that is out. Dropped without [`settle`](Lease::settle) it is given out again.
#[derive(Debug)]
pub struct Lease {
    partition: Arc<Partition>,
    id: Id,
    settled: bool,
}

impl Lease {
    /// The acknowledgement to send, if one is due.
    pub fn settle(mut self) -> (Arc<Partition>, Settled) {
        self.settled = true;
        let settled = self.partition.lock().settle(self.id);
        self.partition.changed();
        (self.partition.clone(), settled)
    }

    pub fn release(mut self, after: Duration) {
        self.settled = true;
        self.partition.lock().release(self.id, Instant::now() + after);
        // `receive` counts the time anew.
        self.partition.ready.notify_one();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.settled {
            self.partition.lock().release(self.id, Instant::now() + DROPPED);
            self.partition.ready.notify_one();
        }
    }
}

impl Partition {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was settled: there may be room, or a key is free.
    fn changed(&self) {
        self.room.notify_one();
        if self.lock().is_ready() {
            self.ready.notify_one();
        }
    }

    /// Takes up to `max`.
    pub fn take(self: &Arc<Self>, max: usize, now: Instant) -> Vec<(Arc<Message>, u32, Lease)> {
        let mut held = self.lock();
        let mut taken = Vec::new();
        while taken.len() < max
            && let Some((message, given)) = held.take(now)
        {
            let lease = Lease { partition: self.clone(), id: message.id, settled: false };
            taken.push((message, given, lease));
        }
        drop(held);
        if !taken.is_empty() {
            self.room.notify_one();
        }
        taken
    }

    pub fn next_due(&self) -> Option<Instant> {
        self.lock().next_due()
    }

    pub fn is_ready(&self) -> bool {
        self.lock().is_ready()
    }

    /// Sends acknowledgements and waits until the broker has them.
    pub async fn acknowledge(&self, entries: Vec<Entry>) -> Result<(), Arc<str>> {
        let (done, answer) = oneshot::channel();
        if self.commands.send(Command { entries, done }).await.is_err() {
            return Err("the broker is closed".into());
        }
        answer.await.unwrap_or_else(|_| Err("the broker is closed".into()))
    }
}

/// What a task needs.
pub struct Task {
    pub partition: Arc<Partition>,
    commands: mpsc::Receiver<Command>,
    pub link: Arc<Link>,
    pub full_name: String,
    pub subscription: String,
    pub consumer_name: String,
    pub metadata: BTreeMap<String, String>,
    pub queue: usize,
    pub shutdown: CancellationToken,
}

pub struct Names {
    pub name: String,
    pub topic: Topic,
    pub full_name: String,
    pub subscription: String,
    pub consumer_name: String,
    /// For the other appliances, see [`super::fleet`].
    pub metadata: BTreeMap<String, String>,
}

impl Task {
    pub fn new(names: Names, queue: usize, link: Arc<Link>, ready: Arc<Notify>, shutdown: CancellationToken) -> Self {
        let (sender, commands) = mpsc::channel(COMMANDS);
        let number = names.name.rsplit_once("-partition-").and_then(|(_, n)| n.parse().ok()).unwrap_or(-1);
        let partition = Arc::new(Partition {
            name: names.name,
            topic: names.topic,
            number,
            held: Mutex::default(),
            commands: sender,
            room: Notify::new(),
            ready,
        });
        Self {
            partition,
            commands,
            link,
            full_name: names.full_name,
            subscription: names.subscription,
            consumer_name: names.consumer_name,
            metadata: names.metadata,
            queue,
            shutdown,
        }
    }

    pub async fn run(mut self) {
        let mut failures = 0;
        while !self.shutdown.is_cancelled() {
            let started = Instant::now();
            let cause = match self.build().await {
                Ok(consumer) => Box::pin(self.consume(consumer)).await,
                Err(cause) => cause,
            };
            if self.shutdown.is_cancelled() {
                break;
            }
            failures = if started.elapsed() > Duration::from_secs(10) { 1 } else { failures + 1 };
            self.link.rebuilt("consumer", &self.partition.name, &cause);
            let pause = tokio::time::sleep(backoff(failures));
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    () = self.shutdown.cancelled() => break,
                    // Nobody waits for an outage: these are sent when their messages come again.
                    Some(command) = self.commands.recv() => self.park(command, "the consumer is being made again".into()),
                }
            }
        }
        self.commands.close();
        while let Some(command) = self.commands.recv().await {
            self.park(command, "the broker is closed".into());
        }
    }

    fn park(&self, command: Command, cause: Arc<str>) {
        let mut held = self.partition.lock();
        command.entries.into_iter().for_each(|entry| held.park(entry));
        drop(held);
        // The caller may have given up.
        let _ = command.done.send(Err(cause));
    }

    async fn build(&self) -> Result<Messages, Arc<str>> {
        let (number, client) = self.link.client().await?;
        let building = client
            .consumer()
            .with_topic(&self.full_name)
            .with_subscription(&self.subscription)
            .with_subscription_type(SubType::KeyShared)
            .with_consumer_name(&self.consumer_name)
            .with_batch_size(u32::try_from(self.queue).unwrap_or(CHANNEL))
            .with_options(
                ConsumerOptions::default()
                    .with_receiver_queue_size(CHANNEL)
                    .with_metadata(self.metadata.clone())
                    .with_initial_position(InitialPosition::Earliest),
            )
            .build();
        // Subscribing can take a broker that just started longer than one round trip.
        match tokio::time::timeout(self.link.timeout() * 2, Box::pin(building)).await {
            Ok(Ok(consumer)) => {
                self.partition.lock().connected();
                Ok(consumer)
            }
            Ok(Err(error)) => {
                self.link.drop_client(number).await;
                Err(error.to_string().into())
            }
            Err(_) => {
                self.link.drop_client(number).await;
                Err("no consumer within the operation timeout".into())
            }
        }
    }

    /// Until it ends; the answer is why.
    async fn consume(&mut self, mut consumer: Messages) -> Arc<str> {
        let mut probe = tokio::time::interval_at(tokio::time::Instant::now() + PROBE, PROBE);
        probe.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_message = Instant::now();
        loop {
            let room = self.partition.lock().waiting() < self.queue;
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => {
                    self.commands.close();
                    let mut last = Vec::new();
                    while let Some(command) = self.commands.recv().await {
                        last.push(command);
                    }
                    if !last.is_empty() {
                        let _ = self.flush(&mut consumer, last).await;
                    }
                    let _ = tokio::time::timeout(self.link.timeout(), Box::pin(consumer.close())).await;
                    return "closed".into();
                }
                command = self.commands.recv() => {
                    let mut commands: Vec<_> = command.into_iter().collect();
                    while commands.len() < COMMANDS && let Ok(command) = self.commands.try_recv() {
                        commands.push(command);
                    }
                    if let Err(cause) = self.flush(&mut consumer, commands).await {
                        return cause;
                    }
                }
                _ = probe.tick() => {
                    if let Err(cause) = self.probe(&mut consumer, last_message).await {
                        return cause;
                    }
                }
                message = consumer.next(), if room => match message {
                    Some(Ok(message)) => {
                        last_message = Instant::now();
                        if let Some(entry) = self.arrived(message)
                            && let Err(cause) = self.send(&mut consumer, &[entry]).await
                        {
                            return cause;
                        }
                    }
                    Some(Err(error)) => return error.to_string().into(),
                    None => return "the consumer ended".into(),
                },
                () = self.partition.room.notified(), if !room => {}
            }
        }
    }

    fn arrived(&self, message: ::pulsar::consumer::Message<Vec<u8>>) -> Option<Entry> {
        let message = parsed(message);
        let mut held = self.partition.lock();
        match held.arrived(message) {
            Arrived::Acknowledge(entry) => Some(entry),
            Arrived::Known => None,
            Arrived::New => {
                if held.is_ready() {
                    self.partition.ready.notify_one();
                }
                None
            }
        }
    }

    async fn send(&self, consumer: &mut Messages, entries: &[Entry]) -> Result<(), Arc<str>> {
        for entry in entries {
            let id = MessageIdData {
                ledger_id: entry.ledger,
                entry_id: entry.entry,
                partition: Some(self.partition.number),
                ..MessageIdData::default()
            };
            consumer.ack_with_id(&self.full_name, id).await.map_err(|e| Arc::from(e.to_string()))?;
        }
        Ok(())
    }

    /// Acknowledges, and waits until the broker has read it: a ping on the same connection comes back after everything
    /// before it.
    async fn flush(&mut self, consumer: &mut Messages, commands: Vec<Command>) -> Result<(), Arc<str>> {
        let result: Result<(), Arc<str>> = tokio::time::timeout(self.link.timeout(), async {
            for command in &commands {
                self.send(consumer, &command.entries).await?;
            }
            Box::pin(consumer.check_connection()).await.map_err(|e| Arc::from(e.to_string()))
        })
        .await
        .unwrap_or_else(|_| Err("acknowledgements were not flushed within the operation timeout".into()));
        for command in commands {
            match &result {
                Ok(()) => drop(command.done.send(Ok(()))),
                Err(cause) => self.park(command, cause.clone()),
            }
        }
        result
    }

    async fn probe(&self, consumer: &mut Messages, last_message: Instant) -> Result<(), Arc<str>> {
        let stats = match tokio::time::timeout(self.link.timeout(), Box::pin(consumer.get_stats())).await {
            Ok(Ok(stats)) => stats,
            Ok(Err(error)) => return Err(format!("the watchdog got no answer: {error}").into()),
            Err(_) => return Err("the watchdog got no answer within the operation timeout".into()),
        };
        for stats in stats {
            if let Some(message) = stats.error_message {
                return Err(format!("the broker does not know the consumer: {message}").into());
            }
            let idle = last_message.elapsed() > SILENT && self.partition.lock().is_empty();
            if idle && stats.msg_backlog.unwrap_or(0) > 0 && stats.available_permits.unwrap_or(0) > 0 {
                return Err("nothing came although the broker has a backlog".into());
            }
        }
        Ok(())
    }
}

fn parsed(message: ::pulsar::consumer::Message<Vec<u8>>) -> Message {
    let batch = message.message_id.batch_size.unwrap_or(1).max(1) as u32;
    let (id, payload) = (message.message_id.id, message.payload);
    let metadata = payload.metadata;
    let properties: HashMap<_, _> = metadata.properties.into_iter().map(|p| (p.key, p.value)).collect();
    Message {
        id: Id {
            entry: Entry { ledger: id.ledger_id, entry: id.entry_id, published: metadata.publish_time },
            index: id.batch_index.unwrap_or(-1),
        },
        batch,
        raw: payload.data,
        ordering_key: metadata.partition_key.and_then(|key| OrderingKey::try_new(&key).ok()),
        properties: properties.into_iter().collect(),
        published_at: Timestamp(metadata.publish_time as i64),
    }
}
