"""KVLayout: everything that changes what the bytes of a KV block mean.

A block is one contiguous piece that holds all layers of `block_size` tokens:

    [num_layers, 2, num_kv_heads, block_size, head_dim]        index 0 of the second axis is K, 1 is V

so that it is one descriptor to transfer, offload, checksum or write. A page is its last two axes; the page format says in
which order their elements lie: "plain" as the axes say, "bf16-tiled" as CPUs multiply them (kernels/kv_cache.py has both).
Two nodes exchange KV only if their fingerprints are equal; the error names the fields that differ.
"""

from functools import cached_property
from typing import Annotated, Literal

import msgspec
from blake3 import blake3

from protocol.errors import LayoutMismatch
from protocol.wire import WIRE_VERSION

KVDtype = Literal["float32", "bfloat16", "float16"]
PageFormat = Literal["plain", "bf16-tiled"]
DTYPE_BYTES: dict[KVDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]


class KVLayout(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The layout of one worker's KV blocks. `model` names the weights by content, not by path."""

    model: Text
    revision: Text
    dtype: KVDtype
    num_layers: Positive
    num_kv_heads: Positive
    head_dim: Positive
    block_size: Positive
    rope: Text
    quantization: Text = "none"
    page_format: PageFormat = "plain"
    tp_size: Positive = 1
    tp_rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    wire_version: int = WIRE_VERSION

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """(num_layers, 2, num_kv_heads, block_size, head_dim)"""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        elements = self.num_layers * 2 * self.num_kv_heads * self.block_size * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        return self.block_bytes // self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens, the last one possibly partial."""
        return -(-num_tokens // self.block_size)

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits over all fields, by name: the same on every machine and in every field order."""
        return _digest(self, frozenset())

    @cached_property
    def identity(self) -> str:
        """Like the fingerprint, without what only says how a worker holds its share (TP, wire version).

        Roots the block hashes, so that workers of different TP degree agree on the names of blocks.
        """
        return _digest(self, frozenset({"tp_size", "tp_rank", "wire_version"}))

    def differences(self, other: "KVLayout") -> list[str]:
        """Human-readable "field: ours != theirs" lines, empty if the layouts are the same."""
        return [
            f"{name}: {getattr(self, name)!r} != {getattr(other, name)!r}"
            for name in self.__struct_fields__
            if getattr(self, name) != getattr(other, name)
        ]

    def check_compatible(self, other: "KVLayout", peer: str) -> None:
        """Raise LayoutMismatch, naming the differing fields, unless blocks of `peer` can be read as ours."""
        differences = self.differences(other)
        if differences:
            raise LayoutMismatch(f"KV of {peer} cannot be used here: {'; '.join(differences)}")


def _digest(layout: KVLayout, without: frozenset[str]) -> str:
    hasher = blake3()
    for name in sorted(set(layout.__struct_fields__) - without):
        hasher.update(f"{name}={getattr(layout, name)!r}\n".encode())
    return hasher.hexdigest(length=16)
