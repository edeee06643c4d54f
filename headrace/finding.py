"""Finding: one line of `headrace doctor`."""

from typing import Literal, NamedTuple

Verdict = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    check: str
    verdict: Verdict
    detail: str
    cure: str = ""
