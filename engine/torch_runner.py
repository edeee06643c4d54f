"""TorchRunner: a model behind the Runner seam.

Life: `plan_layout` tells how large a KV block is; the node allocates (and registers) memory for some number of them;
`build_torch_runner` loads the weights over it; `warm_up` runs the shapes that serving will; then `launch` is called, step
by step, from the engine's thread.

A step is computed within `launch`. Planning ahead gains nothing then, but works: the runner remembers what it drew last.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from engine.model.choice import Model, load_fallback
from engine.model.config import is_native, read_model_config
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
from engine.runner import PENDING, ReadyStep, ScheduledChunk, StepPlan, StepResult, standing
from engine.sampling.sampler import Sampler
from protocol.errors import ConfigError, HeadraceError
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.sampling import SamplingParams
from protocol.tokens import SampledToken
from runtime.models.model_files import ModelFiles

__all__ = ["RunnerOptions", "TorchRunner", "build_torch_runner", "num_blocks_for_memory", "plan_layout"]

_WARM_UP = RequestId("warm-up")
_WARM_UP_PREFILL = 256
_WARM_UP_ROWS = (1, 4, 16)


class TorchRunner:
    """Implements engine.runner.Runner. Not thread-safe: one step at a time."""

    def __init__(self, model: Model, layout: KVLayout, kv_cache: torch.Tensor, max_model_len: int) -> None:
        self._model = model
        self._layout = layout
        self._kv_cache = kv_cache  # [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]
        self._max_model_len = max_model_len
        self._sampler = Sampler()
        self._last_tokens: dict[RequestId, int] = {}

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

    @property
    def runs_ahead(self) -> bool:
        return False

    def launch(self, plan: StepPlan) -> ReadyStep:
        """Compute one step; see engine.runner.Runner."""
        if not plan.chunks:
            return ReadyStep(StepResult(()))
        started_at = time.perf_counter()
        chunks = [self._known(chunk) for chunk in plan.chunks]
        with torch.inference_mode():
            inputs = build_step_inputs(chunks, self._layout.block_size, self._kv_cache.device)
            prepared_at = time.perf_counter()
            logits = self._model.forward(inputs, self._kv_cache, self._layout.page_format)
            computed_at = time.perf_counter()
            sampled = self._sample(chunks, logits)
        sampled_at = time.perf_counter()
        return ReadyStep(StepResult(sampled, prepared_at - started_at, sampled_at - computed_at))

    def forget(self, request_id: RequestId) -> None:
        self._sampler.forget(request_id)
        self._last_tokens.pop(request_id, None)

    def _known(self, chunk: ScheduledChunk) -> ScheduledChunk:
        """The chunk with the token that was pending in its place."""
        if chunk.token_ids[0] != PENDING:
            return chunk
        return replace(chunk, token_ids=[self._last_tokens[chunk.request_id], *chunk.token_ids[1:]])

    def _sample(
        self, chunks: Sequence[ScheduledChunk], logits: torch.Tensor
    ) -> tuple[tuple[SampledToken, ...] | HeadraceError, ...]:
        """The tokens that stand. A sequence whose row failed may have been planned ahead: it goes on with any token, and
        nobody will look at it."""
        sampling = [chunk for chunk in chunks if chunk.samples]
        drawn = iter(self._sampler.sample(sampling, logits) if sampling else ())
        sampled = tuple(
            standing(list(islice(drawn, chunk.num_rows)), chunk.drafts) if chunk.samples else () for chunk in chunks
        )
        for chunk, tokens in zip(chunks, sampled, strict=True):
            if chunk.samples:
                self._last_tokens[chunk.request_id] = 0 if isinstance(tokens, HeadraceError) else tokens[-1].token_id
        return sampled

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Those after every token of a text that is computed alone, float32 [num_tokens, vocab_size]: what a model's quality is
        measured by. Writes to the first blocks: call it only while no block is in use."""
        chunk = replace(self._warm_up_chunk(0, token_ids), num_drafts=len(token_ids) - 1)  # a row for every token
        with torch.inference_mode():
            inputs = build_step_inputs((chunk,), self._layout.block_size, self._kv_cache.device)
            return self._model.forward(inputs, self._kv_cache, self._layout.page_format)

    def warm_up(self) -> None:
        """Run a prefill chunk and decode batches, greedy and sampled, so that the first request finds kernels built,
        threads started and memory touched. Writes to the first blocks: call it before any block is in use."""
        room = min(self._max_model_len, self.num_blocks * self._layout.block_size)
        self.launch(StepPlan((self._warm_up_chunk(0, list(range(min(_WARM_UP_PREFILL, room)))),)))
        for num_rows in _WARM_UP_ROWS:
            self.launch(StepPlan(tuple(self._warm_up_chunk(row, [row]) for row in range(min(num_rows, room)))))
        self.forget(_WARM_UP)

    def _warm_up_chunk(self, start: int, token_ids: Sequence[int]) -> ScheduledChunk:
        return ScheduledChunk(
            request_id=_WARM_UP,
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
    keeps it; None allocates it. With `options.num_blocks` 0 the memory says how many blocks there are. Sets torch's
    number of threads for the whole process where `options.threads` says so.

    Raises ConfigError where the model, its files or an option cannot be used.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    device, layout = resolve_device(options), plan_layout(files, options)
    max_model_len = resolve_max_model_len(files, options)
    kv_cache = _kv_cache(layout, options.num_blocks, kv_memory, device)
    dtype, report = TORCH_DTYPES[layout.dtype], progress or _silent
    model: Model
    with torch.inference_mode():
        if is_native(files.config_path):
            source = _weight_source(files, options, dtype, device, report)
            model = LlamaModel.load(read_model_config(files.config_path), source, max_model_len, options.quantization)
        else:
            seed = options.seed if options.load_format == "dummy" else None
            scratch = partial(_kv_cache, layout, kv_memory=None, device=device)
            model = load_fallback(files, layout, max_model_len, device, seed, scratch, report)
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
