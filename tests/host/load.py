"""Load on the bridge while something is done to it, and what callers saw of that.

load.py PORT TOKEN SECONDS RATE OUT

- RATE publishes a second, each on a connection of its own, as n8n's HTTP node makes them. Sent once, never again: whatever is not a 202
  is a failure.
- Eight keep-alive clients, twenty publishes a second together. A kept connection that ends before a single byte of the answer is opened
  again and the publish sent once more under its Idempotency-Key, as HTTP allows (RFC 9110, 9.2.2); anything else is a failure.
- Four kept connections that stay idle, and one long poll that is asked again whenever it was answered.

Writes JSON to OUT: failures with their texts, marks of all accepted events, the longest time without a 202 ("gap").
"""
import asyncio
import json
import sys
import time

PORT, TOKEN, SECONDS, RATE, OUT = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
PATIENCE = 20
accepted, failures, times = [], [], []
counts = {"sent": 0, "kept_reopened": 0, "idle_closed": 0, "polls": 0, "latency_max": 0.0}


class NoAnswer(Exception):
    """The connection ended before the first byte of an answer."""


async def ask(reader, writer, method, path, body=b"", close=False, headers=""):
    writer.write((f"{method} {path} HTTP/1.1\r\nhost: bridge\r\nauthorization: Bearer {TOKEN}\r\ncontent-type: application/json\r\n"
                  f"content-length: {len(body)}\r\n{headers}{'connection: close' + chr(13) + chr(10) if close else ''}\r\n").encode() + body)
    try:
        await writer.drain()
        first = await reader.read(1)
    except ConnectionError as error:
        raise NoAnswer(str(error)) from error
    if not first:
        raise NoAnswer("closed")
    head = first + await reader.readuntil(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    body = await reader.readexactly(length)
    return int(head.split(b" ", 2)[1]), b"connection: close" in head.lower(), body


def event(mark):
    return json.dumps({"workflow": "load", "tenant_id": "default", "payload": {"mark": mark}}).encode()


def note(mark, begin, status, body):
    now = time.monotonic()
    counts["latency_max"] = max(counts["latency_max"], now - begin)
    if status == 202:
        accepted.append(mark)
        times.append(now)
    else:
        failures.append(f"{status} {body[:200]!r}")


async def once(n):
    mark, begin = f"new-{n}", time.monotonic()
    counts["sent"] += 1
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        try:
            status, _, body = await asyncio.wait_for(ask(reader, writer, "POST", "/pulsar/publish", event(mark), close=True), PATIENCE)
        finally:
            writer.close()
        note(mark, begin, status, body)
    except Exception as error:
        failures.append(f"new connection: {type(error).__name__} {error} after {time.monotonic() - begin:.3f} s")


async def kept(client, end):
    reader = writer = None
    n = 0
    while time.monotonic() < end:
        n += 1
        mark, begin, tries = f"kept-{client}-{n}", time.monotonic(), 2
        counts["sent"] += 1
        try:
            while tries:
                tries -= 1
                fresh = writer is None
                if fresh:
                    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
                try:
                    status, last, body = await asyncio.wait_for(
                        ask(reader, writer, "POST", "/pulsar/publish", event(mark), headers=f"idempotency-key: {mark}\r\n"), PATIENCE)
                except NoAnswer:
                    writer.close()
                    writer = None
                    if fresh or not tries:
                        raise
                    counts["kept_reopened"] += 1
                    continue
                if last:
                    writer.close()
                    writer = None
                note(mark, begin, status, body)
                break
        except Exception as error:
            failures.append(f"kept connection: {type(error).__name__} {error}")
            writer = None
        await asyncio.sleep(0.4)


async def idle(end):
    while time.monotonic() < end:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            await ask(reader, writer, "GET", "/executions?tenant=default&limit=1")
            await asyncio.wait_for(reader.read(1), max(0.1, end - time.monotonic()))
            counts["idle_closed"] += 1
            writer.close()
        except asyncio.TimeoutError:
            writer.close()
            return
        except Exception as error:
            failures.append(f"idle connection: {type(error).__name__} {error}")
        await asyncio.sleep(0.2)


async def poll(end):
    """An event of far in the future: its poll ends only by its timeout, or because the appliance stops."""
    later = {"workflow": "load", "tenant_id": "default", "payload": 1, "deliver_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 86400))}
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    status, _, body = await ask(reader, writer, "POST", "/pulsar/publish", json.dumps(later).encode(), close=True)
    if status != 202:
        failures.append(f"the poll's event: {status} {body!r}")
        return
    path = f"/executions/{json.loads(body)['execution_id']}/wait?tenant=default&timeout=30s"
    while time.monotonic() < end:
        begin = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            status, _, body = await asyncio.wait_for(ask(reader, writer, "GET", path, close=True), max(0.2, end - time.monotonic()))
            counts["polls"] += 1
            if status not in (200, 202, 204):
                failures.append(f"long poll: {status} {body[:200]!r}")
                await asyncio.sleep(0.2)
        except asyncio.TimeoutError:
            return
        except Exception as error:
            failures.append(f"long poll: {type(error).__name__} {error} after {time.monotonic() - begin:.3f} s")
            await asyncio.sleep(0.2)
        finally:
            writer.close()


async def main():
    begin = time.monotonic()
    end = begin + SECONDS
    steady = [asyncio.create_task(kept(c, end)) for c in range(8)]
    steady += [asyncio.create_task(idle(end)) for _ in range(4)] + [asyncio.create_task(poll(end))]
    sent = []
    for n in range(int(SECONDS * RATE)):
        wait = begin + n / RATE - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        sent.append(asyncio.create_task(once(n)))
    await asyncio.gather(*sent, *steady)
    times.sort()
    gap = max((b - a for a, b in zip(times, times[1:])), default=SECONDS)
    with open(OUT, "w", encoding="ascii") as out:
        json.dump({**counts, "accepted": len(accepted), "failed": len(failures), "gap": round(gap, 3), "failures": failures[:20], "marks": accepted}, out)


asyncio.run(main())
