//! One outlet per topic, with two producers: one that batches, and one for what a batch would spoil.
//!
//! A batching producer drops `deliver_at`, and a batch of mixed keys would go where its first key goes: delayed and keyed
//! messages are sent one by one (pipelined all the same). A producer that fails a send or misses its deadline is dropped and
//! built again with backoff.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::pulsar::producer::{Message, SendFuture};
use ::pulsar::proto::CommandSendReceipt;
use ::pulsar::routing_policy::RoutingPolicy;
use ::pulsar::{Producer, ProducerOptions, TokioExecutor};
use tokio::sync::Mutex;

use super::link::{Link, backoff};

/// Messages and bytes at which a batch is sent, and how long it waits for company. A reference has under 1 KiB, and Pulsar
/// takes 5 MiB; a batch waits for one sync of the broker's journal, so a millisecond costs nothing.
const BATCH: u32 = 500;
const BATCH_BYTES: usize = 256 << 10;
const BATCH_WAIT: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Batched,
    Single,
}

pub struct Outlet {
    name: String,
    full_name: String,
    link: Arc<Link>,
    batched: Mutex<Lane>,
    single: Mutex<Lane>,
}

#[derive(Default)]
struct Lane {
    producer: Option<Producer<TokioExecutor>>,
    /// Counts the producers that were built.
    number: u64,
    failures: u32,
    not_before: Option<Instant>,
}

/// A message on its way; awaiting it gives the receipt.
pub struct Sent {
    receipt: SendFuture,
    kind: Kind,
    number: u64,
    deadline: tokio::time::Instant,
}

impl Outlet {
    pub fn new(name: String, full_name: String, link: Arc<Link>) -> Self {
        Self { name, full_name, link, batched: Mutex::default(), single: Mutex::default() }
    }

    fn lane(&self, kind: Kind) -> &Mutex<Lane> {
        match kind {
            Kind::Batched => &self.batched,
            Kind::Single => &self.single,
        }
    }

    /// Queues messages in their order. Ends within about two operation timeouts, whatever the broker does.
    pub async fn send(&self, kind: Kind, messages: Vec<Message>) -> Vec<Result<Sent, Arc<str>>> {
        Box::pin(self.queue(kind, messages)).await
    }

    #[expect(clippy::large_futures, reason = "the crate's own; a box per message would cost more")]
    async fn queue(&self, kind: Kind, messages: Vec<Message>) -> Vec<Result<Sent, Arc<str>>> {
        let count = messages.len();
        let timeout = self.link.timeout();
        let mut lane = self.lane(kind).lock().await;
        if let Err(cause) = self.build(kind, &mut lane).await {
            return (0..count).map(|_| Err(cause.clone())).collect();
        }
        let deadline = tokio::time::Instant::now() + timeout;
        let mut sent = Vec::with_capacity(count);
        let mut broken: Option<Arc<str>> = None;
        for message in messages {
            let producer = match (&broken, &mut lane.producer) {
                (None, Some(producer)) => producer,
                (cause, _) => {
                    sent.push(Err(cause.clone().unwrap_or_else(|| "no producer".into())));
                    continue;
                }
            };
            match tokio::time::timeout_at(deadline, producer.send_non_blocking(message)).await {
                Ok(Ok(receipt)) => sent.push(Ok((receipt, lane.number))),
                Ok(Err(error)) => broken = Some(error.to_string().into()),
                Err(_) => broken = Some("the producer took no message within the operation timeout".into()),
            }
            if let Some(cause) = &broken {
                sent.push(Err(cause.clone()));
            }
        }
        if let Some(cause) = &broken {
            self.broke(&mut lane, cause);
        }
        drop(lane);
        let deadline = tokio::time::Instant::now() + timeout;
        sent.into_iter().map(|sent| sent.map(|(receipt, number)| Sent { receipt, kind, number, deadline })).collect()
    }

    /// Waits for the receipt. An error says nothing about whether the message is stored.
    pub async fn receipt(&self, sent: Sent) -> Result<CommandSendReceipt, Arc<str>> {
        let cause: Arc<str> = match tokio::time::timeout_at(sent.deadline, sent.receipt).await {
            Ok(Ok(receipt)) => return Ok(receipt),
            Ok(Err(error)) => error.to_string().into(),
            Err(_) => "no receipt within the operation timeout".into(),
        };
        let mut lane = self.lane(sent.kind).lock().await;
        if lane.number == sent.number {
            self.broke(&mut lane, &cause);
        }
        Err(cause)
    }

    fn broke(&self, lane: &mut Lane, cause: &str) {
        if lane.producer.take().is_some() {
            lane.failures += 1;
            lane.not_before = Some(Instant::now() + backoff(lane.failures));
            self.link.rebuilt("producer", &self.name, cause);
        }
    }

    async fn build(&self, kind: Kind, lane: &mut Lane) -> Result<(), Arc<str>> {
        if lane.producer.is_some() {
            return Ok(());
        }
        if let Some(at) = lane.not_before.take() {
            tokio::time::sleep_until(at.into()).await;
        }
        match self.try_build(kind).await {
            Ok(producer) => {
                lane.producer = Some(producer);
                lane.number += 1;
                Ok(())
            }
            Err(cause) => {
                lane.failures += 1;
                lane.not_before = Some(Instant::now() + backoff(lane.failures));
                Err(cause)
            }
        }
    }

    async fn try_build(&self, kind: Kind) -> Result<Producer<TokioExecutor>, Arc<str>> {
        let (number, client) = self.link.client().await?;
        let batched = kind == Kind::Batched;
        let options = ProducerOptions {
            batch_size: batched.then_some(BATCH),
            batch_byte_size: batched.then_some(BATCH_BYTES),
            batch_timeout: batched.then_some(BATCH_WAIT),
            block_queue_if_full: true,
            // Without a policy the crate ignores the key when it chooses a partition.
            routing_policy: Some(RoutingPolicy::RoundRobin),
            ..ProducerOptions::default()
        };
        let building = client.producer().with_topic(&self.full_name).with_options(options).build();
        match tokio::time::timeout(self.link.timeout(), Box::pin(building)).await {
            Ok(Ok(producer)) => Ok(producer),
            Ok(Err(error)) => {
                self.link.drop_client(number).await;
                Err(error.to_string().into())
            }
            Err(_) => {
                self.link.drop_client(number).await;
                Err("no producer within the operation timeout".into())
            }
        }
    }

    /// A receipt came: the next failure is the first one again.
    pub async fn works(&self, kind: Kind) {
        let mut lane = self.lane(kind).lock().await;
        lane.failures = 0;
    }
}
