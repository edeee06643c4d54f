"""The arena: one region, zero-copy views, checksums that anyone can recompute."""

import os

import pytest
import torch
import xxhash

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.checksum import checksums
from protocol.checksum import checksum
from protocol.errors import ConfigError


def test_all_views_are_the_same_memory() -> None:
    with HostArena(3, 5) as arena:
        arena.block(1)[:] = b"abcde"
        assert bytes(arena.memory) == b"\0" * 5 + b"abcde" + b"\0" * 5
        tensor = arena.tensor()
        assert tensor.dtype == torch.uint8
        assert tensor.shape == (15,)
        assert tensor.data_ptr() == arena.address
        tensor[10] = 7
        assert arena.block(2)[0] == 7
        del tensor


@pytest.mark.parametrize("block_id", [-1, 3])
def test_blocks_outside_of_the_arena_do_not_exist(block_id: int) -> None:
    with HostArena(3, 5) as arena, pytest.raises(IndexError):
        arena.block(block_id)


def test_a_tensor_outlives_close() -> None:
    arena = HostArena(2, 4096)
    tensor = arena.tensor()
    tensor.fill_(9)
    arena.close()
    arena.close()
    assert int(tensor.sum()) == 9 * 8192


def test_the_size_is_sealed() -> None:
    with HostArena(1, 4096) as arena, pytest.raises(PermissionError):
        os.ftruncate(arena.fd, 0)


def test_too_much_memory_is_a_config_error_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="cache") as failed:
        HostArena(1 << 40, 1 << 20)
    assert failed.value.param == "cache.memory"


def test_checksums_are_the_low_63_bits_of_xxh3() -> None:
    with HostArena(4, 100) as arena:
        for block_id in range(4):
            arena.block(block_id)[:] = bytes([block_id]) * 100
        expected = tuple(xxhash.xxh3_64_intdigest(bytes([i]) * 100) & ((1 << 63) - 1) for i in (3, 0, 3))
        assert checksums(arena, [3, 0, 3]) == expected
    assert checksum(b"") == 3244421341483603138
