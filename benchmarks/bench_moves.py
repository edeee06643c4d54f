"""How fast KV blocks move between the places that keep them, beside a plain memcpy of the same bytes in the same run.

    python -m benchmarks.bench_moves                       360 blocks of the built-in model (a prompt of 5,760 tokens)
    python -m benchmarks.bench_moves --quick --disk DIR    few blocks, a few rounds
    python -m benchmarks.bench_moves --output FILE         also writes the report as Markdown

Device and host slots: a copier as nodes use it, blocks in no order, both in host memory (a CPU's cache). Host slots and disk: the disk
tier as it is, its page cache emptied before reads, beside one plain file. Peers: two processes, the transports of nodes,
with the checksums that a reader computes. In each table all take turns, round after round, so that noise hits all alike.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cluster_load import machine, progress
from engine.build import plan_engine
from kv_store.bench.contest import MEMCPY, table
from kv_store.bench.moves import measure_disk, measure_host_copy
from kv_store.host_copier import HostCopier
from kv_transfer.bench.pair import Pair
from kv_transfer.bench.shapes import make_shapes
from protocol.transfer import TransportKind
from runtime.node_config import NodeConfig

TRANSPORTS: tuple[TransportKind, ...] = ("shm", "nixl")
SECONDS_A_TURN = 0.05


@dataclass(frozen=True, slots=True)
class PeerMove:
    """Bytes a second of one way from a peer's memory to ours, best and median; `verified`: the bytes were the peer's."""

    name: str
    best_rate: float
    median_rate: float
    verified: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few blocks, a few rounds")
    parser.add_argument("--num-blocks", type=int, help="blocks in a move (default: 360, quick 64)")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 12, quick 4)")
    parser.add_argument("--disk", type=Path, help="a folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    report = measure(
        options.num_blocks or (64 if options.quick else 360),
        options.rounds or (4 if options.quick else 12),
        options.disk or Path(tempfile.gettempdir()),
        TRANSPORTS,
    )
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


def measure(num_blocks: int, rounds: int, disk: Path, transports: Sequence[TransportKind]) -> str:
    block_bytes = plan_engine(NodeConfig()).layout.block_bytes
    progress("device and host slots")
    host = measure_host_copy(HostCopier, block_bytes, num_blocks, rounds)
    progress("host slots and disk")
    files = measure_disk(disk, block_bytes, num_blocks, rounds)
    progress("peers")
    peers = measure_peers(block_bytes, num_blocks, rounds, transports)
    return "\n".join(
        [
            f"# Moves of KV blocks, {time.strftime('%Y-%m-%d')}",
            "",
            f"{num_blocks} blocks of {block_bytes} bytes ({num_blocks * block_bytes / 1e6:.0f} MB) on {machine()}; "
            f"{rounds} rounds.",
            "",
            "## Device and host slots",
            "",
            table(host),
            "",
            "## Host slots and disk",
            "",
            table(files),
            "",
            "## A peer's memory and ours",
            "",
            *peer_table(peers),
        ]
    )


def measure_peers(
    block_bytes: int, num_blocks: int, rounds: int, transports: Sequence[TransportKind]
) -> list[PeerMove]:
    """Scattered blocks, pulled and checked; memcpy is one process's, of the same blocks."""
    shape = make_shapes((num_blocks,))[-1]
    with Pair(None) as pair:
        pair.open(transports, block_bytes, num_blocks, baselines=True)
        names = [name for name in (MEMCPY, *transports) if "pull" in pair.directions.get(name, ())]
        verified = {name: pair.prove(name, "pull", shape) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                moved, _ = pair.move(name, "pull", shape, checksums=name != MEMCPY, seconds=SECONDS_A_TURN, at_least=2)
                seconds[name] += moved
        for name, reason in pair.missing.items():
            progress(f"{name} is not measured: {reason}")
    num_bytes = num_blocks * block_bytes
    return [
        PeerMove(name, num_bytes / min(taken), num_bytes / statistics.median(taken), verified[name])
        for name, taken in seconds.items()
    ]


def peer_table(moves: Sequence[PeerMove]) -> list[str]:
    """In Markdown. Ratios are those of the fastest moves."""
    memcpy = next((move.best_rate for move in moves if move.name == MEMCPY), None)
    lines = ["| move | best GB/s | median GB/s | of memcpy | right bytes |", "| --- | ---: | ---: | ---: | --- |"]
    for move in moves:
        ratio = "" if memcpy is None else f"{move.best_rate / memcpy:.2f}"
        right = "yes" if move.verified else "**no**"
        lines.append(f"| {move.name} | {move.best_rate / 1e9:.2f} | {move.median_rate / 1e9:.2f} | {ratio} | {right} |")
    return lines


if __name__ == "__main__":
    main()
