"""What the random faults found, one by one, in the shortest course that shows it."""

from collections import Counter
from collections.abc import Iterator

import pytest

from protocol.ids import RequestId
from tests.support.kv_world import Prompt, World


@pytest.fixture
def world() -> Iterator[World]:
    made = World(0, Counter(), "pull")
    yield made
    made.settle()
    made.close()


def test_a_meeting_that_failed_when_nobody_waited_any_more_is_not_remembered(world: World) -> None:
    owner, reader = world.owners[0], world.readers[0]

    async def fetch(request_id: str, deadline_s: float) -> None:
        prompt = Prompt(RequestId(request_id), 8)
        ticket = owner.now.prefill(prompt, 1, 0.0)
        assert ticket is not None
        assert reader.fetch(ticket, prompt, 0, deadline_s)

    world.run(fetch("req-1", 0.2))
    world.pass_time(0.001)
    world.weather.rates = {"request lost": 1.0}  # from now on: the stream is open, and nobody has met
    world.pass_time(2.0)
    world.weather.clear_up()
    world.run(fetch("req-2", 5.0))
    world.pass_time(5.0)
    assert world.outcomes["activated"] == 1, world.outcomes
