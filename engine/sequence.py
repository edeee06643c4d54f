"""Sequence: one request's life inside the engine. Touched by the engine's thread only.

    WAITING ──▶ RUNNING ──▶ gone            GENERATE; a preempted one goes back to WAITING and starts over
    WAITING ──▶ RUNNING ──▶ HELD ──▶ gone   PREFILL_ONLY; also one that failed, once blocks of it were announced
    WAITING ──▶ IMPORTING ──▶ RUNNING       IMPORT; once running it is like GENERATE
                    └──▶ ORPHANED ──▶ gone  it has failed, but its blocks still belong to the transfer; maybe HELD then
    WAITING ──▶ IMPORTING ──▶ RUNNING       also one whose first tokens somebody may bring (`import_tokens`, or the store)
              RUNNING ──▶ LEAVING ──▶ gone  it has ended, but a step in flight still writes into its blocks

Of its tokens (prompt, emitted, sampled) the first `num_computed` have their KV in the blocks of `block_ids`; steps in
flight compute those up to `num_scheduled` and draw `num_draws_in_flight` more.

While the beginning of its context is being brought, its *front* may be computed here: from both ends to the middle.

    0        num_computed ─▶   front_end        ◀─ brought    import_end       context_end
    |  computed  |  to be computed  |  to be brought  |  then computed  |

When the import ends, what it brought is `arrived_end`; the sequence goes on from there as soon as its front is computed.
"""

from enum import Enum, auto

from engine.request import EngineRequest, Mode
from protocol.ids import BlockHash, RequestId
from protocol.kv_blocks import tenant_of
from protocol.phases import HandoffPhases
from protocol.tokens import SampledToken


class State(Enum):
    WAITING = auto()
    IMPORTING = auto()
    ORPHANED = auto()
    RUNNING = auto()
    HELD = auto()
    LEAVING = auto()
    GONE = auto()


class Timestamps:
    """Instants of the engine's clock; None until they have come. `computed_at`: the end of the last prefill chunk,
    wherever it ran. `decode_started_at`: the start of the step that computed this engine's second token. `landing`: how an
    imported context came here after `computed_at`."""

    __slots__ = ("computed_at", "decode_started_at", "first_scheduled_at", "landing", "submitted_at")

    def __init__(self, submitted_at: float) -> None:
        self.submitted_at = submitted_at
        self.first_scheduled_at: float | None = None
        self.computed_at: float | None = None
        self.decode_started_at: float | None = None
        self.landing = HandoffPhases()


class Sequence:
    """`arrival` orders sequences by age. `context_end` is where prefill ends: all tokens known when it was admitted."""

    def __init__(self, request: EngineRequest, arrival: int, submitted_at: float) -> None:
        self.request = request
        self.arrival = arrival
        self.times = Timestamps(submitted_at)
        self.deadline_at = submitted_at + request.deadline_s
        self.state = State.WAITING
        self.token_ids: list[int] = [*request.prompt_token_ids, *request.emitted_token_ids]
        self.output_token_ids: list[int] = list(request.emitted_token_ids)
        self.context_end = len(self.token_ids)
        self.import_end = self.context_end if request.mode is Mode.IMPORT else request.import_tokens
        """Leading tokens that may come from elsewhere; 0 as soon as they have, or need not."""
        self.load_end = 0
        """Of those, leading tokens that the store behind the prefix cache said it could bring."""
        self.front_end = 0
        """Leading tokens that are computed here though an import is under way or has just ended; 0 if none are."""
        self.arrived_end = 0
        """Tokens from `front_end` up to here have come from elsewhere, while the front is still computed; otherwise 0."""
        self.admitted_by: int | None = None
        """Its admission is put off no more when so many blocks have been saved; None if it has not been put off."""
        self.num_computed = 0
        self.has_penalties = request.sampling.has_penalties
        self.num_steps_in_flight = 0
        self.num_tokens_in_flight = 0
        self.num_draws_in_flight = 0
        self.block_ids: list[int] = []
        self.root_hash: BlockHash | None = None
        """The parent of its first block, once that is hashed."""
        self.block_hashes: list[BlockHash] = []
        self.tenant = tenant_of(request.cache_salt)
        self.num_indexed_blocks = 0
        """Leading blocks that have been offered to the prefix cache."""
        self.num_cached_tokens: int | None = None
        """Tokens that the prefix cache and others saved at the first admission; None before."""
        self.preempted = False
        """Ever."""
        self.num_announced_blocks = 0
        """Of PREFILL_ONLY: leading blocks reported as final."""
        self.released_early = False
        """Of PREFILL_ONLY: nobody wants the blocks any more, though it still runs, or an import of it does."""

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def num_sampled(self) -> int:
        """Output tokens beyond those the request came with."""
        return len(self.output_token_ids) - len(self.request.emitted_token_ids)

    @property
    def awaits_import(self) -> bool:
        """All or the beginning of its context comes from elsewhere; it takes blocks but no compute to admit."""
        return self.import_end > 0

    @property
    def computes_nothing(self) -> bool:
        """Its whole context comes from elsewhere, and its first token too."""
        return self.import_end == self.context_end

    @property
    def num_scheduled(self) -> int:
        """Tokens whose KV is computed, or will be by the steps in flight."""
        return self.num_computed + self.num_tokens_in_flight

    @property
    def decoding(self) -> bool:
        """Its whole context is computed, or will be by the steps in flight."""
        return self.num_scheduled >= self.context_end

    @property
    def computing(self) -> bool:
        """The results of its steps count."""
        return self.state is State.RUNNING or self.state is State.IMPORTING

    @property
    def prefill_end(self) -> int:
        """How far its context may be computed for now."""
        return self.front_end or self.context_end

    @property
    def num_uncomputed_context(self) -> int:
        """Tokens of its context that are to be computed here."""
        brought = max(self.import_end, self.arrived_end) - max(self.num_computed, self.front_end)
        return max(0, self.context_end - self.num_computed - max(0, brought))

    @property
    def exported(self) -> bool:
        """A reader knows of its blocks, and has not been reported to be done with them."""
        return self.num_announced_blocks > 0 and not self.released_early

    @property
    def preemptable(self) -> bool:
        """What has been announced to a reader must stay where it is."""
        return self.state is State.RUNNING and self.request.mode is not Mode.PREFILL_ONLY

    def append(self, token: SampledToken) -> None:
        self.token_ids.append(token.token_id)
        self.output_token_ids.append(token.token_id)

    def arrive(self, end: int) -> None:
        """An import has ended: tokens up to `end` have come, those of the front not among them."""
        self.import_end = 0
        self.arrived_end = end if end > self.front_end else 0
        if not self.arrived_end:
            self.front_end = 0
        self.meet()

    def meet(self) -> int:
        """Go on behind what has come, if all before it is computed. Returns by how many tokens that is further."""
        if not self.arrived_end or self.num_computed < self.front_end:
            return 0
        num_tokens = max(0, self.arrived_end - self.num_computed)
        self.num_computed += num_tokens
        self.front_end = self.arrived_end = 0
        return num_tokens

    def start_over(self) -> None:
        """Preempted: everything known so far is the context to recompute. Its blocks have been released."""
        self.state = State.WAITING
        self.preempted = True
        self.context_end = len(self.token_ids)
        self.front_end = self.arrived_end = self.load_end = 0
        self.num_computed = 0
        self.num_indexed_blocks = 0
