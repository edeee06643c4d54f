"""Sending a signal and knowing that it has been obeyed."""

import os
import signal
import time
from pathlib import Path

STOP_TIMEOUT_S = 10.0
STILL = ("T", "Z", "X")
"""Of the states in /proc/<pid>/stat: stopped, or dead."""


def send_signal(pid: int, number: int) -> None:
    """After SIGSTOP, returns when every thread of the process stands still: one that has not been told yet goes on for as long
    as others keep the cores busy."""
    os.kill(pid, number)
    if number != signal.SIGSTOP:
        return
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not _all_stopped(pid):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


def _all_stopped(pid: int) -> bool:
    try:
        return all(_state(task) in STILL for task in Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError:
        return True


def _state(task: Path) -> str:
    """The letter behind the command's name, which may hold anything, brackets included."""
    try:
        return (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
