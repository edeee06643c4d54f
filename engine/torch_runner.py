"""TorchRunner: a model of the Llama family behind the Runner seam.

Life: `plan_layout` tells how large a KV block is; the node allocates (and registers) memory for some number of them;
`build_torch_runner` loads the weights over it; `warm_up` runs the shapes that serving will; then `run` is called, step
by step, from the engine's thread.
"""

from collections.abc import Callable, Sequence

import torch

from engine.model.config import read_model_config
from engine.model.llama import LlamaModel
from engine.model.options import (
    TORCH_DTYPES,
    RunnerOptions,
    num_blocks_for_memory,
    plan_layout,
    resolve_device,
    resolve_max_model_len,
)
from engine.model.step_inputs import build_step_inputs
from engine.model.weights import DummySource, SafetensorsSource, WeightSource
from engine.runner import ScheduledChunk, StepPlan, StepResult
from engine.sampling.sampler import Sampler
from protocol.errors import ConfigError, HeadraceError
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken
from runtime.models.model_files import ModelFiles

__all__ = ["RunnerOptions", "TorchRunner", "build_torch_runner", "num_blocks_for_memory", "plan_layout"]

_WARM_UP_PREFILL = 256
_WARM_UP_ROWS = (1, 4, 16)


class TorchRunner:
    """Implements engine.runner.Runner. Not thread-safe: one step at a time."""

    def __init__(self, model: LlamaModel, layout: KVLayout, kv_cache: torch.Tensor, max_model_len: int) -> None:
        self._model = model
        self._layout = layout
        self._kv_cache = kv_cache  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        self._max_model_len = max_model_len
        self._sampler = Sampler()

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def num_blocks(self) -> int:
        return self._kv_cache.shape[0]

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step; see engine.runner.Runner."""
        if not plan.chunks:
            return StepResult(())
        with torch.inference_mode():
            inputs = build_step_inputs(plan.chunks, self._layout.block_size, self._kv_cache.device)
            logits = self._model.forward(inputs, self._kv_cache, self._layout.page_format)
            sampling = [chunk for chunk in plan.chunks if chunk.samples]
            tokens = iter(self._sampler.sample(sampling, logits) if sampling else ())
        sampled: list[SampledToken | HeadraceError | None] = [
            next(tokens) if chunk.samples else None for chunk in plan.chunks
        ]
        return StepResult(tuple(sampled))

    def forget(self, request_id: RequestId) -> None:
        self._sampler.forget(request_id)

    def warm_up(self) -> None:
        """Run a prefill chunk and decode batches, greedy and sampled, so that the first request finds kernels built,
        threads started and memory touched. Writes to the first blocks: call it before any block is in use."""
        room = min(self._max_model_len, self.num_blocks * self._layout.block_size)
        self.run(StepPlan((self._warm_up_chunk(0, list(range(min(_WARM_UP_PREFILL, room)))),)))
        for num_rows in _WARM_UP_ROWS:
            self.run(StepPlan(tuple(self._warm_up_chunk(row, [row]) for row in range(min(num_rows, room)))))

    def _warm_up_chunk(self, start: int, token_ids: Sequence[int]) -> ScheduledChunk:
        return ScheduledChunk(
            request_id=RequestId("warm-up"),
            token_ids=[token_id % self.vocab_size for token_id in token_ids],
            start=start,
            block_ids=range(self._layout.num_blocks_for(start + len(token_ids))),
            samples=True,
            output_position=0,
            sampling=SamplingParams(max_tokens=1, seed=0, temperature=float(start % 2), top_p=0.9),
            prompt_token_ids=(),
            output_token_ids=(),
        )


def build_torch_runner(
    files: ModelFiles,
    options: RunnerOptions,
    kv_memory: torch.Tensor | None = None,
    progress: Callable[[str], None] | None = None,
) -> TorchRunner:
    """Load the model. `kv_memory` is flat uint8 memory of num_blocks * block_bytes on the model's device, whose owner
    keeps it; None allocates it. With `options.num_blocks` 0 the memory says how many blocks there are. Sets torch's number of threads for the whole process where `options.threads` says so.

    Raises ConfigError where the model, its files or an option cannot be used.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device, layout = resolve_device(options), plan_layout(files, options)
    max_model_len = resolve_max_model_len(files, options)
    kv_cache = _kv_cache(layout, options.num_blocks, kv_memory, device)
    source = _weight_source(files, options, TORCH_DTYPES[layout.dtype], device, progress or _silent)
    with torch.inference_mode():
        model = LlamaModel.load(read_model_config(files.config_path), source, max_model_len, options.quantization)
    return TorchRunner(model, layout, kv_cache, max_model_len)


def _weight_source(
    files: ModelFiles, options: RunnerOptions, dtype: torch.dtype, device: torch.device, progress: Callable[[str], None]
) -> WeightSource:
    if options.load_format == "dummy":
        return DummySource(options.seed, dtype, device)
    return SafetensorsSource(files.folder, dtype, device, progress)


def _kv_cache(layout: KVLayout, num_blocks: int, kv_memory: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if kv_memory is not None and num_blocks == 0:
        num_blocks = kv_memory.numel() // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(f"a KV cache of {num_blocks} blocks holds nothing; num_blocks_for_memory tells how many fit")
    num_bytes = num_blocks * layout.block_bytes
    if kv_memory is None:
        kv_memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    if kv_memory.dtype != torch.uint8 or kv_memory.shape != (num_bytes,) or kv_memory.device.type != device.type:
        raise ConfigError(
            f"kv_memory is {kv_memory.dtype} {tuple(kv_memory.shape)} on {kv_memory.device.type};"
            f" {num_blocks} blocks take {num_bytes} bytes of uint8 on {device.type}"
        )
    return kv_memory.view(TORCH_DTYPES[layout.dtype]).view(num_blocks, *layout.block_shape)


def _silent(_: str) -> None:
    return None
