"""A webhook receiver in the host's network: answers 200 and writes every mark that it sees to a file, one a line.

receiver.py PORT FILE
"""
import asyncio
import re
import sys

MARK = re.compile(rb'"mark"\s*:\s*"([^"]+)"')


async def serve(reader, writer, out):
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length:\s*(\d+)", head, re.IGNORECASE).group(1))
            body = await reader.readexactly(length)
            for mark in MARK.findall(body):
                out.write(mark.decode() + "\n")
            out.flush()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main(port, path):
    with open(path, "a", encoding="ascii") as out:
        server = await asyncio.start_server(lambda r, w: serve(r, w, out), "127.0.0.1", port, backlog=1024)
        await server.serve_forever()


asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
