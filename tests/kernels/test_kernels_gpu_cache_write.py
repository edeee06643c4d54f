"""Rotary embedding and the cache write in Triton: against their references, and compiled for a GPU that is not there."""

import pytest
import torch
from ahead_of_time import CompileForSm90
from test_kernels_cache_write import BLOCK_SIZE, KV_HEADS, NUM_BLOCKS, TOLERANCE, angles, make_step

from kernels.gpu import rope_kv_write as gpu
from kernels.kv_scales import KVScales
from kernels.kv_write import write_kv_reference
from kernels.rotary import rope_and_write_kv_reference

LAYER = 2
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIGNATURE = {
    **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "rotated_ptr", "cache_ptr"), "*bf16"),
    **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
    "slots_ptr": "*i64",
    **dict.fromkeys(("query_token_stride", "query_head_stride", "key_token_stride", "key_head_stride"), "i32"),
    **dict.fromkeys(("value_token_stride", "value_head_stride", "value_offset", "head_stride", "token_stride"), "i32"),
    "block_stride": "i64",
    "num_slots": "i32",
    **dict.fromkeys(("key_scale", "value_scale"), "fp32"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "half"), [(24, 12), (64, 8), (80, 40), (256, 128)])
def test_rope_and_write(kernel_device: torch.device, dtype: torch.dtype, head_dim: int, half: int) -> None:
    query, key, value, cache, slots = make_step(5, head_dim, dtype)
    cos, sin = angles(5, half)
    expected_cache = cache.clone()
    expected = rope_and_write_kv_reference(query, key, value, cos, sin, expected_cache, LAYER, slots)
    cache = cache.to(kernel_device)
    tensors = [tensor.to(kernel_device) for tensor in (query, key, value, cos, sin)]
    actual = gpu.rope_and_write_kv(*tensors, cache, LAYER, slots.to(kernel_device))
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.cpu(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(cache.cpu(), expected_cache, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_write_kv(kernel_device: torch.device, dtype: torch.dtype, num_tokens: int) -> None:
    _, key, value, cache, slots = make_step(num_tokens, 40, dtype)
    expected = cache.clone()
    write_kv_reference(key, value, expected, LAYER, slots)
    cache = cache.to(kernel_device)
    gpu.write_kv(key.to(kernel_device), value.to(kernel_device), cache, LAYER, slots.to(kernel_device))
    assert torch.equal(cache.cpu(), expected)


def test_slots_outside_the_cache_are_not_written(kernel_device: torch.device) -> None:
    query, key, value, cache, slots = make_step(4, 16, torch.float32)
    cos, sin = angles(4, 8)
    expected_cache = cache.clone()
    kept = [1, 3]
    write = (key[kept], value[kept], cos[kept], sin[kept], expected_cache, LAYER, slots[kept])
    rope_and_write_kv_reference(query[kept], *write)
    slots[0], slots[2] = -1, NUM_BLOCKS * BLOCK_SIZE
    cache = cache.to(kernel_device)
    tensors = [tensor.to(kernel_device) for tensor in (query, key, value, cos, sin)]
    rotated = gpu.rope_and_write_kv(*tensors, cache, LAYER, slots.to(kernel_device))
    torch.testing.assert_close(cache.cpu(), expected_cache, atol=1e-6, rtol=1e-6)
    assert rotated.isfinite().all()


def test_quantised_cache_holds_what_was_divided_and_cut(kernel_device: torch.device) -> None:
    """Quotients that e4m3 has exactly, because the interpreter rounds others in its own way; and two that it has not."""
    _, key, value, cache, slots = make_step(3, 16, torch.float16)
    exact = torch.arange(-24, 24).to(torch.float16).view(KV_HEADS, -1) / 2  # at most 4 significant bits up to 8
    key = (exact[None, :, :16].clamp(-8, 8) * 0.25).expand(3, -1, -1).clone()
    value = (exact[None, :, :16].clamp(-8, 8) * 4).expand(3, -1, -1).clone()
    key[0, 0, 0], value[2, 1, 5] = 1e4, -1e4
    scales = KVScales(key=0.25, value=4.0)
    expected = cache.to(torch.float8_e4m3fn)
    actual = expected.to(kernel_device, copy=True)
    write_kv_reference(key, value, expected, LAYER, slots, scales=scales)
    gpu.write_kv(key.to(kernel_device), value.to(kernel_device), actual, LAYER, slots.to(kernel_device), scales)
    assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))
    stored = expected[slots // BLOCK_SIZE, LAYER, :, :, slots % BLOCK_SIZE].float()  # [tokens, 2, kv_heads, head_dim]
    assert (stored[0, 0, 0, 0], stored[2, 1, 1, 5]) == (448, -448)
    torch.testing.assert_close(stored[1, 0] * scales.key, key[1].float())
    torch.testing.assert_close(stored[1, 1] * scales.value, value[1].float())


def test_scales_are_above_zero() -> None:
    for key, value in ((0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="above 0"):
            KVScales(key, value)


@pytest.mark.parametrize("cached", ["*bf16", "*fp8e4nv"])
@pytest.mark.parametrize(("head_dim", "group", "half"), [(64, 4, 32), (128, 4, 64), (256, 8, 128), (128, 0, 0)])
def test_compiles(compile_for_sm90: CompileForSm90, head_dim: int, group: int, half: int, cached: str) -> None:
    resources = compile_for_sm90(
        gpu.rope_and_write_kv_kernel,
        {**SIGNATURE, "cache_ptr": cached},
        {"GROUP": group, "GROUP_WIDTH": max(group, 1), "HEAD_DIM": head_dim, "WIDTH": head_dim, "HALF": half}
        | {"HALF_WIDTH": max(half, 1), "BLOCK_SIZE": 16, "LIMIT": 448 if cached == "*fp8e4nv" else 0},
        num_warps=gpu.num_warps(group, head_dim),
        divisible=[name for name in SIGNATURE if name.endswith(("stride", "offset"))],
    )
    assert resources.spill_bytes == 0
    assert resources.registers <= 64
