"""The control routes of a real node, without its sockets: a process of either role as its own `run` composes it, up to
the moment at which it would serve. What a new route must obey, no list in a test can forget."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

import decode_node.main
import prefill_node.main
from protocol.workers import Role
from runtime import node_shell
from runtime.life import ProcessLife
from runtime.node_config import CacheOptions, ModelOptions, NodeConfig, TransferOptions

CLUSTER_KEY = "a-cluster-key-for-tests"
RUN = {"prefill": prefill_node.main.run, "decode": decode_node.main.run}


def visit_node(
    role: Role, model: Path, monkeypatch: pytest.MonkeyPatch, visit: Callable[[Starlette], Awaitable[None]]
) -> None:
    """Start a node, call `visit` with its application on its event loop, and stop it. Not to be called on a loop."""

    visited = False

    async def serve(
        apps: Sequence[tuple[Starlette, Any]],
        life: ProcessLife,
        _drain: object,
        _timeout_s: float,
        listening: Callable[[list[str]], None],
        _farewell: object,
    ) -> None:
        listening(["http://127.0.0.1:1"])
        nonlocal visited
        try:
            await visit(apps[0][0])
            visited = True
        finally:
            life.stop("visited")
            for _, bound in apps:
                bound.close()

    monkeypatch.setattr(node_shell, "serve_sockets", serve)
    config = NodeConfig(
        cluster_key=CLUSTER_KEY,
        routers=(),
        model=ModelOptions(model=str(model), runner="simulated"),
        cache=CacheOptions(num_blocks=64),
        transfer=TransferOptions(transport="tcp"),
    )
    assert RUN[role](config) == 0
    assert visited
