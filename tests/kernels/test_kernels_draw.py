"""C++ draws the tokens that the torch reference draws, whatever the cuts, ties and impossible tokens of a batch's rows."""

import math

import pytest
import torch

from kernels.draw import Cuts, draw, draw_reference

NUM_ROWS = 16


def some(generator: torch.Generator, share: float, values: torch.Tensor, otherwise: float) -> torch.Tensor:
    """`values` in about this share of the rows, `otherwise` in the rest."""
    return torch.where(torch.rand(NUM_ROWS, generator=generator) < share, values, otherwise)


def random_cuts(generator: torch.Generator, most_k: int) -> Cuts:
    uniform = torch.rand(2, NUM_ROWS, generator=generator, dtype=torch.float64)
    top_k = torch.randint(1, most_k, (NUM_ROWS,), generator=generator)
    return Cuts(
        top_k=some(generator, 0.4, top_k, 0),
        top_p=some(generator, 0.5, uniform[0], 1.0),
        min_p=some(generator, 0.3, uniform[1], 0.0),
    )


@pytest.mark.parametrize("vocab_size", [1, 33, 1000, 20_011])
@pytest.mark.parametrize("spread", [0.05, 3.0, 12.0])
@pytest.mark.parametrize("shape", ["distinct", "tied", "a third impossible"])
def test_equals_the_reference(vocab_size: int, spread: float, shape: str) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(NUM_ROWS, vocab_size, generator=generator) * spread
    if shape == "tied":
        logits = logits.round()
    elif shape == "a third impossible":
        logits[:, 1::3] = -torch.inf
    for most_k in (3, 60, 2 * vocab_size + 2):
        temperatures = torch.rand(NUM_ROWS, generator=generator) * 2 + 0.01
        cuts = random_cuts(generator, most_k)
        uniforms = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64)
        expected = draw_reference(logits.clone(), temperatures, cuts, uniforms)
        drawn = draw(logits.clone(), temperatures, cuts, uniforms)
        # An exponential that differs in its last bit moves a boundary between two tokens by as much.
        assert (drawn != expected).sum() <= (1 if vocab_size > 1000 else 0)


def test_rows_of_one_batch_are_not_mixed_up() -> None:
    """Rows that are not cut beside rows whose cut lies beyond their best few tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5000, generator=generator) * 0.05
    cuts = Cuts(
        top_k=torch.zeros(4, dtype=torch.int64),
        top_p=torch.tensor([0.9, 1.0, 0.9, 1.0], dtype=torch.float64),
        min_p=torch.zeros(4, dtype=torch.float64),
    )
    temperatures, uniforms = torch.ones(4), torch.rand(4, generator=generator, dtype=torch.float64)
    for function in (draw, draw_reference):
        together = function(logits.clone(), temperatures, cuts, uniforms).tolist()
        alone = [
            function(logits[[row]].clone(), temperatures[[row]], cuts.take(slice(row, row + 1)), uniforms[[row]]).item()
            for row in range(4)
        ]
        assert together == alone


def test_extreme_uniforms_stay_inside() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 0.5]]).repeat(2, 1)
    cuts = Cuts(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.float64), torch.zeros(2).double())
    uniforms = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, torch.ones(2), cuts, uniforms).tolist() == [0, 3]


@pytest.mark.parametrize("num_tied", [20, 200])
def test_ties_of_the_last_token_that_top_k_keeps_count_for_top_p(num_tied: int) -> None:
    """One likely token, then more of equal weight than top_k has places for: all are kept, and top-p is a share of all."""
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 7] = 0.0
    logits[0, 50 : 50 + num_tied] = -3.0
    mass = 1.0 + num_tied * math.exp(-3.0)
    cuts = Cuts(
        torch.tensor([5]), torch.tensor([1.01 / mass], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    )
    uniforms = torch.tensor([0.999999], dtype=torch.float64)
    for function in (draw, draw_reference):  # the likely token alone is a little less than that share
        assert function(logits.clone(), torch.ones(1), cuts, uniforms).item() == 50 + num_tied - 1


def test_a_row_without_a_possible_token_draws_token_0_and_disturbs_nobody() -> None:
    logits = torch.tensor([[-torch.inf] * 3, [0.0, -torch.inf, -torch.inf]])
    cuts = Cuts(
        torch.tensor([2, 0]), torch.tensor([0.9, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    )
    for function in (draw, draw_reference):
        assert function(logits.clone(), torch.ones(2), cuts, torch.full((2,), 0.5).double()).tolist() == [0, 0]


def test_dtypes_are_checked() -> None:
    cuts = Cuts(torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64), torch.zeros(1).double())
    with pytest.raises(ValueError, match="float64"):
        draw(torch.zeros(1, 3), torch.ones(1), cuts, torch.zeros(1))
    with pytest.raises(ValueError, match="int64"):
        Cuts(torch.zeros(1), torch.ones(1), torch.zeros(1))
