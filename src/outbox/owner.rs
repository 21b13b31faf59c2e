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
use super::{
    Backlog, Cancelled, Error, Forward, Found, Held, LeaseLimit, Leased, Sequence, Settle, Status, Unreadable,
};
use crate::clock::Clock;
use crate::ids::{Key, Tenant, Topic};
use crate::observe::outbox as events;
use crate::units::Bytes;

/// Requests of one batch: bounds its latency and its memory.
const BATCH_MAX: usize = 2_048;
/// Where so many asked at once, others are about to: the owner waits a moment for them, so that they share a batch and its sync. A
/// lone caller never waits.
const GATHER_FROM: usize = 8;
const GATHER: Duration = Duration::from_micros(500);
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
    List(Option<Tenant>, bool, Option<Sequence>, usize, bool, Reply<Vec<Found>>),
    Unreadable(bool, Reply<Vec<Unreadable>>),
    Cancel(Key, Reply<Cancelled>),
    Repair(Sequence, bool, Reply<bool>),
    AcknowledgeLoss(Reply<()>),
    Finalize(Reply<(u8, u8)>),
    Backlog(Reply<Vec<Backlog>>),
    Browse(Topic, usize, Reply<Vec<Held>>),
    Close(Reply<()>),
}

/// Opens the store again after a failure; one that proved to be damaged while it was in use is set aside first.
pub type Reopen = Box<dyn Fn(&Failure) -> Result<Engine, Failure> + Send>;

pub struct Owner {
    pub commands: Receiver<Command>,
    pub reopen: Reopen,
    pub dir: PathBuf,
    pub clock: Clock,
    pub status: Arc<Mutex<Status>>,
    /// The folder's lock, held as long as the owner lives.
    pub lock: Option<nix::fcntl::Flock<std::fs::File>>,
}

/// Who waits for a record or a message.
#[derive(Default)]
pub(super) struct Parked {
    leases: Vec<(LeaseLimit, Back, Reply<Given<Leased>>)>,
    receives: Vec<(TopicFilter, usize, Back, Reply<Given<Held>>)>,
}

/// Answers that are given when the batch is durable.
type Answer = Box<dyn FnOnce(Result<(), Error>)>;

/// Answers `value` when the batch is durable, the batch's error otherwise.
fn later<T: 'static>(reply: Reply<T>, value: T) -> Answer {
    Box::new(move |batch| drop(reply.send(batch.map(|()| value))))
}

/// The same for what may have failed on the way: then it is answered at once, like everyone else of the batch.
fn when_durable<T: 'static>(
    result: Result<T, Failure>,
    reply: Reply<T>,
    answers: &mut Vec<Answer>,
) -> Result<(), Failure> {
    match result {
        Ok(value) => {
            answers.push(later(reply, value));
            Ok(())
        }
        Err(failure) => {
            let _ = reply.send(Err(failed_write(&failure)));
            Err(failure)
        }
    }
}

/// What became of a batch.
enum Turn {
    Done,
    /// The last thing asked for was to close.
    Close(Reply<()>),
    Failed(Failure, Option<Reply<()>>),
}

/// What outlives an engine whose store failed.
struct Survives {
    failure: Failure,
    next: u64,
    next_message: u64,
    status: Status,
    tried_at: Instant,
}

impl Owner {
    pub fn run(self, engine: Engine) {
        let mut witness = super::open::Witness::open(&self.dir).ok();
        let mut engine = Some(engine);
        let mut failed: Option<Survives> = None;
        let (mut parked, mut disk) = (Parked::default(), DiskFree::new(self.dir.clone()));
        let mut last = 0;
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
            if last >= GATHER_FROM && !batch.is_empty() {
                std::thread::sleep(GATHER);
            }
            while batch.len() < BATCH_MAX {
                let Ok(command) = self.commands.try_recv() else { break };
                batch.push(command);
            }
            last = batch.len();
            // A store that is gone is tried again once a tick, not once a request.
            if let Some(survives) = failed.as_mut().filter(|s| s.tried_at.elapsed() >= TICK) {
                survives.tried_at = Instant::now();
                engine = self.reopen(survives);
                if engine.is_some() {
                    failed = None;
                    witness = super::open::Witness::open(&self.dir).ok();
                }
            }
            let Some(running) = &mut engine else {
                let cause: Arc<str> = failed.as_ref().map_or_else(String::new, |s| s.failure.to_string()).into();
                let error = Error::Store { doing: "use the outbox", cause };
                let mut close = None;
                for command in batch {
                    match command {
                        Command::Close(reply) => close = Some(reply),
                        command => refuse(command, &error),
                    }
                }
                if let Some(reply) = close {
                    drop(witness);
                    return self.closed(None, parked, reply, Ok(()));
                }
                continue;
            };
            match self.turn(running, batch, &mut parked, &mut disk) {
                Turn::Done => {}
                Turn::Close(reply) => {
                    if let Some(witness) = &mut witness {
                        witness.saw(running.durable_next);
                    }
                    drop(witness);
                    return self.closed(engine, parked, reply, Ok(()));
                }
                Turn::Failed(failure, close) => {
                    events::StoreFailed { dir: &self.dir, error: &failure }.emit();
                    if let Some(reply) = close {
                        drop(witness);
                        return self.closed(engine, parked, reply, Err(failed_write(&failure)));
                    }
                    let mut survives = Survives {
                        failure,
                        next: running.next,
                        next_message: running.next_message,
                        status: running.status.clone(),
                        tried_at: Instant::now(),
                    };
                    // Closed before it is opened again: two handles on one file are never there at once.
                    drop(engine.take());
                    engine = self.reopen(&mut survives);
                    match &mut engine {
                        Some(engine) => self.publish(engine, disk.get()),
                        None => failed = Some(survives),
                    }
                    witness = super::open::Witness::open(&self.dir).ok();
                }
            }
            if let (Some(engine), Some(witness)) = (&engine, &mut witness) {
                witness.saw(engine.durable_next);
            }
        }
    }

    fn reopen(&self, survives: &mut Survives) -> Option<Engine> {
        match (self.reopen)(&survives.failure) {
            Ok(mut engine) => {
                let old = &survives.status;
                // Sequences that the failed batch had taken are not used again.
                engine.skip_to(survives.next, survives.next_message);
                engine.status.reopened = old.reopened + 1;
                engine.status.last_error = Some(survives.failure.to_string());
                engine.status.appended_total = old.appended_total;
                engine.status.confirmed_total = old.confirmed_total;
                engine.status.syncs_total = old.syncs_total;
                Some(engine)
            }
            Err(again) => {
                events::StoreFailed { dir: &self.dir, error: &again }.emit();
                // Whoever reads the status meanwhile finds out.
                self.status.lock().unwrap_or_else(PoisonError::into_inner).last_error = Some(again.to_string());
                survives.failure = again;
                None
            }
        }
    }

    /// No file of the folder is open any more when `reply` hears of it.
    fn closed(self, engine: Option<Engine>, parked: Parked, reply: Reply<()>, result: Result<(), Error>) {
        drop(engine);
        drop(self.lock);
        for (_, _, reply) in parked.leases {
            let _ = reply.send(Err(Error::Closed));
        }
        for (_, _, _, reply) in parked.receives {
            let _ = reply.send(Err(Error::Closed));
        }
        let _ = reply.send(result);
    }

    /// One batch. Everything that is to be appended shares packs and comes last, so that it meets what was settled before it.
    fn turn(&self, engine: &mut Engine, commands: Vec<Command>, parked: &mut Parked, disk: &mut DiskFree) -> Turn {
        let (now, instant) = (self.clock.now(), Instant::now());
        let mut answers: Vec<Answer> = Vec::with_capacity(commands.len());
        let (mut reads, mut close) = (Vec::new(), None);
        let (mut items, mut appends) = (Vec::new(), Vec::new());
        let free = disk.get();
        let mut outcome = Ok(());
        for command in commands {
            match command {
                Command::Append(more, reply) => {
                    appends.push((more.len(), reply));
                    items.extend(more);
                }
                Command::Settle(settles, reply) => {
                    outcome = outcome.and_then(|()| engine.settle(settles, now));
                    answers.push(later(reply, ()));
                }
                Command::Publish(messages, reply) => {
                    let ids = engine.publish(messages, now);
                    answers.push(later(reply, ids));
                }
                Command::Ack(ids, reply) => {
                    outcome = outcome.and_then(|()| engine.ack(&ids, now));
                    answers.push(later(reply, ()));
                }
                Command::Close(reply) => close = Some(reply),
                other => reads.push(other),
            }
        }
        let mut results = engine.append(items, now, free).into_iter();
        for (count, reply) in appends {
            let results: Vec<_> = results.by_ref().take(count).collect();
            answers.push(Box::new(move |batch| {
                // A refusal stands whatever became of the batch.
                let results = results.into_iter().map(|r| r.and_then(|taken| batch.clone().map(|()| taken)));
                let _ = reply.send(results.collect());
            }));
        }
        let outcome = outcome.and_then(|()| engine.expire_keys(now)).and_then(|()| engine.commit());
        if let Err(failure) = outcome {
            return fail(answers, reads, failure, close);
        }
        // Whoever is answered finds figures that know of it.
        self.publish(engine, free);
        for answer in answers {
            answer(Ok(()));
        }
        // What reads, and what changes after it has read; a second commit only where something changed.
        let mut answers: Vec<Answer> = Vec::new();
        engine.reclaim(instant);
        let mut reads = reads.into_iter();
        while let Some(command) = reads.next() {
            if let Err(failure) = read(engine, command, parked, &mut answers, now, instant) {
                return fail(answers, reads.collect(), failure, close);
            }
        }
        let mut gifts = Vec::new();
        let served = serve(engine, parked, &mut gifts, now, instant);
        if let Err(failure) = served.and_then(|()| engine.commit()) {
            for gift in gifts {
                gift.refuse(&failed_write(&failure));
            }
            return fail(answers, Vec::new(), failure, close);
        }
        for gift in gifts {
            gift.give();
        }
        self.publish(engine, free);
        for answer in answers {
            answer(Ok(()));
        }
        match close {
            Some(reply) => Turn::Close(reply),
            None => Turn::Done,
        }
    }

    fn publish(&self, engine: &mut Engine, disk_free: Bytes) {
        let mut status = engine.snapshot();
        status.disk_free = disk_free.0;
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }
}

fn failed_write(failure: &Failure) -> Error {
    failed("write to the outbox", failure)
}

/// Everyone of the failed batch hears that its outcome is unknown.
fn fail(answers: Vec<Answer>, reads: Vec<Command>, failure: Failure, close: Option<Reply<()>>) -> Turn {
    let error = failed_write(&failure);
    for answer in answers {
        answer(Err(error.clone()));
    }
    for command in reads {
        refuse(command, &error);
    }
    Turn::Failed(failure, close)
}

fn read(
    engine: &mut Engine,
    command: Command,
    parked: &mut Parked,
    answers: &mut Vec<Answer>,
    now: crate::clock::Timestamp,
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
        Command::List(tenant, poisoned, after, limit, bodies, reply) => {
            let _ = reply.send(engine.list(tenant.as_ref(), poisoned, after, limit, bodies));
        }
        Command::Unreadable(all, reply) => {
            when_durable(engine.unreadable(all), reply, answers)?;
        }
        Command::Cancel(key, reply) => {
            when_durable(engine.cancel(&key, now), reply, answers)?;
        }
        Command::Repair(sequence, discard, reply) => {
            when_durable(engine.repair(sequence.0, discard), reply, answers)?;
        }
        Command::AcknowledgeLoss(reply) => {
            engine.acknowledge_loss();
            answers.push(later(reply, ()));
        }
        Command::Finalize(reply) => {
            let formats = engine.finalize()?;
            answers.push(later(reply, formats));
        }
        Command::Backlog(reply) => drop(reply.send(Ok(engine.backlog()))),
        Command::Browse(topic, limit, reply) => {
            when_durable(engine.browse(&topic, limit), reply, answers)?;
        }
        Command::Append(..) | Command::Settle(..) | Command::Publish(..) | Command::Ack(..) | Command::Close(_) => {
            unreachable!("handled before the commit")
        }
    }
    Ok(())
}

/// What somebody who waited gets, once what was poisoned or dropped on the way to it is durable.
pub(super) enum Gift {
    Records(Given<Leased>, Reply<Given<Leased>>),
    Messages(Given<Held>, Reply<Given<Held>>),
}

impl Gift {
    fn give(self) {
        match self {
            Self::Records(given, reply) => drop(reply.send(Ok(given))),
            Self::Messages(given, reply) => drop(reply.send(Ok(given))),
        }
    }

    /// The engine that handed it out is gone: there is nothing to give back.
    fn refuse(self, error: &Error) {
        match self {
            Self::Records(given, reply) => {
                given.take();
                let _ = reply.send(Err(error.clone()));
            }
            Self::Messages(given, reply) => {
                given.take();
                let _ = reply.send(Err(error.clone()));
            }
        }
    }
}

/// Finds records and messages for those who wait for them.
pub(super) fn serve(
    engine: &mut Engine,
    parked: &mut Parked,
    gifts: &mut Vec<Gift>,
    now: crate::clock::Timestamp,
    instant: Instant,
) -> Result<(), Failure> {
    // Also while nobody receives: what is due must not keep the owner awake.
    engine.wake(now, instant);
    parked.leases.retain(|(_, _, reply)| !reply.is_closed());
    parked.receives.retain(|(_, _, _, reply)| !reply.is_closed());
    while let Some((limit, ..)) = parked.leases.first() {
        let items = engine.lease(*limit, instant)?;
        if items.is_empty() {
            break;
        }
        let (_, to, reply) = parked.leases.remove(0);
        gifts.push(Gift::Records(Given { items, to }, reply));
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
        gifts.push(Gift::Messages(Given { items, to }, reply));
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
        Command::Finalize(reply) => drop(reply.send(Err(error))),
        Command::Publish(_, reply) => drop(reply.send(Err(error))),
        Command::Lease(_, _, reply) => drop(reply.send(Err(error))),
        Command::Receive(_, _, _, reply) => drop(reply.send(Err(error))),
        Command::Browse(_, _, reply) => drop(reply.send(Err(error))),
        Command::Find(_, reply) => drop(reply.send(Err(error))),
        Command::Unreadable(_, reply) => drop(reply.send(Err(error))),
        Command::List(_, _, _, _, _, reply) => drop(reply.send(Err(error))),
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
