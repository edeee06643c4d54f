"""Device: where the GPU step's work is queued. The seam between what is decided on the host and what runs later.

Work is submitted to a stream and runs behind everything submitted to it before; the host goes on at once and learns of the
end from a Completion. Two implementations ship: engine.cuda.cuda_device.CudaDevice, over CUDA streams, events, graphs and
pinned memory, and HostDevice here, over a plain CPU, with which the same runner is proven without a GPU.

The rules that make a program right on both:

- what `work` reads of host memory may be read at any time before its completion, so it must not change until then;
- what `work` reads of Python is read at submission on CUDA and perhaps later on the host: it is bound, never looked up;
- captured work reads and writes tensors that live as long as the capture, and decides nothing.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Work = Callable[[], None]
Replay = Callable[[], None]


class Completion(Protocol):
    """One submission's end. What its work raised asynchronously is raised by `wait` (on CUDA, perhaps by a later call)."""

    def done(self) -> bool:
        """Whether it has ended. Never waits."""
        ...

    def wait(self) -> None:
        """Until it has ended; the calling thread sleeps or spins meanwhile."""
        ...


class DeviceStream(Protocol):
    """Submissions run one after another, in order."""

    def submit(self, work: Work, after: Sequence[Completion] = ()) -> Completion:
        """Queue `work` behind all that was submitted before and behind `after`, which may be of other streams. An
        exception of `work` itself (on the host, while queueing) is raised here or, if it runs late, by `wait`."""
        ...


class Device(Protocol):
    """One device with a stream for steps and one for copies beside them. Streams may be used by several threads at once."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def compute(self) -> DeviceStream: ...

    @property
    def copies(self) -> DeviceStream: ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Host memory, zeroed, that the device copies from and to without the host's help."""
        ...

    def pin(self, memory: torch.Tensor) -> None:
        """Make of this host memory, dense, what `pinned` returns, until the process ends. Raises RuntimeError where the
        system does not allow that."""
        ...

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """A device copy of a host tensor, queued; called by work. The host tensor must not change before its completion."""
        ...

    def settle(self) -> None:
        """Wait until nothing is under way on any stream: what was just allocated and filled may then be used on each."""
        ...

    def capture(self, work: Work) -> Replay:
        """Record what `work` does on the device, without doing it. The returned function, called by work on the compute
        stream, does it again: the same operations on the same tensors. Nothing may be in flight; `work` has run before."""
        ...


class HostStream:
    """Runs work on the calling thread: at once, or `late`, when somebody waits for it or for something behind it.

    Late is how a GPU behaves towards the host: by then whatever should not have been touched has been. One thread works at a
    time; `turn` is the device's, because work of one stream may wait for that of another.
    """

    def __init__(self, turn: threading.RLock, *, late: bool) -> None:
        self._turn = turn
        self._late = late
        self._queue: deque[_HostCompletion] = deque()

    def submit(self, work: Work, after: Sequence[Completion] = ()) -> Completion:
        completion = _HostCompletion(self, work, after)
        with self._turn:
            self._queue.append(completion)
            if not self._late:
                self.run_until(completion)
        return completion

    def run_until(self, completion: "_HostCompletion") -> None:
        """Run what is queued, in order, up to and including `completion`."""
        with self._turn:
            while not completion.done():
                self._queue.popleft().run()


class _HostCompletion:
    def __init__(self, stream: HostStream, work: Work, after: Sequence[Completion]) -> None:
        self._stream = stream
        self._work = work
        self._after = after
        self._done = False

    def done(self) -> bool:
        return self._done

    def wait(self) -> None:
        self._stream.run_until(self)

    def run(self) -> None:
        try:
            for completion in self._after:
                completion.wait()
            with torch.inference_mode():
                self._work()
        finally:  # also if it raises: on a GPU, too, the next work does not wait for a better outcome
            self._done = True


class HostDevice:
    """A Device that is this machine's CPU, for tests of everything above it. Captured work is run again as it is, its
    inputs not rebuilt: a replay that depended on anything but tensors that persist gives an older step's answer."""

    def __init__(self, *, late: bool = False) -> None:
        turn = threading.RLock()
        self._compute = HostStream(turn, late=late)
        self._copies = HostStream(turn, late=late)

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def compute(self) -> DeviceStream:
        return self._compute

    @property
    def copies(self) -> DeviceStream:
        return self._copies

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)

    def pin(self, memory: torch.Tensor) -> None:
        """A CPU reaches all of its memory."""

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def settle(self) -> None:
        for stream in (self._compute, self._copies):
            stream.submit(nothing).wait()

    def capture(self, work: Work) -> Replay:
        return work


def nothing() -> None:
    """Work that marks a place in a stream."""
