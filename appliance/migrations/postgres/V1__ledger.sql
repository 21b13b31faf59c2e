-- Ledger and payloads in PostgreSQL, in the schema that search_path names. Times are milliseconds since 1970 UTC by the
-- database's clock, except accepted_at (the appliance that accepted it) and what a caller asked for by the wall clock.
-- Expand first: a later file may only add what a release before it can ignore; removing waits until no such release runs.

-- The moving part of the ledger. The columns mean what they mean in ../sqlite/V1__ledger.sql.
-- fillfactor leaves room for claim and begin as heap-only updates: they touch no indexed column.
-- The collation of tenant lets a pattern (LIKE 'acme-%') use its index, whatever the database's own is.
CREATE TABLE events (
  seq BIGINT GENERATED ALWAYS AS IDENTITY,
  id UUID NOT NULL,
  tenant TEXT COLLATE "C" NOT NULL,
  body_hash BYTEA NOT NULL,
  body_bytes BIGINT NOT NULL,
  workflow TEXT,
  accepted_at BIGINT NOT NULL,
  relayed_at BIGINT NOT NULL,
  updated_at BIGINT NOT NULL,
  finished_at BIGINT,
  state SMALLINT NOT NULL,
  phase SMALLINT NOT NULL,
  phase_at BIGINT NOT NULL,
  next_at BIGINT,
  timer_at BIGINT,
  attempts INTEGER NOT NULL DEFAULT 0,
  crashes INTEGER NOT NULL DEFAULT 0,
  replays INTEGER NOT NULL DEFAULT 0,
  token BIGINT NOT NULL DEFAULT 0,
  begun_token BIGINT NOT NULL DEFAULT 0,
  begun_at BIGINT NOT NULL DEFAULT 0,
  claim_owner TEXT,
  claim_until BIGINT,
  error_class TEXT,
  error BYTEA,
  n8n_execution_id TEXT,
  message_id TEXT,
  current BYTEA,
  history BYTEA,
  PRIMARY KEY (id, tenant)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);

CREATE INDEX events_time ON events (accepted_at, seq);
CREATE INDEX events_tenant_time ON events (tenant, accepted_at, seq);
CREATE INDEX events_phase ON events (phase, phase_at);
CREATE INDEX events_timer ON events (timer_at) WHERE timer_at IS NOT NULL;

-- The part that never changes; body becomes null when it is collected.
CREATE TABLE contents (
  seq BIGINT PRIMARY KEY,
  envelope BYTEA NOT NULL,
  sealed SMALLINT NOT NULL,
  body BYTEA
);
-- Bodies are kept as they are: most are small, and sealed ones do not compress.
ALTER TABLE contents ALTER COLUMN body SET STORAGE EXTERNAL;

-- Dead letters that never had a row: forged, unknown.
CREATE TABLE rejected (
  topic TEXT NOT NULL,
  message_id TEXT NOT NULL,
  at BIGINT NOT NULL,
  reason TEXT NOT NULL,
  raw BYTEA NOT NULL,
  PRIMARY KEY (topic, message_id)
);
CREATE INDEX rejected_time ON rejected (at);

-- One row: the oldest release line (migration number) that can still work with this database, and the environment that
-- it belongs to (the first one that used it).
CREATE TABLE format (oldest_reader INTEGER NOT NULL, environment TEXT);
INSERT INTO format VALUES (1, NULL);
