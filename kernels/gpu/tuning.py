"""Launch configurations: how many warps, pipeline stages and elements a program of a kernel gets, by device and shape.

A launcher asks with the default that its author chose:

    config = launch_config("block_copy", device, LaunchConfig(4, 1, {"TILE_WORDS": 1024}), block_bytes=block_bytes)

Defaults are reasoned from what the compiled kernels need (registers, shared memory, bytes in flight for each thread), not
measured. What has been measured replaces them, for one device name and one class of shapes, in which every number is
rounded up to a power of two. It is looked for in this order:

1. the user's file, $XDG_CACHE_HOME/headrace/tuning/<device>.json (~/.cache where XDG_CACHE_HOME is unset), which
   `python -m benchmarks.tune_gpu` writes after measuring on the device at hand;
2. tuning_table.json beside this file, for devices that somebody has measured and submitted.

Files are read once in a process, when a device is first asked about. One that cannot be used is named in the log and
ignored: a wrong entry could only make a kernel slower, or fail to launch.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VERSION = 1
"""Of the files' format and of the kernels' sizes: entries of another version do not count."""

SHIPPED = Path(__file__).with_name("tuning_table.json")
"""Measurements that come with the package."""
_LARGEST_WARPS, _LARGEST_STAGES = 32, 8

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """num_warps (of 32 threads), num_stages (of software pipelining) and the kernel's own constexpr sizes, by name."""

    num_warps: int
    num_stages: int = 1
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def parse(cls, entry: Any) -> "LaunchConfig":
        """From decoded JSON. Raises ValueError where it is none, or could not be launched on any device."""
        if not isinstance(entry, dict) or entry.keys() != {"num_warps", "num_stages", "sizes"}:
            raise ValueError(f"{entry!r} is no launch configuration")
        warps, stages, sizes = entry["num_warps"], entry["num_stages"], entry["sizes"]
        if not isinstance(sizes, dict) or not all(_is_power_of_two(size) for size in sizes.values()):
            raise ValueError(f"sizes must be powers of two, got {sizes!r}")
        if not _is_power_of_two(warps) or warps > _LARGEST_WARPS:
            raise ValueError(f"num_warps must be a power of two up to {_LARGEST_WARPS}, got {warps!r}")
        if not isinstance(stages, int) or not 1 <= stages <= _LARGEST_STAGES:
            raise ValueError(f"num_stages must be between 1 and {_LARGEST_STAGES}, got {stages!r}")
        return cls(warps, stages, sizes)

    def to_json(self) -> dict[str, object]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "sizes": dict(self.sizes)}


@dataclass(frozen=True, slots=True)
class Trial:
    """One kernel under measurement: what it is launched with instead, and for which shapes it was launched."""

    kernel: str
    config: LaunchConfig | None  # None: the default
    asked: dict[str, LaunchConfig]  # shape class: its default


_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


def launch_config(kernel: str, device: torch.device, default: LaunchConfig, /, **shape: int) -> LaunchConfig:
    """What to launch `kernel` with for this shape on this device: measured, or the default."""
    trial = _trial.get()
    if trial is not None and trial.kernel == kernel:
        trial.asked[shape_class(kernel, **shape)] = default
        return trial.config or default
    if device.type != "cuda":
        return default
    best = measured(device_name(device)).get(shape_class(kernel, **shape))
    return best if best is not None and best.sizes.keys() == default.sizes.keys() else default


@contextmanager
def forced(kernel: str, config: LaunchConfig | None) -> Iterator[Trial]:
    """Launch `kernel` with `config` (None: its default) inside of this context, whatever the tables say."""
    trial = Trial(kernel, config, {})
    token = _trial.set(trial)
    try:
        yield trial
    finally:
        _trial.reset(token)


def shape_class(kernel: str, /, **shape: int) -> str:
    """The key of an entry: "paged_decode block_size=16 group=4 head_dim=128"."""
    return " ".join((kernel, *(f"{name}={_class_size(size)}" for name, size in sorted(shape.items()))))


@functools.lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def user_file(device_name: str) -> Path:
    """Where this user's measurements of a device are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "headrace" / "tuning" / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device_name)}.json"


def write_user_file(device_name: str, configs: Mapping[str, LaunchConfig]) -> Path:
    """Replace what the user's file says of these shape classes, and keep the rest. Takes effect in the next process."""
    path = user_file(device_name)
    merged = {**_read(path, device_name), **configs}
    entries = {key: config.to_json() for key, config in sorted(merged.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"version": VERSION, "devices": {device_name: entries}}, indent=1) + "\n")
    unfinished.replace(path)
    return path


@functools.cache
def measured(device_name: str) -> Mapping[str, LaunchConfig]:
    """All that was measured of a device, by shape class."""
    return {**_read(SHIPPED, device_name), **_read(user_file(device_name), device_name)}


def _read(path: Path, device_name: str) -> dict[str, LaunchConfig]:
    """The device's entries of a file; none where there is no file, or none that can be used."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"its version is not {VERSION}")
        entries = content.get("devices", {}).get(device_name, {})
        return {str(key): LaunchConfig.parse(entry) for key, entry in entries.items()}
    except (OSError, ValueError, AttributeError) as error:
        _logger.warning("launch configurations of %s are ignored: %s", path, error)
        return {}


def _class_size(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _is_power_of_two(value: object) -> bool:
    return isinstance(value, int) and value > 0 and not value & (value - 1)
