"""TTFT of a long prompt from each place that may keep its KV, beside computing it, in one run.

    python -m benchmarks.bench_tiers                      4,000 random tokens, three rounds
    python -m benchmarks.bench_tiers --quick              one round of 1,000
    python -m benchmarks.bench_tiers --output FILE        also writes the report as Markdown

Two clusters of real processes (`headrace up`, the built-in model) that share nothing but an index: `here`, whose one node
answers, and `there`, a node and a store that hold what it lacks. Each round computes a new prompt here, asks for it again
from the device, from host memory and from disk, then for one that was computed there, from the peer's host memory and from
the store. What is not to answer is cleared before each question; `cached` says whether what was meant did answer.

Predicted from what was measured before: TTFT of a short prompt + bytes / bandwidth of the moves (kv_store.bench,
kv_transfer.bench) that bring them here, one after the other. Other nodes are found by the index, in chunks of 256 tokens:
what is behind the last whole chunk is computed, at the rate at which the whole prompt was.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec

from benchmarks.bench_moves import measure_peers
from benchmarks.cluster_load import Client, cluster, free_port, machine, progress
from engine.build import plan_engine
from kv_store.admin import PATH
from kv_store.bench.moves import measure_disk, measure_host_copy
from kv_store.host_copier import HostCopier
from kv_store.index.embedded import EmbeddedServer
from protocol.kv_events import StorageTier
from protocol.store_admin import BlocksChanged, ClearStore, StoreReport
from protocol.transfer import TransportKind
from runtime.node_config import ModelOptions, NodeConfig
from runtime.rpc_client import RpcClient

COMPUTED = "computed"
FOUND_BY_INDEX = ("peer's host memory", "store node")
PLACES = ("device", "host memory", "disk", *FOUND_BY_INDEX)
BLOCK_SIZE = 16
OUTPUT_TOKENS = 2
SHORT_PROMPT_TOKENS = 33
CHUNK_TOKENS = 256
SPARE_BLOCKS = 16
"""That host memory here has beside one prompt."""

MOVE_ROUNDS = 5
LOAN_S = 0.010
"""Of a prediction: asking a peer for a loan, and giving it back, beside moving the bytes."""

REST_S = 0.3
NUM_FILLERS = 8
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bytes a second: of the copy between slots and device, from disk into slots, from a peer's memory with checksums."""

    copy: float
    disk: float
    peer: float

    def seconds(self, place: str, num_bytes: int) -> float:
        """Moving so much from there to the device's blocks."""
        match place:
            case "device":
                return 0.0
            case "host memory":
                return num_bytes / self.copy
            case "disk":  # piece n is copied while piece n + 1 is read
                return num_bytes / min(self.copy, self.disk)
            case _:
                return LOAN_S + num_bytes / self.peer


@dataclass(frozen=True, slots=True)
class Outcome:
    ttft_s: float
    cached_tokens: int


@dataclass(slots=True)
class Outcomes:
    """Of one place: those of which enough was cached, and how many were not."""

    right: list[Outcome] = field(default_factory=list)
    num_missed: int = 0


def brought_tokens(place: str, num_tokens: int) -> int:
    """How many tokens of a prompt need not be computed: all full blocks but the last token's, or all chunks of the index."""
    if place == COMPUTED:
        return 0
    unit = CHUNK_TOKENS if place in FOUND_BY_INDEX else BLOCK_SIZE
    return (num_tokens - 1) // unit * unit


class Side:
    """One of the two clusters."""

    def __init__(self, url: str, control_url: str, rpc: RpcClient) -> None:
        self.client = Client(url, seed=time.monotonic_ns())
        self._rpc = rpc
        with urllib.request.urlopen(f"{control_url}/internal/v1/workers", timeout=10) as response:
            workers = json.load(response)["workers"]
        self.urls: dict[str, str] = {worker["role"]: worker["control_url"] for worker in workers}

    async def clear(self, role: str, *tiers: StorageTier) -> None:
        for tier in tiers:
            await self._rpc.call(f"{self.urls[role]}{PATH}/clear", ClearStore(tier, None), BlocksChanged, 10.0)

    async def report(self, role: str) -> StoreReport:
        return await self._rpc.get(f"{self.urls[role]}{PATH}/stats", StoreReport, 10.0)

    async def until_used(self, role: str, tier: StorageTier, num_blocks: int) -> None:
        """Until so many blocks are in that tier, and the index knows of them."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            report = await self.report(role)
            used = next((each.used for each in report.tiers if each.tier == tier), 0)
            settled = report.index is None or (report.index.queued == 0 and report.index.lag_s == 0)
            if used >= num_blocks and settled:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"{role}: {used} of {num_blocks} blocks came to {tier}; index {report.index}")
            await asyncio.sleep(0.05)

    async def until_at_rest(self, role: str, tier: StorageTier) -> None:
        """Until nothing comes to that tier any more."""
        before = None
        while (now := [each.stored for each in (await self.report(role)).tiers if each.tier == tier]) != before:
            before = now
            await asyncio.sleep(REST_S)


class Contest:
    """`here` answers; prompts of `num_tokens` tokens."""

    def __init__(self, here: Side, there: Side, num_tokens: int, session: aiohttp.ClientSession) -> None:
        self._here = here
        self._there = there
        self._num_tokens = num_tokens
        self._session = session
        self._num_blocks = num_tokens // BLOCK_SIZE
        self.outcomes = {place: Outcomes() for place in (COMPUTED, *PLACES)}

    async def round(self) -> None:
        here, there = self._here, self._there
        mine, theirs = (here.client.prompt(self._num_tokens) for _ in range(2))
        await self._ask(COMPUTED, mine)
        await here.until_used("decode", "host", self._num_blocks)
        await self._ask("device", mine)
        await here.clear("decode", "device")
        await self._ask("host memory", mine)
        await self._push_to_disk()
        await here.clear("decode", "device", "host")
        await self._ask("disk", mine)
        await here.clear("decode", "device", "host", "disk")

        await there.client.ask(self._session, theirs, OUTPUT_TOKENS)
        await there.until_used("decode", "host", self._num_blocks)
        await there.until_used("store", "host", self._num_blocks)
        await there.clear("decode", "device")
        await there.clear("store", "host")
        await asyncio.sleep(1.0)  # what has gone from the store has gone from the index
        await self._ask("peer's host memory", theirs)
        await there.until_used("store", "host", self._num_blocks)  # put by us, who have it now
        await there.clear("decode", "host")
        await here.clear("decode", "device", "host", "disk")
        await asyncio.sleep(1.0)
        await self._ask("store node", theirs)
        await there.clear("store", "host")
        await here.clear("decode", "device", "host", "disk")

    async def _push_to_disk(self) -> None:
        """By prompts that together take more than its place in host memory, each small beside it: what comes faster than the
        disk can be written is lost, and this is not about that."""
        num_tokens = self._num_tokens + 2 * SPARE_BLOCKS * BLOCK_SIZE
        for _ in range(NUM_FILLERS):
            filler = self._here.client.prompt(num_tokens // NUM_FILLERS)
            await self._here.client.ask(self._session, filler, OUTPUT_TOKENS)
            await self._here.until_at_rest("decode", "disk")

    async def short(self) -> float:
        """TTFT of a prompt of two blocks, all of them cached: what every request costs."""
        prompt = self._here.client.prompt(SHORT_PROMPT_TOKENS)
        samples = [await self._here.client.ask(self._session, prompt, OUTPUT_TOKENS) for _ in range(5)]
        return min(sample.ttft_s for sample in samples[1:])

    async def _ask(self, place: str, prompt: list[int]) -> None:
        progress(place)
        sample = await self._here.client.ask(self._session, prompt, OUTPUT_TOKENS)
        wanted = brought_tokens(place, self._num_tokens)
        outcomes = self.outcomes[place]
        if sample.cached_tokens >= wanted:
            outcomes.right.append(Outcome(sample.ttft_s, sample.cached_tokens))
        else:
            outcomes.num_missed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 1,000 tokens")
    parser.add_argument("--prompt-tokens", type=int, help="of each prompt (default: 4000, quick 1000)")
    parser.add_argument("--rounds", type=int, help="default: 3, quick 1")
    parser.add_argument("--transport", default="auto", help="between the two clusters' nodes (default: auto)")
    parser.add_argument("--model", help="a model other than the built-in one")
    parser.add_argument("--disk", type=Path, help="a folder on the disk to use (default: the temporary folder)")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    options = parser.parse_args()
    options.prompt_tokens = options.prompt_tokens or (1000 if options.quick else 4000)
    options.rounds = options.rounds or (1 if options.quick else 3)
    report = asyncio.run(measure(options))
    print(report)
    if options.output:
        options.output.write_text(report + "\n")


async def measure(options: argparse.Namespace) -> str:
    config = NodeConfig() if options.model is None else NodeConfig(model=ModelOptions(model=options.model))
    block_bytes = plan_engine(config).layout.block_bytes
    num_blocks = options.prompt_tokens // BLOCK_SIZE
    with tempfile.TemporaryDirectory(prefix="headrace-bench-", dir=options.disk) as folder:
        bandwidths = measure_bandwidths(block_bytes, num_blocks, Path(folder), options.transport)
        async with (
            EmbeddedServer() as server,
            two_clusters(options, block_bytes, Path(folder), server.url) as (here, there),
        ):
            timeout = aiohttp.ClientTimeout(total=600)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                contest = Contest(here, there, options.prompt_tokens, session)
                short_s = await contest.short()
                for number in range(options.rounds):
                    progress(f"round {number + 1} of {options.rounds}")
                    await contest.round()
    return build_report(options, contest.outcomes, bandwidths, short_s, num_blocks * block_bytes)


def measure_bandwidths(block_bytes: int, num_blocks: int, folder: Path, transport: str) -> Bandwidths:
    progress("bandwidths")
    copies = {move.name: move for move in measure_host_copy(HostCopier, block_bytes, num_blocks, MOVE_ROUNDS)}
    disk = {move.name: move for move in measure_disk(folder, block_bytes, num_blocks, MOVE_ROUNDS)}
    kind: TransportKind = "shm" if transport == "auto" else msgspec.convert(transport, TransportKind)
    peers = {move.name: move for move in measure_peers(block_bytes, num_blocks, MOVE_ROUNDS, (kind,))}
    return Bandwidths(
        copy=copies["slots to cache"].median_rate, disk=disk["disk to slots"].median_rate, peer=peers[kind].median_rate
    )


@contextlib.asynccontextmanager
async def two_clusters(
    options: argparse.Namespace, block_bytes: int, folder: Path, index_url: str
) -> AsyncIterator[tuple[Side, Side]]:
    """Host memory here holds little more than one prompt, so that the next pushes it to disk."""
    num_blocks = options.prompt_tokens // BLOCK_SIZE
    settings = {
        "node.store.admission": "all",
        "node.store.load": "always",
        "node.store.policy": "lru",
        "node.store.write": "through",
        "node.store.redis_budget_s": "0.05",
        "node.transfer.borrow": "always",
    }
    common = ["--prefill", "0", "--transport", options.transport, "--redis", index_url]
    common += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    if options.model is not None:
        common += ["--model", options.model]
    ports = free_port(), free_port()
    mine = ["--host-memory", str((num_blocks + SPARE_BLOCKS) * block_bytes), "--disk", str(folder / "here")]
    mine += ["--set", f"router.control_port={ports[0]}", "--set", "decode.worker_id=here"]
    theirs = ["--host-memory", str(2 * num_blocks * block_bytes), "--store"]
    theirs += ["--set", f"router.control_port={ports[1]}", "--set", "decode.worker_id=there"]
    progress("starting two clusters")
    with cluster([*common, *mine]) as here_url, cluster([*common, *theirs]) as there_url:
        async with RpcClient(None) as rpc:
            yield (
                Side(here_url, f"http://127.0.0.1:{ports[0]}", rpc),
                Side(there_url, f"http://127.0.0.1:{ports[1]}", rpc),
            )


def build_report(
    options: argparse.Namespace,
    outcomes: Mapping[str, Outcomes],
    bandwidths: Bandwidths,
    short_s: float,
    num_bytes: int,
) -> str:
    computed_s = statistics.median(each.ttft_s for each in outcomes[COMPUTED].right)
    lines = [
        f"# TTFT by tier, {time.strftime('%Y-%m-%d')}",
        "",
        f"`python -m benchmarks.bench_tiers --prompt-tokens {options.prompt_tokens} --rounds {options.rounds}` on {machine()}. "
        f"{num_bytes / 1e6:.0f} MB of KV; measured before: slots to cache {bandwidths.copy / 1e9:.1f} GB/s, disk to slots "
        f"{bandwidths.disk / 1e9:.1f} GB/s, from a peer {bandwidths.peer / 1e9:.1f} GB/s; TTFT of a short cached prompt "
        f"{short_s * 1e3:.0f} ms.",
        "",
        "| from | samples | predicted ms | best ms | median ms | of computing |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for place, found in outcomes.items():
        brought = brought_tokens(place, options.prompt_tokens) / options.prompt_tokens
        rest_s = computed_s * (1 - brought) if place in FOUND_BY_INDEX else 0.0
        predicted_s = short_s + bandwidths.seconds(place, int(num_bytes * brought)) + rest_s
        predicted = "" if place == COMPUTED else f"{predicted_s * 1e3:.0f}"
        lines.append(_row(place, found, predicted, computed_s))
    return "\n".join(lines)


def _row(place: str, found: Outcomes, predicted: str, computed_s: float) -> str:
    samples = f"{len(found.right)}" + (f" ({found.num_missed} missed)" if found.num_missed else "")
    if not found.right:
        return f"| {place} | {samples} | {predicted} | | | |"
    seconds = [each.ttft_s for each in found.right]
    median_s = statistics.median(seconds)
    best, median, ratio = f"{min(seconds) * 1e3:.0f}", f"{median_s * 1e3:.0f}", f"{median_s / computed_s:.3f}"
    return f"| {place} | {samples} | {predicted} | {best} | {median} | {ratio} |"


if __name__ == "__main__":
    main()
