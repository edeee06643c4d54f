"""CudaDevice: the Device of a CUDA GPU. Streams, events, graphs and pinned memory by torch.cuda's own means.

Nothing here has a second behaviour on the host: what can be tested without a GPU is tested above this seam.
"""

from collections.abc import Sequence

import torch

from engine.cuda.device import Completion, DeviceStream, Replay, Work


class _EventCompletion:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]  # torch types this in part

    def wait(self) -> None:
        self.event.synchronize()


class CudaStream:
    """One CUDA stream of the given device."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch types this in part

    def submit(self, work: Work, after: Sequence[Completion] = ()) -> Completion:
        with torch.cuda.stream(self.stream), torch.inference_mode():
            for completion in after:
                if isinstance(completion, _EventCompletion):
                    self.stream.wait_event(completion.event)
                else:
                    completion.wait()
            work()
        # Not a blocking event: the host spins for the last microseconds of a step rather than being woken late.
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch types this in part
        event.record(self.stream)
        return _EventCompletion(event)


class CudaDevice:
    """The process's current CUDA device. All graphs share one memory pool: they never run at the same time, and what one
    leaves there is copied out before the next begins."""

    def __init__(self) -> None:
        self._torch_device = torch.device("cuda", torch.cuda.current_device())
        self._compute = CudaStream(self._torch_device)
        self._copies = CudaStream(self._torch_device)
        self._graph_pool = torch.cuda.graph_pool_handle()

    @property
    def torch_device(self) -> torch.device:
        return self._torch_device

    @property
    def compute(self) -> DeviceStream:
        return self._compute

    @property
    def copies(self) -> DeviceStream:
        return self._copies

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)

    def pin(self, memory: torch.Tensor) -> None:
        size = memory.numel() * memory.element_size()
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch types this in part
        error = cudart.cudaHostRegister(memory.data_ptr(), size, 0)
        if int(error) != 0:
            raise RuntimeError(f"CUDA cannot pin {size >> 20} MiB of host memory: {error}")

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        if not values.numel():
            return torch.empty_like(values, device=self._torch_device)
        # Pinned blocks come from torch's cache of them, which gives one out again only after the copies from it have ended.
        return values.pin_memory().to(self._torch_device, non_blocking=True)

    def settle(self) -> None:
        torch.cuda.synchronize(self._torch_device)

    def capture(self, work: Work) -> Replay:
        graph = torch.cuda.CUDAGraph()
        self.settle()
        with (
            torch.inference_mode(),
            torch.cuda.graph(
                graph, pool=self._graph_pool, stream=self._compute.stream, capture_error_mode="thread_local"
            ),
        ):
            work()
        return graph.replay
