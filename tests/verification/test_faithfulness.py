"""Faithfulness as a ratio of means, and the refusal to divide by nothing."""

from __future__ import annotations

import numpy as np
import pytest

from circuitvit.engine import check_effect
from circuitvit.errors import DataError
from circuitvit.verification import faithfulness


def test_by_hand() -> None:
    whole, nothing, kept = [10.0, 2.0], [0.0, 1.0], [5.0, 1.5]
    assert faithfulness(kept, whole, nothing) == pytest.approx(5.5 / 11)  # each pair's own: 0.5 and 0.5
    assert faithfulness([10.0, 1.0], whole, nothing) == pytest.approx(10 / 11)  # 1 and 0, mean 0.5


def test_the_ends_are_0_and_1_and_nothing_is_clipped() -> None:
    whole, nothing = np.array([4.0, 6.0]), np.array([-1.0, -3.0])
    many = np.stack([nothing, whole, whole + 7.0, nothing - 7.0])
    assert faithfulness(many, whole, nothing).tolist() == pytest.approx([0.0, 1.0, 2.0, -1.0])


def test_a_metric_that_falls_with_the_behaviour_works_too() -> None:
    assert faithfulness([1.0, 1.0], [0.0, 0.0], [4.0, 4.0]) == pytest.approx(0.75)  # such as a divergence


@pytest.mark.parametrize(
    ("whole", "nothing"),
    [
        ([3.0], [3.0]),
        ([3.0], [3.0 + 1e-6]),
        ([0.0], [0.0]),
        ([1e-12, 2e-12], [0.0, 0.0]),
        ([4.0, -5.0], [0.0, 0.0]),
        ([1.0, 1.0, 1.0, -0.1], [0.0, 0.0, 0.0, 0.0]),
        ([1.0, -2.0, 3.0, -1.0, 2.0, -2.5], [0.0] * 6),
    ],
)
def test_a_metric_that_need_not_differ_is_refused(whole: list[float], nothing: list[float]) -> None:
    with pytest.raises(DataError, match="nothing for a circuit to explain"):
        faithfulness(whole, whole, nothing, label="logit")


@pytest.mark.parametrize(
    "whole", [[1e-3], [-2.0], [15.0, 19.0], [15.0, 1.0, 0.2], [3.0, 4.0, 5.0, 6.0, 7.0, -1.0], [-1.0] * 5]
)
def test_a_metric_that_differs_is_accepted(whole: list[float]) -> None:
    check_effect(whole, [0.0] * len(whole))


def test_the_refusal_names_metric_means_and_pairs() -> None:
    with pytest.raises(DataError) as refused:
        check_effect([9.0, -8.0], [0.0, 0.5], label="logit(tabby)", names=["a.png", "b.png"])
    for part in ("logit(tabby)", "0.5 with", "0.25 without", "2 pairs", "b.png (-8.5)", "Choose pairs"):
        assert part in str(refused.value)
