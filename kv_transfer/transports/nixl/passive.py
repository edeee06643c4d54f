"""PassiveAgent: the NIXL agent that peers know. It lets them reach the arena, and knows none of them.

A process has two agents. Peers add the metadata of this one, and read and write through it; its own reads and writes go
through the active agent (agent.py), whose metadata nobody gets. So no two agents ever know each other, though every
node is owner and reader at once: of two that do, one crashes when the other's process dies.

The library's progress thread does all of the work here, as UCX needs its host's help for some transports (TCP).
"""

from types import ModuleType
from typing import Any

from kv_transfer.transports.nixl.blocks import NixlBlocks
from kv_transfer.transports.nixl.library import make_agent, register

PROGRESS_DELAY_US = 10_000
"""How long the progress thread sleeps where nothing wakes it; what a peer sends does. The library's own default of 0
makes it spin: one core, idle. 10 ms cost 0.5 % of one, and transfers over TCP are as fast as with 1 ms."""


class PassiveAgent:
    """Made at start. The blocks are registered once and must outlive this. Raises ConfigError without a working NIXL."""

    def __init__(self, api: ModuleType, name: str, blocks: NixlBlocks) -> None:
        self.name = name
        self._agent: Any = make_agent(api, name, progress_delay_us=PROGRESS_DELAY_US)
        register(api, self._agent, blocks)
        self.metadata: bytes = self._agent.get_agent_metadata()

    def close(self) -> None:
        """Peers' transfers in flight fail at their end. Blocking: joins the progress thread. Idempotent."""
        self._agent = None  # the last reference: the agent ends here
