#!/usr/bin/env python3
"""A stand-in for n8n that answers every call and prints what came. It runs no workflow: `make run N8N=none` uses it.

    echo.py PORT
"""

import http.server
import json
import sys


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(200, {"status": "ok", "receiver": "echo, not n8n"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        names = ("webhook-id", "traceparent", "content-type")
        seen = {name: self.headers[name] for name in names if self.headers[name]}
        print(f"echo: {self.command} {self.path} {json.dumps(seen)} {body[:500].decode('utf-8', 'replace')}", flush=True)
        self.answer(200, {"receiver": "echo, not n8n", "bytes": len(body)})

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Echo).serve_forever()
