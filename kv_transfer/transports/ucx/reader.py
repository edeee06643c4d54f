"""UcxReader: the half of a helper that wants blocks. Asks peers' helpers, and receives straight into the arena."""

import itertools
import secrets
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.transports.ucx.wire import (
    MAX_REPLY_BYTES,
    MAX_TAG,
    REQUEST_TAG,
    Read,
    ReadEnded,
    UcxPayload,
    UcxReply,
    UcxRequest,
    seal_request,
)
from kv_transfer.transports.ucx.worker import Flow, Request, UcxWorker, failed
from protocol.errors import HeadraceError, PeerLost, TransferError
from protocol.wire import FRAME_HEADER_BYTES, decode


@dataclass
class _Owner:
    """`endpoint` None: UCX refused the address."""

    key: bytes
    endpoint: Any
    num_reads: int = 0
    leaving: bool = False


class UcxReader:
    """`tell` gets one ReadEnded for every read."""

    def __init__(self, worker: UcxWorker, tell: Callable[[ReadEnded], None]) -> None:
        self._worker = worker
        self._tell = tell
        self._owners: dict[int, _Owner] = {}
        self._tags = itertools.count(secrets.randbits(60) * 2, 2)

    def connect(self, peer_id: int, payload: UcxPayload) -> None:
        """Errors show at the first read."""
        self._owners[peer_id] = _Owner(payload.key, self._worker.connect(payload.address))

    def disconnect(self, peer_id: int) -> None:
        """At once, or when the last read of this peer has ended."""
        owner = self._owners.pop(peer_id, None)
        if owner is not None:
            owner.leaving = True
            self._let_go(owner)

    def read(self, command: Read) -> None:
        self._worker.run(self._read(command))

    def _read(self, command: Read) -> Flow:
        owner = self._owners.get(command.peer_id)
        if owner is None or owner.endpoint is None or not owner.endpoint.alive:
            self._tell(ReadEnded(command.read_id, _lost().to_info()))
            return
        owner.num_reads += 1
        error = yield from self._transfer(command, owner)
        owner.num_reads -= 1
        self._let_go(owner)
        self._tell(ReadEnded(command.read_id, None if error is None else error.to_info()))

    def _transfer(self, command: Read, owner: _Owner) -> Generator[list[Request], None, HeadraceError | None]:
        """Returns why it failed, once everything that it began has ended."""
        worker, tag = self._worker, next(self._tags) & MAX_TAG
        runs = tuple((source, num_blocks) for source, _, num_blocks in command.runs)
        sealed = seal_request(owner.key, UcxRequest(command.ticket_id, runs, tag, worker.address))
        request, reply = np.frombuffer(sealed, np.uint8), np.zeros(MAX_REPLY_BYTES, np.uint8)
        begun: list[Request] = []
        try:
            begun.append(worker.send(owner.endpoint, request, REQUEST_TAG))
            begun.append(worker.receive(owner.endpoint, reply, tag))
        except worker.error as error:
            yield begun
            return _lost(error)
        yield begun
        if failed(begun):
            return _lost()
        refusal = _refusal(reply.data)
        if refusal is not None:
            return refusal
        begun = []
        try:
            for _, destination, num_blocks in command.runs:
                begun.append(worker.receive(owner.endpoint, worker.blocks(destination, num_blocks), tag + 1))
        except worker.error as error:
            yield begun
            return _lost(error)
        yield begun
        return _lost() if failed(begun) else None

    def _let_go(self, owner: _Owner) -> None:
        if owner.leaving and owner.num_reads == 0:
            self._worker.disconnect(owner.endpoint)
            owner.endpoint = None


def _refusal(message: memoryview) -> HeadraceError | None:
    """The error that a reply carries. The message is as long as our buffer; its frame says how much of it counts."""
    end = FRAME_HEADER_BYTES + int.from_bytes(message[:FRAME_HEADER_BYTES], "little")
    try:
        reply = decode(message[FRAME_HEADER_BYTES:end], UcxReply)
    except HeadraceError as error:
        return TransferError(f"the peer does not follow the ucx transport's protocol: {error.message}")
    return None if reply.error is None else reply.error.to_error()


def _lost(error: Exception | None = None) -> PeerLost:
    return PeerLost("the UCX connection to the peer is lost" + (f": {error}" if error is not None else ""))
