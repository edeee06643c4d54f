"""Models that only the transformers library knows, over our paged cache: equal to its own greedy output in fp32."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from runner_driver import Driver, Sequence
from tiny_models import BOS, EOS, SHAPE, VOCAB_SIZE, greedy_reference, load_reference, write_model
from transformers import (
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from engine.build import build_engine, plan_engine
from engine.events import EngineEvent, Failed, Finished, TokensSampled
from engine.request import EngineRequest
from engine.torch_runner import RunnerOptions, TorchRunner, build_torch_runner
from protocol.ids import Incarnation, RequestId
from protocol.sampling import SamplingParams
from runtime.models.resolve import resolve_model
from runtime.node_config import CacheOptions, ModelOptions, NodeConfig, SchedulerOptions

NUM_TOKENS = 10
BLOCK_SIZE = 8
CHUNK = 13
WAIT_S = 20.0
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, seed=0, temperature=0.0, logprobs=0)
OPTIONS = RunnerOptions(dtype="float32", device="cpu", block_size=BLOCK_SIZE, num_blocks=48)

LAYERS = 2
TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "initializer_range": 0.2}
GQA = {**SHAPE, **TOKENS, "num_hidden_layers": LAYERS}
MHA = {name: value for name, value in GQA.items() if name != "num_key_value_heads"}
MIXED = ["sliding_attention", "full_attention"]
FALCON = {name: value for name, value in MHA.items() if name != "intermediate_size"}
GPT2 = {"n_positions": 256, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCAB_SIZE, **TOKENS}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_experts": 4}

CONFIGS: dict[str, PretrainedConfig] = {
    "cohere": CohereConfig(**GQA, logit_scale=0.25, use_qk_norm=True),
    "cohere2": Cohere2Config(**GQA, sliding_window=9, layer_types=MIXED),
    "falcon-multi-query": FalconConfig(**FALCON, alibi=False, multi_query=True),
    "falcon-new-decoder": FalconConfig(**FALCON, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "gemma": GemmaConfig(**GQA, head_dim=24),
    "gemma3": Gemma3TextConfig(**GQA, head_dim=32, sliding_window=7, layer_types=MIXED, query_pre_attn_scalar=24),
    "gpt2": GPT2Config(**GPT2),
    "gpt-neox": GPTNeoXConfig(**MHA, rotary_pct=0.25, use_parallel_residual=True),
    "granite": GraniteConfig(**GQA, logits_scaling=4.0, attention_multiplier=0.2, residual_multiplier=0.6),
    "mixtral": MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2, sliding_window=11),
    "olmo": OlmoConfig(**GQA, clip_qkv=3.0),
    "olmo2": Olmo2Config(**GQA),
    "opt": OPTConfig(**MHA, ffn_dim=112, word_embed_proj_dim=64),
    "phi": PhiConfig(**GQA, partial_rotary_factor=0.5, qk_layernorm=True),
    "phi3": Phi3Config(**GQA, sliding_window=9),
    "qwen2-moe": Qwen2MoeConfig(**GQA, **EXPERTS, shared_expert_intermediate_size=48, decoder_sparse_step=2),
    "qwen3-moe": Qwen3MoeConfig(**GQA, **EXPERTS, head_dim=32, norm_topk_prob=True),
    "stablelm": StableLmConfig(**GQA, use_qkv_bias=True, qk_layernorm=True, partial_rotary_factor=0.25),
    "starcoder2": Starcoder2Config(**GQA, sliding_window=12, use_bias=True),
}
KV_SHAPES = {  # KV heads and head dimension, where they are not those of SHAPE
    "falcon-multi-query": (1, 16),
    "falcon-new-decoder": (4, 16),  # the library repeats the heads of a group itself
    "gemma": (2, 24),
    "gemma3": (2, 32),
    "gpt2": (4, 16),
    "gpt-neox": (4, 16),
    "opt": (4, 16),
    "qwen3-moe": (2, 32),
}


def build(folder: Path, options: RunnerOptions = OPTIONS) -> TorchRunner:
    return build_torch_runner(resolve_model(str(folder)), options)


def prompts() -> list[list[int]]:
    """Longer than every window. The last goes on from four full blocks of the one before it."""
    rng = random.Random(1)
    one, two, rest = ([rng.randrange(2, VOCAB_SIZE) for _ in range(length)] for length in (5, 43, 6))
    return [one, two, two[: 4 * BLOCK_SIZE] + rest]


def serve(driver: Driver, texts: list[list[int]]) -> list[Sequence]:
    """As an engine would: prompts in chunks beside the decodes of those before them, a cached prefix, one batch."""
    sequences = [Sequence(RequestId(f"{number}"), text, GREEDY) for number, text in enumerate(texts)]
    for before, joining in pairwise([None, *sequences]):
        if before is not None and before.prompt[: 4 * BLOCK_SIZE] == joining.prompt[: 4 * BLOCK_SIZE]:
            joining.block_ids, joining.num_computed = before.block_ids[:4], 4 * BLOCK_SIZE
        running = [each for each in sequences if each.tokens]
        while joining.num_computed < len(joining.prompt):
            chunk = min(CHUNK, len(joining.prompt) - joining.num_computed)
            driver.step(*((each, 1) for each in running), (joining, chunk))
    while any(len(each.tokens) < NUM_TOKENS for each in sequences):
        driver.step(*((each, 1) for each in sequences))
    return sequences


def reference_logprobs(model: PreTrainedModel, prompt: list[int], output: list[int]) -> list[float]:
    """Of each output token. Some random models repeat one token for ever: these numbers still tell right from wrong."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(output)), output].tolist()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(CONFIGS[name], tmp_path / name)
    reference, runner = load_reference(folder), build(folder)
    assert (runner.layout.num_kv_heads, runner.layout.head_dim) == KV_SHAPES.get(name, (2, 16))
    for sequence in serve(Driver(runner), prompts()):
        expected = greedy_reference(reference, sequence.prompt, NUM_TOKENS)
        assert sequence.output[:NUM_TOKENS] == expected
        logprobs = [token.logprob for token in sequence.tokens[:NUM_TOKENS]]
        assert logprobs == pytest.approx(reference_logprobs(reference, sequence.prompt, expected), abs=1e-3)


def test_longrope_within_its_original_length(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.5] * 4, "long_factor": [2.0] * 8, "original_max_position_embeddings": 128}
    longrope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    folder = write_model(Phi3Config(**GQA, rope_parameters=longrope), tmp_path / "phi3")
    driver = Driver(build(folder, replace(OPTIONS, max_model_len=128)))
    expected = greedy_reference(load_reference(folder), prompts()[1], NUM_TOKENS)
    assert driver.generate(prompts()[1], NUM_TOKENS, chunk=CHUNK).output == expected


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(CONFIGS["gemma3"], tmp_path_factory.mktemp("model") / "gemma3")


def test_bfloat16_stays_close_to_float32(gemma3: Path) -> None:
    prompt = prompts()[1]
    exact = Driver(build(gemma3)).generate(prompt, 1, logprobs=5).tokens[0]
    options = RunnerOptions(dtype="bfloat16", device="cpu", num_blocks=40)
    rounded = Driver(build(gemma3, options)).generate(prompt, 1, logprobs=5).tokens[0]
    assert dict(rounded.top)[exact.token_id] == pytest.approx(exact.logprob, abs=0.25)


def test_dummy_weights_need_no_checkpoint_and_repeat(gemma3: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((gemma3 / name).read_bytes())
    runners = [build(tmp_path, replace(OPTIONS, load_format="dummy", seed=seed)) for seed in (3, 3, 4)]
    first, second, other = (Driver(runner).generate(prompts()[1], 8, logprobs=0).tokens for runner in runners)
    assert first == second != other


def test_two_models_share_a_process(gemma3: Path, tmp_path: Path) -> None:
    """The attention function is registered once for all of them; what it works on belongs to the step."""
    falcon = write_model(CONFIGS["falcon-multi-query"], tmp_path / "falcon")
    drivers = [Driver(build(folder)) for folder in (gemma3, falcon)]
    sequences = [Sequence(RequestId("one"), prompts()[1]) for _ in drivers]
    for driver, sequence in zip(drivers, sequences, strict=True):
        driver.step((sequence, len(sequence.prompt)))
    for _ in range(NUM_TOKENS - 1):
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda each: each[0].step((each[1], 1)), zip(drivers, sequences, strict=True)))
    for folder, sequence in zip((gemma3, falcon), sequences, strict=True):
        assert sequence.output == greedy_reference(load_reference(folder), sequence.prompt, NUM_TOKENS)


def test_a_node_s_configuration_builds_an_engine_that_generates(gemma3: Path) -> None:
    config = NodeConfig(
        model=ModelOptions(model=str(gemma3), dtype="float32"),
        cache=CacheOptions(block_size=BLOCK_SIZE, memory="1MiB"),
        scheduler=SchedulerOptions(max_num_batched_tokens=CHUNK),
    )
    plan = plan_engine(config)
    memory = torch.zeros(plan.num_blocks * plan.layout.block_bytes, dtype=torch.uint8)
    built = build_engine(config, plan, Incarnation("test"), memory)
    assert built.model.vocab_size == VOCAB_SIZE
    engine = built.engine
    heard: SimpleQueue[EngineEvent] = SimpleQueue()
    engine.start(lambda events: [heard.put(event) for event in events])
    prompt = prompts()[1]
    engine.submit(EngineRequest(RequestId("one"), tuple(prompt), GREEDY))
    output: list[int] = []
    while not isinstance(event := heard.get(timeout=WAIT_S), Finished):
        assert not isinstance(event, Failed)
        output += [token.token_id for token in event.tokens] if isinstance(event, TokensSampled) else []
    assert engine.stop(WAIT_S)
    assert output == greedy_reference(load_reference(gemma3), prompt, NUM_TOKENS)
