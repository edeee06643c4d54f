"""Made ready once, before the processes start: the model on disk and the native kernels.

Otherwise each node would convert or compile the same thing, or wait for another that does. Both run in processes of their
own, which can be stopped at any moment, and whose memory is gone when they are done.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from headrace.child import Child
from protocol.errors import ConfigError

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Where a model lies on this machine, and what clients call it."""

    folder: Path
    name: str


class ModelReport(msgspec.Struct, frozen=True):
    """What `headrace model --json` prints."""

    name: str
    folder: str
    max_model_len: int
    vocab_size: int


class ProbeReport(msgspec.Struct, frozen=True):
    """What `headrace doctor --probe` prints. `cure` says how to mend what is not ok."""

    ok: bool
    detail: str
    cure: str = ""


async def prepare_model(model: str, weights: bool, report: Report) -> PreparedModel:
    """Fetch or convert; `report` hears of steps that take time. Raises ConfigError with the command's own words."""
    arguments = ["model", model, "--json", *([] if weights else ["--no-weights"])]
    lines = await _run("model", arguments, report)
    for line in reversed(lines):
        with suppress(msgspec.DecodeError):
            found = msgspec.json.decode(line, type=ModelReport)
            return PreparedModel(Path(found.folder), found.name)
    raise ConfigError(f"cannot prepare the model {model}: " + ("\n".join(lines[-5:]) or "no output"))


async def run_probe(name: str) -> ProbeReport:
    """One check of `headrace.probe`. One that dies is one that failed."""
    lines = await _run(name, ["doctor", "--probe", name], None)
    for line in reversed(lines):
        with suppress(msgspec.DecodeError):
            return msgspec.json.decode(line, type=ProbeReport)
    return ProbeReport(ok=False, detail=lines[-1] if lines else "the check ended without a word")


async def _run(name: str, arguments: list[str], report: Report | None) -> list[str]:
    def on_line(line: str) -> None:
        if report is not None and not line.startswith("{"):  # what programs read is not for people
            report(line)

    async with Child(name, arguments, {}, on_line=on_line) as child:
        await child.wait()
        return child.tail(50)


def run_probes(names: list[str]) -> dict[str, ProbeReport]:
    """Several checks, one after the other."""

    async def run_all() -> dict[str, ProbeReport]:
        return {name: await run_probe(name) for name in names}

    return asyncio.run(run_all())
