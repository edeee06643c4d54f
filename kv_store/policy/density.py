"""DensityPolicy: what is given up first is what is least likely to be wanted again for the room and the time that it takes.

It learns while it serves: how long people take before they come back to a conversation, depending on how often they have come
back and how much they added; how often shared heads are wanted. Room goes where it brings the most hits per block and
second (kv_store.policy.reuse_model). So a tier that turns over faster than people answer keeps the conversations that
are about to be continued, in place of a little of everybody's; and a system prompt stays.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kv_store.policy.chains import HeldBlocks, Pick
from kv_store.policy.policy import steps_of
from kv_store.policy.ranked_buckets import RankedBuckets
from kv_store.policy.reuse_model import Floats, ReuseModel
from kv_store.policy.stretches import FAMILIES, Stretch
from protocol.ids import BlockHash
from protocol.kv_blocks import CachedBlock

MIN_GHOSTS = 65_536
GHOSTS_PER_BLOCK = 4
"""Addresses remembered of blocks that are not held: about 200 bytes each. A model learns nothing of gaps that are longer
than its memory, and a small tier turns over in seconds."""

MIN_FIT_INTERVAL = 128
"""Requests between two fits of the model; more where more stretches wait, so that fitting stays a small constant for each."""

FIT_STEPS = 8
"""Requests that a fit takes at least: so much earlier the first one begins."""

RUNS_A_STEP = 16
"""Stretches of a chain that are settled in one step; each may have a life that ends."""

FIT_PORTION = 512
"""Stretches that one request counts for the fit that is under way, and buckets that it lets grow older: its own work, and what
waits for it, is bounded."""


class DensityPolicy:
    def __init__(self, capacity_blocks: int) -> None:
        self._max_ghosts = max(MIN_GHOSTS, GHOSTS_PER_BLOCK * capacity_blocks)
        self._held = HeldBlocks()
        self._owners: dict[BlockHash, Stretch] = {}
        self._ghosts: OrderedDict[BlockHash, None] = OrderedDict()
        self._stretches: OrderedDict[Stretch, None] = OrderedDict()
        self._parked: dict[BlockHash, Stretch] = {}
        self._model = ReuseModel(FAMILIES)
        self._buckets = RankedBuckets(self._model)
        self._num_until_fit = MIN_FIT_INTERVAL - FIT_STEPS
        self._num_fits = 0
        self._fitting: Iterator[None] = iter(())
        self._now = 0.0

    @property
    def num_ghosts(self) -> int:
        """At most the larger of MIN_GHOSTS and GHOSTS_PER_BLOCK times the capacity."""
        return len(self._ghosts)

    def wanted(self, blocks: Sequence[CachedBlock], num_held: int, now: float) -> Iterator[None]:  # noqa: ARG002
        if not blocks:
            return
        self._now = now
        self._go_on_fitting()
        self._buckets.grow_older(now, FIT_PORTION)
        runs: list[tuple[Stretch, list[CachedBlock]]] = []
        for step in steps_of(blocks):
            if not self._read(step, runs):
                break
            if len(step) < len(blocks):
                yield
        own = yield from self._divide(blocks, runs)
        for step in steps_of(blocks):
            for block in step:
                block_hash = BlockHash(block.block_hash)
                owner = self._owners.get(block_hash)
                if owner is None or owner.kind != "shared":
                    self._give(block_hash, own)
                if block_hash in self._ghosts:
                    self._ghosts.move_to_end(block_hash)
                elif block_hash not in self._held:
                    self._ghosts[block_hash] = None
            if own.num_known:
                self._begin(own)
            self._forget_ghosts()
            yield

    def added(self, blocks: Sequence[CachedBlock], now: float) -> None:
        self._now = now
        stranger: Stretch | None = None
        touched: dict[Stretch, None] = {}
        for block in blocks:
            if not self._held.add(block):
                continue
            block_hash = BlockHash(block.block_hash)
            self._ghosts.pop(block_hash, None)
            if block_hash not in self._owners:
                # From another node, or last wanted so long ago that it is forgotten.
                if stranger is None:
                    stranger = Stretch("own", 1, block.position, block.position, now)
                stranger.end = block.position + 1
                self._give(block_hash, stranger)
            owner = self._owners[block_hash]
            owner.hold(block_hash, block.position)
            touched[owner] = None
        if stranger is not None:
            self._begin(stranger)
        for stretch in touched:
            self._place(stretch)

    def removed(self, block_hashes: Sequence[BlockHash]) -> None:
        for block_hash in block_hashes:
            if block_hash not in self._held:
                continue
            freed = self._held.discard(block_hash)
            self._ghosts[block_hash] = None
            stretch = self._owners[block_hash]
            del stretch.held[block_hash]
            if not stretch.held or stretch.parked_at == block_hash:
                self._place(stretch)
            if freed is not None and freed in self._parked:
                self._place(self._parked[freed])
        self._forget_ghosts()

    def victims(self, count: int, now: float, may_evict: Callable[[BlockHash], bool]) -> list[BlockHash]:
        self._now = now
        self._buckets.grow_older(now)
        pick = Pick(self._held, count, may_evict)
        aside: list[Stretch] = []
        while not pick.is_full and (stretch := self._buckets.first()) is not None:
            num_before = len(pick.chosen)
            stopped_at = self._take_from(stretch, pick)
            if pick.is_full:
                break
            self._buckets.take_out(stretch)
            is_parked = False
            if stopped_at is not None and pick.is_continued(stopped_at):
                is_parked = True
                stretch.parked_at = stopped_at
                self._parked[stopped_at] = stretch
            if not is_parked or len(pick.chosen) > num_before:
                # What it has just given it still has, until `removed`.
                aside.append(stretch)
        for stretch in aside:
            self._place(stretch)
        return pick.chosen

    def _take_from(self, stretch: Stretch, pick: Pick) -> BlockHash | None:
        """Take its blocks from the end. The block that could not go, if one could not."""
        for block_hash in reversed(stretch.from_the_end()):
            if pick.is_full:
                break
            if block_hash not in stretch.held or pick.has(block_hash):
                continue
            if pick.is_continued(block_hash) or not pick.allows(block_hash):
                return block_hash
            freed = pick.take(block_hash)
            if freed is not None and freed in self._parked:
                self._place(self._parked[freed])
        return None

    def _read(self, blocks: Sequence[CachedBlock], runs: list[tuple[Stretch, list[CachedBlock]]]) -> bool:
        """Add what is known of these, by whose it is, to the runs of a chain that they continue. False if one is not known."""
        for block in blocks:
            owner = self._owners.get(BlockHash(block.block_hash))
            if owner is None:
                return False
            if not runs or runs[-1][0] is not owner:
                runs.append((owner, []))
            runs[-1][1].append(block)
        return True

    def _divide(
        self, blocks: Sequence[CachedBlock], runs: Sequence[tuple[Stretch, list[CachedBlock]]]
    ) -> Generator[None, None, Stretch]:
        """Settle what this request means for the stretches that it shares a head with. The stretch that is its own, which has no
        blocks yet."""
        num_known = sum(len(run) for _, run in runs)
        first_new = blocks[0].position + num_known
        own = Stretch("own", 1, first_new, blocks[-1].position + 1, self._now)
        for number, (owner, run) in enumerate(runs, start=1):
            if number % RUNS_A_STEP == 0:
                yield
            if owner not in self._stretches:
                continue  # it has ended since
            if owner.kind == "shared":
                self._model.ended(owner.class_id, self._now - owner.last_wanted, returned=True)
                yield from self._share(owner, run)
            elif run[-1].position + 1 < first_new or owner.is_continued_by(first_new):
                self._model.ended(owner.class_id, self._now - owner.last_wanted, returned=True)
                own.num_uses = owner.num_uses + 1
                if num_known == len(blocks):
                    own.first_new = owner.first_new  # asked once more, or generated anew
                owner.kind = "abandoned"
                self._begin(owner)
            else:
                yield from self._share(owner, run)
                owner.first_new = max(owner.first_new, first_new)
        return own

    def _share(self, owner: Stretch, run: list[CachedBlock]) -> Iterator[None]:
        """These blocks of `owner` are a head that another conversation begins with."""
        if owner.kind == "shared" and len(run) == owner.num_known:
            owner.num_uses += 1
            self._begin(owner)
            return
        head = Stretch("shared", owner.num_uses + 1, run[0].position, run[-1].position + 1, self._now)
        for step in steps_of(run):
            for block in step:
                block_hash = BlockHash(block.block_hash)
                if self._owners.get(block_hash) is owner:
                    self._give(block_hash, head)
            if head.num_known:
                self._begin(head)
            if len(step) < len(run):
                yield

    def _begin(self, stretch: Stretch) -> None:
        """A life begins now."""
        stretch.last_wanted = self._now
        stretch.classify()
        self._stretches[stretch] = None
        self._place(stretch)

    def _give(self, block_hash: BlockHash, stretch: Stretch) -> None:
        """To this stretch, from the one that it belonged to."""
        owner = self._owners.get(block_hash)
        if owner is stretch:
            return  # a request that names it twice
        self._owners[block_hash] = stretch
        stretch.num_known += 1
        if block_hash in self._held:
            stretch.hold(block_hash, self._held.position(block_hash))
        if owner is None:
            return
        owner.num_known -= 1
        owner.held.pop(block_hash, None)
        if not owner.held or owner.parked_at == block_hash:
            self._place(owner)
        if not owner.num_known:
            self._stretches.pop(owner, None)

    def _place(self, stretch: Stretch) -> None:
        """Where its age and class belong, if it has blocks to give."""
        if stretch.parked_at is not None:
            del self._parked[stretch.parked_at]
            stretch.parked_at = None
        if stretch.held:
            self._buckets.place(stretch, self._now)
        else:
            self._buckets.take_out(stretch)

    def _forget_ghosts(self) -> None:
        while len(self._ghosts) > self._max_ghosts:
            block_hash, _ = self._ghosts.popitem(last=False)
            owner = self._owners.pop(block_hash)
            owner.num_known -= 1
            if not owner.num_known:
                self._model.ended(owner.class_id, self._now - owner.last_wanted, returned=False)
                del self._stretches[owner]

    def _go_on_fitting(self) -> None:
        """One step of the fit that is under way, if one is: it is done long before the next begins."""
        self._num_until_fit -= 1
        if self._num_until_fit <= 0:
            self._num_until_fit = max(MIN_FIT_INTERVAL, len(self._stretches) // 16)
            self._fitting = self._fit()
        next(self._fitting, None)

    def _fit(self) -> Iterator[None]:
        self._num_fits += 1
        yield from self._model.fit(self._waiting(self._num_fits))
        self._buckets.rank()

    def _waiting(self, fit: int) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """Classes and ages of all stretches, FIT_PORTION at a time, each once. Those that are counted go to the end of the line,
        so that the first that has been counted is the end of it, whoever came or went meanwhile."""
        while portion := self._take_uncounted(fit):
            classes = np.fromiter((stretch.class_id for stretch in portion), np.int64, len(portion))
            last_wanted = np.fromiter((stretch.last_wanted for stretch in portion), np.float64, len(portion))
            yield classes, self._now - last_wanted

    def _take_uncounted(self, fit: int) -> list[Stretch]:
        portion: list[Stretch] = []
        while self._stretches and len(portion) < FIT_PORTION:
            stretch = next(iter(self._stretches))
            if stretch.counted_in == fit:
                break
            stretch.counted_in = fit
            self._stretches.move_to_end(stretch)
            portion.append(stretch)
        return portion
