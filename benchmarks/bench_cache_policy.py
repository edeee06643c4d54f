"""Eviction policies on a trace of requests: the full table beside the yardsticks, and whether ours meets its two requirements.

    python -m benchmarks.bench_cache_policy --trace conversation_trace.jsonl --output FILE

Required of `density`, the default policy: at 5,000 blocks at least 15 % more hits than LRU, and at 50,000 blocks at most 2 % fewer.
Then what may be luck is taken away: each half of the trace alone, learnt from nothing; the conversations begun in
another order; two traces at once on one tier; and loads that are not conversations at all, a cyclic scan and a Zipf
popularity of documents, where it must not fall behind LRU.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from benchmarks.cluster_load import machine
from kv_store.policy.factory import PolicyName
from kv_store.replay.one_tier import replay_one_tier
from kv_store.replay.report import CacheReport, ReplayOptions, replay
from kv_store.replay.trace import TraceRequest, read_trace
from protocol.kv_blocks import CachedBlock

MIN_GAIN = 0.15
GAIN_BLOCKS = 5_000
MAX_LOSS = 0.02
LOSS_BLOCKS = 50_000
CHECK_BLOCKS = (1_000, 5_000, 50_000)
_SEED = 20_261_121


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="write the report there as well")
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    requests = read_trace(options.trace)
    say("# Eviction policies\n")
    say(f"`python -m benchmarks.bench_cache_policy --trace {options.trace.name}` on {machine()}.\n")
    started = time.perf_counter()
    report = replay(requests, ReplayOptions(two_tiers=((1_000, 4_000),)), say)
    say("\nTwo tiers: hits in either, and blocks written to the host tier (w) for each block wanted.\n")
    passed = _verdicts(report, say)
    say("\n## What is not luck\n")
    say("| load | blocks | lru | density | change |")
    say("| --- | ---: | ---: | ---: | ---: |")
    for name, load in _loads(requests):
        for blocks in CHECK_BLOCKS:
            lru, density = (_hit_rate(load, policy, blocks) for policy in ("lru", "density"))
            say(f"| {name} | {blocks:,} | {100 * lru:.1f} | {100 * density:.1f} | {_change(density, lru)} |")
    say(f"\n{time.perf_counter() - started:.0f} s in all.")
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")
    return 0 if passed else 1


def _verdicts(report: CacheReport, say: Callable[[str], None]) -> bool:
    gain = report.hit_rate("density", GAIN_BLOCKS) / report.hit_rate("lru", GAIN_BLOCKS) - 1
    loss = 1 - report.hit_rate("density", LOSS_BLOCKS) / report.hit_rate("lru", LOSS_BLOCKS)
    gained, kept = gain >= MIN_GAIN, loss <= MAX_LOSS
    bound = report.clairvoyant[report.blocks.index(GAIN_BLOCKS)]
    closed = (report.hit_rate("density", GAIN_BLOCKS) - report.hit_rate("lru", GAIN_BLOCKS)) / (
        bound - report.hit_rate("lru", GAIN_BLOCKS)
    )
    say(f"- {_word(gained)}: {gain:+.1%} against LRU at {GAIN_BLOCKS:,} blocks; at least {MIN_GAIN:+.0%} is required.")
    say(f"- {_word(kept)}: {-loss:+.1%} against LRU at {LOSS_BLOCKS:,} blocks; at least {-MAX_LOSS:+.0%} is required.")
    say(f"- At {GAIN_BLOCKS:,} blocks that is {closed:.0%} of what lies between LRU and the clairvoyant bound.")
    return gained and kept


def _loads(requests: Sequence[TraceRequest]) -> Iterator[tuple[str, list[TraceRequest]]]:
    half = len(requests) // 2
    yield "first half", list(requests[:half])
    yield "second half", [TraceRequest(r.time_s - requests[half].time_s, r.blocks) for r in requests[half:]]
    yield "conversations begun in another order", _reordered(requests)
    yield "two at once", _doubled(requests)
    yield "scan of 10,000 blocks, again and again", _scan(1_250, 8, 8_000)
    yield "documents by Zipf, each with a new question", _documents(3_000, 10, 12_000)


def _reordered(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """Every conversation keeps its own pace, and begins when another one did; what runs past the end is cut off."""
    conversation_of: dict[bytes, int] = {}
    conversations: dict[int, list[TraceRequest]] = {}
    everybody = requests[0].blocks[0].block_hash
    for number, request in enumerate(requests):
        known = [conversation_of[b.block_hash] for b in request.blocks if b.block_hash in conversation_of]
        conversation = known[-1] if known else number
        conversations.setdefault(conversation, []).append(request)
        for block in request.blocks:
            if block.block_hash != everybody:
                conversation_of[block.block_hash] = conversation
    begins = [turns[0].time_s for turns in conversations.values()]
    random.Random(_SEED).shuffle(begins)
    moved = [
        TraceRequest(turn.time_s - turns[0].time_s + begin, turn.blocks)
        for turns, begin in zip(conversations.values(), begins, strict=True)
        for turn in turns
    ]
    return sorted((turn for turn in moved if turn.time_s <= requests[-1].time_s), key=lambda turn: turn.time_s)


def _doubled(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """With a second load of the same kind, none of whose blocks are the first one's: each begins with the other's half."""
    half = len(requests) // 2
    shifted = requests[half].time_s
    end = requests[-1].time_s
    other = [
        TraceRequest((r.time_s - shifted) % (end + 1.0), tuple(_other(block) for block in r.blocks)) for r in requests
    ]
    return sorted([*requests, *other], key=lambda request: request.time_s)


def _other(block: CachedBlock) -> CachedBlock:
    return CachedBlock(b"\x01" + block.block_hash[1:], b"\x01" + block.parent[1:], block.position)


def _scan(num_documents: int, num_blocks: int, num_requests: int) -> list[TraceRequest]:
    documents = [_chain(number, num_blocks) for number in range(num_documents)]
    return [TraceRequest(0.5 * number, documents[number % num_documents]) for number in range(num_requests)]


def _documents(num_documents: int, num_blocks: int, num_requests: int) -> list[TraceRequest]:
    """Popularity 1/rank; two blocks of question follow, which never come again."""
    documents = [_chain(number, num_blocks) for number in range(num_documents)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(num_documents)))
    wanted = random.Random(_SEED).choices(documents, cum_weights=weights, k=num_requests)
    return [
        TraceRequest(0.3 * number, document + _chain(num_documents + number, 2, document[-1]))
        for number, document in enumerate(wanted)
    ]


def _chain(number: int, num_blocks: int, after: CachedBlock | None = None) -> tuple[CachedBlock, ...]:
    parent, position = (bytes(16), 0) if after is None else (after.block_hash, after.position + 1)
    blocks = []
    for index in range(num_blocks):
        blocks.append(CachedBlock(b"\x02" + (number << 16 | index).to_bytes(15, "big"), parent, position + index))
        parent = blocks[-1].block_hash
    return tuple(blocks)


def _hit_rate(requests: Sequence[TraceRequest], policy: PolicyName, blocks: int) -> float:
    return replay_one_tier(requests, policy, blocks).hit_rate


def _change(new: float, old: float) -> str:
    return f"{new / old - 1:+.1%}" if old else "from nothing" if new else "none"


def _word(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


if __name__ == "__main__":
    sys.exit(main())
