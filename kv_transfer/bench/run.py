"""run: the benchmark. Everybody has a turn in every round, so that what else the machine does hits all alike."""

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from kv_transfer.bench.options import BenchOptions
from kv_transfer.bench.pair import Pair
from kv_transfer.bench.report import Idle, Machine, Report, Result, compare, format_idle, format_shape, summarize
from kv_transfer.bench.shapes import Shape, make_shapes
from protocol.errors import HeadraceError
from protocol.transfer import Direction, TransportKind

OVER_UCX: tuple[TransportKind, ...] = ("nixl", "ucx")
MIN_TRANSFERS = 2
"""A turn, however short."""

_PACKAGES = ("headrace", "nixl-cu12", "ucxx-cu12", "torch", "xxhash")

Say = Callable[[str], None]


@dataclass
class _Entry:
    """One contestant's measurements of one shape."""

    pair: Pair
    name: str
    direction: Direction
    verified: bool
    turns: list[tuple[float, ...]] = field(default_factory=list)
    checked_turns: list[tuple[float, ...]] = field(default_factory=list)
    cpu_s: float = 0.0


def run(options: BenchOptions, say: Say) -> Report:
    """`say` gets lines as they are known. Raises HeadraceError where nothing can be measured. Whatever ends this, a
    KeyboardInterrupt included, its processes end first."""
    machine = describe_machine()
    say(f"{machine.processor}, {machine.num_cores} cores, {machine.platform}")
    results: list[Result] = []
    idle: list[Idle] = []
    missing: dict[str, str] = {}
    for block_bytes in options.block_bytes:
        with ExitStack() as stack:
            pairs = [stack.enter_context(Pair(None))]
            slow_kinds = [kind for kind in OVER_UCX if kind in options.transports]
            if options.ucx_tcp and slow_kinds:
                pairs.append(stack.enter_context(Pair("tcp")))
            if not idle:
                idle = _measure_idle(pairs[0], options)
                say(format_idle(idle))
            pairs[0].open(options.transports, block_bytes, max(options.num_blocks), baselines=True)
            for pair in pairs[1:]:
                pair.open(slow_kinds, block_bytes, max(options.num_blocks), baselines=False)
            for name, reason in pairs[0].missing.items():
                if name not in missing:
                    say(f"{name} is not measured: {reason}")
                    missing[name] = reason
            for shape in make_shapes(options.num_blocks):
                measured = compare(_measure(pairs, block_bytes, shape, options, say, missing))
                results += measured
                say("\n" + format_shape(measured))
    return Report(machine=machine, results=tuple(results), idle=tuple(idle), missing=missing)


def _measure_idle(pair: Pair, options: BenchOptions) -> list[Idle]:
    shares = [(kind, pair.idle(kind, options.idle_s)) for kind in options.transports]
    return [Idle(kind, share) for kind, share in shares if share is not None]


def _measure(
    pairs: Sequence[Pair], block_bytes: int, shape: Shape, options: BenchOptions, say: Say, missing: dict[str, str]
) -> list[Result]:
    """One shape: prove that everybody moves the right bytes, then rounds in which each has its turn."""
    entries: list[_Entry] = []
    for pair in pairs:
        for name, directions in pair.directions.items():
            for direction in directions:
                try:
                    verified = pair.prove(name, direction, _as_moved(name, shape))
                except HeadraceError as error:
                    key = f"{name} {direction} {pair.setting}".rstrip()
                    missing[key] = error.message
                    say(f"{key} has failed: {error.message}")
                else:
                    entries.append(_Entry(pair, name, direction, verified))
    for _ in range(options.rounds):
        for entry in entries:
            _take_turn(entry, shape, options)
    return [
        summarize(
            contestant=entry.name,
            setting=entry.pair.setting,
            block_bytes=block_bytes,
            num_blocks=shape.num_blocks,
            placement=shape.placement,
            direction=entry.direction,
            verified=entry.verified,
            turns=entry.turns,
            checked_turns=entry.checked_turns,
            cpu_s=entry.cpu_s,
        )
        for entry in entries
    ]


def _take_turn(entry: _Entry, shape: Shape, options: BenchOptions) -> None:
    moved = _as_moved(entry.name, shape)
    seconds, cpu_s = entry.pair.move(
        entry.name, entry.direction, moved, checksums=False, seconds=options.slice_s, at_least=MIN_TRANSFERS
    )
    entry.turns.append(seconds)
    entry.cpu_s += cpu_s
    if entry.direction == "pull" and not _is_baseline(entry.name):
        checked, _ = entry.pair.move(
            entry.name, entry.direction, moved, checksums=True, seconds=options.slice_s, at_least=MIN_TRANSFERS
        )
        entry.checked_turns.append(checked)


def _is_baseline(name: str) -> bool:
    return name.startswith(("raw", "memcpy"))


def _as_moved(name: str, shape: Shape) -> Shape:
    """A raw socket moves as many bytes in one piece."""
    if name != "raw socket":
        return shape
    ids = tuple(range(shape.num_blocks))
    return Shape(shape.num_blocks, "contiguous", ids, ids)


def describe_machine() -> Machine:
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        platform=f"Linux {platform.release()}",
        processor=_processor(),
        num_cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        packages=versions,
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
