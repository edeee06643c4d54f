"""Download of a model from the Hugging Face hub: its JSON files, chat template, tokenizer and safetensors, no code."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from protocol.errors import ConfigError

_SMALL_FILES = ["*.json", "*.jinja"]
_WEIGHTS = "*.safetensors"
_SUBFOLDERS = "*/*"  # other formats, or other revisions of the same weights


def download_model(model: str, weights: bool, progress: Callable[[str], None]) -> Path:
    """The snapshot folder of a hub repository in Hugging Face's own cache, all its files of one commit.

    With the hub out of reach, what an earlier download left is used. Raises ConfigError where there is none, or the
    repository does not exist or may not be read.
    """
    progress(f"fetching {model} from the Hugging Face hub, as far as it is not here already")
    patterns = [*_SMALL_FILES, _WEIGHTS] if weights else _SMALL_FILES
    try:
        folder = Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=_SUBFOLDERS))
    except GatedRepoError as error:
        raise ConfigError(f"hub model {model} asks for consent first: accept its terms and set HF_TOKEN") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(f"there is no hub model {model}, or HF_TOKEN may not read it") from error
    except Exception as error:  # the errors of its HTTP client are not part of its interface
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"hub model {model} cannot be fetched ({reason}); a local folder or .gguf file can"
        ) from error
    progress(f"{model} is in {folder}")
    return folder
