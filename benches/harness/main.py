"""The figures of docs/benchmarks.md: see benches/run.sh."""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

from processes import Failed, Process, say
from subjects import Floor, Ours, Plan, World

MODES = ["accept", "cpu", "e2e", "outage", "open", "idle"]


class Bench:
    def __init__(self, world: World, quick: bool, rounds: int):
        self.world, self.quick, self.rounds = world, quick, rounds
        # One list of raw results per measured thing, in the order of measuring.
        self.raw: dict[str, list[dict]] = {}
        self.rows: list[tuple[str, str, str, str]] = []

    def keep(self, name: str, result: dict) -> dict:
        result["load_average"] = os.getloadavg()[0]
        self.raw.setdefault(name, []).append(result)
        (self.world.out / "raw.json").write_text(json.dumps(self.raw, indent=1))
        shown = {k: round(v, 2) for k, v in result.items() if isinstance(v, (int, float)) and k in SHOWN}
        say(f"  {name}: {shown}")
        if problem := {k: v for k, v in result.get("statuses", {}).items() if k != "202"} or result.get("errors"):
            say(f"    not accepted: {problem}, the first: {result.get('first_error')}")
        if result.get("lost"):
            say(f"    LOST: {result['lost']}")
        return result

    def ratio(self, upper: str, lower: str, field: str) -> float:
        """Median over the rounds of `upper` / `lower`, each measured beside the other."""
        pairs = zip(self.raw[upper], self.raw[lower])
        return statistics.median(u[field] / l[field] for u, l in pairs if l[field])

    def middle(self, name: str, field: str) -> float:
        return statistics.median(r[field] for r in self.raw[name])

    def row(self, figure: str, target: str, value: float, met: bool | None, shown: str, detail: str) -> None:
        self.rows.append((figure, target, shown.format(value), {True: "met", False: "**missed**", None: "–"}[met] + f" ({detail})"))

    # How fast events are accepted durably.

    def mode_accept(self) -> None:
        connections = [64] if self.quick else [1, 16, 64, 256]
        warmup, seconds = (1, 4) if self.quick else (3, 10)
        # `down`: what is behind the outbox is not there, so only the accept path is measured, as with the floor.
        # `servers`: relay and delivery work at the same time on the same cores.
        subjects = [Plan(self.world, consumer=False), Floor(self.world), Ours(self.world, "down"), Ours(self.world, "servers")]
        self.world.servers()
        with self.receiver():
            for n in range(self.rounds):
                for subject in subjects:
                    with subject.running() as processes:
                        for c in connections:
                            say(f"accept: {subject.name}, {c} connections, round {n + 1} of {self.rounds}")
                            before = self.cpu(processes)
                            result = self.world.load("publish", subject.url, "--connections", c, "--warmup", warmup, "--seconds", seconds)
                            result["cpu_us_server"] = (self.cpu(processes)["own"] - before["own"]) * 1e6 / max(result["accepted"], 1)
                            result["rss_mib"] = sum(p.memory() for p in processes)
                            self.keep(f"accept/{c}/{subject.name}", result)
        for c in connections:
            ours, plan, floor, busy = (f"accept/{c}/{s}" for s in ("dealscale-down", "plan", "floor", "dealscale-servers"))
            rate = lambda name: self.middle(name, "per_second")
            figure = f"durable accepts/s, 1 KiB, {c} connections"
            value = self.ratio(ours, plan, "per_second")
            at_64 = lambda met: met if c == 64 else None
            self.row(f"{figure}, against the plan's design", "≥ 10×" if c == 64 else "", value, at_64(value >= 10), "{:.1f}×",
                     f"{rate(ours):,.0f} and {rate(plan):,.0f}/s; p99 {self.middle(ours, 'p99_ms'):.1f} and {self.middle(plan, 'p99_ms'):.1f} ms")
            value = self.ratio(ours, floor, "per_second")
            self.row(f"{figure}, against the floor", "≥ 0.6×" if c == 64 else "", value, at_64(value >= 0.6), "{:.2f}×",
                     f"{rate(floor):,.0f}/s; CPU per accept {self.middle(ours, 'cpu_us_server'):.0f} and {self.middle(floor, 'cpu_us_server'):.0f} µs")
            value = self.ratio(busy, plan, "per_second")
            self.row(f"{figure}, while relaying to Pulsar + PostgreSQL and delivering, against the plan's design without its consumer",
                     "", value, None, "{:.1f}×", f"{rate(busy):,.0f}/s")

    # From the publish to the receiver, and what it costs.

    def mode_e2e(self) -> None:
        count = 3_000 if self.quick else 20_000
        subjects = [Plan(self.world, consumer=True), Ours(self.world, "embedded"), Ours(self.world, "servers")]
        self.through("e2e", subjects, ["--count", count, "--connections", 64])
        for name, target in (("embedded", 8), ("servers", 3)):
            ours = f"e2e/dealscale-{name}"
            value = self.ratio(ours, "e2e/plan", "delivered_per_second")
            self.row(f"events/s end to end, {'embedded' if name == 'embedded' else 'with Pulsar + PostgreSQL'}, against the plan's design",
                     f"≥ {target}×", value, value >= target, "{:.1f}×",
                     f"{self.middle(ours, 'delivered_per_second'):,.0f} and {self.middle('e2e/plan', 'delivered_per_second'):,.0f}/s;"
                     f" lost {self.total(ours, 'lost')}, duplicates {self.total(ours, 'duplicates')}")
        self.cost("e2e", "at full speed", True)

    def mode_cpu(self) -> None:
        """The same at a rate that all of them hold: batches are small, so every event costs more."""
        rate, seconds = 200, (8 if self.quick else 30)
        subjects = [Plan(self.world, consumer=True), Ours(self.world, "servers")]
        self.through("cpu", subjects, ["--count", rate * seconds, "--rate", rate, "--connections", 64])
        if "e2e/plan" not in self.raw:
            count = 3_000 if self.quick else 20_000
            self.through("e2e", subjects, ["--count", count, "--connections", 64])
            self.cost("e2e", "at full speed", True)
        # For information: at a low rate most of it is what Pulsar and PostgreSQL take when idle, the same for both.
        self.cost("cpu", f"at {rate} events/s", False)
        self.row(f"publish to delivery at {rate}/s, p50", "", self.middle("cpu/dealscale-servers", "delivery_p50_ms"), None, "{:.1f} ms",
                 f"the plan's design {self.middle('cpu/plan', 'delivery_p50_ms'):.1f} ms")

    def cost(self, mode: str, when: str, judged: bool) -> None:
        ours, plan = f"{mode}/dealscale-servers", f"{mode}/plan"
        value = self.ratio(ours, plan, "cpu_us_all")
        parts = lambda name: " + ".join(f"{self.middle(name, f'cpu_us_{p}'):,.0f}" for p in ("own", "postgres", "pulsar"))
        self.row(f"CPU of all processes per delivered event {when}, against the plan's design",
                 "≤ 0.3×" if judged else "", value, value <= 0.3 if judged else None, "{:.2f}×",
                 f"{parts(ours)} and {parts(plan)} µs: own + PostgreSQL + Pulsar")

    def through(self, mode: str, subjects: list, arguments: list) -> None:
        self.world.servers()
        host, port = self.world.receiver.split(":")
        for n in range(self.rounds):
            for subject in subjects:
                with subject.running() as processes:
                    # Caches, connections and the JVM's compiler: not what an event costs.
                    self.world.load("deliver", subject.url, "--receiver", self.world.receiver, "--count", 500, "--connections", 16)
                    time.sleep(1)
                    say(f"{mode}: {subject.name}, round {n + 1} of {self.rounds}")
                    before = self.cpu(processes)
                    result = self.world.load("deliver", subject.url, "--receiver", self.world.receiver, *arguments)
                    # Acknowledgements and confirmations behind the last delivery belong to it.
                    time.sleep(1)
                    after = self.cpu(processes)
                    for part in after:
                        result[f"cpu_us_{part}"] = (after[part] - before[part]) * 1e6 / max(result["delivered"], 1)
                    result["cpu_us_all"] = sum(result[f"cpu_us_{part}"] for part in after)
                    result["rss_mib"] = sum(p.memory() for p in processes)
                    self.keep(f"{mode}/{subject.name}", result)

    # Nothing behind the outbox may be felt in front of it.

    def mode_outage(self) -> None:
        rate, seconds, warmup = (500, 8, 2) if self.quick else (500, 40, 5)
        ours = Ours(self.world, "servers", "dealscale-outage")
        measure = lambda: self.world.load("publish", ours.url, "--rate", rate, "--seconds", seconds, "--warmup", warmup, "--connections", 64)
        self.world.servers()
        with self.receiver(), ours.running() as processes:
            # A fresh store and cold connections are in neither.
            total = self.world.load("publish", ours.url, "--rate", rate, "--seconds", 4, "--connections", 64)["accepted"]
            for n in range(self.rounds):
                say(f"outage: {rate}/s with Pulsar and PostgreSQL up, round {n + 1} of {self.rounds}")
                self.keep("outage/up", measure())
                say("outage: both killed")
                self.world.pulsar.process.kill()
                self.world.postgres.process.kill()
                self.keep("outage/down", measure())
                self.world.postgres.start()
                self.world.pulsar.start()
                say("outage: both are back, waiting until everything has arrived")
                total += sum(self.raw[f"outage/{phase}"][-1]["accepted"] for phase in ("up", "down"))
                self.arrived(total)
            self.raw["outage/receiver"] = [self.seen()]
        value = self.ratio("outage/down", "outage/up", "p99_ms")
        refused = sum(n for r in self.raw["outage/down"] for status, n in r["statuses"].items() if status != "202")
        self.row("p99 of accepts while Pulsar and PostgreSQL are down, against up", "≤ 1.2×", value, value <= 1.2 and refused == 0, "{:.2f}×",
                 f"{self.middle('outage/down', 'p99_ms'):.1f} and {self.middle('outage/up', 'p99_ms'):.1f} ms at {rate}/s; refused {refused}")

    # A large backlog.

    def mode_open(self) -> None:
        records = 100_000 if self.quick else 1_000_000
        warmup, seconds = (1, 4) if self.quick else (2, 10)
        full, empty = Ours(self.world, "down", "dealscale-full"), Ours(self.world, "down", "dealscale-empty")
        config = full.configure()
        self.world.fresh(full.name)
        say(f"open: filling an outbox with {records:,} records")
        # So large a backlog takes its time on a slow disk; it must not take forever.
        filled = subprocess.run(
            [self.world.bin / "bench-fill", "--config", config, "--state-dir", full.state, "--records", str(records)],
            stdout=subprocess.PIPE, text=True, timeout=1800, check=True,
        )
        self.keep("open/fill", json.loads(filled.stdout) | {"disk_mib": disk(full.state)})
        for n in range(self.rounds):
            for subject, keep in ((empty, False), (full, True)):
                drop_caches()
                with subject.running(keep) as processes:
                    result = {"open_seconds": subject.started, "rss_ready_mib": processes[0].memory()}
                    time.sleep(3)
                    result["rss_peak_mib"] = processes[0].memory("VmHWM")
                    say(f"open: {subject.name}, round {n + 1} of {self.rounds}")
                    self.keep(f"open/{subject.name}", result | self.world.load(
                        "publish", subject.url, "--connections", 64, "--warmup", warmup, "--seconds", seconds))
        name = f"open/{full.name}"
        seconds, peak = self.middle(name, "open_seconds"), self.middle(name, "rss_peak_mib")
        whole = None if self.quick else True
        self.row(f"start to ready with {records:,} records waiting", "≤ 3 s", seconds, whole and seconds <= 3, "{:.2f} s",
                 f"empty {self.middle(f'open/{empty.name}', 'open_seconds'):.2f} s; page cache {'dropped' if os.geteuid() == 0 else 'warm'}")
        self.row(f"RSS with {records:,} records waiting, highest of the first 3 s", "≤ 100 MiB", peak, whole and peak <= 100, "{:.0f} MiB",
                 f"at readiness {self.middle(name, 'rss_ready_mib'):.0f} MiB")
        value = self.ratio(f"open/{empty.name}", name, "per_second")
        self.row(f"cost of an append behind {records:,} records, against an empty outbox", "≤ 1.3×", value, whole and value <= 1.3, "{:.2f}×",
                 f"{self.middle(name, 'per_second'):,.0f} and {self.middle(f'open/{empty.name}', 'per_second'):,.0f}/s")

    def mode_idle(self) -> None:
        ours = Ours(self.world, "embedded", "dealscale-idle")
        for n in range(max(self.rounds, 5)):
            # The first start makes the stores, the others open them.
            with ours.running(keep=n > 0) as processes:
                time.sleep(3)
                before, begin = processes[0].cpu(), time.monotonic()
                time.sleep(3)
                self.keep("idle", {
                    "ready_seconds": ours.started, "rss_mib": processes[0].memory(), "rss_peak_mib": processes[0].memory("VmHWM"),
                    "cpu_percent": 100 * (processes[0].cpu() - before) / (time.monotonic() - begin),
                })
        seconds, rss = max(r["ready_seconds"] for r in self.raw["idle"]), max(r["rss_mib"] for r in self.raw["idle"])
        self.row("idle: RSS", "≤ 30 MiB", rss, rss <= 30, "{:.1f} MiB", f"CPU {self.middle('idle', 'cpu_percent'):.1f} %")
        self.row("start to ready", "≤ 0.3 s", seconds, seconds <= 0.3, "{:.3f} s",
                 f"the slowest; the first of a new state folder {self.raw['idle'][0]['ready_seconds']:.3f} s")

    # What several modes need.

    def cpu(self, processes: list[Process]) -> dict:
        """CPU seconds so far, of everything that is involved."""
        servers = {"postgres": self.world.postgres, "pulsar": self.world.pulsar}
        return {"own": sum(p.cpu() for p in processes)} | {name: s.process.cpu() for name, s in servers.items() if s}

    @contextlib.contextmanager
    def receiver(self):
        """A receiver for deliveries that are not measured."""
        command = [self.world.bin / "bench-load", "receive", "--listen", self.world.receiver]
        with Process("receiver", command, self.world.out / "receiver.log") as process:
            process.ready(f"http://{self.world.receiver}/count", 10)
            yield process

    def seen(self) -> dict:
        with urllib.request.urlopen(f"http://{self.world.receiver}/count", timeout=10) as response:
            return json.load(response)

    def arrived(self, at_least: int, seconds: float = 180) -> None:
        """Waits until so many deliveries with different ids have come."""
        deadline = time.monotonic() + seconds
        while (seen := self.seen())["distinct_webhook_ids"] < at_least:
            if time.monotonic() > deadline:
                raise Failed(f"only {seen} of {at_least} accepted events have arrived within {seconds} s")
            time.sleep(0.5)

    def total(self, name: str, field: str) -> int:
        return sum(r[field] for r in self.raw[name])

    def table(self) -> str:
        lines = ["| figure | at least | measured | |", "|---|---|---|---|"]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows])


# What is worth a line while the bench runs.
SHOWN = {
    "per_second", "p50_ms", "p99_ms", "accepted", "delivered", "delivered_per_second", "duplicates", "lost", "cpu_us_server", "cpu_us_all",
    "cpu_us_own", "cpu_us_postgres", "cpu_us_pulsar", "open_seconds", "rss_mib", "rss_peak_mib", "rss_ready_mib", "ready_seconds", "seconds",
    "records", "delivery_p50_ms", "delivery_p99_ms", "cpu_percent", "disk_mib",
}


def disk(dir: pathlib.Path) -> float:
    return sum(f.stat().st_blocks * 512 for f in dir.rglob("*") if f.is_file()) / 2**20


def drop_caches() -> None:
    """A start after a reboot reads from the disk. Only root may ask for it."""
    with contextlib.suppress(OSError):
        os.sync()
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("1")


def machine() -> str:
    model = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    memory = int(open("/proc/meminfo").readline().split()[1]) / 2**20
    return f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {platform.release()}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="benches/run.sh")
    parser.add_argument("mode", nargs="?", default="all", choices=[*MODES, "all"])
    parser.add_argument("--quick", action="store_true", help="shorter and smaller: to see that everything works, not to publish")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=pathlib.Path, help="raw results, logs and the table (default: target/bench/TIME)")
    parser.add_argument("--bin", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--venv", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = (arguments.out or pathlib.Path("target/bench") / time.strftime("%Y%m%d-%H%M%S")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    # PostgreSQL's own user has to reach its data, which below /root it cannot.
    state = pathlib.Path(os.environ.get("TMPDIR", "/var/tmp")) / f"dealscale-bench-{os.getpid()}"
    state.mkdir(mode=0o755)
    world = World(
        bin=arguments.bin.resolve(), venv=arguments.venv, cache=pathlib.Path(os.environ["DEALSCALE_CACHE"]), out=out, state=state,
        port=int(os.environ.get("DEALSCALE_BENCH_PORT", "21600")),
    )
    bench = Bench(world, arguments.quick, arguments.rounds or (1 if arguments.quick else 3))
    # So that `with` and `finally` stop what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = []
    try:
        for mode in MODES if arguments.mode == "all" else [arguments.mode]:
            begin = time.monotonic()
            try:
                getattr(bench, f"mode_{mode}")()
            except (Failed, subprocess.SubprocessError, OSError, ZeroDivisionError, statistics.StatisticsError) as error:
                failed.append(mode)
                say(f"{mode} FAILED: {error}")
            say(f"{mode}: {time.monotonic() - begin:.0f} s")
    finally:
        world.stop()
        shutil.rmtree(state, ignore_errors=True)
    head = f"{time.strftime('%Y-%m-%d %H:%M')}, {machine()}{', --quick' if arguments.quick else ''}, rounds {bench.rounds}"
    table = f"{head}\n\n{bench.table()}\n" + "".join(f"\nThe mode {mode} did not come to its end.\n" for mode in failed)
    (out / "table.md").write_text(table)
    print(table)
    say(f"raw results and logs: {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
