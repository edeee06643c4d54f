"""What the engine reports. Events of one step arrive together, in order, on the engine's own thread.

Every submitted request ends in exactly one of PrefillFinished, Finished or Failed. For an IMPORT request, Reserved comes
first and obliges the receiver to answer with exactly one `Engine.activate` or `Engine.abandon_import`, even after a
cancel: until then its blocks belong to the transfer. So it is with a request whose first tokens may come from elsewhere, from
other nodes or from the store, if Reserved says so; the answer is then `Engine.resume` or `Engine.abandon_import`. That may
happen again, to any request that decodes here, when it was preempted and the store has its blocks.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.errors import HeadraceError
from protocol.ids import BlockHash, PinId, RequestId
from protocol.kv_blocks import CachedBlock
from protocol.phases import DecodePhases, PrefillPhases
from protocol.tokens import FinishReason, SampledToken


@dataclass(frozen=True, slots=True)
class BlocksComputed:
    """Of a PREFILL_ONLY request: blocks `first_block`, ... of the context are final. Full ones as they fill (those from
    the prefix cache first), the last, possibly partial one before PrefillFinished. From the first on, all its blocks stay
    until `Engine.release`, also if it fails: a reader may be at them."""

    request_id: RequestId
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """Of a PREFILL_ONLY request: the context is computed and the first token sampled. `computed_at` is the engine clock at
    the end of the last chunk. `finish_reason` is set if the first token was also the last."""

    request_id: RequestId
    first_token: SampledToken
    num_cached_tokens: int
    phases: PrefillPhases
    computed_at: float
    finish_reason: FinishReason | None
    stop_token_id: int | None


@dataclass(frozen=True, slots=True)
class Reserved:
    """`block_ids` are to hold the context of an IMPORT request, or the first tokens of another: those that it was submitted
    with as `import_tokens`, or that the backing store can load. The first `num_cached_blocks` are already valid. `prefix`:
    the rest is computed here, and `Engine.resume` is the answer. `block_hashes`: addresses of the full blocks among them;
    empty without a prefix cache."""

    request_id: RequestId
    block_ids: tuple[int, ...]
    num_cached_blocks: int
    prefix: bool = False
    block_hashes: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True)
class TokensSampled:
    """Output tokens `index`, `index + 1`, ..."""

    request_id: RequestId
    index: int
    tokens: tuple[SampledToken, ...]


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """Of a GENERATE request: how its prompt was computed. Once, right after its first TokensSampled. Cached tokens are those
    that were not computed here, from the prefix cache or imported."""

    request_id: RequestId
    num_cached_tokens: int
    phases: PrefillPhases


@dataclass(frozen=True, slots=True)
class Finished:
    """`imported`: of an IMPORT request. `stop_token_id` as in protocol.tokens.SequenceFinished."""

    request_id: RequestId
    reason: FinishReason
    stop_token_id: int | None
    imported: bool
    decode: DecodePhases


@dataclass(frozen=True, slots=True)
class Failed:
    request_id: RequestId
    error: HeadraceError


@dataclass(frozen=True, slots=True)
class Pinned:
    """The answer to `Engine.pin`: blocks of the longest cached prefix, maybe none, held until `Engine.unpin`."""

    pin_id: PinId
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksOffered:
    """The device is about to forget these blocks, or has just computed them; the backing store wants them. They stay as they
    are until `Engine.saved(pin_id)`, which is to follow, whatever comes of it."""

    pin_id: PinId
    blocks: tuple[CachedBlock, ...]
    block_ids: tuple[int, ...]


EngineEvent = (
    BlocksComputed
    | PrefillFinished
    | Reserved
    | TokensSampled
    | PromptComputed
    | Finished
    | Failed
    | Pinned
    | BlocksOffered
)


def on_loop(
    loop: asyncio.AbstractEventLoop, receive: Callable[[Sequence[EngineEvent]], None]
) -> Callable[[list[EngineEvent]], None]:
    """A receiver for `Engine.start` that hands events on to `receive`, on the event loop and in order. Those of an engine
    that outlives the loop are dropped."""

    def hand_on(events: list[EngineEvent]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(receive, events)

    return hand_on
