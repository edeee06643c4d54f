"""WeightSource: a model's tensors by name, each read once, cast to the dtype and device that the model runs in.

`SafetensorsSource` maps the checkpoint's files and copies one tensor at a time. `DummySource` makes tensors up from a
seed, for measurements of models whose weights are not at hand. Both count what was read and report progress.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from protocol.errors import ConfigError
from runtime.models.weight_files import weight_files

Progress = Callable[[str], None]

_DERIVED_SUFFIXES = ("rotary_emb.inv_freq",)  # written by old versions; computed from config.json here
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class WeightSource(Protocol):
    def read(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor of this name. Raises ConfigError where it is missing, or not a float tensor of this shape."""
        ...

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        """All has been read. Raises ConfigError where the checkpoint has tensors that nobody read, for then it is not
        the model that config.json says; `ignored` may stay unread."""
        ...


class SafetensorsSource:
    """Tensors of a model folder. Raises ConfigError where its weights are missing or damaged."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._files = {}
        self._unread: set[str] = set()
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path} cannot be read: {error}") from error
            names: list[str] = file.keys()  # type: ignore[no-untyped-call]  # safetensors types its reader in part
            for name in names:
                self._files[name] = file
        self._unread.update(self._files)
        self._report = _ProgressReport(len(self._files), progress)

    def read(self, name: str, *shape: int) -> torch.Tensor:
        file = self._files.get(name)
        if file is None:
            raise ConfigError(f"{self._folder}: the checkpoint has no tensor {name}")
        tensor: torch.Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]
        if tuple(tensor.shape) != shape or tensor.dtype not in _FLOATS:
            raise ConfigError(
                f"{self._folder}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, config.json wants {shape}"
            )
        self._unread.discard(name)
        self._report.count()
        return tensor.to(self._device, self._dtype)

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        left = sorted(name for name in self._unread - ignored if not name.endswith(_DERIVED_SUFFIXES))
        if left:
            raise ConfigError(f"{self._folder}: config.json has no place for tensor {left[0]} ({len(left)} in all)")


class DummySource:
    """Random tensors, the same for the same seed and name on every machine.

    Matrices are scaled by the square root of their columns, which keeps activations and logits near unit size; norms
    are ones, biases zeros.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._seed = seed
        self._dtype = dtype
        self._device = device

    def read(self, name: str, *shape: int) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        tensor = torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)
        return tensor.to(self._device, self._dtype)

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        """Nothing can be left over."""


class _ProgressReport:
    """A line for every quarter."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total = total
        self._progress = progress
        self._done = 0

    def count(self) -> None:
        self._done += 1
        if self._done * 4 // self._total != (self._done - 1) * 4 // self._total:
            self._progress(f"loaded {self._done} of {self._total} tensors")
