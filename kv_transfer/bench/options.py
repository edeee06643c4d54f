"""BenchOptions: what to measure."""

from dataclasses import dataclass

from protocol.errors import ConfigError
from protocol.transfer import TransportKind

GRANULE_BYTES = 4096
"""Block sizes are multiples of it, so that they can be those of a KV layout."""

MAX_BLOCKS = 4096
MAX_ARENA_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """`slice_s`: how long each contestant moves blocks before it is the next one's turn; `rounds`: how often each has its
    turn. `ucx_tcp`: measure UCX's contestants once more with UCX_TLS=tcp. Raises ConfigError for what cannot be."""

    transports: tuple[TransportKind, ...]
    block_bytes: tuple[int, ...]
    num_blocks: tuple[int, ...]
    rounds: int
    slice_s: float
    idle_s: float
    ucx_tcp: bool = True

    def __post_init__(self) -> None:
        for size in self.block_bytes:
            if size < GRANULE_BYTES or size % GRANULE_BYTES:
                raise ConfigError(f"--block-bytes: {size} is not a multiple of {GRANULE_BYTES}", param="--block-bytes")
        for count in self.num_blocks:
            if not 1 <= count <= MAX_BLOCKS:
                raise ConfigError(f"--num-blocks: {count} is not within 1 and {MAX_BLOCKS}", param="--num-blocks")
        largest = max(self.block_bytes) * max(self.num_blocks)
        if largest > MAX_ARENA_BYTES:
            raise ConfigError(
                f"{max(self.num_blocks)} blocks of {max(self.block_bytes)} bytes are {largest >> 20} MiB; at most "
                f"{MAX_ARENA_BYTES >> 20} MiB are moved at once",
                param="--num-blocks",
            )
