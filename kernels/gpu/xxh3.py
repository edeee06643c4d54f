"""XXH3-64 of many KV blocks side by side, equal to the host's bit for bit; kernels/block_checksum.py has the reference.

The algorithm (its specification: github.com/Cyan4973/xxHash, doc/xxhash_spec.md, "XXH3 Algorithm", inputs beyond 240
bytes) reads stripes of 64 bytes into eight accumulators, and after every 16 stripes, a section of 1024 bytes here,
scrambles them. What a section adds does not depend on the accumulators, only scrambling does. So two kernels:

1. `section_sums_kernel`, one program for some sections of a block, adds up each section's stripes. It reads all the bytes,
   from as many programs as there are, and leaves 64 bytes of each 1024.
2. `fold_sections_kernel`, one program for some blocks, walks over the sections' sums in order and scrambles, then adds the
   stripes after the last whole section and mixes the accumulators into the checksum.

All sums and products are those of 64-bit unsigned integers and wrap around.
"""

import functools

import torch
import triton
import triton.language as tl

from kernels.gpu.tuning import LaunchConfig, launch_config

SUMS_DEFAULT = LaunchConfig(num_warps=4, sizes={"SECTIONS": 8})
"""8 KiB a program: four accesses of 16 bytes in flight for each of 128 threads."""

FOLD_DEFAULT = LaunchConfig(num_warps=1, sizes={"BLOCKS": 4})
"""One accumulator a thread: the walk is a chain of dependent products, so what counts is how many warps walk at once."""

SECTION_BYTES = 1024
_VECTOR_BYTES = 16

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""The default secret, which a seed of 0 leaves as it is."""
_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2, _PRIME64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_PRIME64_4, _PRIME64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_START = (_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1)

# What the kernels read of the secret, as 64-bit words in one table: where each part starts.
_STRIPE_WORDS = tl.constexpr(0)  # [23]: stripe s of a section has those from s on
_LAST_STRIPE_WORDS = tl.constexpr(23)  # [8]
_SCRAMBLE_WORDS = tl.constexpr(31)  # [8]
_MERGE_WORDS = tl.constexpr(39)  # [8]
_START_WORDS = tl.constexpr(47)  # [8]: not of the secret; the accumulators' first values


@functools.lru_cache(maxsize=16)
def _words(device: torch.device) -> torch.Tensor:
    """The table, [55] int64. It stays for the life of the process."""

    def secret(start: int, count: int) -> list[int]:
        return [int.from_bytes(_SECRET[start + 8 * i : start + 8 * i + 8], "little") for i in range(count)]

    words = [*secret(0, 23), *secret(121, 8), *secret(128, 8), *secret(11, 8), *_START]
    data = b"".join(word.to_bytes(8, "little") for word in words)
    return torch.frombuffer(bytearray(data), dtype=torch.int64).to(device)


@triton.jit
def _product_of_halves(x: tl.tensor) -> tl.tensor:
    """The lower 32 bits times the upper 32 bits."""
    return x.to(tl.uint32).to(tl.uint64) * (x >> 32)


@triton.jit
def section_sums_kernel(
    blocks_ptr: tl.tensor,  # int64 words, [num_blocks, block_pairs * 2]
    block_ids_ptr: tl.tensor,  # [num_checksums]
    words_ptr: tl.tensor,  # int64
    sums_ptr: tl.tensor,  # int64, [num_checksums, num_sections, 8]
    block_pairs: tl.tensor,
    num_sections: tl.tensor,
    groups_per_block: tl.tensor,
    SECTIONS: tl.constexpr,
) -> None:
    """Program (checksum, group of SECTIONS sections): what each section adds to the accumulators."""
    checksum = tl.program_id(0) // groups_per_block
    first = tl.program_id(0) % groups_per_block * SECTIONS
    block = blocks_ptr + tl.load(block_ids_ptr + checksum).to(tl.int64) * block_pairs * 2
    offsets = tl.arange(0, SECTIONS * 128)
    data = tl.load(block + first * 128 + offsets, mask=first + offsets // 128 < num_sections, other=0)
    keys = tl.load(words_ptr + offsets % 128 // 8 + offsets % 8)  # stripe + lane
    mixed = _product_of_halves(data.to(tl.uint64, bitcast=True) ^ keys.to(tl.uint64, bitcast=True))
    # Each lane also gets the neighbour's data as it is: lanes 0 and 1, 2 and 3, ... change places.
    even, odd = tl.split(tl.reshape(data.to(tl.uint64, bitcast=True), (SECTIONS, 16, 4, 2)))
    added = tl.reshape(mixed, (SECTIONS, 16, 4, 2)) + tl.join(odd, even)
    sums = tl.reshape(tl.sum(added, axis=1), (SECTIONS * 8,))
    places = tl.arange(0, SECTIONS * 8)
    out = sums_ptr + (checksum.to(tl.int64) * num_sections + first) * 8 + places
    tl.store(out, sums.to(tl.int64, bitcast=True), mask=first + places // 8 < num_sections)


@triton.jit
def _add_stripe(state: tl.tensor, data_ptr: tl.tensor, key: tl.tensor, lane: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """state with one stripe added, where the mask says so; data_ptr points to each lane's 8 bytes."""
    data = tl.load(data_ptr, mask=mask, other=0).to(tl.uint64, bitcast=True)
    other = tl.load(data_ptr - lane + (lane ^ 1), mask=mask, other=0).to(tl.uint64, bitcast=True)
    added = other + _product_of_halves(data ^ key.to(tl.uint64, bitcast=True))
    return tl.where(mask, state + added, state)


@triton.jit
def fold_sections_kernel(
    blocks_ptr: tl.tensor,  # int64 words, [num_blocks, block_pairs * 2]
    block_ids_ptr: tl.tensor,  # [num_checksums]
    words_ptr: tl.tensor,  # int64
    sums_ptr: tl.tensor,  # int64, [num_checksums, num_sections, 8]
    checksums_ptr: tl.tensor,  # int64, [num_checksums]
    num_checksums: tl.tensor,
    block_pairs: tl.tensor,
    num_sections: tl.tensor,
    num_stripes: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    """Program: BLOCKS checksums, eight accumulators each. num_stripes: after the last section, but for the very last."""
    index = tl.arange(0, BLOCKS * 8)
    lane = index % 8
    checksum = tl.program_id(0) * BLOCKS + index // 8
    mask = checksum < num_checksums
    state = tl.load(words_ptr + _START_WORDS + lane).to(tl.uint64, bitcast=True)
    scramble = tl.load(words_ptr + _SCRAMBLE_WORDS + lane).to(tl.uint64, bitcast=True)
    sums = sums_ptr + checksum.to(tl.int64) * num_sections * 8 + lane
    for section in range(0, num_sections):
        state += tl.load(sums + section * 8, mask=mask, other=0).to(tl.uint64, bitcast=True)
        state = (state ^ (state >> 47) ^ scramble) * 0x9E3779B1
    block = blocks_ptr + tl.load(block_ids_ptr + checksum, mask=mask, other=0).to(tl.int64) * block_pairs * 2 + lane
    for stripe in range(0, num_stripes):
        key = tl.load(words_ptr + _STRIPE_WORDS + stripe + lane)
        state = _add_stripe(state, block + num_sections * 128 + stripe * 8, key, lane, mask)
    state = _add_stripe(state, block + block_pairs * 2 - 8, tl.load(words_ptr + _LAST_STRIPE_WORDS + lane), lane, mask)
    state ^= tl.load(words_ptr + _MERGE_WORDS + lane).to(tl.uint64, bitcast=True)
    left, right = tl.split(tl.reshape(state, (BLOCKS, 4, 2)))
    merged = tl.sum((left * right) ^ tl.umulhi(left, right), axis=1)
    merged += (block_pairs * 16).to(tl.uint64) * 0x9E3779B185EBCA87
    merged = (merged ^ (merged >> 37)) * 0x165667919E3779F9
    merged = merged ^ (merged >> 32)
    place = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(checksums_ptr + place, merged.to(tl.int64, bitcast=True), mask=place < num_checksums)


def block_checksums(cache: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """As kernels.block_checksum.block_checksums, which has checked shapes."""
    block_bytes = cache[0].numel() * cache.element_size()
    if block_bytes % _VECTOR_BYTES or cache.data_ptr() % _VECTOR_BYTES:
        raise ValueError(f"blocks of {block_bytes} bytes: sizes and addresses must be multiples of {_VECTOR_BYTES}")
    num_checksums, num_sections = len(block_ids), (block_bytes - 1) // SECTION_BYTES
    checksums = torch.empty(num_checksums, dtype=torch.int64, device=cache.device)
    if not num_checksums:
        return checksums
    words, blocks = _words(cache.device), cache.view(-1).view(torch.uint8).view(torch.int64)
    sums = torch.empty(num_checksums, max(num_sections, 1), 8, dtype=torch.int64, device=cache.device)
    if num_sections:
        config = launch_config("xxh3_sums", cache.device, SUMS_DEFAULT, block_bytes=block_bytes)
        groups = triton.cdiv(num_sections, config.sizes["SECTIONS"])
        section_sums_kernel[(num_checksums * groups,)](
            *(blocks, block_ids, words, sums, block_bytes // _VECTOR_BYTES, num_sections, groups),
            SECTIONS=config.sizes["SECTIONS"],
            num_warps=config.num_warps,
        )
    config = launch_config("xxh3_fold", cache.device, FOLD_DEFAULT, block_bytes=block_bytes)
    fold_sections_kernel[(triton.cdiv(num_checksums, config.sizes["BLOCKS"]),)](
        *(blocks, block_ids, words, sums, checksums, num_checksums, block_bytes // _VECTOR_BYTES, num_sections),
        (block_bytes - 1 - num_sections * SECTION_BYTES) // 64,
        BLOCKS=config.sizes["BLOCKS"],
        num_warps=config.num_warps,
    )
    return checksums
