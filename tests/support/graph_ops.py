"""A Device on the CPU that captures as a GPU does, and the attention operations that such a capture needs.

`TapeDevice.capture` records every torch operation, and a replay does the same operations on the same tensors without running
a line of the code that asked for them. An operation that tells the host a value fails the capture, as on a GPU.

The CPU's own kernels are invisible to a recorder and know no padding rows; `captured_operations` puts torch operations of
fixed shape in their place, in the module that the model calls them from, and `gpu_operations` the Triton kernels.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine.cuda.device import HostDevice, Replay, Work
from kernels import native_library, paged_attention, rotary
from kernels.attention_batch import AttentionBatch
from kernels.gpu import paged_attention as gpu_attention
from kernels.gpu import rms_norm, rope_kv_write, silu_mul
from kernels.gpu import sampling as gpu_sampling

_ASKS_THE_DEVICE = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
}


class HostAsked(RuntimeError):
    """Captured work wanted to know a value."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.name in _ASKS_THE_DEVICE:
            raise HostAsked(f"{func} tells the host a value")
        keywords = dict(kwargs or {})
        out = func(*args, **keywords)
        self.tape.append(lambda: _again(func, args, keywords, out))
        return out


def _again(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
    """What came of the operation is now where it came to be when it was recorded; a view, and what was done in place, is
    there already."""
    outs, results = ([each] if isinstance(each, torch.Tensor) else list(each) for each in (out, func(*args, **kwargs)))
    for old, new in zip(outs, results, strict=True):
        if new.data_ptr() != old.data_ptr():
            old.copy_(new)


class TapeDevice(HostDevice):
    """Replays are made of recorded operations alone. Unlike a GPU's, its capture also does the work once."""

    def capture(self, work: Work) -> Replay:
        recorder = _Recorder()
        with torch.inference_mode(), recorder:
            work()
        tape = recorder.tape

        def replay() -> None:
            for operation in tape:
                operation()

        return replay


@contextmanager
def captured_operations() -> Iterator[None]:
    """Inside, models are made and run of torch operations that a capture can hold, at least in decode steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "function", lambda _name, _tensor: None)
        patch.setattr("engine.model.llama.paged_attention", decode_attention)
        patch.setattr("engine.model.llama.rope_and_write_kv", rope_and_write)
        yield


@contextmanager
def gpu_operations() -> Iterator[None]:
    """Inside, models run what they run on a GPU, in Triton's interpreter where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "function", lambda _name, _tensor: None)
        for name, operation in {
            "engine.model.llama.paged_attention": _of_plain_pages(gpu_attention.paged_attention),
            "engine.model.llama.rope_and_write_kv": _of_plain_pages(rope_kv_write.rope_and_write_kv),
            "engine.model.llama.rms_norm": rms_norm.rms_norm,
            "engine.model.llama.fused_add_rms_norm": rms_norm.fused_add_rms_norm,
            "kernels.linear.silu_and_mul": silu_mul.silu_and_mul,
            "engine.cuda.row_sampler.sample_rows": gpu_sampling.sample_rows,
        }.items():
            patch.setattr(name, operation)
        yield


def _of_plain_pages(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A launcher, called as the model calls the public operation: with the format of the pages behind everything else."""

    def launch(*arguments: Any) -> torch.Tensor:
        assert arguments[-1] == "plain"
        return operation(*arguments[:-1])

    return launch


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    batch: AttentionBatch,
    scale: float,
    sliding_window: int = 0,
    *_: object,
) -> torch.Tensor:
    """`paged_attention`; one-token queries over whole block tables and a mask, zeros where the context is 0."""
    if batch.max_query_len > 1:
        return paged_attention.paged_attention_reference(query, kv_cache, layer, batch, scale, sliding_window)
    num_rows, _, head_dim = query.shape
    pages = kv_cache[:, layer].index_select(0, batch.block_tables.flatten())  # [rows * blocks, 2, heads, block, dim]
    pages = pages.unflatten(0, (num_rows, -1)).permute(2, 0, 3, 1, 4, 5).flatten(3, 4)  # [2, rows, heads, tokens, dim]
    distance = batch.context_lens[:, None] - 1 - torch.arange(pages.shape[3])
    visible = (distance >= 0) & ((distance < sliding_window) if sliding_window else True)
    attended = F.scaled_dot_product_attention(
        query.unsqueeze(2), pages[0], pages[1], attn_mask=visible[:, None, None], scale=scale, enable_gqa=True
    )
    return torch.where(batch.context_lens[:, None, None] > 0, attended.view(num_rows, -1, head_dim), 0.0)


def rope_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
    *_: object,
) -> torch.Tensor:
    """`rope_and_write_kv`; a token of slot -1 is written nowhere: it takes the slot and the values of one that has a slot.
    If none has, what is in slot 0 is lost, as a warm-up may."""
    query, key = rotary.apply_rotary(query, key, cos, sin)
    somebody = (slots >= 0).int().argmax()
    source = torch.where(slots < 0, somebody, torch.arange(len(slots)))
    slots = slots.index_select(0, source).clamp(min=0)
    blocks, offsets = slots // kv_cache.shape[4], slots % kv_cache.shape[4]
    plane = kv_cache[:, layer]
    plane[blocks, 0, :, offsets] = key.index_select(0, source)
    plane[blocks, 1, :, offsets] = value.index_select(0, source)
    return query
