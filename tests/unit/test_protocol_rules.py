"""Rules of the protocol that are not about bytes: layouts, block hashes, sampling ranges, frames, limits, the error tree."""

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import errors
from protocol.block_hash import HASH_BYTES, context_hash, hash_blocks, root_hash
from protocol.errors import InvalidParameter, LayoutMismatch, MalformedMessage, MessageTooLarge, WireVersionMismatch
from protocol.ids import BlockHash
from protocol.kv_layout import KVLayout
from protocol.requests import PrefillRequest
from protocol.sampling import SamplingParams
from protocol.tokens import TokenFrame
from protocol.wire import MAX_MESSAGE_BYTES, WIRE_VERSION, FrameReader, check_wire_version, decode, encode, encode_frame

LAYOUT = KVLayout(
    model="m", revision="r", dtype="float32", num_layers=2, num_kv_heads=3, head_dim=8, block_size=16, rope="default"
)
ROOT = root_hash(LAYOUT.identity)


def changed(**fields: object) -> KVLayout:
    return KVLayout(**{name: getattr(LAYOUT, name) for name in LAYOUT.__struct_fields__} | fields)  # type: ignore[arg-type]


def test_layout_arithmetic() -> None:
    assert LAYOUT.block_bytes == 2 * 2 * 3 * 16 * 8 * 4
    assert [LAYOUT.num_blocks_for(n) for n in (1, 16, 17)] == [1, 1, 2]


@pytest.mark.parametrize(
    "field",
    [
        {"model": "n"},
        {"dtype": "bfloat16"},
        {"block_size": 32},
        {"rope": "llama3"},
        {"tp_size": 2},
        {"head_dim": 4},
        {"page_format": "bf16-tiled"},
    ],
)
def test_every_difference_changes_the_fingerprint_and_is_named(field: dict[str, object]) -> None:
    other = changed(**field)
    assert other.fingerprint != LAYOUT.fingerprint
    with pytest.raises(LayoutMismatch, match=next(iter(field))):
        LAYOUT.check_compatible(other, "p0")


def test_fingerprint_does_not_depend_on_the_process() -> None:
    code = (
        "from protocol.kv_layout import KVLayout;"
        "print(KVLayout(model='m', revision='r', dtype='float32', num_layers=2, num_kv_heads=3, head_dim=8,"
        " block_size=16, rope='default').fingerprint)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == LAYOUT.fingerprint


def test_identity_ignores_how_a_worker_holds_its_share() -> None:
    assert changed(tp_size=2, tp_rank=1).identity == LAYOUT.identity
    assert changed(dtype="bfloat16").identity != LAYOUT.identity
    assert changed(page_format="bf16-tiled").identity != LAYOUT.identity


tokens = st.lists(st.integers(0, 2**31 - 1), max_size=100)


@given(tokens, st.sampled_from([1, 4, 16]))
def test_only_full_blocks_have_an_address(token_ids: list[int], block_size: int) -> None:
    hashes = hash_blocks(token_ids, block_size, ROOT)
    assert len(hashes) == len(token_ids) // block_size
    assert all(len(h) == HASH_BYTES for h in hashes)


@given(tokens, tokens)
def test_addresses_agree_exactly_as_far_as_the_prompts_do(left: list[int], right: list[int]) -> None:
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    pairs = zip(hash_blocks(left, 4, ROOT), hash_blocks(right, 4, ROOT), strict=False)
    assert sum(a == b for a, b in pairs) == common // 4


@given(tokens, st.integers(0, 100))
def test_hashing_may_be_continued_from_any_block(token_ids: list[int], cut: int) -> None:
    whole = hash_blocks(token_ids, 4, ROOT)
    cut = min(cut, len(whole))
    parent = whole[cut - 1] if cut else ROOT
    assert hash_blocks(token_ids[cut * 4 :], 4, BlockHash(parent)) == whole[cut:]


def test_a_context_hash_is_of_these_tokens_under_this_layout_and_salt_only() -> None:
    def of(token_ids: list[int], salt: str | None = None, identity: str = LAYOUT.identity) -> bytes:
        return context_hash(identity, salt, token_ids)

    others = [of([1, 2]), of([1, 2, 4]), of([1, 2, 3, 0]), of([2, 1, 3]), of([])]
    others += [of([1, 2, 3], "a"), of([1, 2, 3], ""), of([1, 2, 3], identity="another")]
    assert len({of([1, 2, 3]), *others}) == 1 + len(others)
    assert of([1, 2, 3]) == context_hash(LAYOUT.identity, None, (1, 2, 3))
    assert len(of([])) == HASH_BYTES


def test_salts_separate_tenants() -> None:
    assert len({root_hash(LAYOUT.identity, salt) for salt in (None, "", "a", "b")}) == 4


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", -1.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", float("-inf")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 1e9),
        ("min_tokens", 11),
        ("stop_token_ids", (100,)),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_sampling_out_of_range_names_the_parameter(param: str, value: object) -> None:
    params = SamplingParams(max_tokens=10, seed=0, **{param: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidParameter) as caught:
        params.validate(vocab_size=100)
    assert caught.value.param == param


@given(st.lists(st.integers(0, 50), max_size=8), st.randoms(use_true_random=False))
def test_frames_survive_any_cut(sizes: list[int], rng: random.Random) -> None:
    bodies = [encode("x" * size) for size in sizes]
    stream = b"".join(encode_frame("x" * size) for size in sizes)
    reader, received = FrameReader(), []
    while stream:
        cut = rng.randint(1, len(stream))
        received += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert received == bodies


def test_an_over_long_frame_is_refused_at_its_header() -> None:
    with pytest.raises(MessageTooLarge):
        FrameReader(max_frame_bytes=100).feed((101).to_bytes(4, "little"))


def test_limits_and_versions() -> None:
    with pytest.raises(MessageTooLarge):
        decode(b"\x00" * (MAX_MESSAGE_BYTES + 1), TokenFrame)
    with pytest.raises(WireVersionMismatch, match=f"this process speaks {WIRE_VERSION}"):
        check_wire_version(WIRE_VERSION + 1, "p0")
    with pytest.raises(MalformedMessage):
        decode(b"\x91" * 100_000, TokenFrame)


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 200, "new\nline", "é"])
def test_odd_ids_are_refused(request_id: str) -> None:
    sampling = SamplingParams(max_tokens=1, seed=0)
    message = PrefillRequest(
        request_id=request_id, trace_id="t", router_id="r", prompt_token_ids=(1,), sampling=sampling, deadline_s=1.0
    )
    with pytest.raises(MalformedMessage, match="request_id"):
        decode(encode(message), PrefillRequest)


def test_the_drawn_error_tree_is_the_real_one() -> None:
    def names(root: type[BaseException]) -> set[str]:
        own = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]  # others may refine it
        return {root.__name__}.union(*(names(child) for child in own))

    drawn = {word for line in (errors.__doc__ or "").splitlines() for word in line.split() if word in vars(errors)}
    assert names(errors.HeadraceError) <= drawn
