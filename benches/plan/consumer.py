"""The plan's consumer: takes references from Pulsar, loads payloads from PostgreSQL, calls the webhook, acknowledges.

aiohttp with keep-alive, 32 events in flight, uvloop.
"""

import asyncio
import json
import logging
import signal
import sys

import aiohttp
import asyncpg
import pulsar
import pulsar.asyncio
import uvloop

import settings

SELECT = "select payload from payloads where execution_id = $1"


async def work(consumer: pulsar.asyncio.Consumer, pool: asyncpg.Pool, session: aiohttp.ClientSession) -> None:
    while True:
        message = await consumer.receive()
        try:
            reference = json.loads(message.data())
            payload = await pool.fetchval(SELECT, reference["execution_id"])
            headers = {
                "content-type": "application/json",
                "webhook-id": reference["execution_id"],
                "x-tenant-id": reference["tenant_id"],
            }
            async with session.post(settings.WEBHOOK_URL, data=payload.encode(), headers=headers) as response:
                await response.read()
                response.raise_for_status()
        except Exception as error:  # whatever it was, the broker delivers it again
            print("delivery failed:", repr(error), file=sys.stderr)
            await consumer.negative_acknowledge(message)
        else:
            await consumer.acknowledge(message)


async def main() -> None:
    logger = logging.getLogger("pulsar")
    logger.setLevel(logging.WARNING)
    client = pulsar.asyncio.Client(settings.PULSAR_SERVICE_URL, logger=logger)
    consumer = await client.subscribe(
        settings.TOPIC,
        settings.SUBSCRIPTION,
        consumer_type=pulsar.ConsumerType.Shared,
        negative_ack_redelivery_delay_ms=1000,
    )
    pool = await asyncpg.create_pool(settings.DATABASE_URL, min_size=settings.POOL, max_size=settings.POOL)
    connector = aiohttp.TCPConnector(limit=settings.IN_FLIGHT)
    async with pool, aiohttp.ClientSession(connector=connector) as session:
        print("ready", flush=True)
        workers = [asyncio.create_task(work(consumer, pool, session)) for _ in range(settings.IN_FLIGHT)]
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        waiting = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait([waiting, *workers], return_when=asyncio.FIRST_COMPLETED)
        for task in [waiting, *workers]:
            task.cancel()
        for task in done - {waiting}:
            task.result()  # a worker never ends by itself
    await client.close()


uvloop.run(main())
