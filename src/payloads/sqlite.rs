//! The ledger in one SQLite file.
//!
//! One thread owns the only connection that writes. It takes everything that is queued into one transaction, commits it
//! (WAL, `synchronous=FULL`: an fdatasync), and then answers everybody: group commit without any delay of its own. A few
//! more connections read on blocking threads; in WAL mode they neither wait for the writer nor hold it up.
//!
//! # Invariants
//! 1. An answer is sent only after the commit that it speaks of.
//! 2. A job that fails takes no neighbour down: its transaction is rolled back and every job runs again alone.
//! 3. After a failed write or sync the handle is not used again: it is closed, the file opened anew, and the whole
//!    log written into it with a sync of its own before anything else is answered.
//!
//! # On disk
//! `appliance/migrations/sqlite`. `FILE`, `FILE-wal`, `FILE-shm`, mode 0600. Freed pages are reused, and given back
//! to the file system by `collect` when they are many (`auto_vacuum=incremental`).

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::types::ToSqlOutput;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, ToSql, Transaction, TransactionBehavior, params};
use tokio::sync::{Mutex, Semaphore, mpsc, oneshot};
use uuid::Uuid;

use super::codec::{self, COLUMNS, COLUMNS_COUNT, Columns, frame};
use super::query::{Query, Value};
use super::rows::{self, Answer, Ask, NewRow, Op, REJECTED_MAX, RawBody, RejectedRow, Step, Stored, TIMER_AGAIN_MS};
use super::{Admitted, Claimed, Collected, Error, Shared};
use crate::event::State;
use crate::ids::Key;
use crate::observe::payloads as observe;

/// Jobs of one transaction. More would only make the first wait longer.
const BATCH_MAX: usize = 1024;
/// Jobs that wait for the writer; further callers wait in `send`.
const QUEUE_MAX: usize = 4096;
const READERS: usize = 4;
/// Pages of the log (16 MiB) after which a commit copies it into the file. An event's row is written three times; the longer
/// the log, the more of that is one write.
const CHECKPOINT_PAGES: u32 = 4096;
/// Bodies that one transaction of the collection frees: it looks at each of their pages, and nobody else writes meanwhile.
const COLLECT_BYTES: i64 = 32 << 20;
/// Free pages (64 MiB) that collection leaves for reuse.
const FREE_PAGES_KEPT: i64 = 16_384;

pub(super) struct Sqlite {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Message>,
    readers: Readers,
}

enum Message {
    Job(Box<dyn Job>),
    Close(oneshot::Sender<()>),
}

/// Work inside the writer's transaction. `run` may be called again after a rollback.
trait Job: Send {
    fn run(&mut self, db: &Connection) -> Result<(), Fault>;
    fn answer(self: Box<Self>, fault: Option<Error>);
    fn doing(&self) -> &'static str;
}

struct Task<F, T> {
    doing: &'static str,
    work: F,
    result: Option<T>,
    reply: oneshot::Sender<Result<T, Error>>,
}

impl<F, T> Job for Task<F, T>
where
    F: FnMut(&Connection) -> Result<T, Fault> + Send,
    T: Send,
{
    fn run(&mut self, db: &Connection) -> Result<(), Fault> {
        self.result = Some((self.work)(db)?);
        Ok(())
    }
    fn answer(self: Box<Self>, fault: Option<Error>) {
        let closed = || Error::Store { doing: self.doing, cause: "the transaction did not run".into() };
        // Nobody waits any more when the caller gave up: what is committed is found again by its key.
        let _ = self.reply.send(match fault {
            Some(error) => Err(error),
            None => self.result.ok_or_else(closed),
        });
    }
    fn doing(&self) -> &'static str {
        self.doing
    }
}

/// What went wrong inside a transaction.
#[derive(Debug)]
pub(super) enum Fault {
    Sql(rusqlite::Error),
    Own(Error),
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}
impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Own(error)
    }
}
impl From<codec::Unreadable> for Fault {
    fn from(unreadable: codec::Unreadable) -> Self {
        Self::Own(unreadable.into())
    }
}

impl Fault {
    fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Sql(error) => error.sqlite_error_code(),
            Self::Own(_) => None,
        }
    }

    /// What the handle believes about the file may be wrong now.
    fn spoils_the_handle(&self) -> bool {
        matches!(self.code(), Some(ErrorCode::SystemIoFailure | ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
    }

    fn into_error(self, doing: &'static str, file: &Path) -> Error {
        let code = self.code();
        let error = match self {
            Self::Own(error) => return error,
            Self::Sql(error) => error,
        };
        let file = file.display();
        let cause = match code {
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                return Error::Unusable(format!(
                    "cannot {doing}: {file} is damaged ({error}); stop the service, keep a copy of it and restore it from a backup"
                ));
            }
            Some(ErrorCode::DiskFull) => format!("the disk that holds {file} is full"),
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                format!("another process holds the lock of {file}")
            }
            Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen | ErrorCode::PermissionDenied) => {
                format!("{file} cannot be opened for writing ({error}): look at its owner and mode, and its folder's")
            }
            _ => format!("{file}: {error}"),
        };
        Error::Store { doing, cause: cause.into() }
    }
}

impl Sqlite {
    /// Blocking: opens, or makes, and migrates.
    pub fn open(file: &Path, shared: Arc<Shared>) -> Result<Self, Error> {
        let writer = Writer { file: file.to_owned(), shared: shared.clone(), db: Some(open(file, &shared)?) };
        let (jobs, queue) = mpsc::channel(QUEUE_MAX);
        std::thread::Builder::new().name("payloads".into()).spawn(move || writer.run(queue)).map_err(|error| {
            Error::Store { doing: "start the payload store's thread", cause: error.to_string().into() }
        })?;
        let readers =
            Readers { file: file.to_owned(), permits: Arc::new(Semaphore::new(READERS)), idle: Arc::default() };
        Ok(Self { shared, jobs, readers })
    }

    /// Runs `work` in the writer's next transaction; answers when that is committed.
    async fn write<T, F>(&self, doing: &'static str, work: F) -> Result<T, Error>
    where
        F: FnMut(&Connection) -> Result<T, Fault> + Send + 'static,
        T: Send + 'static,
    {
        let closed = || Error::Store { doing, cause: "the payload store is closed".into() };
        let (reply, answer) = oneshot::channel();
        let task = Task { doing, work, result: None, reply };
        self.jobs.send(Message::Job(Box::new(task))).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }

    async fn read<T, F>(&self, doing: &'static str, work: F) -> Result<T, Error>
    where
        F: FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
        T: Send + 'static,
    {
        self.readers.run(doing, work).await
    }

    fn now(&self) -> i64 {
        self.shared.clock.now().0
    }

    pub async fn admit(&self, rows: Arc<Vec<NewRow>>) -> Result<Vec<Admitted>, Error> {
        let now = self.now();
        self.write("store payloads", move |db| rows.iter().map(|row| admit(db, row, now)).collect()).await
    }

    pub async fn load(&self, keys: Vec<Key>) -> Result<Vec<Option<Stored>>, Error> {
        self.read("load payloads", move |db| {
            let mut statement = db.prepare_cached(
                "SELECT c.envelope, c.body, c.sealed FROM events e JOIN contents c ON c.seq = e.seq \
                 WHERE e.id = ?1 AND e.tenant = ?2",
            )?;
            let mut found = Vec::with_capacity(keys.len());
            for key in &keys {
                let stored = statement
                    .query_row(params![Id(key.execution_id.0), key.tenant.as_str()], |row| {
                        Ok(Stored { envelope: row.get(0)?, body: row.get(1)?, sealed: row.get(2)? })
                    })
                    .optional()?;
                found.push(stored);
            }
            Ok(found)
        })
        .await
    }

    pub async fn claim(&self, asks: Vec<Ask>) -> Result<Vec<Answer>, Error> {
        let now = self.now();
        let with_body = asks.iter().any(|ask| ask.with_body);
        let asks = Arc::new(asks);
        let mut answers = {
            let asks = asks.clone();
            self.write("claim events", move |db| {
                asks.iter().map(|ask| claim(db, ask, now)).collect::<Result<Vec<_>, _>>()
            })
            .await?
        };
        if with_body {
            let wanted: Vec<_> = answers
                .iter()
                .map(|answer| match answer {
                    Answer::Granted { columns, .. } => Some(columns.seq),
                    Answer::Other(_) => None,
                })
                .collect();
            let bodies = self.read("load payloads", move |db| bodies(db, &wanted)).await?;
            for (answer, found) in answers.iter_mut().zip(bodies) {
                if let Answer::Granted { body, .. } = answer {
                    *body = found;
                }
            }
        }
        Ok(answers)
    }

    pub async fn apply(&self, steps: Vec<Step>) -> Result<Vec<bool>, Error> {
        let now = self.now();
        self.write("write to the ledger", move |db| steps.iter().map(|step| apply(db, step, now)).collect()).await
    }

    pub async fn due(&self, limit: usize) -> Result<Vec<Columns>, Error> {
        let now = self.now();
        self.write("find what is due", move |db| {
            let found = columns(
                db,
                &format!(
                    "SELECT {COLUMNS} FROM events e JOIN contents c ON c.seq = e.seq WHERE e.timer_at <= ?1 \
                     AND e.phase + 0 = 0 AND (e.claim_until IS NULL OR e.claim_until <= ?1) ORDER BY e.timer_at LIMIT ?2"
                ),
                params![now, limit as i64],
            )?;
            let mut mark = db.prepare_cached("UPDATE events SET timer_at = ?2, phase_at = ?3 WHERE seq = ?1")?;
            for row in &found {
                let late = now.saturating_sub(row.next_at.unwrap_or(now));
                mark.execute(params![row.seq, now + late.max(TIMER_AGAIN_MS), now])?;
            }
            Ok(found)
        })
        .await
    }

    pub async fn stale(&self, before: i64, limit: usize) -> Result<Vec<Columns>, Error> {
        let now = self.now();
        self.write("find what is stale", move |db| {
            let found = columns(
                db,
                &format!(
                    "SELECT {COLUMNS} FROM events e JOIN contents c ON c.seq = e.seq WHERE e.phase = 0 AND e.phase_at <= ?1 \
                     AND e.updated_at <= ?1 AND (e.claim_until IS NULL OR e.claim_until <= ?2) \
                     AND (e.next_at IS NULL OR e.next_at <= ?2) ORDER BY e.phase_at LIMIT ?3"
                ),
                params![before, now, limit as i64],
            )?;
            let mut mark = db.prepare_cached("UPDATE events SET phase_at = ?2 WHERE seq = ?1")?;
            for row in &found {
                mark.execute(params![row.seq, now])?;
            }
            Ok(found)
        })
        .await
    }

    pub async fn set_message_ids(&self, ids: Vec<(Key, String)>) -> Result<(), Error> {
        self.write("note message ids", move |db| {
            let mut statement = db.prepare_cached("UPDATE events SET message_id = ?3 WHERE id = ?1 AND tenant = ?2")?;
            for (key, id) in &ids {
                statement.execute(params![Id(key.execution_id.0), key.tenant.as_str(), id])?;
            }
            Ok(())
        })
        .await
    }

    pub async fn get(&self, key: Key) -> Result<Option<Columns>, Error> {
        self.read("read the ledger", move |db| Ok(one(db, &key)?)).await
    }

    pub async fn list(&self, query: Query) -> Result<Vec<Columns>, Error> {
        self.read("list the ledger", move |db| {
            Ok(columns(db, &query.sql, rusqlite::params_from_iter(query.values.iter()))?)
        })
        .await
    }

    pub async fn count(&self, query: Query) -> Result<u64, Error> {
        self.read("count in the ledger", move |db| {
            let values = rusqlite::params_from_iter(query.values.iter());
            Ok(db.prepare_cached(&query.sql)?.query_row(values, |row| row.get::<_, i64>(0))?.max(0) as u64)
        })
        .await
    }

    pub async fn states(&self) -> Result<Vec<(i16, i64)>, Error> {
        self.read("count in the ledger", |db| {
            let mut statement = db.prepare_cached("SELECT state, count(*) FROM events GROUP BY state")?;
            let counts = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            Ok(counts.collect::<Result<_, _>>()?)
        })
        .await
    }

    pub async fn cancel(&self, key: Key) -> Result<Option<State>, Error> {
        let now = self.now();
        self.write("cancel an event", move |db| {
            let Some(row) = one(db, &key)? else { return Ok(None) };
            let state = codec::state_of(row.state)?;
            let claimed = row.claim_until.is_some_and(|until| until > now);
            if state != State::Relayed || claimed {
                return Ok(Some(state));
            }
            end(db, row.seq, State::Cancelled, now)?;
            Ok(Some(State::Cancelled))
        })
        .await
    }

    pub async fn replay(&self, key: Key) -> Result<Option<bool>, Error> {
        let now = self.now();
        self.write("replay a dead letter", move |db| {
            let Some(row) = one(db, &key)? else { return Ok(None) };
            if codec::state_of(row.state)? != State::Dead {
                return Ok(Some(false));
            }
            db.prepare_cached(
                "UPDATE events SET state = 1, phase = 0, phase_at = ?2, next_at = ?2, timer_at = ?2, attempts = 0, crashes = 0, \
                 replays = replays + 1, finished_at = NULL, error_class = NULL, error = NULL, n8n_execution_id = NULL, \
                 token = token + 1, updated_at = ?2 WHERE seq = ?1",
            )?
            .execute(params![row.seq, now])?;
            Ok(Some(true))
        })
        .await
    }

    pub async fn discard(&self, key: Key) -> Result<Option<bool>, Error> {
        let now = self.now();
        self.write("discard a dead letter", move |db| {
            let Some(row) = one(db, &key)? else { return Ok(None) };
            if codec::state_of(row.state)? != State::Dead {
                return Ok(Some(false));
            }
            end(db, row.seq, State::Cancelled, now)?;
            Ok(Some(true))
        })
        .await
    }

    /// `step` is a `Finish` without a token.
    pub async fn finish_external(&self, key: Key, step: Step) -> Result<Option<State>, Error> {
        let now = self.now();
        self.write("end an event", move |db| {
            let Some(row) = one(db, &key)? else { return Ok(None) };
            let state = codec::state_of(row.state)?;
            if state.is_final() {
                return Ok(Some(state));
            }
            let tail = step.tail.as_deref().unwrap_or_default();
            let attempts = row.attempts + 1;
            let mut history = row.history.unwrap_or_default();
            history.extend(row.current.unwrap_or_default());
            history.extend(frame(attempts as u32, tail));
            let state = codec::state_of(step.state)?;
            let (phase, phase_at) = codec::phase_of(state, row.accepted_at, now);
            db.prepare_cached(
                "UPDATE events SET state = ?2, phase = ?3, phase_at = ?4, finished_at = ?5, updated_at = ?5, timer_at = NULL, \
                 attempts = ?6, current = NULL, history = ?7, error_class = ?8, error = ?9, \
                 n8n_execution_id = coalesce(?10, n8n_execution_id), message_id = coalesce(?11, message_id), \
                 token = token + 1, claim_owner = NULL, claim_until = NULL WHERE seq = ?1",
            )?
            .execute(params![
                row.seq,
                step.state,
                phase,
                phase_at,
                now,
                attempts,
                history,
                step.error_class,
                step.error,
                step.n8n_execution_id,
                step.message_id
            ])?;
            Ok(Some(state))
        })
        .await
    }

    /// `false`: no room.
    pub async fn reject(&self, rejected: super::Rejected, raw: Vec<u8>) -> Result<bool, Error> {
        self.write("keep a rejected message", move |db| {
            let kept: i64 = db.prepare_cached("SELECT count(*) FROM rejected")?.query_row([], |row| row.get(0))?;
            if kept as u64 >= REJECTED_MAX {
                return Ok(false);
            }
            let (topic, id) = (rejected.topic.as_str(), &rejected.message_id);
            db.prepare_cached(
                "INSERT INTO rejected (topic, message_id, at, reason, raw) VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING",
            )?
            .execute(params![topic, id, rejected.at.0, rejected.reason, raw])?;
            Ok(true)
        })
        .await
    }

    pub async fn rejected(&self, limit: usize) -> Result<Vec<RejectedRow>, Error> {
        self.read("list rejected messages", move |db| {
            let mut statement = db.prepare_cached(
                "SELECT at, topic, message_id, reason, raw FROM rejected ORDER BY at DESC, topic, message_id LIMIT ?1",
            )?;
            let rows = statement.query_map([limit as i64], |row| {
                Ok(RejectedRow {
                    at: row.get(0)?,
                    topic: row.get(1)?,
                    message_id: row.get(2)?,
                    reason: row.get(3)?,
                    raw: row.get(4)?,
                })
            })?;
            Ok(rows.collect::<Result<_, _>>()?)
        })
        .await
    }

    pub async fn collect(&self, limit: usize) -> Result<(Collected, u64), Error> {
        let (now, limit) = (self.now(), limit as i64);
        let payloads_before = now - self.shared.payload_age_max.as_millis();
        let rows_before = now - self.shared.ledger_age_max.as_millis();
        let mut payloads = 0;
        loop {
            let (found, freed) = self
                .write("collect what is past its age", move |db| {
                    // An event that is complete has a payload of its own to free; what follows the first goes as far as it fits.
                    let mut bytes = 0;
                    let mut fit = old(db, codec::COMPLETE, payloads_before, limit - payloads)?;
                    let found = fit.len() as i64;
                    fit.retain(|(_, body)| {
                        let first = bytes == 0;
                        bytes += body;
                        first || bytes <= COLLECT_BYTES
                    });
                    for (seq, _) in &fit {
                        db.prepare_cached("UPDATE contents SET body = NULL WHERE seq = ?1")?.execute([seq])?;
                        db.prepare_cached("UPDATE events SET phase = 2 WHERE seq = ?1")?.execute([seq])?;
                    }
                    Ok((found, fit.len() as i64))
                })
                .await?;
            payloads += freed;
            if freed == found {
                break;
            }
        }
        let (rows, rejected) = self
            .write("collect what is past its age", move |db| {
                let rows = old(db, codec::COLLECTED, rows_before, limit)?;
                for (seq, _) in &rows {
                    db.prepare_cached("DELETE FROM contents WHERE seq = ?1")?.execute([seq])?;
                    db.prepare_cached("DELETE FROM events WHERE seq = ?1")?.execute([seq])?;
                }
                let rejected = db
                    .prepare_cached(
                        "DELETE FROM rejected WHERE (topic, message_id) IN \
                         (SELECT topic, message_id FROM rejected WHERE at <= ?1 ORDER BY at LIMIT ?2)",
                    )?
                    .execute(params![rows_before, limit])?;
                Ok((rows.len() as u64, rejected as u64))
            })
            .await?;
        let collected = (Collected { payloads: payloads as u64, rows }, rejected);
        if collected.0.payloads > 0 || collected.0.rows > 0 {
            self.write("give back free pages", |db| {
                let free: i64 = db.query_row("PRAGMA freelist_count", [], |row| row.get(0))?;
                if free > FREE_PAGES_KEPT {
                    // A step at a time: moving pages holds the writer.
                    let step = (free - FREE_PAGES_KEPT).min(2048);
                    let mut vacuum = db.prepare(&format!("PRAGMA incremental_vacuum({step})"))?;
                    let mut rows = vacuum.query([])?;
                    while rows.next()?.is_some() {}
                }
                Ok(())
            })
            .await?;
        }
        Ok(collected)
    }

    #[cfg(test)]
    pub async fn limit_pages(&self, pages: u32) {
        let set = move |db: &Connection| {
            Ok(db.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |row| row.get::<_, i64>(0))?)
        };
        self.write("limit the file", set).await.unwrap();
    }

    pub async fn close(&self) {
        let (reply, closed) = oneshot::channel();
        if self.jobs.send(Message::Close(reply)).await.is_ok() {
            // The thread is gone when it cannot answer: closed as well.
            let _ = closed.await;
        }
        self.readers.permits.close();
        self.readers.idle.lock().await.clear();
    }
}

struct Writer {
    file: PathBuf,
    shared: Arc<Shared>,
    /// `None` after a failure, until it could be opened anew.
    db: Option<Connection>,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Message>) {
        let mut batch = Vec::new();
        while let Some(first) = queue.blocking_recv() {
            let (mut next, mut close) = (Some(first), None);
            while let Some(message) = next {
                match message {
                    Message::Job(job) => batch.push(job),
                    Message::Close(reply) => {
                        close = Some(reply);
                        break;
                    }
                }
                next = if batch.len() < BATCH_MAX { queue.try_recv().ok() } else { None };
            }
            if !batch.is_empty() {
                self.batch(std::mem::take(&mut batch));
            }
            if let Some(reply) = close {
                queue.close();
                self.end();
                let _ = reply.send(());
                return;
            }
        }
        self.end();
    }

    fn end(&mut self) {
        if let Some(db) = self.db.take() {
            // Best effort: the log is as durable as the file, and is read at the next start.
            if let Err(error) = db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
                tracing::debug!(%error, "the payload store's log stays for the next start");
            }
        }
    }

    fn batch(&mut self, mut batch: Vec<Box<dyn Job>>) {
        match self.transaction(&mut batch) {
            Ok(()) => batch.into_iter().for_each(|job| job.answer(None)),
            Err(fault) if fault.spoils_the_handle() || fault.code() == Some(ErrorCode::DiskFull) => {
                self.fail(batch, fault)
            }
            Err(fault) if batch.len() == 1 => self.fail(batch, fault),
            Err(_) => {
                for job in batch {
                    let mut alone = vec![job];
                    match self.transaction(&mut alone) {
                        Ok(()) => alone.into_iter().for_each(|job| job.answer(None)),
                        Err(fault) => self.fail(alone, fault),
                    }
                }
            }
        }
    }

    fn fail(&mut self, batch: Vec<Box<dyn Job>>, fault: Fault) {
        let spoiled = fault.spoils_the_handle();
        let Some(doing) = batch.first().map(|job| job.doing()) else { return };
        let error = fault.into_error(doing, &self.file);
        if spoiled {
            observe::Reopened { environment: &self.shared.environment, cause: &error.to_string() }.emit();
            self.db = None;
        }
        batch.into_iter().for_each(|job| job.answer(Some(error.clone())));
    }

    fn transaction(&mut self, batch: &mut [Box<dyn Job>]) -> Result<(), Fault> {
        if self.db.is_none() {
            let db = open(&self.file, &self.shared)?;
            // What the log holds may be in memory only, after a sync that failed: write all of it again, and sync that.
            let busy: i64 = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))?;
            if busy != 0 {
                return Err(Error::Store {
                    doing: "open the payload store anew",
                    cause: "readers hold its log".into(),
                }
                .into());
            }
            self.db = Some(db);
        }
        let Some(db) = &self.db else { return Ok(()) };
        let transaction = Transaction::new_unchecked(db, TransactionBehavior::Immediate)?;
        for job in batch.iter_mut() {
            job.run(&transaction)?;
        }
        Ok(transaction.commit()?)
    }
}

/// Opens the file, makes it if it is not there, and brings its tables up to date.
fn open(file: &Path, shared: &Shared) -> Result<Connection, Error> {
    const DOING: &str = "open the payload store";
    let io =
        |error: std::io::Error| Error::Store { doing: DOING, cause: format!("{}: {error}", file.display()).into() };
    let sql = |error: rusqlite::Error| Fault::from(error).into_error(DOING, file);
    if !file.exists() {
        if let Some(dir) = file.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io)?;
        }
        // SQLite gives its log the mode of the file.
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(file)
            .map_err(io)?
            .sync_all()
            .map_err(io)?;
        if let Some(dir) = file.parent() {
            fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)?;
        }
    }
    let mut db = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)
        .map_err(sql)?;
    // The bundled SQLite looks at bound values when it plans, and prepares a statement again when they change; our statements have one right
    // plan each.
    db.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map_err(sql)?;
    db.busy_timeout(Duration::from_secs(5)).map_err(sql)?;
    db.set_prepared_statement_cache_capacity(64);
    db.execute_batch(&format!(
        "PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY; \
         PRAGMA cache_size = -16384; PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}; PRAGMA journal_size_limit = 67108864"
    ))
    .map_err(sql)?;
    let mode: String = db.query_row("PRAGMA journal_mode", [], |row| row.get(0)).map_err(sql)?;
    if mode != "wal" {
        return Err(Error::Unusable(format!(
            "{} is on a file system without shared memory: choose a local disk",
            file.display()
        )));
    }
    migrate(&mut db, file, shared)?;
    Ok(db)
}

fn migrate(db: &mut Connection, file: &Path, shared: &Shared) -> Result<(), Error> {
    let start = Instant::now();
    let migrations =
        super::migrations(&[("V1__ledger", include_str!("../../appliance/migrations/sqlite/V1__ledger.sql"))])?;
    let newest = migrations.iter().map(|m| m.version()).max().unwrap_or(0);
    let report = refinery::Runner::new(&migrations).set_abort_missing(false).run(db).map_err(|error| {
        Error::Unusable(format!("cannot bring the tables of {} up to date: {error}", file.display()))
    })?;
    let sql = |error: rusqlite::Error| Fault::from(error).into_error("read the payload store's format", file);
    let oldest: i64 = db.query_row("SELECT oldest_reader FROM format", [], |row| row.get(0)).map_err(sql)?;
    super::check_format(oldest, i64::from(newest))?;
    let ours = &shared.environment;
    db.execute("UPDATE format SET environment = ?1 WHERE environment IS NULL", [ours.as_str()]).map_err(sql)?;
    let owner: Option<String> = db.query_row("SELECT environment FROM format", [], |row| row.get(0)).map_err(sql)?;
    super::check_environment(owner.as_deref(), ours)?;
    let newest = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
    let newest: Option<([u8; 16], String, Vec<u8>)> =
        db.query_row(super::NEWEST, [], newest).optional().map_err(sql)?;
    if let Some((id, tenant, envelope)) = newest {
        shared.codec.check_key(&tenant, Uuid::from_bytes(id), &envelope)?;
    }
    let applied = report.applied_migrations().len();
    observe::Migrated { environment: &shared.environment, kind: "sqlite", applied, took: start.elapsed() }.emit();
    Ok(())
}

/// Connections that read, each used by one call at a time.
struct Readers {
    file: PathBuf,
    permits: Arc<Semaphore>,
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Readers {
    async fn run<T, F>(&self, doing: &'static str, work: F) -> Result<T, Error>
    where
        F: FnOnce(&Connection) -> Result<T, Fault> + Send + 'static,
        T: Send + 'static,
    {
        let closed = || Error::Store { doing, cause: "the payload store is closed".into() };
        let permit = self.permits.clone().acquire_owned().await.map_err(|_| closed())?;
        let (file, idle) = (self.file.clone(), self.idle.clone());
        let task = move || {
            let _permit = permit;
            let known = idle.blocking_lock().pop();
            let fault = |fault: Fault| fault.into_error(doing, &file);
            let db = match known {
                Some(db) => db,
                None => reader(&file).map_err(|error| fault(error.into()))?,
            };
            let result = work(&db);
            // One that failed may be spoiled: the next call opens a new one.
            if result.is_ok() {
                idle.blocking_lock().push(db);
            }
            result.map_err(fault)
        };
        tokio::task::spawn_blocking(task).await.map_err(|_| closed())?
    }
}

fn reader(file: &Path) -> rusqlite::Result<Connection> {
    let db = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    db.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    db.busy_timeout(Duration::from_secs(5))?;
    db.execute_batch("PRAGMA query_only = TRUE; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -2048")?;
    Ok(db)
}

/// A UUID as its 16 bytes.
struct Id(Uuid);

impl ToSql for Id {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(self.0.as_bytes().as_slice()))
    }
}

impl ToSql for Value {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        match self {
            Value::Int(int) => int.to_sql(),
            Value::Text(text) => text.to_sql(),
        }
    }
}

fn columns_of(row: &rusqlite::Row<'_>) -> rusqlite::Result<Columns> {
    let id: [u8; 16] = row.get(1)?;
    Ok(Columns {
        seq: row.get(0)?,
        id: Uuid::from_bytes(id),
        tenant: row.get(2)?,
        body_hash: row.get(3)?,
        body_bytes: row.get(4)?,
        relayed_at: row.get(5)?,
        updated_at: row.get(6)?,
        finished_at: row.get(7)?,
        state: row.get(8)?,
        next_at: row.get(9)?,
        attempts: row.get(10)?,
        crashes: row.get(11)?,
        replays: row.get(12)?,
        token: row.get(13)?,
        claim_owner: row.get(14)?,
        claim_until: row.get(15)?,
        error_class: row.get(16)?,
        error: row.get(17)?,
        n8n_execution_id: row.get(18)?,
        message_id: row.get(19)?,
        current: row.get(20)?,
        history: row.get(21)?,
        accepted_at: row.get(22)?,
        envelope: row.get(COLUMNS_COUNT - 1)?,
    })
}

fn columns(db: &Connection, sql: &str, params: impl rusqlite::Params) -> rusqlite::Result<Vec<Columns>> {
    db.prepare_cached(sql)?.query_map(params, columns_of)?.collect()
}

fn one(db: &Connection, key: &Key) -> rusqlite::Result<Option<Columns>> {
    db.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM events e JOIN contents c ON c.seq = e.seq WHERE e.id = ?1 AND e.tenant = ?2"
    ))?
    .query_row(params![Id(key.execution_id.0), key.tenant.as_str()], columns_of)
    .optional()
}

fn bodies(db: &Connection, wanted: &[Option<i64>]) -> Result<Vec<Option<RawBody>>, Fault> {
    let mut statement = db.prepare_cached("SELECT body, sealed FROM contents WHERE seq = ?1")?;
    let mut found = Vec::with_capacity(wanted.len());
    for seq in wanted {
        let Some(seq) = seq else {
            found.push(None);
            continue;
        };
        let body = statement
            .query_row([seq], |row| Ok((row.get::<_, Option<Vec<u8>>>(0)?, row.get::<_, i16>(1)?)))
            .optional()?;
        found.push(body.and_then(|(body, sealed)| Some((body?, sealed))));
    }
    Ok(found)
}

fn admit(db: &Connection, row: &NewRow, now: i64) -> Result<Admitted, Fault> {
    let phase_at = if row.phase == codec::DEAD { row.accepted_at } else { now.max(row.deliver_at.unwrap_or(now)) };
    let attempts = i32::from(row.history.is_some());
    let added = db
        .prepare_cached(
            "INSERT INTO events (id, tenant, body_hash, body_bytes, workflow, accepted_at, relayed_at, updated_at, finished_at, \
             state, phase, phase_at, next_at, timer_at, attempts, error_class, error, n8n_execution_id, history) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7, ?8, ?9, ?10, ?11, ?12, ?12, ?13, ?14, ?15, ?16, ?17) \
             ON CONFLICT (id, tenant) DO NOTHING",
        )?
        .execute(params![
            Id(row.id),
            row.tenant,
            row.body_hash.as_slice(),
            row.body_bytes,
            row.workflow,
            row.accepted_at,
            now,
            row.finished_at,
            row.state,
            row.phase,
            phase_at,
            row.deliver_at,
            attempts,
            row.error_class,
            row.error,
            row.n8n_execution_id,
            row.history
        ])?;
    if added == 1 {
        let seq = db.last_insert_rowid();
        db.prepare_cached("INSERT OR REPLACE INTO contents (seq, envelope, sealed, body) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![seq, row.envelope, row.sealed, row.body.as_ref()])?;
        return Ok(Admitted::New);
    }
    let (hash, state): (Vec<u8>, i16) = db
        .prepare_cached("SELECT body_hash, state FROM events WHERE id = ?1 AND tenant = ?2")?
        .query_row(params![Id(row.id), row.tenant], |found| Ok((found.get(0)?, found.get(1)?)))?;
    if hash != row.body_hash {
        return Ok(Admitted::Conflict);
    }
    Ok(Admitted::Same { state: codec::state_of(state)? })
}

fn claim(db: &Connection, ask: &Ask, now: i64) -> Result<Answer, Fault> {
    let Some(mut row) = one(db, &ask.key)? else { return Ok(Answer::Other(Claimed::Unknown)) };
    if row.body_hash != ask.body_hash {
        return Ok(Answer::Other(Claimed::Mismatch));
    }
    let state = codec::state_of(row.state)?;
    if let Some(obstacle) = rows::obstacle(state, row.claim_until, row.next_at, now) {
        return Ok(Answer::Other(obstacle));
    }
    row.token += 1;
    let begin = ask.begin.as_ref().filter(|_| state == State::Relayed);
    match begin {
        None => {
            db.prepare_cached(
                "UPDATE events SET token = ?2, claim_owner = ?3, claim_until = ?4, updated_at = ?5 WHERE seq = ?1",
            )?
            .execute(params![row.seq, row.token, ask.owner, ask.until, now])?;
        }
        Some((tail, begun_at)) => {
            row.attempts += 1;
            row.current = Some(frame(row.attempts as u32, tail));
            row.state = codec::state_code(State::Delivering);
            db.prepare_cached(
                "UPDATE events SET token = ?2, claim_owner = ?3, claim_until = ?4, updated_at = ?5, state = 2, \
                 attempts = ?6, begun_token = ?2, begun_at = ?7, current = ?8, timer_at = NULL, \
                 message_id = coalesce(?9, message_id) WHERE seq = ?1",
            )?
            .execute(params![
                row.seq,
                row.token,
                ask.owner,
                ask.until,
                now,
                row.attempts,
                begun_at,
                row.current,
                ask.message_id
            ])?;
            if ask.message_id.is_some() {
                row.message_id = ask.message_id.clone();
            }
        }
    }
    row.claim_owner = Some(ask.owner.clone());
    row.claim_until = Some(ask.until);
    row.updated_at = now;
    Ok(Answer::Granted { columns: Box::new(row), begun: begin.is_some(), body: None })
}

/// What a step needs to know of its row.
struct Standing {
    seq: i64,
    state: i16,
    phase: i16,
    token: i64,
    claim_until: Option<i64>,
    attempts: i32,
    begun_token: i64,
    begun_at: i64,
    accepted_at: i64,
    current: Option<Vec<u8>>,
    history: Option<Vec<u8>>,
}

fn apply(db: &Connection, step: &Step, now: i64) -> Result<bool, Fault> {
    let standing = db
        .prepare_cached(
            "SELECT seq, state, phase, token, claim_until, attempts, begun_token, begun_at, accepted_at, current, history \
             FROM events WHERE id = ?1 AND tenant = ?2",
        )?
        .query_row(params![Id(step.id), step.tenant], |row| {
            Ok(Standing {
                seq: row.get(0)?,
                state: row.get(1)?,
                phase: row.get(2)?,
                token: row.get(3)?,
                claim_until: row.get(4)?,
                attempts: row.get(5)?,
                begun_token: row.get(6)?,
                begun_at: row.get(7)?,
                accepted_at: row.get(8)?,
                current: row.get(9)?,
                history: row.get(10)?,
            })
        })
        .optional()?;
    let Some(row) = standing else { return Ok(false) };
    if row.token != step.token || row.claim_until.is_none() || row.phase != codec::OPEN {
        return Ok(step.was_applied(row.state, row.token, row.claim_until));
    }
    let number = if step.number > 0 { step.number } else { row.attempts as u32 };
    let ended = || -> Option<Vec<u8>> {
        let last = match &step.tail {
            Some(tail) => frame(number, tail),
            None => row.current.clone()?,
        };
        Some([row.history.as_deref().unwrap_or_default(), &last].concat())
    };
    let (seq, n8n, message) = (row.seq, &step.n8n_execution_id, &step.message_id);
    match step.op {
        Op::Begin => {
            if row.begun_token == row.token && row.begun_at == step.begun_at {
                return Ok(true);
            }
            // An attempt that nobody ended stays visible as such.
            let history =
                row.current.as_ref().map(|current| [row.history.as_deref().unwrap_or_default(), current].concat());
            let attempts = row.attempts + 1;
            let current = frame(attempts as u32, step.tail.as_deref().unwrap_or_default());
            db.prepare_cached(
                "UPDATE events SET state = 2, attempts = ?2, begun_token = token, begun_at = ?3, current = ?4, \
                 history = coalesce(?5, history), timer_at = NULL, message_id = coalesce(?6, message_id), updated_at = ?7 \
                 WHERE seq = ?1",
            )?
            .execute(params![seq, attempts, step.begun_at, current, history, message, now])?;
        }
        Op::Follow => {
            let current = frame(number, step.tail.as_deref().unwrap_or_default());
            db.prepare_cached(
                "UPDATE events SET current = ?2, claim_until = ?3, n8n_execution_id = coalesce(?4, n8n_execution_id), \
                 message_id = coalesce(?5, message_id), updated_at = ?6 WHERE seq = ?1",
            )?
            .execute(params![seq, current, step.at, n8n, message, now])?;
        }
        Op::Finish => {
            let (phase, phase_at) = codec::phase_of(codec::state_of(step.state)?, row.accepted_at, now);
            db.prepare_cached(
                "UPDATE events SET state = ?2, phase = ?3, phase_at = ?4, finished_at = ?5, updated_at = ?5, timer_at = NULL, \
                 current = NULL, history = coalesce(?6, history), error_class = ?7, error = ?8, \
                 n8n_execution_id = coalesce(?9, n8n_execution_id), message_id = coalesce(?10, message_id), \
                 claim_owner = NULL, claim_until = NULL WHERE seq = ?1",
            )?
            .execute(params![seq, step.state, phase, phase_at, now, ended(), step.error_class, step.error, n8n, message])?;
        }
        Op::Retry => {
            db.prepare_cached(
                "UPDATE events SET state = 1, phase_at = ?2, next_at = ?2, timer_at = ?2, crashes = crashes + ?3, \
                 current = NULL, history = coalesce(?4, history), error_class = ?5, error = ?6, \
                 n8n_execution_id = coalesce(?7, n8n_execution_id), message_id = coalesce(?8, message_id), \
                 claim_owner = NULL, claim_until = NULL, updated_at = ?9 WHERE seq = ?1",
            )?
            .execute(params![
                seq,
                step.at,
                i32::from(step.crashed),
                ended(),
                step.error_class,
                step.error,
                n8n,
                message,
                now
            ])?;
        }
        Op::Release if row.begun_token == row.token && row.current.is_some() => {
            db.prepare_cached(
                "UPDATE events SET state = 1, attempts = attempts - 1, current = NULL, begun_token = 0, claim_owner = NULL, \
                 claim_until = NULL, updated_at = ?2 WHERE seq = ?1",
            )?
            .execute(params![seq, now])?;
        }
        Op::Release => {
            db.prepare_cached(
                "UPDATE events SET claim_owner = NULL, claim_until = NULL, updated_at = ?2 WHERE seq = ?1",
            )?
            .execute(params![seq, now])?;
        }
        Op::Renew => {
            db.prepare_cached("UPDATE events SET claim_until = ?2 WHERE seq = ?1")?.execute(params![seq, step.at])?;
        }
    }
    Ok(true)
}

/// Rows of a phase that are past their age, the oldest first, and the size of their bodies.
fn old(db: &Connection, phase: i16, before: i64, limit: i64) -> rusqlite::Result<Vec<(i64, i64)>> {
    db.prepare_cached(
        "SELECT seq, body_bytes FROM events WHERE phase = ?1 AND phase_at <= ?2 ORDER BY phase_at LIMIT ?3",
    )?
    .query_map(params![phase, before, limit], |row| Ok((row.get(0)?, row.get(1)?)))?
    .collect()
}

/// Ends a row that nobody holds.
fn end(db: &Connection, seq: i64, state: State, now: i64) -> rusqlite::Result<()> {
    let (phase, phase_at) = codec::phase_of(state, now, now);
    db.prepare_cached(
        "UPDATE events SET state = ?2, phase = ?3, phase_at = ?4, finished_at = ?5, updated_at = ?5, timer_at = NULL, \
         token = token + 1, claim_owner = NULL, claim_until = NULL WHERE seq = ?1",
    )?
    .execute(params![seq, codec::state_code(state), phase, phase_at, now])?;
    Ok(())
}
