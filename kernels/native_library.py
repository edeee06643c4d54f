"""The C++ kernels as a shared library: built on the machine that runs them, loaded once per process, then only called.

The library has a plain C interface and is called through ctypes on data pointers. It is compiled with g++ on first use
(some twenty seconds of work, on all cores) into `$XDG_CACHE_HOME/headrace/kernels/<key>/` (`~/.cache` by default), where
the key covers sources, flags, compiler and CPU; processes that start at once build it once. Without a compiler, after a failed build, or with
`HEADRACE_NATIVE_KERNELS=0`, every operation takes its torch reference instead, and `status` says why.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.kv_cache import CacheView

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "native"
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC"),
)
_BUILD_TIMEOUT_S = 300.0
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.int8: "i8"}
_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_CACHE_VIEW = ctypes.POINTER(CacheView)
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # as native/ declares them; ctypes has no public type for its types
    "rms_norm": (*[_POINTER] * 5, _INT64, _INT64, _FLOAT, _INT),
    "silu_and_mul": (*[_POINTER] * 2, _INT64, _INT64, _INT),
    "rope_and_write_kv": (*[_POINTER] * 8, *[_INT64] * 6, _CACHE_VIEW, _INT),
    "paged_attention": (*[_POINTER] * 6, *[_INT64] * 5, _FLOAT, _INT64, _CACHE_VIEW, _INT),
    "pack_weight": (*[_POINTER] * 3, _INT),
    "linear": (*[_POINTER] * 3, _INT64, _INT),
    "llama_scratch": (_POINTER, _INT64, _INT64, _POINTER),
    "llama_step": (_POINTER, _POINTER, _INT),
    "linear_wide": (*[_POINTER] * 3, _INT64, _INT),
    "draw": (*[_POINTER] * 7, *[_INT64] * 2, _INT),
}
_FLOATS = (torch.float32, torch.bfloat16)
_DTYPES = {"draw": (torch.float32,), "pack_weight": (*_FLOATS, torch.int8)}  # the others come for _FLOATS
WORD_BYTES = 4
"""Rows of operands consist of whole words: one float, two bfloat16 or four int8."""
_INDEX_OUT_OF_RANGE, _BAD_LENGTHS = 1, 2  # Status in native/api.h

NativeFunction = Callable[..., int]


class NativeBuildError(Exception):
    """The library cannot be built here; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """Whether the C++ kernels are in use, why (not), and what they were compiled for ("" where they are not)."""

    available: bool
    reason: str
    instruction_set: str


@dataclass(frozen=True, slots=True)
class _Loaded:
    status: NativeStatus
    functions: dict[tuple[str, torch.dtype], NativeFunction]


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise NativeBuildError("no g++ on PATH")
    return compiler


def _openmp_of_torch() -> list[str]:
    """The OpenMP runtime that torch has mapped. Linked against another one, the kernels would have a second pool of
    threads, and the two would fight for the cores."""
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    names = ("libgomp", "libiomp5", "libomp")
    return sorted(path for path in paths if Path(path).name.startswith(names))[:1]


def _cpu_identity() -> str:
    """What `-march=native` looks at: the model of the CPU and its feature flags."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as cpuinfo:
        lines = {line.strip() for line in cpuinfo if line.startswith(("model name", "flags", "Features", "CPU part"))}
    return "\n".join([platform.machine(), *sorted(lines)])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - the compiler that PATH names, and files of this package
        command, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S
    )


def _library_path(compiler: str, arguments: list[str]) -> Path:
    version = _run([compiler, "--version"]).stdout
    digest = hashlib.sha256("\0".join([version, _cpu_identity(), *arguments]).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "headrace" / "kernels" / digest.hexdigest()[:32] / "libheadrace_kernels.so"


def build() -> Path:
    """Build the library unless this machine has it already; returns its path. Raises NativeBuildError."""
    try:
        compiler = _compiler()
        arguments = [*_FLAGS, *_openmp_of_torch()]
        library = _library_path(compiler, arguments)
        if library.exists():
            return library
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with library.with_suffix(".lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, or the process ends
            if not library.exists():
                log.info("compiling the C++ kernels for this machine, once: some twenty seconds of work, on all cores")
                _compile(compiler, arguments, library)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        raise NativeBuildError(f"{type(error).__name__}: {error}") from error
    return library


def _compile(compiler: str, arguments: list[str], library: Path) -> None:
    """Compile beside the final place and move it there, so that no process ever sees half of a library. One compiler for
    each core that there is: the sources take some twenty seconds together."""
    flags = [argument for argument in arguments if argument.startswith("-")]
    libraries = [argument for argument in arguments if not argument.startswith("-")]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / library.name
        sources = {source: Path(folder) / f"{source.stem}.o" for source in sorted(_SOURCES.glob("*.cpp"))}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as compilers:
            list(
                compilers.map(lambda item: _build_step(compiler, *flags, "-c", item[0], "-o", item[1]), sources.items())
            )
        # Libraries follow the objects that need them: torch's OpenMP wins over the one that -fopenmp adds at the end.
        _build_step(compiler, *flags, "-shared", "-Wl,--as-needed,-z,defs", *sources.values(), *libraries, "-o", output)
        output.replace(library)


def _build_step(*command: str | Path) -> None:
    result = _run([str(part) for part in command])
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line or "undefined" in line]
        raise NativeBuildError(f"g++ failed: {errors[0] if errors else f'exit status {result.returncode}'}")


@functools.cache
def _load() -> _Loaded:
    if os.environ.get("HEADRACE_NATIVE_KERNELS", "1") == "0":
        return _unavailable("disabled by HEADRACE_NATIVE_KERNELS=0")
    try:
        path = build()
        library = ctypes.CDLL(str(path))
    except (NativeBuildError, OSError) as error:
        return _unavailable(str(error))
    describe = library.headrace_instruction_set
    describe.restype = ctypes.c_char_p
    functions: dict[tuple[str, torch.dtype], NativeFunction] = {}
    for name, argument_types in _SIGNATURES.items():
        for dtype in _DTYPES.get(name, _FLOATS):
            symbol = library[f"headrace_{name}_{_SUFFIXES[dtype]}"]
            symbol.argtypes, symbol.restype = argument_types, ctypes.c_int
            functions[name, dtype] = symbol
    return _Loaded(NativeStatus(True, f"loaded {path}", describe().decode()), functions)


def _unavailable(reason: str) -> _Loaded:
    return _Loaded(NativeStatus(available=False, reason=reason, instruction_set=""), {})


def status() -> NativeStatus:
    """Load the library (building it if need be) and say what came of it. Never raises."""
    return _load().status


def function(name: str, tensor: torch.Tensor) -> NativeFunction | None:
    """The C++ function of this name for the tensor's dtype; None where its device, dtype or the machine has none."""
    return _load().functions.get((name, tensor.dtype)) if tensor.is_cpu else None


def packer(dtype: torch.dtype) -> NativeFunction:
    """The C++ function that packs weights of this type; only where the library is available."""
    return _load().functions["pack_weight", dtype]


def raise_for_status(status_code: int) -> None:
    """Turn what a C++ function returned into the exception that the torch reference would raise."""
    if status_code == _INDEX_OUT_OF_RANGE:
        raise IndexError("a block id or slot lies outside the KV cache, or a token, position or row does not exist")
    if status_code == _BAD_LENGTHS:
        raise ValueError("query_starts, context_lens and block_tables do not fit together")
