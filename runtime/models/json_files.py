"""Typed reading of a model's JSON files: decoded into a struct once, with errors that name the file and the field."""

from pathlib import Path
from typing import TypeVar

import msgspec

from protocol.errors import ConfigError

MAX_JSON_BYTES = 64 << 20

T = TypeVar("T")


def read_json(path: Path, message_type: type[T]) -> T:
    """Decode one JSON file. Raises ConfigError: missing, unreadable, over MAX_JSON_BYTES, or a field that does not fit."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB")
        return msgspec.json.decode(path.read_bytes(), type=message_type)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
