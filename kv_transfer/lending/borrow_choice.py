"""Whether to borrow: a pure function of measured rates."""

LOAN_OVERHEAD_S = 0.004
"""Beside moving the bytes: asking for the loan, its pin between two steps, the stream that announces it, checksums at both
ends. 1.6 to 3.7 ms over loopback with idle nodes; a busy lender answers later, when its step has ended."""


def worth_borrowing(
    num_tokens: int,
    *,
    transfer_s: float | None,
    compute_tokens_per_s: float | None,
    overhead_s: float = LOAN_OVERHEAD_S,
) -> bool:
    """Whether fetching the KV of so many tokens takes less time than computing it here.

    `transfer_s`: to move their blocks over the link to the lender, by its own measure. A rate that nobody has measured yet
    is no reason against: the first loan costs little, and without one nothing would be learnt of a node that has just
    started.
    """
    if num_tokens <= 0:
        return False
    if transfer_s is None or compute_tokens_per_s is None:
        return True
    return overhead_s + transfer_s < num_tokens / compute_tokens_per_s
