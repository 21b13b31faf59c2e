//! SQLite as the second store: WAL, `synchronous=FULL`, one connection, one transaction for each batch.

use std::path::Path;

use rusqlite::{Connection, ErrorCode, OptionalExtension, params};

use super::{Entry, Failure, Kv, Tree, Write, sync_dir};

pub const FILE: &str = "outbox.sqlite";

pub struct Sqlite {
    db: Connection,
}

fn failure(error: rusqlite::Error) -> Failure {
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Failure::Corrupt(error.to_string().into()),
        Some(ErrorCode::SystemIoFailure)
            if error.sqlite_error().is_some_and(|e| e.extended_code == rusqlite::ffi::SQLITE_IOERR_FSYNC) =>
        {
            Failure::Sync(error.to_string().into())
        }
        _ => Failure::io(error),
    }
}

impl Sqlite {
    pub fn open(dir: &Path) -> Result<Self, Failure> {
        let db = Connection::open(dir.join(FILE)).map_err(failure)?;
        // Large pages, so that a value lies in one piece, where a salvage finds it.
        db.execute_batch(
            "PRAGMA page_size = 65536; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -16384;
             PRAGMA wal_autocheckpoint = 256; PRAGMA journal_size_limit = 67108864;
             CREATE TABLE IF NOT EXISTS kv (tree TEXT NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL, PRIMARY KEY (tree, key))
             WITHOUT ROWID;",
        )
        .map_err(failure)?;
        sync_dir(dir).map_err(Failure::io)?;
        Ok(Self { db })
    }
}

impl Kv for Sqlite {
    fn commit(&mut self, writes: Vec<Write>) -> Result<(), Failure> {
        if writes.is_empty() {
            return Ok(());
        }
        let transaction = self.db.transaction().map_err(failure)?;
        {
            let mut put = transaction
                .prepare_cached("INSERT OR REPLACE INTO kv (tree, key, value) VALUES (?1, ?2, ?3)")
                .map_err(failure)?;
            let mut delete =
                transaction.prepare_cached("DELETE FROM kv WHERE tree = ?1 AND key = ?2").map_err(failure)?;
            for write in &writes {
                match &write.value {
                    Some(value) => put.execute(params![write.tree.name(), write.key, value]),
                    None => delete.execute(params![write.tree.name(), write.key]),
                }
                .map_err(failure)?;
            }
        }
        transaction.commit().map_err(failure)
    }

    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, Failure> {
        let mut get = self.db.prepare_cached("SELECT value FROM kv WHERE tree = ?1 AND key = ?2").map_err(failure)?;
        get.query_row(params![tree.name(), key], |row| row.get(0)).optional().map_err(failure)
    }

    fn scan(&self, tree: Tree, after: Option<&[u8]>, limit: usize) -> Result<Vec<Entry>, Failure> {
        // An empty blob sorts before every key, and no key is empty.
        let mut scan = self
            .db
            .prepare_cached("SELECT key, value FROM kv WHERE tree = ?1 AND key > ?2 ORDER BY key LIMIT ?3")
            .map_err(failure)?;
        let rows = scan
            .query_map(params![tree.name(), after.unwrap_or_default(), limit as i64], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .map_err(failure)?;
        rows.collect::<Result<_, _>>().map_err(failure)
    }

    fn value_max(&self) -> usize {
        // A quarter of a page: WITHOUT ROWID tables spill larger ones over several pages.
        14 << 10
    }
}
