"""Stretch: consecutive blocks of one chain that were last wanted together; they have one age and one chance to come back.

A request divides its chain. What it continues and what it adds become its own stretch. A head that other
conversations begin with too, such as a system prompt, is a stretch for itself, wanted as often as all of them together.
What a conversation has left behind (an answer that was generated anew, an edited turn) is *abandoned*.
"""

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from protocol.ids import BlockHash

Kind = Literal["own", "shared", "abandoned"]

NUM_USE_LEVELS = 8
NUM_SIZE_LEVELS = 7
_NUM_COLUMNS = NUM_SIZE_LEVELS + 2
NUM_CLASSES = NUM_USE_LEVELS * _NUM_COLUMNS
"""Of stretches: how often wanted, times how much the last request added; shared and abandoned ones instead of the latter."""

FAMILIES = tuple(
    tuple(use * _NUM_COLUMNS + column for use in range(NUM_USE_LEVELS) for column in columns)
    for columns in (range(NUM_SIZE_LEVELS), (NUM_SIZE_LEVELS,), (NUM_SIZE_LEVELS + 1,))
)
"""Classes by kind of stretch."""

_USE_LEVELS = (0, 1, 2, 3, 5, 8, 16, 64)
"""A level holds what was wanted more often than that."""


@dataclass(slots=True, eq=False)
class Stretch:
    """`first_new` to `end`: positions in the chain that its last request added. `num_known`: of how many blocks of it the
    address is known, held ones included. It ends when that is 0. `due`: when it grows older than its bucket, `next_look`: when
    somebody looks; `counted_in`: the last fit of the model that it was counted in."""

    kind: Kind
    num_uses: int
    first_new: int
    end: int
    last_wanted: float
    held: dict[BlockHash, int] = field(default_factory=dict)
    num_known: int = 0
    class_id: int = 0
    bucket: int = -1
    due: float = inf
    next_look: float = inf
    counted_in: int = 0
    parked_at: BlockHash | None = None
    _by_position: list[BlockHash] = field(default_factory=list)
    _is_sorted: bool = True

    def __post_init__(self) -> None:
        self.classify()

    def classify(self) -> None:
        uses = sum(self.num_uses > level for level in _USE_LEVELS) - 1
        if self.kind == "own":
            # Levels grow fourfold: 0, 1 to 3, 4 to 15, ... blocks, whatever a block's size.
            column = min(((self.end - self.first_new).bit_length() + 1) // 2, NUM_SIZE_LEVELS - 1)
        else:
            column = NUM_SIZE_LEVELS + (self.kind == "abandoned")
        self.class_id = uses * _NUM_COLUMNS + column

    def is_continued_by(self, num_shared: int) -> bool:
        """Whether a request that shares the first `num_shared` blocks of the chain goes on with this conversation, rather than
        branching off: it has at least half of what was added last."""
        return 2 * (num_shared - self.first_new) >= self.end - self.first_new

    def hold(self, block_hash: BlockHash, position: int) -> None:
        self.held[block_hash] = position
        self._is_sorted = False

    def from_the_end(self) -> list[BlockHash]:
        """Addresses by position, the last one last; some at the end may not be held any more."""
        if not self._is_sorted:
            self._by_position = sorted(self.held, key=self.held.__getitem__)
            self._is_sorted = True
        while self._by_position and self._by_position[-1] not in self.held:
            self._by_position.pop()
        return self._by_position
