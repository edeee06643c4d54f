"""Rotary embedding: its settings as a frozen struct, their canonical text, and the cos and sin tables they make.

Formulas are those of transformers' `modeling_rope_utils`, evaluated in float32 like there, so that tables agree to the
last bit.
"""

import math
from typing import Any, Literal, get_args

import msgspec
import torch

from protocol.errors import ConfigError

RopeType = Literal["default", "linear", "llama3", "yarn"]

_DEFAULT_THETA = 10000.0


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one rope type; fields of other types keep their defaults. Names are Hugging Face's."""

    rope_type: RopeType = "default"
    rope_theta: float = _DEFAULT_THETA
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def canonical_text(self) -> str:
        """All settings, in a fixed order: equal text means equal positions in the KV bytes."""
        values = (f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name != "rope_type")
        return f"{self.rope_type}({','.join(values)})"


def parse_rope(
    parameters: dict[str, Any] | None, scaling: dict[str, Any] | None, theta: float | None, max_positions: int
) -> RopeConfig:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before it).

    Raises ConfigError, naming the setting, on a type or a field that is not supported.
    """
    settings = {name: value for name, value in (parameters or scaling or {}).items() if value is not None}
    legacy_type = settings.pop("type", "default")
    rope_type = settings.setdefault("rope_type", legacy_type)
    if rope_type not in get_args(RopeType):
        raise ConfigError(f"rope_type {rope_type!r} is not supported; supported are {', '.join(get_args(RopeType))}")
    if settings.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor other than 1 is not supported")
    if theta is not None:
        settings.setdefault("rope_theta", theta)
    if rope_type in ("llama3", "yarn"):
        settings.setdefault("original_max_position_embeddings", max_positions)
    if rope_type == "default":
        unused = {*RopeConfig.__struct_fields__} - {"rope_type", "rope_theta"}  # what other types would read
        settings = {name: value for name, value in settings.items() if name not in unused}
    elif "factor" not in settings:
        raise ConfigError(f"rope_parameters of type {rope_type} have no factor")
    try:
        rope = msgspec.convert(settings, RopeConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"rope_parameters of type {rope_type}: {error}") from error
    _check(rope)
    return rope


def _check(rope: RopeConfig) -> None:
    required = {"factor": rope.factor >= 1.0, "rope_theta": rope.rope_theta > 1.0}
    if rope.rope_type in ("llama3", "yarn"):
        required["original_max_position_embeddings"] = rope.original_max_position_embeddings > 0
        required["high_freq_factor"] = rope.high_freq_factor > rope.low_freq_factor > 0
        required["beta_fast"] = rope.beta_fast > rope.beta_slow > 0
    for name, holds in required.items():
        if not holds:
            raise ConfigError(f"rope_parameters: {name} {getattr(rope, name)} makes no sense")


def rope_tables(
    rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [num_positions, head_dim / 2] in float32, YaRN's attention factor multiplied in."""
    frequencies = _inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    scale = _attention_factor(rope)
    return (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians a position, for each pair of a head's elements: [head_dim / 2]."""
    powers = rope.rope_theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    frequencies = 1.0 / powers
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, frequencies)
    if rope.rope_type == "yarn":
        return _yarn_frequencies(rope, powers, head_dim)
    return frequencies


def _llama3_frequencies(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between are blended."""
    context = rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    blend = (context / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slowed = torch.where(wavelengths > context / low, frequencies / rope.factor, frequencies)
    between = (wavelengths <= context / low) & (wavelengths >= context / high)
    return torch.where(between, blended, slowed)


def _yarn_frequencies(rope: RopeConfig, powers: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Pairs that turn often within the original context keep their frequency, those that turn seldom are slowed by
    `factor`, with a linear ramp between (YaRN, arXiv 2309.00071, section 3.2)."""

    def pair_that_turns(times: float) -> float:
        turns = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001
    kept = 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _attention_factor(rope: RopeConfig) -> float:
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _magnitude(rope.factor, rope.mscale) / _magnitude(rope.factor, rope.mscale_all_dim)
    return _magnitude(rope.factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
