"""A process's life moves forward only; signals move it; children follow their supervisor."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from runtime.life import Phase, ProcessLife, install_signal_handlers


def test_phases_move_forward_and_say_why() -> None:
    life = ProcessLife()
    life.note("loading model")
    assert (life.phase, life.reason, life.draining) == (Phase.STARTING, "loading model", False)
    assert life.ready()
    life.note("too late")
    assert (life.phase, life.draining) == (Phase.READY, False)
    assert life.drain("SIGTERM")
    assert (life.phase, life.reason, life.draining) == (Phase.DRAINING, "SIGTERM", True)
    assert life.stop("done")
    assert (life.phase, life.reason) == (Phase.STOPPED, "done")


@pytest.mark.parametrize("phase", [Phase.READY, Phase.DRAINING, Phase.STOPPED])
def test_nothing_leads_back(phase: Phase) -> None:
    life = ProcessLife()
    moves = {
        Phase.READY: life.ready,
        Phase.DRAINING: lambda: life.drain("again"),
        Phase.STOPPED: lambda: life.stop("again"),
    }
    assert moves[phase]()
    for earlier in (other for other in moves if other <= phase):
        assert not moves[earlier]()
    assert life.phase is phase


async def test_waiting_for_a_phase_that_was_skipped() -> None:
    life = ProcessLife()
    waiting = [asyncio.create_task(life.wait(phase)) for phase in Phase]
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, False, False, False]
    life.drain("early end")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [True, True, True, False]
    life.stop("now")
    await asyncio.gather(*waiting)


async def test_the_first_signal_drains_and_the_second_stops() -> None:
    life = ProcessLife()
    install_signal_handlers(life)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(life.wait(Phase.DRAINING), 5)
    assert (life.phase, life.reason) == (Phase.DRAINING, "SIGTERM")
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(life.wait(Phase.STOPPED), 5)
    assert "second" in life.reason
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


CHILD = (
    "import time; from runtime.life import watch_parent; watch_parent(); print('watching', flush=True); time.sleep(60)"
)
PARENT = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE,
                         env=os.environ | {{"HEADRACE_SUPERVISOR_PID": str(os.getpid())}})
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_child_ends_with_a_killed_supervisor() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        deadline = time.monotonic() + 10
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_child_whose_supervisor_is_gone_already_does_not_start() -> None:
    environment = os.environ | {"HEADRACE_SUPERVISOR_PID": "1"}
    ran = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1
    assert "watching" not in ran.stdout


def test_a_process_without_a_supervisor_watches_nobody() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "HEADRACE_SUPERVISOR_PID"}
    code = CHILD.replace("time.sleep(60)", "pass")
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0
