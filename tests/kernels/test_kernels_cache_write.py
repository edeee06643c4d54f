"""Rotary embedding and the write into the paged cache: against transformers and the references."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kernels.kv_cache import tile_pages
from kernels.kv_write import write_kv, write_kv_reference
from kernels.rotary import apply_rotary, rope_and_write_kv, rope_and_write_kv_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}  # 16-bit may round one ulp apart
HEADS, KV_HEADS, BLOCK_SIZE, NUM_BLOCKS = 6, 2, 8, 40


def make_step(
    num_tokens: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as slices of one fused projection, the cache, and slots."""
    torch.manual_seed(num_tokens)
    widths = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    parts = torch.split(torch.randn(num_tokens, sum(widths)).to(dtype), widths, dim=1)
    query, key, value = (part.view(num_tokens, part.shape[1] // head_dim, head_dim) for part in parts)
    cache = torch.randn(NUM_BLOCKS, 3, 2, KV_HEADS, BLOCK_SIZE, head_dim).to(dtype)
    return query, key, value, cache, torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:num_tokens]


def angles(num_tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.rand(num_tokens, half) * 100
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17, 300])
def test_write_kv_puts_each_token_in_its_slot_and_nothing_else(dtype: torch.dtype, num_tokens: int) -> None:
    _, key, value, cache, slots = make_step(num_tokens, 24, dtype)
    expected = cache.clone()
    for token, slot in enumerate(slots.tolist()):
        expected[slot // BLOCK_SIZE, 1, 0, :, slot % BLOCK_SIZE] = key[token]
        expected[slot // BLOCK_SIZE, 1, 1, :, slot % BLOCK_SIZE] = value[token]
    by_reference = cache.clone()
    write_kv(key, value, cache, 1, slots)
    write_kv_reference(key, value, by_reference, 1, slots)
    assert torch.equal(cache, expected)
    assert torch.equal(by_reference, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (24, 12), (64, 32), (64, 8), (256, 128)])
@pytest.mark.parametrize("num_tokens", [1, 3, 17, 100])
def test_rope_and_write(dtype: torch.dtype, head_dim: int, half: int, num_tokens: int) -> None:
    query, key, value, cache, slots = make_step(num_tokens, head_dim, dtype)
    cos, sin = angles(num_tokens, half)
    expected_cache = cache.clone()
    expected = rope_and_write_kv_reference(query, key, value, cos, sin, expected_cache, 2, slots)
    actual = rope_and_write_kv(query, key, value, cos, sin, cache, 2, slots)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(cache, expected_cache, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (48, 5), (64, 32), (80, 16), (256, 128)])
@pytest.mark.parametrize("num_tokens", [1, 3, 100])
def test_rope_and_write_to_tiled_pages(head_dim: int, half: int, num_tokens: int) -> None:
    query, key, value, cache, slots = make_step(num_tokens, head_dim, torch.bfloat16)
    plain = cache.view(NUM_BLOCKS // 4, 3, 2, KV_HEADS, 4 * BLOCK_SIZE, head_dim)
    tiled, by_reference = tile_pages(plain), tile_pages(plain)
    cos, sin = angles(num_tokens, half)
    expected = rope_and_write_kv(query, key, value, cos, sin, plain, 2, slots)
    actual = rope_and_write_kv(query, key, value, cos, sin, tiled, 2, slots, "bf16-tiled")
    rope_and_write_kv_reference(query, key, value, cos, sin, by_reference, 2, slots, "bf16-tiled")
    assert torch.equal(actual, expected)
    assert torch.equal(tiled, tile_pages(plain))
    torch.testing.assert_close(by_reference, tiled, atol=2**-7, rtol=2**-7)


@pytest.mark.parametrize("num_tokens", [0, 1, 33])
def test_write_kv_to_tiled_pages(num_tokens: int) -> None:
    _, key, value, cache, slots = make_step(num_tokens, 48, torch.bfloat16)
    plain = cache.view(NUM_BLOCKS // 2, 3, 2, KV_HEADS, 2 * BLOCK_SIZE, 48)
    tiled, by_reference = tile_pages(plain), tile_pages(plain)
    write_kv(key, value, plain, 1, slots)
    write_kv(key, value, tiled, 1, slots, "bf16-tiled")
    write_kv_reference(key, value, by_reference, 1, slots, "bf16-tiled")
    assert torch.equal(tiled, tile_pages(plain))
    assert torch.equal(by_reference, tiled)


def test_rotary_has_the_convention_of_transformers() -> None:
    query, key, *_ = make_step(17, 64, torch.float32)
    cos, sin = angles(17, 32)
    whole_cos, whole_sin = torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    expected = apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], whole_cos, whole_sin)
    for actual, theirs in zip(apply_rotary(query, key, cos, sin), expected, strict=True):
        torch.testing.assert_close(actual, theirs[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("slot", [-1, NUM_BLOCKS * BLOCK_SIZE])
def test_slot_outside_the_cache_is_refused_and_nothing_written(slot: int) -> None:
    query, key, value, cache, slots = make_step(3, 16, torch.bfloat16)
    before = cache.clone()
    slots[2] = slot
    with pytest.raises(IndexError):
        rope_and_write_kv(query, key, value, *angles(3, 8), cache, 0, slots)
    with pytest.raises(IndexError):
        write_kv(key, value, cache, 0, slots)
    with pytest.raises(IndexError):
        write_kv_reference(key, value, cache, 0, slots)
    assert torch.equal(cache, before)


def test_shapes_are_checked() -> None:
    query, key, value, cache, slots = make_step(3, 16, torch.float32)
    cos, sin = angles(3, 8)
    with pytest.raises(ValueError, match="layer 3"):
        write_kv(key, value, cache, 3, slots)
    with pytest.raises(ValueError, match="do not fit cache"):
        write_kv(key[:, :1], value[:, :1], cache, 0, slots)
    with pytest.raises(ValueError, match="slots"):
        write_kv(key, value, cache, 0, slots.int())
    with pytest.raises(ValueError, match="do not fit"):
        rope_and_write_kv(query, key, value, cos[:2], sin[:2], cache, 0, slots)
    with pytest.raises(ValueError, match="do not fit"):
        rope_and_write_kv(query, key, value, cos.repeat(1, 2), sin.repeat(1, 2), cache, 0, slots)
