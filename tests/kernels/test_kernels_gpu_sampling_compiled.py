"""The sampling kernels as machine code for sm_90."""

from typing import Any

import pytest
from ahead_of_time import CompileForSm90

from kernels.gpu.sampling import DRAW_DEFAULT, LOGPROBS_DEFAULT
from kernels.gpu.sampling_adjust import apply_lists_kernel, penalise_kernel
from kernels.gpu.sampling_draw import draw_kernel
from kernels.gpu.sampling_logprobs import logprobs_kernel
from kernels.sampling_tensors import MAX_BIASES, MAX_STOPS

FLOATS = ("logits", "adjusted", "temperatures", "min_scores", "penalties", "biases", "logprobs", "top_logprobs")
LONGS = ("rows", "positions", "seeds", "token_ids")
TYPES = {
    **{f"{name}_ptr": "*fp32" for name in FLOATS},
    **{f"{name}_ptr": "*i64" for name in LONGS},
    "top_p_ptr": "*fp64",
    "finite_ptr": "*u8",
}


def signature(kernel: Any, constexprs: dict[str, int]) -> dict[str, str]:
    """Floats and longs as above; every other tensor is int32, and so is every number."""
    names = [name for name in kernel.arg_names if name not in constexprs]
    return {name: TYPES.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names}


@pytest.mark.parametrize(
    ("kernel", "constexprs", "num_warps", "most_spilled"),
    [
        # 128 registers for each of 512 threads; a few scalars do not fit
        (draw_kernel, DRAW_DEFAULT.sizes, DRAW_DEFAULT.num_warps, 64),
        (penalise_kernel, {"TILE": 1024}, 4, 0),
        (apply_lists_kernel, {"MAX_BIASES": MAX_BIASES, "MAX_STOPS": MAX_STOPS}, 4, 0),
        (logprobs_kernel, {**LOGPROBS_DEFAULT.sizes, "SHARE": 256}, LOGPROBS_DEFAULT.num_warps, 0),
    ],
)
def test_fits_a_multiprocessor(
    kernel: Any, constexprs: dict[str, int], num_warps: int, most_spilled: int, compile_for_sm90: CompileForSm90
) -> None:
    types = signature(kernel, constexprs)
    resources = compile_for_sm90(
        kernel, types, constexprs, num_warps, divisible=("logits_stride", "vocab_size"), fp_fusion=False
    )
    assert resources.spill_bytes <= most_spilled
    assert resources.registers * num_warps * 32 <= 65536
    assert resources.shared_bytes <= 48 * 1024
    assert "fma.rn.f32" not in resources.ptx or kernel is logprobs_kernel
