"""RMSNorm and the SwiGLU gate in Triton: against their references, and compiled for a GPU that is not there."""

import pytest
import torch
from ahead_of_time import CompileForSm90
from test_kernels_elementwise import TOLERANCE

from kernels.gpu import rms_norm as gpu
from kernels.gpu.silu_mul import COLUMNS, silu_and_mul, silu_and_mul_kernel
from kernels.rms_norm import fused_add_rms_norm_reference, rms_norm_reference
from kernels.silu_mul import silu_and_mul_reference

# In the interpreter bf16 is cut off rather than rounded, which two roundings in a row make visible.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SHAPES = [(1, 1), (3, 17), (17, 576), (5, 2048), (200, 100), (0, 8)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual.cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    on_device = [tensor.to(kernel_device) for tensor in (x, residual, weight)]
    assert_close(gpu.rms_norm(on_device[0], on_device[2], 1e-5), rms_norm_reference(x, weight, 1e-5))
    normed, new_residual = gpu.fused_add_rms_norm(*on_device, 1e-5)
    expected, expected_residual = fused_add_rms_norm_reference(x, residual, weight, 1e-5)
    assert_close(normed, expected)
    assert torch.equal(new_residual.cpu(), expected_residual)


@pytest.mark.parametrize("shape", [(40,), (7, 40), (3, 5, 40), (2, 3, 4, 40)])
def test_rms_norm_takes_rows_that_stand_apart(kernel_device: torch.device, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape)[..., 3:35], torch.randn(32)
    actual = gpu.rms_norm(x.to(kernel_device), weight.to(kernel_device), 1e-5)
    assert actual.is_contiguous()
    assert_close(actual, rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_and_mul(kernel_device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = torch.randn(shape[0], 2 * shape[1]).to(dtype)
    assert_close(silu_and_mul(gate_up.to(kernel_device)), silu_and_mul_reference(gate_up))


def test_silu_of_large_numbers(kernel_device: torch.device) -> None:
    gate_up = torch.tensor([[-80.0, 80.0, 0.0, 2.0, 3.0, 4.0]])
    assert_close(silu_and_mul(gate_up.to(kernel_device)), silu_and_mul_reference(gate_up))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("size", "width", "rows", "inner"), [(128, 128, 8, 32), (5120, 8192, 1, 1)])
def test_rms_norm_compiles(
    compile_for_sm90: CompileForSm90, size: int, width: int, rows: int, inner: int, add: bool
) -> None:
    resources = compile_for_sm90(
        gpu.rms_norm_kernel,
        {
            **dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "normed_ptr", "sum_ptr"), "*bf16"),
            **dict.fromkeys(("num_rows", "x_outer_stride", "x_inner_stride"), "i32"),
            "eps": "fp32",
        },
        {"INNER": inner, "SIZE": size, "WIDTH": width, "ROWS": rows, "ADD": add},
        num_warps=gpu.num_warps(width),
        divisible=["x_outer_stride", "x_inner_stride"],
    )
    assert resources.spill_bytes == 0
    assert "ld.global.v4.b32" in resources.ptx  # 16 bytes at a time


def test_silu_and_mul_compiles(compile_for_sm90: CompileForSm90) -> None:
    resources = compile_for_sm90(
        silu_and_mul_kernel,
        {**dict.fromkeys(("gate_up_ptr", "out_ptr"), "*bf16"), "intermediate": "i32", "token_stride": "i32"},
        {"COLUMNS": COLUMNS},
        divisible=["intermediate", "token_stride"],
    )
    assert resources.spill_bytes == 0
    assert "ld.global.v4.b32" in resources.ptx
