"""A GGUF file's tensors as one safetensors file in float32: exactly the values that the quantised file stands for.

Tensors are converted and written one after another, so that memory holds one of them at a time.
"""

import math
import re
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import ConfigError
from runtime.models.gguf_config import EMBEDDING, OUTPUT, ConfigJson
from runtime.models.gguf_file import GgufFile

_FLOAT_BYTES = 4
_PROGRESS_BYTES = 256 << 20  # a line for every so many bytes written

_OUTER = {EMBEDDING: "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", OUTPUT: "lm_head.weight"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_INNER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def write_weights(source: GgufFile, config: ConfigJson, path: Path, progress: Callable[[str], None]) -> None:
    """Write `path`. Raises ConfigError for a tensor that the model has no place for, OSError where writing fails."""
    names = {_hugging_face_name(source, name): name for name in source.tensors}
    entries: dict[str, _Entry] = {}
    end = 0
    for target, name in names.items():
        shape = source.tensors[name].shape
        start, end = end, end + math.prod(shape) * _FLOAT_BYTES
        entries[target] = _Entry("F32", shape, (start, end))
    header = msgspec.json.encode(entries)
    header += b" " * (-len(header) % 8)  # the format wants aligned data
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        reported = 0
        for target, name in names.items():
            values = _unpermuted(source.tensor(name), name, config)
            np.ascontiguousarray(values, "<f4").tofile(file)
            written = entries[target].data_offsets[1]
            if written - reported >= _PROGRESS_BYTES or written == end:
                progress(f"converted {written >> 20} of {end >> 20} MiB")
                reported = written


def _hugging_face_name(source: GgufFile, name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = _INNER_NAME.fullmatch(name)
    if match is None or match[2] not in _INNER:
        raise ConfigError(f"{source.path}: tensor {name} has no place in the model")
    return f"model.layers.{match[1]}.{_INNER[match[2]]}.{match[3]}"


def _unpermuted(values: npt.NDArray[np.float32], name: str, config: ConfigJson) -> npt.NDArray[np.float32]:
    """GGUF files of the Llama family interleave the two halves of each head's rows in Q and K, because their rotary
    embedding turns neighbours; ours, like Hugging Face's, turns halves."""
    match = _INNER_NAME.fullmatch(name)
    if config.model_type != "llama" or match is None or match[2] not in ("attn_q", "attn_k"):
        return values
    num_heads = config.num_attention_heads if match[2] == "attn_q" else config.num_key_value_heads
    if values.shape[0] != num_heads * config.head_dim:
        raise ConfigError(f"tensor {name} has {values.shape[0]} rows, not {num_heads} heads of {config.head_dim}")
    pairs = values.reshape(num_heads, config.head_dim // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)
