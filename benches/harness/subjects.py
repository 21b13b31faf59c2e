"""What is measured: the appliance, the plan's own design, the floor. Each knows how to start and which processes it has."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import time
import urllib.request
import uuid
from dataclasses import dataclass

from processes import Failed, Process, say
from servers import Postgres, Pulsar

TOKEN = "bench-token-of-no-worth-0123456789"
HERE = pathlib.Path(__file__).resolve().parent.parent


@dataclass
class World:
    """Where everything of one run lives."""

    bin: pathlib.Path
    venv: pathlib.Path
    cache: pathlib.Path
    out: pathlib.Path
    state: pathlib.Path
    port: int
    postgres: Postgres | None = None
    pulsar: Pulsar | None = None

    @property
    def receiver(self) -> str:
        return f"127.0.0.1:{self.port + 4}"

    def servers(self) -> None:
        """PostgreSQL and Pulsar, started once and kept for the whole run."""
        if not self.postgres:
            self.postgres = Postgres(self.state / "postgres", self.port + 10).start()
        if not self.pulsar:
            self.pulsar = Pulsar(self.state / "pulsar", self.cache, self.port + 20).start()

    def stop(self) -> None:
        for server in (self.pulsar, self.postgres):
            if server:
                server.stop()
        self.pulsar = self.postgres = None

    def fresh(self, name: str) -> pathlib.Path:
        dir = self.state / name
        shutil.rmtree(dir, ignore_errors=True)
        dir.mkdir(parents=True)
        return dir

    def load(self, mode: str, url: str, *arguments, token: bool = True, timeout: float = 600) -> dict:
        """Runs the load generator to its end."""
        command = [self.bin / "bench-load", mode, "--url", url, "--run", uuid.uuid4().hex[:8]]
        if token:
            command += ["--token", TOKEN]
        command += arguments
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise Failed(f"bench-load {mode} failed: {done.stderr}")
        return json.loads(done.stdout)


class Floor:
    name = "floor"

    def __init__(self, world: World):
        self.world, self.address = world, f"127.0.0.1:{world.port + 3}"
        self.url = f"http://{self.address}/"

    @contextlib.contextmanager
    def running(self):
        file = self.world.fresh("floor") / "bodies"
        command = [self.world.bin / "bench-floor", "--listen", self.address, "--file", file]
        with Process("floor", command, self.world.out / "floor.log") as process:
            time.sleep(0.3)
            yield [process]
        file.unlink()


class Plan:
    """FastAPI + asyncpg + pulsar-client under uvicorn with two workers, and the aiohttp consumer."""

    name = "plan"

    def __init__(self, world: World, consumer: bool):
        self.world, self.consumer = world, consumer
        self.address = f"127.0.0.1:{world.port + 2}"
        self.url = f"http://{self.address}/pulsar/publish"

    @contextlib.contextmanager
    def running(self):
        world = self.world
        world.servers()
        python = world.venv / "bin/python"
        env = {
            "DATABASE_URL": world.postgres.database("plan"),
            "PULSAR_SERVICE_URL": world.pulsar.url,
            # A topic of its own for each run: nothing is left over from the former one.
            "PULSAR_TOPIC": f"persistent://public/default/plan-{uuid.uuid4().hex[:8]}",
            "FASTAPI_BRIDGE_WEBHOOK_URL": f"http://{world.receiver}/webhook/pulsar-trigger",
            "PYTHONPATH": str(HERE / "plan"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        prepared = Process("plan: prepare", [python, "-m", "bridge"], world.out / "plan-prepare.log", env)
        if prepared.popen.wait(60) != 0:
            raise Failed("the plan's design cannot be prepared:\n" + prepared.tail())
        host, port = self.address.split(":")
        command = [python, "-m", "uvicorn", "bridge:app", "--host", host, "--port", port, "--workers", "2", "--loop", "uvloop",
                   "--http", "httptools", "--no-access-log", "--log-level", "warning", "--backlog", "2048"]
        with contextlib.ExitStack() as stack:
            bridge = stack.enter_context(Process("plan: bridge", command, world.out / "plan-bridge.log", env))
            processes = [bridge]
            if self.consumer:
                log = world.out / "plan-consumer.log"
                log.unlink(missing_ok=True)
                consumer = stack.enter_context(Process("plan: consumer", [python, "-m", "consumer"], log, env))
                processes.append(consumer)
                while "ready" not in log.read_text():
                    if consumer.popen.poll() is not None:
                        raise Failed("the plan's consumer ended:\n" + consumer.tail())
                    time.sleep(0.05)
            bridge.ready(f"http://{self.address}/healthz", 30)
            # Both workers, not only the one that answered.
            time.sleep(1)
            yield processes


class Ours:
    """`dealscale serve` with the bench's configuration: a token is required, everything else is at its default."""

    def __init__(self, world: World, behind: str, name: str | None = None):
        """`behind`: `embedded`, `servers` (Pulsar and PostgreSQL) or `down` (both configured, neither there)."""
        self.world, self.behind, self.name = world, behind, name or f"dealscale-{behind}"
        self.url = f"http://127.0.0.1:{world.port}/pulsar/publish"
        self.admin = f"http://127.0.0.1:{world.port + 1}"
        self.state = world.state / self.name
        self.started = None

    def configure(self) -> pathlib.Path:
        world = self.world
        text = CONFIG.format(
            bridge=world.port, admin=world.port + 1, hash=hashlib.sha256(TOKEN.encode()).hexdigest(), receiver=world.receiver
        )
        if self.behind != "embedded":
            # Nobody listens at the last ports of the range.
            up = self.behind == "servers"
            # A namespace of its own for each run: nothing is left over from the former one.
            namespace = f"bench-{uuid.uuid4().hex[:8]}"
            if up:
                world.pulsar.namespace("dealscale", namespace)
            text += SERVERS.format(
                postgres=world.postgres.database("ours") if up else f"postgresql://bench@127.0.0.1:{world.port + 98}/ours",
                pulsar=world.pulsar.url if up else f"pulsar://127.0.0.1:{world.port + 99}",
                http=world.pulsar.http_url if up else f"http://127.0.0.1:{world.port + 97}",
                namespace=namespace,
            )
        dir = world.state / f"{self.name}.config"
        dir.mkdir(parents=True, exist_ok=True)
        file = dir / "dealscale.toml"
        file.write_text(text)
        return file

    @contextlib.contextmanager
    def running(self, keep: bool = False):
        """Yields the process. `keep`: on the state (and configuration) that is there."""
        if self.behind == "servers":
            self.world.servers()
        config = self.world.state / f"{self.name}.config/dealscale.toml"
        if not (keep and config.exists()):
            config = self.configure()
            self.world.fresh(self.name)
        command = [self.world.bin / "dealscale", "serve", "--config", config, "--state-dir", self.state]
        with Process(self.name, command, self.world.out / f"{self.name}.log", OUR_ENVIRONMENT) as process:
            # Degraded is not unready: without Pulsar and PostgreSQL it accepts all the same.
            self.started = process.ready(f"{self.admin}/readyz", 60, 0.002)
            yield [process]

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.admin}/metrics", timeout=10) as response:
            return response.read().decode()


# The plan's variables would win over the configuration file.
OUR_ENVIRONMENT = {name: "" for name in os.environ if name.startswith("PULSAR_") or name.startswith("FASTAPI_")}

CONFIG = """\
[bridge]
listen = "127.0.0.1:{bridge}"

[admin]
listen = "127.0.0.1:{admin}"

[accounts.bench]
token_sha256 = ["{hash}"]
rights = ["publish", "read"]
tenants = ["t1"]

[environments.bench.tenants.t1]

[environments.bench.n8n]
url = "http://{receiver}"

# As many deliveries under way as the plan's consumer has.
[environments.bench.default_route]
concurrency = 32
"""
SERVERS = """
[environments.bench.broker]
kind = "pulsar"
service_url = "{pulsar}"
http_url = "{http}"
tenant = "dealscale"
namespace = "{namespace}"

[environments.bench.payloads]
store = "postgres"
url = "{postgres}"
"""
