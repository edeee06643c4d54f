"""A GGUF file as a Hugging Face folder, converted once into a cache and read from there ever after.

The folder is named after the file's content and made beside its final place, then moved there: it is complete or it is
not there. A file lock lets one of several starting processes convert while the others wait; a lock dies with its holder.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec
from blake3 import blake3

from protocol.errors import ConfigError
from runtime.models.gguf_config import config_json, generation_config_json
from runtime.models.gguf_file import GgufFile
from runtime.models.gguf_tokenizer import build_tokenizer, tokenizer_config_json
from runtime.models.gguf_weights import write_weights

_CONVERSION = 2
"""Raised when the same file converts to something else, so that old folders are left aside."""

_DIGEST_BYTES = 16


def convert_gguf(path: Path, cache: Path, progress: Callable[[str], None]) -> Path:
    """The folder for this file, converted now or before. Raises ConfigError where the file cannot be served or the
    cache cannot be written."""
    try:
        digest = blake3(f"headrace-gguf-{_CONVERSION}".encode()).update_mmap(path).hexdigest(length=_DIGEST_BYTES)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    folder = cache / "models" / digest
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock"), path, progress):
            if not folder.is_dir():
                _convert(path, folder, progress)
    except OSError as error:
        raise ConfigError(
            f"cannot convert {path} into {folder.parent}: {error.strerror}; HEADRACE_CACHE names another place"
        ) from error
    return folder


@contextmanager
def _lock(lock_path: Path, path: Path, progress: Callable[[str], None]) -> Iterator[IO[bytes]]:
    with lock_path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that converts {path.name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _convert(path: Path, folder: Path, progress: Callable[[str], None]) -> None:
    for left_over in folder.parent.glob(f"{folder.name}-*"):
        shutil.rmtree(left_over)  # of a process that was killed: whoever lives and converts this file holds the lock
    progress(f"converting {path.name}, once, into {folder}")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as parent:
        unfinished = Path(parent) / "model"
        unfinished.mkdir()
        _write_folder(path, unfinished, progress)
        unfinished.rename(folder)


def _write_folder(path: Path, folder: Path, progress: Callable[[str], None]) -> None:
    source = GgufFile.open(path)
    config = config_json(source)
    tokenizer = build_tokenizer(source)
    if tokenizer.get_vocab_size() > config.vocab_size:
        raise source.error("tokenizer.ggml.tokens", f"has more entries than the embedding, {config.vocab_size}")
    for name, message in (
        ("config.json", config),
        ("generation_config.json", generation_config_json(source)),
        ("tokenizer_config.json", tokenizer_config_json(source, config.max_position_embeddings)),
    ):
        (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(message)))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_weights(source, config, folder / "model.safetensors", progress)
    for file in folder.iterdir():
        _sync(file)  # before the folder gets its name: a power cut must not leave a named folder of empty files


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
