"""Cluster: the nodes that this router talks to, as one: who they are, how to reach them, what they hold and do.

Used as `async with Cluster(...) as cluster:`; it owns the tasks of its links. A worker counts as registered once its token
stream is open, and as ready while it stays open and the worker admits requests.
"""

import asyncio
import logging
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from random import Random
from typing import Self

from protocol.block_hash import hash_blocks, root_hash
from protocol.errors import HeadraceError, NoWorker
from protocol.ids import BlockHash, Incarnation, RouterId, WorkerId
from protocol.transfer import KVSource
from protocol.workers import Heartbeat, HeartbeatReply, Leave, Registered, WorkerInfo
from router.config import RouterConfig
from router.in_flight import InFlight
from router.node_link import NodeLink
from router.policy import ClusterView, DecodeCandidate, PrefillCandidate, Prompt, RouteDecision, StoreCandidate, decide
from router.prefix_index import PrefixIndex
from router.prompts import Limits
from router.workers import Worker, WorkerRegistry
from runtime.clock import Clock
from runtime.rpc_client import RpcClient

OPEN_TIMEOUT_S = 2.0
DEFAULT_BLOCK_SIZE = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Route:
    """A decision, with the links to act on it and the addresses of the prompt's full blocks. The two nodes may borrow from
    the sources."""

    prefill: NodeLink | None
    decode: NodeLink | None
    block_hashes: tuple[BlockHash, ...]
    cached_tokens: int
    num_tokens: int
    prefill_sources: tuple[KVSource, ...] = ()
    decode_sources: tuple[KVSource, ...] = ()

    @property
    def computes(self) -> NodeLink:
        """Whoever computes the prompt."""
        link = self.prefill or self.decode
        assert link is not None, "a route has at least one node"
        return link


class Cluster:
    def __init__(
        self,
        config: RouterConfig,
        served_name: str,
        client: RpcClient,
        router_id: RouterId,
        clock: Clock,
        rng: Random | None = None,
    ) -> None:
        self._config = config
        self._client = client
        self._router_id = router_id
        self._rng = rng or Random()  # noqa: S311  # breaks ties, guards nothing
        self._registry = WorkerRegistry(served_name, config.worker_timeout_s, clock)
        self._links: dict[Incarnation, NodeLink] = {}
        self._link_tasks: dict[Incarnation, asyncio.Task[None]] = {}
        self._tasks = asyncio.TaskGroup()
        self._watch: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._had_decode = False
        self.router_id = router_id
        self.index = PrefixIndex(clock)
        self.in_flight = InFlight()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._watch = self._tasks.create_task(self._watch_silence(), name="worker-timeouts")
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in [self._watch, *self._link_tasks.values()]:
            if task is not None:
                task.cancel()
        await self._tasks.__aexit__(None, None, None)

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        """A task that may outlive its request, but not the cluster. Its failure is logged, and nobody else's."""
        self._tasks.create_task(_log_failure(work, name), name=name)

    # ---- membership

    async def register(self, info: WorkerInfo) -> Registered:
        """Meet the worker both ways: it found us, now open its token stream. Raises the typed refusal otherwise."""
        self._registry.check(info)
        incarnation = Incarnation(info.incarnation)
        link = self._links.get(incarnation) or self._start_link(info)
        try:
            await link.wait_open(OPEN_TIMEOUT_S)
            replaced = self._registry.register(info)
        except HeadraceError:
            if self._registry.get(incarnation) is None:
                self._drop_link(incarnation)
            raise
        if replaced is not None:
            log.info("%s has restarted", info.worker_id)
            self._forget(replaced.incarnation)
        self.index.add_worker(incarnation)
        self.in_flight.add_worker(incarnation)
        self._had_decode |= info.role == "decode"
        self._note_change()
        log.info("%s node %s registered from %s", info.role, info.worker_id, info.control_url)
        return Registered(self._config.heartbeat_interval_s)

    def heartbeat(self, message: Heartbeat) -> HeartbeatReply:
        worker = self._registry.heartbeat(message)
        if worker is None:
            return HeartbeatReply(known=False)
        self.in_flight.heard(worker.incarnation, message.load)
        complete = message.kv_events is None or self.index.apply(message.kv_events)
        return HeartbeatReply(known=True, resync=not complete or self.index.needs_snapshot(worker.incarnation))

    def leave(self, message: Leave) -> None:
        self._registry.leave(WorkerId(message.worker_id), Incarnation(message.incarnation))
        log.info("%s leaves", message.worker_id)

    async def _watch_silence(self) -> None:
        """A round that comes late was held up with the whole process, which has yet to read what it was sent meanwhile."""
        loop = asyncio.get_running_loop()
        interval_s = min(1.0, self._config.worker_timeout_s / 4)
        while True:
            began_at = loop.time()
            await asyncio.sleep(interval_s)
            if loop.time() - began_at > 2 * interval_s:
                continue
            for worker in self._registry.expire():
                log.warning("%s has not been heard of for %g s", worker.worker_id, self._config.worker_timeout_s)
                self._forget(worker.incarnation)

    def _forget(self, incarnation: Incarnation) -> None:
        self._drop_link(incarnation)
        self.index.remove_worker(incarnation)
        self.in_flight.remove_worker(incarnation)

    def _start_link(self, info: WorkerInfo) -> NodeLink:
        link = NodeLink(self._client, info, self._router_id, self._note_change)
        self._links[link.incarnation] = link
        self._link_tasks[link.incarnation] = self._tasks.create_task(link.run(), name=f"link:{info.worker_id}")
        return link

    def _drop_link(self, incarnation: Incarnation) -> None:
        self._links.pop(incarnation, None)
        task = self._link_tasks.pop(incarnation, None)
        if task is not None:
            task.cancel()

    def _note_change(self) -> None:
        """Wake whoever waits for a node: one may have become ready."""
        self._changed.set()
        self._changed = asyncio.Event()

    # ---- what it offers

    @property
    def workers(self) -> tuple[Worker, ...]:
        return self._registry.snapshot.workers

    def is_ready(self, worker: Worker) -> bool:
        return worker.admits and self.is_reachable(worker.incarnation)

    def is_reachable(self, incarnation: Incarnation) -> bool:
        """Its token stream is open, again perhaps."""
        link = self._links.get(incarnation)
        return link is not None and link.is_open

    async def changed(self) -> None:
        """Return when a node may have become ready since this was called."""
        await self._changed.wait()

    @property
    def worker_wait_s(self) -> float:
        """How long it is worth to wait for a node: not at all while there has never been one that decodes."""
        return self._config.worker_wait_s if self._had_decode else 0.0

    def num_ready(self, role: str) -> int:
        return sum(worker.role == role and self.is_ready(worker) for worker in self.workers)

    def missing(self) -> list[str]:
        """What keeps requests from being answered. Without a prefill node, decode nodes compute prompts themselves."""
        return [] if self.num_ready("decode") else ["decode node"]

    def limits(self, max_model_len: int, vocab_size: int) -> Limits:
        """What every registered worker that computes can take, at most what the model can."""
        for worker in self.workers:
            if worker.role == "store":
                continue
            info = worker.info
            max_model_len = min(max_model_len, info.max_model_len, info.num_blocks * info.layout.block_size)
            vocab_size = min(vocab_size, info.vocab_size)
        return Limits(max_model_len, vocab_size)

    # ---- routing

    def address(self, token_ids: Sequence[int], cache_salt: str | None) -> tuple[int, list[BlockHash]]:
        """The block size, and the addresses of the full blocks of this context. Raises NoWorker where no node is registered:
        addresses depend on the layout that the nodes share."""
        if self._registry.snapshot.layout is None:
            raise NoWorker("no node is registered with this router")
        return self._hash(token_ids, cache_salt)

    def route(
        self,
        token_ids: Sequence[int],
        cache_salt: str | None,
        *,
        tokens_left: int,
        avoid: Collection[Incarnation] = (),
    ) -> Route:
        """Decide where this context (prompt and what was emitted of the answer) goes next. Raises NoWorker."""
        block_size, hashes = self._hash(token_ids, cache_salt)
        num_tokens = len(token_ids)
        prompt = Prompt(num_tokens, -(-num_tokens // block_size), tokens_left)
        local = self._config.local_prefill_tokens
        matched = self.index.match(hashes)
        decision = decide(
            self._view(matched, block_size, num_tokens),
            prompt,
            local_prefill_tokens=block_size if local is None else local,
            rng=self._rng,
            avoid=avoid,
        )
        return self._to_route(decision, matched, tuple(hashes), num_tokens)

    def _hash(self, token_ids: Sequence[int], cache_salt: str | None) -> tuple[int, list[BlockHash]]:
        layout = self._registry.snapshot.layout
        if layout is None:
            return DEFAULT_BLOCK_SIZE, []
        return layout.block_size, hash_blocks(token_ids, layout.block_size, root_hash(layout.identity, cache_salt))

    def _view(self, matched: dict[Incarnation, int], block_size: int, num_tokens: int) -> ClusterView:
        """`matched`: leading blocks of the prompt that each node holds."""
        prefill: list[PrefillCandidate] = []
        decode: list[DecodeCandidate] = []
        stores: list[StoreCandidate] = []
        for worker in self.workers:
            if not self.is_ready(worker):
                continue
            node = worker.incarnation
            cached_tokens = min(matched.get(node, 0) * block_size, num_tokens - 1)
            if worker.role == "prefill":
                prefill.append(PrefillCandidate(node, self.in_flight.prefill_tokens(node), cached_tokens))
            elif worker.role == "store":
                stores.append(StoreCandidate(node, cached_tokens))
            else:
                sequences = self.in_flight.sequences(node)
                decode.append(DecodeCandidate(node, sequences, worker.load.free_blocks, cached_tokens))
        return ClusterView(tuple(prefill), tuple(decode), tuple(stores))

    def _to_route(
        self,
        decision: RouteDecision,
        matched: dict[Incarnation, int],
        hashes: tuple[BlockHash, ...],
        num_tokens: int,
    ) -> Route:
        def sources(nodes: tuple[Incarnation, ...]) -> tuple[KVSource, ...]:
            return tuple(self._links[node].as_source(matched[node]) for node in nodes)

        return Route(
            prefill=None if decision.prefill is None else self._links[decision.prefill],
            decode=None if decision.decode is None else self._links[decision.decode],
            block_hashes=hashes,
            cached_tokens=decision.cached_tokens,
            num_tokens=num_tokens,
            prefill_sources=sources(decision.prefill_sources),
            decode_sources=sources(decision.decode_sources),
        )


async def _log_failure(work: Coroutine[object, object, None], name: str) -> None:
    try:
        await work
    except Exception:
        log.exception("%s failed", name)
