"""config.json, weights and options: what is understood, what is refused by name, and the KV layout that follows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, make_model

from engine.model.config import ModelConfig, read_model_config
from engine.model.options import resolve_max_model_len
from engine.model.rope import parse_rope, rope_tables
from engine.torch_runner import RunnerOptions, build_torch_runner, num_blocks_for_memory, plan_layout
from kernels import native_library
from protocol.errors import ConfigError
from runtime.models.resolve import resolve_model

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 8}
OPTIONS = RunnerOptions(dtype="float32", device="cpu", num_blocks=4)


def parse(tmp_path: Path, **fields: object) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**BASE, **fields}))
    return read_model_config(path)


def test_what_is_derived(tmp_path: Path) -> None:
    config = parse(tmp_path, num_key_value_heads=None)
    assert (config.head_dim, config.num_kv_heads, config.sliding_windows) == (16, 4, (0, 0, 0, 0))
    assert not any((config.tied_embeddings, config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm))
    assert parse(tmp_path, architectures=None) == parse(tmp_path)


def test_biases_and_norms_of_each_family(tmp_path: Path) -> None:
    llama = parse(tmp_path, attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = parse(tmp_path, **QWEN)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = parse(tmp_path, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 32)


def test_sliding_windows(tmp_path: Path) -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": 8}
    assert parse(tmp_path, **mistral).sliding_windows == (8, 8, 8, 8)
    assert parse(tmp_path, **QWEN).sliding_windows == (0, 0, 0, 0)
    assert parse(tmp_path, **QWEN, use_sliding_window=True, max_window_layers=3).sliding_windows == (0, 0, 0, 8)
    layer_types = ["sliding_attention", "full_attention"] * 2
    assert parse(tmp_path, **QWEN, use_sliding_window=True, layer_types=layer_types).sliding_windows == (8, 0, 8, 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": None, "model_type": "gemma"}, "model_type 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"num_attention_heads": 6}, "hidden_size 64"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({**QWEN, "use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({**QWEN, "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        (
            {**QWEN, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4, "sliding_window": None},
            "sliding_window",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "no factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "factor 0.5"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "unheard_of": 1}}, "unheard_of"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_theta": -1.0}, "rope_theta"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict[str, object], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        parse(tmp_path, **fields)
    assert "config.json" in caught.value.message


def test_old_and_new_spelling_of_rope_are_one(tmp_path: Path) -> None:
    old = parse(tmp_path, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4})
    new = parse(tmp_path, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5})
    assert old.rope == new.rope
    assert old.rope.canonical_text() == new.rope.canonical_text()
    assert old.rope.canonical_text() != parse(tmp_path, rope_theta=5e5).rope.canonical_text()


def test_rope_tables_are_half_a_head_wide() -> None:
    rope = parse_rope(None, None, 10000.0, 64)
    cos, sin = rope_tables(rope, 8, 64, torch.device("cpu"))
    assert cos.shape == sin.shape == (64, 4)
    assert torch.allclose(cos**2 + sin**2, torch.ones(64, 4))
    assert torch.allclose(sin[1], torch.tensor([10000.0]).pow(-torch.arange(4) / 4).sin())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "qwen2"))


Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda t: t.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight is torch.float32"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}), "torch.int8"),
        (lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}), "no place for tensor .*o_proj"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(1)}), "no place for tensor .*layers.3"),
    ],
)
def test_a_checkpoint_that_is_not_the_model_is_refused(
    damage: Callable[[Tensors], object], named: str, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=named):
        build_torch_runner(resolve_model(str(folder)), OPTIONS)


def test_what_old_checkpoints_carry_along_is_ignored(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    build_torch_runner(resolve_model(str(folder)), OPTIONS)


def test_a_sharded_checkpoint_is_the_same_model(folder: Path, original: Path) -> None:
    tensors, lines = load_file(folder / "model.safetensors"), []
    (folder / "model.safetensors").unlink()
    shards = {f"model-{number:05}-of-00002.safetensors": sorted(tensors)[number::2] for number in range(2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    runner = build_torch_runner(resolve_model(str(folder)), OPTIONS, progress=lines.append)
    assert lines[-1] == f"loaded {len(tensors)} of {len(tensors)} tensors"
    assert runner.layout.model != plan_layout(resolve_model(str(original)), OPTIONS).model


def test_a_truncated_checkpoint_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        build_torch_runner(resolve_model(str(folder)), OPTIONS)


class TestOptions:
    def test_the_layout(self, original: Path) -> None:
        files, config = resolve_model(str(original)), CONFIGS["qwen2"]
        layout = plan_layout(files, RunnerOptions(dtype="bfloat16", device="cpu", block_size=32))
        assert layout.block_shape == (config.num_hidden_layers, 2, config.num_key_value_heads, 32, 16)
        assert layout.block_bytes == 3 * 2 * 2 * 32 * 16 * 2
        assert num_blocks_for_memory(layout, 10 * layout.block_bytes + 1) == 10
        options = RunnerOptions(dtype="float32", device="cpu", block_size=32)
        plain = plan_layout(files, RunnerOptions(dtype="bfloat16", device="cpu", block_size=32, page_format="plain"))
        assert plain.differences(plan_layout(files, options)) == ["dtype: 'bfloat16' != 'float32'"]

    def test_the_page_format(self, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def page_format(
            block_size: int = 32,
            dtype: Literal["bfloat16", "float32"] = "bfloat16",
            wanted: Literal["auto", "plain"] = "auto",
        ) -> str:
            options = RunnerOptions(dtype=dtype, device="cpu", block_size=block_size, page_format=wanted)
            return plan_layout(resolve_model(str(original)), options).page_format

        monkeypatch.setattr(native_library, "status", lambda: native_library.NativeStatus(True, "", "avx2"))
        assert page_format() == "bf16-tiled"
        assert [page_format(dtype="float32"), page_format(block_size=8), page_format(wanted="plain")] == ["plain"] * 3
        monkeypatch.setattr(native_library, "status", lambda: native_library.NativeStatus(False, "no g++", ""))
        assert page_format() == "plain"

    def test_int8_is_of_cpus(self, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files = resolve_model(str(original))
        plain = plan_layout(files, RunnerOptions(dtype="float32", device="cpu"))
        int8 = plan_layout(files, RunnerOptions(dtype="float32", device="cpu", quantization="int8"))
        assert plain.differences(int8) == ["quantization: 'none' != 'int8'"]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(ConfigError, match="quantization int8 needs device cpu"):
            plan_layout(files, RunnerOptions(dtype="float32", device="cuda", quantization="int8"))

    def test_what_cannot_be_had_is_refused(self, original: Path) -> None:
        files = resolve_model(str(original))
        layout = plan_layout(files, OPTIONS)
        with pytest.raises(ConfigError, match="do not hold one block"):
            num_blocks_for_memory(layout, layout.block_bytes - 1)
        with pytest.raises(ConfigError, match="float16 needs device cuda"):
            plan_layout(files, RunnerOptions(dtype="float16", device="cpu"))
        with pytest.raises(ConfigError, match="max_model_len 4096 is over 2048"):
            resolve_max_model_len(files, RunnerOptions(max_model_len=4096))
        with pytest.raises(ConfigError, match="0 blocks"):
            build_torch_runner(files, RunnerOptions(dtype="float32", device="cpu"))

    def test_memory_of_the_wrong_size_is_refused(self, original: Path) -> None:
        with pytest.raises(ConfigError, match="kv_memory"):
            build_torch_runner(resolve_model(str(original)), OPTIONS, torch.zeros(100, dtype=torch.uint8))

    def test_memory_says_how_many_blocks_there_are(self, original: Path) -> None:
        files, options = resolve_model(str(original)), RunnerOptions(dtype="float32", device="cpu")
        memory = torch.zeros(7 * plan_layout(files, options).block_bytes, dtype=torch.uint8)
        runner = build_torch_runner(files, options, memory)
        assert (runner.num_blocks, runner.max_model_len, runner.vocab_size) == (7, 2048, 512)
