//! The ledger in one schema of a PostgreSQL, shared by the appliances of a fleet.
//!
//! Each operation is one statement over arrays (`unnest`), hence one round trip and one transaction; claims and transitions of
//! concurrent callers share it ([`Group`]). Statements are prepared once per connection. Batches are sorted by key, so that
//! two of them do not wait for each other in a circle; where they do, the one that PostgreSQL ends is repeated.
//!
//! # Invariants
//! 1. All decisions are made inside the statement that acts on them: between two appliances only one wins.
//! 2. `now` is the database's (`clock_timestamp()`), read once per statement in a CTE; only a test's manual clock replaces it.
//!    A comparison with it in place would ask the clock again for each row, and could use no index.
//! 3. A statement that knows the keys of its rows reads those rows and no others, however long the backlog is (`phase + 0`
//!    and `tenant || ''` leave the planner no other way than the key's index: statements are planned while the tables are
//!    empty, when all ways look alike).
//! 4. The tables are made and brought up to date under an advisory lock, by the first connection that works.
//!
//! # Failure
//! A server that goes away in the middle of a transaction: [`Error::Unreachable`], outcome unknown, repeat it. The connection
//! is dropped, the next call makes a new one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use deadpool_postgres::Client;
use tokio::sync::Mutex;
use tokio::time::error::Elapsed;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::codec::{self, COLUMNS, COLUMNS_COUNT, Columns};
use super::group::Group;
use super::query::{Query, Value};
use super::rows::{self, Answer, Ask, NewRow, Op, REJECTED_MAX, RejectedRow, Step, Stored, TIMER_AGAIN_MS};
use super::{Admitted, Claimed, Collected, Error, Shared};
use crate::clock::{Clock, Timestamp};
use crate::config;
use crate::event::State;
use crate::ids::Key;
use crate::observe::payloads as observe;
use crate::postgres::{self, Lease, Pool};

/// Transactions of one kind under way at once. Two keep the server busy while answers travel.
const WORKERS: usize = 2;
/// Bodies of one statement; a larger batch is several statements of one transaction.
const CHUNK_BYTES: usize = 8 << 20;
/// Envelopes find their new rows in a nested loop.
const CHUNK_ROWS: usize = 256;
/// How often a statement that PostgreSQL ended to break a circle of waits is repeated.
const DEADLOCK_REPEATS: usize = 5;
/// Migrations may rewrite an index of a large table.
const MIGRATION_PATIENCE: Duration = Duration::from_secs(600);

/// The current time in a statement whose first parameter is the override.
const NOW: &str = "coalesce($1::bigint, (extract(epoch FROM clock_timestamp()) * 1000)::bigint)";

pub(super) struct Postgres {
    shared: Arc<Shared>,
    pool: Pool,
    schema: String,
    patience: Duration,
    statement_ms: i64,
    migrated: Mutex<bool>,
    claims: Arc<Group<Ask, Answer>>,
    steps: Arc<Group<Step, bool>>,
}

enum Fault {
    Sql(tokio_postgres::Error),
    Own(Error),
}

impl From<tokio_postgres::Error> for Fault {
    fn from(error: tokio_postgres::Error) -> Self {
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

impl From<postgres::Error> for Error {
    fn from(error: postgres::Error) -> Self {
        match error {
            postgres::Error::Refused(text) => Self::Unusable(text),
            postgres::Error::Unreachable(text) => Self::Unreachable(text.into()),
        }
    }
}

impl Fault {
    fn is_deadlock(&self) -> bool {
        let Self::Sql(error) = self else { return false };
        matches!(error.code(), Some(code) if [SqlState::T_R_DEADLOCK_DETECTED, SqlState::T_R_SERIALIZATION_FAILURE].contains(code))
    }

    fn into_error(self, doing: &'static str) -> Error {
        let error = match self {
            Self::Own(error) => return error,
            Self::Sql(error) => error,
        };
        let text = postgres::explain(&error);
        match error.code().map(SqlState::code) {
            // Data that PostgreSQL cannot take: the same again cannot help.
            Some(code) if code.starts_with("22") => Error::Refused(format!("cannot {doing}: {text}")),
            Some("25006") => Error::Store { doing, cause: format!("{text} (is this a standby?)").into() },
            // Connection, resources, shutdown.
            Some(code) if ["08", "53", "57P", "28", "3D"].iter().any(|class| code.starts_with(class)) => {
                Error::Unreachable(text.into())
            }
            Some(_) => Error::Store { doing, cause: text.into() },
            None => Error::Unreachable(text.into()),
        }
    }
}

type Params<'p> = [&'p (dyn ToSql + Sync)];

impl Postgres {
    /// Connects to nothing yet.
    pub fn open(config: &config::payloads::Postgres, shared: Arc<Shared>) -> Result<Self, Error> {
        let pool = Pool::new(&postgres::Options {
            url: &config.url,
            ca_file: config.ca_file.as_deref(),
            schema: Some(&config.schema),
            connections_max: config.connections_max as usize,
            connect_timeout: config.connect_timeout,
            statement_timeout: config.statement_timeout,
            durable: true,
        })?;
        Ok(Self {
            shared,
            pool,
            schema: config.schema.clone(),
            // The server ends a statement first, with a better message.
            patience: Duration::from(config.statement_timeout) + Duration::from_secs(5),
            statement_ms: config.statement_timeout.as_millis(),
            migrated: Mutex::new(false),
            claims: Group::new("claim events", WORKERS),
            steps: Group::new("write to the ledger", WORKERS),
        })
    }

    /// The override for `now`: nothing, except in tests.
    fn now(&self) -> Option<i64> {
        match &self.shared.clock {
            Clock::System => None,
            manual => Some(manual.now().0),
        }
    }

    /// How far `at` is from our now: it is as far from the database's.
    fn distance(&self, at: i64) -> i64 {
        at.saturating_sub(self.shared.clock.now().0)
    }

    async fn client(&self) -> Result<Lease, Error> {
        let mut client = Lease::new(self.pool.get().await?);
        let mut migrated = self.migrated.lock().await;
        if !*migrated {
            let done = tokio::time::timeout(MIGRATION_PATIENCE, self.migrate(&mut client)).await;
            // After a failure it may still hold the advisory lock: it is dropped.
            done.unwrap_or_else(|_| Err(Error::Unreachable("migrations did not end".into())))?;
            *migrated = true;
        }
        Ok(client)
    }

    async fn migrate(&self, client: &mut Client) -> Result<(), Error> {
        const DOING: &str = "bring the ledger's tables up to date";
        let sql = |error: tokio_postgres::Error| Fault::from(error).into_error(DOING);
        let start = Instant::now();
        let schema = &self.schema;
        let migrations =
            super::migrations(&[("V1__ledger", include_str!("../../appliance/migrations/postgres/V1__ledger.sql"))])?;
        let newest = migrations.iter().map(|m| m.version()).max().unwrap_or(0);
        client.batch_execute("SET statement_timeout = 0; SET lock_timeout = 0").await.map_err(sql)?;
        client
            .query("SELECT pg_advisory_lock(hashtext('dealscale ledger'), hashtext($1))", &[schema])
            .await
            .map_err(sql)?;
        // A role that may only use the tables does not have to own them when they are there.
        let known: bool = client
            .query_one("SELECT to_regclass(format('%I.refinery_schema_history', $1::text)) IS NOT NULL", &[schema])
            .await
            .map_err(sql)?
            .get(0);
        let version: i32 = match known {
            true => client
                .query_one("SELECT coalesce(max(version), 0)::int FROM refinery_schema_history", &[])
                .await
                .map_err(sql)?
                .get(0),
            false => 0,
        };
        let mut applied = 0;
        if i64::from(version) < i64::from(newest) {
            let exists: bool = client
                .query_one("SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)", &[schema])
                .await
                .map_err(sql)?
                .get(0);
            if !exists {
                client.batch_execute(&format!("CREATE SCHEMA \"{schema}\"")).await.map_err(sql)?;
            }
            let runner = refinery::Runner::new(&migrations).set_abort_missing(false);
            let report = runner
                .run_async(&mut ***client)
                .await
                .map_err(|error| Error::Store { doing: DOING, cause: chain(&error).into() })?;
            applied = report.applied_migrations().len();
        }
        let oldest: i32 = client.query_one("SELECT oldest_reader FROM format", &[]).await.map_err(sql)?.get(0);
        super::check_format(i64::from(oldest), i64::from(newest))?;
        self.check(client).await?;
        client
            .query("SELECT pg_advisory_unlock(hashtext('dealscale ledger'), hashtext($1))", &[schema])
            .await
            .map_err(sql)?;
        let ms = self.statement_ms;
        client.batch_execute(&format!("SET statement_timeout = {ms}; SET lock_timeout = {ms}")).await.map_err(sql)?;
        observe::Migrated { environment: &self.shared.environment, kind: "postgres", applied, took: start.elapsed() }
            .emit();
        Ok(())
    }

    /// That the database is one for us: takes every character, is not another environment's, was sealed with our key.
    async fn check(&self, client: &Client) -> Result<(), Error> {
        let sql = |error: tokio_postgres::Error| Fault::from(error).into_error("look at the ledger's database");
        let ours = &self.shared.environment;
        let encoding: String = client.query_one("SHOW server_encoding", &[]).await.map_err(sql)?.get(0);
        if encoding != "UTF8" {
            return Err(Error::Unusable(format!(
                "the database has the encoding {encoding}, which cannot hold every name: make one with ENCODING 'UTF8'"
            )));
        }
        let owner = || client.query_one("SELECT environment FROM format", &[]);
        let mut owned: Option<String> = owner().await.map_err(sql)?.get(0);
        if owned.is_none() {
            let claim = "UPDATE format SET environment = $1 WHERE environment IS NULL";
            client.execute(claim, &[&ours.as_str()]).await.map_err(sql)?;
            owned = owner().await.map_err(sql)?.get(0);
        }
        super::check_environment(owned.as_deref(), ours)?;
        match client.query_opt(super::NEWEST, &[]).await.map_err(sql)? {
            Some(row) => self.shared.codec.check_key(row.get(1), row.get(0), row.get(2)),
            None => Ok(()),
        }
    }

    /// Ends the use of `client`: a connection whose state is unknown, or that only reads, does not go back to the pool.
    fn settle<T>(client: Lease, doing: &'static str, result: Result<Result<T, Fault>, Elapsed>) -> Result<T, Error> {
        match result {
            Ok(Ok(value)) => {
                client.end();
                Ok(value)
            }
            Ok(Err(fault)) => {
                // Unknown, or what a failover left behind: the next connection may meet the server that writes.
                let useless = match &fault {
                    Fault::Sql(error) => error.code().is_none_or(|code| *code == SqlState::READ_ONLY_SQL_TRANSACTION),
                    Fault::Own(_) => false,
                };
                let error = fault.into_error(doing);
                if !client.is_closed() && !useless && !matches!(error, Error::Unreachable(_)) {
                    client.end();
                }
                Err(error)
            }
            Err(_) => Err(Error::Unreachable("no answer within the statement timeout".into())),
        }
    }

    /// One prepared statement, repeated when PostgreSQL ended it to break a circle of waits.
    async fn query(
        &self,
        doing: &'static str,
        sql: &str,
        params: &Params<'_>,
    ) -> Result<Vec<tokio_postgres::Row>, Error> {
        let client = self.client().await?;
        let work = async {
            let statement = client.prepare_cached(sql).await?;
            let mut repeats = 0;
            loop {
                match client.query(&statement, params).await.map_err(Fault::from) {
                    Err(fault) if fault.is_deadlock() && repeats < DEADLOCK_REPEATS => repeats += 1,
                    result => return result,
                }
            }
        };
        let result = tokio::time::timeout(self.patience, work).await;
        Self::settle(client, doing, result)
    }

    /// A statement whose text depends on what was asked for: prepared for this one time, because there is no end to them, and
    /// planned for its values, because one tenant has most of the rows and another has none.
    async fn query_once(
        &self,
        doing: &'static str,
        sql: &str,
        params: &Params<'_>,
    ) -> Result<Vec<tokio_postgres::Row>, Error> {
        let mut client = self.client().await?;
        let work = async {
            let transaction = client.build_transaction().read_only(true).start().await?;
            transaction.batch_execute("SET LOCAL plan_cache_mode = force_custom_plan").await?;
            let rows = transaction.query(sql, params).await?;
            transaction.commit().await?;
            Ok(rows)
        };
        let result = tokio::time::timeout(self.patience, work).await;
        Self::settle(client, doing, result)
    }

    pub async fn admit(&self, rows: Arc<Vec<NewRow>>) -> Result<Vec<Admitted>, Error> {
        const DOING: &str = "store payloads";
        // The first of each key stands for it; the others are measured by it.
        let mut first: HashMap<(Uuid, &str), usize> = HashMap::with_capacity(rows.len());
        for (n, row) in rows.iter().enumerate() {
            first.entry((row.id, &row.tenant)).or_insert(n);
        }
        let mut order: Vec<usize> = first.values().copied().collect();
        order.sort_unstable_by_key(|n| (rows[*n].id, &rows[*n].tenant));
        let mut chunks: Vec<Vec<&NewRow>> = vec![Vec::new()];
        let mut bytes = 0;
        for n in order {
            let row = &rows[n];
            if bytes + row.body.len() > CHUNK_BYTES || chunks.last().is_some_and(|c| c.len() >= CHUNK_ROWS) {
                chunks.push(Vec::new());
                bytes = 0;
            }
            bytes += row.body.len();
            if let Some(chunk) = chunks.last_mut() {
                chunk.push(row);
            }
        }
        chunks.retain(|chunk| !chunk.is_empty());
        let mut client = self.client().await?;
        let now = self.now();
        let work = async {
            let mut repeats = 0;
            loop {
                match insert(&mut client, &chunks, now).await {
                    Err(fault) if fault.is_deadlock() && repeats < DEADLOCK_REPEATS => repeats += 1,
                    result => return result,
                }
            }
        };
        let result = tokio::time::timeout(self.patience * chunks.len().max(1) as u32, work).await;
        let added = Self::settle(client, DOING, result)?;
        let mut standing: HashMap<(Uuid, String), ([u8; 32], i16)> = HashMap::new();
        if added.len() < rows.len() {
            let ids: Vec<Uuid> = first.keys().map(|(id, _)| *id).collect();
            let tenants: Vec<&str> = first.keys().map(|(_, tenant)| *tenant).collect();
            let sql = "SELECT e.id, e.tenant, e.body_hash, e.state FROM unnest($1::uuid[], $2::text[]) AS r(id, tenant) \
                JOIN events e ON e.id = r.id AND e.tenant || '' = r.tenant";
            for row in self.query(DOING, sql, &[&ids, &tenants]).await? {
                let hash: Vec<u8> = row.get(2);
                standing.insert((row.get(0), row.get(1)), (hash.try_into().unwrap_or_default(), row.get(3)));
            }
        }
        let mut answers = Vec::with_capacity(rows.len());
        for (n, row) in rows.iter().enumerate() {
            let is_first = first.get(&(row.id, row.tenant.as_str())) == Some(&n);
            let key = (row.id, row.tenant.clone());
            answers.push(match standing.get(&key) {
                _ if is_first && added.contains_key(&key) => Admitted::New,
                Some((hash, _)) if *hash != row.body_hash => Admitted::Conflict,
                Some((_, state)) => Admitted::Same { state: codec::state_of(*state)? },
                // Deleted by age between the two statements: the next try admits it.
                None => return Err(Error::Store { doing: DOING, cause: "a row went away meanwhile".into() }),
            });
        }
        Ok(answers)
    }

    pub async fn load(&self, keys: &[Key]) -> Result<Vec<Option<Stored>>, Error> {
        let (ids, tenants) = arrays(keys);
        let sql = "SELECT r.n, c.envelope, c.body, c.sealed FROM unnest($1::uuid[], $2::text[]) WITH ORDINALITY AS r(id, tenant, n) \
            JOIN events e ON e.id = r.id AND e.tenant || '' = r.tenant JOIN contents c ON c.seq = e.seq";
        let mut found: Vec<Option<Stored>> = keys.iter().map(|_| None).collect();
        for row in self.query("load payloads", sql, &[&ids, &tenants]).await? {
            let n: i64 = row.get(0);
            if let Some(slot) = found.get_mut((n - 1).max(0) as usize) {
                *slot = Some(Stored { envelope: row.get(1), body: row.get(2), sealed: row.get(3) });
            }
        }
        Ok(found)
    }

    pub async fn claim(self: &Arc<Self>, asks: Vec<Ask>) -> Result<Vec<Answer>, Error> {
        let this = self.clone();
        self.claims
            .submit(asks, move |asks| {
                let this = this.clone();
                async move { this.claim_all(asks).await }
            })
            .await
    }

    async fn claim_all(&self, asks: Vec<Ask>) -> Result<Vec<Answer>, Error> {
        const DOING: &str = "claim events";
        // With its hash: a forged reference must not stand for the real one beside it.
        let mut first: HashMap<(&Key, [u8; 32]), usize> = HashMap::with_capacity(asks.len());
        for (n, ask) in asks.iter().enumerate() {
            first.entry((&ask.key, ask.body_hash)).or_insert(n);
        }
        let mut order: Vec<usize> = first.values().copied().collect();
        order.sort_unstable_by_key(|n| (asks[*n].key.execution_id, &asks[*n].key.tenant));
        let sorted: Vec<&Ask> = order.iter().map(|n| &asks[*n]).collect();
        let sql = format!(
            "WITH t AS MATERIALIZED (SELECT {NOW} AS now), granted AS ( \
               UPDATE events e SET token = e.token + 1, claim_owner = r.owner, claim_until = t.now + r.span, updated_at = t.now, \
                 state = CASE WHEN r.tail IS NOT NULL AND e.state = 1 THEN 2 ELSE e.state END, \
                 attempts = CASE WHEN r.tail IS NOT NULL AND e.state = 1 THEN e.attempts + 1 ELSE e.attempts END, \
                 begun_token = CASE WHEN r.tail IS NOT NULL AND e.state = 1 THEN e.token + 1 ELSE e.begun_token END, \
                 begun_at = CASE WHEN r.tail IS NOT NULL AND e.state = 1 THEN r.begun_at ELSE e.begun_at END, \
                 current = CASE WHEN r.tail IS NOT NULL AND e.state = 1 THEN int4send(e.attempts + 1) || r.tail ELSE e.current END, \
                 timer_at = CASE WHEN r.tail IS NOT NULL AND e.state = 1 THEN NULL ELSE e.timer_at END, \
                 message_id = CASE WHEN r.tail IS NOT NULL AND e.state = 1 THEN coalesce(r.message, e.message_id) \
                   ELSE e.message_id END \
               FROM t, unnest($2::uuid[], $3::text[], $4::bytea[], $5::text[], $6::bigint[], $7::bytea[], $8::bigint[], $9::text[], \
                   $10::bool[]) AS r(id, tenant, hash, owner, span, tail, begun_at, message, with_body) \
               WHERE e.id = r.id AND e.tenant || '' = r.tenant AND e.body_hash = r.hash AND e.phase + 0 = 0 \
                 AND (e.claim_until IS NULL OR e.claim_until <= t.now) AND (e.next_at IS NULL OR e.next_at <= t.now) \
               RETURNING e.*, r.with_body) \
             SELECT {COLUMNS}, e.begun_token = e.token, CASE WHEN e.with_body THEN c.body END, c.sealed \
             FROM granted e JOIN contents c ON c.seq = e.seq"
        );
        let ids: Vec<Uuid> = sorted.iter().map(|a| a.key.execution_id.0).collect();
        let tenants: Vec<&str> = sorted.iter().map(|a| a.key.tenant.as_str()).collect();
        let hashes: Vec<&[u8]> = sorted.iter().map(|a| a.body_hash.as_slice()).collect();
        let owners: Vec<&str> = sorted.iter().map(|a| a.owner.as_str()).collect();
        let spans: Vec<i64> = sorted.iter().map(|a| self.distance(a.until)).collect();
        let tails: Vec<Option<&[u8]>> =
            sorted.iter().map(|a| a.begin.as_ref().map(|(tail, _)| tail.as_slice())).collect();
        let begun: Vec<Option<i64>> = sorted.iter().map(|a| a.begin.as_ref().map(|(_, at)| *at)).collect();
        let messages: Vec<Option<&str>> = sorted.iter().map(|a| a.message_id.as_deref()).collect();
        let with_body: Vec<bool> = sorted.iter().map(|a| a.with_body).collect();
        let rows = self
            .query(
                DOING,
                &sql,
                &[&self.now(), &ids, &tenants, &hashes, &owners, &spans, &tails, &begun, &messages, &with_body],
            )
            .await?;
        let mut granted: HashMap<(Uuid, String, Vec<u8>), Answer> = HashMap::with_capacity(rows.len());
        for row in rows {
            let columns = columns_of(&row);
            let body: Option<Vec<u8>> = row.get(COLUMNS_COUNT + 1);
            let sealed: i16 = row.get(COLUMNS_COUNT + 2);
            let key = (columns.id, columns.tenant.clone(), columns.body_hash.clone());
            let begun = row.get(COLUMNS_COUNT);
            granted.insert(
                key,
                Answer::Granted { columns: Box::new(columns), begun, body: body.map(|body| (body, sealed)) },
            );
        }
        let mut why_not = HashMap::new();
        if granted.len() < asks.len() {
            let sql = format!(
                "WITH t AS MATERIALIZED (SELECT {NOW} AS now) \
                 SELECT e.id, e.tenant, e.body_hash, e.state, e.claim_until, e.next_at, t.now \
                 FROM t, unnest($2::uuid[], $3::text[]) AS r(id, tenant) JOIN events e ON e.id = r.id AND e.tenant || '' = r.tenant"
            );
            for row in self.query(DOING, &sql, &[&self.now(), &ids, &tenants]).await? {
                let hash: Vec<u8> = row.get(2);
                why_not.insert((row.get::<_, Uuid>(0), row.get::<_, String>(1)), (hash, row));
            }
        }
        let mut answers = Vec::with_capacity(asks.len());
        for (n, ask) in asks.iter().enumerate() {
            let key = (ask.key.execution_id.0, ask.key.tenant.as_str().to_owned());
            let own = match first.get(&(&ask.key, ask.body_hash)) {
                Some(of) if *of == n => granted.remove(&(key.0, key.1.clone(), ask.body_hash.to_vec())),
                _ => None,
            };
            answers.push(match (own, why_not.get(&key)) {
                (Some(answer), _) => answer,
                (None, None) => Answer::Other(Claimed::Unknown),
                (None, Some((hash, _))) if *hash != ask.body_hash => Answer::Other(Claimed::Mismatch),
                (None, Some((_, row))) => {
                    let now: i64 = row.get(6);
                    let obstacle = rows::obstacle(codec::state_of(row.get(3))?, row.get(4), row.get(5), now);
                    // Free again between the two statements: as good as held for a moment.
                    Answer::Other(obstacle.unwrap_or(Claimed::Held(Timestamp(now + 1000))))
                }
            });
        }
        Ok(answers)
    }

    pub async fn apply(self: &Arc<Self>, steps: Vec<Step>) -> Result<Vec<bool>, Error> {
        let this = self.clone();
        self.steps
            .submit(steps, move |steps| {
                let this = this.clone();
                async move { this.apply_all(steps).await }
            })
            .await
    }

    /// A key stands in one statement once: a second step of the same row has to see the first.
    async fn apply_all(&self, steps: Vec<Step>) -> Result<Vec<bool>, Error> {
        let mut answers = vec![false; steps.len()];
        let mut rounds: Vec<Vec<usize>> = Vec::new();
        let mut seen: HashMap<(Uuid, &str), usize> = HashMap::with_capacity(steps.len());
        for (n, step) in steps.iter().enumerate() {
            let round = seen.entry((step.id, &step.tenant)).and_modify(|round| *round += 1).or_insert(0);
            if rounds.len() <= *round {
                rounds.push(Vec::new());
            }
            rounds[*round].push(n);
        }
        for mut round in rounds {
            round.sort_unstable_by_key(|n| (steps[*n].id, &steps[*n].tenant));
            let sorted: Vec<&Step> = round.iter().map(|n| &steps[*n]).collect();
            for (n, answer) in round.iter().zip(self.apply_round(&sorted).await?) {
                answers[*n] = answer;
            }
        }
        Ok(answers)
    }

    async fn apply_round(&self, steps: &[&Step]) -> Result<Vec<bool>, Error> {
        const DOING: &str = "write to the ledger";
        let ids: Vec<Uuid> = steps.iter().map(|s| s.id).collect();
        let tenants: Vec<&str> = steps.iter().map(|s| s.tenant.as_str()).collect();
        let tokens: Vec<i64> = steps.iter().map(|s| s.token).collect();
        let ops: Vec<i16> = steps.iter().map(|s| s.op as i16).collect();
        let states: Vec<i16> = steps.iter().map(|s| s.state).collect();
        let numbers: Vec<i32> = steps.iter().map(|s| s.number as i32).collect();
        let tails: Vec<Option<&[u8]>> = steps.iter().map(|s| s.tail.as_deref()).collect();
        let begun: Vec<i64> = steps.iter().map(|s| s.begun_at).collect();
        let spans: Vec<Option<i64>> = steps.iter().map(|s| s.at.map(|at| self.distance(at))).collect();
        let crashed: Vec<i32> = steps.iter().map(|s| i32::from(s.crashed)).collect();
        let classes: Vec<Option<&str>> = steps.iter().map(|s| s.error_class.as_deref()).collect();
        let errors: Vec<Option<&[u8]>> = steps.iter().map(|s| s.error.as_deref()).collect();
        let n8n: Vec<Option<&str>> = steps.iter().map(|s| s.n8n_execution_id.as_deref()).collect();
        let messages: Vec<Option<&str>> = steps.iter().map(|s| s.message_id.as_deref()).collect();
        let applied = self
            .query(
                DOING,
                APPLY.as_str(),
                &[
                    &self.now(),
                    &ids,
                    &tenants,
                    &tokens,
                    &ops,
                    &states,
                    &numbers,
                    &tails,
                    &begun,
                    &spans,
                    &crashed,
                    &classes,
                    &errors,
                    &n8n,
                    &messages,
                ],
            )
            .await?;
        let mut answers: HashMap<(Uuid, String), bool> =
            applied.iter().map(|row| ((row.get(0), row.get(1)), true)).collect();
        if answers.len() < steps.len() {
            let sql = "SELECT e.id, e.tenant, e.state, e.token, e.claim_until FROM unnest($1::uuid[], $2::text[]) AS r(id, tenant) \
                JOIN events e ON e.id = r.id AND e.tenant || '' = r.tenant";
            let by_key: HashMap<(Uuid, &str), &Step> = steps.iter().map(|s| ((s.id, s.tenant.as_str()), *s)).collect();
            for row in self.query(DOING, sql, &[&ids, &tenants]).await? {
                let (id, tenant): (Uuid, String) = (row.get(0), row.get(1));
                let repeated = by_key
                    .get(&(id, tenant.as_str()))
                    .is_some_and(|s| s.was_applied(row.get(2), row.get(3), row.get(4)));
                answers.entry((id, tenant)).or_insert(repeated);
            }
        }
        Ok(steps.iter().map(|s| answers.get(&(s.id, s.tenant.clone())).copied().unwrap_or(false)).collect())
    }

    pub async fn due(&self, limit: usize) -> Result<Vec<Columns>, Error> {
        let sql = format!(
            "WITH t AS MATERIALIZED (SELECT {NOW} AS now), picked AS ( \
               SELECT e.id, e.tenant FROM events e WHERE e.timer_at <= (SELECT now FROM t) AND e.phase + 0 = 0 \
                 AND (e.claim_until IS NULL OR e.claim_until <= (SELECT now FROM t)) \
               ORDER BY e.timer_at LIMIT $2 FOR UPDATE OF e SKIP LOCKED), \
             marked AS (UPDATE events e SET phase_at = t.now, \
                 timer_at = t.now + greatest({TIMER_AGAIN_MS}, t.now - coalesce(e.next_at, t.now)) \
               FROM t, picked p WHERE e.id = p.id AND e.tenant || '' = p.tenant RETURNING e.*) \
             SELECT {COLUMNS} FROM marked e JOIN contents c ON c.seq = e.seq"
        );
        let rows = self.query("find what is due", &sql, &[&self.now(), &(limit as i64)]).await?;
        Ok(rows.iter().map(columns_of).collect())
    }

    pub async fn stale(&self, before: i64, limit: usize) -> Result<Vec<Columns>, Error> {
        let sql = format!(
            "WITH t AS MATERIALIZED (SELECT {NOW} AS now), picked AS ( \
               SELECT e.id, e.tenant FROM events e WHERE e.phase = 0 AND e.phase_at <= (SELECT now FROM t) + $2::bigint \
                 AND e.updated_at <= (SELECT now FROM t) + $2::bigint \
                 AND (e.claim_until IS NULL OR e.claim_until <= (SELECT now FROM t)) \
                 AND (e.next_at IS NULL OR e.next_at <= (SELECT now FROM t)) \
               ORDER BY e.phase_at LIMIT $3 FOR UPDATE OF e SKIP LOCKED), \
             marked AS (UPDATE events e SET phase_at = t.now FROM t, picked p WHERE e.id = p.id AND e.tenant || '' = p.tenant RETURNING e.*) \
             SELECT {COLUMNS} FROM marked e JOIN contents c ON c.seq = e.seq"
        );
        let rows =
            self.query("find what is stale", &sql, &[&self.now(), &self.distance(before), &(limit as i64)]).await?;
        Ok(rows.iter().map(columns_of).collect())
    }

    pub async fn set_message_ids(&self, ids: Vec<(Key, String)>) -> Result<(), Error> {
        let mut ids = ids;
        ids.sort();
        let keys: Vec<Key> = ids.iter().map(|(key, _)| key.clone()).collect();
        let (uuids, tenants) = arrays(&keys);
        let messages: Vec<&str> = ids.iter().map(|(_, id)| id.as_str()).collect();
        let sql = "UPDATE events e SET message_id = r.message FROM unnest($1::uuid[], $2::text[], $3::text[]) AS r(id, tenant, message) \
            WHERE e.id = r.id AND e.tenant || '' = r.tenant";
        self.query("note message ids", sql, &[&uuids, &tenants, &messages]).await?;
        Ok(())
    }

    pub async fn get(&self, key: &Key) -> Result<Option<Columns>, Error> {
        let sql = format!(
            "SELECT {COLUMNS} FROM events e JOIN contents c ON c.seq = e.seq WHERE e.id = $1 AND e.tenant || '' = $2"
        );
        let rows = self.query("read the ledger", &sql, &[&key.execution_id.0, &key.tenant.as_str()]).await?;
        Ok(rows.first().map(columns_of))
    }

    pub async fn list(&self, query: Query) -> Result<Vec<Columns>, Error> {
        let rows = self.query_once("list the ledger", &query.sql, &params(&query.values)).await?;
        Ok(rows.iter().map(columns_of).collect())
    }

    pub async fn count(&self, query: Query) -> Result<u64, Error> {
        let rows = self.query_once("count in the ledger", &query.sql, &params(&query.values)).await?;
        Ok(rows.first().map_or(0, |row| row.get::<_, i64>(0)).max(0) as u64)
    }

    pub async fn states(&self) -> Result<Vec<(i16, i64)>, Error> {
        let sql = "SELECT state, count(*) FROM events GROUP BY state";
        let rows = self.query("count in the ledger", sql, &[]).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    async fn state(&self, doing: &'static str, key: &Key) -> Result<Option<State>, Error> {
        let sql = "SELECT state FROM events WHERE id = $1 AND tenant || '' = $2";
        let rows = self.query(doing, sql, &[&key.execution_id.0, &key.tenant.as_str()]).await?;
        Ok(rows.first().map(|row| codec::state_of(row.get(0))).transpose()?)
    }

    pub async fn cancel(&self, key: &Key) -> Result<Option<State>, Error> {
        const DOING: &str = "cancel an event";
        let sql = format!(
            "WITH t AS MATERIALIZED (SELECT {NOW} AS now) UPDATE events e SET state = 8, phase = 1, phase_at = t.now, \
             finished_at = t.now, updated_at = t.now, timer_at = NULL, token = e.token + 1, claim_owner = NULL, claim_until = NULL \
             FROM t WHERE e.id = $2 AND e.tenant || '' = $3 AND e.state = 1 AND (e.claim_until IS NULL OR e.claim_until <= t.now) \
             RETURNING 1"
        );
        let done = self.query(DOING, &sql, &[&self.now(), &key.execution_id.0, &key.tenant.as_str()]).await?;
        if done.is_empty() { self.state(DOING, key).await } else { Ok(Some(State::Cancelled)) }
    }

    pub async fn replay(&self, key: &Key) -> Result<Option<bool>, Error> {
        const DOING: &str = "replay a dead letter";
        let sql = format!(
            "WITH t AS MATERIALIZED (SELECT {NOW} AS now) UPDATE events e SET state = 1, phase = 0, phase_at = t.now, \
             next_at = t.now, timer_at = t.now, attempts = 0, crashes = 0, replays = e.replays + 1, finished_at = NULL, \
             error_class = NULL, error = NULL, n8n_execution_id = NULL, token = e.token + 1, updated_at = t.now \
             FROM t WHERE e.id = $2 AND e.tenant || '' = $3 AND e.state = 7 RETURNING 1"
        );
        let done = self.query(DOING, &sql, &[&self.now(), &key.execution_id.0, &key.tenant.as_str()]).await?;
        if done.is_empty() { Ok(self.state(DOING, key).await?.map(|_| false)) } else { Ok(Some(true)) }
    }

    pub async fn discard(&self, key: &Key) -> Result<Option<bool>, Error> {
        const DOING: &str = "discard a dead letter";
        let sql = format!(
            "WITH t AS MATERIALIZED (SELECT {NOW} AS now) UPDATE events e SET state = 8, phase = 1, phase_at = t.now, \
             finished_at = t.now, updated_at = t.now, token = e.token + 1 \
             FROM t WHERE e.id = $2 AND e.tenant || '' = $3 AND e.state = 7 RETURNING 1"
        );
        let done = self.query(DOING, &sql, &[&self.now(), &key.execution_id.0, &key.tenant.as_str()]).await?;
        if done.is_empty() { Ok(self.state(DOING, key).await?.map(|_| false)) } else { Ok(Some(true)) }
    }

    /// `step` is a `Finish` without a token.
    pub async fn finish_external(&self, key: &Key, step: Step) -> Result<Option<State>, Error> {
        const DOING: &str = "end an event";
        let sql = format!(
            "WITH t AS MATERIALIZED (SELECT {NOW} AS now) UPDATE events e SET state = $4::smallint, \
             phase = CASE WHEN $4::smallint = 7 THEN 3 ELSE 1 END, \
             phase_at = CASE WHEN $4::smallint = 7 THEN e.accepted_at ELSE t.now END, \
             finished_at = t.now, updated_at = t.now, timer_at = NULL, attempts = e.attempts + 1, current = NULL, \
             history = coalesce(e.history, '') || coalesce(e.current, '') || int4send(e.attempts + 1) || $5::bytea, \
             error_class = $6::text, error = $7::bytea, n8n_execution_id = coalesce($8::text, e.n8n_execution_id), \
             message_id = coalesce($9::text, e.message_id), token = e.token + 1, claim_owner = NULL, claim_until = NULL \
             FROM t WHERE e.id = $2 AND e.tenant || '' = $3 AND e.phase + 0 = 0 RETURNING 1"
        );
        let done = self
            .query(
                DOING,
                &sql,
                &[
                    &self.now(),
                    &key.execution_id.0,
                    &key.tenant.as_str(),
                    &step.state,
                    &step.tail.as_deref().unwrap_or_default(),
                    &step.error_class,
                    &step.error,
                    &step.n8n_execution_id,
                    &step.message_id,
                ],
            )
            .await?;
        if done.is_empty() { self.state(DOING, key).await } else { Ok(Some(codec::state_of(step.state)?)) }
    }

    /// `false`: no room.
    pub async fn reject(&self, rejected: super::Rejected, raw: Vec<u8>) -> Result<bool, Error> {
        let sql = format!(
            "INSERT INTO rejected (topic, message_id, at, reason, raw) SELECT $2::text, $3::text, {NOW}, $4::text, $5::bytea \
             WHERE (SELECT count(*) FROM (SELECT 1 FROM rejected LIMIT $6::bigint) AS kept) < $6::bigint \
             ON CONFLICT (topic, message_id) DO UPDATE SET topic = excluded.topic RETURNING 1"
        );
        let (topic, message, reason) = (rejected.topic.as_str(), &rejected.message_id, &rejected.reason);
        let kept = self
            .query(
                "keep a rejected message",
                &sql,
                &[&self.now(), &topic, message, reason, &raw, &(REJECTED_MAX as i64)],
            )
            .await?;
        Ok(!kept.is_empty())
    }

    pub async fn rejected(&self, limit: usize) -> Result<Vec<RejectedRow>, Error> {
        let sql =
            "SELECT at, topic, message_id, reason, raw FROM rejected ORDER BY at DESC, topic, message_id LIMIT $1";
        let rows = self.query("list rejected messages", sql, &[&(limit as i64)]).await?;
        let shown = |row: &tokio_postgres::Row| RejectedRow {
            at: row.get(0),
            topic: row.get(1),
            message_id: row.get(2),
            reason: row.get(3),
            raw: row.get(4),
        };
        Ok(rows.iter().map(shown).collect())
    }

    pub async fn collect(&self, limit: usize) -> Result<(Collected, u64), Error> {
        const DOING: &str = "collect what is past its age";
        let picked = |phase: i16| {
            format!(
                "WITH t AS MATERIALIZED (SELECT {NOW} - $2::bigint AS before), old AS MATERIALIZED ( \
                 SELECT seq, id, tenant FROM events WHERE phase = {phase} AND phase_at <= (SELECT before FROM t) ORDER BY phase_at LIMIT $3 FOR UPDATE SKIP LOCKED), "
            )
        };
        let payloads = format!(
            "{} bodies AS (UPDATE contents c SET body = NULL FROM old WHERE c.seq = old.seq) \
             UPDATE events e SET phase = 2 FROM old WHERE e.id = old.id AND e.tenant || '' = old.tenant RETURNING 1",
            picked(codec::COMPLETE)
        );
        let rows = format!(
            "{} bodies AS (DELETE FROM contents c USING old WHERE c.seq = old.seq) \
             DELETE FROM events e USING old WHERE e.id = old.id AND e.tenant || '' = old.tenant RETURNING 1",
            picked(codec::COLLECTED)
        );
        let rejected = format!(
            "WITH t AS MATERIALIZED (SELECT {NOW} - $2::bigint AS before) DELETE FROM rejected r USING ( \
             SELECT topic, message_id FROM rejected WHERE at <= (SELECT before FROM t) ORDER BY at LIMIT $3) AS old WHERE r.topic = old.topic AND r.message_id = old.message_id RETURNING 1"
        );
        let limit = limit as i64;
        let payload_age = self.shared.payload_age_max.as_millis();
        let ledger_age = self.shared.ledger_age_max.as_millis();
        let payloads = self.query(DOING, &payloads, &[&self.now(), &payload_age, &limit]).await?.len() as u64;
        let rows = self.query(DOING, &rows, &[&self.now(), &ledger_age, &limit]).await?.len() as u64;
        let rejected = self.query(DOING, &rejected, &[&self.now(), &ledger_age, &limit]).await?.len() as u64;
        Ok((Collected { payloads, rows }, rejected))
    }

    pub async fn close(&self) {
        self.claims.close().await;
        self.steps.close().await;
        self.pool.close();
    }
}

/// One transaction; the keys that were added.
async fn insert(
    client: &mut Lease,
    chunks: &[Vec<&NewRow>],
    now: Option<i64>,
) -> Result<HashMap<(Uuid, String), ()>, Fault> {
    let sql = ADMIT.as_str();
    let mut added = HashMap::new();
    let statement = client.prepare_cached(sql).await?;
    let mut note = |rows: Vec<tokio_postgres::Row>| {
        for row in rows {
            added.insert((row.get(0), row.get(1)), ());
        }
    };
    match chunks {
        [only] => note(insert_chunk::<tokio_postgres::Client>(client, &statement, only, now).await?),
        chunks => {
            let transaction = client.transaction().await?;
            for chunk in chunks {
                note(insert_chunk::<tokio_postgres::Transaction<'_>>(&transaction, &statement, chunk, now).await?);
            }
            transaction.commit().await?;
        }
    }
    Ok(added)
}

async fn insert_chunk<C: tokio_postgres::GenericClient + Sync>(
    client: &C,
    statement: &tokio_postgres::Statement,
    rows: &[&NewRow],
    now: Option<i64>,
) -> Result<Vec<tokio_postgres::Row>, tokio_postgres::Error> {
    let ids: Vec<Uuid> = rows.iter().map(|r| r.id).collect();
    let tenants: Vec<&str> = rows.iter().map(|r| r.tenant.as_str()).collect();
    let hashes: Vec<&[u8]> = rows.iter().map(|r| r.body_hash.as_slice()).collect();
    let bytes: Vec<i64> = rows.iter().map(|r| r.body_bytes).collect();
    let workflows: Vec<Option<&str>> = rows.iter().map(|r| r.workflow.as_deref()).collect();
    let accepted: Vec<i64> = rows.iter().map(|r| r.accepted_at).collect();
    let deliver: Vec<Option<i64>> = rows.iter().map(|r| r.deliver_at).collect();
    let finished: Vec<Option<i64>> = rows.iter().map(|r| r.finished_at).collect();
    let states: Vec<i16> = rows.iter().map(|r| r.state).collect();
    let phases: Vec<i16> = rows.iter().map(|r| r.phase).collect();
    let histories: Vec<Option<&[u8]>> = rows.iter().map(|r| r.history.as_deref()).collect();
    let classes: Vec<Option<&str>> = rows.iter().map(|r| r.error_class.as_deref()).collect();
    let errors: Vec<Option<&[u8]>> = rows.iter().map(|r| r.error.as_deref()).collect();
    let n8n: Vec<Option<&str>> = rows.iter().map(|r| r.n8n_execution_id.as_deref()).collect();
    let envelopes: Vec<&[u8]> = rows.iter().map(|r| r.envelope.as_slice()).collect();
    let sealed: Vec<i16> = rows.iter().map(|r| r.sealed).collect();
    let bodies: Vec<&[u8]> = rows.iter().map(|r| r.body.as_ref()).collect();
    client
        .query(
            statement,
            &[
                &now, &ids, &tenants, &hashes, &bytes, &workflows, &accepted, &deliver, &finished, &states, &phases,
                &histories, &classes, &errors, &n8n, &envelopes, &sealed, &bodies,
            ],
        )
        .await
}

static ADMIT: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
    format!(
        "WITH t AS MATERIALIZED (SELECT {NOW} AS now), r AS MATERIALIZED (SELECT * FROM unnest($2::uuid[], $3::text[], $4::bytea[], \
           $5::bigint[], $6::text[], $7::bigint[], $8::bigint[], $9::bigint[], $10::smallint[], $11::smallint[], $12::bytea[], \
           $13::text[], $14::bytea[], $15::text[]) AS r(id, tenant, hash, bytes, workflow, accepted_at, deliver_at, finished_at, \
           state, phase, history, error_class, error, n8n)), \
         added AS (INSERT INTO events (id, tenant, body_hash, body_bytes, workflow, accepted_at, relayed_at, updated_at, finished_at, \
           state, phase, phase_at, next_at, timer_at, attempts, error_class, error, n8n_execution_id, history) \
           SELECT r.id, r.tenant, r.hash, r.bytes, r.workflow, r.accepted_at, t.now, t.now, r.finished_at, r.state, r.phase, \
             CASE WHEN r.phase = 3 THEN r.accepted_at ELSE greatest(t.now, r.deliver_at) END, r.deliver_at, r.deliver_at, \
             CASE WHEN r.history IS NULL THEN 0 ELSE 1 END, r.error_class, r.error, r.n8n, r.history \
           FROM t, r ON CONFLICT (id, tenant) DO NOTHING RETURNING seq, id, tenant), \
         bodies AS (INSERT INTO contents (seq, envelope, sealed, body) SELECT a.seq, b.envelope, b.sealed, b.body \
           FROM unnest($2::uuid[], $3::text[], $16::bytea[], $17::smallint[], $18::bytea[]) AS b(id, tenant, envelope, sealed, body) \
           JOIN added a ON a.id = b.id AND a.tenant = b.tenant) \
         SELECT id, tenant FROM added"
    )
});

/// What `sqlite::apply` does step by step, for a whole batch. Operations by their numbers in [`Op`].
static APPLY: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
    let (begin, follow, finish, retry, release, renew) = (
        Op::Begin as i16,
        Op::Follow as i16,
        Op::Finish as i16,
        Op::Retry as i16,
        Op::Release as i16,
        Op::Renew as i16,
    );
    // A begin that is not the repetition of one that is on the row already.
    let fresh = format!("(s.op = {begin} AND NOT (e.begun_token = e.token AND e.begun_at = s.begun_at))");
    let undo = format!("(s.op = {release} AND e.begun_token = e.token AND e.current IS NOT NULL)");
    let number = "int4send(CASE WHEN s.number > 0 THEN s.number ELSE e.attempts END)";
    format!(
        "WITH t AS MATERIALIZED (SELECT {NOW} AS now) UPDATE events e SET \
           state = CASE WHEN s.op = {begin} THEN 2 WHEN s.op = {finish} THEN s.state WHEN s.op = {retry} OR {undo} THEN 1 \
             ELSE e.state END, \
           phase = CASE WHEN s.op = {finish} THEN CASE WHEN s.state = 7 THEN 3 ELSE 1 END ELSE e.phase END, \
           phase_at = CASE WHEN s.op = {finish} THEN CASE WHEN s.state = 7 THEN e.accepted_at ELSE t.now END \
             WHEN s.op = {retry} THEN t.now + s.span ELSE e.phase_at END, \
           finished_at = CASE WHEN s.op = {finish} THEN t.now ELSE e.finished_at END, \
           updated_at = CASE WHEN s.op = {renew} THEN e.updated_at ELSE t.now END, \
           next_at = CASE WHEN s.op = {retry} THEN t.now + s.span ELSE e.next_at END, \
           timer_at = CASE WHEN s.op = {retry} THEN t.now + s.span WHEN s.op = {finish} OR {fresh} THEN NULL ELSE e.timer_at END, \
           attempts = e.attempts + CASE WHEN {fresh} THEN 1 WHEN {undo} THEN -1 ELSE 0 END, \
           crashes = e.crashes + CASE WHEN s.op = {retry} THEN s.crashed ELSE 0 END, \
           begun_token = CASE WHEN {fresh} THEN e.token WHEN {undo} THEN 0 ELSE e.begun_token END, \
           begun_at = CASE WHEN {fresh} THEN s.begun_at ELSE e.begun_at END, \
           history = CASE WHEN {fresh} AND e.current IS NOT NULL THEN coalesce(e.history, '') || e.current \
             WHEN s.op IN ({finish}, {retry}) AND s.tail IS NOT NULL THEN coalesce(e.history, '') || {number} || s.tail \
             WHEN s.op IN ({finish}, {retry}) AND e.current IS NOT NULL THEN coalesce(e.history, '') || e.current \
             ELSE e.history END, \
           current = CASE WHEN {fresh} THEN int4send(e.attempts + 1) || s.tail WHEN s.op = {follow} THEN {number} || s.tail \
             WHEN s.op IN ({finish}, {retry}) OR {undo} THEN NULL ELSE e.current END, \
           error_class = CASE WHEN s.op IN ({finish}, {retry}) THEN s.error_class ELSE e.error_class END, \
           error = CASE WHEN s.op IN ({finish}, {retry}) THEN s.error ELSE e.error END, \
           n8n_execution_id = CASE WHEN s.op = {begin} THEN e.n8n_execution_id ELSE coalesce(s.n8n, e.n8n_execution_id) END, \
           message_id = coalesce(s.message, e.message_id), \
           claim_owner = CASE WHEN s.op IN ({finish}, {retry}, {release}) THEN NULL ELSE e.claim_owner END, \
           claim_until = CASE WHEN s.op IN ({finish}, {retry}, {release}) THEN NULL \
             WHEN s.op IN ({follow}, {renew}) THEN t.now + s.span ELSE e.claim_until END \
         FROM t, unnest($2::uuid[], $3::text[], $4::bigint[], $5::smallint[], $6::smallint[], $7::int[], $8::bytea[], $9::bigint[], \
           $10::bigint[], $11::int[], $12::text[], $13::bytea[], $14::text[], $15::text[]) \
           AS s(id, tenant, token, op, state, number, tail, begun_at, span, crashed, error_class, error, n8n, message) \
         WHERE e.id = s.id AND e.tenant || '' = s.tenant AND e.token = s.token AND e.claim_until IS NOT NULL AND e.phase + 0 = 0 \
         RETURNING e.id, e.tenant"
    )
});

fn arrays(keys: &[Key]) -> (Vec<Uuid>, Vec<&str>) {
    keys.iter().map(|key| (key.execution_id.0, key.tenant.as_str())).unzip()
}

fn params(values: &[Value]) -> Vec<&(dyn ToSql + Sync)> {
    values
        .iter()
        .map(|value| match value {
            Value::Int(int) => int as &(dyn ToSql + Sync),
            Value::Text(text) => text as &(dyn ToSql + Sync),
        })
        .collect()
}

fn columns_of(row: &tokio_postgres::Row) -> Columns {
    Columns {
        seq: row.get(0),
        id: row.get(1),
        tenant: row.get(2),
        body_hash: row.get(3),
        body_bytes: row.get(4),
        relayed_at: row.get(5),
        updated_at: row.get(6),
        finished_at: row.get(7),
        state: row.get(8),
        next_at: row.get(9),
        attempts: row.get(10),
        crashes: row.get(11),
        replays: row.get(12),
        token: row.get(13),
        claim_owner: row.get(14),
        claim_until: row.get(15),
        error_class: row.get(16),
        error: row.get(17),
        n8n_execution_id: row.get(18),
        message_id: row.get(19),
        current: row.get(20),
        history: row.get(21),
        accepted_at: row.get(22),
        envelope: row.get(COLUMNS_COUNT - 1),
    }
}

/// An error with all that lies under it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}
