"""FakeDevice: host memory that poses as a device's, behind copies that take time and watch who touches what."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from protocol.checksum import checksum

Blocks = NDArray[np.uint8]


class FakeDevice:
    """A BlockCopier. `memory` and `wire` are uint8 [number of blocks, block_bytes]. Copies wait for `delay_s`, and for `gate` where it is
    closed, half way through; no two may touch the same block meanwhile, and the source must not change."""

    def __init__(self, memory: Blocks, wire: Blocks, delay_s: float = 0.0) -> None:
        self.memory = memory
        self.delay_s = delay_s
        self.gate = threading.Event()
        self.gate.set()
        self.fail: Exception | None = None
        self.num_under_way = 0
        self._wire = wire
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
                self._wire[wire_id] = np.frombuffer(before[place], np.uint8)
            return tuple(checksum(block) for block in before)

    def scatter(self, wire_ids: Sequence[int], block_ids: Sequence[int]) -> tuple[int, ...]:
        with self._under_way(block_ids, wire_ids):
            before = [self._wire[wire_id].tobytes() for wire_id in wire_ids]
            self._wait()
            for place, (wire_id, block_id) in enumerate(zip(wire_ids, block_ids, strict=True)):
                assert self._wire[wire_id].tobytes() == before[place], (
                    f"wire block {wire_id} changed while it was copied"
                )
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


class FakeDeviceBlocks:
    """A DeviceBlocks whose device is this machine's memory. `pins` says whether host memory can be pinned."""

    def __init__(self, num_blocks: int, num_scratch_blocks: int, block_bytes: int, *, pins: bool = True) -> None:
        self.num_blocks = num_blocks
        self.num_scratch_blocks = num_scratch_blocks
        self.block_bytes = block_bytes
        self.memory = torch.zeros((num_blocks + num_scratch_blocks, block_bytes), dtype=torch.uint8)
        self._pins = pins

    def sums(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(checksum(self.memory[block_id].numpy().data) for block_id in block_ids)

    def copier(self, wire_memory: torch.Tensor) -> FakeDevice:
        if not self._pins:
            raise RuntimeError("no more memory may be locked")
        return FakeDevice(self.memory.numpy(), wire_memory.numpy())
