"""The packed linear layer against a product in float64."""

import pytest
import torch

from kernels import native_library
from kernels.int8 import int8_linear_reference, quantize_weight
from kernels.linear import PackedLinear, Quantization
from kernels.silu_mul import silu_and_mul

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


@pytest.mark.skipif(not native_library.status().available, reason="the same holds in C++ only")
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, quantization: Quantization) -> None:
    torch.manual_seed(0)
    layer = PackedLinear(torch.randn(70, 1030).to(dtype), torch.randn(70).to(dtype), quantization=quantization)
    x = torch.randn(300, 1030).to(dtype)
    expected = torch.cat([layer(row) for row in x.split(1)])
    for num_tokens in (2, 3, 8, 11, 12, 13, 23, 24, 25, 37, 48, 64, 129, 300):
        assert torch.equal(layer(x[:num_tokens]), expected[:num_tokens])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 1), (31, 7), (33, 64), (96, 576), (50, 1537), (65, 256), (64, 257)]
)
def test_int8_equals_its_reference(dtype: torch.dtype, out_features: int, in_features: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
    weight[0] = 0  # a feature whose scale is 0
    quantized, scales = quantize_weight(weight)
    layer = PackedLinear(weight, bias, wide=True, quantization="int8")
    for num_tokens in (0, 1, 5, 13):
        x = torch.randn(num_tokens, in_features).to(dtype)
        x[:1] = 0
        expected = int8_linear_reference(x, quantized, scales, bias)
        torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-5)


def test_int8_is_close_to_the_product() -> None:
    """Eight bits each way: about half a percent of the result's size. One outlier harms its own group only."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 1024) / 32, torch.randn(16, 1024)
    x[:, 5] = 300
    x_without = x.clone()
    x_without[:, :256] = 0
    layer = PackedLinear(weight, quantization="int8")
    assert (layer(x_without) - x_without @ weight.T).square().mean().sqrt() < 0.01
    assert (layer(x) - x @ weight.T).square().mean().sqrt() < 0.01 * (x @ weight.T).square().mean().sqrt() + 0.4


def test_int8_of_the_smallest_activations() -> None:
    """Below 127 times the smallest normal number the scale stays, and numbers fade to 0 like everywhere in float32."""
    torch.manual_seed(0)
    weight = torch.randn(8, 128) * 1e30
    quantized, scales = quantize_weight(weight)
    sizes = torch.tensor([1e-45, 1e-39, 1e-38, 1e-37, 1.4e-36, 1e-35])
    x = torch.randn(len(sizes), 128) * sizes[:, None]
    x[-1, :64] *= 1e-3  # one group of a row that is not small
    expected = int8_linear_reference(x, quantized, scales, None)
    product = x @ weight.T
    assert ((expected - product).abs().amax(1) <= 0.02 * product.abs().amax(1) + 1e-7).all()
    assert expected[2:].any(1).all()
    torch.testing.assert_close(PackedLinear(weight, quantization="int8")(x), expected, atol=0, rtol=1e-4)


def test_int8_carries_on_what_is_not_finite() -> None:
    layer = PackedLinear(torch.randn(8, 512), quantization="int8")
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.randn(3, 512)
        x[1, 300] = value
        y = layer(x)
        assert y[[0, 2]].isfinite().all()
        assert not y[1].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("inner", [1, 15, 16, 17, 112])
def test_gated(dtype: torch.dtype, quantization: Quantization, inner: int) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(2 * inner, 64) / 8).to(dtype), torch.randn(2 * inner).to(dtype)
    gated = PackedLinear(weight, bias, gated=True, quantization=quantization)
    plain = PackedLinear(weight, bias, quantization=quantization)
    for num_tokens in (0, 1, 13):
        x = torch.randn(num_tokens, 64).to(dtype)
        assert torch.equal(gated(x), silu_and_mul(plain(x)))
