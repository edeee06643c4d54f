"""Attempt: one try at running a sequence, on the one or two nodes of its route, under a request id of its own.

The prefill node is asked first; its ticket goes to the decode node at once, before any token is computed. From then on both
nodes' messages arrive in one mailbox, whichever comes first. An attempt ends in one of three ways: the sequence is finished;
it failed in a way that another attempt may mend (AttemptFailed, which names the node to stay away from); or it raises. In
every case but the first, both nodes are told to stop.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack
from dataclasses import dataclass

from protocol.errors import DeadlineExceeded, HeadraceError, NodeLost, TransferError
from protocol.ids import Incarnation, TraceId, new_request_id
from protocol.phases import PrefillPhases
from protocol.requests import DecodeRequest, PrefillRequest
from protocol.sampling import SamplingParams
from protocol.tokens import (
    PromptComputed,
    SampledToken,
    SequenceFailed,
    SequenceFinished,
    TokenChunk,
    TokenMessage,
)
from router.cluster import Cluster, Route
from router.ledger import Ledger
from router.merge import TokenMerge
from router.node_link import NodeLink
from runtime.clock import Deadline

LAST_WORD_S = 0.2
"""How long the end of a sequence waits for the prefill node's account of it, which travels by another way."""


class AttemptFailed(Exception):
    """Another attempt may succeed, without the node `avoid`. `refused`: it never began there."""

    def __init__(self, error: HeadraceError, avoid: Incarnation, refused: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.avoid = avoid
        self.refused = refused


@dataclass(frozen=True, slots=True)
class _CallFailed:
    """The node did not take the request, or we do not know whether it did (NodeLost)."""

    error: HeadraceError


@dataclass(slots=True)
class _Leg:
    """One node's part. `asked`: it may have begun; `reported`: it has said its last word, though a prefill node still
    holds the exported blocks then; `gone`: it holds nothing of this request any more."""

    link: NodeLink
    asked: bool = False
    reported: bool = False
    gone: bool = False


_Message = TokenMessage | NodeLost | DeadlineExceeded | _CallFailed


class Attempt:
    def __init__(
        self,
        cluster: Cluster,
        route: Route,
        *,
        trace_id: TraceId,
        prompt_token_ids: tuple[int, ...],
        emitted: list[int],
        sampling: SamplingParams,
        cache_salt: str | None,
        deadline: Deadline,
        ledger: Ledger,
    ) -> None:
        self._cluster = cluster
        self._route = route
        self._trace_id = trace_id
        self._prompt_token_ids = prompt_token_ids
        self._emitted_before = tuple(emitted)
        self._sampling = sampling
        self._cache_salt = cache_salt
        self._deadline = deadline
        self._ledger = ledger
        self._merge = TokenMerge(emitted)
        self._mailbox: asyncio.Queue[tuple[_Leg, _Message]] = asyncio.Queue()
        self._prefill = None if route.prefill is None else _Leg(route.prefill)
        self._decode = None if route.decode is None else _Leg(route.decode)
        self._closed = False
        self._prefilling = ExitStack()
        self._noted: set[Incarnation] = set()
        self.request_id = new_request_id()
        self.finished: SequenceFinished | None = None
        self.num_cached_tokens = 0

    async def run(self) -> AsyncGenerator[list[SampledToken]]:
        """New output tokens, until the sequence is finished. Raises AttemptFailed or a HeadraceError that no other
        attempt can mend. Close the iterator to stop early."""
        with ExitStack() as held:
            try:
                self._begin(held)
                while not self._has_all_tokens():
                    new = self._take(*await self._mailbox.get())
                    if new:
                        self._ledger.tokens_arrived()
                        yield new
                await self._hear_last_word()
            finally:
                self._take_account()
                self._close()

    # ---- sending

    def _begin(self, held: ExitStack) -> None:
        """Count the load first, then send."""
        in_flight = self._cluster.in_flight
        computes = self._route.computes.incarnation
        held.push(self._prefilling)
        uncached = self._route.num_tokens - self._route.cached_tokens
        self._prefilling.enter_context(in_flight.prefill(computes, uncached))
        for leg in self._legs():
            held.enter_context(in_flight.sequence(leg.link.incarnation))
            self._attach(leg)
        self._cluster.index.expect(computes, self._route.block_hashes)
        self._ledger.dispatched()
        too_late = DeadlineExceeded("the request took longer than this server allows")
        timer = asyncio.get_running_loop().call_later(
            self._deadline.remaining_s, self._mailbox.put_nowait, (self._legs()[0], too_late)
        )
        held.callback(timer.cancel)
        self._cluster.spawn(self._dispatch(), name=f"dispatch:{self.request_id}")

    def _attach(self, leg: _Leg) -> None:
        def deliver(message: TokenMessage | NodeLost) -> None:
            self._mailbox.put_nowait((leg, message))

        try:
            leg.link.attach(self.request_id, deliver)
        except NodeLost as error:
            raise AttemptFailed(error, leg.link.incarnation, refused=True) from error

    async def _dispatch(self) -> None:
        """Outlives the attempt if need be: a call that is under way is waited for, so that what it began is cancelled."""
        leg = self._prefill or self._decode
        assert leg is not None
        try:
            ticket = None
            if self._prefill is not None:
                self._prefill.asked = True
                ticket = await self._prefill.link.prefill(self._prefill_request())
            if self._decode is not None and not self._closed:
                leg = self._decode
                leg.asked = True
                await leg.link.decode(
                    DecodeRequest(
                        request_id=self.request_id,
                        trace_id=self._trace_id,
                        router_id=self._cluster.router_id,
                        prompt_token_ids=self._prompt_token_ids,
                        emitted_token_ids=self._emitted_before,
                        sampling=self._sampling,
                        deadline_s=self._seconds_left(),
                        cache_salt=self._cache_salt,
                        ticket=ticket,
                        sources=self._route.decode_sources,
                    )
                )
        except HeadraceError as error:
            self._mailbox.put_nowait((leg, _CallFailed(error)))

    def _prefill_request(self) -> PrefillRequest:
        return PrefillRequest(
            request_id=self.request_id,
            trace_id=self._trace_id,
            router_id=self._cluster.router_id,
            prompt_token_ids=self._prompt_token_ids,
            emitted_token_ids=self._emitted_before,
            sampling=self._sampling,
            deadline_s=self._seconds_left(),
            cache_salt=self._cache_salt,
            sources=self._route.prefill_sources,
        )

    def _seconds_left(self) -> float:
        return max(0.001, self._deadline.remaining_s)

    def _close(self) -> None:
        """Stop whatever may still run or hold blocks."""
        self._closed = True
        for leg in self._legs():
            leg.link.detach(self.request_id)
            if leg.asked and not self._holds_nothing(leg):
                leg.link.cancel(self.request_id)

    def _holds_nothing(self, leg: _Leg) -> bool:
        """A node that decoded to the end has let go of everything, of the prefill node's lease too. A prefill node whose
        blocks nobody came for holds them until it is told."""
        decoded = self.finished is not None and self._decode is not None and self._decode.reported
        return leg.gone or decoded

    def _legs(self) -> list[_Leg]:
        return [leg for leg in (self._prefill, self._decode) if leg is not None]

    # ---- receiving

    def _has_all_tokens(self) -> bool:
        return self.finished is not None and not self._merge.has_gap

    async def _hear_last_word(self) -> None:
        """The prefill node's account of the request may come later than the decode node's last token."""
        if self._prefill is None:
            return
        try:
            async with asyncio.timeout(LAST_WORD_S):
                while not self._prefill.reported:
                    leg, message = await self._mailbox.get()
                    if leg is self._prefill and not isinstance(message, TokenChunk):
                        self._take(leg, message)
        except (TimeoutError, AttemptFailed, HeadraceError):
            self._prefill.reported = True

    def _take_account(self) -> None:
        """The account of the prompt comes right after the first token, which may have been the last one wanted."""
        while not self._mailbox.empty():
            leg, message = self._mailbox.get_nowait()
            if isinstance(message, PromptComputed):
                self._take(leg, message)

    def _take(self, leg: _Leg, message: _Message) -> list[SampledToken]:
        match message:
            case TokenChunk():
                return self._take_tokens(leg, message)
            case PromptComputed(num_cached_tokens=cached, phases=phases):
                leg.reported = leg is self._prefill
                self._computed(cached, phases)
            case SequenceFinished():
                leg.reported = True
                self.finished = message
                self._ledger.decoded(message.decode)
            case SequenceFailed(error=info):
                leg.gone = True
                raise self._failure(leg, info.to_error(), refused=False)
            case _CallFailed(error=error):
                leg.gone = not isinstance(error, NodeLost)
                raise self._failure(leg, error, refused=leg.gone)
            case DeadlineExceeded():
                raise message
            case NodeLost():
                if leg is self._legs()[-1] or not leg.reported:
                    raise self._failure(leg, message, refused=False)
        return []

    def _take_tokens(self, leg: _Leg, chunk: TokenChunk) -> list[SampledToken]:
        self._prefilling.close()
        if leg is self._decode:
            self._note_cached(leg.link)
        try:
            return self._merge.push(chunk)
        except TransferError as error:
            raise self._failure(leg, error, refused=False) from error

    def _computed(self, num_cached_tokens: int, phases: PrefillPhases) -> None:
        self._prefilling.close()
        self.num_cached_tokens = num_cached_tokens
        self._ledger.prefilled(phases)
        self._note_cached(self._route.computes)

    def _note_cached(self, link: NodeLink) -> None:
        """It has the prompt's blocks now; its heartbeat will say so later."""
        if link.incarnation not in self._noted:
            self._noted.add(link.incarnation)
            self._cluster.index.expect(link.incarnation, self._route.block_hashes)

    def _failure(self, leg: _Leg, error: HeadraceError, *, refused: bool) -> HeadraceError | AttemptFailed:
        """What to raise. KV that did not arrive is held against the node that it was to come from."""
        if not error.retryable:
            return error
        if isinstance(error, TransferError) and self._prefill is not None:
            leg = self._prefill
        return AttemptFailed(error, leg.link.incarnation, refused=refused)
