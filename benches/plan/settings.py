"""Where the plan's design finds its servers: the same environment variables for the bridge and the consumer."""

import os

DATABASE_URL = os.environ["DATABASE_URL"]
PULSAR_SERVICE_URL = os.environ["PULSAR_SERVICE_URL"]
TOPIC = os.environ["PULSAR_TOPIC"]
WEBHOOK_URL = os.environ.get("FASTAPI_BRIDGE_WEBHOOK_URL", "")
SUBSCRIPTION = "bridge"
IN_FLIGHT = int(os.environ.get("IN_FLIGHT", "32"))
# Two workers and the consumer stay well below PostgreSQL's 100 connections.
POOL = int(os.environ.get("DATABASE_POOL", "16"))

SCHEMA = """
create table if not exists payloads (
    execution_id uuid primary key,
    tenant_id text not null,
    workflow text not null,
    payload text not null,
    created_at timestamptz not null default now()
)
"""
