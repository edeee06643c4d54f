"""Launches the sampling kernels: adjusted logits where a row has them, draws, log-probabilities. Nothing is waited for, and
the launches depend on shapes alone, so that they can be captured into a graph."""

import torch
import triton

from kernels.gpu.sampling_adjust import apply_lists_kernel, penalise_kernel
from kernels.gpu.sampling_draw import draw_kernel
from kernels.gpu.sampling_logprobs import logprobs_kernel
from kernels.gpu.tuning import LaunchConfig, launch_config
from kernels.sampling_tensors import MAX_BIASES, MAX_STOPS, SampledRows, SamplingTensors

DRAW_DEFAULT = LaunchConfig(num_warps=16, sizes={"TILE": 4096})
"""Eight tokens a thread. A row is one program's work, so what counts is how much of it is in flight."""

LOGPROBS_DEFAULT = LaunchConfig(num_warps=8, sizes={"LANES": 1024})
_ADJUST_TILE = 1024


def sample_rows(
    logits: torch.Tensor,
    params: SamplingTensors,
    rows: torch.Tensor,
    positions: torch.Tensor,
    max_top: int,
) -> SampledRows:
    """As kernels.sampling.sample_rows, which has checked shapes."""
    num_rows, vocab_size = logits.shape
    sampled = SampledRows(
        token_ids=torch.empty(num_rows, dtype=torch.int64, device=logits.device),
        finite=torch.empty(num_rows, dtype=torch.bool, device=logits.device),
        logprobs=torch.empty(num_rows, dtype=torch.float32, device=logits.device),
        top_ids=torch.empty((num_rows, max_top), dtype=torch.int32, device=logits.device),
        top_logprobs=torch.empty((num_rows, max_top), dtype=torch.float32, device=logits.device),
    )
    adjusted = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _adjust(logits, adjusted, params, rows, positions)
    config = launch_config("sampling_draw", logits.device, DRAW_DEFAULT, vocab_size=vocab_size)
    tile = config.sizes["TILE"]
    draw_kernel[(num_rows,)](
        *(logits, adjusted, rows, positions),
        *(params.temperatures, params.top_k, params.top_p, params.min_scores, params.seeds, params.adjusts),
        torch.empty((num_rows, 2, tile), dtype=torch.int32, device=logits.device),
        *(sampled.token_ids, sampled.finite.view(torch.uint8), logits.stride(0), vocab_size),
        TILE=tile,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # weights are the same on every device
    )
    config = launch_config("sampling_logprobs", logits.device, LOGPROBS_DEFAULT, vocab_size=vocab_size)
    lanes = config.sizes["LANES"]
    logprobs_kernel[(num_rows,)](
        *(logits, rows, params.num_logprobs, sampled.token_ids),
        *(sampled.logprobs, sampled.top_ids, sampled.top_logprobs, logits.stride(0), vocab_size, max_top),
        LANES=lanes,
        SHARE=triton.next_power_of_2(triton.cdiv(vocab_size, lanes)),
        num_warps=config.num_warps,
        enable_fp_fusion=False,
    )
    return sampled


def _adjust(
    logits: torch.Tensor,
    adjusted: torch.Tensor,
    params: SamplingTensors,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    num_rows, vocab_size = logits.shape
    penalise_kernel[(num_rows, triton.cdiv(vocab_size, _ADJUST_TILE))](
        *(logits, adjusted, rows, params.adjusts, params.penalties, params.observed, logits.stride(0), vocab_size),
        TILE=_ADJUST_TILE,
        num_warps=4,
        enable_fp_fusion=False,  # rounded after every operation, as torch does
    )
    apply_lists_kernel[(num_rows,)](
        *(logits, adjusted, rows, positions, params.adjusts, params.penalties, params.observed),
        *(params.num_biases, params.bias_token_ids, params.biases),
        *(params.min_tokens, params.num_stops, params.stop_token_ids, logits.stride(0), vocab_size),
        MAX_BIASES=MAX_BIASES,
        MAX_STOPS=MAX_STOPS,
        num_warps=4,
        enable_fp_fusion=False,
    )
