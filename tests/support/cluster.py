"""A real cluster for tests: router and nodes as the processes that the command line starts, on loopback.

Every process is started and ended here, by pid. `Cluster` is a context manager; leaving it ends all of them and fails the
test if one had died on its own.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.support.signals import send_signal

START_TIMEOUT_S = 90
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Process:
    """One role's process. `log` is its stderr."""

    role: str
    name: str
    process: subprocess.Popen[str]
    log: Path
    listening: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return str(self.listening["url"])

    def wait_listening(self) -> None:
        """Read stdout up to the line that announces the addresses."""
        deadline = time.monotonic() + START_TIMEOUT_S
        assert self.process.stdout is not None
        while time.monotonic() < deadline:
            ready, _, _ = select.select([self.process.stdout], [], [], 0.5)
            if ready:
                line = self.process.stdout.readline()
                if line.startswith("{"):
                    self.listening = json.loads(line)
                    return
            if self.process.poll() is not None:
                break
        raise AssertionError(f"{self.name} did not start listening:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text().splitlines()[-lines:])

    def signal(self, number: int) -> None:
        send_signal(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.close()

    def close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()

    def metric(self, name: str, **labels: str) -> float:
        """The current value of one metric, summed over the series that carry `labels`."""
        total = 0.0
        for line in http_get(f"{self.url}/metrics").splitlines():
            match = re.match(rf"{name}(?:\{{(.*)\}})? (\S+)$", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total


class Cluster(AbstractContextManager["Cluster"]):
    """`settings` are dotted node settings, the same for all nodes (`{"model.dtype": "float32"}`). `module` is run in each
    process, with the command line's arguments."""

    def __init__(
        self,
        folder: Path,
        model: str,
        *,
        prefill: int = 1,
        decode: int = 1,
        transport: str = "nixl",
        settings: dict[str, object] | None = None,
        decode_settings: dict[str, object] | None = None,
        router_settings: dict[str, object] | None = None,
        environment: dict[str, str] | None = None,
        module: str = "headrace",
    ) -> None:
        self._folder = folder
        self._module = module
        self._model = model
        self._counts = {"prefill": prefill, "decode": decode}
        self._node_settings: dict[str, object] = {
            "model.model": model,
            "model.dtype": "float32",
            "model.threads": 1,
            "cache.memory": "256MiB",
            "transfer.transport": transport,
        } | (settings or {})
        self.role_settings: dict[str, dict[str, object]] = {"prefill": {}, "decode": decode_settings or {}, "store": {}}
        self._router_settings: dict[str, object] = {"model": model} | (router_settings or {})
        self._environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | (environment or {})
        self.expected_dead: set[str] = set()
        self.processes: dict[str, Process] = {}

    def __enter__(self) -> Self:
        try:
            self.start("router", "router", self._router_settings | {"port": 0, "control_port": 0})
            for role, count in self._counts.items():
                for index in range(count):
                    self.start_node(role, f"{role}-{index}")
            self.wait_ready()
        except BaseException:
            self._end_all()
            raise
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        died = [
            f"{p.name} died with {p.process.returncode}:\n{p.tail()}"
            for p in self.processes.values()
            if p.process.poll() is not None and p.name not in self.expected_dead
        ]
        self._end_all()
        if died and kind is None:
            raise AssertionError("\n".join(died))

    @property
    def router(self) -> Process:
        return self.processes["router"]

    @property
    def nodes(self) -> list[Process]:
        return [p for p in self.processes.values() if p.role != "router" and p.process.poll() is None]

    @property
    def url(self) -> str:
        return self.router.url

    def start_node(self, role: str, name: str) -> Process:
        control = self.router.listening["control_url"]
        process = self.start(
            role,
            name,
            self._node_settings
            | {"worker_id": name, "routers": json.dumps([control]), "port": 0}
            | self.role_settings[role],
        )
        self.expected_dead.discard(name)
        return process

    def start(self, role: str, name: str, settings: dict[str, object]) -> Process:
        log = self._folder / f"{name}-{len(self.processes)}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", self._module, "serve", role]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        with log.open("w") as stderr:
            popen = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=self._environment, cwd=self._folder
            )
        process = self.processes[name] = Process(role, name, popen, log)
        if role == "router":
            process.wait_listening()
        return process

    def kill(self, name: str) -> None:
        """kill -9. Leaving the cluster does not complain about this one."""
        self.expected_dead.add(name)
        self.processes[name].kill()

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until every living process answers /ready."""
        deadline = time.monotonic() + timeout_s
        for process in self.nodes:
            if not process.listening:
                process.wait_listening()
        for process in [*self.nodes, self.router]:
            while not _answers(f"{process.url}/ready"):
                if process.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"{process.name} is not ready:\n{process.tail()}")
                time.sleep(0.05)
        while len(self.workers()) < len(self.nodes):
            assert time.monotonic() < deadline, f"workers missing: {self.workers()}"
            time.sleep(0.05)

    def workers(self) -> list[dict[str, Any]]:
        """What the router knows of its nodes."""
        answer: list[dict[str, Any]] = json.loads(
            http_get(f"{self.router.listening['control_url']}/internal/v1/workers")
        )["workers"]
        return answer

    def wait_idle(self, timeout_s: float = 15) -> None:
        """Until every block, lease and request is back. Fails with what is still held."""
        deadline = time.monotonic() + timeout_s
        while True:
            held = {node.name: {name: value for name, value in _held(node).items() if value} for node in self.nodes}
            held = {name: values for name, values in held.items() if values}
            if not held:
                return
            assert time.monotonic() < deadline, f"not back at the baseline: {held}"
            time.sleep(0.05)

    def _end_all(self) -> None:
        living = [p for p in self.processes.values() if p.process.poll() is None]
        for process in living:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGTERM)
        for process in living:
            try:
                process.process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        for process in self.processes.values():
            process.close()


def _held(node: Process) -> dict[str, float]:
    return {
        "blocks": node.metric("headrace_kv_blocks_total") - node.metric("headrace_kv_blocks_free"),
        "running": node.metric("headrace_requests_running"),
        "waiting": node.metric("headrace_requests_waiting"),
        "leases": node.metric("headrace_leases_open"),
    }


def http_get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310  # loopback, our own processes
        return str(response.read().decode())


def _answers(url: str) -> bool:
    try:
        http_get(url)
    except (urllib.error.URLError, OSError):
        return False
    return True
