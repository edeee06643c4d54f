"""Triton kernels compiled for a Hopper GPU (sm_90) on a machine that has none, and what the machine code needs.

Whether `@triton.jit` makes a kernel for the interpreter or for the compiler is read from TRITON_INTERPRET when a module
is imported, Triton's own library of functions included, so one process has either. Tests have the interpreter
(tests/conftest.py sets it where there is no GPU); the compiler runs in one child process, where kernels are imported
again by name. The fixture `compile_for_sm90` (tests/kernels/conftest.py) starts it with the first test of a module that
compiles, and ends it with the last:

    def test_compiles(compile_for_sm90: CompileForSm90) -> None:
        resources = compile_for_sm90(copy_kernel, {"source_ptr": "*bf16", "size": "i32"}, {"BLOCK": 1024}, num_warps=4)
        assert resources.spill_bytes == 0

The child speaks JSON, a line for each kernel, on its standard streams.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

Constant = int | float | bool | str | None


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel. An sm_90 multiprocessor has 65,536 registers and 228 KiB of shared memory."""

    registers: int  # per thread, at most 255
    spill_bytes: int  # of a thread's local memory
    shared_bytes: int  # of a program
    ptx: str


class CompileForSm90(Protocol):
    def __call__(
        self,
        kernel: Any,
        signature: Mapping[str, str],
        constexprs: Mapping[str, Constant],
        num_warps: int = 4,
        num_stages: int = 3,
        *,
        divisible: Sequence[str] = (),
        fp_fusion: bool = True,
    ) -> Resources:
        """Compile `kernel`, a `@triton.jit` function of a module.

        signature: the type of every argument that is no constexpr ("*bf16", "i32", "fp32", ...). Pointers are taken to
        be multiples of 16, as torch's are, and so are the integers named in `divisible`. Raises AssertionError with the
        compiler's words where it does not compile.
        """


@contextmanager
def sm90_compiler() -> Iterator[CompileForSm90]:
    """The compiler, as long as the context lasts."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with (
        tempfile.TemporaryDirectory() as cache,
        subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "TRITON_CACHE_DIR": cache},
        ) as child,
    ):

        def compile_for_sm90(
            kernel: Any,
            signature: Mapping[str, str],
            constexprs: Mapping[str, Constant],
            num_warps: int = 4,
            num_stages: int = 3,
            *,
            divisible: Sequence[str] = (),
            fp_fusion: bool = True,
        ) -> Resources:
            request = {
                "module": kernel.fn.__module__,
                "name": kernel.fn.__name__,
                "signature": dict(signature),
                "constexprs": dict(constexprs),
                "options": {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion},
                "divisible": list(divisible),
            }
            assert child.stdin is not None
            assert child.stdout is not None
            print(json.dumps(request), file=child.stdin, flush=True)
            answer = json.loads(child.stdout.readline() or '{"error": "the compiling process has ended"}')
            assert "error" not in answer, answer["error"]
            return Resources(**answer)

        yield compile_for_sm90  # Popen's own exit closes the child's standard input, which ends it, and waits


def _serve() -> None:
    """The child: one answer for each line of standard input. What else is printed goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = asdict(_compile(**json.loads(line)))
        except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the test's to see
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _compile(
    module: str,
    name: str,
    signature: dict[str, str],
    constexprs: dict[str, Constant],
    options: dict[str, Any],
    divisible: list[str],
) -> Resources:
    import triton  # not in the test's process: this one has TRITON_INTERPRET unset
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    aligned = [index for index, name in enumerate(types) if types[name].startswith("*") or name in divisible]
    source = ASTSource(kernel, types, constexprs, {(index,): [["tt.divisibility", 16]] for index in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, spill_bytes = _usage(compiled.asm["cubin"])
    return Resources(registers, spill_bytes, compiled.metadata.shared, compiled.asm["ptx"])


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread, from the line that cuobjdump prints for the kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    line = next(line for line in report.splitlines() if "REG:" in line)
    fields = dict(field.split(":", 1) for field in line.split())
    return int(fields["REG"]), int(fields["STACK"])


if __name__ == "__main__":
    _serve()
