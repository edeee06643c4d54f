"""How many KV blocks fit on a GPU, and what a node is told that cannot use one."""

from pathlib import Path

import pytest
import torch
from tiny_models import SHAPE, make_model, write_model
from transformers import Olmo2Config

from engine.build import plan_engine
from engine.cuda.limits import BatchLimits
from engine.cuda.memory import DeviceMemory, measure, num_blocks_that_fit
from engine.cuda.trial_plans import largest_plan, num_blocks_of
from engine.model.options import RunnerOptions, plan_layout
from protocol.errors import ConfigError
from runtime.models.resolve import resolve_model
from runtime.node_config import CacheOptions, ModelOptions, NodeConfig

GIB, MIB = 1 << 30, 1 << 20
H100 = DeviceMemory(total=80 * GIB, foreign=GIB, weights=15 * GIB, step=2 * GIB, graphs=GIB // 2)


def test_blocks_take_what_everything_else_leaves() -> None:
    assert num_blocks_that_fit(H100, 0.9, 2 * MIB) == int((80 * 0.9 - 18.5) * 512)
    assert num_blocks_that_fit(H100, 1.0, 2 * MIB) == int((80 - 18.5) * 512)


def test_the_refusal_names_every_number() -> None:
    with pytest.raises(ConfigError) as caught:
        num_blocks_that_fit(H100, 0.2, 2 * MIB)
    assert caught.value.param == "cache.gpu_memory_utilization"
    assert caught.value.message == (
        "no KV block of 2097152 bytes fits: 0.2 of 81920 MiB is 16384 MiB, and weights 15360 MiB, the largest step 2048 MiB,"
        " captured steps 512 MiB, other uses of the device 1024 MiB leave -2560 MiB; raise cache.gpu_memory_utilization,"
        " or lower scheduler.max_num_batched_tokens or scheduler.max_num_seqs"
    )


class FakeGpu:
    """A GPU's memory as torch reports it. What is freed stays reserved until the cache is emptied."""

    def __init__(self, total: int, foreign: int) -> None:
        self.total, self.foreign = total, foreign
        self.allocated = self.peak = self.reserved = 0

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak, self.reserved = max(self.peak, self.allocated), max(self.reserved, self.allocated)

    def free(self, size: int) -> None:
        self.allocated -= size

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name, function in {
            "synchronize": lambda _device: None,
            "memory_allocated": lambda _device: self.allocated,
            "memory_reserved": lambda _device: self.reserved,
            "max_memory_allocated": lambda _device: self.peak,
            "reset_peak_memory_stats": lambda _device: setattr(self, "peak", self.allocated),
            "empty_cache": lambda: setattr(self, "reserved", self.allocated),
            "mem_get_info": lambda _device: (self.total - self.foreign - self.reserved, self.total),
        }.items():
            patch.setattr(torch.cuda, name, function)


def test_what_a_step_takes_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(total=80 * GIB, foreign=GIB)
    gpu.install(monkeypatch)
    gpu.allocate(20 * GIB)  # while loading
    gpu.free(5 * GIB)

    def largest_step() -> int:
        gpu.allocate(GIB)  # a small KV cache
        gpu.allocate(2 * GIB)
        gpu.free(2 * GIB)
        return GIB

    def capture_step() -> None:
        gpu.allocate(3 * GIB)  # run before it is captured
        gpu.free(3 * GIB)
        gpu.allocate(GIB // 4)
        gpu.foreign += GIB // 4  # the driver's

    assert measure(torch.device("cpu"), largest_step, capture_step) == H100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model("llama", tmp_path_factory.mktemp("model")))


def test_the_largest_step_is_as_large_as_a_step_can_be(folder: str) -> None:
    layout = plan_layout(resolve_model(folder), RunnerOptions(dtype="float32", device="cpu"))
    for limits, tokens, draws in (
        (BatchLimits(max_num_seqs=64, max_num_batched_tokens=512), 512, 64),
        (BatchLimits(max_num_seqs=64, max_num_batched_tokens=512, max_drafts=3), 512, 256),
        (BatchLimits(max_num_seqs=64, max_num_batched_tokens=16, max_drafts=3), 16, 16),
        (BatchLimits(max_num_seqs=2, max_num_batched_tokens=512), 200, 2),
    ):
        plan = largest_plan(layout, 512, 100, limits)
        assert plan.num_tokens == tokens
        assert sum(chunk.num_rows for chunk in plan.chunks) == draws
        blocks = [block_id for chunk in plan.chunks for block_id in chunk.block_ids]
        assert sorted(blocks) == list(range(num_blocks_of(plan)))


def config(folder: str, **model: object) -> NodeConfig:
    options = ModelOptions(**{"model": folder, "dtype": "float32", "device": "cuda", **model})
    return NodeConfig(model=options, cache=CacheOptions(gpu_memory_utilization=0.5))


def test_cuda_is_refused_where_there_is_none(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        plan_engine(config(folder))
    assert not plan_engine(config(folder, device="auto")).on_device


def test_a_gpus_cache_is_measured_and_no_arena_is_reserved_for_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = plan_engine(config(folder))
    assert plan.on_device
    assert (plan.num_blocks, plan.options.gpu_memory_utilization) == (0, 0.5)
    assert plan.served(10).max_model_len == 160
    with pytest.raises(ConfigError, match="simulated runner computes on the CPU"):
        plan_engine(config(folder, runner="simulated"))


def test_a_model_that_is_not_native_is_planned_for_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(write_model(Olmo2Config(**SHAPE), tmp_path / "olmo2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="that the transformers library runs are served on CPUs only") as caught:
        plan_engine(config(folder))
    assert caught.value.param == "model.device"
    plan = plan_engine(config(folder, device="auto"))
    assert (plan.on_device, plan.options.device) == (False, "cpu")
    assert plan.num_blocks > 1
