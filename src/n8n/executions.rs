//! Finding n8n's executions and their state: in n8n's own database, or by its public API.
//!
//! # How (n8n 2.41, read in its source and tried)
//! - By id: the primary key, or `GET /api/v1/executions/{id}`.
//! - By `traceparent`: n8n writes that of the webhook's request to `execution_entity."tracingContext"` (JSON) when it makes the
//!   row. There is no index on it, so the table is read by its primary key from the newest row downwards, in pages, until
//!   rows are older than the oldest attempt that is asked for: one pass for many look-ups.
//! - With `N8N_OTEL_ENABLED` n8n replaces that context by its own span, of the same trace, when the workflow starts
//!   (`modules/otel/otel-lifecycle-handler.js`). The trace alone does not tell an execution (whoever published may be in it), so it only
//!   confirms an id that an answer claimed.
//! - The API's list has no `tracingContext` and leaves running executions out unless asked for them: both lists are read, and
//!   each execution that was not seen before is fetched once by id; what it was started by is remembered.
//! - States: `new`, `running`, `waiting` are open; `success`, `error`, `crashed`, `canceled` are ends; `unknown` counts as
//!   open, as n8n itself treats it. **A crash shows as `running` until n8n starts again** and marks it `crashed`: an open
//!   execution has no time limit here.
//! - A row that was there and is gone was deleted: n8n does so with successful executions when
//!   `EXECUTIONS_DATA_SAVE_ON_SUCCESS=none`.
//!
//! The database is better: one query for all, and it answers while n8n is down.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Deserialize;

use super::{Error, Execution, Run};
use crate::clock::Timestamp;
use crate::config;
use crate::postgres::{self, Pool};
use crate::units::Span;

/// What to look for. An id alone decides. With both the id is what an answer claimed: it counts only when that execution was
/// not started by something else, and otherwise the traceparent is looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookup {
    pub id: Option<String>,
    pub traceparent: Option<String>,
    /// The attempt was not begun before this time: older executions are not looked at.
    pub not_before: Timestamp,
}

/// Rows per page of a pass over the newest executions.
const PAGE: usize = 500;
/// Pages of one pass. What lies deeper (200,000 executions since the attempt) counts as not found.
const PAGES_MAX: usize = 400;
/// n8n's clock and ours may differ by this much.
const CLOCK_SLACK: Duration = Duration::from_secs(60);
/// Executions whose origin the API told and that are remembered, newest first.
const SEEN_MAX: usize = 20_000;
/// One question to n8n or its database.
const DEADLINE: Duration = Duration::from_secs(10);

pub(super) enum Source {
    Postgres(Pool),
    Sqlite(Arc<Sqlite>),
    Api(Api),
}

/// A row as all three sources tell it.
struct Found {
    id: i64,
    status: String,
    created_at: Option<Timestamp>,
    started_at: Option<Timestamp>,
    traceparent: Option<String>,
}

impl Found {
    fn execution(&self) -> Execution {
        let run = run(&self.status, self.id);
        Execution { id: self.id.to_string(), run, started_at: self.started_at }
    }
}

/// The execution that the look-up names, if it can be the one. An answer is the workflow's own text: it may name an execution
/// of somebody else, or an id of another system.
fn by_claim<'a>(found: &'a HashMap<i64, Found>, lookup: &Lookup) -> Option<&'a Found> {
    let found = found.get(&lookup.id.as_ref()?.parse().ok()?)?;
    let fits = match (&lookup.traceparent, &found.traceparent) {
        (None, _) => true,
        (Some(ours), Some(its)) => ours == its,
        // An older n8n, which does not keep it.
        (Some(_), None) => is_recent(found, lookup),
    };
    fits.then_some(found)
}

/// The same where n8n has its own span in place of ours. Only when ours is nowhere.
fn by_trace_of<'a>(found: &'a HashMap<i64, Found>, lookup: &Lookup) -> Option<&'a Found> {
    let found = found.get(&lookup.id.as_ref()?.parse().ok()?)?;
    // `00-` and 32 digits.
    let (ours, its) = (lookup.traceparent.as_ref()?.get(..35)?, found.traceparent.as_ref()?.get(..35)?);
    (ours == its && is_recent(found, lookup)).then_some(found)
}

fn is_recent(found: &Found, lookup: &Lookup) -> bool {
    found.created_at.is_none_or(|at| at >= lookup.not_before.minus(CLOCK_SLACK))
}

fn run(status: &str, id: i64) -> Run {
    match status {
        "success" => Run::Succeeded,
        "error" => Run::Failed(format!("n8n execution {id} ended in an error")),
        "crashed" => Run::Crashed,
        "canceled" => Run::Cancelled,
        _ => Run::Open,
    }
}

fn unreachable(cause: impl std::fmt::Display) -> Error {
    Error::Unreachable(cause.to_string().into())
}

impl Source {
    /// The best that is configured: database, then API. `None` when neither is.
    pub(super) fn new(
        config: &config::N8n,
        base: &reqwest::Url,
        client: &reqwest::Client,
    ) -> Result<Option<Self>, String> {
        if let Some(url) = &config.database_url {
            return postgres(config, url).map(|pool| Some(Self::Postgres(pool)));
        }
        if let Some(file) = &config.database_file {
            return Ok(Some(Self::Sqlite(Arc::new(Sqlite { file: file.clone(), connection: Mutex::new(None) }))));
        }
        let Some(key) = &config.api_key else { return Ok(None) };
        let mut key = http::HeaderValue::try_from(key.expose())
            .map_err(|_| "n8n.api_key contains characters that no header can carry".to_owned())?;
        key.set_sensitive(true);
        let base = format!("{}/api/v1/executions", base.as_str().trim_end_matches('/'));
        Ok(Some(Self::Api(Api { client: client.clone(), base, key, seen: tokio::sync::Mutex::new(Seen::default()) })))
    }

    pub(super) async fn look(&self, lookups: &[Lookup]) -> Result<Vec<Option<Execution>>, Error> {
        let ids: Vec<i64> = lookups.iter().filter_map(|l| l.id.as_ref()?.parse().ok()).collect();
        let work = async {
            let mut by_id: HashMap<i64, Found> = HashMap::new();
            if !ids.is_empty() {
                let rows = match self {
                    Self::Postgres(pool) => postgres_by_id(pool, &ids).await?,
                    Self::Sqlite(sqlite) => sqlite.clone().by_id(ids.clone()).await?,
                    Self::Api(api) => api.by_id(&ids).await?,
                };
                by_id.extend(rows.into_iter().map(|row| (row.id, row)));
            }
            let open: Vec<&Lookup> = lookups.iter().filter(|l| by_claim(&by_id, l).is_none()).collect();
            let traces: HashSet<&str> = open.iter().filter_map(|l| l.traceparent.as_deref()).collect();
            let not_before = open.iter().map(|l| l.not_before.minus(CLOCK_SLACK)).min().unwrap_or_default();
            let mut by_trace: HashMap<String, Found> = HashMap::new();
            if !traces.is_empty() {
                match self {
                    Self::Api(api) => by_trace = api.by_trace(&traces, not_before).await?,
                    _ => self.pass(&traces, not_before, &mut by_trace).await?,
                }
            }
            Ok((by_id, by_trace))
        };
        let (by_id, by_trace) =
            tokio::time::timeout(DEADLINE, work).await.map_err(|_| unreachable("no answer in time"))??;
        Ok(lookups
            .iter()
            .map(|lookup| {
                let traced = || by_trace.get(lookup.traceparent.as_deref()?);
                by_claim(&by_id, lookup).or_else(traced).or_else(|| by_trace_of(&by_id, lookup)).map(Found::execution)
            })
            .collect())
    }

    /// From the newest row downwards until everything is found or rows are too old.
    async fn pass(
        &self,
        traces: &HashSet<&str>,
        not_before: Timestamp,
        found: &mut HashMap<String, Found>,
    ) -> Result<(), Error> {
        let mut below = i64::MAX;
        for _ in 0..PAGES_MAX {
            let rows = match self {
                Self::Postgres(pool) => postgres_page(pool, below).await?,
                Self::Sqlite(sqlite) => sqlite.clone().page(below).await?,
                Self::Api(_) => return Ok(()),
            };
            let last = rows.len() < PAGE;
            let mut old = false;
            for row in rows {
                below = row.id;
                old |= row.created_at.is_some_and(|at| at < not_before);
                // A retry by n8n's own button repeats the context of the first run: the newest one counts.
                if let Some(trace) = row.traceparent.as_deref().filter(|t| traces.contains(t)).map(str::to_owned) {
                    found.entry(trace).or_insert(row);
                }
            }
            if last || old || found.len() == traces.len() {
                break;
            }
        }
        Ok(())
    }
}

fn postgres(config: &config::N8n, url: &config::Secret) -> Result<Pool, String> {
    Pool::new(&postgres::Options {
        url,
        ca_file: None,
        // n8n's own, by the server's search path or `options=-csearch_path=…` in the URL.
        schema: None,
        connections_max: 2,
        connect_timeout: config.connect_timeout,
        statement_timeout: Span(DEADLINE),
        // Nothing is written there.
        durable: false,
    })
    .map_err(|error| format!("n8n.database_url: {error}"))
}

const POSTGRES_COLUMNS: &str = r#"id::bigint, status::text, (extract(epoch from "createdAt") * 1000)::bigint,
    (extract(epoch from "startedAt") * 1000)::bigint, "tracingContext"->>'traceparent'"#;

async fn postgres_by_id(pool: &Pool, ids: &[i64]) -> Result<Vec<Found>, Error> {
    let client = pool.get().await.map_err(unreachable)?;
    let sql = format!("SELECT {POSTGRES_COLUMNS} FROM execution_entity WHERE id = ANY($1)");
    let statement = client.prepare_cached(&sql).await.map_err(database)?;
    let ids: Vec<i32> = ids.iter().filter_map(|id| i32::try_from(*id).ok()).collect();
    Ok(client.query(&statement, &[&ids]).await.map_err(database)?.iter().map(postgres_row).collect())
}

async fn postgres_page(pool: &Pool, below: i64) -> Result<Vec<Found>, Error> {
    let client = pool.get().await.map_err(unreachable)?;
    let sql = format!("SELECT {POSTGRES_COLUMNS} FROM execution_entity WHERE id < $1 ORDER BY id DESC LIMIT {PAGE}");
    let statement = client.prepare_cached(&sql).await.map_err(database)?;
    let below = i32::try_from(below).unwrap_or(i32::MAX);
    Ok(client.query(&statement, &[&below]).await.map_err(database)?.iter().map(postgres_row).collect())
}

fn database(error: tokio_postgres::Error) -> Error {
    unreachable(postgres::explain(&error))
}

fn postgres_row(row: &tokio_postgres::Row) -> Found {
    Found {
        id: row.get(0),
        status: row.get(1),
        created_at: row.get::<_, Option<i64>>(2).map(Timestamp),
        started_at: row.get::<_, Option<i64>>(3).map(Timestamp),
        traceparent: row.get(4),
    }
}

/// n8n's SQLite file. Opened read only and on first use; opened again after an error, since a restore may replace the file.
pub(super) struct Sqlite {
    file: PathBuf,
    connection: Mutex<Option<rusqlite::Connection>>,
}

/// n8n writes times as UTC text (`2026-11-24 03:00:00.123`).
const SQLITE_COLUMNS: &str = r#"id, status, CAST(round((julianday("createdAt") - 2440587.5) * 86400000) AS INTEGER),
    CAST(round((julianday("startedAt") - 2440587.5) * 86400000) AS INTEGER),
    CASE WHEN json_valid("tracingContext") THEN json_extract("tracingContext", '$.traceparent') END"#;

impl Sqlite {
    async fn by_id(self: Arc<Self>, ids: Vec<i64>) -> Result<Vec<Found>, Error> {
        let list = serde_json::json!(ids).to_string();
        let sql =
            format!("SELECT {SQLITE_COLUMNS} FROM execution_entity WHERE id IN (SELECT value FROM json_each(?1))");
        self.query(sql, rusqlite::types::Value::Text(list)).await
    }

    async fn page(self: Arc<Self>, below: i64) -> Result<Vec<Found>, Error> {
        let sql = format!("SELECT {SQLITE_COLUMNS} FROM execution_entity WHERE id < ?1 ORDER BY id DESC LIMIT {PAGE}");
        self.query(sql, rusqlite::types::Value::Integer(below)).await
    }

    async fn query(self: Arc<Self>, sql: String, value: rusqlite::types::Value) -> Result<Vec<Found>, Error> {
        let work = move || -> rusqlite::Result<Vec<Found>> {
            // A poisoned lock means that a query panicked: the connection is not used again.
            let mut slot = self.connection.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let connection = match slot.take() {
                Some(connection) => connection,
                None => open_sqlite(&self.file)?,
            };
            let rows = {
                let mut statement = connection.prepare_cached(&sql)?;
                statement.query_map([value], sqlite_row)?.collect::<rusqlite::Result<Vec<_>>>()?
            };
            *slot = Some(connection);
            Ok(rows)
        };
        tokio::task::spawn_blocking(work).await.map_err(unreachable)?.map_err(unreachable)
    }
}

fn open_sqlite(file: &std::path::Path) -> rusqlite::Result<rusqlite::Connection> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = rusqlite::Connection::open_with_flags(file, flags)?;
    connection.busy_timeout(Duration::from_secs(2))?;
    Ok(connection)
}

fn sqlite_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Found> {
    Ok(Found {
        id: row.get(0)?,
        status: row.get(1)?,
        created_at: row.get::<_, Option<i64>>(2)?.map(Timestamp),
        started_at: row.get::<_, Option<i64>>(3)?.map(Timestamp),
        traceparent: row.get(4)?,
    })
}

/// n8n's public API, with a key that may read executions (`execution:read`, `execution:list`).
pub(super) struct Api {
    client: reqwest::Client,
    base: String,
    key: http::HeaderValue,
    seen: tokio::sync::Mutex<Seen>,
}

/// Executions whose origin is known, so that each is fetched by id once and afterwards only when it is asked for.
#[derive(Default)]
struct Seen {
    order: VecDeque<i64>,
    traces: HashMap<i64, Option<String>>,
}

impl Seen {
    fn remember(&mut self, id: i64, trace: Option<String>) {
        if self.traces.insert(id, trace).is_none() {
            self.order.push_back(id);
            if self.order.len() > SEEN_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.traces.remove(&oldest);
            }
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ApiRow {
    #[serde(deserialize_with = "number")]
    id: i64,
    status: String,
    started_at: Option<Timestamp>,
    created_at: Option<Timestamp>,
    tracing_context: Option<TracingContext>,
}

#[derive(Deserialize)]
struct TracingContext {
    traceparent: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ApiPage {
    data: Vec<ApiRow>,
    next_cursor: Option<String>,
}

/// n8n 2 writes ids as text, n8n 1 wrote numbers.
fn number<'de, D: serde::Deserializer<'de>>(d: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(i64),
        Text(String),
    }
    match Either::deserialize(d)? {
        Either::Number(n) => Ok(n),
        Either::Text(text) => text.parse().map_err(|_| serde::de::Error::custom("expected a number")),
    }
}

impl From<ApiRow> for Found {
    fn from(row: ApiRow) -> Self {
        Self {
            id: row.id,
            status: row.status,
            created_at: row.created_at.or(row.started_at),
            started_at: row.started_at,
            traceparent: row.tracing_context.and_then(|c| c.traceparent),
        }
    }
}

impl Api {
    async fn fetch<T: serde::de::DeserializeOwned>(
        &self,
        url: &str,
        query: &[(&str, &str)],
    ) -> Result<Option<T>, Error> {
        let request = self.client.get(url).query(query).header("x-n8n-api-key", self.key.clone()).timeout(DEADLINE);
        let response = request.send().await.map_err(|error| unreachable(super::call::cause(&error)))?;
        match response.status().as_u16() {
            200 => response.json().await.map(Some).map_err(|_| unreachable("n8n's API answers in another form")),
            404 => Ok(None),
            status @ (401 | 403) => Err(Error::Unauthorized(format!("HTTP {status}").into())),
            status => Err(unreachable(format!("HTTP {status}"))),
        }
    }

    async fn one(&self, id: i64) -> Result<Option<Found>, Error> {
        Ok(self.fetch::<ApiRow>(&format!("{}/{id}", self.base), &[]).await?.map(Found::from))
    }

    async fn by_id(&self, ids: &[i64]) -> Result<Vec<Found>, Error> {
        let mut found = Vec::with_capacity(ids.len());
        for id in ids {
            found.extend(self.one(*id).await?);
        }
        Ok(found)
    }

    async fn by_trace(&self, traces: &HashSet<&str>, not_before: Timestamp) -> Result<HashMap<String, Found>, Error> {
        let mut seen = self.seen.lock().await;
        let mut found: HashMap<String, Found> = HashMap::new();
        for status in [Some("running"), None] {
            let mut cursor: Option<String> = None;
            for _ in 0..PAGES_MAX {
                let mut query = vec![("limit", "250")];
                query.extend(status.map(|s| ("status", s)));
                query.extend(cursor.as_deref().map(|c| ("cursor", c)));
                let Some(page) = self.fetch::<ApiPage>(&self.base, &query).await? else { break };
                let mut old = false;
                for row in page.data {
                    old |= row.started_at.is_some_and(|at| at < not_before);
                    if row.started_at.is_some_and(|at| at < not_before) {
                        continue;
                    }
                    let known = seen.traces.contains_key(&row.id);
                    let mut row = Found::from(row);
                    if !known {
                        let Some(whole) = self.one(row.id).await? else { continue };
                        seen.remember(row.id, whole.traceparent.clone());
                        row = whole;
                    }
                    let trace = seen.traces.get(&row.id).and_then(Option::as_deref);
                    if let Some(trace) = trace.filter(|t| traces.contains(t)) {
                        found.entry(trace.to_owned()).or_insert(row);
                    }
                }
                cursor = page.next_cursor;
                if old || cursor.is_none() || found.len() == traces.len() {
                    break;
                }
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::super::N8n;
    use super::super::tests::config;
    use super::*;

    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn database() -> (tempfile::TempDir, rusqlite::Connection, N8n) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("database.sqlite");
        let connection = rusqlite::Connection::open(&file).unwrap();
        // The columns as n8n 2.41 makes them on SQLite.
        connection
            .execute_batch(
                r#"PRAGMA journal_mode = WAL;
                CREATE TABLE execution_entity (id INTEGER PRIMARY KEY AUTOINCREMENT, status VARCHAR NOT NULL,
                "createdAt" DATETIME(3) NOT NULL, "startedAt" DATETIME(3), "tracingContext" TEXT)"#,
            )
            .unwrap();
        let n8n = N8n::new(&crate::config::N8n { database_file: Some(file), ..config("http://127.0.0.1:1") }).unwrap();
        (dir, connection, n8n)
    }

    fn insert(connection: &rusqlite::Connection, status: &str, created: &str, trace: Option<&str>) {
        let context = trace.map(|t| serde_json::json!({ "traceparent": t }).to_string());
        connection
            .execute(
                r#"INSERT INTO execution_entity (status, "createdAt", "startedAt", "tracingContext") VALUES (?1, ?2, ?2, ?3)"#,
                (status, created, context),
            )
            .unwrap();
    }

    #[tokio::test]
    async fn sqlite_finds_by_id_and_by_traceparent() {
        let (_dir, connection, n8n) = database();
        insert(&connection, "crashed", "2026-11-24 02:59:00.000", None);
        insert(&connection, "running", "2026-11-24 03:00:00.123", Some(TRACE));
        for _ in 0..PAGE {
            insert(&connection, "success", "2026-11-24 03:00:01.000", None);
        }
        let since: Timestamp = "2026-11-24T03:00:00Z".parse().unwrap();
        let found = n8n.execution_by_traceparent(TRACE, since).await.unwrap().unwrap();
        assert_eq!((found.id.as_str(), found.run), ("2", Run::Open));
        assert_eq!(found.started_at.unwrap().to_string(), "2026-11-24T03:00:00.123Z");
        assert_eq!(n8n.execution("1").await.unwrap().unwrap().run, Run::Crashed);
        assert_eq!(n8n.execution("9999").await.unwrap(), None);
        // What is older than the attempt by more than the clocks' slack is another attempt's.
        let later = since.plus(Duration::from_secs(3600));
        assert_eq!(n8n.execution_by_traceparent(TRACE, later).await.unwrap().map(|e| e.id), None);
    }

    #[tokio::test]
    async fn an_id_that_an_answer_claims_is_checked() {
        const OTHER: &str = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01";
        let (_dir, connection, n8n) = database();
        insert(&connection, "success", "2026-11-24 03:00:00.000", Some(OTHER));
        insert(&connection, "error", "2026-11-24 03:00:00.000", Some(TRACE));
        insert(&connection, "success", "2026-11-24 02:00:00.000", None);
        insert(&connection, "success", "2026-11-24 03:00:00.000", None);
        let not_before: Timestamp = "2026-11-24T03:00:00Z".parse().unwrap();
        let look = async |id: &str, trace: Option<&str>| {
            let lookup = Lookup { id: Some(id.into()), traceparent: trace.map(str::to_owned), not_before };
            n8n.look(&[lookup]).await.unwrap().remove(0).map(|e| e.id)
        };
        assert_eq!(look("2", Some(TRACE)).await.as_deref(), Some("2"));
        // Somebody else's, one from before the attempt, one that is none: ours is found nevertheless.
        for claimed in ["1", "3", "77", "999999999999999999"] {
            assert_eq!(look(claimed, Some(TRACE)).await.as_deref(), Some("2"), "{claimed}");
        }
        assert_eq!(look("4", Some(TRACE)).await.as_deref(), Some("4"), "without a context of its own it can be ours");
        assert_eq!(look("1", None).await.as_deref(), Some("1"));
        // n8n traces itself: its own span, in our trace, is all that there is.
        connection.execute("DELETE FROM execution_entity WHERE id = 2", []).unwrap();
        assert_eq!(look("1", Some(TRACE)).await.as_deref(), Some("1"));
        let another = TRACE.replace("0af7", "ffff");
        assert_eq!(look("1", Some(&another)).await, None);
    }

    #[tokio::test]
    async fn a_missing_database_is_unreachable_and_not_empty() {
        let (dir, connection, n8n) = database();
        drop(connection);
        drop(dir);
        assert!(matches!(n8n.execution("1").await, Err(Error::Unreachable(_))));
    }

    #[test]
    fn the_api_rows_of_n8n_are_understood() {
        let text = r#"{"data":[{"id":"7","finished":false,"mode":"webhook","retryOf":null,"status":"crashed",
            "startedAt":"2026-11-24T03:00:00.123Z","stoppedAt":null,"workflowId":"x","waitTill":null}],"nextCursor":null}"#;
        let page: ApiPage = serde_json::from_str(text).unwrap();
        assert_eq!(Found::from(page.data.into_iter().next().unwrap()).execution().run, Run::Crashed);
        for (status, expected) in [("new", Run::Open), ("waiting", Run::Open), ("unknown", Run::Open)] {
            assert_eq!(run(status, 1), expected);
        }
        assert_eq!((run("canceled", 1), run("success", 1)), (Run::Cancelled, Run::Succeeded));
    }
}
