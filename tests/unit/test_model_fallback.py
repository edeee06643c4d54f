"""The fallback to the transformers library: what it refuses, by name, and how it tells what it could not have known."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, VOCAB_SIZE, write_model
from transformers import (
    BambaConfig,
    BartConfig,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma4TextConfig,
    GPTJConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    MambaConfig,
    MoshiConfig,
    MptConfig,
    Olmo2Config,
    PretrainedConfig,
    T5Config,
)

from engine.model.fallback.attention import Route
from engine.model.fallback.loading import make_up_weights
from engine.model.fallback.probe import ModelShape
from engine.model.fallback.self_check import SelfCheck, window_of
from engine.model.llama import StepInputs
from engine.torch_runner import RunnerOptions, build_torch_runner, plan_layout
from protocol.errors import ConfigError
from runtime.models.resolve import resolve_model

OPTIONS = RunnerOptions(dtype="float32", device="cpu", num_blocks=8)
DUMMY = replace(OPTIONS, load_format="dummy")
GQA = {**SHAPE, "num_hidden_layers": 2, "pad_token_id": 0}
MHA = {name: value for name, value in GQA.items() if name not in ("num_key_value_heads", "intermediate_size")}
GPTJ = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": VOCAB_SIZE, "eos_token_id": 0}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}

REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "alibi": (BloomConfig(**MHA), "'bloom' .* takes no position_ids"),
    "alibi-in-the-mask": (FalconConfig(**MHA, alibi=True), r"'falcon' .* bias on attention scores \(ALiBi\)"),
    "alibi-of-its-own": (MptConfig(**MHA, d_model=64, n_heads=4, n_layers=2), "'mpt' .* takes no position_ids"),
    "attention-of-its-own": (GPTJConfig(**GPTJ), "'gptj' .* cannot build it with attention"),
    "attention-sinks": (GptOssConfig(**GQA, num_local_experts=2), "'gpt_oss' .* attention sinks"),
    "bidirectional": (BertConfig(**GQA), "'bert' .* is causal, and its own is not"),
    "encoder-decoder": (T5Config(**MHA), "'t5' .* encoder-decoder"),
    "encoder-decoder-too": (BartConfig(**MHA), "'bart' .* encoder-decoder"),
    "head-dims-that-vary": (Gemma4TextConfig(**GQA), "'gemma4_text' .* its layers differ"),
    "multi-head-latent-attention": (
        DeepseekV3Config(**GQA, **MLA, n_routed_experts=4),
        "'deepseek_v3' .* keys of 24 and",
    ),
    "multimodal": (Gemma3Config(), "'gemma3' .* composite"),
    "recurrent": (MambaConfig(**MHA), "'mamba' .* recurrent state"),
    "recurrent-beside-attention": (JambaConfig(**GQA), "'jamba' .* recurrent state"),
    "recurrent-beside-attention-too": (BambaConfig(**GQA), "'bamba' .* recurrent state"),
    "softcap": (Gemma2Config(**GQA), "'gemma2' .* soft-capping of attention logits"),
    "two-attentions-a-layer": (DiffLlamaConfig(**GQA), "'diffllama' .* 4 attention calls for 2 layers"),
}


@pytest.fixture
def describe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder that holds a configuration and no weights, its `fields` put over those of the configuration."""

    def write(config: PretrainedConfig, **fields: object) -> Path:
        config.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        content = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 2048, **json.loads(path.read_text()), **fields}
        path.write_text(json.dumps(content))
        (tmp_path / "tokenizer.json").write_text("{}")
        return tmp_path

    return write


@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_cannot_work_is_refused_by_name_before_weights_are_read(kind: str, describe: Callable[..., Path]) -> None:
    config, reason = REFUSED[kind]
    with pytest.raises(ConfigError, match=reason):
        plan_layout(resolve_model(str(describe(config))), DUMMY)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architectures": ["Olmo2ForSequenceClassification"]}, "Olmo2ForSequenceClassification is no causal"),
        ({"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.Config"}}, "cannot read config.json"),
        ({"model_type": "unheard-of"}, "cannot read config.json.*unheard-of"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'olmo2' .* quantised"),
        ({"num_attention_heads": 3}, "'olmo2' .* query heads|cannot"),
        ({"hidden_act": "nonsense"}, "'olmo2' .* cannot build it .*nonsense"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_hidden_layers": 100_000}, "'olmo2' .* num_hidden_layers 100000 is not from 1 to 4096"),
        ({"num_attention_heads": 0}, "config.json: |num_attention_heads 0 is not"),
        ({"num_key_value_heads": 0}, "'olmo2' .* num_key_value_heads 0 is not from 1"),
        ({"hidden_size": 1 << 40}, "'olmo2' .* hidden_size 1099511627776 is not from 1 to 16777216"),
        ({"max_position_embeddings": 1 << 30}, "'olmo2' .* max_position_embeddings 1073741824 is not from 1"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "rope_type 'dynamic'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(
    fields: dict[str, object], reason: str, describe: Callable[..., Path]
) -> None:
    (folder := describe(Olmo2Config(**GQA), **fields)).joinpath("code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ConfigError, match=reason):
        plan_layout(resolve_model(str(folder)), replace(DUMMY, max_model_len=2048))


def test_a_length_dependent_rope_is_served_up_to_its_original_length(describe: Callable[..., Path]) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 256}
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    files = resolve_model(str(describe(Olmo2Config(**GQA), rope_parameters=longrope)))
    with pytest.raises(ConfigError, match=r"'longrope' .* set max_model_len to 256 or less"):
        plan_layout(files, DUMMY)
    layout = plan_layout(files, replace(DUMMY, max_model_len=256))
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (2, 2, 16)
    assert "longrope" in layout.rope


def test_chunks_of_attention_are_no_window(describe: Callable[..., Path]) -> None:
    """Only the rule of the mask tells: the attention calls of these layers look like any other."""
    config = Llama4TextConfig(**GQA, num_local_experts=2, attention_chunk_size=100, head_dim=16)
    files = resolve_model(str(describe(config)))
    with pytest.raises(ConfigError, match=r"'llama4_text' .* neither causal nor a sliding window"):
        build_torch_runner(files, DUMMY)


def test_a_window_that_only_the_library_s_cache_has_is_refused(describe: Callable[..., Path]) -> None:
    settings = {"sliding_window": 9, "num_codebooks": 2, "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-6}
    files = resolve_model(str(describe(MoshiConfig(**GQA, **settings), architectures=["MoshiForCausalLM"])))
    with pytest.raises(ConfigError, match=r"'moshi' .* cache forgets tokens"):
        build_torch_runner(files, DUMMY)


def test_a_model_without_the_library_says_what_to_install(
    describe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve_model(str(describe(Olmo2Config(**GQA))))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[transformers\]'"):
        plan_layout(files, DUMMY)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "missing tensor model.norm.weight"),
        (lambda weights: weights.update(surplus=torch.ones(2)), "unexpected tensor surplus"),
        (lambda weights: weights.update({"model.norm.weight": torch.ones(65)}), "mismatched tensor model.norm.weight"),
    ],
)
def test_a_checkpoint_must_fit_its_configuration(
    change: Callable[[dict[str, torch.Tensor]], object], named: str, tmp_path: Path
) -> None:
    folder = write_model(Olmo2Config(**GQA), tmp_path / "olmo2")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=named):
        build_torch_runner(resolve_model(str(folder)), OPTIONS)


def test_a_checkpoint_that_is_cut_off_is_named(tmp_path: Path) -> None:
    folder = write_model(Olmo2Config(**GQA), tmp_path / "olmo2")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"'olmo2' .* its weights in .*olmo2 cannot be loaded"):
        build_torch_runner(resolve_model(str(folder)), OPTIONS)


def test_weights_that_are_not_finite_are_told_from_a_model_that_does_not_fit(tmp_path: Path) -> None:
    folder = write_model(Olmo2Config(**GQA), tmp_path / "olmo2")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"'olmo2' cannot be served: its logits are not finite"):
        build_torch_runner(resolve_model(str(folder)), OPTIONS)


def test_made_up_weights_beyond_memory_are_refused() -> None:
    config = Olmo2Config(**{**GQA, "vocab_size": 1 << 24, "hidden_size": 1 << 24})
    with pytest.raises(ConfigError, match=r"'olmo2' .* its weights cannot be made up: .*alloc"):
        make_up_weights(config, 0, Route.INTERFACE, torch.float32, torch.device("cpu"))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = write_model(Olmo2Config(**GQA), tmp_path / "olmo2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors are read"):
        build_torch_runner(resolve_model(str(folder)), OPTIONS)


def test_identity_follows_weights_and_dummy_seed(tmp_path: Path) -> None:
    one, other = (write_model(Olmo2Config(**GQA), tmp_path / f"{seed}", seed) for seed in (1, 2))
    identities = {plan_layout(resolve_model(str(folder)), OPTIONS).identity for folder in (one, other)}
    files = resolve_model(str(one))
    identities |= {plan_layout(files, replace(DUMMY, seed=seed)).identity for seed in (1, 2)}
    assert len(identities) == 4


@pytest.mark.parametrize("window", [0, 1, 2, 63, 64, 100, 999])
def test_a_window_is_read_off_the_rule_of_a_mask(window: int) -> None:
    def rule(_batch: object, _head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        distance = query - key
        return (distance >= 0) & (distance < (window or 1 << 20))

    assert window_of(rule, 1000) == window


@pytest.mark.parametrize("window", [0, 4096, 1_000_000])
def test_a_window_of_a_long_model_is_read_in_parts(window: int) -> None:
    asked = []

    def rule(_batch: object, _head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        asked.append(key.numel())
        distance = query - key
        return (distance >= 0) & (distance < (window or 1 << 30))

    assert window_of(rule, (1 << 22) + 5) == window
    assert max(asked) < 1 << 20


@pytest.mark.parametrize(
    "rule",
    [
        lambda _batch, _head, query, key: (query >= key) & (query // 100 == key // 100),
        lambda _batch, _head, query, key: (query >= key) | (key < 8),
        lambda _batch, _head, query, key: query > key,
        lambda _batch, _head, query, key: (query - key < 50) & (key - query < 50),
    ],
    ids=["chunks", "prefix", "not-itself", "both-sides"],
)
def test_other_masks_are_no_window(rule: Callable[..., torch.Tensor]) -> None:
    assert window_of(rule, 1000) is None


class _Echo:
    """A model whose logits follow from the token and its position; `memory` adds what a step before it left behind."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._steps = 0

    def __call__(self, *, input_ids: torch.Tensor, position_ids: torch.Tensor, **_: object) -> "_Echo":
        self.logits = self._rows(input_ids[0], position_ids[0])[None]
        return self

    def forward(self, inputs: StepInputs, *_: object) -> torch.Tensor:
        self._steps += 1
        return self._rows(inputs.token_ids, inputs.positions) + self._memory * (self._steps - 1)

    def _rows(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.sin(tokens[:, None] * torch.arange(1.0, 9.0) + positions[:, None])


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_the_self_check_notices_a_state_between_steps(memory: float) -> None:
    shape = ModelShape(vocab_size=8, num_layers=1, num_kv_heads=1, head_dim=8, route=Route.INTERFACE)
    check, model = SelfCheck(Olmo2Config(**GQA), shape, block_size=4, device=torch.device("cpu")), _Echo(memory)
    check.run_reference(model)
    if memory:
        with pytest.raises(ConfigError, match=r"'olmo2' .* it does more than attend"):
            check.compare(model, torch.empty(0))
    else:
        check.compare(model, torch.empty(0))
