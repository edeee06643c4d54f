"""An engine and a store that answer each other from their own threads."""

import queue
import threading

import pytest
from engine_bench import LAYOUT, VOCAB_SIZE, continuation, request
from engine_store import BenchStore

from engine.config import EngineConfig
from engine.engine import Engine
from engine.events import BlocksOffered, EngineEvent, Failed, Finished, Reserved, TokensSampled
from engine.simulated_runner import SimulatedRunner
from protocol.ids import BlockHash, Incarnation
from protocol.kv_events import AllBlocksCleared, BlocksStored
from runtime.clock import MonotonicClock

WAIT_S = 20.0
NUM_BLOCKS = 32


class Served:
    """An engine whose store saves and loads on a thread of its own, as slowly as the engine lets it."""

    def __init__(self, *, eager: bool, proceeds: bool, asynchronous: bool) -> None:
        self.memory = memoryview(bytearray(NUM_BLOCKS * LAYOUT.block_bytes))
        runner = SimulatedRunner(
            LAYOUT,
            NUM_BLOCKS,
            vocab_size=VOCAB_SIZE,
            max_model_len=1000,
            memory=self.memory,
            asynchronous=asynchronous,
        )
        self.store = BenchStore(eager=eager)
        self.proceeds = proceeds
        config = EngineConfig(max_num_batched_tokens=8)
        self.engine = Engine(runner, config, MonotonicClock(), Incarnation("e"))
        self.engine.back_with(self.store)
        self.tokens: dict[str, list[int]] = {}
        self.ended: queue.Queue[EngineEvent] = queue.Queue()
        self._work: queue.Queue[BlocksOffered | Reserved | None] = queue.Queue()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "Served":
        self._thread.start()
        self.engine.start(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.engine.stop(WAIT_S)
        self._work.put(None)
        self._thread.join(WAIT_S)
        load = self.engine.load()
        assert (load.free_blocks, load.num_offered_blocks, load.num_importing) == (load.total_blocks, 0, 0)

    def _hear(self, events: list[EngineEvent]) -> None:
        for event in events:
            match event:
                case BlocksOffered() | Reserved():
                    self._work.put(event)
                case TokensSampled():
                    self.tokens.setdefault(event.request_id, []).extend(token.token_id for token in event.tokens)
                case Finished() | Failed():
                    self.ended.put(event)
                case _:
                    pass

    def _serve(self) -> None:
        size = LAYOUT.block_bytes
        while (work := self._work.get(timeout=WAIT_S)) is not None:
            if isinstance(work, BlocksOffered):
                self.store.save(work, self.memory, size)
                self.engine.saved(work.pin_id)
                continue
            first, end = work.num_cached_blocks, len(work.block_ids)
            if self.proceeds:
                first = (first + end) // 2
                self.engine.proceed(work.request_id, first * LAYOUT.block_size)
            for index in range(first, end):
                start = work.block_ids[index] * size
                self.memory[start : start + size] = self.store.kept[work.block_hashes[index]]
            self.engine.resume(work.request_id, end * LAYOUT.block_size)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("eager", "proceeds"), [(False, False), (False, True), (True, True)])
def test_more_prompts_than_the_device_holds_come_back_from_the_store(
    eager: bool, proceeds: bool, asynchronous: bool
) -> None:
    prompts = {f"r{i}": list(range(40 * (i % 6), 40 * (i % 6) + 34)) for i in range(30)}
    with Served(eager=eager, proceeds=proceeds, asynchronous=asynchronous) as served:
        for name, tokens in prompts.items():
            served.engine.submit(request(name, tokens, max_tokens=6))
        ended = [served.ended.get(timeout=WAIT_S) for _ in prompts]
        assert all(isinstance(event, Finished) for event in ended)
        assert served.tokens == {name: continuation(tokens, 6) for name, tokens in prompts.items()}
        assert served.store.kept


def test_the_store_tells_through_the_engine_what_its_tiers_hold() -> None:
    block_hash = BlockHash(b"h" * 16)
    with Served(eager=False, proceeds=False, asynchronous=False) as served:
        engine = served.engine
        assert engine.kv_snapshot().events == (AllBlocksCleared(),)
        engine.note_stored([block_hash], "host")
        batch = engine.take_kv_events()
        assert batch is not None
        assert batch.events == (BlocksStored((block_hash,), "host"),)
        engine.clear_prefix_cache()
        engine.note_removed([block_hash], "host")
        engine.note_removed([block_hash], "disk")
        engine.submit(request("r", range(3), max_tokens=1))
        served.ended.get(timeout=WAIT_S)
        assert engine.kv_snapshot().events == (AllBlocksCleared(),)
