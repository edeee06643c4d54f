"""build_cuda_runner: from a model folder to a CudaRunner on this process's GPU, its KV cache as large as fits.

The cache's memory has a few blocks more than the runner knows of: scratch blocks, which peers that reach it may move to
measure how fast that is.
"""

import gc
import logging
from collections.abc import Callable

import torch

from engine.cuda.cuda_device import CudaDevice
from engine.cuda.device import Device
from engine.cuda.device_blocks import DeviceBlocks
from engine.cuda.limits import BatchLimits
from engine.cuda.memory import measure, num_blocks_that_fit
from engine.cuda.runner import CudaRunner
from engine.cuda.trial_plans import largest_plan, num_blocks_of
from engine.model.config import read_model_config
from engine.model.llama import LlamaModel
from engine.model.options import (
    TORCH_DTYPES,
    RunnerOptions,
    plan_layout,
    resolve_device,
    resolve_dtype,
    resolve_max_model_len,
)
from engine.model.weights import DummySource, SafetensorsSource, WeightSource
from engine.runner import StepPlan
from protocol.kv_layout import KVLayout
from runtime.models.model_files import ModelFiles

log = logging.getLogger(__name__)


def build_cuda_runner(
    files: ModelFiles,
    options: RunnerOptions,
    limits: BatchLimits,
    progress: Callable[[str], None],
    num_scratch_blocks: int = 0,
) -> tuple[CudaRunner, DeviceBlocks]:
    """Not warmed up. With `options.num_blocks` 0 the largest step is run and measured first, and the KV cache gets what
    `options.gpu_memory_utilization` leaves.

    Raises ConfigError where the model, its files or an option cannot be used, or no block fits.
    """
    layout, max_model_len = plan_layout(files, options), resolve_max_model_len(files, options)
    model = _load_model(files, options, max_model_len, progress)
    num_blocks = options.num_blocks or max(
        1, _measured_blocks(model, layout, max_model_len, limits, options.gpu_memory_utilization) - num_scratch_blocks
    )
    device = CudaDevice()
    progress(f"KV cache on {device.torch_device}: {num_blocks} blocks of {layout.block_bytes} bytes")
    return runner_with_blocks(model, layout, num_blocks, num_scratch_blocks, max_model_len, limits, device)


def runner_with_blocks(
    model: LlamaModel,
    layout: KVLayout,
    num_blocks: int,
    num_scratch_blocks: int,
    max_model_len: int,
    limits: BatchLimits,
    device: Device,
) -> tuple[CudaRunner, DeviceBlocks]:
    """A runner over a new cache, and the same cache for those who move its blocks."""
    kv_cache = _kv_cache(layout, num_blocks + num_scratch_blocks, device)
    runner = CudaRunner(model, layout, kv_cache[:num_blocks], max_model_len, limits, device)
    return runner, DeviceBlocks(kv_cache.flatten(1).view(torch.uint8), num_scratch_blocks, device)


def _load_model(
    files: ModelFiles, options: RunnerOptions, max_model_len: int, progress: Callable[[str], None]
) -> LlamaModel:
    dtype, device = TORCH_DTYPES[resolve_dtype(options)], resolve_device(options)
    source: WeightSource = (
        DummySource(options.seed, dtype, device)
        if options.load_format == "dummy"
        else SafetensorsSource(files.folder, dtype, device, progress)
    )
    with torch.inference_mode():
        return LlamaModel.load(read_model_config(files.config_path), source, max_model_len)


def _measured_blocks(
    model: LlamaModel, layout: KVLayout, max_model_len: int, limits: BatchLimits, utilization: float
) -> int:
    device = CudaDevice()  # of its own: its graphs and their memory end with it
    plan = largest_plan(layout, model.config.vocab_size, max_model_len, limits)
    runners: list[CudaRunner] = []

    def largest_step() -> int:
        runners.append(trial_runner(model, layout, plan, max_model_len, limits, device))
        runners[0].try_out(plan)
        return runners[0].num_blocks * layout.block_bytes

    def capture_step() -> None:
        runners[0].capture(log.debug, largest_only=True)

    memory = measure(device.torch_device, largest_step, capture_step)
    runners.clear()
    gc.collect()  # a runner and its graphs hold each other
    torch.cuda.empty_cache()  # what torch keeps for the next step is the KV cache's now, and will be found again there
    log.info("device memory measured", extra={"memory": memory})
    return num_blocks_that_fit(memory, utilization, layout.block_bytes)


def trial_runner(
    model: LlamaModel, layout: KVLayout, plan: StepPlan, max_model_len: int, limits: BatchLimits, device: Device
) -> CudaRunner:
    """With a cache for the plan alone, but block tables for the longest sequence: what is measured with them, and with what
    attention allocates for their width, is what serving will hold."""
    kv_cache = _kv_cache(layout, num_blocks_of(plan), device)
    max_blocks = layout.num_blocks_for(max_model_len)
    return CudaRunner(model, layout, kv_cache, max_model_len, limits, device, max_blocks)


def _kv_cache(layout: KVLayout, num_blocks: int, device: Device) -> torch.Tensor:
    shape = (num_blocks, *layout.block_shape)
    return torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype], device=device.torch_device)
