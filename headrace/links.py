"""How KV moves in a running cluster, for `headrace doctor --cluster`: asks the router who there is, and each node."""

import asyncio
from collections.abc import Mapping
from typing import TypeVar

import aiohttp
import msgspec

from headrace.finding import Finding
from protocol.errors import NodeLost
from protocol.links import LinkReport, LinksReport
from protocol.transfer import Url
from runtime.auth import authorization_header

TIMEOUT_S = 5.0
_MEGABYTE = 1e6

T = TypeVar("T")


class _Worker(msgspec.Struct, frozen=True):
    """What is used here of the router's list."""

    worker_id: str
    control_url: Url


class _Workers(msgspec.Struct, frozen=True):
    workers: tuple[_Worker, ...]


def cluster_findings(router_url: str, cluster_key: str | None) -> list[Finding]:
    """One for each node and each of its links. Raises HeadraceError where the router does not answer."""
    return asyncio.run(_ask(router_url.rstrip("/"), authorization_header(cluster_key)))


async def _ask(router_url: str, headers: Mapping[str, str]) -> list[Finding]:
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        found = await _get(session, f"{router_url}/internal/v1/workers", _Workers)
        findings = []
        for worker in found.workers:
            try:
                report = await _get(session, f"{worker.control_url}/kv/links", LinksReport)
            except NodeLost as error:
                findings.append(Finding(worker.worker_id, "fail", error.message, "is the node up?"))
            else:
                findings += _of_node(report)
    return findings or [
        Finding("cluster", "warn", "no node is registered", "headrace serve prefill, headrace serve decode")
    ]


async def _get(session: aiohttp.ClientSession, url: str, reply_type: type[T]) -> T:
    try:
        async with session.get(url, allow_redirects=False) as response:
            body = await response.read()
            if not response.ok:
                raise NodeLost(f"{url} answers HTTP {response.status}: {body[:200].decode(errors='replace')}")
        return msgspec.json.decode(body, type=reply_type)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise NodeLost(f"no answer from {url}: {error or type(error).__name__}") from error


def _of_node(report: LinksReport) -> list[Finding]:
    missing = "".join(f"; not {each.transport}: {each.reason}" for each in report.missing)
    node = Finding(report.worker, "ok", f"runs {', '.join(each.transport for each in report.transports)}{missing}")
    return [node, *(_of_link(report.worker, link) for link in report.links)]


def _of_link(worker: str, link: LinkReport) -> Finding:
    return Finding(
        check=f"{link.peer} -> {worker}",
        verdict="ok" if link.warning is None else "warn",
        detail=f"{link.why}; {link.bytes_moved / _MEGABYTE:.1f} MB read in {link.age_s:.0f} s",
        cure=link.warning or "",
    )
