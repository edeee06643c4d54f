"""NodeProcess: an owner or a reader of KV blocks as a process of its own, driven over a pipe.

    async with node_process(NodeSpec("owner")) as owner: ...     forked from a clean server process, killed at the end

Both ends of a transfer are processes, so that the test survives whatever happens to them, sees a crash as an exit code,
and can stop, kill and restart either. `ask` runs one method of kv_commands in the process; several may run at once.
The processes are forked from a server that has imported torch and nothing of NIXL: as safe as a spawn, ten times as fast.
"""

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

from protocol.transfer import TransferTicket
from tests.support.kv_commands import NodeSpec, Outcome, Resources, serve_commands
from tests.support.network import enter_namespace
from tests.support.signals import send_signal

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.support.kv_owner", "tests.support.kv_commands"])

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 30.0


class NodeProcess:
    """Made by `node_process`. `exit_code` is None while it lives, negative after a signal."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self._pipe, theirs = _processes.Pipe()
        environment = {name: value for name, value in os.environ.items() if name.startswith("UCX_")}
        self._process = _processes.Process(target=_main, args=(theirs, spec, environment), daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid or 0
        self.port = 0
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._serials = itertools.count(1)
        self._listening = True
        self._started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._receive)

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    async def started(self) -> None:
        """Returns when the node serves; fails if it cannot."""
        async with asyncio.timeout(START_TIMEOUT_S):
            self.port = await self._started

    async def ask(self, method: str, *arguments: Any, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """Run a command; raises what it raised (as AssertionError), or EOFError if the process dies meanwhile."""
        serial = next(self._serials)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._answers[serial] = answer
        try:
            self._pipe.send((serial, method, arguments))
            async with asyncio.timeout(timeout_s):
                return await answer
        except BrokenPipeError as error:
            raise EOFError(f"the {self.spec.role} process is dead") from error
        finally:
            self._answers.pop(serial, None)

    def signal(self, number: int) -> None:
        send_signal(self.pid, number)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    async def kill(self) -> None:
        self.signal(signal.SIGKILL)
        await self.died()

    async def died(self) -> int:
        """The exit code, once there is one."""
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while self._process.is_alive():
                await asyncio.sleep(0.005)
        return self._process.exitcode or 0

    async def leave(self) -> int:
        """Close everything in order and end the process. The exit code."""
        with contextlib.suppress(EOFError):
            await self.ask("leave")
        return await self.died()

    def dispose(self) -> None:
        """Whatever state it is in: end it, and forget it."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._stop_listening()
        self._pipe.close()
        self._process.close()

    # What tests ask most.

    async def hand_off(self, request_id: str, blocks: list[int]) -> TransferTicket:
        """Owner: a finished prefill whose context is exactly these blocks."""
        ticket: TransferTicket = await self.ask("hand_off", request_id, blocks)
        return ticket

    async def fetch(
        self, ticket: TransferTicket, local: list[int], *, cached: int = 0, deadline_s: float = 20.0
    ) -> Outcome:
        """Reader: fetch a context; never raises for what the other node did."""
        outcome: Outcome = await self.ask("fetch", ticket, local, cached, deadline_s)
        return outcome

    async def digests(self, blocks: list[int]) -> list[int]:
        found: list[int] = await self.ask("digests", blocks)
        return found

    async def resources(self) -> Resources:
        found: Resources = await self.ask("resources")
        return found

    def _receive(self) -> None:
        try:
            serial, error, value = self._pipe.recv()
        except (EOFError, OSError):
            self._stop_listening()
            return
        answer = self._started if serial == 0 else self._answers.get(serial)
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(AssertionError(f"in the {self.spec.role} process: {error}"))

    def _stop_listening(self) -> None:
        if not self._listening:
            return
        self._listening = False
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        for answer in (self._started, *self._answers.values()):
            if not answer.done():
                answer.set_exception(EOFError(f"the {self.spec.role} process has ended: exit code {self.exit_code}"))
                answer.exception()  # not everybody waits for an answer


@contextlib.asynccontextmanager
async def node_process(spec: NodeSpec) -> AsyncIterator[NodeProcess]:
    node = NodeProcess(spec)
    try:
        await node.started()
        yield node
    finally:
        node.dispose()


def _main(pipe: Connection, spec: NodeSpec, environment: dict[str, str]) -> None:
    """The child: enters its network before anything opens a socket or starts a thread."""
    os.environ.update(environment | spec.environment)
    logging.basicConfig(level=logging.ERROR)
    if spec.network_namespace is not None:
        enter_namespace(spec.network_namespace)
    asyncio.run(serve_commands(pipe, spec))
