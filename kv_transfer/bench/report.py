"""Report: what was measured, as structs for programs and as a table for people. Pure."""

from collections.abc import Sequence

import msgspec

from kv_transfer.bench.shapes import Placement
from protocol.transfer import Direction

REFERENCES = {"nixl": "raw nixl", "ucx": "raw nixl", "tcp": "raw socket", "shm": "memcpy"}
"""What a transport would be at best: the same means without our layer."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One contestant moving one shape. Rates are in bytes a second: of the median transfer, of the fastest, and of the
    median of each turn; `checked` ones include the reader's checksums of all blocks.

    A ratio is the median of those between turns of the same round, which noise that lasts for seconds leaves alone. The
    `reference` ran under the same setting of UCX. `verified`: the blocks that arrived have the owner's checksums.
    """

    contestant: str
    setting: str
    block_bytes: int
    num_blocks: int
    placement: Placement
    direction: Direction
    num_transfers: int
    verified: bool
    rate: float
    best_rate: float
    checked_rate: float | None
    latency_median_s: float
    latency_p99_s: float
    cpu_s_per_gb: float
    turn_rates: tuple[float, ...]
    checked_turn_rates: tuple[float, ...]
    memcpy_ratio: float | None = None
    reference: str | None = None
    reference_ratio: float | None = None
    checked_reference_ratio: float | None = None


class Idle(msgspec.Struct, frozen=True):
    """CPU of a process that keeps this transport and does nothing, as a share of one core."""

    transport: str
    cpu_share: float


class Machine(msgspec.Struct, frozen=True):
    platform: str
    processor: str
    num_cores: int
    python: str
    packages: dict[str, str]


class Report(msgspec.Struct, frozen=True):
    """`missing`: what could not be measured, and why."""

    machine: Machine
    results: tuple[Result, ...]
    idle: tuple[Idle, ...]
    missing: dict[str, str]


def summarize(
    *,
    contestant: str,
    setting: str,
    block_bytes: int,
    num_blocks: int,
    placement: Placement,
    direction: Direction,
    verified: bool,
    turns: Sequence[Sequence[float]],
    checked_turns: Sequence[Sequence[float]],
    cpu_s: float,
) -> Result:
    """`turns` are seconds of transfers alone, which took `cpu_s` together; `checked_turns` of transfers with checksums."""
    num_bytes = block_bytes * num_blocks
    seconds = [duration for turn in turns for duration in turn]
    checked_seconds = [duration for turn in checked_turns for duration in turn]
    return Result(
        contestant=contestant,
        setting=setting,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        placement=placement,
        direction=direction,
        num_transfers=len(seconds),
        verified=verified,
        rate=num_bytes / quantile(seconds, 0.5),
        best_rate=num_bytes / min(seconds),
        checked_rate=num_bytes / quantile(checked_seconds, 0.5) if checked_seconds else None,
        latency_median_s=quantile(seconds, 0.5),
        latency_p99_s=quantile(seconds, 0.99),
        cpu_s_per_gb=cpu_s / (num_bytes * len(seconds) / 1e9),
        turn_rates=tuple(num_bytes / quantile(turn, 0.5) for turn in turns),
        checked_turn_rates=tuple(num_bytes / quantile(turn, 0.5) for turn in checked_turns),
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000 * len(ordered)) // 1000) - 1))]


def compare(results: Sequence[Result]) -> list[Result]:
    """The results of one shape with their ratios. What a setting of UCX does not touch was measured without one."""

    def find(contestant: str | None, *places: tuple[str, Direction]) -> Result | None:
        for place in places:
            for result in results:
                if (result.contestant, result.setting, result.direction) == (contestant, *place):
                    return result
        return None

    memcpy = find("memcpy", ("", "pull"))
    compared = []
    for result in results:
        places: list[tuple[str, Direction]]
        places = [(result.setting, result.direction), ("", result.direction), ("", "pull")]
        reference = find(REFERENCES.get(result.contestant), *places)
        compared.append(
            msgspec.structs.replace(
                result,
                memcpy_ratio=_ratio(result.turn_rates, memcpy),
                reference=reference.contestant if reference is not None else None,
                reference_ratio=_ratio(result.turn_rates, reference),
                checked_reference_ratio=_ratio(result.checked_turn_rates, reference),
            )
        )
    return compared


def _ratio(rates: Sequence[float], reference: Result | None) -> float | None:
    if reference is None or not rates:
        return None
    return quantile([rate / other for rate, other in zip(rates, reference.turn_rates, strict=True)], 0.5)


def format_shape(results: Sequence[Result]) -> str:
    """The results of one shape as lines, under a heading."""
    first = results[0]
    size = format_bytes(first.block_bytes)
    total = format_bytes(first.block_bytes * first.num_blocks)
    lines = [f"{first.num_blocks} x {size}, {first.placement} ({total})"]
    lines.append(
        f"  {'':<24}{'':<6}{'GB/s':>7}{'best':>7}{'+sums':>7}{'median':>10}{'p99':>10}{'CPU s/GB':>10}{'memcpy':>8}  reference"
    )
    for result in results:
        name = result.contestant + (f", {result.setting}" if result.setting else "")
        checked = f"{result.checked_rate / 1e9:.2f}" if result.checked_rate is not None else "-"
        lines.append(
            f"  {name:<24}{result.direction:<6}{result.rate / 1e9:>7.2f}{result.best_rate / 1e9:>7.2f}{checked:>7}"
            f"{_duration(result.latency_median_s):>10}{_duration(result.latency_p99_s):>10}{result.cpu_s_per_gb:>10.3f}"
            f"{_number(result.memcpy_ratio):>8}  {_reference(result)}".rstrip()
            + ("" if result.verified else "  WRONG BYTES")
        )
    return "\n".join(lines)


def format_idle(idle: Sequence[Idle]) -> str:
    shares = ", ".join(f"{entry.transport} {100 * entry.cpu_share:.2f} %" for entry in idle)
    return f"idle, of one core: {shares}" if shares else ""


def format_bytes(size: int) -> str:
    """In the largest binary unit that gives a short number."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size} B"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _number(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _reference(result: Result) -> str:
    if result.reference_ratio is None:
        return ""
    checked = f", {result.checked_reference_ratio:.2f} with sums" if result.checked_reference_ratio is not None else ""
    return f"{result.reference_ratio:.2f} of {result.reference}{checked}"
