"""Child: a process that is built once, stays alive, and measures on command (benchmarks.engine_bench.child_loop)."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.engine_bench.child_loop import READY

STOP_TIMEOUT_S = 20.0
SHOWN_LOG_LINES = 15
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class ChildFailed(Exception):
    """The child's process ended; the message has the end of its log."""


class Child:
    """Started by the constructor, which raises ChildFailed where there is no such program; ready after `wait_ready`, gone
    after `close` or the end of its `with`."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by close()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                cwd=folder,
                env={**os.environ, **environment},
            )
        except OSError as error:
            self._log.close()
            raise ChildFailed(f"{name} cannot be started: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Raises ChildFailed where it could not be built. What imports printed before the loop began is passed over."""
        while self._read_line() != READY:
            pass

    def ask(self, do: str, **parameters: object) -> Any:
        """The operation's result. Raises ChildFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **parameters}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._receive()["result"]

    def cpu_s(self) -> float:
        """Processor time that it has used, all threads together."""
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        except FileNotFoundError:
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICKS_PER_S

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended before
            self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _receive(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._read_line())
        return answer

    def _read_line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return line.rstrip("\n")

    def _failure(self) -> ChildFailed:
        code = self._process.wait()
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-SHOWN_LOG_LINES:])
        return ChildFailed(f"{self.name} ended with status {code}:\n{tail}")
