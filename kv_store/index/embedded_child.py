"""The process that becomes the embedded server: ties itself to the one that started it, then gives way to the server.

    python -m kv_store.index.embedded_child BINARY ARGUMENT...

What the kernel was told about the parent outlives exec.
"""

import os
import sys

from runtime.life import watch_parent


def main() -> None:
    watch_parent()
    os.execv(sys.argv[1], sys.argv[1:])  # noqa: S606 - the very point; the caller chose the binary


if __name__ == "__main__":
    main()
