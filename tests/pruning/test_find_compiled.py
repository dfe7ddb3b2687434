"""`find` on models whose circuit is known: it returns the edges that matter, all of them and no others."""

from __future__ import annotations

import pytest

import circuitvit as cv
from circuitvit.groundtruth import PROGRAMS
from circuitvit.testing import active_edges


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_find_returns_exactly_the_active_edges(name: str, seed: int) -> None:
    found = cv.compiled(name, seed=seed)
    task = cv.Task(*found.pairs(12, seed=seed), metric=cv.logit_diff("yes", "no")).prepare(found.model)
    plan = cv.Plan(steps=30, trim_runs=400, batch_size=12, seed=seed)
    finding = cv.find(found.model, task, plan=plan, progress=False)
    assert finding.circuit == active_edges(found.model, task)
    assert finding.minimal
    assert finding.faithfulness == pytest.approx(1, abs=1e-4)
