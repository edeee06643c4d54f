"""A process that publishes blocks, or runs an embedded server, until it is killed.

python -m tests.support.index_owner (URL | embedded) NUM_BLOCKS
"""

import asyncio
import sys

from kv_store.index.embedded import EmbeddedServer
from kv_store.index.index import RedisIndex
from tests.support.index_servers import addresses_of, owner_named, settings_for, stored_blocks


async def main(url: str, num_blocks: int) -> None:
    if url == "embedded":
        async with EmbeddedServer() as server:
            print(server.pid, flush=True)  # noqa: T201 - the parent reads it
            await asyncio.Event().wait()
    blocks = stored_blocks(addresses_of(num_blocks))
    async with RedisIndex(settings_for(url), owner_named("killed"), lambda: blocks):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
