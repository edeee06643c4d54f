"""A trace: who wanted which blocks when. JSON lines, in the format in which Mooncake's traces are published.

One object a line: `timestamp` in milliseconds, `hash_ids` a list of numbers, one for each block of the prompt; equal numbers
are equal blocks with equal blocks before them. `input_length` and `output_length` in tokens may be there; other fields
are ignored.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from protocol.errors import ConfigError
from protocol.kv_blocks import CachedBlock

_ROOT = bytes(16)
MAX_HASH_ID = (1 << 63) - 1


class TraceError(ConfigError):
    """A trace that cannot be read; says which line, and why."""


class _Line(msgspec.Struct, frozen=True):
    timestamp: float
    hash_ids: tuple[int, ...]
    input_length: int = 0
    output_length: int = 0


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`time_s` since the first request."""

    time_s: float
    blocks: tuple[CachedBlock, ...]


def read_trace(path: Path, max_requests: int | None = None) -> list[TraceRequest]:
    """Raises TraceError: no such file, a line that is not of the format, time that runs backwards, no request at all."""
    try:
        with path.open("rb") as lines:
            return parse_trace(lines, str(path), max_requests)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}", param="--trace") from None


def parse_trace(lines: Iterable[bytes], name: str, max_requests: int | None = None) -> list[TraceRequest]:
    decode = msgspec.json.Decoder(_Line).decode
    known: dict[int, CachedBlock] = {}
    requests: list[TraceRequest] = []
    first_ms = last_ms = 0.0
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        if max_requests is not None and len(requests) >= max_requests:
            break
        try:
            line = decode(text)
            blocks = tuple(_chain(line.hash_ids, known))
        except (msgspec.MsgspecError, ValueError) as error:
            raise TraceError(f"{name}, line {number}: {error}", param="--trace") from None
        if not requests:
            first_ms = last_ms = line.timestamp
        if line.timestamp < last_ms:
            raise TraceError(f"{name}, line {number}: timestamp {line.timestamp:g} is before the last", param="--trace")
        last_ms = line.timestamp
        requests.append(TraceRequest((line.timestamp - first_ms) / 1000, blocks))
    if not requests:
        raise TraceError(f"{name}: no request in it", param="--trace")
    return requests


def _chain(hash_ids: Iterable[int], known: dict[int, CachedBlock]) -> Iterable[CachedBlock]:
    """Raises ValueError if a number stands for two different blocks, or for none."""
    parent = _ROOT
    for position, hash_id in enumerate(hash_ids):
        block = known.get(hash_id)
        if block is None:
            if not 0 <= hash_id <= MAX_HASH_ID:
                raise ValueError(f"hash id {hash_id} is not a number from 0 to 2^63 - 1")
            block = known[hash_id] = CachedBlock((hash_id + 1).to_bytes(16, "big"), parent, position)
        elif block.parent != parent:
            raise ValueError(f"hash id {hash_id} follows another block than before")
        parent = block.block_hash
        yield block
