"""Prefill and decode node on GPUs that are stood in for: tokens as of a single node, whichever way the KV takes."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from completions import complete_all, complete_together
from device_cluster import running_device_cluster
from graph_ops import captured_operations
from tiny_models import greedy_reference, load_reference, make_model

from engine.model.llama import LlamaModel
from engine.model.options import RunnerOptions
from engine.torch_runner import build_torch_runner
from kv_transfer.memory import device_blocks
from kv_transfer.memory.device_arena import DeviceArena
from runtime.models.resolve import resolve_model
from runtime.node_config import TransferOptions

NUM_TOKENS = 12
PROMPT_LENGTHS = [1, 15, 16, 17, 64, 333]
SMALL_STAGING = "96KiB"
"""Eight blocks: 333 tokens take 21."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_model("llama", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(folder: str) -> Iterator[LlamaModel]:
    with captured_operations():
        options = RunnerOptions(dtype="float32", device="cpu", num_blocks=1)
        yield build_torch_runner(resolve_model(folder), options)._model


@pytest.fixture(scope="module")
def expected(folder: str) -> list[list[int]]:
    reference = load_reference(Path(folder))
    return [greedy_reference(reference, prompt, NUM_TOKENS) for prompt in prompts()]


def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(2, 512) for _ in range(length)] for length in PROMPT_LENGTHS]


class _ReachableArena(DeviceArena):
    """The memory of a GPU that NIXL reaches, stood in for by this machine's own."""

    memory_kind = "host"  # type: ignore[assignment, misc]  # which the real one never is


@pytest.mark.parametrize("way", ["nixl, direct", "nixl, staged", "shm, staged"])
async def test_tokens_are_those_of_a_single_node(
    way: str,
    folder: str,
    model: LlamaModel,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "kv_transfer.memory.device_blocks")
    if way.endswith("direct"):
        monkeypatch.setattr(device_blocks, "DeviceArena", _ReachableArena)
    transfer = TransferOptions(
        transport="nixl" if way.startswith("nixl") else "shm",
        device_memory="direct" if way.endswith("direct") else "auto",
        staging_memory=SMALL_STAGING,
        stall_timeout_s=30.0,  # a slow machine is no reason to compute again
    )
    async with running_device_cluster(folder, model, transfer, monkeypatch) as cluster:
        assert await complete_all(cluster.url, prompts(), NUM_TOKENS) == expected
        assert await complete_together(cluster.url, prompts(), NUM_TOKENS) == expected
        loads = {role: engine.load() for role, engine in cluster.engines.items()}
        assert loads["prefill"].computed_prompt_tokens >= sum(PROMPT_LENGTHS)
        assert loads["decode"].computed_prompt_tokens == 0
        await cluster.at_rest()
    said = "device's memory directly" if way.endswith("direct") else "through 8 staging blocks"
    assert caplog.text.count(said) == 2
