"""GGUF files: converted exactly, once, by one of many processes; damaged ones are refused by name."""

import contextlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tiny_models import BOS, CHAT_TEMPLATE, CONFIGS, EOS, SPECIAL_TOKENS, VOCAB_SIZE, make_model
from tokenizers import Tokenizer

from protocol.errors import ConfigError
from runtime.models.gguf_file import GgufFile
from runtime.models.resolve import resolve_model

INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEXTS = [
    "The mill turns.",
    "  two  spaces\n\n\tand 12345 digits",
    "Mühlrad 水は流れる 🎉",
    "a<|end|>b<|start|>user\n",
    "",
    "it's DON'T we'll",
]


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{INNER[inner]}.{kind}"


def permuted(values: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp's converter stores Q and K of the Llama family."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    folder: Path,
    path: Path,
    family: str,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    """The tiny model in `folder` as a GGUF file, its matrices quantised."""
    config, writer = CONFIGS[family], gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", 16))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, values in load_file(folder / "model.safetensors").items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permuted(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        kind = quantization if values.ndim == 2 and values.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, kind), raw_dtype=kind)
    edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def good(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama").read_bytes()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_converted_file_is_the_model_it_came_from(family: str, tmp_path: Path) -> None:
    original = make_model(family, tmp_path)
    path = write_gguf(original, tmp_path / "tiny.gguf", family)
    files = resolve_model(str(path), cache_dir=tmp_path / "cache")
    before, after = load_file(original / "model.safetensors"), load_file(files.folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert (files.name, files.vocab_size, files.max_model_len) == ("tiny", VOCAB_SIZE, 2048)
    assert (files.eos_token_ids, files.bos_token_id, files.chat_template) == ((EOS,), BOS, CHAT_TEMPLATE)
    expected = Tokenizer.from_file(str(original / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(files.tokenizer_path))
    for text in TEXTS:
        assert tokenizer.encode(text).ids == expected.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantised_values_are_kept_exactly(name: str, folder: Path, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    path = write_gguf(folder, tmp_path / "tiny.gguf", "llama", kind)
    converted = load_file(resolve_model(str(path), cache_dir=tmp_path).folder / "model.safetensors")
    for tensor, values in load_file(folder / "model.safetensors").items():
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        assert np.array_equal(converted[tensor], values)


CONVERT = """
import sys, time
from pathlib import Path
from runtime.models.resolve import resolve_model
path, cache, go = map(Path, sys.argv[1:])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
print("folder", resolve_model(str(path), cache, print).folder)
"""


def test_processes_that_start_at_once_convert_once(good: bytes, tmp_path: Path) -> None:
    path, cache, go = tmp_path / "tiny.gguf", tmp_path / "cache", tmp_path / "go"
    path.write_bytes(good)
    command = [sys.executable, "-c", CONVERT, str(path), str(cache), str(go)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    go.touch()
    lines = [line for process in processes for line in process.communicate(timeout=60)[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(line.startswith("converting") for line in lines) == 1
    folders = {line for line in lines if line.startswith("folder")}
    assert folders == {f"folder {entry}" for entry in (cache / "models").iterdir() if entry.is_dir()}
    assert len(folders) == 1


def test_a_second_start_reads_the_cache_and_a_killed_one_leaves_nothing(good: bytes, tmp_path: Path) -> None:
    path, lines = tmp_path / "tiny.gguf", []
    path.write_bytes(good)
    folder = resolve_model(str(path), tmp_path, lines.append).folder
    assert lines
    lines.clear()
    assert resolve_model(str(path), tmp_path, lines.append).folder == folder
    assert lines == []
    folder.rename(folder.with_name(f"{folder.name}-killed"))
    assert resolve_model(str(path), tmp_path).folder == folder
    assert {entry.name for entry in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_a_cache_that_cannot_be_written_is_named(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(good)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="HEADRACE_CACHE"):
        resolve_model(str(tmp_path / "tiny.gguf"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda w: w.add_uint32("llama.embedding_length", 65), "token_embd.weight"),
        (lambda w: w.add_string("llama.embedding_length", "64"), "llama.embedding_length must be an integer"),
        (lambda w: w.add_uint32("llama.attention.head_count", 0), "llama.attention.head_count is 0"),
        (lambda w: w.add_uint32("llama.rope.dimension_count", 4), "llama.rope.dimension_count is 4"),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "rope.scaling.type is 'longrope'"),
        (lambda w: w.add_string("general.architecture", "mamba"), "general.architecture is 'mamba'"),
        (lambda w: w.add_string("tokenizer.ggml.model", "llama"), "tokenizer.ggml.model is 'llama'"),
        (lambda w: w.add_string("tokenizer.ggml.pre", "unheard-of"), "tokenizer.ggml.pre is 'unheard-of'"),
        (lambda w: w.add_array("tokenizer.ggml.merges", ["no such"]), "tokenizer.ggml.merges"),
        (lambda w: w.add_array("tokenizer.ggml.tokens", ["a", "a"]), "tokenizer.ggml.tokens holds a token twice"),
        (lambda w: w.add_array("tokenizer.ggml.token_type", [1]), "tokenizer.ggml.token_type has 1 entries"),
        (lambda w: w.add_uint32("tokenizer.ggml.eos_token_id", 100_000), "tokenizer.ggml.eos_token_id is 100000"),
        (lambda w: w.add_tensor("blk.0.mystery.weight", np.zeros(4, np.float32)), "blk.0.mystery.weight"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.zeros(4, np.float32)), "rope_freqs.weight"),
    ],
)
def test_what_is_not_supported_is_named(
    edit: Callable[[gguf.GGUFWriter], None], named: str, folder: Path, tmp_path: Path
) -> None:
    def replace(writer: gguf.GGUFWriter) -> None:
        replaced = gguf.GGUFWriter(tmp_path / "unused", "llama")
        edit(replaced)
        for key, entry in replaced.kv_data[0].items():
            if key != "general.architecture" or entry.value != "llama":  # which the constructor sets
                writer.kv_data[0].pop(key, None)
        edit(writer)

    path = write_gguf(folder, tmp_path / "tiny.gguf", "llama", edit=replace)
    with pytest.raises(ConfigError, match=named) as caught:
        resolve_model(str(path), tmp_path)
    assert "tiny.gguf" in caught.value.message or "tensor" in caught.value.message
    assert not [entry for entry in (tmp_path / "models").iterdir() if entry.is_dir()]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"not a GGUF file at all",
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 0, 1 << 24),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sII", 1, b"k", 9, 9),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI4QIQ", 1, b"t", 4, *[1 << 40] * 4, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 1 << 31),
    ],
)
def test_a_lying_header_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tiny\.gguf"):
        resolve_model(str(path), tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_is_refused(share: float, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(good[: int(share * (len(good) - 64))])
    with pytest.raises(ConfigError, match=r"tiny\.gguf"):
        GgufFile.open(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_never_end_in_a_traceback(data: st.DataObject, good: bytes, tmp_path: Path) -> None:
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 20_000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        resolve_model(str(path), tmp_path / "cache")
