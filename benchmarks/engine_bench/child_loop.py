"""The inside of a contestant's process: answers JSON lines on stdin with JSON lines on stdout until stdin ends.

Standard library only, because peers run it under interpreters of their own. It blocks on stdin between commands, so that
a contestant that waits takes no core from the one that is measured.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping

READY = json.dumps({"ready": True})

Operation = Callable[..., object]


def serve(build: Callable[[], Mapping[str, Operation]]) -> None:
    """`build` starts what is measured; its operations are then called by name with the command's other keys.

    The first line out is READY. What an operation returns comes back as {"result": ...}. An exception ends the
    process with its traceback on stderr. Whatever libraries print goes to stderr: stdout is ours alone.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    operations = build()
    print(READY, file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        operation = operations[command.pop("do")]
        print(json.dumps({"result": operation(**command)}), file=answers)
