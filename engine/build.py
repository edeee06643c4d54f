"""From a node's configuration to a running engine's parts, in two steps.

`plan_engine` reads small files and says how large the KV cache will be, so that the node can allocate it where peers reach
it; `build_engine` loads the model over that memory and warms it up. On a GPU the cache is the engine's own, and how large it
is comes out of `build_engine`: what fits beside the weights is measured.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from engine.config import EngineConfig, SpeculationConfig
from engine.cuda.build import build_cuda_runner
from engine.cuda.device_blocks import DeviceBlocks
from engine.cuda.limits import BatchLimits
from engine.engine import Engine
from engine.model.config import is_native
from engine.model.options import (
    RunnerOptions,
    num_blocks_for_memory,
    plan_layout,
    resolve_device,
    resolve_max_model_len,
)
from engine.runner import Runner
from engine.simulated_runner import SimulatedRunner
from engine.torch_runner import build_torch_runner
from protocol.errors import ConfigError
from protocol.ids import Incarnation
from protocol.kv_layout import KVLayout
from runtime.clock import MonotonicClock
from runtime.config import parse_size
from runtime.models.model_files import ModelFiles
from runtime.models.resolve import resolve_model
from runtime.node_config import NodeConfig
from runtime.served_model import ServedModel

DEFAULT_TOKEN_BUDGETS = {"cpu": 128, "cuda": 2048}
"""Tokens of a step. On a CPU: the smallest budget whose TTFT of long prompts beside running streams is within 15 % of the best
(benchmarks/bench_interference.py); on a GPU, where it has not been measured, enough to be bound by arithmetic."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What will be built. The KV cache is `num_blocks` blocks of `layout.block_bytes` bytes, in host memory or, with
    `on_device`, in the GPU's; 0 there: as many as fit."""

    files: ModelFiles
    options: RunnerOptions
    layout: KVLayout
    num_blocks: int

    @property
    def on_device(self) -> bool:
        return self.options.device == "cuda"

    def served(self, num_blocks: int) -> ServedModel:
        """What a node with a cache of so many blocks offers."""
        return ServedModel(
            name=self.files.name,
            vocab_size=self.files.vocab_size,
            max_model_len=min(resolve_max_model_len(self.files, self.options), num_blocks * self.layout.block_size),
            num_blocks=num_blocks,
            layout=self.layout,
        )


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """Not started. `device_blocks`: the KV cache, where it is a device's."""

    engine: Engine
    model: ServedModel
    device_blocks: DeviceBlocks | None = None


def plan_engine(config: NodeConfig) -> EnginePlan:
    """Raises ConfigError where the model is missing or a setting does not fit it."""
    files = resolve_model(config.model.model, progress=log.info)
    options = RunnerOptions(
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=config.model.device,
        load_format=config.model.load_format,
        block_size=config.cache.block_size,
        page_format="plain" if config.model.runner == "simulated" else config.cache.page_format,
        max_model_len=config.model.max_model_len,
        threads=config.model.threads,
        seed=config.model.seed,
        gpu_memory_utilization=config.cache.gpu_memory_utilization,
    )
    options = replace(options, device=_device(config, options, files))
    layout = plan_layout(files, options)
    num_blocks = config.cache.num_blocks
    if not num_blocks and options.device == "cpu":
        num_blocks = num_blocks_for_memory(layout, parse_size(config.cache.memory))
    return EnginePlan(files, replace(options, num_blocks=num_blocks), layout, num_blocks)


def build_engine(
    config: NodeConfig,
    plan: EnginePlan,
    incarnation: Incarnation,
    kv_memory: torch.Tensor | None,
    num_scratch_blocks: int = 0,
) -> BuiltEngine:
    """`kv_memory`: uint8 [num_blocks * block_bytes], host memory that outlives the engine; None where the plan is
    `on_device`, whose cache then gets `num_scratch_blocks` blocks more than the engine uses. Takes seconds."""
    settings = engine_config(config, "cuda" if plan.on_device else "cpu")
    runner: Runner
    device_blocks: DeviceBlocks | None = None
    if plan.on_device:
        runner, device_blocks = _build_cuda_runner(plan, settings, log.info, num_scratch_blocks)
    else:
        assert kv_memory is not None, "the cache of a CPU's engine is its node's"
        runner = _build_runner(config, plan, kv_memory, log.info)
    engine = Engine(runner, settings, MonotonicClock(), incarnation)
    return BuiltEngine(engine, plan.served(runner.num_blocks), device_blocks)


def engine_config(config: NodeConfig, device: Literal["cpu", "cuda"]) -> EngineConfig:
    """Raises ConfigError on settings that do not go together."""
    options = config.scheduler
    speculation = SpeculationConfig(options.num_draft_tokens, options.ngram_min, options.ngram_max)
    return EngineConfig(
        max_num_batched_tokens=options.max_num_batched_tokens or DEFAULT_TOKEN_BUDGETS[device],
        max_num_seqs=options.max_num_seqs,
        max_waiting_tokens=options.max_waiting_tokens,
        max_prefill_chunk=options.max_prefill_chunk or None,
        enable_prefix_cache=config.cache.prefix_cache,
        async_scheduling=options.async_scheduling,
        speculation=None if options.speculation == "off" else speculation,
    )


def _device(config: NodeConfig, options: RunnerOptions, files: ModelFiles) -> Literal["cpu", "cuda"]:
    """Raises ConfigError for a GPU that is not there, or that has nothing to do, or that cannot serve the model."""
    device = resolve_device(options).type
    if device == "cuda" and config.model.runner == "simulated":
        raise ConfigError("model.device cuda: the simulated runner computes on the CPU", param="model.device")
    if device == "cuda" and not is_native(files.config_path):
        if options.device == "cuda":
            raise ConfigError(
                "model.device cuda: models that the transformers library runs are served on CPUs only",
                param="model.device",
            )
        return "cpu"
    return "cuda" if device == "cuda" else "cpu"


def _build_runner(
    config: NodeConfig, plan: EnginePlan, kv_memory: torch.Tensor, progress: Callable[[str], None]
) -> Runner:
    if config.model.runner == "simulated":
        return SimulatedRunner(
            plan.layout,
            plan.num_blocks,
            vocab_size=plan.files.vocab_size,
            max_model_len=plan.served(plan.num_blocks).max_model_len,
            memory=kv_memory.numpy().data,
        )
    runner = build_torch_runner(plan.files, plan.options, kv_memory, progress)
    runner.warm_up()
    return runner


def _build_cuda_runner(
    plan: EnginePlan, settings: EngineConfig, progress: Callable[[str], None], num_scratch_blocks: int
) -> tuple[Runner, DeviceBlocks]:
    limits = BatchLimits(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_drafts=settings.speculation.num_draft_tokens if settings.speculation else 0,
    )
    runner, device_blocks = build_cuda_runner(plan.files, plan.options, limits, progress, num_scratch_blocks)
    runner.warm_up(progress)
    return runner, device_blocks
