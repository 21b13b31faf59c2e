"""Processes that the bench starts: each is waited for until it is ready, measured through /proc and stopped by its id."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

TICK = os.sysconf("SC_CLK_TCK")


def say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


class Failed(Exception):
    """A part of the bench did not do what it is there for."""


class Process:
    """A started program with its log. Use as a context manager: it is stopped at the end, whatever happened."""

    def __init__(self, name: str, command: list, log: pathlib.Path, env: dict | None = None, cwd=None, user: str | None = None):
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        if user and os.geteuid() == 0:
            command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
        self.started = time.monotonic()
        with open(log, "ab") as out:
            self.popen = subprocess.Popen(
                [str(c) for c in command], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {})}, cwd=cwd, start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def ready(self, url: str, seconds: float, pause: float = 0.05) -> float:
        """Waits until `url` answers 200; returns the seconds since the start."""
        while True:
            if self.popen.poll() is not None:
                raise Failed(f"{self.name} ended with {self.popen.returncode} while starting:\n{self.tail()}")
            if answers(url):
                return time.monotonic() - self.started
            if time.monotonic() - self.started > seconds:
                raise Failed(f"{self.name} is not ready after {seconds} s ({url}):\n{self.tail()}")
            time.sleep(pause)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def stop(self, sig: int = signal.SIGTERM, patience: float = 30) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(sig)
            try:
                self.popen.wait(patience)
            except subprocess.TimeoutExpired:
                say(f"{self.name} did not end within {patience} s: killed")
                self.kill()

    def kill(self) -> None:
        """SIGKILL for the process and its children, as a power cut would."""
        for pid in [*reversed(tree(self.pid))]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.popen.wait()

    def cpu(self) -> float:
        """CPU seconds of the process, its children and those of its children that have ended."""
        return sum(cpu_of(pid) for pid in tree(self.pid))

    def memory(self, field: str = "VmRSS") -> float:
        """MiB of the process and its children."""
        return sum(memory_of(pid, field) for pid in tree(self.pid))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, []))
    return found


def stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on (the name before it may hold anything)."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def cpu_of(pid: int) -> float:
    # utime, stime, and cutime, cstime: children that were waited for
    fields = stat(pid)
    return sum(int(f) for f in fields[11:15]) / TICK if fields else 0.0


def memory_of(pid: int, field: str) -> float:
    try:
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0
