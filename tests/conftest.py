"""For all tests: one compute thread, and a guard that fails a test which leaves something behind.

The guard counts before and after each test: processes, threads and open files of this process, and shared memory with our
name. Fixtures of a wider scope that are already there are part of the count before; one process or thread that replaces
another (a restarted node) does not change it. What takes a moment to go away is given that moment. A test that must leave
files open says why: `@pytest.mark.keeps_files("reason")`.
"""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; child processes inherit it
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its kernels then run on CPU tensors

GRACE_S = 3.0
MAX_NEW_FILES = 4
"""A library that a test is the first to use may keep a file or two open for good."""

LASTING_THREADS = ("tqdm", "pytest_timeout", "asyncio_")
"""Threads of libraries that live as long as the process, or as the event loop of a wider scope."""

LASTING_PROCESSES = ("resource_tracker", "forkserver")
"""Started once by multiprocessing, for the life of the process."""


@dataclass(frozen=True)
class Held:
    processes: int
    threads: int
    files: int
    shared_memory: frozenset[str]

    def excess(self, before: "Held", keeps_files: bool) -> list[str]:
        """What there is more of than before."""
        found = []
        if self.processes > before.processes:
            found.append(f"{self.processes - before.processes} child processes: {_children()}")
        if self.threads > before.threads:
            found.append(f"{self.threads - before.threads} threads: {[thread.name for thread in _threads()]}")
        if self.files > before.files + MAX_NEW_FILES and not keeps_files:
            found.append(f"{self.files - before.files} open files: {_open_files()}")
        if self.shared_memory - before.shared_memory:
            found.append(f"shared memory: {sorted(self.shared_memory - before.shared_memory)}")
        return found


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    keeps_files = request.node.get_closest_marker("keeps_files") is not None
    before = _held()
    yield
    deadline = time.monotonic() + GRACE_S
    while (excess := _held().excess(before, keeps_files)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if excess:
        pytest.fail("the test has left behind " + "; ".join(excess), pytrace=False)


def _held() -> Held:
    return Held(
        processes=len(_children()),
        threads=len(_threads()),
        files=len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - Path.iterdir opens one more, at some other moment
        shared_memory=frozenset(entry.name for entry in Path("/dev/shm").iterdir() if "headrace" in entry.name),  # noqa: S108
    )


def _children() -> list[str]:
    found = []
    for child in psutil.Process().children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(child.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return [command for command in found if not any(name in command for name in LASTING_PROCESSES)]


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if not thread.name.startswith(LASTING_THREADS)]


def _open_files() -> list[str]:
    targets = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(entry.readlink()))
        except OSError:
            continue
    return sorted(targets)
