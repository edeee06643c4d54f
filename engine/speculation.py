"""Speculation: guess the next tokens of a sequence, and let one step check them all.

A drafter guesses; the step runs the guesses behind the sequence's last token and draws after each. Every draw is a function
of (logits, sampling parameters, seed, output position) and nothing else, so a draw behind right guesses *is* the token that
one step at a time would have drawn there, greedy or sampled. Accepting tokens while they equal the guesses therefore gives
the very stream that there would be without guesses, and so its very distribution: there is no rejection sampling to get wrong.

Sequences with penalties are not guessed for, because their draws depend on the output before them.
"""

from collections.abc import Sequence as TokenIds
from dataclasses import dataclass
from typing import Protocol

from engine.config import SpeculationConfig
from engine.sequence import Sequence
from protocol.ids import RequestId

MAX_PAUSE = 32
"""Tokens, at most, that a sequence goes without guesses after guesses that were all wrong."""

INDEXED_PER_STEP = 1024
"""Tokens that prompt lookup indexes in one step, of all sequences together: one to two milliseconds. Long prompts are
indexed over several steps, those that are asked for first before the others."""

INDEXED_PER_SEQUENCE = 16_384
"""Last tokens of a sequence that prompt lookup knows at most. They take 5 MiB with n-grams of 2 to 4 tokens, and 10 MiB with
all those of 1 to 8."""


class Drafter(Protocol):
    """Guesses what follows. Called from the engine's thread, once a step and sequence: it must be quick."""

    def begin_step(self) -> None:
        """The proposals that follow, until the next call, are for one step: a bound on the work of a step starts anew."""
        ...

    def propose(self, request_id: RequestId, token_ids: TokenIds[int], max_drafts: int) -> list[int]:
        """At most `max_drafts` tokens that may follow; none if nothing comes to mind. `token_ids` is the sequence so far,
        which has only grown since the last call."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """The sequence has left. Unknown ids are no error."""
        ...


class NgramDrafter:
    """Prompt lookup: what followed the last time that the sequence's last n tokens stood together, for the largest n in
    [min_n, max_n] that finds something.

    An index from n-grams to the place behind their latest occurrence grows with the sequence, so that a guess costs
    O(max_n). It holds hashes; what it finds is compared before it is believed. All sequences of a step share
    INDEXED_PER_STEP; one whose index lags behind is guessed for from what is indexed. `max_indexed`, 2 or
    more: tokens of a sequence that are known at most, the last ones, and half as many at least once the index has caught up;
    what followed before them is not found.
    """

    def __init__(self, min_n: int, max_n: int, max_indexed: int = INDEXED_PER_SEQUENCE) -> None:
        self._sizes = range(min_n, max_n + 1)
        self._max_indexed = max_indexed
        self._budget = INDEXED_PER_STEP
        self._indexes: dict[RequestId, _NgramIndex] = {}

    def begin_step(self) -> None:
        self._budget = INDEXED_PER_STEP

    def propose(self, request_id: RequestId, token_ids: TokenIds[int], max_drafts: int) -> list[int]:
        index = self._indexes.get(request_id)
        if index is None:
            index = self._indexes[request_id] = _NgramIndex(self._sizes, self._max_indexed)
        self._budget -= index.extend(token_ids, self._budget)
        return index.continuation(token_ids, max_drafts)

    def forget(self, request_id: RequestId) -> None:
        self._indexes.pop(request_id, None)


class _NgramIndex:
    """Where the n-grams of one sequence were last seen. Those that end the sequence are not in it: nothing follows them.

    It is kept in two parts of up to `max_places` // 2 consecutive places each. When the recent part is full it becomes the
    older one, and what was older is dropped: forgetting costs nothing, and neither part outgrows its share.
    """

    def __init__(self, sizes: range, max_places: int) -> None:
        self._sizes = sizes
        self._part = max_places // 2
        self._recent: dict[int, int] = {}
        self._older: dict[int, int] = {}
        self._end = 1
        """The next place to index."""

    def extend(self, token_ids: TokenIds[int], budget: int) -> int:
        """Index the next places, `budget` at most. Returns how many."""
        oldest = ((len(token_ids) - 1) // self._part - 1) * self._part
        if oldest > self._end:
            # It would be dropped before the index has caught up; so would all that is in it.
            self._older, self._recent, self._end = {}, {}, oldest
        places = range(self._end, min(len(token_ids), self._end + budget))
        for place in places:
            if place % self._part == 0:
                self._older, self._recent = self._recent, {}
            for size in self._sizes:
                if size > place:
                    break
                self._recent[hash(tuple(token_ids[place - size : place]))] = place
        self._end += len(places)
        return len(places)

    def continuation(self, token_ids: TokenIds[int], count: int) -> list[int]:
        for size in reversed(self._sizes):
            if size >= len(token_ids):
                continue
            last = token_ids[-size:]
            key = hash(tuple(last))
            place = self._recent.get(key, self._older.get(key))
            if place is not None and token_ids[place - size : place] == last:
                return list(token_ids[place : place + count])
        return []


@dataclass(slots=True)
class _Pace:
    """How many tokens to guess for one sequence, and for how many tokens of it not to guess at all."""

    num_drafts: int
    pause: int = 0
    next_pause: int = 1


class Speculator:
    """Decides for whom and how far to guess. Guesses that are right double the length of the next ones up to the configured
    one; guesses that are all wrong halve it, and are followed by a pause that doubles each time, up to MAX_PAUSE."""

    def __init__(self, config: SpeculationConfig, drafter: Drafter) -> None:
        self._max_drafts = config.num_draft_tokens
        self._drafter = drafter
        self._paces: dict[RequestId, _Pace] = {}
        self.num_accepted_of_step = [0] * (config.num_draft_tokens + 1)
        """[i]: how many times exactly i guesses of a step and sequence were right."""
        self.num_drafts = 0

    def begin_step(self) -> None:
        """A step is being planned; the proposals that follow are for it."""
        self._drafter.begin_step()

    def eager(self, sequence: Sequence) -> bool:
        """Whether guesses are wanted as soon as the sequence's last token is known."""
        if sequence.has_penalties:
            return False
        pace = self._paces.get(sequence.request_id)
        return pace is None or pace.pause == 0

    def propose(self, sequence: Sequence, room: int) -> list[int]:
        """Guesses for an eager sequence whose tokens are all known; `room` of them at most."""
        pace = self._paces.get(sequence.request_id)
        wanted = min(room, self._max_drafts if pace is None else pace.num_drafts)
        if wanted < 1:
            return []
        drafts = self._drafter.propose(sequence.request_id, sequence.token_ids, wanted)
        assert len(drafts) <= wanted, f"{len(drafts)} guesses, {wanted} were wanted"
        return drafts

    def advanced(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """The sequence has got its next tokens; of `num_drafts` guesses, `num_accepted` were right."""
        pace = self._paces.setdefault(sequence.request_id, _Pace(self._max_drafts))
        if num_drafts == 0:
            pace.pause = max(0, pace.pause - 1)
            return
        self.num_drafts += num_drafts
        self.num_accepted_of_step[num_accepted] += 1
        if num_accepted:
            pace.num_drafts = min(self._max_drafts, 2 * num_accepted)
            pace.next_pause = 1
        else:
            pace.num_drafts = max(1, pace.num_drafts // 2)
            pace.pause = pace.next_pause
            pace.next_pause = min(MAX_PAUSE, 2 * pace.next_pause)

    def forget(self, request_id: RequestId) -> None:
        self._paces.pop(request_id, None)
        self._drafter.forget(request_id)
