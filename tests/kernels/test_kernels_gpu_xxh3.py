"""XXH3-64 on a GPU: equal to the host library's, bit for bit."""

import pytest
import torch
from ahead_of_time import CompileForSm90

from kernels.block_checksum import block_checksums as block_checksums_on
from kernels.block_checksum import block_checksums_reference
from kernels.gpu.tuning import LaunchConfig, forced
from kernels.gpu.xxh3 import block_checksums, fold_sections_kernel, section_sums_kernel

SIZES = [256, 272, 1008, 1024, 1040, 1088, 2048, 2064, 3072 + 16 * 37, 9 * 1024, 16 * 1024 + 16]
"""Bytes of a block: less than a section, at its edges, many, and stripes that do and do not end with the block."""


def random_cache(num_blocks: int, block_bytes: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(block_bytes)
    return torch.randint(0, 256, (num_blocks, block_bytes), dtype=torch.uint8, generator=generator).to(device)


@pytest.mark.parametrize("block_bytes", SIZES)
@pytest.mark.parametrize("block_ids", [[2], [5, 0, 3, 1, 4]])
def test_equals_the_host_library(block_bytes: int, block_ids: list[int], kernel_device: torch.device) -> None:
    cache = random_cache(6, block_bytes, kernel_device)
    ids = torch.tensor(block_ids, dtype=torch.int32, device=kernel_device)
    with forced("xxh3_sums", LaunchConfig(4, 1, {"SECTIONS": 2})):
        assert block_checksums(cache, ids).tolist() == block_checksums_reference(cache, ids).tolist()


@pytest.mark.parametrize("fill", [0, 255])
def test_of_constant_bytes(fill: int, kernel_device: torch.device) -> None:
    cache = torch.full((1, 2, 3, 512), fill, dtype=torch.uint8, device=kernel_device).view(torch.int16)
    ids = torch.zeros(1, dtype=torch.int64, device=kernel_device)
    assert torch.equal(block_checksums(cache, ids), block_checksums_reference(cache, ids))


def test_one_flipped_bit_changes_that_block_alone(kernel_device: torch.device) -> None:
    cache = random_cache(3, 2064, kernel_device)
    ids = torch.arange(3, dtype=torch.int32, device=kernel_device)
    before = block_checksums(cache, ids)
    cache[1, 2063] ^= 1
    assert (block_checksums(cache, ids) == before).tolist() == [True, False, True]


def test_no_blocks(kernel_device: torch.device) -> None:
    ids = torch.empty(0, dtype=torch.int32, device=kernel_device)
    assert block_checksums(random_cache(1, 256, kernel_device), ids).shape == (0,)


@pytest.mark.parametrize("cache", [torch.zeros(2, 240, dtype=torch.uint8), torch.zeros(600, 2).T])
def test_what_cannot_be_checksummed_is_refused(cache: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"at least 241 bytes|contiguous"):
        block_checksums_on(cache, torch.tensor([0]))


def test_sums_compile_to_16_byte_reads(compile_for_sm90: CompileForSm90) -> None:
    pointers = {"blocks_ptr": "*i64", "block_ids_ptr": "*i32", "words_ptr": "*i64", "sums_ptr": "*i64"}
    sizes = dict.fromkeys(("block_pairs", "num_sections", "groups_per_block"), "i32")
    resources = compile_for_sm90(section_sums_kernel, pointers | sizes, {"SECTIONS": 8})
    assert resources.spill_bytes == 0
    assert resources.registers <= 80
    assert "ld.global.v2.b64" in resources.ptx


def test_folding_compiles(compile_for_sm90: CompileForSm90) -> None:
    names = ("blocks_ptr", "block_ids_ptr", "words_ptr", "sums_ptr", "checksums_ptr")
    pointers = dict.fromkeys(names, "*i64") | {"block_ids_ptr": "*i32"}
    sizes = dict.fromkeys(("num_checksums", "block_pairs", "num_sections", "num_stripes"), "i32")
    resources = compile_for_sm90(fold_sections_kernel, pointers | sizes, {"BLOCKS": 4}, num_warps=1)
    assert resources.spill_bytes == 0
    assert resources.registers <= 64
