"""CacheAdmin: what an operator asks all nodes' caches at once, or tells them. Behind the control port, never the public one.

A prompt is rendered, tokenized and hashed by the code that requests go through, so that the answer is about the very blocks
that a request would use. Every node is asked at the same time, with a deadline of its own; one that fails is named in the reply.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from starlette.routing import Route

from protocol.cache_admin import (
    CacheChanged,
    CacheStats,
    ClearCache,
    FindPrompt,
    GetCacheStats,
    NodeChanged,
    NodeHolds,
    NodeSilent,
    PinPrompt,
    PromptFound,
    PromptOf,
    PromptsFound,
    UnpinPrompt,
)
from protocol.errors import HeadraceError
from protocol.ids import BlockHash
from protocol.kv_blocks import Tenant, tenant_of
from protocol.store_admin import (
    PINNED_BIT,
    TIER_BITS,
    BlocksChanged,
    BlocksLocated,
    ClearStore,
    LocateBlocks,
    PinBlocks,
    StoreReport,
    TierReport,
    UnpinBlocks,
)
from router.api_types import ChatRequest, CompletionRequest, decode_request
from router.cluster import Cluster
from router.cluster import Route as NodeRoute
from router.prompts import Limits, PromptText, TextModel, chat_prompt, check_model, completion_prompts
from router.workers import Worker
from runtime.rpc_client import RpcClient
from runtime.rpc_server import message_route

NODE_TIMEOUT_S = 5.0
PATH = "/internal/v1/cache"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Addressed:
    """A prompt, and the addresses of its full blocks."""

    token_ids: tuple[int, ...]
    cache_salt: str | None
    block_size: int
    block_hashes: tuple[BlockHash, ...]

    @property
    def tenant(self) -> Tenant:
        return tenant_of(self.cache_salt)


class CacheAdmin:
    def __init__(self, cluster: Cluster, model: TextModel, limits: Callable[[], Limits], client: RpcClient) -> None:
        self._cluster = cluster
        self._model = model
        self._limits = limits
        self._client = client

    def routes(self, cluster_key: str | None) -> list[Route]:
        return [
            message_route(f"{PATH}/stats", GetCacheStats, self.stats, cluster_key),
            message_route(f"{PATH}/lookup", FindPrompt, self.find, cluster_key),
            message_route(f"{PATH}/pin", PinPrompt, self.pin, cluster_key),
            message_route(f"{PATH}/unpin", UnpinPrompt, self.unpin, cluster_key),
            message_route(f"{PATH}/clear", ClearCache, self.clear, cluster_key),
        ]

    async def stats(self, _: GetCacheStats) -> CacheStats:
        async def ask(worker: Worker) -> StoreReport:
            report = await self._client.get(_url(worker, "stats"), StoreReport, NODE_TIMEOUT_S)
            return msgspec.structs.replace(report, tiers=(*self._device(worker), *report.tiers))

        reports, silent = await self._ask_all(ask)
        return CacheStats(tuple(report for _, report in reports), silent)

    async def find(self, message: FindPrompt) -> PromptsFound:
        found: list[PromptFound] = []
        silent: dict[str, NodeSilent] = {}
        for prompt in await self._address(message.prompt):
            one, unheard = await self._find(prompt)
            found.append(one)
            silent |= {node.worker: node for node in unheard}
        return PromptsFound(tuple(found), tuple(silent.values()))

    async def pin(self, message: PinPrompt) -> CacheChanged:
        return await self._change_all(
            "pin",
            [PinBlocks(prompt.block_hashes, message.ttl_s) for prompt in await self._address(message.prompt)],
        )

    async def unpin(self, message: UnpinPrompt) -> CacheChanged:
        if message.prompt is None:
            return await self._change_all("unpin", [UnpinBlocks(None)])
        prompts = await self._address(message.prompt)
        return await self._change_all("unpin", [UnpinBlocks(prompt.block_hashes) for prompt in prompts])

    async def clear(self, message: ClearCache) -> CacheChanged:
        return await self._change_all("clear", [ClearStore(message.tier, message.tenant)])

    # ---- one prompt

    async def _address(self, prompt: PromptOf) -> list[_Addressed]:
        """Raises what a client would get for this request, and NoWorker without nodes."""
        request: ChatRequest | CompletionRequest
        prompts: Sequence[PromptText]
        limits = self._limits()
        if prompt.endpoint == "chat":
            request = decode_request(prompt.body, ChatRequest)
            check_model(self._model, request.model)
            prompts = [await chat_prompt(self._model, request, limits)]
        else:
            request = decode_request(prompt.body, CompletionRequest)
            check_model(self._model, request.model)
            prompts = await completion_prompts(self._model, request, limits)
        addressed = []
        for one in prompts:
            block_size, hashes = self._cluster.address(one.token_ids, request.cache_salt)
            addressed.append(_Addressed(one.token_ids, request.cache_salt, block_size, tuple(hashes)))
        return addressed

    async def _find(self, prompt: _Addressed) -> tuple[PromptFound, tuple[NodeSilent, ...]]:
        question = LocateBlocks(prompt.block_hashes)

        async def ask(worker: Worker) -> BlocksLocated:
            return await self._client.call(_url(worker, "locate"), question, BlocksLocated, NODE_TIMEOUT_S)

        answers, silent = await self._ask_all(ask)
        told = {worker.incarnation: answer.tiers for worker, answer in answers}
        nodes = [
            self._holds(worker, prompt.block_hashes, told.get(worker.incarnation)) for worker in self._cluster.workers
        ]
        found = PromptFound(
            num_tokens=len(prompt.token_ids),
            block_size=prompt.block_size,
            num_blocks=len(prompt.block_hashes),
            tenant=prompt.tenant,
            expected_tokens=self._expected(prompt),
            nodes=tuple(nodes),
        )
        return found, silent

    def _holds(self, worker: Worker, block_hashes: Sequence[BlockHash], told: bytes | None) -> NodeHolds:
        """The device's blocks as the node's events told, its store's as it has just said itself."""
        heard = self._cluster.index.locate(worker.incarnation, block_hashes)
        if told is not None:
            stored = told.ljust(len(heard), b"\x00")
            heard = bytes(bits & TIER_BITS["device"] | more for bits, more in zip(heard, stored, strict=False))
        leading = next((i for i, bits in enumerate(heard) if not bits & ~PINNED_BIT), len(heard))
        counts = {name: sum(bits & bit != 0 for bits in heard[:leading]) for name, bit in TIER_BITS.items()}
        return NodeHolds(
            worker=worker.worker_id,
            role=worker.role,
            leading=leading,
            **counts,
            pinned=sum(bits & PINNED_BIT != 0 for bits in heard[:leading]),
            known=told is not None,
        )

    def _expected(self, prompt: _Addressed) -> int:
        """Whole blocks that the node it would go to has, or could borrow; at least one token is always computed. 0 while no
        node could take it."""
        try:
            route = self._cluster.route(prompt.token_ids, prompt.cache_salt, tokens_left=1)
        except HeadraceError:
            return 0
        best = max([route.cached_tokens, *(blocks * prompt.block_size for blocks in _lendable(route))])
        return min(best, len(prompt.token_ids) - 1) // prompt.block_size * prompt.block_size

    # ---- all nodes

    def _device(self, worker: Worker) -> list[TierReport]:
        """A node's device cache, of which its events tell. A store has none."""
        if worker.role not in ("prefill", "decode"):
            return []
        used = self._cluster.index.num_blocks(worker.incarnation, "device")
        return [TierReport(tier="device", capacity=worker.info.num_blocks, used=used)]

    async def _change_all(self, what: str, messages: Sequence[PinBlocks | UnpinBlocks | ClearStore]) -> CacheChanged:
        """Every node is told all of these, one after the other."""

        async def tell(worker: Worker) -> int:
            num_blocks = 0
            for message in messages:
                answer = await self._client.call(_url(worker, what), message, BlocksChanged, NODE_TIMEOUT_S)
                num_blocks += answer.num_blocks
            return num_blocks

        answers, silent = await self._ask_all(tell)
        named = sum(len(one.block_hashes or ()) for one in messages if not isinstance(one, ClearStore))
        return CacheChanged(tuple(NodeChanged(worker.worker_id, count) for worker, count in answers), silent, named)

    async def _ask_all(
        self, ask: Callable[[Worker], Awaitable[T]]
    ) -> tuple[list[tuple[Worker, T]], tuple[NodeSilent, ...]]:
        workers = self._cluster.workers
        answers = await asyncio.gather(*(_or_error(ask(worker)) for worker in workers))
        told: list[tuple[Worker, T]] = []
        silent: list[NodeSilent] = []
        for worker, answer in zip(workers, answers, strict=True):
            if isinstance(answer, HeadraceError):
                silent.append(NodeSilent(worker.worker_id, answer.to_info()))
            else:
                told.append((worker, answer))
        return told, tuple(silent)


async def _or_error(answer: Awaitable[T]) -> T | HeadraceError:
    try:
        return await answer
    except HeadraceError as error:
        return error


def _url(worker: Worker, what: str) -> str:
    return f"{worker.info.control_url}/store/v1/{what}"


def _lendable(route: NodeRoute) -> list[int]:
    sources = route.prefill_sources if route.prefill is not None else route.decode_sources
    return [source.num_blocks for source in sources]
