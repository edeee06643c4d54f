"""Decode node <-> prefill node: how KV blocks change hands.

    decode                                    prefill
      | GET  hello                               |   phase one: wire version, incarnation, layout fingerprint
      | POST connect (TransportConnect)          |   phase two: layout in full, transport metadata with its checksum
      | POST handoff (OpenHandoff) ------------> |   answered by a stream of frames, in this order:
      | <---------------- BlocksReady*           |     blocks of a finished chunk, while the next one computes
      | <---------------- PrefillDone            |     last block announced, first token; or HandoffFailed
      | reads the blocks over the transport      |
      | POST release (ReleaseLease) -----------> |   blocks are the owner's again

Block ids and checksums are not in the ticket because they do not exist when it is made: the hand-off starts before the
prompt has been scheduled. What the ticket proves is the right to hear them.

The stream is ordered and without gaps. If it ends without PrefillDone or HandoffFailed, the owner is gone (PeerLost).
"""

from typing import Annotated, Literal

import msgspec

from protocol.errors import ErrorInfo
from protocol.ids import IdText
from protocol.kv_layout import KVLayout
from protocol.phases import PrefillPhases
from protocol.tokens import SampledToken

TransportKind = Literal["nixl", "shm", "tcp", "inproc"]

_HOST = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*)"
Url = Annotated[str, msgspec.Meta(max_length=512, pattern=rf"^https?://{_HOST}(:[0-9]{{1,5}})?(/[A-Za-z0-9._~/-]*)?$")]
Fingerprint = Annotated[str, msgspec.Meta(min_length=32, max_length=32, pattern=r"^[0-9a-f]+$")]
BlockCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
BlockIds = Annotated[tuple[BlockCount, ...], msgspec.Meta(max_length=1 << 20)]
Checksum = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Checksums = Annotated[tuple[Checksum, ...], msgspec.Meta(max_length=1 << 20)]


class TransferTicket(msgspec.Struct, frozen=True, kw_only=True):
    """The right to one request's exported KV blocks. Made by the owner, void when the incarnation is.

    `num_tokens` is the length of the exported context. The export expires `ttl_s` after the prefill finished, or
    after the reader's last renewal, whichever is later.
    """

    ticket_id: IdText
    request_id: IdText
    owner: IdText
    incarnation: IdText
    layout_fingerprint: Fingerprint
    control_url: Url
    num_tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=3600)]


class TransportConnect(msgspec.Struct, frozen=True, kw_only=True):
    """Phase two of a meeting: the reader says who it is and which transport it wants."""

    reader: IdText
    incarnation: IdText
    layout: KVLayout
    transport: TransportKind


class TransportMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What the reader needs to reach the owner's arena. `checksum` is xxh3-64 of payload, checked before any use:
    damaged NIXL metadata poisons the agent's name for the life of the process."""

    owner: IdText
    incarnation: IdText
    transport: TransportKind
    layout: KVLayout
    num_blocks: BlockCount
    payload: Annotated[bytes, msgspec.Meta(max_length=1 << 20)]
    checksum: Annotated[int, msgspec.Meta(ge=0)]


class OpenHandoff(msgspec.Struct, frozen=True, kw_only=True):
    """The reader's claim on a ticket. `skip_blocks` leading blocks it already holds are not announced."""

    ticket_id: IdText
    incarnation: IdText
    reader: IdText
    skip_blocks: BlockCount


class BlocksReady(msgspec.Struct, frozen=True, tag="ready"):
    """Blocks `first_block`, `first_block + 1`, ... of the request are final: their ids in the owner's arena, and the
    low 63 bits of xxh3-64 over each block's bytes."""

    first_block: BlockCount
    block_ids: BlockIds
    checksums: Checksums


class PrefillDone(msgspec.Struct, frozen=True, tag="done"):
    """Every block has been announced; the first token is sampled. `since_computed_s` is how long ago the owner's last
    chunk ended when this was written. If `finished` the first token was also the last and nothing is left to do."""

    first_token: SampledToken
    finished: bool
    since_computed_s: float
    phases: PrefillPhases


class HandoffFailed(msgspec.Struct, frozen=True, tag="failed"):
    error: ErrorInfo


HandoffMessage = BlocksReady | PrefillDone | HandoffFailed


class RenewLease(msgspec.Struct, frozen=True):
    """The reader is still reading. Answered by LeaseState."""

    ticket_id: IdText
    incarnation: IdText


class ReleaseLease(msgspec.Struct, frozen=True):
    """The reader has what it wants, or gave up. Idempotent. Answered by LeaseState, which says whether the lease still
    held at this moment: the confirmation that what was read was not reused memory."""

    ticket_id: IdText
    incarnation: IdText


class LeaseState(msgspec.Struct, frozen=True):
    held: bool
