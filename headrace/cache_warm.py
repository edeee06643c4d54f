"""`headrace cache warm FILE`: prompts of a file, sent through the public API for one token each, so that their KV is there.

Nothing but the cluster remembers what is done: prompts that are there already cost next to nothing, so an interrupted run is
taken up at the first line that had not been answered.
"""

import argparse
import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from protocol.errors import ConfigError, NodeLost, RequestError, UnavailableError

API_URL = "http://127.0.0.1:8000"
ATTEMPTS = 6
REQUEST_TIMEOUT_S = 900.0
FIRST_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
MAX_SHOWN_FAILURES = 10

EPILOG = """\
FILE has one JSON object a line, the body of a request; whatever it says about the answer, one token is asked for:
  {"prompt": "Once upon a time"}
  {"messages": [{"role": "system", "content": "You are ..."}], "cache_salt": "team-a"}

examples:
  headrace cache warm prompts.jsonl
  headrace cache warm prompts.jsonl --concurrency 16 --api http://10.0.0.1:8000
  headrace cache warm prompts.jsonl --start 1203     take an interrupted run up again

HEADRACE_API_KEY, if set, is shown to the API.
exit code: 0 all prompts are computed, 1 some are not
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Line `number` of the file (from 1), as the request that it becomes."""

    number: int
    path: str
    body: bytes


@dataclass
class Outcome:
    """What a run came to. `failed`: lines that were refused, and why; `stopped_at`: the first line that was not answered
    because the cluster could not, and why."""

    num_warmed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    failed: dict[int, str] = field(default_factory=dict)
    stopped_at: int | None = None
    problem: str = ""


class _Usage(msgspec.Struct, frozen=True):
    class Details(msgspec.Struct, frozen=True):
        cached_tokens: int = 0

    prompt_tokens: int
    prompt_tokens_details: Details = Details()


class _Answer(msgspec.Struct, frozen=True):
    usage: _Usage


class _Refusal(msgspec.Struct, frozen=True):
    class Error(msgspec.Struct, frozen=True):
        message: str = ""

    error: Error = Error()


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a file of prompts, one JSON object a line")
    parser.add_argument("--api", default=API_URL, metavar="URL", help=f"the public API; default: {API_URL}")
    parser.add_argument("--concurrency", type=int, default=4, metavar="N", help="prompts at a time; default: 4")
    parser.add_argument("--start", type=int, default=1, metavar="LINE", help="begin at this line; default: 1")


def run(options: argparse.Namespace) -> int:
    if options.concurrency < 1:
        raise ConfigError(f"--concurrency {options.concurrency}: at least 1", param="--concurrency")
    lines = read_lines(options.file, options.start)
    if not lines:
        raise ConfigError(f"{options.file} has no prompts from line {options.start} on", param="FILE")
    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        outcome = asyncio.run(_Warming(options, lines, progress).run())
    if options.json:
        print(msgspec.json.encode(outcome).decode())
    else:
        for text in describe(outcome, options.file):
            print(text)
    return 1 if outcome.failed or outcome.stopped_at is not None else 0


def read_lines(path: Path, start: int) -> list[Line]:
    """Every prompt from line `start` on. Raises ConfigError that names the line of what is none: nothing is sent before the
    whole file is known to make sense."""
    try:
        rows = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", param="FILE") from error
    return [_line(path, number, row) for number, row in enumerate(rows, 1) if number >= start and row.strip()]


def describe(outcome: Outcome, path: Path) -> Iterator[str]:
    computed = outcome.prompt_tokens - outcome.cached_tokens
    rate = f", {computed / outcome.seconds:.0f} tokens/s" if outcome.seconds > 0 and computed else ""
    yield (
        f"{outcome.num_warmed} prompts warm in {outcome.seconds:.1f} s: {computed} tokens computed, "
        f"{outcome.cached_tokens} were there already{rate}"
    )
    for number, reason in list(outcome.failed.items())[:MAX_SHOWN_FAILURES]:
        yield f"line {number} was refused: {reason}"
    if len(outcome.failed) > MAX_SHOWN_FAILURES:
        yield f"... and {len(outcome.failed) - MAX_SHOWN_FAILURES} more"
    if outcome.stopped_at is not None:
        yield f"stopped: {outcome.problem}"
        yield f"take it up again with: headrace cache warm {path} --start {outcome.stopped_at}"


def _line(path: Path, number: int, row: bytes) -> Line:
    try:
        body = msgspec.json.decode(row, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} line {number} is no JSON object: {error}", param="FILE") from error
    if ("prompt" in body) == ("messages" in body):
        raise ConfigError(f'{path} line {number}: either "prompt" or "messages" must be there', param="FILE")
    for field_of_length in ("max_completion_tokens", "min_tokens", "n"):
        body.pop(field_of_length, None)
    body |= {"max_tokens": 1, "stream": False, "stream_options": None}
    endpoint = "completions" if "prompt" in body else "chat/completions"
    return Line(number, f"/v1/{endpoint}", msgspec.json.encode(body))


class _Warming:
    """Workers that take the lines in order. The first that finds the cluster unable to go on stops them all."""

    def __init__(self, options: argparse.Namespace, lines: list[Line], progress: Progress) -> None:
        self._url = options.api.rstrip("/")
        self._num_workers = min(options.concurrency, len(lines))
        self._to_do = iter(lines)
        self._open: set[int] = set()
        self._progress = progress
        self._task: TaskID = progress.add_task("", total=len(lines), rate="")
        self._outcome = Outcome()
        self._began_at = time.monotonic()

    async def run(self) -> Outcome:
        key = os.environ.get("HEADRACE_API_KEY")
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        try:
            async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session, asyncio.TaskGroup() as tasks:
                for _ in range(self._num_workers):
                    tasks.create_task(self._work(session))
        except* UnavailableError as group:
            self._stop(str(group.exceptions[0]))
        except* asyncio.CancelledError:
            self._stop("interrupted")
        self._outcome.seconds = time.monotonic() - self._began_at
        return self._outcome

    def _stop(self, problem: str) -> None:
        after = next(self._to_do, None)
        left = [*self._open, *([] if after is None else [after.number])]
        self._outcome.stopped_at, self._outcome.problem = min(left, default=None), problem

    async def _work(self, session: aiohttp.ClientSession) -> None:
        for line in self._to_do:
            self._open.add(line.number)
            try:
                usage = await self._send(session, line)
            except RequestError as error:
                self._outcome.failed[line.number] = error.message
            else:
                self._outcome.num_warmed += 1
                self._outcome.prompt_tokens += usage.prompt_tokens
                self._outcome.cached_tokens += usage.prompt_tokens_details.cached_tokens
            self._open.discard(line.number)
            seconds = max(1e-3, time.monotonic() - self._began_at)
            self._progress.update(self._task, advance=1, rate=f"{self._outcome.prompt_tokens / seconds:.0f} tokens/s")

    async def _send(self, session: aiohttp.ClientSession, line: Line) -> _Usage:
        """Raises RequestError for a prompt that is refused, UnavailableError for a cluster that does not take any."""
        for attempt in range(ATTEMPTS):
            pause_s = min(MAX_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
            try:
                async with session.post(f"{self._url}{line.path}", data=line.body, allow_redirects=False) as response:
                    content = await response.read()
                    if response.ok:
                        return msgspec.json.decode(content, type=_Answer).usage
                    problem = f"HTTP {response.status}: {_reason(content)}"
                    if response.status not in (429, 500, 502, 503, 504):
                        raise RequestError(problem)
                    pause_s = _retry_after_s(response) or pause_s
            except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
                problem = f"no answer from {self._url}: {error or type(error).__name__}"
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(pause_s)
        raise NodeLost(problem)


def _reason(content: bytes) -> str:
    try:
        return msgspec.json.decode(content, type=_Refusal).error.message or "no reason given"
    except (msgspec.DecodeError, UnicodeDecodeError):
        return content[:200].decode(errors="replace")


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("retry-after", "")
    return min(MAX_PAUSE_S, float(text)) if text.isdigit() else None
