"""A GGUF file's metadata as config.json and generation_config.json of the Hugging Face folder it becomes."""

from dataclasses import dataclass

import msgspec

from protocol.errors import ConfigError
from runtime.models.gguf_file import GgufFile

EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Family:
    model_type: str
    architecture: str
    qkv_bias_is_implied: bool  # the family has it without saying so in config.json


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", False),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM", True),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", False),
}


class RopeParameters(msgspec.Struct, frozen=True, omit_defaults=True):
    rope_theta: float
    rope_type: str
    factor: float | None = None
    original_max_position_embeddings: int | None = None


class ConfigJson(msgspec.Struct, frozen=True, omit_defaults=True):
    """What config.json of the folder says; field names are Hugging Face's."""

    architectures: list[str]
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: RopeParameters
    tie_word_embeddings: bool
    attention_bias: bool
    hidden_act: str
    dtype: str
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None


class GenerationConfigJson(msgspec.Struct, frozen=True, omit_defaults=True):
    bos_token_id: int | None = None
    eos_token_id: list[int] | None = None
    pad_token_id: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None


_CARD_SAMPLING = {"smollm2": (0.2, 0.9)}
"""Temperature and top_p that a model's card asks for, by the file's general.basename: GGUF has no place for them, and
small models talk nonsense at the API's own default of 1."""


def architecture(source: GgufFile) -> str:
    """The GGUF name of the model's family. Raises ConfigError for a family that is not supported."""
    name = source.text("general.architecture")
    if name not in _FAMILIES:
        raise source.error("general.architecture", f"is {name!r}; supported are {', '.join(sorted(_FAMILIES))}")
    return name


def config_json(source: GgufFile) -> ConfigJson:
    """Raises ConfigError, naming the key, on a missing, malformed or unsupported setting."""
    name = architecture(source)
    family = _FAMILIES[name]
    num_heads = source.integer(f"{name}.attention.head_count", 1, 1 << 16)
    hidden_size = source.integer(f"{name}.embedding_length", 1, 1 << 20)
    embedding = source.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2 or embedding.shape[1] != hidden_size:
        raise ConfigError(f"{source.path} has no {EMBEDDING} of {hidden_size} columns")
    return ConfigJson(
        architectures=[family.architecture],
        model_type=family.model_type,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=source.integer(f"{name}.feed_forward_length", 1, 1 << 24),
        num_hidden_layers=source.integer(f"{name}.block_count", 1, 1 << 16),
        num_attention_heads=num_heads,
        num_key_value_heads=_optional(source, f"{name}.attention.head_count_kv") or num_heads,
        head_dim=_head_dim(source, name, hidden_size // num_heads),
        max_position_embeddings=source.integer(f"{name}.context_length", 1, 1 << 30),
        rms_norm_eps=source.number(f"{name}.attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(source, name),
        tie_word_embeddings=OUTPUT not in source.tensors,
        attention_bias=not family.qkv_bias_is_implied and "blk.0.attn_q.bias" in source.tensors,
        hidden_act="silu",
        dtype="float32",
        bos_token_id=_optional(source, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_optional(source, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_optional(source, "tokenizer.ggml.padding_token_id"),
    )


def generation_config_json(source: GgufFile) -> GenerationConfigJson:
    """The end of a turn ends a sequence as well, where the file tells it apart from the end of the text."""
    ends = [_optional(source, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    known = [token_id for token_id in ends if token_id is not None]
    base = source.text("general.basename").lower() if source.has("general.basename") else ""
    temperature, top_p = _CARD_SAMPLING.get(base, (None, None))
    return GenerationConfigJson(
        bos_token_id=_optional(source, "tokenizer.ggml.bos_token_id"),
        eos_token_id=list(dict.fromkeys(known)) or None,
        pad_token_id=_optional(source, "tokenizer.ggml.padding_token_id"),
        do_sample=temperature is not None,
        temperature=temperature,
        top_p=top_p,
    )


def _optional(source: GgufFile, key: str) -> int | None:
    return source.integer(key) if source.has(key) else None


def _head_dim(source: GgufFile, name: str, derived: int) -> int:
    key_length = _optional(source, f"{name}.attention.key_length")
    head_dim = key_length or derived
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        value = _optional(source, key)
        if value is not None and value != head_dim:
            raise source.error(key, f"is {value}; only the size of a head, {head_dim}, is supported")
    return head_dim


def _rope(source: GgufFile, name: str) -> RopeParameters:
    if ROPE_FACTORS in source.tensors:
        raise source.error(
            ROPE_FACTORS, "(a table of RoPE factors) is not supported; use the model's Hugging Face folder"
        )
    theta_key, type_key = f"{name}.rope.freq_base", f"{name}.rope.scaling.type"
    theta = source.number(theta_key) if source.has(theta_key) else 10000.0
    rope_type = source.text(type_key) if source.has(type_key) else "none"
    if rope_type == "none":
        return RopeParameters(theta, "default")
    if rope_type not in ("linear", "yarn"):
        raise source.error(type_key, f"is {rope_type!r}; supported are none, linear and yarn")
    return RopeParameters(
        theta,
        rope_type,
        source.number(f"{name}.rope.scaling.factor"),
        _optional(source, f"{name}.rope.scaling.original_context_length"),
    )
