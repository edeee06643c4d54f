"""The transformers library's configuration of a model folder, and what of it cannot work here, refused by name."""

import contextlib
import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from blake3 import blake3
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engine.model.config import MAX_LAYERS, MAX_SIZE
from protocol.errors import ConfigError

LIBRARY_ERRORS = (
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, OSError),
    *(ArithmeticError, MemoryError, StrictDataclassError, SafetensorError),
)
"""What the library's code raises on a model that it cannot work with: it has no error type of its own."""

_BOUNDS = {
    "num_hidden_layers": (1, MAX_LAYERS),
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), (1, MAX_SIZE)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), (1, MAX_SIZE)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, MAX_LAYERS)),  # 0: it has none
}
"""Smallest and largest value of a setting, under the name that the library gives it in all families."""

_ROPE_TEXT_CHARS = 900
_DECODER_SUFFIXES = ("ForCausalLM", "LMHeadModel")


def read_settings(folder: Path, max_model_len: int) -> PretrainedConfig:
    """Runs no code of the folder. Raises ConfigError, naming model type and reason, where it cannot be served."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"{folder}: transformers cannot read config.json: {first_line(error)}") from error
    reason = _reason_against(config, max_model_len)
    if reason:
        raise refusal(config, reason)
    return config


def refusal(config: PretrainedConfig, reason: str) -> ConfigError:
    return ConfigError(f"model type {config.model_type!r} cannot be served: {reason}")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def bare_model(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The model in float32 without any weights, on torch's meta device. Raises ConfigError where there is none, or
    where it lacks what a flattened step needs."""
    config = copy.deepcopy(config)
    with contextlib.suppress(StrictDataclassError):  # a few insist on having one
        config.pad_token_id = None  # a few would look for padding among the tokens, which have no values here
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
            )
    except LIBRARY_ERRORS as error:
        raise refusal(
            config, f"transformers cannot build it with attention {attention!r}: {first_line(error)}"
        ) from error
    if model._is_stateful:
        raise refusal(config, "it keeps a recurrent state beside or instead of attention")
    accepted = inspect.signature(model.forward).parameters
    for name in ("position_ids", "logits_to_keep"):
        if name not in accepted:
            raise refusal(config, f"{type(model).__name__} takes no {name}")
    return model.eval()


def rope_text(config: PretrainedConfig) -> str:
    """What KVLayout says of the position encoding: the settings as text, or their digest where they are long."""
    text = json.dumps(_rope_parameters(config), sort_keys=True, default=str)
    if len(text) > _ROPE_TEXT_CHARS:
        text = blake3(text.encode()).hexdigest(length=16)
    return f"transformers({text})"


def _reason_against(config: PretrainedConfig, max_model_len: int) -> str | None:
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if config.get_text_config() is not config:
        return "it is a composite of several models (text and images, say); only text decoders are supported"
    if getattr(config, "quantization_config", None) is not None:
        return "quantised checkpoints are not supported"
    architectures = config.architectures or ()
    if architectures and not architectures[0].endswith(_DECODER_SUFFIXES):
        return f"architecture {architectures[0]} is no causal language model"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    return _reason_against_sizes(config) or _reason_against_rope(config, max_model_len)


def _reason_against_sizes(config: PretrainedConfig) -> str | None:
    for name, (smallest, largest) in _BOUNDS.items():
        value = vars(config).get(config.attribute_map.get(name, name))  # some attributes raise where layers differ
        if isinstance(value, int) and not smallest <= value <= largest:
            return f"{name} {value} is not from {smallest} to {largest}"
    return None


def _reason_against_rope(config: PretrainedConfig, max_model_len: int) -> str | None:
    """The frequencies of two types follow the longest context in the batch, which mixes sequences here. Those of
    longrope are constant up to the original length."""
    parameters = _rope_parameters(config)
    per_layer_type = [each for each in parameters.values() if isinstance(each, Mapping)]
    for settings in per_layer_type or [parameters]:
        rope_type = settings.get("rope_type", "default")
        if rope_type == "dynamic":
            return "rope_type 'dynamic' turns keys by the length of the whole batch"
        original = settings.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope_type == "longrope" and max_model_len > original:
            return (
                f"rope_type 'longrope' turns keys by the length of the whole batch above {original} tokens;"
                f" set max_model_len to {original} or less"
            )
    return None


def _rope_parameters(config: PretrainedConfig) -> Mapping[str, object]:
    return getattr(config, "rope_parameters", None) or {}
