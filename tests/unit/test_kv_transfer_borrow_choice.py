"""When it is worth to borrow, how fast prompts are computed, and how long a loan is waited for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.prefill_rate import PrefillRate
from kv_transfer.lending.borrow_choice import LOAN_OVERHEAD_S, worth_borrowing


@pytest.mark.parametrize(
    ("num_tokens", "transfer_s", "tokens_per_s", "worth"),
    [
        (0, 0.0, 1.0, False),
        (16, None, None, True),
        (16, None, 1e6, True),
        (16, 10.0, None, True),
        (1000, 0.010, 1_000.0, True),
        (1000, 0.010, 100_000.0, False),
        (1000, 0.995, 1_000.0, True),
        (1000, 0.997, 1_000.0, False),
    ],
)
def test_the_faster_of_both(num_tokens: int, transfer_s: float | None, tokens_per_s: float | None, worth: bool) -> None:
    assert worth_borrowing(num_tokens, transfer_s=transfer_s, compute_tokens_per_s=tokens_per_s) is worth


@given(st.integers(1, 10**6), st.floats(0, 100), st.floats(1, 1e6))
def test_a_faster_link_or_a_slower_engine_never_speaks_against_it(tokens: int, transfer_s: float, rate: float) -> None:
    if worth_borrowing(tokens, transfer_s=transfer_s, compute_tokens_per_s=rate):
        assert worth_borrowing(tokens, transfer_s=transfer_s / 2, compute_tokens_per_s=rate)
        assert worth_borrowing(tokens, transfer_s=transfer_s, compute_tokens_per_s=rate / 2)
        assert worth_borrowing(2 * tokens, transfer_s=2 * transfer_s, compute_tokens_per_s=rate)
    assert not worth_borrowing(tokens, transfer_s=transfer_s, compute_tokens_per_s=tokens / (LOAN_OVERHEAD_S / 2))


def test_the_rate_is_of_the_last_steps_and_only_of_those_that_compute_prompts() -> None:
    rate = PrefillRate()
    rate.note(0, 1.0)
    assert rate.tokens_per_s is None
    rate.note(100, 0.5)
    assert rate.tokens_per_s == pytest.approx(200)
    rate.note(0, 100.0)
    assert rate.tokens_per_s == pytest.approx(200)
    for _ in range(100):
        rate.note(100, 0.1)
    assert rate.tokens_per_s == pytest.approx(1000, rel=0.01)
