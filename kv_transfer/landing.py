"""Landing: the blocks of one context on their way into our arena: announced, read, verified, in that order. Pure.

    | cached | verified | being read | announced | still to come |
             ^ num_valid_blocks                  ^ num_announced  ^ num_blocks

Everything that the owner says passes through here and is believed only as far as the ticket allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import ChecksumMismatch, TransferError
from protocol.transfer import BlocksReady


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks to read together: first_block is an index into the context, the ids are of the two arenas."""

    first_block: int
    remote_ids: tuple[int, ...]
    local_ids: tuple[int, ...]
    checksums: tuple[int, ...]


class Landing:
    """`local_block_ids` are our blocks for the whole context; the first `num_cached_blocks` hold it already."""

    def __init__(self, local_block_ids: Sequence[int], num_cached_blocks: int) -> None:
        self._local_ids = tuple(local_block_ids)
        self._remote_ids: list[int] = []
        self._checksums: list[int] = []
        self._first = num_cached_blocks
        self.num_valid_blocks = num_cached_blocks
        """Leading blocks whose contents are proven."""

    @property
    def num_blocks(self) -> int:
        return len(self._local_ids)

    @property
    def num_announced(self) -> int:
        return self._first + len(self._remote_ids)

    @property
    def complete(self) -> bool:
        return self.num_valid_blocks == self.num_blocks

    def announce(self, message: BlocksReady) -> None:
        """Raises TransferError for a gap, a repetition, a block too many, or a list that does not fit the other."""
        if message.first_block != self.num_announced:
            raise TransferError(f"the owner announced block {message.first_block} after {self.num_announced} blocks")
        if len(message.block_ids) != len(message.checksums):
            raise TransferError(
                f"the owner sent {len(message.checksums)} checksums for {len(message.block_ids)} blocks"
            )
        if self.num_announced + len(message.block_ids) > self.num_blocks:
            raise TransferError(f"the owner announced more than the {self.num_blocks} blocks of the ticket's context")
        self._remote_ids.extend(message.block_ids)
        self._checksums.extend(message.checksums)

    def next_batch(self, max_blocks: int) -> Batch | None:
        """The next blocks to read; None while nothing new is announced. The one before must have been verified."""
        start = self.num_valid_blocks
        end = min(self.num_announced, start + max_blocks)
        if start == end:
            return None
        return Batch(
            first_block=start,
            remote_ids=tuple(self._remote_ids[start - self._first : end - self._first]),
            local_ids=self._local_ids[start:end],
            checksums=tuple(self._checksums[start - self._first : end - self._first]),
        )

    def landed(self, batch: Batch, num_right: int) -> None:
        """Take note of a batch that was read: so many leading blocks of it are what was sent. Raises ChecksumMismatch if not
        all are."""
        self.num_valid_blocks += num_right
        if num_right < len(batch.local_ids):
            raise ChecksumMismatch(
                f"block {batch.first_block + num_right} of {self.num_blocks} is not what its owner sent: "
                "damaged on the way, or its memory was reused"
            )
