"""EngineRequest: one sequence handed to the engine. Tokens in; what comes out are events (engine.events)."""

from dataclasses import dataclass
from enum import Enum
from typing import Self

from protocol.ids import RequestId
from protocol.requests import DecodeRequest, PrefillRequest
from protocol.sampling import SamplingParams


class Mode(Enum):
    """How much of the sequence this engine does."""

    GENERATE = "generate"
    """Compute the context and decode to the end."""

    PREFILL_ONLY = "prefill_only"
    """Compute the context, sample one token, keep the blocks until `Engine.release`."""

    IMPORT = "import"
    """Reserve blocks for the context, wait until somebody has filled them (`Engine.activate`), decode to the end."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """The context is prompt plus emitted tokens; the next sampled token has output position len(emitted).

    `deadline_s` counts from submission. `sampling` has been validated against the vocabulary.

    `import_tokens`: so many leading tokens, in whole blocks, somebody may bring before the rest is computed (GENERATE and
    PREFILL_ONLY; an IMPORT brings all). If the prefix cache holds fewer, the request waits with its blocks reserved until
    `Engine.resume` says how many have come.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    mode: Mode = Mode.GENERATE
    emitted_token_ids: tuple[int, ...] = ()
    cache_salt: str | None = None
    deadline_s: float = 3600.0
    import_tokens: int = 0

    @classmethod
    def of(cls, message: PrefillRequest | DecodeRequest, mode: Mode, import_tokens: int = 0) -> Self:
        """What a router asked for, to be done in this mode."""
        return cls(
            request_id=RequestId(message.request_id),
            prompt_token_ids=message.prompt_token_ids,
            sampling=message.sampling,
            mode=mode,
            emitted_token_ids=message.emitted_token_ids,
            cache_salt=message.cache_salt,
            deadline_s=message.deadline_s,
            import_tokens=import_tokens,
        )

    @property
    def num_context_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.emitted_token_ids)
