"""IndexEvent: what one owner's stream says. Msgpack, one to an entry of the stream.

Numbered without gaps within a life, from 0 (which is `cleared`). A reader that sees a gap reads the owner's entries instead
(see follower).
"""

from typing import Annotated

import msgspec

from protocol.transfer import HashBytes

MAX_EVENT_BYTES = 1 << 16
Addresses = Annotated[tuple[HashBytes, ...], msgspec.Meta(max_length=1 << 12)]


class IndexEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Chunks, named by the address of their last block. `stored` may name one anew whose place has changed."""

    number: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    cleared: bool = False
    stored: Addresses = ()
    removed: Addresses = ()


decode_event = msgspec.msgpack.Decoder(IndexEvent).decode
