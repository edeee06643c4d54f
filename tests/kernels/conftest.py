"""For tests of kernels: the device that Triton kernels run on, and the compiler for a GPU that is not there."""

from collections.abc import Iterator

import pytest
import torch
from ahead_of_time import CompileForSm90, sm90_compiler


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU in Triton's interpreter (see tests/conftest.py)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def compile_for_sm90() -> Iterator[CompileForSm90]:
    with sm90_compiler() as compiler:
        yield compiler
