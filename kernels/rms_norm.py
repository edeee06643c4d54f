"""Root-mean-square normalisation with the numerics of transformers' LlamaRMSNorm.

The variance and the normalised value are float32; the value is rounded to the input's dtype *before* it is multiplied
with the weight. Rounding in another order changes bf16 results in the last bit.
"""

import torch

from kernels import native_library


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Specification of `rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise x ([..., size]) over its last dimension and scale it with weight ([size])."""
    if x.is_cuda and weight.dtype == x.dtype:
        from kernels.gpu import rms_norm as gpu  # needs Triton, which a machine without a GPU need not have

        return gpu.rms_norm(x, _checked_weight(x, weight), eps)
    native = native_library.function("rms_norm", x)
    if native is None or weight.dtype != x.dtype:
        return rms_norm_reference(x, weight, eps)
    x, weight = x.contiguous(), _checked_weight(x, weight)
    normed, size = torch.empty_like(x), x.shape[-1]
    native(
        *(x.data_ptr(), None, weight.data_ptr(), normed.data_ptr(), None),
        *(x.numel() // size, size, eps, torch.get_num_threads()),
    )
    return normed


def fused_add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of `fused_add_rms_norm`."""
    new_residual = x + residual
    return rms_norm_reference(new_residual, weight, eps), new_residual


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual, then normalise: returns (normed, new_residual), both new tensors of x's shape."""
    if x.is_cuda and weight.dtype == residual.dtype == x.dtype and residual.shape == x.shape:
        from kernels.gpu import rms_norm as gpu  # needs Triton, which a machine without a GPU need not have

        return gpu.fused_add_rms_norm(x, residual, _checked_weight(x, weight), eps)
    native = native_library.function("rms_norm", x)
    if native is None or not weight.dtype == residual.dtype == x.dtype:
        return fused_add_rms_norm_reference(x, residual, weight, eps)
    if residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} does not fit {tuple(x.shape)}")
    x, residual, weight = x.contiguous(), residual.contiguous(), _checked_weight(x, weight)
    normed, new_residual, size = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    native(
        *(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), normed.data_ptr(), new_residual.data_ptr()),
        *(x.numel() // size, size, eps, torch.get_num_threads()),
    )
    return normed, new_residual


def _checked_weight(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit {tuple(x.shape)}")
    return weight.contiguous()
