"""Engine: the step loop on a thread of its own, which owns all state.

    start ──▶ commands ─▶ step ─▶ events ─▶ commands ─▶ ... ──▶ stop

Everybody else talks to it through commands, which take effect between two steps, in the order in which they were given.
With asynchronous scheduling the step that has been launched computes meanwhile; see engine.core.
The thread sleeps when nothing can run. Every public method may be called from any thread, also from `on_events`.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from engine.admission import check_request
from engine.backing import BackingStore
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.events import EngineEvent
from engine.kv_event_log import KVEventLog
from engine.load import EngineLoad
from engine.request import EngineRequest
from engine.runner import Runner
from protocol.errors import Draining, HeadraceError, InternalError, InvalidParameter, Overloaded
from protocol.ids import BlockHash, Incarnation, PinId, RequestId
from protocol.kv_events import KVEventBatch, StorageTier
from protocol.phases import HandoffPhases
from protocol.tokens import SampledToken
from runtime.clock import Clock

RETRY_AFTER_S = 1.0

Command = Callable[[], None]

log = logging.getLogger(__name__)


class Engine:
    """`start` once, `stop` once. Of what happens in between, `on_events` hears everything, in order."""

    def __init__(self, runner: Runner, config: EngineConfig, clock: Clock, incarnation: Incarnation) -> None:
        self._runner = runner
        self._config = config
        self._clock = clock
        self._kv_events = KVEventLog(incarnation)
        self._core = EngineCore(runner, config, clock, self._kv_events)
        self._on_events: Callable[[list[EngineEvent]], None] = _nobody_listens
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Shared between threads, under the condition's lock.
        self._wake = threading.Condition()
        self._commands: list[Command] = []
        self._stopping = False
        self._died = False
        self._live: set[RequestId] = set()
        self._num_queued = 0
        self._num_queued_tokens = 0
        self._load = self._core.load()
        self._busy_since: float | None = None

    # Life.

    def back_with(self, backing: BackingStore) -> None:
        """Where blocks go that are forgotten here. Before `start`, at most once; the receiver of events then answers
        BlocksOffered and Reserved."""
        assert self._thread.ident is None, "the engine runs"
        self._core.back_with(backing)

    def start(self, on_events: Callable[[list[EngineEvent]], None]) -> None:
        """`on_events` is called on the engine's thread whenever something happened, with all of it at once. It must
        not block: the next step waits for it."""
        self._on_events = on_events
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End after the step under way. What is left fails with Draining and all blocks are free. False if the thread
        was still in a step after `timeout_s`; it then ends on its own when the step does."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # Commands.

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises Overloaded, Draining, PromptTooLong or InvalidParameter, and has then no effect."""
        check_request(request, self._runner)
        num_tokens = request.num_context_tokens
        submitted_at = self._clock.now()
        with self._wake:
            if self._stopping:
                raise _stopped(self._died)
            if request.request_id in self._live:
                raise InvalidParameter(f"request {request.request_id} is being served", param="request_id")
            num_waiting = self._load.waiting_tokens + self._num_queued_tokens
            if num_waiting and num_waiting + num_tokens > self._config.max_waiting_tokens:
                raise Overloaded(
                    f"{num_waiting} tokens are waiting, {num_tokens} more would be over the limit of "
                    f"{self._config.max_waiting_tokens}",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._live.add(request.request_id)
            self._num_queued += 1
            self._num_queued_tokens += num_tokens
            self._commands.append(lambda: self._core.submit(request, submitted_at))
            self._wake.notify()

    def cancel(self, request_ids: Iterable[RequestId]) -> None:
        """Stop these requests: Failed(Cancelled), unless they have ended. Frees their blocks, except those of an import,
        which wait for `activate` or `abandon_import`, and of a prefill that has announced some, which waits for `release`.
        Unknown ids are no error."""
        ids = tuple(request_ids)
        self._post(lambda: self._core.cancel(ids))

    def release(self, request_id: RequestId) -> None:
        """Nobody reads the blocks of a PREFILL_ONLY request any more. Unknown ids are no error."""
        self._post(lambda: self._core.release(request_id))

    def activate(
        self,
        request_id: RequestId,
        first_token: SampledToken,
        computed_at: float | None,
        landing: HandoffPhases | None = None,
    ) -> None:
        """All blocks of an import are filled and verified. `first_token` is reported again from here; the sequence
        decodes from the next step on. `computed_at`, `landing`: see engine.core."""
        self._post(lambda: self._core.activate(request_id, first_token, computed_at, landing))

    def proceed(self, request_id: RequestId, num_tokens: int) -> None:
        """Before the answer to Reserved with `prefix`: its first `num_tokens` tokens, whole blocks, are not brought but computed
        here, while those behind them are brought. At most once; `resume` is to follow, also if the request has ended meanwhile."""
        self._post(lambda: self._core.proceed(request_id, num_tokens))

    def resume(self, request_id: RequestId, num_valid_tokens: int) -> None:
        """The answer to Reserved with `prefix`: the first `num_valid_tokens` tokens have come and are verified, and nothing
        writes into its blocks any more. The engine computes on from there. After `proceed` with so many tokens or more
        nothing has come, and with fewer those from there on."""
        self._post(lambda: self._core.resume(request_id, num_valid_tokens))

    def fail_import(self, request_id: RequestId, error: HeadraceError) -> None:
        """End the request of an import at once, though somebody may still write into its blocks: Failed(error), unless it
        was cancelled before. `abandon_import` is to follow when nobody does."""
        self._post(lambda: self._core.fail_import(request_id, error))

    def abandon_import(self, request_id: RequestId, num_valid_tokens: int, error: HeadraceError) -> None:
        """An import has ended early, and nothing writes into its blocks any more. Failed(error), unless it was
        cancelled before. The full blocks of the first `num_valid_tokens` tokens stay in the prefix cache."""
        self._post(lambda: self._core.abandon_import(request_id, num_valid_tokens, error))

    def pin(self, pin_id: PinId, block_hashes: Iterable[BlockHash]) -> None:
        """Hold the blocks of the longest cached prefix of this chain, so that others can read them. Answered by Pinned,
        unless the engine stops first. The id has not been used before."""
        hashes = tuple(block_hashes)
        self._post(lambda: self._core.pin(pin_id, hashes))

    def unpin(self, pin_id: PinId) -> None:
        """Nobody reads them any more. Unknown ids are no error."""
        self._post(lambda: self._core.unpin(pin_id))

    def saved(self, pin_id: PinId) -> None:
        """The answer to BlocksOffered: nobody reads these blocks any more. Unknown ids are no error."""
        self._post(lambda: self._core.saved(pin_id))

    def clear_prefix_cache(self) -> None:
        """Forget all addresses. What runs goes on."""
        self._post(self._core.clear_prefix_cache)

    # What can be asked.

    def load(self) -> EngineLoad:
        """As of the last step, plus what was submitted since."""
        with self._wake:
            load = self._load
            return replace(
                load,
                waiting=load.waiting + self._num_queued,
                waiting_tokens=load.waiting_tokens + self._num_queued_tokens,
            )

    @property
    def computed_prompt_tokens(self) -> int:
        """Tokens that prefill chunks have run since the start: what the prefix cache did not save."""
        with self._wake:
            return self._load.computed_prompt_tokens

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """How fast prompts have been computed of late; None before the first."""
        with self._wake:
            return self._load.prefill_tokens_per_s

    def last_progress_s(self) -> float:
        """How long the loop has been busy without finishing a step: 0 while it has nothing to do, infinity if it has
        died. A health check compares this with the longest step it can imagine."""
        with self._wake:
            if self._died:
                return math.inf
            return 0.0 if self._busy_since is None else self._clock.now() - self._busy_since

    def take_kv_events(self) -> KVEventBatch | None:
        """What the prefix cache, and the store behind it, gained and lost since the last call; None if nothing."""
        return self._kv_events.take()

    def kv_snapshot(self) -> KVEventBatch:
        """All that is cached, for a reader that has missed events."""
        return self._kv_events.snapshot()

    def num_held(self, block_hashes: Sequence[BlockHash]) -> int:
        """How many leading blocks of this chain this process holds, on the device or in another tier; a glance."""
        return self._kv_events.num_held(block_hashes)

    def note_stored(self, block_hashes: Sequence[BlockHash], tier: StorageTier) -> None:
        """Another tier of this process holds these from now on: to be told to whoever takes events."""
        self._kv_events.stored(block_hashes, tier)

    def note_removed(self, block_hashes: Sequence[BlockHash], tier: StorageTier) -> None:
        """It does not any more. Unknown ones are no error."""
        self._kv_events.removed(block_hashes, tier)

    # The thread.

    def _post(self, command: Command) -> None:
        """After the stop there is nothing left to command."""
        with self._wake:
            if not self._stopping:
                self._commands.append(command)
                self._wake.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            log.critical("the engine loop died", exc_info=True)
            self._died = True
        with self._wake:
            self._stopping = True
        self._obey()
        self._core.close(_stopped(self._died))
        self._report()

    def _turn(self) -> bool:
        """Commands, then one step. False when it is time to stop."""
        self._obey()
        if self._stopping:
            return False
        schedule = self._core.schedule()
        self._report()
        if schedule is None and not self._core.in_flight:
            self._sleep()
            return True
        self._core.run(schedule)
        self._report()
        return True

    def _obey(self) -> None:
        """Carry out what has been commanded. Submissions count as queued until they show in the load."""
        with self._wake:
            commands, self._commands = self._commands, []
            num_queued, num_queued_tokens = self._num_queued, self._num_queued_tokens
        for command in commands:
            command()
        if commands:
            with self._wake:
                self._num_queued -= num_queued
                self._num_queued_tokens -= num_queued_tokens
                self._load = self._core.load()

    def _report(self) -> None:
        """Publish the state, then the events that led to it."""
        started_at = self._clock.now()
        events = self._core.take_events()
        with self._wake:
            self._live.difference_update(self._core.take_departed())
            self._load = self._core.load()
            self._busy_since = started_at
        try:
            if events:
                self._on_events(events)
        except Exception:
            log.exception("the receiver of engine events failed on %d of them", len(events))
        self._core.times.emit_s += self._clock.now() - started_at

    def _sleep(self) -> None:
        """Until there is a command, or a deadline passes."""
        with self._wake:
            self._busy_since = None
            if not self._commands and not self._stopping:
                deadline_at = self._core.next_deadline_at
                self._wake.wait(None if deadline_at == math.inf else max(0.0, deadline_at - self._clock.now()))
            self._busy_since = self._clock.now()


def _stopped(died: bool) -> HeadraceError:
    if died:
        return InternalError("the engine stopped on an internal error")
    return Draining("the node is stopping")


def _nobody_listens(_: list[EngineEvent]) -> None:
    """Until the start there are no events."""
