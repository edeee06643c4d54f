"""The packed linear layer against a product in float64."""

import pytest
import torch

from kernels import native_library
from kernels.linear import PackedLinear

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}  # absolute, for outputs of about 1 to 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 2), (31, 7), (33, 64), (96, 576), (50, 1537), (65, 3000)]
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(dtype: torch.dtype, out_features: int, in_features: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    layer = PackedLinear(weight, bias)
    for num_tokens in (0, 1, 2, 3, 11, 12, 13, 17, 32, 257):
        x = torch.randn(num_tokens, in_features).to(dtype)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        actual = layer(x)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_wide_results_are_not_rounded_to_the_weights_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(50, 576).to(dtype), torch.randn(5, 576).to(dtype)
    bias = torch.randn(50).to(dtype)
    actual = PackedLinear(weight, bias, wide=True)(x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), x.double() @ weight.double().T + bias.double(), atol=1e-3, rtol=0)


def test_rows_may_stand_apart() -> None:
    weight, wide = torch.randn(40, 32), torch.randn(5, 50)
    expected = wide[:, 9:41] @ weight.T
    torch.testing.assert_close(PackedLinear(weight)(wide[:, 9:41]), expected, atol=1e-5, rtol=1e-5)


def test_float32_is_as_exact_as_torch() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(300, 4096) / 64, torch.randn(20, 4096)
    expected = x.double() @ weight.double().T
    error = (PackedLinear(weight)(x).double() - expected).square().mean().sqrt()
    error_of_torch = (torch.nn.functional.linear(x, weight).double() - expected).square().mean().sqrt()
    assert error < 2 * error_of_torch


@pytest.mark.skipif(not native_library.status().available, reason="only the C++ path packs")
def test_what_is_packed() -> None:
    assert PackedLinear(torch.randn(8, 8)).packed
    assert PackedLinear(torch.randn(8, 8).bfloat16()).packed
    assert not PackedLinear(torch.randn(8, 7).bfloat16()).packed  # pairs of bf16 need an even number of inputs
    assert not PackedLinear(torch.randn(8, 8).half()).packed


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="weight must be"):
        PackedLinear(torch.randn(8))
    with pytest.raises(ValueError, match="bias"):
        PackedLinear(torch.randn(8, 4), torch.randn(4))
    with pytest.raises((ValueError, RuntimeError)):
        PackedLinear(torch.randn(8, 4))(torch.randn(2, 5))
