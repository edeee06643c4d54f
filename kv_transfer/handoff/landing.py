"""Landing: the blocks of one context on their way into our arena: announced, taken, proven, in that order. Pure.

    | cached | proven | taken, partly proven | announced | still to come |
                      ^ num_valid_blocks     ^ num_taken ^ num_announced  ^ num_blocks

Pieces are taken in order and may be proven in any. Everything that the owner says passes through here and is believed
only as far as the ticket allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.handoff.prefix import Prefix
from protocol.errors import ChecksumMismatch, TransferError
from protocol.transfer import BlocksReady


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks to move together: first_block is an index into the context, remote_ids are wire blocks of the owner, local_ids
    our KV blocks."""

    first_block: int
    remote_ids: tuple[int, ...]
    local_ids: tuple[int, ...]
    checksums: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.local_ids)


class Landing:
    """`local_block_ids` are our blocks for the whole context; the first `num_cached_blocks` hold it already."""

    def __init__(self, local_block_ids: Sequence[int], num_cached_blocks: int) -> None:
        self._local_ids = tuple(local_block_ids)
        self._remote_ids: list[int] = []
        self._checksums: list[int] = []
        self._proven = Prefix(num_cached_blocks)
        self.num_cached_blocks = num_cached_blocks
        self.num_taken = num_cached_blocks
        self.damaged: int | None = None
        """The block of the context that was found not to be what its owner had announced, the first to be found."""

    @property
    def num_blocks(self) -> int:
        return len(self._local_ids)

    @property
    def num_announced(self) -> int:
        return self.num_cached_blocks + len(self._remote_ids)

    @property
    def num_valid_blocks(self) -> int:
        """Leading blocks whose contents are proven."""
        return self._proven.end

    @property
    def complete(self) -> bool:
        return self.num_valid_blocks == self.num_blocks

    @property
    def wanted_ids(self) -> tuple[int, ...]:
        """Our KV blocks for all that is not cached."""
        return self._local_ids[self.num_cached_blocks :]

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

    def take(self, num_blocks: int) -> Piece:
        """The next blocks that are announced and not taken, at most `num_blocks`."""
        start = self.num_taken
        self.num_taken = min(self.num_announced, start + num_blocks)
        first, last = start - self.num_cached_blocks, self.num_taken - self.num_cached_blocks
        return Piece(
            first_block=start,
            remote_ids=tuple(self._remote_ids[first:last]),
            local_ids=self._local_ids[start : self.num_taken],
            checksums=tuple(self._checksums[first:last]),
        )

    def prove(self, piece: Piece, num_right: int) -> None:
        """The first `num_right` blocks of a piece are what was sent. Raises ChecksumMismatch if those are not all."""
        self._proven.add(piece.first_block, num_right)
        if num_right < piece.num_blocks:
            if self.damaged is None:
                self.damaged = piece.first_block + num_right
            raise ChecksumMismatch(
                f"block {piece.first_block + num_right} of {self.num_blocks} is not what its owner sent: "
                "damaged on the way, or its memory was reused"
            )
