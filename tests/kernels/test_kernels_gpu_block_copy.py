"""Copying KV blocks on a GPU: equal to torch's index operations, to the byte."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from ahead_of_time import CompileForSm90

from kernels.block_copy import (
    copy_blocks_reference,
    gather_blocks,
    gather_blocks_reference,
    scatter_blocks,
    scatter_blocks_reference,
)
from kernels.gpu.block_copy import copy_blocks, copy_blocks_kernel
from kernels.gpu.tuning import LaunchConfig, forced

NUM_BLOCKS = 7
BLOCK_SHAPES = [(16,), (48,), (2, 3, 2, 8, 4), (1040,), (2, 2, 3, 8)]
DTYPES = [torch.uint8, torch.float16, torch.bfloat16, torch.float32]


def make_cache(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 100, (NUM_BLOCKS, *shape), generator=generator).to(dtype).to(device)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*product(BLOCK_SHAPES[:2], DTYPES), *zip(BLOCK_SHAPES[2:], DTYPES[1:], strict=True)]
)
@pytest.mark.parametrize("block_ids", [[3], [6, 0, 2, 5], list(range(NUM_BLOCKS)), []])
def test_gather_then_scatter(
    shape: tuple[int, ...], dtype: torch.dtype, block_ids: list[int], kernel_device: torch.device
) -> None:
    cache = make_cache(shape, dtype, kernel_device)
    ids = torch.tensor(block_ids, dtype=torch.int32, device=kernel_device)
    staging, expected = (torch.zeros(len(ids), *shape, dtype=dtype, device=kernel_device) for _ in range(2))
    gather_blocks_reference(cache, ids, expected)
    with forced("block_copy", LaunchConfig(4, 1, {"TILE_WORDS": 128})):
        copy_blocks(cache, staging, ids, None)
    assert torch.equal(staging, expected)
    other = torch.full_like(cache, 7)
    expected_cache = other.clone()
    scatter_blocks_reference(staging, expected_cache, ids)
    copy_blocks(staging, other, None, ids)
    assert torch.equal(other, expected_cache)


def test_copy_inside_the_cache(kernel_device: torch.device) -> None:
    cache = make_cache((3, 16), torch.float32, kernel_device)
    expected = cache.clone()
    sources, destinations = (torch.tensor(ids, device=kernel_device) for ids in ([0, 1, 5], [6, 2, 3]))
    copy_blocks_reference(expected, sources, destinations)
    copy_blocks(cache, cache, sources, destinations)
    assert torch.equal(cache, expected)


def test_an_id_of_minus_one_copies_nothing(kernel_device: torch.device) -> None:
    cache = make_cache((32,), torch.float16, kernel_device)
    ids = torch.tensor([2, -1, 4], dtype=torch.int32, device=kernel_device)
    staging = torch.full((3, 32), -5.0, dtype=torch.float16, device=kernel_device)
    copy_blocks(cache, staging, ids, None)
    assert torch.equal(staging[::2], cache[[2, 4]])
    assert bool((staging[1] == -5.0).all())
    before = cache.clone()
    copy_blocks(staging, cache, None, ids)
    assert torch.equal(cache, before)


def test_a_block_of_no_whole_number_of_vectors_is_refused(kernel_device: torch.device) -> None:
    cache = torch.zeros(2, 12, dtype=torch.float16, device=kernel_device)
    with pytest.raises(ValueError, match="24 bytes"):
        copy_blocks(cache, cache.clone(), torch.tensor([0], device=kernel_device), None)


@pytest.mark.parametrize(
    ("staging", "ids"),
    [
        (torch.zeros(2, 8), torch.tensor([0])),
        (torch.zeros(1, 9), torch.tensor([0])),
        (torch.zeros(1, 8, dtype=torch.float16), torch.tensor([0])),
        (torch.zeros(8, 1).T, torch.tensor([[0]])),
        (torch.zeros(1, 8), torch.tensor([0.0])),
    ],
)
@pytest.mark.parametrize("operation", [lambda c, i, s: gather_blocks(c, i, s), lambda c, i, s: scatter_blocks(s, c, i)])
def test_what_does_not_fit_is_refused(
    staging: torch.Tensor, ids: torch.Tensor, operation: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
) -> None:
    with pytest.raises(ValueError, match=r"block ids|staging"):
        operation(torch.zeros(4, 8), ids, staging)


@pytest.mark.parametrize(("source_ids", "destination_ids"), [("*i32", None), (None, "*i32"), ("*i64", "*i64")])
def test_compiles_to_16_byte_accesses(
    source_ids: str | None, destination_ids: str | None, compile_for_sm90: CompileForSm90
) -> None:
    signature = {"source_ptr": "*i64", "destination_ptr": "*i64", "block_pairs": "i32", "tiles_per_block": "i32"}
    absent: dict[str, int | None] = {}
    for name, kind in (("source_ids_ptr", source_ids), ("destination_ids_ptr", destination_ids)):
        if kind is None:
            absent[name] = None
        else:
            signature[name] = kind
    sizes = {"HAS_SOURCE_IDS": source_ids is not None, "HAS_DESTINATION_IDS": destination_ids is not None}
    resources = compile_for_sm90(copy_blocks_kernel, signature, {**absent, **sizes, "TILE_WORDS": 1024})
    assert resources.spill_bytes == 0
    assert resources.registers <= 64
    assert resources.shared_bytes == 0
    assert resources.ptx.count("ld.global.v2.b64") == resources.ptx.count("st.global.v2.b64") == 4
