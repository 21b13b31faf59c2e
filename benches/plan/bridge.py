"""The plan's bridge: `POST /pulsar/publish` checks the event, puts its payload into PostgreSQL and a reference into Pulsar.

FastAPI on uvicorn with uvloop and httptools, asyncpg with a pool and prepared statements, the asynchronous client of
`pulsar-client` with batching. It promises what 202 promises in the product: both writes are on disk before the answer.
"""

import asyncio
import contextlib
import json
import logging
import uuid

import asyncpg
import pulsar
import pulsar.asyncio
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from pydantic_core import to_json

import settings

INSERT = "insert into payloads (execution_id, tenant_id, workflow, payload) values ($1, $2, $3, $4)"


class Publish(BaseModel):
    workflow: str = Field(min_length=1, max_length=200)
    tenant_id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    payload: dict
    execution_id: uuid.UUID | None = None


class State:
    pool: asyncpg.Pool
    producer: pulsar.asyncio.Producer


state = State()


@contextlib.asynccontextmanager
async def lifespan(_app: FastAPI):
    logger = logging.getLogger("pulsar")
    logger.setLevel(logging.WARNING)
    client = pulsar.asyncio.Client(settings.PULSAR_SERVICE_URL, logger=logger)
    async with asyncpg.create_pool(settings.DATABASE_URL, min_size=settings.POOL, max_size=settings.POOL) as pool:
        state.pool = pool
        # Batches fill while the journal is synced; a millisecond more buys nothing at this rate.
        state.producer = await client.create_producer(settings.TOPIC, batching_enabled=True, batching_max_publish_delay_ms=1)
        yield
        await state.producer.close()
        await client.close()


app = FastAPI(lifespan=lifespan)


@app.post("/pulsar/publish", status_code=202)
async def publish(event: Publish) -> JSONResponse:
    execution_id = event.execution_id or uuid.uuid4()
    await state.pool.execute(INSERT, execution_id, event.tenant_id, event.workflow, to_json(event.payload).decode())
    reference = {"execution_id": str(execution_id), "tenant_id": event.tenant_id, "workflow": event.workflow}
    await state.producer.send(json.dumps(reference).encode())
    return JSONResponse({"execution_id": str(execution_id), "topic": settings.TOPIC}, status_code=202)


@app.get("/healthz")
async def healthz() -> dict:
    return {"ok": True}


def prepare() -> None:
    """Makes the table and the subscription, once, before the workers start."""

    async def table() -> None:
        connection = await asyncpg.connect(settings.DATABASE_URL)
        await connection.execute(settings.SCHEMA)
        await connection.close()

    asyncio.run(table())
    client = pulsar.Client(settings.PULSAR_SERVICE_URL)
    client.subscribe(settings.TOPIC, settings.SUBSCRIPTION, consumer_type=pulsar.ConsumerType.Shared).close()
    client.close()


if __name__ == "__main__":
    prepare()
