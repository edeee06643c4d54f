"""A role's process that dies, or kills another, at an exact step of its work: `python -m tests.support.mortal_role serve ROLE ...`.

It is the real `headrace`, with a look at a folder before each of the steps below. Where a file STEP.WORKER is there for this
worker, it is taken away, and the process whose id it holds is killed; "self" is this one.
"""

import functools
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from headrace.cli import main

ORDERS = "HEADRACE_TEST_ORDERS"
STEPS = {
    "copy": "kv_store.host_copier:HostCopier.copy_out",
    "offer": "store_node.put_queue:PutQueue._put",
    "lend": "kv_transfer.lending.lender:Lender.lend",
    "serve": "kv_transfer.transports.tcp.server:TcpServer._answer",
    "put": "store_node.put_receiver:PutReceiver.put",
    "commit": "kv_store.host_tier:HostTier.commit",
    "publish": "kv_store.tier_events:TierEvents.stored",
    "lookup": "kv_store.index.index:RedisIndex.find",
    "borrow": "kv_transfer.handoff.imports:Importer.borrow",
    "read": "kv_transfer.handoff.imports:Importer.fetch_prefix",
    "verify": "kv_transfer.memory.staging:HostStaging.land",
    "release": "kv_transfer.handoff.exports:ExportTable.release",
}


def order(folder: Path, step: str, worker: str, pid: int | None = None) -> None:
    """Have this worker, when it comes to this step next, kill `pid`, or itself."""
    waiting = folder / "waiting"
    waiting.write_text("self" if pid is None else str(pid))
    waiting.rename(folder / f"{step}.{worker}")


def obey(folder: Path, step: str) -> None:
    worker = next((word.removeprefix("worker_id=") for word in sys.argv if word.startswith("worker_id=")), "router")
    file = folder / f"{step}.{worker}"
    try:
        text = file.read_text()
        file.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid() if text == "self" else int(text), signal.SIGKILL)


def watch(folder: Path, step: str, place: str) -> None:
    module_name, _, path = place.partition(":")
    class_name, name = path.split(".")
    owner = getattr(importlib.import_module(module_name), class_name)
    method: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(method)
    def look_first(*arguments: Any, **options: Any) -> Any:
        obey(folder, step)
        return method(*arguments, **options)

    assert inspect.isfunction(method), f"{place} is not a method"
    setattr(owner, name, look_first)


if __name__ == "__main__":
    for step, place in STEPS.items():
        watch(Path(os.environ[ORDERS]), step, place)
    sys.exit(main(sys.argv[1:]))
