"""Child: one process of the cluster, from its start to its end.

Used as `async with Child(...) as child:`; leaving the context kills whatever is left of it, with everything that it started.
It runs in a session of its own, so that Ctrl-C reaches only the supervisor, and ends itself when the supervisor dies.
"""

import asyncio
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

from runtime.life import SUPERVISOR_PID_VARIABLE

MAX_TAIL_LINES = 200
MAX_LINE_BYTES = 1 << 20


class Child:
    """`on_line` gets each line of the child's log. With `log_path`, it is also written there, after what is there."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log_path: Path | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self._arguments = arguments
        self._environment = environment
        self._log_path = log_path
        self._on_line = on_line
        self._tail: deque[str] = deque(maxlen=MAX_TAIL_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._log: BinaryIO | None = None
        self._announced = asyncio.Event()
        self.announcement: Mapping[str, str] = {}

    async def __aenter__(self) -> Self:
        self._log = self._log_path.open("ab") if self._log_path is not None else None
        process = self._process = await asyncio.create_subprocess_exec(
            *headrace_command(),
            *self._arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment, SUPERVISOR_PID_VARIABLE: str(os.getpid())},
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read_stdout(process.stdout), name=f"stdout:{self.name}"),
            asyncio.create_task(self._read_stderr(process.stderr), name=f"stderr:{self.name}"),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
            await asyncio.gather(*self._readers)
        if self._log is not None:
            self._log.close()

    @property
    def returncode(self) -> int | None:
        """None while it lives; negative: the signal that ended it."""
        return None if self._process is None else self._process.returncode

    @property
    def last_line(self) -> str:
        return self._tail[-1] if self._tail else ""

    def tail(self, num_lines: int) -> list[str]:
        return list(self._tail)[-num_lines:]

    def signal(self, number: signal.Signals) -> None:
        """Send it to the process; SIGKILL also to everything that the process has started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            if number is signal.SIGKILL:
                os.killpg(self._process.pid, number)
            elif self._process.returncode is None:
                self._process.send_signal(number)

    async def wait_announced(self) -> bool:
        """Until it says where it listens. False if it ends before."""
        announced = asyncio.ensure_future(self._announced.wait())
        ended = asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait((announced, ended), return_when=asyncio.FIRST_COMPLETED)
        finally:
            announced.cancel()
            ended.cancel()
        return self._announced.is_set()

    async def wait(self) -> int:
        """Until it has ended and its log is read to the end. Returns the exit code."""
        assert self._process is not None
        code = await self._process.wait()
        await asyncio.wait(self._readers, timeout=1.0)  # a process that it left behind may hold the pipe open
        return code

    async def _read_stdout(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            announcement = _announcement(line)
            if announcement is None:
                self._keep(line)
            else:
                self.announcement = announcement
                self._announced.set()

    async def _read_stderr(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            self._keep(line)

    def _keep(self, line: str) -> None:
        self._tail.append(line)
        if self._log is not None:
            self._log.write(line.encode() + b"\n")
            self._log.flush()
        if self._on_line is not None:
            self._on_line(line)


def headrace_command() -> list[str]:
    """How to start another `headrace`: as this one was. `python -m` puts the current folder on the import path; where
    we were not started that way, a folder named `engine` there must not take the place of ours."""
    by_module = Path(sys.path[0] or ".").resolve() == Path.cwd()
    return [sys.executable, *([] if by_module else ["-P"]), "-m", "headrace"]


def describe_end(returncode: int) -> str:
    if returncode < 0:
        return f"killed by {signal.Signals(-returncode).name}"
    return f"exit status {returncode}"


def _announcement(line: str) -> Mapping[str, str] | None:
    if not line.startswith("{"):
        return None
    try:
        message = json.loads(line)
    except json.JSONDecodeError:
        return None
    return message if isinstance(message, dict) and message.get("event") == "listening" else None


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length; over-long ones in pieces."""
    rest = b""
    while chunk := await stream.read(65536):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip()
        if len(rest) > MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
