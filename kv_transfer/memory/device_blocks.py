"""open_staging: the way from a node's KV cache to its transports.

    in host memory      the cache is an arena that all transports reach
    device, direct      transports reach the cache where it is (DeviceArena): nothing is copied on the way
    device, staged      bounded host memory between the cache and the transports (DeviceStaging)

An engine with its cache on a device implements DeviceBlocks; a node brings the two sides together, which do not know each
other.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from kv_transfer.memory.arena import HostArena, scratch_blocks
from kv_transfer.memory.device_arena import Arena, DeviceArena
from kv_transfer.memory.device_staging import BlockCopier, DeviceStaging
from kv_transfer.memory.staging import HostStaging, InPlaceStaging, Staging
from kv_transfer.memory.staging_pool import MIN_BLOCKS
from protocol.errors import ConfigError
from runtime.config import parse_size
from runtime.node_config import TransferOptions

MAX_STAGING_BLOCKS = 64
MAX_STAGING_BYTES = 256 << 20
"""Where the configuration leaves it to us: enough to keep a network busy while the bus fills what was sent."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class DeviceBlocks(Protocol):
    """What an engine whose KV cache is in device memory offers to those who move its blocks.

    Block ids up to `num_blocks` are KV blocks; `num_scratch_blocks` more hold nothing of anybody's.
    """

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_scratch_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    @property
    def memory(self) -> torch.Tensor:
        """On the device: uint8 [num_blocks + num_scratch_blocks, block_bytes], for the life of the process."""
        ...

    def sums(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        """Checksums of blocks as they lie on the device. Blocking, from any thread."""
        ...

    def copier(self, wire_memory: torch.Tensor) -> BlockCopier:
        """Copies to and from this host memory, which is pinned from now on: uint8 [num_wire_blocks, block_bytes]."""
        ...


def open_staging(
    memory: HostArena | DeviceBlocks,
    options: TransferOptions,
    open_transports: Callable[[Arena], T],
    host_staging: Callable[[HostArena], Staging] = HostStaging,
) -> tuple[Staging, T]:
    """How the blocks get to transports (`host_staging`, of an arena), and the transports, opened over what they are to serve and read into.

    Raises ConfigError where the configuration wants what is not to be had.
    """
    if isinstance(memory, HostArena):
        return host_staging(memory), open_transports(memory)
    return _open_device(memory, options, open_transports)


def _open_device(
    blocks: DeviceBlocks, options: TransferOptions, open_transports: Callable[[Arena], T]
) -> tuple[Staging, T]:
    if options.device_memory != "staged":
        arena = DeviceArena(
            num_blocks=blocks.num_blocks,
            num_scratch_blocks=blocks.num_scratch_blocks,
            block_bytes=blocks.block_bytes,
            address=blocks.memory.data_ptr(),
            device_id=blocks.memory.device.index or 0,
            memory=blocks.memory,
        )
        try:
            transports = open_transports(arena)
        except ConfigError as error:
            if options.device_memory == "direct":
                raise
            log.info("the device's memory is not reached by what could move its KV: %s", error.message)
        else:
            log.info("KV moves from and to the device's memory directly")
            return InPlaceStaging(arena, blocks.sums), transports
    staging = _stage_device(blocks, options)
    try:
        return staging, open_transports(staging.arena)
    except ConfigError:
        staging.arena.close()
        raise


def _stage_device(blocks: DeviceBlocks, options: TransferOptions) -> DeviceStaging:
    """Takes the host memory, and pins it. Raises ConfigError."""
    block_bytes = blocks.block_bytes
    num_blocks = num_staging_blocks(options.staging_memory, block_bytes)
    arena = HostArena(num_blocks, block_bytes, scratch_blocks(block_bytes))
    try:
        copier = blocks.copier(arena.tensor().view(num_blocks, block_bytes))
    except RuntimeError as error:
        arena.close()
        raise ConfigError(
            f"staging memory cannot be had ({error}); make transfer.staging_memory smaller, or raise what this process may lock",
            param="transfer.staging_memory",
        ) from error
    log.info("KV moves through %d staging blocks of %d bytes in host memory", num_blocks, block_bytes)
    return DeviceStaging(copier, arena)


def num_staging_blocks(staging_memory: str, block_bytes: int) -> int:
    """Of `transfer.staging_memory`, a size or "auto". Raises ConfigError for one that holds too few blocks."""
    if staging_memory == "auto":
        return max(MIN_BLOCKS, min(MAX_STAGING_BLOCKS, MAX_STAGING_BYTES // block_bytes))
    num_blocks = parse_size(staging_memory) // block_bytes
    if num_blocks < MIN_BLOCKS:
        raise ConfigError(
            f"transfer.staging_memory {staging_memory} holds {num_blocks} KV blocks of {block_bytes} bytes; lending and"
            f" reading need {MIN_BLOCKS} at least ({MIN_BLOCKS * block_bytes} bytes)",
            param="transfer.staging_memory",
        )
    return num_blocks
