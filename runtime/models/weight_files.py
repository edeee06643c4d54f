"""Which files of a model folder hold its weights. Only safetensors: the other formats can run code when they are read."""

import struct
from pathlib import Path
from typing import Annotated

import msgspec

from protocol.errors import ConfigError
from runtime.models.json_files import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
_HEADER_LENGTH = struct.Struct("<Q")

FileName = Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+\.safetensors$")]


class _Index(msgspec.Struct):
    weight_map: dict[str, FileName]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model, by name. Raises ConfigError where there are none, or one of them is missing."""
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(read_json(folder / INDEX_FILE, _Index).weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise ConfigError(f"{folder / INDEX_FILE}: weight_map names {missing[0] if missing else 'no file'}")
        return tuple(folder / name for name in names)
    unsafe = sorted(path.name for path in folder.iterdir() if path.suffix in _UNSAFE_SUFFIXES)
    if unsafe:
        raise ConfigError(
            f"{folder} has its weights in {unsafe[0]}; only safetensors are read: convert them with"
            " transformers' save_pretrained, or choose a revision that has model.safetensors"
        )
    raise ConfigError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_header(path: Path) -> bytes:
    """The header of a safetensors file, as JSON text. Raises ConfigError where the file is none."""
    try:
        with path.open("rb") as file:
            prefix = file.read(_HEADER_LENGTH.size)
            if len(prefix) < _HEADER_LENGTH.size:
                raise ConfigError(f"{path} is not a safetensors file: it has {len(prefix)} bytes")
            (length,) = _HEADER_LENGTH.unpack(prefix)
            if length > MAX_HEADER_BYTES:
                raise ConfigError(f"{path} is not a safetensors file: its header would be {length} bytes long")
            header = file.read(length)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(header) < length:
        raise ConfigError(f"{path} is cut off in its header")
    return header
