"""RunnerOptions, and what follows from them before any weight is read: device, dtype, KV layout, how many blocks fit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.model.config import read_model_config
from kernels import native_library
from kernels.kv_cache import can_be_tiled
from kernels.linear import Quantization
from protocol.errors import ConfigError
from protocol.kv_layout import KVDtype, KVLayout, PageFormat
from runtime.models.model_digest import config_digest, model_digest
from runtime.models.model_files import ModelFiles

TORCH_DTYPES: dict[KVDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_CPU_INFO = Path("/proc/cpuinfo")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last is Arm's


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """`max_model_len` 0: what the model was made for. `threads` 0: as torch finds it. `num_blocks` 0: as many as the memory
    holds that the runner is given. `seed` is of dummy weights.

    `dtype` "auto" is bfloat16 where the device multiplies it natively, else float32 (on CUDA: float16). The KV cache has
    the same dtype, so nodes that exchange KV but differ here must be told one. `quantization` is of the weights; keys and
    values depend on them, so such nodes must agree on it too. `page_format` "auto" is tiled (kernels/kv_cache.py) where C++
    kernels attend to bfloat16 on a CPU; so nodes of which only one can build these must be told "plain".
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Quantization = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    block_size: int = 16
    page_format: Literal["auto", "plain"] = "auto"
    num_blocks: int = 0
    max_model_len: int = 0
    threads: int = 0
    seed: int = 0


def resolve_device(options: RunnerOptions) -> torch.device:
    """Raises ConfigError where CUDA is asked for and not there."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ConfigError("device cuda: torch finds no CUDA device here")
    return torch.device("cuda" if has_cuda and options.device != "cpu" else "cpu")


def resolve_dtype(options: RunnerOptions) -> KVDtype:
    """Raises ConfigError for float16 on a CPU, which would be slower and less exact than either alternative."""
    device = resolve_device(options)
    if options.dtype != "auto":
        if options.dtype == "float16" and device.type == "cpu":
            raise ConfigError("dtype float16 needs device cuda; on a CPU use bfloat16 or float32")
        return options.dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if _cpu_multiplies_bf16() else "float32"


def check_quantization(options: RunnerOptions) -> None:
    """Raises ConfigError for int8 on CUDA, which has no kernels for it."""
    if options.quantization != "none" and resolve_device(options).type == "cuda":
        raise ConfigError(f"quantization {options.quantization} needs device cpu", param="quantization")


def resolve_max_model_len(files: ModelFiles, options: RunnerOptions) -> int:
    """Raises ConfigError for more than the model was made for: positions beyond were never trained."""
    if options.max_model_len > files.max_model_len:
        raise ConfigError(f"max_model_len {options.max_model_len} is over {files.max_model_len}, the model's own limit")
    return options.max_model_len or files.max_model_len


def plan_layout(files: ModelFiles, options: RunnerOptions) -> KVLayout:
    """The layout of the KV blocks that a runner of these options has. Reads config.json, not the weights.

    Raises ConfigError where the model or an option is not supported.
    """
    check_quantization(options)
    config, dtype = read_model_config(files.config_path), resolve_dtype(options)
    dummy = options.load_format == "dummy"
    return KVLayout(
        model=config_digest(files) if dummy else model_digest(files),
        revision=f"dummy weights of seed {options.seed}" if dummy else "",
        dtype=dtype,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=options.block_size,
        rope=config.rope.canonical_text(),
        quantization=options.quantization,
        page_format=_resolve_page_format(options, dtype, config.head_dim),
    )


def _resolve_page_format(options: RunnerOptions, dtype: KVDtype, head_dim: int) -> PageFormat:
    on_cpu = resolve_device(options).type == "cpu"
    wanted = (
        options.page_format == "auto" and on_cpu and can_be_tiled(TORCH_DTYPES[dtype], options.block_size, head_dim)
    )
    return "bf16-tiled" if wanted and native_library.status().available else "plain"


def num_blocks_for_memory(layout: KVLayout, memory_bytes: int) -> int:
    """How many blocks fit. Raises ConfigError where not one does."""
    num_blocks = memory_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(f"{memory_bytes} bytes of KV memory do not hold one block of {layout.block_bytes} bytes")
    return num_blocks


def _cpu_multiplies_bf16() -> bool:
    try:
        lines = _CPU_INFO.read_text("utf-8").splitlines()
    except OSError:
        return False  # not Linux: float32 is right everywhere
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())
