"""RMSNorm, and the addition of the residual before it, in one pass over the rows.

Why: both only move memory. Added and normalised apart, a row is read three times and written twice; here it is read and
written once each. The specification, and the order of roundings, is that of `kernels.rms_norm`.
"""

import torch
import triton
import triton.language as tl

from kernels.gpu.device import next_power_of_two

_TILE = 1024
"""Elements of a program at the least: short rows (the norm of a head) share one."""


def num_warps(width: int) -> int:
    """Of a program: up to 16 elements a thread, until a row is longer than the largest program has threads for."""
    return min(max(width // 512, 4), 16)


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    num_rows: tl.tensor,
    x_outer_stride: tl.tensor,
    x_inner_stride: tl.tensor,
    eps: tl.tensor,
    INNER: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """Program: ROWS rows. Row r of x is at (r // INNER, r % INNER); the other tensors are dense."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    mask = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    dense = rows[:, None] * SIZE + columns[None, :]
    x_rows = rows // INNER * x_outer_stride + rows % INNER * x_inner_stride
    x = tl.load(x_ptr + x_rows[:, None] + columns[None, :], mask=mask, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(residual_ptr + dense, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + dense, x, mask=mask)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)[:, None]
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    rounded = normed.to(x.dtype).to(tl.float32)
    tl.store(normed_ptr + dense, (weight[None, :] * rounded).to(x.dtype), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`kernels.rms_norm.rms_norm` for x of one dtype with weight; rows of x ([..., size]) may stand apart."""
    return _launch(x, None, weight, eps)[0]


def fused_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.rms_norm.fused_add_rms_norm` for tensors of one dtype."""
    return _launch(x, residual.contiguous(), weight, eps)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, x + residual); the second is normed again where there is no residual."""
    size = x.shape[-1]
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = normed if residual is None else torch.empty_like(normed)
    if x.stride(-1) != 1 or x.dim() > 3:
        x = x.contiguous()
    # Three dimensions are two of rows, so that the heads of a fused projection need no copy; else the rows lie even.
    inner = x.shape[1] if x.dim() == 3 else 1
    outer_stride = x.stride(0) if x.dim() in (2, 3) else size
    inner_stride = x.stride(1) if x.dim() == 3 else 0
    num_rows = x.numel() // size
    if not num_rows:
        return normed, total
    width = next_power_of_two(size)
    rows = max(1, _TILE // width)
    rms_norm_kernel[(-(-num_rows // rows),)](
        *(x, x if residual is None else residual, weight.contiguous(), normed, total),
        *(num_rows, outer_stride, inner_stride, eps),
        INNER=inner,
        SIZE=size,
        WIDTH=width,
        ROWS=rows,
        ADD=residual is not None,
        num_warps=num_warps(width),
    )
    return normed, total
