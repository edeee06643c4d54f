"""Finding the NIXL library and making one agent with it, with what we learned about both.

NIXL is an optional dependency: a native wheel of 70 MB that the shm and tcp transports do without. Hence the one late
import of this package.
"""

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from kv_transfer.transports.network_devices import confine_ucx
from kv_transfer.transports.nixl.blocks import NixlBlocks
from protocol.errors import ConfigError

INSTALL_HINT = "pip install nixl-cu12"
_MODULES = ("nixl_cu12._api", "nixl_cu13._api", "nixl._api")
"""The wheels for one CUDA version come first: the `nixl` package chooses between them by looking at torch, and both
do the same for host memory."""

_patching = threading.Lock()


def load_nixl(host: str) -> ModuleType:
    """The library's API module. Raises ConfigError, saying how to install it, where there is none.

    UCX, underneath, is confined to the network devices of `host`.
    """
    confine_ucx(host)
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    reasons: list[str] = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
            continue
        module.logger.setLevel("WARNING")
        return module
    raise ConfigError(
        f'the transport "nixl" needs the NIXL library ({INSTALL_HINT}), or set transfer.transport to "shm" (one host) '
        f'or "tcp"; tried {"; ".join(reasons)}',
        param="transfer.transport",
    )


def make_agent(api: ModuleType, name: str, *, progress_delay_us: int | None) -> Any:
    """A NIXL agent with the UCX backend. `name` must never have been used before: peers cannot forget a bad one.

    With a delay it has a progress thread, which wakes at least that often; with None whoever polls it makes the progress.
    Raises ConfigError where the backend cannot start.
    """
    config = api.nixl_agent_config(enable_prog_thread=progress_delay_us is not None, backends=["UCX"])
    try:
        with _progress_thread_delay(api.nixlBind, progress_delay_us or 0):
            agent = api.nixl_agent(name, config)
    except Exception as error:  # the bindings' errors have no common base, and each means: no transport
        raise ConfigError(_why_no_agent(error), param="transfer.transport") from error
    if "UCX" not in agent.backends:
        raise ConfigError("the NIXL library has no UCX backend; reinstall it", param="transfer.transport")
    return agent


@contextlib.contextmanager
def _progress_thread_delay(bindings: Any, delay_us: int) -> Iterator[None]:
    """While this holds, agents get this delay: the Python API sets 0 and has no parameter for it."""
    original = bindings.nixlAgentConfig

    class DelayedConfig(original):  # type: ignore[misc, valid-type]  # a class of the untyped bindings
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, delay_us if name == "pthrDelay" else value)

    with _patching:
        bindings.nixlAgentConfig = DelayedConfig
        try:
            yield
        finally:
            bindings.nixlAgentConfig = original


def _why_no_agent(error: Exception) -> str:
    if ".nixl.cfg" in str(error):
        return (
            f"NIXL cannot look for .nixl.cfg in HOME={os.environ.get('HOME')!r}: {error}. Set HOME to a folder that "
            "this user may read, or NIXL_CONFIG_FILE to a file"
        )
    return f"NIXL cannot start its UCX backend: {error}"


def register(api: ModuleType, agent: Any, blocks: NixlBlocks) -> None:
    """Let the agent reach the blocks, for as long as it lives. Raises ConfigError where the library cannot: UCX without CUDA
    for a GPU's memory, say, or a limit on locked memory."""
    try:
        agent.register_memory([blocks.region], blocks.memory)
    except error_types(api) as error:
        kind = "a GPU's" if blocks.memory == "VRAM" else "the host's"
        raise ConfigError(
            f"NIXL cannot register {blocks.region[1] >> 20} MiB of {kind} memory: {error}",
            param="transfer.device_memory",
        ) from error


def error_types(api: ModuleType) -> tuple[type[Exception], ...]:
    """Everything that the library raises on its own. Its errors have no common base."""
    found = (getattr(api.nixlBind, name) for name in dir(api.nixlBind) if name.endswith("Error"))
    return tuple(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))


def lost_peer_errors(api: ModuleType) -> tuple[type[Exception], ...]:
    """Those after which a connection is of no use any more."""
    bindings = api.nixlBind
    return (bindings.nixlRemoteDisconnectError, bindings.nixlNotFoundError, bindings.nixlBackendError)
