"""What n-gram speculation gains for one stream: on an edit, whose answer repeats its prompt, and on free chat.

    python -m benchmarks.bench_speculation                what `make bench-speculation` runs; a few minutes
    python -m benchmarks.bench_speculation --quick        fewer tokens and rounds
    python -m benchmarks.bench_speculation --draft-tokens 2 4 8 --json FILE

Greedy, with the built-in model's chat template. Engines with and without speculation live in processes of their own and
answer in turns; ratios are taken within a round. Tokens a second count from the first token to the last, so the prompt
is not in them. Accepted: the share of guessed tokens that were right; tokens a step: what one step yields on average.
"Same tokens": whether the stream is the one without speculation, which in bf16 asks for kernels whose rows do not depend on
how many there are.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.bench_quantization import TEXT
from benchmarks.cluster_load import progress
from benchmarks.engine_bench.child import Child
from benchmarks.engine_bench.contestant import start_engine
from benchmarks.engine_bench.manifest import Manifest, keep_cores
from benchmarks.engine_bench.processor_watch import ProcessorWatch, disturbance
from benchmarks.engine_bench.report import Spread
from router.chat_template import ChatTemplate
from runtime.models.model_files import ModelFiles
from runtime.models.resolve import DEFAULT_MODEL, resolve_model

OFF = 0  # draft tokens of the engine that guesses nothing
SETTING = "scheduler.speculation"
EDIT = "Repeat the following passage word for word, but write the word windmill wherever it says mill.\n\n{passage}"
CHATS = (
    "What should I think about before I plant an apple tree?",
    "Tell me a short story about a lighthouse keeper who learns to cook.",
)


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """`guessed` and `accepted` draft tokens; `steps` that computed the answer, its prompt's included."""

    tokens: tuple[int, ...]
    seconds: float
    guessed: int
    accepted: int
    steps: int

    @property
    def tokens_per_s(self) -> float:
        return (len(self.tokens) - 1) / self.seconds


def tasks_of(files: ModelFiles, text: str) -> list[Task]:
    assert files.chat_template is not None, "the built-in model has one"
    template = ChatTemplate(files.chat_template)
    tokenizer = Tokenizer.from_file(str(files.tokenizer_path))
    passages = text.strip().split("\n\n")[:2]
    questions = {f"edit {number}": EDIT.format(passage=passage) for number, passage in enumerate(passages, 1)}
    questions |= {f"chat {number}": chat for number, chat in enumerate(CHATS, 1)}
    return [
        Task(name, tuple(tokenizer.encode(template.render([{"role": "user", "content": question}])).ids))
        for name, question in questions.items()
    ]


@contextmanager
def engines(draft_tokens: Sequence[int], dtype: str, threads: int, tokens_held: int) -> Iterator[Mapping[int, Child]]:
    """One that guesses nothing, and one for each number of draft tokens."""
    with ExitStack() as life:
        found: dict[int, Child] = {}
        for number in (OFF, *draft_tokens):
            settings: dict[str, object] = {"model.dtype": dtype, "model.threads": threads}
            if number != OFF:
                settings |= {SETTING: "ngram", "scheduler.num_draft_tokens": number}
            progress(f"starting the engine with {number} draft tokens")
            found[number] = life.enter_context(start_engine(f"{number} draft tokens", settings, tokens_held))
            found[number].wait_ready()
        yield found


def ask(child: Child, task: Task, num_tokens: int) -> Answer:
    before = child.ask("load")
    tokens, seconds = child.ask("generate", prompt=task.prompt, max_tokens=num_tokens)
    after = child.ask("load")
    return Answer(
        tokens=tuple(tokens),
        seconds=seconds,
        guessed=after["draft_tokens"] - before["draft_tokens"],
        accepted=_accepted(after) - _accepted(before),
        steps=after["steps"] - before["steps"],
    )


def _accepted(load: Mapping[str, Sequence[int]]) -> int:
    """An entry i of `accepted_drafts` counts the steps in which exactly i guesses were right."""
    return sum(index * times for index, times in enumerate(load["accepted_drafts"]))


@dataclass(frozen=True, slots=True)
class Gain:
    """One engine's answers to one task, round by round, beside those without speculation."""

    task: str
    draft_tokens: int
    speed: Spread
    ratio: Spread
    accepted_share: float
    tokens_per_step: float
    same_tokens: bool

    @classmethod
    def of(cls, task: Task, draft_tokens: int, answers: Sequence[Answer], plain: Sequence[Answer]) -> "Gain":
        last = answers[-1]
        return cls(
            task=task.name,
            draft_tokens=draft_tokens,
            speed=Spread.of([answer.tokens_per_s for answer in answers]),
            ratio=Spread.of([mine.tokens_per_s / off.tokens_per_s for mine, off in zip(answers, plain, strict=True)]),
            accepted_share=last.accepted / last.guessed if last.guessed else 0.0,
            tokens_per_step=len(last.tokens) / last.steps,
            same_tokens=all(mine.tokens == off.tokens for mine, off in zip(answers, plain, strict=True)),
        )

    def row(self) -> str:
        return (
            f"| {self.task} | {self.draft_tokens or 'off'} | {self.speed.show(1)} | {self.ratio.show(2)} "
            f"| {self.accepted_share:.0%} | {self.tokens_per_step:.2f} | {'yes' if self.same_tokens else 'no'} |"
        )


HEADER = (
    "| task | draft tokens | tokens/s | on / off | accepted | tokens a step | same tokens |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


def measure(found: Mapping[int, Child], tasks: Sequence[Task], num_tokens: int, rounds: int) -> list[Gain]:
    """The first round warms up: it fills the prefix cache, so that later ones compute the same steps."""
    answers: dict[tuple[str, int], list[Answer]] = {}
    for number in range(rounds + 1):
        for task in tasks:
            for draft_tokens, child in found.items():
                answer = ask(child, task, num_tokens)
                progress(f"round {number} of {rounds}, {task.name}, {draft_tokens}: {answer.tokens_per_s:.1f} tokens/s")
                if number:
                    answers.setdefault((task.name, draft_tokens), []).append(answer)
    return [
        Gain.of(task, draft_tokens, answers[task.name, draft_tokens], answers[task.name, OFF])
        for task in tasks
        for draft_tokens in found
    ]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, default=160, help="length of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=0, help="cores; 0: all that are there")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = min(options.tokens, 64), 1
    return options


def main() -> None:
    options = parse_options()
    manifest = Manifest.take("benchmarks.bench_speculation")
    threads = keep_cores(options.threads)
    tasks = tasks_of(resolve_model(DEFAULT_MODEL, progress=progress), TEXT.read_text("utf-8"))
    tokens_held = sum(len(task.prompt) + options.tokens for task in tasks)
    with (
        engines(options.draft_tokens, options.dtype, threads, tokens_held) as found,
        ProcessorWatch(lambda: sum(child.cpu_s() for child in found.values()), ()) as watch,
    ):
        gains = measure(found, tasks, options.tokens, options.rounds)
    print("\n".join(["# Speculation", "", *manifest.lines(), ""]))
    print(f"{threads} threads, {options.tokens} tokens an answer\n")
    print("\n".join([*HEADER, *(gain.row() for gain in gains), "", disturbance(watch.taken.foreign)]))
    if options.json:
        report = {"manifest": asdict(manifest), "gains": [asdict(gain) for gain in gains]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
