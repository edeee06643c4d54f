"""FakeDevice: host memory that poses as a device's, behind copies that take time and watch who touches what."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from kv_transfer.arena import HostArena
from kv_transfer.checksum import checksum


class FakeDevice:
    """A BlockCopier. `memory` is uint8 [num_blocks, block_bytes]. Copies wait for `delay_s`, and for `gate` where it is
    closed, half way through; no two may touch the same block meanwhile, and the source must not change."""

    def __init__(self, num_blocks: int, arena: HostArena, delay_s: float = 0.0) -> None:
        self.memory = np.zeros((num_blocks, arena.block_bytes), np.uint8)
        self.delay_s = delay_s
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Exception | None = None
        self.num_under_way = 0
        self._arena = arena
        self._lock = threading.Lock()
        self._busy: set[tuple[str, int]] = set()

    def fill(self, seed: int) -> None:
        self.memory[:] = np.random.default_rng(seed).integers(0, 256, self.memory.shape, np.uint8)

    def block(self, block_id: int) -> bytes:
        return self.memory[block_id].tobytes()

    def gather(self, block_ids: Sequence[int], wire_ids: Sequence[int]) -> tuple[int, ...]:
        with self._under_way(block_ids, wire_ids):
            before = [self.block(block_id) for block_id in block_ids]
            self._wait()
            for place, (block_id, wire_id) in enumerate(zip(block_ids, wire_ids, strict=True)):
                assert self.block(block_id) == before[place], f"block {block_id} changed while it was copied"
                self._arena.block(wire_id)[:] = before[place]
            return tuple(checksum(block) for block in before)

    def scatter(self, wire_ids: Sequence[int], block_ids: Sequence[int]) -> tuple[int, ...]:
        with self._under_way(block_ids, wire_ids):
            before = [bytes(self._arena.block(wire_id)) for wire_id in wire_ids]
            self._wait()
            for place, (wire_id, block_id) in enumerate(zip(wire_ids, block_ids, strict=True)):
                assert self._arena.block(wire_id) == before[place], f"wire block {wire_id} changed while it was copied"
                self.memory[block_id] = np.frombuffer(before[place], np.uint8)
            return tuple(checksum(self.block(block_id)) for block_id in block_ids)

    @contextlib.contextmanager
    def _under_way(self, block_ids: Sequence[int], wire_ids: Sequence[int]) -> Iterator[None]:
        touched = {("device", block_id) for block_id in block_ids} | {("wire", wire_id) for wire_id in wire_ids}
        assert len(touched) == len(block_ids) + len(wire_ids), "a block twice in one copy"
        with self._lock:
            assert not touched & self._busy, f"two copies touch {touched & self._busy}"
            self._busy |= touched
            self.num_under_way += 1
        try:
            if self.fail is not None:
                raise self.fail
            yield
        finally:
            with self._lock:
                self._busy -= touched
                self.num_under_way -= 1

    def _wait(self) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        assert self.gate.wait(10), "nobody opened the gate"
