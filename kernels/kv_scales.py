"""KVScales: what one layer's cached keys and values were divided by when they were written."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVScales:
    """Per-tensor scales of a quantised KV cache: the cache holds key / scale, and attention multiplies it back.

    A cache of 8-bit floats (e4m3, at most 448) needs them where keys or values are larger than that, or much smaller
    than 1; 1.0 leaves them as they are. Raises ValueError for a scale that is not above 0.
    """

    key: float = 1.0
    value: float = 1.0

    def __post_init__(self) -> None:
        if not (self.key > 0 and self.value > 0):
            raise ValueError(f"KV scales must be above 0, got {self}")


UNSCALED = KVScales()
