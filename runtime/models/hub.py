"""Download of a model from the Hugging Face hub: its JSON files, chat template, tokenizer and safetensors, no code."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from protocol.errors import ConfigError

_SMALL_FILES = ("*.json", "*.jinja")
_WEIGHTS = "*.safetensors"
_ELSEWHERE = "/"  # files in subfolders are other formats or other revisions of the same weights


def download_model(model: str, weights: bool, progress: Callable[[str], None]) -> Path:
    """The snapshot folder of a hub repository in Hugging Face's own cache, all its files of one commit.

    With the hub out of reach, what an earlier download left is used. Raises ConfigError where there is none, the
    repository does not exist or may not be read, or its weights are not in safetensors.
    """
    patterns = (*_SMALL_FILES, _WEIGHTS) if weights else _SMALL_FILES
    try:
        info = HfApi().model_info(model, files_metadata=True)
    except GatedRepoError as error:
        raise ConfigError(f"hub model {model} asks for consent first: accept its terms and set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(f"there is no hub model {model}, or HF_TOKEN may not read it") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        return _downloaded_before(model, patterns, error)
    siblings = [file for file in info.siblings or () if _ELSEWHERE not in file.rfilename]
    if not any(fnmatch(file.rfilename, _WEIGHTS) for file in siblings):
        raise ConfigError(f"hub model {model} has no safetensors files; weights in other formats are not read")
    wanted = [file for file in siblings if any(fnmatch(file.rfilename, pattern) for pattern in patterns)]
    folder = None
    try:
        for number, file in enumerate(wanted, 1):
            progress(f"{model}: file {number} of {len(wanted)}, {file.rfilename}, {(file.size or 0) >> 20} MiB")
            folder = Path(hf_hub_download(model, file.rfilename, revision=info.sha)).parent
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(f"download of hub model {model} failed: {error}") from error
    assert folder is not None, "there is a safetensors file, and small files are wanted in any case"
    return folder


def _downloaded_before(model: str, patterns: tuple[str, ...], reason: Exception) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns), local_files_only=True))
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"hub model {model} was not downloaded before and the hub cannot be reached ({type(reason).__name__});"
            " name a local folder or a .gguf file instead"
        ) from reason
