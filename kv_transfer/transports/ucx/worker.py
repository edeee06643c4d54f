"""UcxWorker: UCX as the helper process uses it, from one thread: endpoints, tagged messages, and flows that wait for them.

A flow is a generator. It yields the UCX requests that it has begun, and goes on when all of them have ended, well or
not. UCX can neither cancel nor time out a receive that has begun to arrive: closing its endpoint leaves it unfinished
and its bytes still land (both were seen). So a flow waits for as long as it takes, and only the end of this process is
a limit to that.
"""

import select
from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.transports.ucx.library import UcxApi
from kv_transfer.transports.ucx.wire import HelperSettings

Bytes = NDArray[np.uint8]
Request = Any
"""A UCX operation in progress."""

Flow = Generator[list[Request], None, None]

PROGRESS_CALLS = 64
"""Between two looks at everything else."""

IDLE_TICK_S = 1.0
"""UCX promises to wake us; a look now and then costs nothing and would mend a broken promise."""

_IN_PROGRESS = 1


class UcxWorker:
    """`memory` is the arena without its header. Raises what ucxx raises where UCX finds no device."""

    error: type[Exception]
    """What a message that cannot be sent or received raises."""

    def __init__(self, api: UcxApi, settings: HelperSettings, memory: Bytes) -> None:
        self._api = api
        self.error = api.Error
        self._worker = api.open_worker()
        self._memory = memory
        self._block_bytes = settings.block_bytes
        self._flows: list[tuple[Flow, list[Request]]] = []
        self.num_blocks = settings.num_blocks
        self.address = bytes(memoryview(self._worker.address))
        """How peers reach this worker."""

    def connect(self, address: bytes) -> Any:
        """An endpoint to a peer's worker; None where UCX refuses. The address must be trusted: UCX aborts on a bad one."""
        try:
            remote = self._api.Address.create_from_buffer(address)
            return self._api.Endpoint.create_from_worker_address(self._worker, remote, endpoint_error_handling=True)
        except self._api.Error:
            return None

    def disconnect(self, endpoint: Any) -> None:
        """For an endpoint that no flow uses any more."""
        if endpoint is not None:
            endpoint.close_blocking(period=10**9, max_attempts=1)

    def send(self, endpoint: Any, data: Bytes, tag: int) -> Request:
        """The data must stay as it is until the request has ended. Raises `error`."""
        return endpoint.tag_send(self._api.Array(data), self._api.Tag(tag))

    def receive(self, endpoint: Any, into: Bytes, tag: int) -> Request:
        """One message, which may be shorter than `into`. Ends with an error if the endpoint is lost. Raises `error`."""
        return endpoint.tag_recv(self._api.Array(into), self._api.Tag(tag))

    def next_message(self, tag: int, max_bytes: int) -> tuple[Bytes, Request] | None:
        """The next message that anybody sent with this tag, and the request that is receiving it."""
        found = self._worker.tag_probe(self._api.Tag(tag), remove=True)
        if not found.matched:
            return None
        data = np.empty(min(found.length, max_bytes), np.uint8)  # one that is longer ends with an error
        return data, self._worker.tag_recv_with_handle(self._api.Array(data), found)

    def blocks(self, first: int, num_blocks: int) -> Bytes:
        """A run of the arena's blocks: [num_blocks * block_bytes]"""
        assert 0 <= first < first + num_blocks <= self.num_blocks
        return self._memory[first * self._block_bytes : (first + num_blocks) * self._block_bytes]

    def run(self, flow: Flow) -> None:
        """Start a flow."""
        requests = next(flow, None)
        if requests is not None:
            self._flows.append((flow, requests))

    def step(self) -> bool:
        """Let UCX work and let flows go on; True if one did."""
        for _ in range(PROGRESS_CALLS):
            if not self._worker.progress_once():
                self._worker.progress()  # this one also ends the requests of endpoints that were lost
                break
        going_on = [entry for entry in self._flows if not any(map(in_progress, entry[1]))]
        for entry in going_on:
            self._flows.remove(entry)
            self.run(entry[0])
        return bool(going_on)

    def sleep(self, control_fd: int) -> None:
        """Until UCX has something to do, or somebody writes to us."""
        if self._worker.arm():
            select.select([self._worker.epoll_file_descriptor, control_fd], [], [], IDLE_TICK_S)


def in_progress(request: Request) -> bool:
    return bool(request.status == _IN_PROGRESS)


def failed(requests: list[Request]) -> bool:
    """Of requests that have ended."""
    return any(request.status != 0 for request in requests)
