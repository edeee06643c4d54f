"""The whole step in one call against the same model operation by operation: the roundings are the same, so are the bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, SHAPE, write_model
from transformers import LlamaConfig, Qwen2Config

from engine.model.config import read_model_config
from engine.model.llama import LlamaModel, StepInputs
from engine.model.weights import SafetensorsSource
from kernels import native_library
from kernels.attention_batch import AttentionBatch
from kernels.kv_cache import PageFormat
from kernels.linear import Quantization
from kernels.llama_step import LlamaStep

pytestmark = pytest.mark.skipif(not native_library.status().available, reason="needs the C++ library")

VARIANTS = {
    **CONFIGS,
    "biases": LlamaConfig(**{**SHAPE, "intermediate_size": 90}, attention_bias=True, mlp_bias=True),
    "windows": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=20, max_window_layers=1),
}
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 16, 64, 512


def load(folder: Path, dtype: torch.dtype, quantization: Quantization = "none") -> LlamaModel:
    config = read_model_config(folder / "config.json")
    source = SafetensorsSource(folder, dtype, torch.device("cpu"), lambda _: None)
    return LlamaModel.load(config, source, MAX_MODEL_LEN, quantization)


def operation_by_operation(monkeypatch: pytest.MonkeyPatch, load_model: Callable[[], LlamaModel]) -> LlamaModel:
    monkeypatch.setattr(LlamaStep, "supporting", classmethod(lambda cls, weights: None))
    model = load_model()
    monkeypatch.undo()
    return model


def make_inputs(sequences: list[tuple[int, int]], sampled: list[int]) -> StepInputs:
    """(cached, new) tokens of each sequence; `sampled` sequences want logits of their last token."""
    generator = torch.Generator().manual_seed(1)
    contexts = [cached + new for cached, new in sequences]
    blocks = torch.randperm(NUM_BLOCKS, generator=generator).int()
    tables = torch.zeros(len(sequences), max(-(-context // BLOCK_SIZE) for context in contexts), dtype=torch.int32)
    for row, context in enumerate(contexts):
        used = -(-context // BLOCK_SIZE)
        tables[row, :used], blocks = blocks[:used], blocks[used:]
    positions = torch.cat([torch.arange(cached, cached + new) for cached, new in sequences])
    rows = torch.arange(len(sequences)).repeat_interleave(torch.tensor([new for _, new in sequences]))
    starts = torch.tensor([0, *(new for _, new in sequences)], dtype=torch.int32).cumsum(0).int()
    return StepInputs(
        token_ids=torch.randint(0, SHAPE["vocab_size"], positions.shape, generator=generator),
        positions=positions,
        slots=tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        sampling_rows=starts[1:].long()[sampled] - 1,
        batch=AttentionBatch(starts, torch.tensor(contexts, dtype=torch.int32), tables, max(rows), max(contexts)),
    )


def new_cache(model: LlamaModel, dtype: torch.dtype) -> torch.Tensor:
    config = model.config
    shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_equals_operation_by_operation(
    variant: str, quantization: Quantization, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(VARIANTS[variant], tmp_path / variant)
    whole = load(folder, dtype, quantization)
    apart = operation_by_operation(monkeypatch, lambda: load(folder, dtype, quantization))
    assert isinstance(LlamaStep.supporting(whole._weights), LlamaStep)
    inputs = make_inputs([(40, 1), (0, 37), (33, 30), (0, 1)], sampled=[0, 2, 3])
    formats: list[PageFormat] = ["plain"] if dtype == torch.float32 else ["plain", "bf16-tiled"]
    for page_format in formats:
        cache, expected_cache = new_cache(whole, dtype), new_cache(whole, dtype)
        expected = apart.forward(inputs, expected_cache, page_format)
        for _ in range(2):  # the memory of the first step serves the second
            actual = whole.forward(inputs, cache, page_format)
            assert actual.isfinite().all()
            assert torch.equal(actual, expected)
            assert torch.equal(cache, expected_cache)


@pytest.fixture
def llama(tmp_path: Path) -> LlamaModel:
    return load(write_model(CONFIGS["llama"], tmp_path / "llama"), torch.bfloat16)


def test_nothing_sampled(llama: LlamaModel) -> None:
    cache, inputs = new_cache(llama, torch.bfloat16), make_inputs([(5, 20)], sampled=[])
    before = cache.clone()
    assert llama.forward(inputs, cache).shape == (0, SHAPE["vocab_size"])
    assert not torch.equal(cache, before)


@pytest.mark.parametrize("name", ["token_ids", "positions", "slots", "sampling_rows"])
@pytest.mark.parametrize("value", [-1, 1 << 20])
def test_indices_are_checked(llama: LlamaModel, name: str, value: int) -> None:
    inputs = make_inputs([(3, 4)], sampled=[0])
    getattr(inputs, name)[-1] = value
    with pytest.raises(IndexError):
        llama.forward(inputs, new_cache(llama, torch.bfloat16))


def test_the_cache_is_checked(llama: LlamaModel) -> None:
    inputs, cache = make_inputs([(3, 4)], sampled=[0]), new_cache(llama, torch.bfloat16)
    for wrong in (cache[:, :2], cache[:, :, :, :1], cache.float()):
        with pytest.raises(ValueError, match="cache"):
            llama.forward(inputs, wrong)
