"""What the random faults found, one by one, in the shortest course that shows it."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from protocol.errors import LeaseExpired
from protocol.ids import RequestId
from protocol.transfer import Direction, OpenHandoff
from tests.support.kv_world import World
from tests.support.sim_blocks import LAYOUT, Prompt


@contextmanager
def world(direction: Direction) -> Iterator[World]:
    made = World(0, Counter(), direction)
    try:
        yield made
        made.settle()
    finally:
        made.close()


def start_fetch(made: World, request_id: str, deadline_s: float = 5.0) -> None:
    async def start() -> None:
        prompt = Prompt(RequestId(request_id), 2 * LAYOUT.block_size)
        ticket = made.owners[0].now.prefill(prompt, 1, 0.0)
        assert ticket is not None
        assert made.readers[0].fetch(ticket, prompt, 0, deadline_s)

    made.run(start())


def test_a_meeting_that_failed_when_nobody_waited_any_more_is_not_remembered() -> None:
    with world("pull") as made:
        made.weather.rates = {"request lost": 1.0}
        start_fetch(made, "req-1", deadline_s=0.2)
        made.pass_time(2.0)
        made.weather.clear_up()
        start_fetch(made, "req-2")
        made.pass_time(5.0)
        assert made.outcomes["activated"] == 1, made.outcomes


def test_a_hand_off_that_is_asked_for_twice_is_pushed_once() -> None:
    """The second message may come when the reader has long given the blocks to somebody else."""
    with world("push") as made:
        exports = made.owners[0].now.exports
        heard: list[OpenHandoff] = []
        attach = exports.attach

        def listen(message: OpenHandoff) -> AsyncIterator[bytes]:
            heard.append(message)
            return attach(message)

        exports.attach = listen  # type: ignore[method-assign]  # to hear what is sent
        start_fetch(made, "req-1")
        while not heard:
            made.pass_time(0.0005)
        made.weather.rates = {"request lost": 1.0}  # the release is
        while not made.outcomes["activated"]:
            made.pass_time(0.001)
        made.readers[0].finish(RequestId("req-1"))
        assert heard[0].push is not None
        with pytest.raises(LeaseExpired, match="pushed already"):
            attach(heard[0])
        made.pass_time(1.0)
        made.weather.clear_up()
