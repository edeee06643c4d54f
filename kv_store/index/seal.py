"""Seal: what makes an Owner in the index one that this cluster believes.

    {ns:0}:lives[life] = HMAC-SHA256(cluster key, (purpose, namespace, life, owner))  32 bytes
                         owner                                                         msgpack

Members are called with the cluster key, so whoever could write one that is believed would be told the key. The seal covers the
life, so that it holds for this registration only; an owner that was true once can be written again, but not moved to
another address. Without a key everybody can seal, and only those on loopback are believed: nodes without a key serve nobody else.
"""

import hashlib
import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec

from kv_store.index.members import Owner
from runtime.auth import is_loopback

SEAL_BYTES = hashlib.sha256().digest_size
_PURPOSE = "headrace index owner"

_decode_owner = msgspec.msgpack.Decoder(Owner).decode


@dataclass(frozen=True, slots=True)
class Opened:
    """What somebody has written of an owner. Not `believed`: it must not be called, nor named to anybody as a source."""

    owner: Owner
    believed: bool


class Seal:
    def __init__(self, cluster_key: str | None, namespace: str) -> None:
        self._key = cluster_key
        self._namespace = namespace

    @property
    def stranger(self) -> str:
        """What is wrong with an owner that is not believed, for people."""
        if self._key is None:
            return "without a cluster key only loopback addresses are"
        return "they do not have this node's cluster key"

    def close(self, life: int, owner: Owner) -> bytes:
        """What stands in the index for this owner's life."""
        body = msgspec.msgpack.encode(owner)
        return self._of(life, body) + body

    def open(self, life: int, value: bytes) -> Opened:
        """Raises msgspec.MsgspecError where that cannot be an owner."""
        seal, body = value[:SEAL_BYTES], value[SEAL_BYTES:]
        owner = _decode_owner(body)
        believed = hmac.compare_digest(seal, self._of(life, body))
        if self._key is None:
            believed = believed and is_loopback(urlsplit(owner.control_url).hostname or "")
        return Opened(owner, believed)

    def _of(self, life: int, body: bytes) -> bytes:
        text = msgspec.msgpack.encode((_PURPOSE, self._namespace, life, body))
        return hmac.digest((self._key or "").encode(), text, "sha256")
