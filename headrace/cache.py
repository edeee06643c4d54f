"""`headrace cache WHAT`: what the caches of a running cluster hold, and what an operator may do about it."""

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, get_args

import msgspec

from headrace import cache_tables, cache_warm, cache_watch
from protocol.cache_admin import (
    CacheChanged,
    CacheStats,
    ClearCache,
    Endpoint,
    FindPrompt,
    GetCacheStats,
    NodeSilent,
    PinPrompt,
    PromptOf,
    PromptsFound,
    UnpinPrompt,
)
from protocol.errors import ConfigError, NodeLost, Unauthorized
from protocol.kv_events import StorageTier
from protocol.store_admin import MAX_TTL_S
from runtime.rpc_client import RpcClient

CLUSTER_URL = "http://127.0.0.1:8001"
TIMEOUT_S = 15.0
"""More than a router gives its nodes."""

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_TTL = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_NAMED_TENANT = re.compile(r"[0-9a-z]{1,16}")

_EPILOG = """\
examples:
  headrace cache stats                                what every node keeps, tier by tier
  headrace cache stats --by tenant                    and whose it is
  headrace cache lookup "Once upon a time"            where a prompt's blocks are; as text of /v1/completions
  headrace cache lookup --chat "Hello" --salt team-a  as the first message of a chat, under a cache salt
  headrace cache pin --request system.json --ttl 1h   keep a prompt; the file is the body of a request
  headrace cache unpin --all
  headrace cache warm prompts.jsonl                   compute prompts before anybody asks for them
  headrace cache clear --tier host --tenant 3f9a0c21b7de
  headrace cache watch                                stats that refresh, with rates
  headrace cache watch --events --redis redis://10.0.0.9:6379    what nodes tell the index, as they do

The cluster is named by its router's control URL: --cluster, by default http://127.0.0.1:8001. `headrace up` prints it; where
that port is taken it has another, unless it is told one: headrace up --set router.control_port=8002
HEADRACE_CLUSTER_KEY, if set, is shown to the router, and tells nodes from strangers in the index. HEADRACE_CACHE_SALT stands in for --salt.
exit code: 0 every node has answered, 1 some have not, 2 the command line is at fault
"""

_PROMPT_EPILOG = """\
A prompt is PROMPT or --file (text), with --chat as a user's message; or --request, the JSON body that a client would send:
  {"messages": [{"role": "system", "content": "..."}, {"role": "user", "content": "..."}], "cache_salt": "..."}
"""

T = TypeVar("T", CacheStats, PromptsFound, CacheChanged)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "cache",
        help="what the caches of a running cluster hold",
        description="Look into the KV caches of a running cluster, and change what they keep.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(title="what to do", metavar="WHAT", required=True)
    stats = _add(what, "stats", "what every node keeps", run_stats)
    stats.add_argument("--by", choices=("node", "tenant"), default="node", help="default: node")
    lookup = _add(what, "lookup", "where the blocks of a prompt are", run_lookup, _PROMPT_EPILOG)
    _add_prompt(lookup)
    pin = _add(what, "pin", "keep a prompt's blocks where they are", run_pin, _PROMPT_EPILOG)
    _add_prompt(pin)
    pin.add_argument("--ttl", required=True, metavar="TIME", help="for how long: 90s, 30m, 1h, 7d")
    unpin = _add(what, "unpin", "let pinned blocks go again", run_unpin, _PROMPT_EPILOG)
    _add_prompt(unpin)
    unpin.add_argument("--all", action="store_true", help="every pin on every node")
    clear = _add(what, "clear", "forget blocks", run_clear)
    clear.add_argument("--tier", choices=get_args(StorageTier), help="of one tier; default: of all")
    clear.add_argument("--tenant", metavar="NAME", help="of one tenant, as `headrace cache stats --by tenant` names it")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    warm = _add(what, "warm", "compute prompts ahead of time", cache_warm.run, cache_warm.EPILOG)
    cache_warm.add_flags(warm)
    watch = _add(what, "watch", "stats that refresh", run_watch)
    cache_watch.add_flags(watch)


def _add(
    what: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    parser = what.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="JSON, for programs")
    if name != "warm":
        parser.add_argument(
            "--cluster", default=CLUSTER_URL, metavar="URL", help=f"a router's control URL; default: {CLUSTER_URL}"
        )
    return parser


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text itself")
    parser.add_argument("--file", type=Path, help="a file with the text")
    parser.add_argument("--request", type=Path, metavar="FILE", help="a file with the JSON body of a request")
    parser.add_argument("--chat", action="store_true", help="the text is a user's message, not a completion's prompt")
    parser.add_argument("--salt", metavar="TEXT", help="the cache_salt that the tenant's requests carry")


def run_stats(options: argparse.Namespace) -> int:
    stats = _ask(options, "stats", GetCacheStats(), CacheStats)
    table = cache_tables.by_tenant(stats) if options.by == "tenant" else cache_tables.by_node(stats)
    lines = cache_tables.request_lines(stats) + cache_tables.index_lines(stats)
    return _show(options, stats, stats.silent, lambda: cache_tables.show(table, *lines))


def run_lookup(options: argparse.Namespace) -> int:
    found = _ask(options, "lookup", FindPrompt(_needed_prompt(options)), PromptsFound)
    return _show(options, found, found.silent, lambda: cache_tables.show_found(found))


def run_pin(options: argparse.Namespace) -> int:
    ttl_s = parse_ttl(options.ttl)
    changed = _ask(options, "pin", PinPrompt(_needed_prompt(options), ttl_s), CacheChanged)
    return _show(options, changed, changed.silent, lambda: cache_tables.show_pinned(changed, options.ttl))


def run_unpin(options: argparse.Namespace) -> int:
    prompt = prompt_of(options)
    if (prompt is not None) == options.all:
        raise ConfigError("unpin: name a prompt, or say --all", param="--all")
    changed = _ask(options, "unpin", UnpinPrompt(prompt), CacheChanged)
    return _show(options, changed, changed.silent, lambda: cache_tables.show_changed(changed, "unpinned"))


def run_clear(options: argparse.Namespace) -> int:
    if options.tenant is not None and not _NAMED_TENANT.fullmatch(options.tenant):
        raise ConfigError(
            f"--tenant {options.tenant}: a tenant's name, as `headrace cache stats --by tenant` shows it, not its salt",
            param="--tenant",
        )
    if not options.yes and not _confirmed(options):
        return 1
    changed = _ask(options, "clear", ClearCache(options.tier, options.tenant), CacheChanged)
    return _show(options, changed, changed.silent, lambda: cache_tables.show_changed(changed, "cleared"))


def run_watch(options: argparse.Namespace) -> int:
    return cache_watch.run(options, lambda: _ask(options, "stats", GetCacheStats(), CacheStats))


def prompt_of(options: argparse.Namespace) -> PromptOf | None:
    """The prompt that the flags name, None if they name none. Raises ConfigError for several, or an unreadable one."""
    given = [one for one in (options.prompt, options.file, options.request) if one is not None]
    if len(given) > 1:
        raise ConfigError("name the prompt once: PROMPT, --file or --request", param="--file")
    if not given:
        return None
    salt = options.salt or os.environ.get("HEADRACE_CACHE_SALT") or None
    if options.request is not None:
        return _request(options.request, options.chat, salt)
    text = options.prompt if options.file is None else _read(options.file, "--file").decode(errors="replace")
    body: dict[str, object] = {"messages": [{"role": "user", "content": text}]} if options.chat else {"prompt": text}
    return _prompt("chat" if options.chat else "completions", body, salt)


def parse_ttl(text: str) -> float:
    """Seconds of "90s", "30m", "1h" or "7d". Raises ConfigError."""
    match = _TTL.fullmatch(text.strip().lower())
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if not 0 < seconds <= MAX_TTL_S:
        raise ConfigError(f"--ttl {text}: a time such as 90s, 30m, 1h or 7d, at most 30d", param="--ttl")
    return seconds


def _needed_prompt(options: argparse.Namespace) -> PromptOf:
    prompt = prompt_of(options)
    if prompt is None:
        raise ConfigError("name a prompt: PROMPT, --file or --request", param="PROMPT")
    return prompt


def _request(path: Path, chat: bool, salt: str | None) -> PromptOf:
    try:
        body = msgspec.json.decode(_read(path, "--request"), type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--request {path} is no JSON object: {error}", param="--request") from error
    if chat or ("messages" in body) == ("prompt" in body):
        raise ConfigError(
            f'--request {path}: either "messages" or "prompt", which says what it is (without --chat)',
            param="--request",
        )
    return _prompt("chat" if "messages" in body else "completions", body, salt)


def _prompt(endpoint: Endpoint, body: dict[str, object], salt: str | None) -> PromptOf:
    return PromptOf(endpoint, msgspec.json.encode(body if salt is None else body | {"cache_salt": salt}))


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror or error}", param=flag) from error


def _confirmed(options: argparse.Namespace) -> bool:
    tier = f"the {options.tier} tier" if options.tier else "every tier"
    whose = f" of tenant {options.tenant}" if options.tenant else ""
    if not sys.stdin.isatty():
        raise ConfigError(f"clear forgets {tier}{whose} on all nodes; say --yes if that is meant", param="--yes")
    return input(f"Forget {tier}{whose} on all nodes of {options.cluster}? [y/N] ").strip().lower() in ("y", "yes")


def _ask(options: argparse.Namespace, what: str, message: object, reply_type: type[T]) -> T:
    return asyncio.run(_call(options.cluster.rstrip("/"), what, message, reply_type))


async def _call(cluster_url: str, what: str, message: object, reply_type: type[T]) -> T:
    async with RpcClient(os.environ.get("HEADRACE_CLUSTER_KEY")) as client:
        try:
            return await client.call(f"{cluster_url}/internal/v1/cache/{what}", message, reply_type, TIMEOUT_S)
        except NodeLost as error:
            raise NodeLost(
                f"{error.message}. Is {cluster_url} the control URL of a router? --cluster names it; "
                "`headrace up` prints its own when it is up"
            ) from error
        except Unauthorized as error:
            raise Unauthorized(f"{cluster_url} wants the cluster's key: set HEADRACE_CLUSTER_KEY") from error


def _show(options: argparse.Namespace, reply: object, silent: tuple[NodeSilent, ...], show: Callable[[], None]) -> int:
    if options.json:
        print(msgspec.json.encode(reply).decode())
    else:
        show()
    for node in silent:
        print(f"headrace: {node.worker} did not answer: {node.error.message}", file=sys.stderr)
    return 1 if silent else 0
