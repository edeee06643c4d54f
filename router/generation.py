"""Generation: one client request. Runs its sequences, each in a task, and hands out what is new of all of them.

Used as `async with Generation(...) as generation:`; leaving the block, however that happens, stops every sequence on every
node. A reader that falls behind gets what has gathered in one piece; one that falls too far behind is given up.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Self

from protocol.errors import Cancelled, HeadraceError, InternalError
from protocol.ids import TraceId
from router.admission import Admission, Held
from router.api_choices import Choice, TextOptions
from router.cluster import Cluster
from router.dispatch import SequenceJob, SequenceRun
from router.prompts import TextModel
from router.text_choice import Delta, TextChoice
from runtime.clock import Clock, Deadline

MAX_UNREAD_TOKENS = 8192

log = logging.getLogger(__name__)


class Generation:
    """`num_prompt_tokens` counts every prompt once, however many choices it has."""

    def __init__(
        self,
        cluster: Cluster,
        model: TextModel,
        admission: Admission,
        choices: Sequence[Choice],
        options: TextOptions,
        *,
        cache_salt: str | None,
        trace_id: TraceId,
        arrived_at: float,
        deadline: Deadline,
        retries: int,
        clock: Clock,
        streamed: bool,
    ) -> None:
        self._cluster = cluster
        self._model = model
        self._admission = admission
        self._choices = tuple(choices)
        self._options = options
        self._cache_salt = cache_salt
        self._trace_id = trace_id
        self._arrived_at = arrived_at
        self._deadline = deadline
        self._retries = retries
        self._clock = clock
        self._streamed = streamed
        self._prefilled = {choice.leader: asyncio.Event() for choice in choices}
        self._unread: dict[int, Delta] = {}
        self._num_unread = 0
        self._num_open = len(self._choices)
        self._failure: HeadraceError | None = None
        self._news = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()
        leaders = [choice for choice in choices if choice.leader == choice.index]
        self.num_prompt_tokens = sum(len(choice.prompt.token_ids) for choice in leaders)
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self.first_token_s: float | None = None
        self.runs: list[SequenceRun] = []

    async def __aenter__(self) -> Self:
        """Raises Overloaded if too many prompt tokens wait already."""
        held = self._stack.enter_context(self._admission.hold(self.num_prompt_tokens))
        self._tasks = [asyncio.create_task(self._guard(choice, held)) for choice in self._choices]
        return self

    async def __aexit__(self, *error: object) -> None:
        """Returns when every sequence has been told to stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """What is new since the last time, one delta for each choice that has any. Ends with the last choice; raises what
        ended the request, after what came before it."""
        while self._num_open or self._unread or self._failure is not None:
            await self._news.wait()
            self._news.clear()
            if self._unread:
                unread, self._unread, self._num_unread = list(self._unread.values()), {}, 0
                yield unread
                self._news.set()
            elif self._failure is not None:
                raise self._failure

    async def _guard(self, choice: Choice, held: Held) -> None:
        """One choice's task. Its failure is the request's."""
        try:
            await self._run(choice, held)
        except HeadraceError as error:
            self._fail(error)
        except Exception:
            log.exception("request %s failed", self._trace_id)
            self._fail(InternalError("the request failed for a reason of the server's own; its log says more"))

    async def _run(self, choice: Choice, held: Held) -> None:
        prefilled = self._prefilled[choice.leader]
        if choice.leader != choice.index:
            await prefilled.wait()
        run = self._start(choice)
        text = TextChoice(self._model.tokenizer, choice, self._options)
        async with aclosing(run.tokens()) as batches:
            async for batch in batches:
                if not prefilled.is_set():
                    prefilled.set()
                    self._note_prefilled(run, held)
                self._put(text.push(batch))
                if text.stopped_by is not None:
                    break
        end = run.end
        reason, stop_token_id = ("stop", None) if end is None else (end.reason, end.stop_token_id)
        self._num_open -= 1
        if choice.leader == choice.index:
            self.num_cached_tokens += run.num_cached_tokens
        self._put(text.finish(reason, stop_token_id, run.phases(), run.num_cached_tokens))

    def _start(self, choice: Choice) -> SequenceRun:
        job = SequenceJob(
            trace_id=self._trace_id,
            prompt_token_ids=choice.prompt.token_ids,
            sampling=choice.sampling,
            cache_salt=self._cache_salt,
            deadline=self._deadline,
            arrived_at=self._arrived_at,
        )
        run = SequenceRun(self._cluster, job, self._retries, self._clock)
        self.runs.append(run)
        return run

    def _note_prefilled(self, run: SequenceRun, held: Held) -> None:
        if self.first_token_s is None:
            self.first_token_s = run.first_token_s
        if all(event.is_set() for event in self._prefilled.values()):
            held.release()

    def _put(self, delta: Delta) -> None:
        """Raises Cancelled once the client is too far behind: what it does not read is not computed either."""
        self.num_output_tokens += len(delta.tokens)
        self._num_unread += len(delta.tokens)
        if self._streamed and self._num_unread > MAX_UNREAD_TOKENS:
            raise Cancelled(f"the client left more than {MAX_UNREAD_TOKENS} tokens unread")
        earlier = self._unread.get(delta.index)
        self._unread[delta.index] = delta if earlier is None else earlier + delta
        self._news.set()

    def _fail(self, error: HeadraceError) -> None:
        """The first failure counts; the other choices stop."""
        if self._failure is None:
            self._failure = error
            for task in self._tasks:
                if task is not asyncio.current_task():
                    task.cancel()
        self._news.set()
