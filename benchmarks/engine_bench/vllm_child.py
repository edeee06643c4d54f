"""vLLM's CPU build as a contestant, run as a script by the interpreter of vLLM's own environment.

    VLLM_PYTHON vllm_child.py '{"model": FOLDER, "dtype": "bfloat16", "max_num_batched_tokens": 2048, ...}'

The engine runs inside this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) and is stepped by hand, without detokenizing.
Decode contexts are the same at every call, so that vLLM's prefix cache keeps them between rounds; prefill prompts never
repeat.
"""

import json
import random
import sys
import time
from collections.abc import Mapping
from itertools import count

import vllm  # type: ignore[import-not-found]  # another environment's
from child_loop import Operation, serve  # type: ignore[import-not-found]  # this script's own folder is its path

_MAX_CATCH_UP = 400  # tokens that early streams decode while late ones are still being prefilled
_FIRST_TOKEN, _LAST_TOKEN = 100, 40_000


class VllmEngine:
    def __init__(self, options: Mapping[str, object]) -> None:
        self._engine = vllm.LLM(**options).llm_engine
        self._numbers = count()
        self._random = random.Random(1)

    def prefill(self, tokens: int, repeats: int) -> float:
        """Prompt tokens a second: the best of some fresh prompts, one after the other."""
        best_s = float("inf")
        for _ in range(repeats):
            prompt = _prompt(self._random, tokens)
            start = time.perf_counter()
            self._add(prompt, max_tokens=1)
            while self._engine.has_unfinished_requests():
                self._engine.step()
            best_s = min(best_s, time.perf_counter() - start)
        return tokens / best_s

    def decode(self, context: int, streams: int, steps: int) -> float:
        """Output tokens a second of all streams together, over steps in which each of them got a token."""
        request_ids = [
            self._add(_prompt(random.Random(f"stream {stream}"), context), steps + _MAX_CATCH_UP)
            for stream in range(streams)
        ]
        seen = dict.fromkeys(request_ids, 0)
        full: list[float] = []
        while len(full) <= steps:
            num_new = 0
            for output in self._engine.step():
                num_tokens = len(output.outputs[0].token_ids)
                num_new += num_tokens - seen[output.request_id]
                seen[output.request_id] = num_tokens
            full = [*full, time.perf_counter()] if num_new == streams else []
        self._engine.abort_request(request_ids)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return streams * steps / (full[-1] - full[0])

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        request_id = f"bench-{next(self._numbers)}"
        sampling = vllm.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self._engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
        return request_id


def _prompt(source: random.Random, num_tokens: int) -> list[int]:
    return [source.randrange(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(num_tokens)]


def build() -> Mapping[str, Operation]:
    engine = VllmEngine(json.loads(sys.argv[1]))
    return {
        "prefill": engine.prefill,
        "decode": engine.decode,
        "versions": lambda: {"vllm": vllm.__version__},
    }


if __name__ == "__main__":
    serve(build)
