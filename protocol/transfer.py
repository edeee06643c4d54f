"""Node <-> node: how KV blocks change hands. The reader wants them, the owner has them.

    reader                                    owner
      | GET  hello                               |   phase one: wire version, incarnation, layout fingerprint
      | POST connect (Introduction)              |   phase two, both ways: layout in full, how each transport is reached
      | POST probe   (ProbePush)                 |   how fast the owner can push; a reader that pulls measures by itself
      | POST handoff (OpenHandoff) ------------> |   answered by a stream of frames, in this order:
      | <---------------- BlocksReady*           |     blocks of a finished chunk, while the next one computes
      | <---------------- PrefillDone            |     last block announced, first token; or HandoffFailed
      | reads the blocks over the transport      |   unless it asked for a push: then "ready" means "has landed"
      | POST landed  (BlocksLanded)* ----------> |   where their memory is scarce: there is room for more
      | POST release (ReleaseLease) -----------> |   blocks are the owner's again

A node lends what its prefix cache holds in the same way; the ticket then comes from

      | POST borrow  (BorrowPrefix)              |   answered by PrefixLent; the stream ends with PrefixDone

Block ids and checksums are not in the ticket because they do not exist when it is made: the hand-off starts before the
prompt has been scheduled. What the ticket proves is the right to hear them.

The stream is ordered and without gaps. If it ends without PrefillDone or HandoffFailed, the owner is gone (PeerLost).
"""

from typing import Annotated, Literal

import msgspec

from protocol.block_hash import HASH_BYTES
from protocol.errors import ErrorInfo
from protocol.ids import IdText
from protocol.kv_layout import KVLayout
from protocol.phases import PrefillPhases
from protocol.tokens import SampledToken

TransportKind = Literal["nixl", "ucx", "shm", "tcp", "inproc"]
Direction = Literal["pull", "push"]
"""Who moves the bytes: the reader, or the owner."""

_HOST = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*)"
Url = Annotated[str, msgspec.Meta(max_length=512, pattern=rf"^https?://{_HOST}(:[0-9]{{1,5}})?(/[A-Za-z0-9._~/-]*)?$")]
Fingerprint = Annotated[str, msgspec.Meta(min_length=32, max_length=32, pattern=r"^[0-9a-f]+$")]
BlockCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
BlockIds = Annotated[tuple[BlockCount, ...], msgspec.Meta(max_length=1 << 20)]
HashBytes = Annotated[bytes, msgspec.Meta(min_length=HASH_BYTES, max_length=HASH_BYTES)]
Checksum = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Checksums = Annotated[tuple[Checksum, ...], msgspec.Meta(max_length=1 << 20)]


class TransferTicket(msgspec.Struct, frozen=True, kw_only=True):
    """The right to one request's exported KV blocks. Made by the owner, void when the incarnation is.

    `num_tokens` is the length of the exported context and `context_hash` its block_hash.context_hash: whoever was given
    a ticket by mistake finds out before a block moves. The export expires `ttl_s` after the prefill finished, or
    after the reader's last renewal, whichever is later.
    """

    ticket_id: IdText
    request_id: IdText
    owner: IdText
    incarnation: IdText
    layout_fingerprint: Fingerprint
    control_url: Url
    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    context_hash: HashBytes
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=3600)]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """How one transport of a process is reached. `checksum` is xxh3-64 of payload, checked before any use: damaged NIXL
    metadata poisons the agent's name for the life of the process."""

    transport: TransportKind
    payload: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    checksum: Annotated[int, msgspec.Meta(ge=0)]


MAX_REASON_CHARS = 1000


class MissingTransport(msgspec.Struct, frozen=True):
    """A transport that a process was told to run and cannot. `reason` is for people, and says how to mend it."""

    transport: TransportKind
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON_CHARS)]


class Introduction(msgspec.Struct, frozen=True, kw_only=True):
    """Phase two of a meeting, from either side: who it is, what its blocks are, and how its arena is reached.

    Blocks `num_blocks`, ..., `num_blocks + num_scratch_blocks - 1` of the arena hold nothing: probes move those. The first
    half of them are samples, which probes copy; the others are where probes land. `scratch_seed` tells what the samples
    hold (kv_transfer.meeting.scratch says how); it is empty where nobody could write into them.
    """

    worker: IdText
    incarnation: IdText
    layout: KVLayout
    num_blocks: BlockCount
    num_scratch_blocks: BlockCount
    endpoints: Annotated[tuple[Endpoint, ...], msgspec.Meta(max_length=8)]
    missing: Annotated[tuple[MissingTransport, ...], msgspec.Meta(max_length=8)] = ()
    scratch_seed: Annotated[bytes, msgspec.Meta(max_length=32)] = b""

    @property
    def num_wire_blocks(self) -> int:
        """Blocks of its arena that a transport may name."""
        return self.num_blocks + self.num_scratch_blocks


class ProbePush(msgspec.Struct, frozen=True, kw_only=True):
    """Write samples into these scratch blocks of the reader, which has introduced itself, and say how long that took.
    Whatever the answer is, once it is there no more bytes move."""

    reader: IdText
    incarnation: IdText
    transport: TransportKind
    block_ids: Annotated[tuple[BlockCount, ...], msgspec.Meta(min_length=1, max_length=1024)]


class ProbeResult(msgspec.Struct, frozen=True):
    """What a transfer costs: so much for itself, and so much for its bytes. Measured by whoever moved them."""

    latency_s: Annotated[float, msgspec.Meta(ge=0)]
    bytes_per_s: Annotated[float, msgspec.Meta(gt=0)]

    def seconds(self, num_bytes: int) -> float:
        """How long a transfer of this size takes."""
        return self.latency_s + num_bytes / self.bytes_per_s


class PushTarget(msgspec.Struct, frozen=True):
    """Where a push is to land: the reader's blocks for the context from `OpenHandoff.skip_blocks` on, in order."""

    transport: TransportKind
    block_ids: BlockIds


class OpenHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """The reader's claim on a ticket. `skip_blocks` leading blocks it already holds are not announced. With `push` the
    owner moves the blocks, to a reader that has introduced itself as `reader_incarnation`."""

    ticket_id: IdText
    incarnation: IdText
    reader: IdText
    reader_incarnation: IdText
    skip_blocks: BlockCount
    push: PushTarget | None = None


class BlocksReady(msgspec.Struct, frozen=True, tag="ready"):
    """Blocks `first_block`, `first_block + 1`, ... of the request are final: their ids in the owner's arena, and the
    low 63 bits of xxh3-64 over each block's bytes. `scarce`: they lie in memory that the owner needs for what comes next,
    and it waits to be told that they have landed (BlocksLanded)."""

    first_block: BlockCount
    block_ids: BlockIds
    checksums: Checksums
    scarce: bool = False


class PrefillDone(msgspec.Struct, frozen=True, tag="done"):
    """Every block has been announced; the first token is sampled. `since_computed_s` is how long ago the owner's last
    chunk ended when this was written, `wire_s` how much of that its push moved bytes. If `finished` the first token was
    also the last and nothing is left to do."""

    first_token: SampledToken
    finished: bool
    since_computed_s: float
    phases: PrefillPhases
    wire_s: float = 0.0


class PrefixDone(msgspec.Struct, frozen=True, tag="lent"):
    """Every block of a lent prefix has been announced."""


class HandoffFailed(msgspec.Struct, frozen=True, tag="failed", omit_defaults=True):
    """`writing`: a push of the owner may not have ended; its bytes may still land in the reader's blocks."""

    error: ErrorInfo
    writing: bool = False


HandoffMessage = BlocksReady | PrefillDone | PrefixDone | HandoffFailed


TicketIds = Annotated[tuple[IdText, ...], msgspec.Meta(min_length=1, max_length=4096)]


class RenewLease(msgspec.Struct, frozen=True):
    """The reader still wants what these tickets cover. Answered by LeasesHeld."""

    ticket_ids: TicketIds
    incarnation: IdText


class LeasesHeld(msgspec.Struct, frozen=True):
    """In the order of the tickets that were asked for."""

    held: tuple[bool, ...]


class ReleaseLease(msgspec.Struct, frozen=True, omit_defaults=True):
    """The reader has what it wants, or gave up. Idempotent. Answered by LeaseState, which says whether the lease still
    held at this moment: the confirmation that what was read was not reused memory.

    `damaged`: the block of the ticket's context that did not come as it was announced, the first that the reader found. A
    reason for the owner to look, and no more: it may have been damaged on the way, or the reader may lie."""

    ticket_id: IdText
    incarnation: IdText
    damaged: BlockCount | None = None


class BlocksLanded(msgspec.Struct, frozen=True):
    """The first `num_blocks` blocks of the context are with the reader, who reads no longer what it was told of them. Of
    scarce blocks; answered by LeaseState. One that is lost is made good by the next."""

    ticket_id: IdText
    incarnation: IdText
    num_blocks: BlockCount


class LeaseState(msgspec.Struct, frozen=True):
    """`writing`: a push of the owner has not ended; its bytes may still land in the reader's blocks. `known`: this is the
    incarnation that made the ticket; of what another did or does it can say nothing."""

    held: bool
    writing: bool = False
    known: bool = True


class BorrowPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """Lend the blocks of these addresses, which follow each other in a context: as many, from the first on, as the owner
    holds. What comes before them in the context the reader has."""

    request_id: IdText
    reader: IdText
    block_hashes: Annotated[tuple[HashBytes, ...], msgspec.Meta(min_length=1, max_length=1 << 17)]


class PrefixLent(msgspec.Struct, frozen=True):
    """The ticket to the first blocks that were asked for: as many as hold its `num_tokens`, all of them full. Its
    `context_hash` is the address of the last one. None: the owner holds not even the first, or lends no more now."""

    ticket: TransferTicket | None


class KVSource(msgspec.Struct, frozen=True, kw_only=True):
    """A node that was seen to hold the first `num_blocks` blocks of a context. A hint: it confirms when asked."""

    worker: IdText
    incarnation: IdText
    control_url: Url
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
