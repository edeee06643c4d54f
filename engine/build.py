"""From a node's configuration to a running engine's parts, in two steps.

`plan_engine` reads small files and says how large the KV cache will be, so that the node can allocate it where peers reach
it; `build_engine` loads the model over that memory and warms it up.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.model.options import RunnerOptions, num_blocks_for_memory, plan_layout, resolve_max_model_len
from engine.runner import Runner
from engine.simulated_runner import SimulatedRunner
from engine.torch_runner import build_torch_runner
from protocol.ids import Incarnation
from protocol.kv_layout import KVLayout
from runtime.clock import MonotonicClock
from runtime.config import parse_size
from runtime.models.model_files import ModelFiles
from runtime.models.resolve import resolve_model
from runtime.node_config import NodeConfig
from runtime.served_model import ServedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What will be built. The KV cache is `num_blocks` blocks of `layout.block_bytes` bytes."""

    files: ModelFiles
    options: RunnerOptions
    layout: KVLayout
    num_blocks: int

    @property
    def model(self) -> ServedModel:
        return ServedModel(
            name=self.files.name,
            vocab_size=self.files.vocab_size,
            max_model_len=min(
                resolve_max_model_len(self.files, self.options), self.num_blocks * self.layout.block_size
            ),
            num_blocks=self.num_blocks,
            layout=self.layout,
        )


def plan_engine(config: NodeConfig) -> EnginePlan:
    """Raises ConfigError where the model is missing or a setting does not fit it."""
    files = resolve_model(config.model.model, progress=log.info)
    options = RunnerOptions(
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device="cpu",  # transports move blocks between host memories
        load_format=config.model.load_format,
        block_size=config.cache.block_size,
        page_format="plain" if config.model.runner == "simulated" else config.cache.page_format,
        max_model_len=config.model.max_model_len,
        threads=config.model.threads,
        seed=config.model.seed,
    )
    layout = plan_layout(files, options)
    num_blocks = config.cache.num_blocks or num_blocks_for_memory(layout, parse_size(config.cache.memory))
    return EnginePlan(files, replace(options, num_blocks=num_blocks), layout, num_blocks)


def build_engine(config: NodeConfig, plan: EnginePlan, incarnation: Incarnation, kv_memory: torch.Tensor) -> Engine:
    """`kv_memory`: uint8 [num_blocks * block_bytes], host memory that outlives the engine. Takes seconds; not started."""
    engine_config = EngineConfig(
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_waiting_tokens=config.scheduler.max_waiting_tokens,
        enable_prefix_cache=config.cache.prefix_cache,
    )
    runner = _build_runner(config, plan, kv_memory, log.info)
    return Engine(runner, engine_config, MonotonicClock(), incarnation)


def _build_runner(
    config: NodeConfig, plan: EnginePlan, kv_memory: torch.Tensor, progress: Callable[[str], None]
) -> Runner:
    if config.model.runner == "simulated":
        return SimulatedRunner(
            plan.layout,
            plan.num_blocks,
            vocab_size=plan.model.vocab_size,
            max_model_len=plan.model.max_model_len,
            memory=kv_memory.numpy().data,
        )
    runner = build_torch_runner(plan.files, plan.options, kv_memory, progress)
    runner.warm_up()
    return runner
