"""Finding ucxx, the UCX bindings of RAPIDS, and opening a UCX worker with it.

An optional dependency (the extra `ucx`): 70 MB of native wheels beside NIXL's own copy of UCX. Hence the late import, in
the helper process only.
"""

import importlib
import importlib.util
from collections.abc import MutableMapping
from types import ModuleType
from typing import Any

from kv_transfer.transports.network_devices import confine_ucx
from protocol.errors import ConfigError

INSTALL_HINT = 'pip install "headrace[ucx]"'

_TUNING = {
    "UCX_CMA_MEMORY_INVALIDATE": "y",
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "512k",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
"""Settings of UCX that the user has not chosen. The first lets peers on one host copy directly: UCX holds that back where
a dead peer must be noticed, because it could not stop such a copy from reading memory that was freed meanwhile. An arena
never is. It makes transfers four to six times as fast; larger segments make tcp up to twice as fast."""


def require_ucxx() -> None:
    """Raise ConfigError, saying how to install it, where ucxx is missing. Imports nothing."""
    if importlib.util.find_spec("ucxx") is None:
        raise ConfigError(
            f'the transport "ucx" needs the ucxx library ({INSTALL_HINT}), or set transfer.transport to "nixl" or "tcp"',
            param="transfer.transport",
        )


def set_environment(environment: MutableMapping[str, str], host: str) -> None:
    """What a helper process is to find in its environment, where the user has not chosen otherwise."""
    for name, value in _TUNING.items():
        environment.setdefault(name, value)
    confine_ucx(host, environment)


class UcxApi:
    """The few names of ucxx that we use: the synchronous layer, whose calls this process makes from one thread."""

    def __init__(self, bindings: ModuleType, arrays: ModuleType) -> None:
        self.Array: Any = arrays.Array
        self.Tag: Any = bindings.UCXXTag
        self.Address: Any = bindings.UCXAddress
        self.Endpoint: Any = bindings.UCXEndpoint
        self.Error: type[Exception] = bindings.UCXError
        self._bindings = bindings

    def open_worker(self) -> Any:
        features = self._bindings.Feature
        context = self._bindings.UCXContext(feature_flags=(features.TAG, features.WAKEUP))
        worker = self._bindings.UCXWorker(context)
        worker.init_blocking_progress_mode()
        return worker


def load_ucx() -> UcxApi:
    """Raises ConfigError where the library cannot be loaded."""
    try:
        return UcxApi(importlib.import_module("ucxx._lib.libucxx"), importlib.import_module("ucxx._lib.arr"))
    except (ImportError, OSError, AttributeError) as error:
        raise ConfigError(
            f"the ucxx library cannot be loaded: {error}; install it again ({INSTALL_HINT})",
            param="transfer.transport",
        ) from error
