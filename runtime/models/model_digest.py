"""The identity of a model's weights: the same wherever the same files lie, whatever they are called.

Reading 100 GB to name them would take minutes at every start. The digest covers what differs between any two models in
practice: config.json, each weight file's header (names, shapes, dtypes, offsets), its size, and its first and last MiB.
"""

from pathlib import Path

from blake3 import blake3

from protocol.errors import ConfigError
from runtime.models.model_files import ModelFiles
from runtime.models.weight_files import read_header, weight_files

_SAMPLE_BYTES = 1 << 20
_DIGEST_BYTES = 16


def model_digest(files: ModelFiles) -> str:
    """32 hex digits. Raises ConfigError where the weights are missing or unreadable."""
    hasher = blake3(b"headrace-model")
    try:
        _add(hasher, files.config_path.read_bytes())
        for path in weight_files(files.folder):
            _add(hasher, read_header(path))
            _add(hasher, path.stat().st_size.to_bytes(8, "little"))
            _add(hasher, _ends(path))
    except OSError as error:
        raise ConfigError(f"{files.folder}: {error.strerror}") from error
    return hasher.hexdigest(length=_DIGEST_BYTES)


def config_digest(files: ModelFiles) -> str:
    """Like `model_digest`, of config.json alone: the identity of a model whose weights are made up."""
    try:
        return blake3(files.config_path.read_bytes()).hexdigest(length=_DIGEST_BYTES)
    except OSError as error:
        raise ConfigError(f"{files.config_path}: {error.strerror}") from error


def _add(hasher: blake3, part: bytes) -> None:
    hasher.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts read the same
    hasher.update(part)


def _ends(path: Path) -> bytes:
    with path.open("rb") as file:
        first = file.read(_SAMPLE_BYTES)
        file.seek(max(len(first), path.stat().st_size - _SAMPLE_BYTES))
        return first + file.read(_SAMPLE_BYTES)
