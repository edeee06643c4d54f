"""Decode steps of an 8B-shaped model on a GPU beside the time that reading its bytes takes, all measured in this run.

    python -m benchmarks.bench_gpu_engine [--batch 64] [--contexts 1024 4096] [--layers 32]

The model has the shape of Llama-3.1-8B and random weights; sampling is greedy. The floor is bf16 weights (without the embedding
table, of which a step reads a row a token) and the KV of all contexts, at the bandwidth of a copy. Steps are launched
operation by operation ("eager") or as captured graphs, and either collected one by one or with the next one in flight
("ahead"), in turns; each line is the best of several repeats with the spread. Without a CUDA device: says so and exits 2.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_device import measure_copy, the_gpu
from engine.cuda.cuda_device import CudaDevice
from engine.cuda.device import Device
from engine.cuda.limits import BatchLimits
from engine.cuda.runner import CudaRunner
from engine.model.config import ModelConfig
from engine.model.llama import LlamaModel
from engine.model.rope import RopeConfig
from engine.runner import PENDING, LaunchedStep, ScheduledChunk, StepPlan
from protocol.ids import RequestId
from protocol.kv_layout import KVLayout
from protocol.sampling import SamplingParams

BLOCK_SIZE = 16
WARM_UP_STEPS, STEPS, REPEATS = 8, 32, 5
GREEDY = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0)


def llama_8b(num_layers: int) -> ModelConfig:
    rope = RopeConfig(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=num_layers,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=rope,
        tied_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=(0,) * num_layers,
    )


class RandomWeights:
    """A WeightSource that makes tensors where they are used: eight billion numbers take a host minutes."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)
        self.num_bytes = 0

    def read(self, name: str, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if not name.startswith("model.embed_tokens"):
            self.num_bytes += tensor.nbytes
        return tensor.normal_(0.0, shape[-1] ** -0.5, generator=self._generator)

    def finish(self, ignored: frozenset[str] = frozenset()) -> None:
        """Nothing can be left over."""


@dataclass(frozen=True)
class Bench:
    """A runner's batch of sequences, all of one context length, which decode on and on."""

    runner: CudaRunner
    batch: int
    context: int

    def plans(self, num_steps: int) -> Iterator[StepPlan]:
        """Every token but the first is one that only the device knows."""
        blocks = self.runner.layout.num_blocks_for(self.context + num_steps)
        for step in range(num_steps):
            yield StepPlan(
                tuple(
                    ScheduledChunk(
                        request_id=RequestId(f"{row}"),
                        token_ids=(PENDING if step else row,),
                        start=self.context - 1 + step,
                        block_ids=range(row * blocks, row * blocks + blocks),
                        samples=True,
                        output_position=step,
                        sampling=GREEDY,
                        prompt_token_ids=(),
                        output_token_ids=(),
                    )
                    for row in range(self.batch)
                )
            )

    def step_time_s(self, *, ahead: bool) -> float:
        """Seconds a step, after some that do not count."""
        in_flight: list[LaunchedStep] = []
        started_at = 0.0
        for step, plan in enumerate(self.plans(WARM_UP_STEPS + STEPS)):
            if step == WARM_UP_STEPS:
                while in_flight:
                    in_flight.pop(0).result()
                started_at = time.perf_counter()
            in_flight.append(self.runner.launch(plan))
            if len(in_flight) > ahead:
                in_flight.pop(0).result()
        while in_flight:
            in_flight.pop(0).result()
        elapsed_s = time.perf_counter() - started_at
        for row in range(self.batch):
            self.runner.forget(RequestId(f"{row}"))
        return elapsed_s / STEPS


def make_runner(
    model: LlamaModel, config: ModelConfig, dtype: torch.dtype, batch: int, max_context: int, device: Device
) -> CudaRunner:
    assert dtype in (torch.bfloat16, torch.float32)
    layout = KVLayout(
        model="random",
        revision="",
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=BLOCK_SIZE,
        rope=config.rope.canonical_text(),
    )
    num_blocks = batch * layout.num_blocks_for(max_context)
    kv_cache = torch.zeros((num_blocks, *layout.block_shape), dtype=dtype, device=device.torch_device)
    limits = BatchLimits(max_num_seqs=batch, max_num_batched_tokens=max(512, batch))
    return CudaRunner(model, layout, kv_cache, max_context, limits, device)


def compare(runner: CudaRunner, batch: int, contexts: Sequence[int], weight_bytes: int, bandwidth: float) -> None:
    """Print every context and way of launching, in turns. Captures half-way: a captured runner is eager no more."""
    times: dict[tuple[int, str], list[float]] = {}
    for way in ("eager", "graph"):
        if way == "graph":
            runner.capture(print)
        for _ in range(REPEATS):
            for context in contexts:
                for ahead in (False, True):
                    bench = Bench(runner, batch, context)
                    key = (context, f"{way}{', ahead' if ahead else ''}")
                    times.setdefault(key, []).append(bench.step_time_s(ahead=ahead))
    for (context, way), repeats in sorted(times.items()):
        kv_bytes = batch * (context + WARM_UP_STEPS + STEPS // 2) * runner.layout.token_bytes
        floor_s = (weight_bytes + kv_bytes) / bandwidth
        best, spread = min(repeats), max(repeats) / min(repeats) - 1
        print(
            f"batch {batch}, context {context:6d}, {way:12s} {best * 1e3:8.2f} ms a step (+{spread:.0%})"
            f"   floor {floor_s * 1e3:7.2f} ms   ratio {best / floor_s:5.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Decode steps of an 8B-shaped model on a GPU.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--layers", type=int, default=32, help="fewer for a GPU with little memory")
    options = parser.parse_args()
    the_gpu()
    device, dtype, config = CudaDevice(), torch.bfloat16, llama_8b(options.layers)
    bandwidth = measure_copy(device.torch_device)
    weights = RandomWeights(device.torch_device, dtype)
    max_context = max(options.contexts) + WARM_UP_STEPS + STEPS
    with torch.inference_mode():
        model = LlamaModel.load(config, weights, max_context)
        runner = make_runner(model, config, dtype, options.batch, max_context, device)
    print(
        f"{torch.cuda.get_device_name(device.torch_device)}, copy {bandwidth / 1e9:.0f} GB/s, torch {torch.__version__}"
    )
    compare(runner, options.batch, options.contexts, weights.num_bytes, bandwidth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
