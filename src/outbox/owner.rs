//! The one thread that owns the store: takes everything that is queued, builds one batch, commits and syncs it, then answers everyone.
//!
//! # Failure
//! After a failed commit everyone whose request was in the batch gets [`Error::Store`] ("outcome unknown"), the store is closed and opened
//! again, and the engine is built anew from what is on disk. While it cannot be opened every request gets the same error.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::engine::{Engine, Prepared, Taken, failed};
use super::store::Failure;
use super::{Backlog, Cancelled, Error, Forward, Found, Held, LeaseLimit, Leased, Sequence, Settle, Status};
use crate::clock::Clock;
use crate::ids::{Key, Tenant, Topic};
use crate::observe::outbox as events;
use crate::units::Bytes;

/// Requests of one batch: bounds its latency and its memory.
const BATCH_MAX: usize = 2_048;
/// How long the owner sleeps when nothing happens: leases and expired keys are looked after this often.
const TICK: Duration = Duration::from_millis(500);

type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What somebody asked for and may have stopped waiting for in the very moment in which it was sent: dropped with something in it, it
/// gives that back.
pub struct Given<T: GiveBack> {
    items: Vec<T>,
    to: std::sync::mpsc::Sender<Command>,
}

/// How something that nobody took goes back.
pub trait GiveBack: Sized {
    fn give_back(items: Vec<Self>) -> Command;
}

impl GiveBack for Leased {
    fn give_back(items: Vec<Self>) -> Command {
        let settles = items.iter().map(|l| Settle::Release { sequence: l.sequence }).collect();
        Command::Settle(settles, oneshot::channel().0)
    }
}

impl GiveBack for Held {
    fn give_back(items: Vec<Self>) -> Command {
        Command::Release(items.into_iter().map(|h| h.id).collect(), Duration::ZERO, oneshot::channel().0)
    }
}

impl<T: GiveBack> Given<T> {
    pub fn take(mut self) -> Vec<T> {
        std::mem::take(&mut self.items)
    }
}

impl<T: GiveBack> Drop for Given<T> {
    fn drop(&mut self) {
        if !self.items.is_empty() {
            // An owner that is gone has closed the store: everything is free again at the next open.
            let _ = self.to.send(T::give_back(std::mem::take(&mut self.items)));
        }
    }
}

/// Where to send what is given back.
pub type Back = std::sync::mpsc::Sender<Command>;
pub type TopicFilter = Arc<dyn Fn(&Topic) -> bool + Send + Sync>;

/// A request to the owner.
pub enum Command {
    Append(Vec<Prepared>, oneshot::Sender<Vec<Result<Taken, Error>>>),
    Settle(Vec<Settle>, Reply<()>),
    Publish(Vec<Forward>, Reply<Vec<String>>),
    Ack(Vec<String>, Reply<()>),
    Release(Vec<String>, Duration, Reply<()>),
    Lease(LeaseLimit, Back, Reply<Given<Leased>>),
    Receive(TopicFilter, usize, Back, Reply<Given<Held>>),
    Find(Key, Reply<Option<Found>>),
    List(Option<Tenant>, bool, Option<Sequence>, usize, Reply<Vec<Found>>),
    Cancel(Key, Reply<Cancelled>),
    Repair(Sequence, bool, Reply<bool>),
    AcknowledgeLoss(Reply<()>),
    Backlog(Reply<Vec<Backlog>>),
    Browse(Topic, usize, Reply<Vec<Held>>),
    Close(Reply<()>),
}

/// Opens the store again after a failure.
pub type Reopen = Box<dyn Fn() -> Result<Engine, Failure> + Send>;

pub struct Owner {
    pub commands: Receiver<Command>,
    pub reopen: Reopen,
    pub dir: PathBuf,
    pub clock: Clock,
    pub status: Arc<Mutex<Status>>,
    pub witness: Option<super::open::Witness>,
    /// The folder's lock, held as long as the owner lives.
    pub lock: Option<nix::fcntl::Flock<std::fs::File>>,
}

/// Who waits for a record or a message.
#[derive(Default)]
struct Parked {
    leases: Vec<(LeaseLimit, Back, Reply<Given<Leased>>)>,
    receives: Vec<(TopicFilter, usize, Back, Reply<Given<Held>>)>,
}

/// Answers that are given when the batch is durable.
type Answer = Box<dyn FnOnce(Result<(), Error>)>;

/// Answers `value` when the batch is durable, the batch's error otherwise.
fn later<T: 'static>(reply: Reply<T>, value: T) -> Answer {
    Box::new(move |batch| drop(reply.send(batch.map(|()| value))))
}

impl Owner {
    pub fn run(mut self, engine: Engine) {
        let mut witness = self.witness.take();
        let mut engine = Some(engine);
        let (mut parked, mut disk) = (Parked::default(), DiskFree::new(self.dir.clone()));
        loop {
            let wait = engine
                .as_ref()
                .and_then(|e| e.next_wake(self.clock.now(), Instant::now()))
                .map_or(TICK, |wake| wake.min(TICK));
            let first = match self.commands.recv_timeout(wait) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let mut batch: Vec<Command> = first.into_iter().collect();
            while batch.len() < BATCH_MAX {
                let Ok(command) = self.commands.try_recv() else { break };
                batch.push(command);
            }
            let Some(running) = &mut engine else {
                let cause: Arc<str> = match (self.reopen)() {
                    Ok(new) => {
                        engine = Some(new);
                        "the store was opened again".into()
                    }
                    Err(failure) => failure.to_string().into(),
                };
                for command in batch {
                    if let Command::Close(reply) = command {
                        let _ = reply.send(Ok(()));
                        return;
                    }
                    refuse(command, &Error::Store { doing: "use the outbox", cause: cause.clone() });
                }
                continue;
            };
            match self.turn(running, batch, &mut parked, &mut disk) {
                Ok(Some(close)) => {
                    drop(engine.take());
                    drop(self.lock);
                    for (_, _, reply) in parked.leases {
                        let _ = reply.send(Err(Error::Closed));
                    }
                    for (_, _, _, reply) in parked.receives {
                        let _ = reply.send(Err(Error::Closed));
                    }
                    let _ = close.send(Ok(()));
                    return;
                }
                Ok(None) => {}
                Err(failure) => {
                    events::StoreFailed { dir: &self.dir, error: &failure }.emit();
                    let (next, next_message, old) = (running.next, running.next_message, running.status.clone());
                    drop(engine.take());
                    match (self.reopen)() {
                        Ok(mut new) => {
                            // Sequences that the failed batch had taken are not used again.
                            new.next = new.next.max(next);
                            new.next_message = new.next_message.max(next_message);
                            new.status.reopened = old.reopened + 1;
                            new.status.last_error = Some(failure.to_string());
                            new.status.appended_total = old.appended_total;
                            new.status.confirmed_total = old.confirmed_total;
                            new.status.syncs_total = old.syncs_total;
                            engine = Some(new);
                        }
                        Err(again) => events::StoreFailed { dir: &self.dir, error: &again }.emit(),
                    }
                }
            }
            if let (Some(engine), Some(witness)) = (&engine, &mut witness) {
                witness.saw(engine.next);
            }
        }
    }

    /// One batch. `Some` when the last command was to close.
    fn turn(
        &self,
        engine: &mut Engine,
        commands: Vec<Command>,
        parked: &mut Parked,
        disk: &mut DiskFree,
    ) -> Result<Option<Reply<()>>, Failure> {
        let (now, instant) = (self.clock.now(), Instant::now());
        let mut answers: Vec<Answer> = Vec::with_capacity(commands.len());
        let (mut reads, mut close) = (Vec::new(), None);
        let free = disk.get();
        for command in commands {
            match command {
                Command::Append(items, reply) => {
                    let results = engine.append(items, now, free);
                    answers.push(Box::new(move |batch| {
                        // A refusal stands whatever became of the batch.
                        let results = results.into_iter().map(|r| r.and_then(|taken| batch.clone().map(|()| taken)));
                        let _ = reply.send(results.collect());
                    }));
                }
                Command::Settle(settles, reply) => {
                    let settled = engine.settle(settles, now);
                    answers.push(later(reply, ()));
                    if let Err(failure) = settled {
                        return Err(self.fail(answers, reads, failure));
                    }
                }
                Command::Publish(messages, reply) => {
                    let ids = engine.publish(messages, now);
                    answers.push(later(reply, ids));
                }
                Command::Ack(ids, reply) => {
                    let acked = engine.ack(&ids, now);
                    answers.push(later(reply, ()));
                    if let Err(failure) = acked {
                        return Err(self.fail(answers, reads, failure));
                    }
                }
                Command::Close(reply) => close = Some(reply),
                other => reads.push(other),
            }
        }
        if let Err(failure) = engine.expire_keys(now).and_then(|()| engine.commit()) {
            answers.extend(close.map(|reply| later(reply, ())));
            return Err(self.fail(answers, reads, failure));
        }
        // Whoever is answered finds figures that know of it.
        self.publish(engine, free);
        for answer in answers {
            answer(Ok(()));
        }
        // What reads, and what changes after it has read; a second commit only where something changed.
        let mut answers: Vec<Answer> = Vec::new();
        engine.reclaim(instant);
        for command in reads {
            if let Err(failure) = read(engine, command, parked, &mut answers, instant) {
                return Err(self.fail(answers, Vec::new(), failure));
            }
        }
        if let Err(failure) = serve(engine, parked, now, instant).and_then(|()| engine.commit()) {
            return Err(self.fail(answers, Vec::new(), failure));
        }
        self.publish(engine, free);
        for answer in answers {
            answer(Ok(()));
        }
        Ok(close)
    }

    fn publish(&self, engine: &mut Engine, disk_free: Bytes) {
        let mut status = engine.snapshot();
        status.disk_free = disk_free.0;
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    /// Everyone of the failed batch hears that its outcome is unknown.
    fn fail(&self, answers: Vec<Answer>, reads: Vec<Command>, failure: Failure) -> Failure {
        let error = failed("write to the outbox", &failure);
        for answer in answers {
            answer(Err(error.clone()));
        }
        for command in reads {
            refuse(command, &error);
        }
        failure
    }
}

fn read(
    engine: &mut Engine,
    command: Command,
    parked: &mut Parked,
    answers: &mut Vec<Answer>,
    instant: Instant,
) -> Result<(), Failure> {
    match command {
        Command::Lease(limit, back, reply) => parked.leases.push((limit, back, reply)),
        Command::Receive(topics, max, back, reply) => parked.receives.push((topics, max, back, reply)),
        Command::Release(ids, after, reply) => {
            engine.give_back(&ids, instant + after);
            answers.push(later(reply, ()));
        }
        Command::Find(key, reply) => drop(reply.send(engine.find(&key))),
        Command::List(tenant, poisoned, after, limit, reply) => {
            let _ = reply.send(engine.list(tenant.as_ref(), poisoned, after, limit));
        }
        Command::Cancel(key, reply) => {
            let done = engine.cancel(&key)?;
            answers.push(later(reply, done));
        }
        Command::Repair(sequence, discard, reply) => {
            let done = engine.repair(sequence.0, discard)?;
            answers.push(later(reply, done));
        }
        Command::AcknowledgeLoss(reply) => {
            engine.acknowledge_loss();
            answers.push(later(reply, ()));
        }
        Command::Backlog(reply) => drop(reply.send(Ok(engine.backlog()))),
        Command::Browse(topic, limit, reply) => {
            let messages = engine.browse(&topic, limit)?;
            answers.push(later(reply, messages));
        }
        Command::Append(..) | Command::Settle(..) | Command::Publish(..) | Command::Ack(..) | Command::Close(_) => {
            unreachable!("handled before the commit")
        }
    }
    Ok(())
}

/// Gives records and messages to those who wait for them.
fn serve(
    engine: &mut Engine,
    parked: &mut Parked,
    now: crate::clock::Timestamp,
    instant: Instant,
) -> Result<(), Failure> {
    parked.leases.retain(|(_, _, reply)| !reply.is_closed());
    parked.receives.retain(|(_, _, _, reply)| !reply.is_closed());
    while let Some((limit, ..)) = parked.leases.first() {
        let items = engine.lease(*limit, instant)?;
        if items.is_empty() {
            break;
        }
        let (_, to, reply) = parked.leases.remove(0);
        let _ = reply.send(Ok(Given { items, to }));
    }
    let mut n = 0;
    while n < parked.receives.len() {
        let (topics, max, ..) = &parked.receives[n];
        let items = engine.receive(&**topics, *max, now, instant)?;
        if items.is_empty() {
            n += 1;
            continue;
        }
        let (_, _, to, reply) = parked.receives.remove(n);
        let _ = reply.send(Ok(Given { items, to }));
    }
    Ok(())
}

fn refuse(command: Command, error: &Error) {
    let error = error.clone();
    match command {
        Command::Append(items, reply) => drop(reply.send(items.iter().map(|_| Err(error.clone())).collect())),
        Command::Settle(_, reply) | Command::Ack(_, reply) | Command::Release(_, _, reply) => {
            drop(reply.send(Err(error)))
        }
        Command::AcknowledgeLoss(reply) | Command::Close(reply) => drop(reply.send(Err(error))),
        Command::Publish(_, reply) => drop(reply.send(Err(error))),
        Command::Lease(_, _, reply) => drop(reply.send(Err(error))),
        Command::Receive(_, _, _, reply) => drop(reply.send(Err(error))),
        Command::Browse(_, _, reply) => drop(reply.send(Err(error))),
        Command::Find(_, reply) => drop(reply.send(Err(error))),
        Command::List(_, _, _, _, reply) => drop(reply.send(Err(error))),
        Command::Cancel(_, reply) => drop(reply.send(Err(error))),
        Command::Repair(_, _, reply) => drop(reply.send(Err(error))),
        Command::Backlog(reply) => drop(reply.send(Err(error))),
    }
}

/// Free bytes of the folder's disk, asked at most a few times a second.
struct DiskFree {
    dir: PathBuf,
    asked: Option<(Instant, Bytes)>,
}

impl DiskFree {
    fn new(dir: PathBuf) -> Self {
        Self { dir, asked: None }
    }
    fn get(&mut self) -> Bytes {
        if let Some((at, free)) = self.asked
            && at.elapsed() < Duration::from_millis(250)
        {
            return free;
        }
        let free = match nix::sys::statvfs::statvfs(&self.dir) {
            Ok(stat) => Bytes(stat.blocks_available() * stat.fragment_size()),
            // Not known is not full: a write that fails says so itself.
            Err(_) => Bytes(u64::MAX),
        };
        self.asked = Some((Instant::now(), free));
        free
    }
}
