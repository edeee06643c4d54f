"""Symmetric int8: weights with one scale for each output feature, activations quantised as they come.

Activations get one scale for each token and group of 64 neighbouring features, so that one outlier costs precision
only in its own group. Products of bytes are summed exactly; group sums are scaled and added in float32.
"""

import torch

SCALE_GROUP = 64  # kScaleGroup in native/rows.h
_LARGEST = 127.0
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # its inverse is finite; kSmallestLimit in native/rows.h


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [out_features, in_features] ~ int8 of the same shape * scales [out_features, float32]."""
    wide = weight.detach().float()
    scales = wide.abs().amax(1) / _LARGEST
    quantized = (wide / scales.clamp_min(_SMALLEST_SCALE)[:, None]).round_()
    return quantized.to(torch.int8), scales


def int8_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Specification: x [num_tokens, in_features] of any float dtype; returns [num_tokens, out_features] in float32."""
    total = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    for first in range(0, weight.shape[1], SCALE_GROUP):
        group = x[:, first : first + SCALE_GROUP].float()
        limit = group.abs().amax(1, keepdim=True).clamp_min(_LARGEST * _SMALLEST_SCALE)
        inverse = torch.full_like(limit, _LARGEST).div(limit)  # `127 / limit` rounds twice
        rounded = (
            (group.double() * inverse.double()).round().float()
        )  # rounded once, as by a fused multiply-add; C++ on a CPU without one rounds twice
        # Integers below 2^24: their sums are exact in float32.
        total += rounded @ weight[:, first : first + SCALE_GROUP].float().T * (limit / _LARGEST)
    total *= scales
    return total if bias is None else total + bias.float()
