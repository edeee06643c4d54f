"""TorchRunner's greedy output == the transformers library's, token for token, in fp32, for every supported family."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runner_driver import Driver, Sequence
from tiny_models import CONFIGS, SHAPE, greedy_reference, load_reference, make_model, write_model
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from engine.torch_runner import RunnerOptions, TorchRunner, build_torch_runner
from protocol.ids import RequestId
from runtime.models.resolve import resolve_model

NUM_TOKENS = 16
PROMPT_LENGTHS = (1, 15, 16, 17, 100)
OPTIONS = RunnerOptions(dtype="float32", device="cpu", block_size=16, num_blocks=40)


def rope(rope_type: str, **settings: float) -> dict[str, object]:
    return {"rope_type": rope_type, "rope_theta": 10000.0, **settings}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0)
VARIANTS: dict[str, PretrainedConfig] = {
    **CONFIGS,
    "llama-rope-llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-rope-linear": LlamaConfig(**SHAPE, rope_parameters=rope("linear", factor=4.0)),
    "llama-biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-no-gqa": LlamaConfig(**{**SHAPE, "num_key_value_heads": 4}),
    "mistral-short-window": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2-untied": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen2-mixed-windows": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=20, max_window_layers=1),
    "qwen3-rope-yarn": Qwen3Config(**SHAPE, head_dim=32, rope_parameters=YARN),
    "qwen3-biases": Qwen3Config(**SHAPE, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


def prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 512) for _ in range(length)] for length in PROMPT_LENGTHS]


def build(folder: Path, options: RunnerOptions = OPTIONS) -> TorchRunner:
    return build_torch_runner(resolve_model(str(folder)), options)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_greedy_equals_transformers(variant: str, tmp_path: Path) -> None:
    folder = write_model(VARIANTS[variant], tmp_path / variant)
    reference, driver = load_reference(folder), Driver(build(folder))
    for prompt in prompts(1):
        expected = greedy_reference(reference, prompt, NUM_TOKENS)
        assert driver.generate(prompt, NUM_TOKENS).output == expected
        assert driver.generate(prompt, NUM_TOKENS, chunk=13).output == expected


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


def test_a_mixed_batch_is_each_sequence_alone(llama: Path) -> None:
    """Decodes, a prompt's middle and a prompt's end in one step."""
    reference, driver = load_reference(llama), Driver(build(llama))
    sequences = [Sequence(RequestId(f"{i}"), prompt) for i, prompt in enumerate(prompts(2))]
    for joining in sequences:
        running = [each for each in sequences if each.tokens]
        while joining.num_computed < len(joining.prompt):
            left = len(joining.prompt) - joining.num_computed
            sampled = driver.step(*((each, 1) for each in running), (joining, min(9, left)))
            assert (sampled[-1] is None) == (left > 9)
    while any(len(each.tokens) < NUM_TOKENS for each in sequences):
        driver.step(*((each, 1) for each in sequences))
    for each in sequences:
        assert each.output[:NUM_TOKENS] == greedy_reference(reference, each.prompt, NUM_TOKENS)


def test_a_cached_prefix_is_read_from_the_blocks(llama: Path) -> None:
    """Another sequence goes on from blocks that the first one filled."""
    driver = Driver(build(llama))
    shared, rest = list(range(10, 42)), [7, 8, 9]
    first = Sequence(RequestId("first"), shared)
    driver.step((first, len(shared)))
    second = Sequence(RequestId("second"), shared + rest, num_computed=32, block_ids=first.block_ids[:2])
    driver.step((second, len(rest)))
    assert second.output == greedy_reference(load_reference(llama), shared + rest, 1)


def test_memory_of_the_caller_holds_the_cache(llama: Path) -> None:
    runner = build(llama)
    memory = torch.zeros(runner.num_blocks * runner.layout.block_bytes, dtype=torch.uint8)
    sharing = build_torch_runner(resolve_model(str(llama)), OPTIONS, kv_memory=memory)
    Driver(sharing).generate(list(range(5, 25)), 2)
    assert memory.any()


def test_warm_up_leaves_no_trace_in_results(llama: Path) -> None:
    cold, warm = build(llama), build(llama)
    warm.warm_up()
    prompt = prompts(3)[-1]
    assert Driver(warm).generate(prompt, 8).tokens == Driver(cold).generate(prompt, 8).tokens


def test_sampled_sequences_do_not_depend_on_the_batch(llama: Path) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.4, "logprobs": 2}
    driver = Driver(build(llama))
    alone = [driver.generate(prompt, 10, seed=i, **options) for i, prompt in enumerate(prompts(4))]
    together = [Sequence(RequestId(f"b{i}"), each.prompt, each.sampling) for i, each in enumerate(alone)]
    driver.step(*((each, len(each.prompt)) for each in together))
    for _ in range(9):
        driver.step(*((each, 1) for each in reversed(together)))
    assert [each.output for each in together] == [each.output for each in alone]


def test_bfloat16_stays_close_to_float32(llama: Path) -> None:
    prompt = prompts(5)[-1]
    exact = Driver(build(llama)).generate(prompt, 1, logprobs=5).tokens[0]
    options = RunnerOptions(dtype="bfloat16", device="cpu", num_blocks=40)
    rounded = Driver(build(llama, options)).generate(prompt, 1, logprobs=5).tokens[0]
    assert dict(rounded.top)[exact.token_id] == pytest.approx(exact.logprob, abs=0.25)


def test_page_formats_give_the_same_tokens(llama: Path) -> None:
    tiled = Driver(build(llama, RunnerOptions(dtype="bfloat16", device="cpu", num_blocks=40)))
    plain = Driver(build(llama, RunnerOptions(dtype="bfloat16", device="cpu", num_blocks=40, page_format="plain")))
    for prompt in prompts(6):
        expected = plain.generate(prompt, 20, chunk=13, logprobs=1).tokens
        assert tiled.generate(prompt, 20, chunk=13, logprobs=1).tokens == expected


def test_int8_stays_close_and_does_not_share_kv_with_other_weights(llama: Path) -> None:
    prompt = prompts(5)[-1]
    exact = Driver(build(llama)).generate(prompt, 1, logprobs=5).tokens[0]
    runner = build(llama, replace(OPTIONS, quantization="int8"))
    rounded = Driver(runner).generate(prompt, 1, logprobs=5).tokens[0]
    assert dict(rounded.top)[exact.token_id] == pytest.approx(exact.logprob, abs=0.5)
    assert rounded.logprob != exact.logprob
    assert build(llama).layout.differences(runner.layout) == ["quantization: 'none' != 'int8'"]


def test_dummy_weights_need_no_checkpoint_and_repeat(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "elsewhere")
    try:
        options = RunnerOptions(dtype="float32", device="cpu", load_format="dummy", num_blocks=40, seed=3)
        first, second = build(llama, options), build(llama, options)
        other = build(llama, RunnerOptions(dtype="float32", device="cpu", load_format="dummy", num_blocks=40, seed=4))
        prompt = list(range(30))
        tokens = Driver(first).generate(prompt, 8, logprobs=0).tokens
        assert tokens == Driver(second).generate(prompt, 8, logprobs=0).tokens
        assert tokens != Driver(other).generate(prompt, 8, logprobs=0).tokens
        assert first.layout.fingerprint == second.layout.fingerprint != other.layout.fingerprint
    finally:
        (llama / "elsewhere").rename(llama / "model.safetensors")
