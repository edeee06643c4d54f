"""GgufFile: the header of a GGUF file, read from a memory map with every length checked against the file's size.

The layout, all little-endian: magic, version, number of tensors, number of metadata pairs; the pairs; the tensors'
names, shapes, types and offsets; then, aligned, the tensors' bytes. A file that lies about a length is refused here, so
that what follows can trust the numbers.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import gguf
import numpy as np
import numpy.typing as npt

from protocol.errors import ConfigError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_MAX_ENTRIES = 1 << 24  # metadata pairs, tensors, strings of an array
_DEFAULT_ALIGNMENT = 32

Array = npt.NDArray[np.generic]
Value = int | float | bool | str | Array | list[str]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` in row-major order, the outermost dimension first. `start` and `num_bytes` are positions in the file."""

    name: str
    shape: tuple[int, ...]
    quantization: gguf.GGMLQuantizationType
    start: int
    num_bytes: int


class GgufFile:
    """An open GGUF file. Accessors raise ConfigError that names the file and the key."""

    def __init__(self, path: Path, data: mmap.mmap, metadata: dict[str, Value], tensors: dict[str, GgufTensor]) -> None:
        self.path = path
        self.tensors = tensors
        self._data = data
        self._metadata = metadata

    @classmethod
    def open(cls, path: Path) -> Self:
        """Raises ConfigError where the file is missing, not GGUF, or damaged."""
        try:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ConfigError(f"{path}: {error}") from error
        header = _HeaderReader(path, data)
        metadata, tensors = header.read()
        return cls(path, data, metadata, tensors)

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key} {problem}")

    def has(self, key: str) -> bool:
        return key in self._metadata

    def text(self, key: str) -> str:
        value = self._value(key)
        if not isinstance(value, str):
            raise self.error(key, "must be a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def integer(self, key: str, low: int = 0, high: int = 1 << 31) -> int:
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "must be an integer")
        if not low <= value <= high:
            raise self.error(key, f"is {value}, not between {low} and {high}")
        return value

    def number(self, key: str) -> float:
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "must be a number")
        return float(value)

    def texts(self, key: str) -> list[str]:
        value = self._value(key)
        if not isinstance(value, list):
            raise self.error(key, "must be an array of strings")
        return value

    def integers(self, key: str) -> list[int]:
        value = self._value(key)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise self.error(key, "must be an array of integers")
        return [int(item) for item in value]

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values, dequantised, in its row-major shape."""
        info = self.tensors.get(name)
        if info is None:
            raise ConfigError(f"{self.path} has no tensor {name}")
        raw = np.frombuffer(self._data, np.uint8, info.num_bytes, info.start)
        if info.quantization == gguf.GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(info.shape)
        if info.quantization == gguf.GGMLQuantizationType.F16:
            return raw.view("<f2").astype(np.float32).reshape(info.shape)
        try:
            return gguf.quants.dequantize(raw, info.quantization).reshape(info.shape)
        except NotImplementedError as error:
            raise ConfigError(f"{self.path}: {name} is stored as {info.quantization.name}, not supported") from error

    def _value(self, key: str) -> Value:
        if key not in self._metadata:
            raise ConfigError(f"{self.path} has no {key}")
        return self._metadata[key]


class _HeaderReader:
    """Walks the header once, from the magic to the last tensor's description."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._position = 0

    def read(self) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
        if self._take(4, "the magic") != _MAGIC:
            raise ConfigError(f"{self._path} is not a GGUF file")
        version = self._unsigned(4, "the version")
        if version not in _VERSIONS:
            raise ConfigError(f"{self._path} is GGUF version {version}; versions 2 and 3 (little-endian) are supported")
        num_tensors, num_pairs = self._count("the number of tensors"), self._count("the number of metadata keys")
        metadata: dict[str, Value] = {}
        for _ in range(num_pairs):
            key = self._string("a metadata key")
            if key in metadata:
                raise self._damaged(f"{key} stands twice")
            metadata[key] = self._typed_value(key)
        described = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise self._damaged(f"general.alignment is {alignment}")
        start = -(-self._position // alignment) * alignment
        return metadata, self._placed(described, start)

    def _placed(self, described: list[GgufTensor], start: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for tensor in described:
            first = start + tensor.start
            if first + tensor.num_bytes > len(self._data):
                raise self._damaged(f"tensor {tensor.name} lies beyond the end of the file")
            if tensor.name in tensors:
                raise self._damaged(f"tensor {tensor.name} stands twice")
            tensors[tensor.name] = GgufTensor(tensor.name, tensor.shape, tensor.quantization, first, tensor.num_bytes)
        return tensors

    def _tensor(self) -> GgufTensor:
        """One tensor's description; `start` still counts from where the tensors' bytes begin."""
        name = self._string("a tensor's name")
        num_dimensions = self._unsigned(4, name)
        if num_dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {num_dimensions} dimensions")
        dimensions = [self._unsigned(8, name) for _ in range(num_dimensions)]
        type_id, offset = self._unsigned(4, name), self._unsigned(8, name)
        try:
            quantization = gguf.GGMLQuantizationType(type_id)
        except ValueError as error:
            raise self._damaged(f"tensor {name} is of unknown type {type_id}") from error
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        num_elements = 1
        for size in dimensions:
            num_elements *= size
        if dimensions and dimensions[0] % block_elements:
            raise self._damaged(f"tensor {name} has rows of {dimensions[0]}, no multiple of {block_elements}")
        num_bytes = num_elements // block_elements * block_bytes
        return GgufTensor(name, tuple(reversed(dimensions)), quantization, offset, num_bytes)

    def _typed_value(self, key: str) -> Value:
        kind = self._unsigned(4, key)
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            kind, length = self._unsigned(4, key), self._count(key)
            return [self._string(key) for _ in range(length)] if kind == _STRING else self._scalars(key, kind, length)
        value: Value = self._scalars(key, kind, 1)[0].item()
        return value

    def _scalars(self, key: str, kind: int, length: int) -> Array:
        if kind not in _SCALARS:
            raise self._damaged(f"{key} is of unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(length * dtype.itemsize, key), dtype)

    def _string(self, what: str) -> str:
        try:
            return self._take(self._unsigned(8, what), what).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8") from error

    def _count(self, what: str) -> int:
        count = self._unsigned(8, what)
        if count > _MAX_ENTRIES:
            raise self._damaged(f"{what} has {count} entries")
        return count

    def _unsigned(self, size: int, what: str) -> int:
        return int.from_bytes(self._take(size, what), "little")

    def _take(self, size: int, what: str) -> bytes:
        end = self._position + size
        if end > len(self._data):
            raise self._damaged(f"the file ends within {what}")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def _damaged(self, problem: str) -> ConfigError:
        return ConfigError(f"{self._path} is damaged: {problem}")
