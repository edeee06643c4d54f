"""Which of two ways a model is run: our own forward pass (engine.model.llama), or, for every family that we do not have
ourselves, the transformers library's modelling code over our cache (engine.model.fallback).

The library is an optional dependency and takes seconds to import: nothing of it is touched until a model asks for it.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from engine.model.config import is_native, read_model_config
from engine.model.llama import StepInputs
from protocol.errors import ConfigError
from protocol.kv_layout import KVLayout, PageFormat
from runtime.models.model_files import ModelFiles

if TYPE_CHECKING:
    from engine.model.fallback.model import TransformersModel

_LIBRARY = "transformers"


class _Vocabulary(Protocol):
    @property
    def vocab_size(self) -> int: ...


class Model(Protocol):
    """What a runner needs of either."""

    @property
    def config(self) -> _Vocabulary: ...

    def forward(self, inputs: StepInputs, kv_cache: torch.Tensor, page_format: PageFormat) -> torch.Tensor:
        """Write the step's keys and values into the cache; returns logits [num_rows, vocab_size] of the sampling rows,
        float32. kv_cache is [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What of a model decides on the shape and the meaning of its KV blocks. `rope` is canonical text."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope: str


def cache_shape(files: ModelFiles, max_model_len: int) -> CacheShape:
    """Reads no weights. Raises ConfigError, naming model and reason, where neither way can run the model."""
    if is_native(files.config_path):
        config = read_model_config(files.config_path)
        return CacheShape(config.num_layers, config.num_kv_heads, config.head_dim, config.rope.canonical_text())
    _require_library(files)
    from engine.model.fallback.probe import probe_shape  # late: an optional dependency, and slow to import
    from engine.model.fallback.settings import read_settings, rope_text

    settings = read_settings(files.folder, max_model_len)
    shape = probe_shape(settings)
    return CacheShape(shape.num_layers, shape.num_kv_heads, shape.head_dim, rope_text(settings))


def load_fallback(
    files: ModelFiles,
    layout: KVLayout,
    max_model_len: int,
    device: torch.device,
    dummy_seed: int | None,
    scratch: Callable[[int], torch.Tensor],
    progress: Callable[[str], None],
) -> "TransformersModel":
    """See engine.model.fallback.model.load_transformers_model. Raises ConfigError."""
    _require_library(files)
    from engine.model.fallback.model import load_transformers_model  # late: an optional dependency, and slow to import

    return load_transformers_model(files, layout, max_model_len, device, dummy_seed, scratch, progress)


def _require_library(files: ModelFiles) -> None:
    if importlib.util.find_spec(_LIBRARY) is None:
        raise ConfigError(
            f"{files.config_path}: this architecture is run by the transformers library, which is not installed:"
            " pip install 'headrace[transformers]'"
        )
