"""Scene: what the nodes of a simulation stand in: its clock, its network, its dice, and whoever hears what is wrong."""

import asyncio
import random
from collections import Counter
from collections.abc import Coroutine
from typing import Any, Protocol

from kv_transfer.memory.arena import HostArena
from kv_transfer.memory.staging import InPlaceStaging
from kv_transfer.transports.inproc import Course
from runtime.clock import Clock
from runtime.node_config import TransferOptions
from tests.support.memory_network import MemoryNetwork

CLUSTER_KEY = "a-cluster-key-for-tests"


class Scene(Protocol):
    rng: random.Random
    network: MemoryNetwork
    options: TransferOptions
    outcomes: Counter[str]

    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...

    @property
    def clock(self) -> Clock: ...

    def expect(self, condition: bool, otherwise: str) -> None:
        """Note what is wrong: callbacks of the product must survive whatever they raise, so that would not be heard."""
        ...

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something that may take its time."""
        ...

    def make_staging(self, arena: HostArena) -> InPlaceStaging: ...

    def draw_course(self, num_blocks: int) -> Course:
        """How the next transfer goes."""
        ...
