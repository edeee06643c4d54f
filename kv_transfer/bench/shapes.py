"""Shapes: which blocks move in one transfer. Pure."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Placement = Literal["contiguous", "scattered"]


@dataclass(frozen=True, slots=True)
class Shape:
    """source[i] of one arena goes to destination[i] of the other's."""

    num_blocks: int
    placement: Placement
    source: tuple[int, ...]
    destination: tuple[int, ...]


def make_shapes(num_blocks: Sequence[int], seed: int = 0) -> list[Shape]:
    """Contiguous and scattered transfers of every size, within arenas that just hold the largest.

    Scattered: both ends are shuffled, as allocators leave them after a while, so hardly two neighbours stay together.
    """
    generator = random.Random(seed)  # noqa: S311  # no secret: a shuffle that is the same every time
    arena = range(max(num_blocks))
    shapes = []
    for count in sorted(set(num_blocks)):
        ids = tuple(range(count))
        shapes.append(Shape(count, "contiguous", ids, ids))
        if count > 1:
            shapes.append(
                Shape(count, "scattered", tuple(generator.sample(arena, count)), tuple(generator.sample(arena, count)))
            )
    return shapes
