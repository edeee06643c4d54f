"""Any sequence of calls and restarts, against a dict: the tier serves exactly what it was given and not told to forget."""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kv_store.disk.tier import DiskTier
from kv_store.tiers import StoredBlock
from protocol.kv_blocks import CachedBlock, Tenant
from tests.support.disk_blocks import FINGERPRINT, files_in, hashes, put, served, some_blocks

BLOCK_BYTES = 600
POOL = [*some_blocks(12), *some_blocks(12, seed=1, tenant=Tenant("other"))]
picks = st.lists(st.sampled_from(POOL), max_size=14, unique_by=lambda block: block.block_hash)


class DiskModel(RuleBasedStateMachine):
    """`may_lose`: a tier so small that it evicts. Then what it serves is a part of what it should, and it says what it
    lost."""

    size_bytes = 1 << 20
    may_lose = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.held: dict[bytes, CachedBlock] = {}
        self.forgetting = False
        self.open()

    def open(self) -> None:
        self.tier = DiskTier(self.path, FINGERPRINT, BLOCK_BYTES, self.size_bytes, removed=self.removed)

    def removed(self, gone: list[StoredBlock]) -> None:
        for stored in gone:
            assert self.may_lose or self.forgetting
            self.held.pop(stored.block.block_hash, None)  # unless the call that wrote it gave it up again

    @rule(blocks=picks)
    def write(self, blocks: list[CachedBlock]) -> None:
        num_kept = put(self.tier, blocks)
        assert self.may_lose or num_kept == len(blocks)
        self.held |= {block.block_hash: block for block in blocks if block.block_hash in self.tier}

    @rule(blocks=picks)
    def read(self, blocks: list[CachedBlock]) -> None:
        leading = next((index for index, block in enumerate(blocks) if block.block_hash not in self.held), len(blocks))
        assert self.tier.num_held(hashes(blocks)) == served(self.tier, blocks) == leading

    @rule(blocks=picks)
    def forget(self, blocks: list[CachedBlock]) -> None:
        self.forgetting = True
        self.tier.forget(hashes(blocks))
        self.forgetting = False
        assert not any(block.block_hash in self.tier for block in blocks)

    @rule()
    def clear(self) -> None:
        self.forgetting = True
        self.tier.clear()
        self.forgetting = False
        assert not self.held

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.open()

    @invariant()
    def books_are_right(self) -> None:
        stats = self.tier.stats()
        assert {stored.block.block_hash: stored.block for stored in self.tier.stored()} == self.held
        assert stats.num_blocks == len(self.held) == sum(stats.tenants.values())
        assert stats.used_bytes == sum(path.stat().st_size for path in files_in(self.path)) <= self.size_bytes
        assert stats.counts.checksum_failures == 0
        assert not stats.write_failures

    def teardown(self) -> None:
        self.tier.close()
        self.folder.cleanup()


class SmallDiskModel(DiskModel):
    size_bytes = 24_000
    may_lose = True


_settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestDiskModel = DiskModel.TestCase
TestDiskModel.settings = _settings
TestSmallDiskModel = SmallDiskModel.TestCase
TestSmallDiskModel.settings = _settings
