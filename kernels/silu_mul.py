"""The gate of a SwiGLU feed-forward: silu(gate) * up, from one fused projection."""

import torch
import torch.nn.functional as F

from kernels import native_library


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Specification of `silu_and_mul`: silu is rounded to the input's dtype before the product, as in transformers."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up is [num_tokens, 2 * intermediate], the gate's columns first; returns [num_tokens, intermediate]."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [num_tokens, 2 * intermediate], got {tuple(gate_up.shape)}")
    if gate_up.is_cuda:
        from kernels.gpu import silu_mul as gpu  # needs Triton, which a machine without a GPU need not have

        return gpu.silu_and_mul(gate_up)
    native = native_library.function("silu_and_mul", gate_up)
    if native is None:
        return silu_and_mul_reference(gate_up)
    gate_up = gate_up.contiguous()
    num_tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, intermediate), dtype=gate_up.dtype)
    native(gate_up.data_ptr(), out.data_ptr(), num_tokens, intermediate, torch.get_num_threads())
    return out
