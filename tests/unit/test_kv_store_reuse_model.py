"""What room is worth: the index by hand, and what the model makes of returns that it is shown."""

import numpy as np
import pytest
from numpy.typing import NDArray

from kv_store.policy.reuse_model import NUM_AGES, Floats, ReuseModel, gittins_index


def fit(model: ReuseModel, *waiting: tuple[NDArray[np.int64], Floats]) -> None:
    for _ in model.fit(waiting):
        pass


def test_a_constant_hazard_is_its_own_index() -> None:
    widths = np.array([1.0, 2.0, 4.0])
    assert gittins_index(np.full((1, 3), 0.25), widths) == pytest.approx(np.full((1, 3), 0.25))


def test_the_index_waits_for_what_is_to_come_and_not_for_what_is_over() -> None:
    # Nothing for a second, then for a second at rate 1, then nothing for long.
    hazard, widths = np.array([[1e-9, 1.0, 1e-9]]), np.array([1.0, 1.0, 100.0])
    back = 1 - np.exp(-1)
    assert gittins_index(hazard, widths)[0] == pytest.approx([back / (1 + back), 1.0, 1e-9], abs=1e-6)


def test_it_learns_when_what_comes_back_does() -> None:
    model = ReuseModel([[0], [1]])
    for _ in range(500):
        model.ended(0, 60.0, returned=True)
        model.ended(1, 60.0, returned=False)
    fit(model)
    ages = [model.bin_of(age) for age in (1.0, 58.0, 300.0)]
    fresh, due, overdue = model.index[0, ages]
    assert due > fresh > model.index[1, ages[0]]
    assert due > overdue


def test_what_still_waits_counts_as_not_come_back() -> None:
    model = ReuseModel([[0]])
    for _ in range(50):
        model.ended(0, 30.0, returned=True)
    fit(model)
    before = model.index[0].copy()
    fit(model, *[(np.zeros(500, np.int64), np.full(500, 200.0))] * 10)
    assert (model.index[0, : model.bin_of(200.0)] < before[: model.bin_of(200.0)]).all()


def test_a_fit_that_is_under_way_changes_nothing() -> None:
    model = ReuseModel([[0]])
    before = model.index.copy()
    for _ in range(50):
        model.ended(0, 30.0, returned=True)
    steps = list(zip(model.fit(()), iter(lambda: (model.index == before).all(), None), strict=False))
    assert len(steps) > 1
    assert all(unchanged for _, unchanged in steps)
    assert (model.index != before).any()


def test_nothing_known_ranks_as_lru_does() -> None:
    index = ReuseModel([[0]]).index[0]
    assert index.shape == (NUM_AGES,)
    assert (np.diff(index) < 0).all()


def test_one_loud_class_does_not_speak_for_its_family() -> None:
    model = ReuseModel([[0, 1, 2]])
    for _ in range(20_000):
        model.ended(0, 0.5, returned=True)
    for _ in range(300):
        model.ended(1, 90.0, returned=True)
    fit(model)
    assert model.index[2, model.bin_of(80.0)] > model.index[2, model.bin_of(300.0)]
