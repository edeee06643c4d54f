"""How the C++ library is built, found, shared and done without."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels import native_library
from kernels.linear import PackedLinear

ROOT = Path(__file__).parents[2]
NATIVE = native_library.status().available


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_kernels_is_ours_and_transformers_imports() -> None:
    assert Path(kernels.__file__ or "").parent == ROOT / "kernels"
    code = "import kernels, transformers, transformers.models.llama.modeling_llama as m; print(m.LlamaForCausalLM)"
    assert "LlamaForCausalLM" in run_python(code)


def test_disabled_by_environment() -> None:
    code = (
        "import torch\nfrom kernels import native_library as n\nfrom kernels.rms_norm import rms_norm\n"
        "from kernels.linear import PackedLinear\nassert PackedLinear(torch.eye(4))(torch.ones(1, 4)).sum() == 4\n"
        "assert rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).sum() == 4\nprint(n.status())"
    )
    printed = run_python(code, HEADRACE_NATIVE_KERNELS="0")
    assert "available=False" in printed
    assert "HEADRACE_NATIVE_KERNELS=0" in printed


def test_no_compiler_is_told(tmp_path: Path) -> None:
    code = "from kernels import native_library as n; print(n.status())"
    printed = run_python(code, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert "available=False" in printed
    assert "no g++" in printed


def test_failed_build_is_told_in_one_line(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'x.cpp:1: error: out of ideas' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    code = "from kernels import native_library as n; print(n.status().reason)"
    printed = run_python(code, PATH=f"{tmp_path}:/usr/bin:/bin", XDG_CACHE_HOME=str(tmp_path))
    assert printed == "g++ failed: x.cpp:1: error: out of ideas"


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    compiler, log = tmp_path / "g++", tmp_path / "log"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nsleep 0.1\n'
        f'case "$*" in *-shared*) echo linked >> {log};; esac\n'
        'for output; do :; done\necho library > "$output"\n'
    )
    compiler.chmod(0o755)
    command = [sys.executable, "-c", "from kernels import native_library as n; print(n.build().read_text())"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path)}
    children = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [child.communicate(timeout=60)[0].strip() for child in children] == ["library"] * 3
    assert log.read_text() == "linked\n"
    assert sorted(path.suffix for path in (tmp_path / "headrace").rglob("lib*")) == [".lock", ".so"]


@pytest.mark.timeout(300)  # it compiles the library
@pytest.mark.skipif(not NATIVE or platform.machine() != "x86_64", reason="needs a compiler and an x86 CPU")
def test_the_same_source_is_right_without_avx512(tmp_path: Path) -> None:
    """These four use every vector primitive there is; their tests are run on an AVX2 build."""
    code = (
        "import pytest\nfrom kernels import native_library as n\n"
        "n._FLAGS = tuple('-march=haswell' if flag == '-march=native' else flag for flag in n._FLAGS)\n"
        "assert n.status().instruction_set == 'avx2', n.status()\n"
        "tests = [f'tests/kernels/test_kernels_{name}.py' for name in ('attention', 'linear', 'draw', 'llama_step')]\n"
        "raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', *tests]))"
    )
    run_python(code, PATH="/usr/local/bin:/usr/bin:/bin", XDG_CACHE_HOME=str(tmp_path))


@pytest.mark.skipif(not NATIVE, reason="needs the C++ library")
def test_one_openmp_runtime_in_the_process() -> None:
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        runtimes = {line.split()[-1] for line in maps if any(name in line for name in ("libgomp", "libiomp", "libomp"))}
    assert len(runtimes) == 1


def test_operations_do_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "function", lambda name, tensor: None)
    weight, x = torch.randn(5, 8), torch.randn(3, 8)
    layer = PackedLinear(weight)
    assert not layer.packed
    torch.testing.assert_close(layer(x), x @ weight.T)
