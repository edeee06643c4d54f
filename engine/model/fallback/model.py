"""TransformersModel: the forward pass of a model that the transformers library defines, over our paged KV cache.

The tokens of all sequences go through as one sequence of a batch of one; positions are given, no mask is built and the
library keeps no cache. Whatever mixes tokens must be attention, and attention is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from engine.model.fallback.attention import AttentionCall, attention_by
from engine.model.fallback.loading import called_linears, load_checkpoint, make_up_weights, pack_linears
from engine.model.fallback.probe import ModelShape, probe_shape
from engine.model.fallback.self_check import SelfCheck
from engine.model.fallback.settings import read_settings
from engine.model.llama import StepInputs
from engine.model.options import TORCH_DTYPES
from kernels.kv_cache import PageFormat
from kernels.kv_write import write_kv
from kernels.paged_attention import paged_attention
from protocol.kv_layout import KVLayout
from runtime.models.model_files import ModelFiles


@dataclass(frozen=True, slots=True)
class _PagedStep:
    """An AttentionHandler for one step: writes keys and values to their slots, attends to the blocks."""

    inputs: StepInputs
    kv_cache: torch.Tensor  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
    page_format: PageFormat
    windows: tuple[int, ...]

    def attend(self, call: AttentionCall) -> torch.Tensor:
        query, key, value = (heads[0].transpose(0, 1) for heads in (call.query, call.key, call.value))
        cache, layer = self.kv_cache, call.layer
        write_kv(key, value, cache, layer, self.inputs.slots, page_format=self.page_format)
        attended = paged_attention(
            query, cache, layer, self.inputs.batch, call.scale, self.windows[layer], page_format=self.page_format
        )
        return attended.unsqueeze(0)


class TransformersModel:
    """Weights and forward pass, like engine.model.llama.LlamaModel. Holds no state of any sequence.

    `windows[i]` is layer i's sliding window in tokens, its own included; 0 means it sees the whole context.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape, windows: tuple[int, ...]) -> None:
        model.set_attn_implementation(shape.route.ours)
        self.config = shape
        self._model = model
        self._windows = windows

    def forward(self, inputs: StepInputs, kv_cache: torch.Tensor, page_format: PageFormat = "plain") -> torch.Tensor:
        """Write the step's keys and values into the cache; returns logits [num_rows, vocab_size] of the sampling rows,
        float32.

        kv_cache is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim].
        """
        with attention_by(_PagedStep(inputs, kv_cache, page_format, self._windows), self.config.route):
            output = self._model(
                input_ids=inputs.token_ids.unsqueeze(0),
                position_ids=inputs.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=inputs.sampling_rows,
            )
        logits: torch.Tensor = output.logits[0]
        return logits.float()


def load_transformers_model(
    files: ModelFiles,
    layout: KVLayout,
    max_model_len: int,
    device: torch.device,
    dummy_seed: int | None,
    scratch: Callable[[int], torch.Tensor],
    progress: Callable[[str], None],
) -> TransformersModel:
    """Load weights (or, with a seed, make them up), then prove on a few tokens that our path computes what the
    library's does; `scratch(n)` gives a KV cache of n blocks for that.

    Raises ConfigError, naming the model type and the reason, where the model cannot be served.
    """
    settings, dtype = read_settings(files.folder, max_model_len), TORCH_DTYPES[layout.dtype]
    shape = probe_shape(settings)
    if dummy_seed is None:
        model = load_checkpoint(settings, files.folder, shape.route, dtype, device, progress)
    else:
        model = make_up_weights(settings, dummy_seed, shape.route, dtype, device)
    check = SelfCheck(settings, shape, layout.block_size, device, layout.page_format)
    packable = called_linears(model, lambda: check.run_reference(model))
    windows = check.windows(model, max_model_len)
    pack_linears(model, packable)
    ours = TransformersModel(model, shape, windows)
    check.compare(ours, scratch(check.num_blocks))
    progress(f"transformers runs {settings.model_type}: {check.largest_error:.1e} off its own attention")
    return ours
