"""The gate of a SwiGLU feed-forward, in one pass: each element is read once and written once.

The specification is `kernels.silu_mul.silu_and_mul_reference`: silu is rounded to the input's dtype before the product.
"""

import torch
import triton
import triton.language as tl

COLUMNS = 1024
"""Of a program: 8 of each half for each of 128 threads, which are 16 bytes."""


@triton.jit
def silu_and_mul_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    intermediate: tl.tensor,
    token_stride: tl.tensor,
    COLUMNS: tl.constexpr,
) -> None:
    """Program (token, COLUMNS columns of its intermediate ones)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < intermediate
    gate = tl.load(gate_up_ptr + token * token_stride + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + token * token_stride + intermediate + columns, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + token * intermediate + columns, product.to(gate.dtype), mask=mask)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`kernels.silu_mul.silu_and_mul`, checked there: [num_tokens, 2 * intermediate] -> [num_tokens, intermediate]."""
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    num_tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_tokens, intermediate))
    if out.numel():
        silu_and_mul_kernel[(num_tokens, -(-intermediate // COLUMNS))](
            gate_up, out, intermediate, gate_up.stride(0), COLUMNS=COLUMNS, num_warps=4
        )
    return out
