"""The router's process: the public and the control server on one event loop.

listening -> ready -> (SIGTERM) draining: no new requests, running ones finish -> exit
"""

import logging
import time
from collections.abc import Callable

from protocol.errors import ConfigError
from protocol.ids import new_router_id
from router.app import build_app
from router.cache_admin import CacheAdmin
from router.chat_template import ChatTemplate
from router.cluster import Cluster
from router.config import RouterConfig
from router.control_app import build_control_app
from router.prompts import TextModel
from router.services import make_services
from router.tokenizer import TextTokenizer
from runtime.auth import check_bind
from runtime.clock import MonotonicClock
from runtime.life import ProcessLife, install_signal_handlers
from runtime.metrics import new_registry
from runtime.models.resolve import resolve_model
from runtime.rpc_client import RpcClient
from runtime.serving import announce, run_on_event_loop, serve_apps

log = logging.getLogger(__name__)


def run(config: RouterConfig) -> int:
    """Serve until told to stop; the process's exit code. Raises ConfigError if it cannot start."""
    check_bind(config.control_host, config.cluster_key)
    run_on_event_loop(_main(config, load_model(config)))
    return 0


def load_model(config: RouterConfig) -> TextModel:
    """The model's small files. Raises ConfigError for what is missing or damaged."""
    files = resolve_model(config.model, progress=log.info, weights=False)
    try:
        tokenizer = TextTokenizer.from_file(files.tokenizer_path)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{files.tokenizer_path} is not a usable tokenizer: {error}", param="model") from error
    texts = {"bos_token": files.bos_token, "eos_token": files.eos_token}
    special_tokens = {name: text for name, text in texts.items() if text is not None}
    return TextModel(
        name=config.served_name or files.name,
        tokenizer=tokenizer,
        template=None if files.chat_template is None else ChatTemplate(files.chat_template, special_tokens),
        eos_token_ids=files.eos_token_ids,
        max_model_len=files.max_model_len,
        vocab_size=files.vocab_size,
        sampling=files.sampling,
    )


async def _main(config: RouterConfig, model: TextModel) -> None:
    life = ProcessLife()
    install_signal_handlers(life)
    await serve(config, model, life, lambda urls: announce("router", urls[0], control_url=urls[1]))


async def serve(
    config: RouterConfig, model: TextModel, life: ProcessLife, on_serving: Callable[[list[str]], None]
) -> None:
    """Serve until `life` ends. `on_serving` gets the public and the control URL once both answer."""
    clock = MonotonicClock()
    async with (
        RpcClient(config.cluster_key) as client,
        Cluster(config, model.name, client, new_router_id(), clock) as cluster,
    ):
        services = make_services(config, model, cluster, life, clock, new_registry(), int(time.time()))
        cache = CacheAdmin(cluster, model, services.limits, client)

        def serving(urls: list[str]) -> None:
            life.ready()
            on_serving(urls)

        await serve_apps(
            [
                (build_app(services), config.host, config.port),
                (build_control_app(cluster, cache, config.cluster_key), config.control_host, config.control_port),
            ],
            life,
            drain=services.admission.drain,
            drain_timeout_s=config.drain_timeout_s,
            on_serving=serving,
        )
