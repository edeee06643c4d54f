"""make_policy: a policy by the name that settings give it."""

from collections.abc import Callable
from typing import Literal, get_args

from kv_store.policy.arc import ARCPolicy
from kv_store.policy.density import DensityPolicy
from kv_store.policy.lru import LRUPolicy
from kv_store.policy.policy import EvictionPolicy
from kv_store.policy.s3fifo import S3FIFOPolicy

PolicyName = Literal["lru", "arc", "s3fifo", "density"]

POLICY_NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

_POLICIES: dict[PolicyName, Callable[[int], EvictionPolicy]] = {
    "lru": lambda _: LRUPolicy(),
    "arc": ARCPolicy,
    "s3fifo": S3FIFOPolicy,
    "density": DensityPolicy,
}


def make_policy(name: PolicyName, capacity_blocks: int) -> EvictionPolicy:
    """For one tier of that many blocks, at least 1."""
    return _POLICIES[name](capacity_blocks)
