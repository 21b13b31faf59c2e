-- Ledger and payloads in SQLite. Times are milliseconds since 1970 UTC.
-- Expand first: a later file may only add what a release before it can ignore; removing waits until no such release runs.

-- The moving part of the ledger: narrow, so that many rows share the page that an update writes.
--   state     1 relayed, 2 delivering, 3 delivered, 4 succeeded, 5 failed, 6 unknown, 7 dead, 8 cancelled
--   phase     0 open (phase_at: last published), 1 complete with payload, 2 complete without (phase_at: finished),
--             3 dead (phase_at: accepted)
--   timer_at  when the timer publishes it again; null: nothing to do
--   token     grows with every claim; claim_until null: nobody holds it
--   begun_*   the claim and the start of the attempt in `current`
--   current   the attempt under way; history: the ended ones; both as frames (number u32, length u32, JSON or sealed)
CREATE TABLE events (
  seq INTEGER PRIMARY KEY,
  id BLOB NOT NULL,
  tenant TEXT NOT NULL,
  body_hash BLOB NOT NULL,
  body_bytes INTEGER NOT NULL,
  workflow TEXT,
  accepted_at INTEGER NOT NULL,
  relayed_at INTEGER NOT NULL,
  updated_at INTEGER NOT NULL,
  finished_at INTEGER,
  state INTEGER NOT NULL,
  phase INTEGER NOT NULL,
  phase_at INTEGER NOT NULL,
  next_at INTEGER,
  timer_at INTEGER,
  attempts INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0,
  replays INTEGER NOT NULL DEFAULT 0,
  token INTEGER NOT NULL DEFAULT 0,
  begun_token INTEGER NOT NULL DEFAULT 0,
  begun_at INTEGER NOT NULL DEFAULT 0,
  claim_owner TEXT,
  claim_until INTEGER,
  error_class TEXT,
  error BLOB,
  n8n_execution_id TEXT,
  message_id TEXT,
  current BLOB,
  history BLOB
) STRICT;

CREATE UNIQUE INDEX events_key ON events (id, tenant);
CREATE INDEX events_time ON events (accepted_at);
CREATE INDEX events_tenant_time ON events (tenant, accepted_at);
CREATE INDEX events_phase ON events (phase, phase_at);
CREATE INDEX events_timer ON events (timer_at) WHERE timer_at IS NOT NULL;

-- The part that never changes; body becomes null when it is collected.
CREATE TABLE contents (
  seq INTEGER PRIMARY KEY,
  envelope BLOB NOT NULL,
  sealed INTEGER NOT NULL,
  body BLOB
) STRICT;

-- Dead letters that never had a row: forged, unknown.
CREATE TABLE rejected (
  topic TEXT NOT NULL,
  message_id TEXT NOT NULL,
  at INTEGER NOT NULL,
  reason TEXT NOT NULL,
  raw BLOB NOT NULL,
  PRIMARY KEY (topic, message_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX rejected_time ON rejected (at);

-- One row: the oldest release line (migration number) that can still work with this database, and the environment that
-- it belongs to (the first one that used it).
CREATE TABLE format (oldest_reader INTEGER NOT NULL, environment TEXT) STRICT;
INSERT INTO format VALUES (1, NULL);
