"""Models that only the transformers library knows, over our paged cache: equal to the library token for token, in fp32."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
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
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    StableLmConfig,
    Starcoder2Config,
)

from engine.torch_runner import RunnerOptions, TorchRunner, build_torch_runner
from protocol.ids import RequestId
from runtime.models.resolve import resolve_model

NUM_TOKENS = 10
BLOCK_SIZE = 8
CHUNK = 13
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
    """As an engine would: prompts in chunks beside the decodes of those that came before, a cached prefix, one batch."""
    sequences = [Sequence(RequestId(f"{number}"), text) for number, text in enumerate(texts)]
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


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(CONFIGS[name], tmp_path / name)
    reference, runner = load_reference(folder), build(folder)
    assert (runner.layout.num_kv_heads, runner.layout.head_dim) == KV_SHAPES.get(name, (2, 16))
    for sequence in serve(Driver(runner), prompts()):
        assert sequence.output[:NUM_TOKENS] == greedy_reference(reference, sequence.prompt, NUM_TOKENS)
