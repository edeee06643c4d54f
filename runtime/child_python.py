"""Starting another Python process that imports what this one imports, however this one was started."""

import os
import sys
from pathlib import Path


def child_python(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of `python -m module arguments`.

    The import path goes along whole and in order, so that the child finds this very package; -P keeps whatever lies in
    the current folder from taking the place of it.
    """
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}
