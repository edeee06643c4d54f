"""Ten thousand random faults, and never a wrong token, a wrong byte in use, a hang or a leak.

A state machine lives through a world of owners and readers (tests/support/kv_world.py) in which messages are lost, delayed,
doubled and cut, frames swapped, bits flipped, transfers stalled for longer than anybody waits, owners restarted or
partitioned, prefills failed, fetches cancelled, tickets replayed and leases left to run out, all at once. After every step
everything that must hold is checked; at the end the faults are lifted and everything must come back to where it was.

Time is virtual and nothing is threaded, so what hypothesis prints nearly always replays a failure.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from protocol.errors import Overloaded
from protocol.ids import RequestId
from protocol.transfer import Direction, TransferTicket
from tests.support.kv_world import World
from tests.support.sim_blocks import LAYOUT, Prompt
from tests.support.sim_owner import SimOwner
from tests.support.sim_reader import SimReader

log = logging.getLogger(__name__)

MIN_FAULTS = 10_000
"""Not counting what was only late."""

EXPECTED_OUTCOMES = ["activated", "cancelled", "checksum_mismatch", "lease_expired", "peer_lost", "transfer_timeout"]
DIRECTIONS: list[Direction] = ["pull", "push"]

MISHAPS = {
    "request delayed": 0.5,
    "request refused": 0.15,
    "request lost": 0.15,
    "request doubled": 0.3,
    "answer lost": 0.15,
    "answer delayed": 0.5,
    "frame delayed": 0.5,
    "frame lost": 0.1,
    "frame doubled": 0.1,
    "frames swapped": 0.1,
    "stream cut": 0.1,
    "stream ended": 0.1,
    "stream silent": 0.1,
    "transfer delayed": 0.5,
    "transfer stalled": 0.3,
    "transfer broke": 0.2,
    "peer lost in transfer": 0.1,
    "bits flipped": 0.4,
}
"""How likely each is at its worst, per message, frame or transfer."""

SOME_MISHAPS = st.lists(st.sampled_from(sorted(MISHAPS)), min_size=4, max_size=12, unique=True)
SEVERITY = st.floats(0.4, 1.0)
INDEX = st.integers(0, 63)
PATIENCE = st.integers(0, 4)
"""What is so bad that it ends everything else happens one time in five."""


class Faults(RuleBasedStateMachine):
    """`counted` outlives each run: it is what was done in all of them."""

    counted: Counter[str]
    outcomes: Counter[str]
    direction: Direction

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.tickets: list[tuple[TransferTicket, Prompt]] = []
        self.num_prompts = 0

    @initialize(seed=st.integers(0, 2**32 - 1), mishaps=SOME_MISHAPS, severity=SEVERITY)
    def begin(self, seed: int, mishaps: list[str], severity: float) -> None:
        self.world = World(seed, self.counted, self.direction)
        self.weather_changes(mishaps, severity)

    @rule(mishaps=SOME_MISHAPS, severity=SEVERITY)
    def weather_changes(self, mishaps: list[str], severity: float) -> None:
        """A few kinds of trouble at a time: with all of them nothing would get far enough to meet the rarer ones."""
        weather = self._world.weather
        weather.rates = {kind: MISHAPS[kind] * severity for kind in mishaps}
        weather.delay_s = 1.2 * severity

    @rule(num_requests=st.integers(1, 16), chunk_s=st.floats(0.0, 0.6), deadline_s=st.floats(0.2, 8.0))
    def requests(self, num_requests: int, chunk_s: float, deadline_s: float) -> None:
        """A burst of them."""
        self._meanwhile(lambda: self._request(num_requests, chunk_s, deadline_s))

    @rule(owner=INDEX)
    def a_ticket_is_not_used(self, owner: int) -> None:
        def prefill() -> None:
            if self._prefill(owner, self._world.rng.randint(1, 8), 0.1) is not None:
                self.counted["ticket not used"] += 1

        self._meanwhile(prefill)

    @rule(which=INDEX, reader=INDEX, deadline_s=st.floats(0.05, 8.0))
    def a_ticket_is_used_again(self, which: int, reader: int, deadline_s: float) -> None:
        """By another reader, or by the same after its first fetch has ended."""

        def replay() -> None:
            if self.tickets:
                ticket, prompt = self.tickets[-1 - which % len(self.tickets)]
                self.counted["ticket replayed"] += self._readers[reader % 2].fetch(ticket, prompt, 0, deadline_s)

        self._meanwhile(replay)

    @rule(reader=INDEX)
    def fetches_are_cancelled(self, reader: int) -> None:
        def cancel() -> None:
            taker = self._readers[reader % 2]
            for request_id, found in taker.imports.items():
                if not found.holds and self._world.rng.random() < 0.7:
                    self.counted["fetch cancelled"] += 1
                    taker.cancel(request_id)

        self._meanwhile(cancel)

    @rule(owner=INDEX, which=INDEX)
    def a_prefill_fails(self, owner: int, which: int) -> None:
        def fail() -> None:
            life = self._owners[owner % 2].now
            running = [request_id for request_id, prefill in life.prefills.items() if not prefill.released]
            if running:
                self.counted["prefill failed"] += 1
                life.exports.fail(running[which % len(running)], Overloaded("out of blocks"))

        self._meanwhile(fail)

    @rule(owner=INDEX, patience=PATIENCE, killed=st.booleans())
    def an_owner_restarts(self, owner: int, patience: int, killed: bool) -> None:
        def restart() -> None:
            if patience == 0:
                self.counted["owner restarted"] += 1
                self._world.start(self._owners[owner % 2].restart(killed=killed))

        self._meanwhile(restart)

    @rule(owner=INDEX, seconds=st.floats(0.1, 6.0), patience=PATIENCE)
    def an_owner_is_cut_off(self, owner: int, seconds: float, patience: int) -> None:
        def cut() -> None:
            if patience == 0:
                self.counted["owner cut off"] += 1
                self._world.network.partition(self._owners[owner % 2].url)
                self._world.loop.call_later(seconds, self._world.network.heal)

        self._meanwhile(cut)

    @rule(seconds=st.floats(0.5, 4.0))
    def time_passes(self, seconds: float) -> None:
        """Enough for a stall to be noticed, or for a lease to run out."""
        self._world.pass_time(seconds)

    def teardown(self) -> None:
        if self.world is None:
            return
        try:
            self.world.settle()
            self.outcomes.update(self.world.outcomes)
        finally:
            self.world.close()

    @property
    def _world(self) -> World:
        assert self.world is not None
        return self.world

    @property
    def _owners(self) -> list[SimOwner]:
        return self._world.owners

    @property
    def _readers(self) -> list[SimReader]:
        return self._world.readers

    def _meanwhile(self, act: Callable[[], None]) -> None:
        """Do something at some moment of a burst of requests, after some that were there have ended."""
        rng = self._world.rng

        async def live() -> None:
            self._request(rng.randint(0, 5), rng.random() * 0.4, 8.0)
            await asyncio.sleep(rng.random() * 0.6)
            act()
            await asyncio.sleep(rng.random() * 0.6)

        for reader in self._readers:
            for request_id in list(reader.imports):
                if rng.random() < 0.5:
                    reader.finish(request_id)
        self._world.run(live())

    def _request(self, num_requests: int, chunk_s: float, deadline_s: float) -> None:
        """Of prompts whose beginning the reader may have."""
        rng = self._world.rng
        for _ in range(num_requests):
            if self._prefill(rng.randrange(2), rng.randint(1, 8 * LAYOUT.block_size), chunk_s) is not None:
                rng.choice(self._readers).fetch(*self.tickets[-1], rng.choice((0, 0, 1, 3)), deadline_s)

    def _prefill(self, owner: int, num_tokens: int, chunk_s: float) -> TransferTicket | None:
        self.num_prompts += 1
        prompt = Prompt(RequestId(f"req-{self.num_prompts}"), num_tokens)
        ticket = self._owners[owner % 2].now.prefill(prompt, self._world.rng.randint(1, 4), chunk_s)
        if ticket is not None:
            self.tickets.append((ticket, prompt))
        return ticket


@pytest.mark.timeout(300)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ten_thousand_random_faults_harm_nobody(direction: Direction) -> None:
    faults: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    machine = type("Faults", (Faults,), {"counted": faults, "outcomes": outcomes, "direction": direction})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=75,
            stateful_step_count=60,
            deadline=None,
            database=None,
            derandomize=True,
            report_multiple_bugs=False,
            phases=[Phase.generate],  # to shrink a failure takes longer than a test may
            suppress_health_check=list(HealthCheck),
        ),
    )
    log.info("%d faults: %s; hand-offs: %s", faults.total(), dict(faults), dict(outcomes))
    assert sum(count for kind, count in faults.items() if not kind.endswith("delayed")) >= MIN_FAULTS, faults
    assert outcomes["unproven"] * 50 <= outcomes.total(), "an owner's death is nearly always proven"
    assert set(EXPECTED_OUTCOMES) <= set(outcomes)
