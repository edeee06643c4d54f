"""HostArena: the one region of host memory that holds all KV blocks of a process.

It is made once, before the model is loaded, and lives until the process ends: a peer may hold its address, and memory
that is taken away under a reader kills a process (the owner's, with some transports). Close it last, after every
transport.

The region is an anonymous file (memfd), so that a peer on the same host can map it through /proc/<pid>/fd/<fd> and
nothing is left behind however the process dies. Its size is sealed: a peer's mapping can never fault. All of it is
mapped at the start (0.3 s per GiB, several times that on a virtual machine that must ask its host): too little memory
shows at start and not under load, and no transfer pays for first touches, which made it ten times as long.

    | header page: magic, token | block 0 | block 1 | ... | block num_blocks - 1 | scratch blocks |

The token is random. A peer that finds it in what it mapped has mapped this arena and no other file. Scratch blocks hold
nothing of anybody's: peers may read and write them to measure how fast that is.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from typing import ClassVar, Literal, Self

import numpy as np
import torch

from protocol.errors import ConfigError
from runtime.memory import available_memory_bytes

HEADER_BYTES = mmap.PAGESIZE
SCRATCH_BYTES = 8 << 20
MIN_SCRATCH_BLOCKS = 2
MAX_SCRATCH_BLOCKS = 64
_MADV_POPULATE_WRITE = 23
"""Of Linux 5.14; the standard library does not name it. Maps and reserves without changing contents."""

MAGIC = b"headrace-arena-1"
TOKEN_BYTES = 16


def scratch_blocks(block_bytes: int) -> int:
    """How many scratch blocks of this size make a measurement that means something."""
    return max(MIN_SCRATCH_BLOCKS, min(MAX_SCRATCH_BLOCKS, SCRATCH_BYTES // block_bytes))


class HostArena:
    """`num_blocks` blocks of `block_bytes` bytes each, contiguous, starting at a page boundary; `num_scratch_blocks` more
    follow them, with the ids that come next.

    Raises ConfigError, which names the `setting` to change, when the memory is not to be had. Views (`memory`, `tensor()`, `block()`) are zero-copy, writable
    and valid until the process ends.
    """

    memory_kind: ClassVar[Literal["host"]] = "host"
    device_id: ClassVar[int] = 0

    def __init__(
        self, num_blocks: int, block_bytes: int, num_scratch_blocks: int = 0, *, setting: str = "cache.memory"
    ) -> None:
        if num_blocks < 1 or block_bytes < 1:
            raise ValueError(f"an arena needs at least one block of one byte, not {num_blocks} of {block_bytes}")
        self.num_blocks = num_blocks
        self.num_scratch_blocks = num_scratch_blocks
        self.block_bytes = block_bytes
        self.token = secrets.token_bytes(TOKEN_BYTES)
        _check_memory(self.file_bytes, setting)
        self.fd = os.memfd_create("headrace-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            self._map = _reserve(self.fd, self.file_bytes)
        except OSError as error:
            os.close(self.fd)
            raise ConfigError(
                f"cannot reserve {num_blocks} KV blocks of {block_bytes} bytes ({error}); make {setting} smaller",
                param=setting,
            ) from error
        self._map[: len(MAGIC) + TOKEN_BYTES] = MAGIC + self.token
        self._bytes = np.frombuffer(self._map, dtype=np.uint8, count=self.size_bytes, offset=HEADER_BYTES)
        self.address = int(self._bytes.ctypes.data)
        """Where block 0 starts, in this process."""
        self.memory = memoryview(self._map)[HEADER_BYTES : HEADER_BYTES + self.size_bytes]
        """All blocks, scratch blocks included: [num_wire_blocks * block_bytes]"""

    @property
    def num_wire_blocks(self) -> int:
        """Blocks that a peer may name: scratch blocks are the last of them."""
        return self.num_blocks + self.num_scratch_blocks

    @property
    def size_bytes(self) -> int:
        """Of all blocks, without the header."""
        return self.num_wire_blocks * self.block_bytes

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.size_bytes

    def tensor(self) -> torch.Tensor:
        """The blocks as one flat tensor, without scratch blocks: uint8 [num_blocks * block_bytes]. The caller views it as
        what it is."""
        return torch.from_numpy(self._bytes[: self.num_blocks * self.block_bytes])

    def block(self, block_id: int) -> memoryview:
        """One block's bytes. Raises IndexError outside of the arena (a negative id as well)."""
        if not 0 <= block_id < self.num_wire_blocks:
            raise IndexError(f"block {block_id} is not in an arena of {self.num_wire_blocks} blocks")
        start = block_id * self.block_bytes
        return self.memory[start : start + self.block_bytes]

    def close(self) -> None:
        """Close the file and let the memory go with its last view: now, if nothing holds one."""
        if self._map.closed or self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.memory.release()
        del self._bytes
        with contextlib.suppress(BufferError):  # a view or tensor is alive: the mapping goes with it
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_memory(size: int, setting: str) -> None:
    """Ask before reserving: the kernel hands out pages until none are left and then kills a process, likely this one."""
    available = available_memory_bytes()
    if size > available:
        raise ConfigError(
            f"KV blocks need {size >> 20} MiB of memory and {available >> 20} MiB are available; make {setting} smaller",
            param=setting,
        )


def _reserve(fd: int, size: int) -> mmap.mmap:
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    mapped = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with contextlib.suppress(OSError):  # only an optimisation, and not every kernel has it for files in memory
        mapped.madvise(mmap.MADV_HUGEPAGE)
    try:
        mapped.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        os.posix_fallocate(fd, 0, size)  # a kernel before 5.14: reserved, but not mapped
    return mapped
