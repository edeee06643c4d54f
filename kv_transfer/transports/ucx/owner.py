"""UcxOwner: the half of a helper that has blocks. Answers sealed requests of peers' helpers, straight from the arena."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kv_transfer.transports.ucx.wire import (
    MAX_MESSAGE_BYTES,
    REQUEST_TAG,
    AskPermission,
    Note,
    UcxReply,
    UcxRequest,
    open_request,
)
from kv_transfer.transports.ucx.worker import Bytes, Flow, Request, UcxWorker, failed
from protocol.errors import HeadraceError, LeaseExpired, TransferError
from protocol.wire import encode_frame

MAX_READERS = 256


@dataclass
class _Reader:
    endpoint: Any
    num_answers: int = 0


@dataclass
class _Question:
    """Waits as UCX requests do. The node answers it."""

    granted: bool = False
    status: int = 1


class UcxOwner:
    """`tell` gets the questions that the node must answer by `permit`. `key` seals the requests that are looked at."""

    def __init__(self, worker: UcxWorker, key: bytes, tell: Callable[[AskPermission | Note], None]) -> None:
        self._worker = worker
        self._key = key
        self._tell = tell
        self._readers: dict[bytes, _Reader] = {}
        self._questions: dict[int, _Question] = {}
        self._question_ids = itertools.count()

    def step(self) -> bool:
        """Take up requests that have come in; True if there was one."""
        message = self._worker.next_message(REQUEST_TAG, MAX_MESSAGE_BYTES)
        if message is None:
            return False
        self._worker.run(self._answer(*message))
        return True

    def permit(self, question_id: int, granted: bool) -> None:
        question = self._questions.pop(question_id)
        question.granted = granted
        question.status = 0

    def _answer(self, data: Bytes, arriving: Request) -> Flow:
        yield [arriving]
        if failed([arriving]):
            return
        try:
            request = open_request(self._key, data.tobytes())
        except HeadraceError as error:
            self._tell(Note(f"ignoring {error.message}"))
            return
        reader = self._reader(request.address)
        if reader is None:
            return
        reader.num_answers += 1
        reply = self._check(request)
        if reply.error is None:
            question = self._ask(request)
            yield [question]
            if not question.granted:
                reply = _refused(LeaseExpired("this ticket does not lend these blocks, or no longer"))
        messages = [(np.frombuffer(encode_frame(reply), np.uint8), request.tag)]
        if reply.error is None:
            messages += [(self._worker.blocks(*run), request.tag + 1) for run in request.runs]
        begun: list[Request] = []
        try:
            for message, tag in messages:
                begun.append(self._worker.send(reader.endpoint, message, tag))
        except self._worker.error as error:
            self._tell(Note(f"a reader has gone: {error}"))
        yield begun
        reader.num_answers -= 1
        if not reader.endpoint.alive:
            self._forget(request.address)

    def _check(self, request: UcxRequest) -> UcxReply:
        num_blocks = sum(count for _, count in request.runs)
        if any(first + count > self._worker.num_blocks for first, count in request.runs):
            return _refused(TransferError(f"asked for blocks outside of an arena of {self._worker.num_blocks}"))
        if num_blocks > self._worker.num_blocks:
            return _refused(TransferError("asked for more blocks than there are"))
        return UcxReply(num_blocks)

    def _ask(self, request: UcxRequest) -> _Question:
        question_id = next(self._question_ids)
        question = self._questions[question_id] = _Question()
        self._tell(AskPermission(question_id, request.ticket_id, request.runs))
        return question

    def _reader(self, address: bytes) -> _Reader | None:
        """The endpoint to whoever asks; made at the first request and kept."""
        known = self._readers.get(address)
        if known is not None and known.endpoint.alive:
            return known
        if known is not None and not self._forget(address):
            return None
        if len(self._readers) >= MAX_READERS and not any(map(self._forget, list(self._readers))):
            self._tell(Note(f"ignoring a request: {MAX_READERS} readers are being answered"))
            return None
        endpoint = self._worker.connect(address)
        if endpoint is None:
            self._tell(Note("ignoring a request: UCX cannot reach the reader's address"))
            return None
        reader = self._readers[address] = _Reader(endpoint)
        return reader

    def _forget(self, address: bytes) -> bool:
        """False while the reader is still being answered."""
        reader = self._readers.get(address)
        if reader is None or reader.num_answers:
            return False
        del self._readers[address]
        self._worker.disconnect(reader.endpoint)
        return True


def _refused(error: HeadraceError) -> UcxReply:
    return UcxReply(0, error.to_info())
