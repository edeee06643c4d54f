"""ModelConfig: what the forward pass must know of a model, parsed from config.json.

A setting that would change the result and is not implemented is refused by name. Nothing is guessed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from engine.model.rope import RopeConfig, parse_rope
from protocol.errors import ConfigError
from runtime.models.json_files import read_json

MAX_SIZE, MAX_LAYERS = 1 << 24, 1 << 12
"""Far above any model, and low enough that a malformed file cannot have us build for minutes."""

Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`sliding_windows[i]` is layer i's window in tokens, its own included; 0 means it sees the whole context."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Family:
    """What distinguishes the families of one architecture. None: config.json says."""

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    window_switch: bool = False  # `use_sliding_window`, `max_window_layers` and `layer_types` decide on windows
    window: bool = False  # `sliding_window` alone decides, for all layers


_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(qkv_bias=False, output_bias=False, mlp_bias=False, window=True),
    "qwen2": _Family(qkv_bias=True, output_bias=False, mlp_bias=False, window_switch=True),
    "qwen3": _Family(mlp_bias=False, qk_norm=True, window_switch=True),
}
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class _Architecture(msgspec.Struct):
    model_type: str
    architectures: list[str] | None = None


class _ConfigJson(msgspec.Struct):
    """The fields of config.json that the four families read; defaults are those that Hugging Face's classes share."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
    num_attention_heads: Size
    max_position_embeddings: Size
    model_type: str
    architectures: list[str] | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rms_norm_eps: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    sliding_window: Size | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


def is_native(path: Path) -> bool:
    """Whether config.json names an architecture that `read_model_config` knows, be its settings supported or not."""
    raw = read_json(path, _Architecture)
    if raw.architectures:
        return raw.architectures[0] in _ARCHITECTURES
    return raw.model_type in _FAMILIES


def read_model_config(path: Path) -> ModelConfig:
    """Raises ConfigError, naming the file and the setting, on anything malformed or not supported."""
    raw = read_json(path, _ConfigJson)
    try:
        return _model_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from error


def _model_config(raw: _ConfigJson) -> ModelConfig:
    family = _FAMILIES[_family_name(raw)]
    if raw.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {raw.hidden_act!r} is not supported, only silu")
    if raw.quantization_config is not None:
        raise ConfigError("quantization_config: quantised checkpoints are not supported")
    num_kv_heads = raw.num_key_value_heads or raw.num_attention_heads
    if raw.num_attention_heads % num_kv_heads:
        raise ConfigError(f"num_key_value_heads {num_kv_heads} does not divide {raw.num_attention_heads} heads")
    rope = parse_rope(raw.rope_parameters, raw.rope_scaling, raw.rope_theta, raw.max_position_embeddings)
    return ModelConfig(
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(raw),
        rms_norm_eps=raw.rms_norm_eps,
        rope=rope,
        tied_embeddings=raw.tie_word_embeddings,
        qkv_bias=raw.attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=raw.attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=raw.mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        sliding_windows=_sliding_windows(raw, family),
    )


def _family_name(raw: _ConfigJson) -> str:
    if not raw.architectures:
        if raw.model_type not in _FAMILIES:
            raise ConfigError(f"model_type {raw.model_type!r} is not supported; supported are {', '.join(_FAMILIES)}")
        return raw.model_type
    architecture = raw.architectures[0]
    if architecture not in _ARCHITECTURES:
        raise ConfigError(f"architecture {architecture} is not supported; supported are {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[architecture]


def _head_dim(raw: _ConfigJson) -> int:
    head_dim = raw.head_dim
    if head_dim is None:
        if raw.hidden_size % raw.num_attention_heads:
            raise ConfigError(f"hidden_size {raw.hidden_size} is no multiple of {raw.num_attention_heads} heads")
        head_dim = raw.hidden_size // raw.num_attention_heads
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} is odd; rotary embedding turns pairs")
    return head_dim


def _sliding_windows(raw: _ConfigJson, family: _Family) -> tuple[int, ...]:
    num_layers = raw.num_hidden_layers
    if family.window_switch and raw.use_sliding_window:
        if raw.layer_types is None:
            first = raw.max_window_layers if raw.max_window_layers is not None else num_layers
            layer_types = [_SLIDING if layer >= first else _FULL for layer in range(num_layers)]
        else:
            layer_types = raw.layer_types
    else:
        layer_types = [_SLIDING if family.window and raw.sliding_window else _FULL] * num_layers
        if raw.layer_types not in (None, layer_types):
            raise ConfigError("layer_types contradicts sliding_window")
    if len(layer_types) != num_layers or not set(layer_types) <= {_FULL, _SLIDING}:
        raise ConfigError(f"layer_types must name {_FULL} or {_SLIDING} for each of {num_layers} layers")
    if _SLIDING in layer_types and raw.sliding_window is None:
        raise ConfigError("sliding_window is missing, though layer_types has sliding layers")
    return tuple((raw.sliding_window or 0) if kind == _SLIDING else 0 for kind in layer_types)
