"""ProcessLife: where a process stands between its start and its end, and why.

    starting ──▶ ready ──▶ draining ──▶ stopped

A life only moves forward and may skip phases: SIGTERM during start leads from starting to draining. The first SIGTERM or
SIGINT drains, the second stops at once, the third kills. Used on one event loop only.
"""

import asyncio
import ctypes
import enum
import logging
import os
import signal

log = logging.getLogger(__name__)

SUPERVISOR_PID_VARIABLE = "HEADRACE_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1


class Phase(enum.IntEnum):
    STARTING = 0
    READY = 1
    DRAINING = 2
    STOPPED = 3


class ProcessLife:
    """One per process. `reason` says in a few words what the process is doing, or why it is ending."""

    def __init__(self) -> None:
        self._phase = Phase.STARTING
        self._reason = "starting"
        self._reached = {phase: asyncio.Event() for phase in Phase}
        self._reached[Phase.STARTING].set()

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def reason(self) -> str:
        return self._reason

    @property
    def draining(self) -> bool:
        """Nothing new is admitted any more."""
        return self._phase >= Phase.DRAINING

    def note(self, reason: str) -> None:
        """Say what start-up is doing now. Without effect once the process is past it."""
        if self._phase is Phase.STARTING:
            self._reason = reason

    def ready(self) -> bool:
        """Start-up is complete. False, and without effect, if the process was told to end meanwhile."""
        return self._advance(Phase.READY, "start-up is complete")

    def drain(self, reason: str) -> bool:
        """Admit nothing new and finish what runs. False if that, or more, was already asked for."""
        return self._advance(Phase.DRAINING, reason)

    def stop(self, reason: str) -> bool:
        """End now. False if the life is already over."""
        return self._advance(Phase.STOPPED, reason)

    async def wait(self, phase: Phase) -> None:
        """Returns once `phase`, or a later one, is reached."""
        await self._reached[phase].wait()

    def _advance(self, phase: Phase, reason: str) -> bool:
        if phase <= self._phase:
            return False
        log.info("%s -> %s: %s", self._phase.name.lower(), phase.name.lower(), reason)
        self._phase, self._reason = phase, reason
        for reached, event in self._reached.items():
            if reached <= phase:
                event.set()
        return True


def install_signal_handlers(life: ProcessLife) -> None:
    """Let SIGTERM and SIGINT move `life` forward. To be called on the running event loop, which owns the handlers."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def on_signal(number: signal.Signals) -> None:
        if life.drain(number.name):
            return
        life.stop(f"second signal: {number.name}")
        for handled in numbers:  # back to the system's default: if stopping hangs, the next one kills
            loop.remove_signal_handler(handled)
            signal.signal(handled, signal.SIG_DFL)

    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)


def watch_parent() -> None:
    """Tie this process's life to that of the supervisor that started it, if one did (Linux).

    The supervisor names itself in HEADRACE_SUPERVISOR_PID. The kernel then kills this process the moment that one is
    gone, however it ended, so that `kill -9` of a supervisor leaves nothing behind. Call it early, once.
    """
    expected = os.environ.get(SUPERVISOR_PID_VARIABLE)
    if expected is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        log.warning("cannot watch the supervisor: %s", os.strerror(ctypes.get_errno()))
    if os.getppid() != int(expected):  # it ended before the kernel was told to look
        raise SystemExit("the supervisor has gone")
