"""A running `headrace up`, as a user starts it; whoever made it ends it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from cluster import REPOSITORY

START_TIMEOUT_S = 120


class Up:
    """A running `headrace up`, with the defaults that a new user gets."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = folder / "up.log"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "headrace", "up", "--port", str(self.port)),
                    *("--log-dir", str(folder / "logs"), *arguments),
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                cwd=folder,
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "curl" not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def role(self, name: str) -> psutil.Process:
        return next(child for child in self.children() if name in child.cmdline())

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)
