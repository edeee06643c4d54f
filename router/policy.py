"""Where a prompt goes: a pure function of what is known about the nodes.

    prefill node   argmin( tokens in flight there + 2 * tokens of this prompt that nobody has + tokens it can borrow / 2 )
    decode node    least sequences, among those whose free blocks hold the prompt
    local          the decode node computes the prompt itself: where it lacks only few tokens, or no prefill node is ready
    sources        who holds more of the prompt than the node that needs it, stores among them: such blocks are borrowed,
                   not computed

The weight of 2 on tokens to compute is from replaying public traces against simulated nodes: within 4 % of an oracle that
knows every node's backlog; the highest hit rate is not the lowest time to first token. Ties are broken at random,
so that several routers do not pick the same node. A borrowed token is taken to cost a quarter of a computed one: an 8B model
makes 3.3 GB of KV a second, and a link of 100 Gbit/s moves 12.5 GB. The node itself goes by what it has measured.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from protocol.errors import NoWorker
from protocol.ids import Incarnation

COMPUTED_WEIGHT = 2.0
BORROWED_WEIGHT = COMPUTED_WEIGHT / 4
MAX_SOURCES = 3
LOCAL_SLACK = 4
"""A decode node that holds a prompt's prefix may run so many sequences more than the least loaded one and still get it."""


@dataclass(frozen=True, slots=True)
class PrefillCandidate:
    """`cached_tokens` of this prompt are in its cache."""

    node: Incarnation
    tokens_in_flight: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeCandidate:
    node: Incarnation
    sequences: int
    free_blocks: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class StoreCandidate:
    """Never computes anything; whoever does may borrow from it."""

    node: Incarnation
    cached_tokens: int


Holder = PrefillCandidate | DecodeCandidate | StoreCandidate


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The nodes that admit requests and can be reached now."""

    prefill: tuple[PrefillCandidate, ...]
    decode: tuple[DecodeCandidate, ...]
    stores: tuple[StoreCandidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """`num_tokens` to compute or find; `num_blocks` that hold them; `tokens_left` may be sampled."""

    num_tokens: int
    num_blocks: int
    tokens_left: int


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """`prefill` None: the decode node computes the prompt itself. `decode` None: the first token is the last, and the
    prefill node samples it. `cached_tokens`: that whoever computes the prompt is expected to find in its cache, or to
    borrow. `prefill_sources`, `decode_sources`: whom they may borrow from, the best first."""

    prefill: Incarnation | None
    decode: Incarnation | None
    cached_tokens: int
    prefill_sources: tuple[Incarnation, ...] = ()
    decode_sources: tuple[Incarnation, ...] = ()


Candidate = TypeVar("Candidate", PrefillCandidate, DecodeCandidate)


def decide(
    view: ClusterView,
    prompt: Prompt,
    *,
    local_prefill_tokens: int,
    rng: Random,
    avoid: Collection[Incarnation] = (),
) -> RouteDecision:
    """Raises NoWorker, saying of which kind, if nobody is left who could do it. Nodes in `avoid` are out of the question.
    After a failure nothing is borrowed: the next attempt is to depend on as few nodes as it can."""
    prefill = [one for one in view.prefill if one.node not in avoid]
    decode = [one for one in view.decode if one.node not in avoid]
    holders = [] if avoid else _holders(view)
    most_held = holders[0].cached_tokens if holders else 0
    if prompt.tokens_left == 1 and prefill:
        chosen = _best_prefill(prefill, prompt, most_held, rng)
        return _computing_at(chosen, None, holders)
    if not decode:
        raise NoWorker(_what_is_missing(view))
    near = _local_choice(decode, prompt, local_prefill_tokens, rng)
    if near is not None:
        return _computing_at(None, near, holders)
    target = _best_decode(decode, prompt, rng)
    source = _best_prefill(prefill, prompt, most_held, rng) if prefill else None
    return _computing_at(source, target, holders)


def _holders(view: ClusterView) -> list[Holder]:
    """Of any of the prompt, those of the most first."""
    everybody: list[Holder] = [*view.prefill, *view.decode, *view.stores]
    return sorted((one for one in everybody if one.cached_tokens), key=lambda one: -one.cached_tokens)


def _computing_at(
    prefill: PrefillCandidate | None,
    decode: DecodeCandidate | None,
    holders: Sequence[Holder],
) -> RouteDecision:
    """Whoever computes borrows from those that hold more than it. A decode node that imports borrows from them as well, if
    it lacks it too: what the prefill node has from the start, it provides itself."""
    computes = prefill or decode
    assert computes is not None, "somebody computes the prompt"
    sources = _holding_more(holders, computes.cached_tokens)
    most_held = holders[0].cached_tokens if sources else computes.cached_tokens
    decode_sources: tuple[Incarnation, ...] = ()
    if decode is not None:
        decode_sources = _holding_more(holders, max(computes.cached_tokens, decode.cached_tokens))
    return RouteDecision(
        prefill=None if prefill is None else prefill.node,
        decode=None if decode is None else decode.node,
        cached_tokens=most_held,
        prefill_sources=() if prefill is None else sources,
        decode_sources=decode_sources,
    )


def _holding_more(holders: Sequence[Holder], num_tokens: int) -> tuple[Incarnation, ...]:
    return tuple(one.node for one in holders if one.cached_tokens > num_tokens)[:MAX_SOURCES]


def _best_prefill(
    candidates: Sequence[PrefillCandidate], prompt: Prompt, most_held: int, rng: Random
) -> PrefillCandidate:
    """`most_held`: of the prompt's tokens, by any one node."""

    def cost(one: PrefillCandidate) -> tuple[float, float]:
        borrowed = max(0, most_held - one.cached_tokens)
        computed = prompt.num_tokens - one.cached_tokens - borrowed
        return one.tokens_in_flight + COMPUTED_WEIGHT * computed + BORROWED_WEIGHT * borrowed, 0

    return _least(candidates, cost, rng)


def _best_decode(candidates: Sequence[DecodeCandidate], prompt: Prompt, rng: Random) -> DecodeCandidate:
    """Blocks that a decode node already holds need not move, so they break ties before chance does."""
    roomy = [one for one in candidates if one.free_blocks >= prompt.num_blocks]
    return _least(roomy or candidates, lambda one: (one.sequences, -one.cached_tokens), rng)


def _local_choice(
    candidates: Sequence[DecodeCandidate], prompt: Prompt, local_prefill_tokens: int, rng: Random
) -> DecodeCandidate | None:
    """A decode node that lacks so little of the prompt that a hand-off is not worth it, and is not crowded for it."""
    crowded = min(one.sequences for one in candidates) + LOCAL_SLACK
    near = [
        one
        for one in candidates
        if prompt.num_tokens - one.cached_tokens <= local_prefill_tokens and one.sequences <= crowded
    ]
    return _best_decode(near, prompt, rng) if near else None


def _least(candidates: Sequence[Candidate], cost: Callable[[Candidate], tuple[float, float]], rng: Random) -> Candidate:
    costs = [cost(one) for one in candidates]
    least = min(costs)
    return rng.choice([one for one, own in zip(candidates, costs, strict=True) if own == least])


def _what_is_missing(view: ClusterView) -> str:
    if not view.decode:
        return "no decode node is ready"
    return "no other decode node is left to take this request"
