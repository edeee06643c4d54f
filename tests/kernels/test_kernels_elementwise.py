"""RMSNorm and the SwiGLU gate against their references, and RMSNorm against transformers' own."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels.rms_norm import fused_add_rms_norm, fused_add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.silu_mul import silu_and_mul, silu_and_mul_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-9,
}  # relative: 16-bit may round one ulp apart
SHAPES = [(1, 1), (3, 17), (17, 576), (5, 16), (200, 100), (0, 8)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    tolerance = TOLERANCE[dtype]
    actual = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(actual, rms_norm_reference(x, weight, 1e-5), atol=tolerance, rtol=tolerance)
    normed, new_residual = fused_add_rms_norm(x, residual, weight, 1e-5)
    expected, expected_residual = fused_add_rms_norm_reference(x, residual, weight, 1e-5)
    torch.testing.assert_close(normed, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(new_residual, expected_residual, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_the_numerics_of_transformers(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(96, eps=1e-6).to(dtype)
    module.weight.data = torch.randn(96).to(dtype)
    x = (torch.randn(7, 96) * 30).to(dtype)
    with torch.inference_mode():
        expected = module(x)
        torch.testing.assert_close(rms_norm_reference(x, module.weight, 1e-6), expected, atol=0, rtol=0)
        actual = rms_norm(x, module.weight, 1e-6)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rms_norm_takes_rows_that_stand_apart_and_three_dimensions() -> None:
    x, weight = torch.randn(4, 40)[:, 3:35], torch.randn(32)
    expected = rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, atol=2e-6, rtol=2e-6)
    stacked = rms_norm(x.reshape(2, 2, 32), weight, 1e-5)
    torch.testing.assert_close(stacked, expected.view(2, 2, 32), atol=2e-6, rtol=2e-6)


def test_rms_norm_checks_shapes() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        rms_norm(torch.randn(2, 8), torch.randn(7), 1e-5)
    with pytest.raises((ValueError, RuntimeError)):
        fused_add_rms_norm(torch.randn(2, 8), torch.randn(3, 8), torch.randn(8), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_and_mul(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = (torch.randn(shape[0], 2 * shape[1]) * 10).to(dtype)
    expected = silu_and_mul_reference(gate_up)
    torch.testing.assert_close(silu_and_mul(gate_up), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_silu_of_extreme_gates() -> None:
    gate = torch.tensor([[-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4]])
    actual = silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(actual, torch.nn.functional.silu(gate), atol=1e-30, rtol=2e-6)
