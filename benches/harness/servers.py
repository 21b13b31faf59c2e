"""Throw-away PostgreSQL and Pulsar, as durable as in production: fsync on, journal synced before an acknowledgement."""

import json
import os
import pathlib
import shutil
import subprocess
import time
import urllib.error
import urllib.request

from processes import Failed, Process, say

PULSAR_VERSION = "4.0.8"


class Postgres:
    """A cluster of its own with the distribution's defaults (synchronous_commit and fsync are on)."""

    def __init__(self, dir: pathlib.Path, port: int):
        self.dir, self.port, self.process = dir, port, None
        self.bin = max(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), default=None)
        if not self.bin:
            raise Failed("PostgreSQL is not installed: apt-get install postgresql")

    def url(self, database: str) -> str:
        return f"postgresql://bench@127.0.0.1:{self.port}/{database}"

    def start(self) -> "Postgres":
        data = self.dir / "data"
        if not data.exists():
            self.dir.mkdir(parents=True, exist_ok=True)
            if os.geteuid() == 0:
                shutil.chown(self.dir, "postgres", "postgres")
            initdb = Process(
                "initdb", [self.bin / "initdb", "-D", data, "-U", "bench", "-A", "trust", "-E", "UTF8", "--no-instructions"],
                self.dir / "initdb.log", user="postgres", cwd="/",
            )
            if initdb.popen.wait(120) != 0:
                raise Failed("initdb failed:\n" + initdb.tail())
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self.dir, "shared_buffers": "256MB"}
        flags = [f for key, value in options.items() for f in ("-c", f"{key}={value}")]
        self.process = Process("postgres", [self.bin / "postgres", "-D", data, *flags], self.dir / "postgres.log", user="postgres", cwd="/")
        deadline = time.monotonic() + 60
        while self.query("postgres", "select 1", check=False) != "1":
            if self.process.popen.poll() is not None or time.monotonic() > deadline:
                raise Failed("PostgreSQL does not start:\n" + self.process.tail())
            time.sleep(0.1)
        return self

    def database(self, name: str) -> str:
        """A fresh, empty database; returns its URL."""
        self.query("postgres", f"drop database if exists {name} with (force)")
        self.query("postgres", f"create database {name}")
        return self.url(name)

    def query(self, database: str, sql: str, check: bool = True) -> str:
        done = subprocess.run([self.bin / "psql", "-XAtqc", sql, self.url(database)], capture_output=True, text=True, cwd="/")
        if check and done.returncode != 0:
            raise Failed(f"{sql}: {done.stderr}")
        return done.stdout.strip()

    def stop(self) -> None:
        if self.process:
            # SIGINT: the fast shutdown
            self.process.stop(sig=2)


class Pulsar:
    """Broker, bookie and metadata store in one JVM."""

    def __init__(self, dir: pathlib.Path, cache: pathlib.Path, port: int):
        self.dir, self.port, self.http, self.bookie, self.process = dir, port, port + 1, port + 2, None
        self.dist = self.distribution(cache)

    @property
    def url(self) -> str:
        return f"pulsar://127.0.0.1:{self.port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    @staticmethod
    def distribution(cache: pathlib.Path) -> pathlib.Path:
        own = cache / f"pulsar-{PULSAR_VERSION}"
        for place in [own, *cache.glob(f"pulsar*/dist/{PULSAR_VERSION}")]:
            if (place / ".complete").exists():
                return place
        say(f"Apache Pulsar {PULSAR_VERSION} from Maven Central (245 MB)")
        subprocess.run(
            ["mvn", "-B", "-q", "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy",
             f"-Dartifact=org.apache.pulsar:pulsar-server-distribution:{PULSAR_VERSION}:tar.gz:bin", f"-DoutputDirectory={own}.part"],
            check=True,
        )
        archive = next(pathlib.Path(f"{own}.part").glob("*.tar.gz"))
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        subprocess.run(["tar", "xzf", archive, "-C", own, "--strip-components=1"], check=True)
        shutil.rmtree(f"{own}.part")
        (own / ".complete").touch()
        return own

    def start(self) -> "Pulsar":
        (self.dir / "tmp").mkdir(parents=True, exist_ok=True)
        conf = self.dir / "standalone.conf"
        conf.write_text(CONF.format(port=self.port, http=self.http))
        (self.dir / "log4j2.properties").write_text(LOG)
        opens = ["java.base/java.nio", "java.base/jdk.internal.misc", "java.base/java.io", "java.base/java.util.zip",
                 "java.base/jdk.internal.platform", "java.management/sun.management", "jdk.management/com.sun.management.internal"]
        java = [java_17(), "-Xms512m", "-Xmx512m", "-XX:MaxDirectMemorySize=512m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError",
                *[f"--add-opens={o}=ALL-UNNAMED" for o in opens], "-Dio.netty.tryReflectionSetAccessible=true",
                "-Djava.net.preferIPv4Stack=true", f"-Djava.io.tmpdir={self.dir}/tmp", "-Dlog4j2.is.webapp=false",
                f"-Dlog4j2.configurationFile={self.dir}/log4j2.properties"]
        self.process = Process(
            "pulsar",
            [*java, "-cp", f"{self.dist}/lib/*", "org.apache.pulsar.PulsarStandaloneStarter", "--config", conf,
             "--advertised-address", "127.0.0.1", "--bookkeeper-port", self.bookie, "--bookkeeper-dir", self.dir / "bookkeeper",
             "--metadata-dir", self.dir / "metadata", "--no-functions-worker", "--no-stream-storage"],
            self.dir / "pulsar.log", cwd=self.dir,
        )
        seconds = self.process.ready(f"{self.http_url}/admin/v2/brokers/health", 180, 0.25)
        say(f"pulsar is ready after {seconds:.0f} s")
        return self

    def namespace(self, tenant: str, namespace: str) -> None:
        self.put(f"tenants/{tenant}", {"allowedClusters": ["standalone"]})
        self.put(f"namespaces/{tenant}/{namespace}", None)

    def put(self, path: str, body) -> None:
        request = urllib.request.Request(
            f"{self.http_url}/admin/v2/{path}", method="PUT", headers={"content-type": "application/json"},
            data=b"" if body is None else json.dumps(body).encode(),
        )
        try:
            urllib.request.urlopen(request, timeout=30).close()
        except urllib.error.HTTPError as error:
            if error.code != 409:  # it is there already
                raise Failed(f"PUT {path}: {error.code} {error.read()!r}") from error

    def stop(self) -> None:
        if self.process:
            self.process.stop()


def java_17() -> str:
    for pattern in ("*-21-*", "*-17-*", "*17*", "*21*"):
        for home in sorted(pathlib.Path("/usr/lib/jvm").glob(pattern)):
            if (home / "bin/java").exists():
                return str(home / "bin/java")
    return shutil.which("java") or "java"


# One small machine: few threads, small caches. What is promised stays: journalSyncData.
CONF = """\
clusterName=standalone
brokerServicePort={port}
webServicePort={http}
bindAddress=127.0.0.1
advertisedAddress=127.0.0.1
numIOThreads=2
numHttpServerThreads=8
numExecutorThreadPoolSize=2
numCacheExecutorThreadPoolSize=2
numOrderedExecutorThreads=2
topicOrderedExecutorThreadNum=2
bookkeeperClientNumWorkerThreads=2
bookkeeperClientNumIoThreads=2
brokerShutdownTimeoutMs=5000
defaultNumberOfNamespaceBundles=1
loadBalancerEnabled=false
brokerDeleteInactiveTopicsEnabled=false
allowAutoTopicCreation=true
acknowledgmentAtBatchIndexLevelEnabled=true
managedLedgerDefaultEnsembleSize=1
managedLedgerDefaultWriteQuorum=1
managedLedgerDefaultAckQuorum=1
managedLedgerCacheSizeMB=64
managedLedgerNumSchedulerThreads=2
transactionCoordinatorEnabled=false
webSocketServiceEnabled=false
listeningInterface=lo
allowLoopback=true
allowEphemeralPorts=true
journalSyncData=true
useHostNameAsBookieID=false
journalMaxSizeMB=256
journalPreAllocSizeMB=16
ledgerStorageClass=org.apache.bookkeeper.bookie.storage.ldb.DbLedgerStorage
dbStorage_writeCacheMaxSizeMb=64
dbStorage_readAheadCacheMaxSizeMb=32
dbStorage_rocksDB_blockCacheSize=16777216
diskUsageThreshold=0.99
diskUsageWarnThreshold=0.98
diskUsageLwmThreshold=0.97
minUsableSizeForIndexFileCreation=1
minUsableSizeForEntryLogCreation=1
"""
LOG = """\
status = error
appender.out.type = Console
appender.out.name = OUT
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d{HH:mm:ss.SSS} %-5p %c{1.} %m%n
rootLogger.level = warn
rootLogger.appenderRef.out.ref = OUT
"""
