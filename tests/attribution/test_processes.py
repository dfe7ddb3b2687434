"""Pairs shared among processes give the scores of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import circuitvit as cv
from circuitvit.attribution import METHODS
from circuitvit.attribution.scoring import Running
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import OptionError

PAIRS = 5

DRIVER = """
import sys
import torch.distributed as distributed
from safetensors.torch import load_file
import circuitvit as cv
pairs = load_file(sys.argv[1])
task = cv.Task(pairs["clean"], pairs["corrupt"], metric=cv.logit_diff("cat", "dog"), ablation=cv.Mean())
distributed.init_process_group("gloo")
model = cv.load("catdog-tiny")
for method in ("eap", "exact"):
    scores = cv.attribute(model, task, method, batch_size=2, processes=True, progress=False)
    scores.save(f"{sys.argv[2]}/{method}_{distributed.get_rank()}.json")
distributed.destroy_process_group()
"""


def test_two_processes_find_the_scores_of_one(tmp_path: Path) -> None:
    """With a mean ablation, whose mean is over all pairs, and shares of different size."""
    clean, corrupt = catdog_pairs(PAIRS, seed=0)
    save_file({"clean": clean, "corrupt": corrupt}, tmp_path / "pairs.safetensors")
    (tmp_path / "driver.py").write_text(DRIVER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [*launch, str(tmp_path / "driver.py"), str(tmp_path / "pairs.safetensors"), str(tmp_path)]
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    task = cv.Task(clean, corrupt, metric=cv.logit_diff("cat", "dog"), ablation=cv.Mean())
    for method in ("eap", "exact"):
        expected = cv.attribute(cv.load("catdog-tiny"), task, method, progress=False).values
        for number in range(2):
            found = cv.EdgeScores.load(tmp_path / f"{method}_{number}.json").values
            assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("count", [1, 2, 3, PAIRS])
def test_shares_are_all_pairs_in_order(count: int) -> None:
    clean, corrupt = catdog_pairs(PAIRS, seed=0)
    prepared = cv.Task(clean, corrupt, metric=cv.logit_diff("cat", "dog")).prepare(cv.load("catdog-tiny"))
    rows = [
        [int(row) for batch in prepared.share(number, count).batches(2) for row in batch.rows]
        for number in range(count)
    ]
    assert [row for share in rows for row in share] == list(range(PAIRS))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.by_pair])
def test_the_scores_of_the_shares_add_up(method: str) -> None:
    """Also where one share has nothing to explain: its images are equal."""
    clean, corrupt = catdog_pairs(4, seed=0)
    corrupt = torch.cat([clean[:2], corrupt[2:]])
    prepared = cv.Task(clean, corrupt, metric=cv.logit_diff("cat", "dog")).prepare(cv.load("catdog-tiny"))
    score, how = METHODS[method].score, Running(batch_size=2)
    expected = score(prepared, how)
    found = score(prepared.share(0, 2), how) + score(prepared.share(1, 2), how)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_without_a_group_of_processes_there_is_nothing_to_share() -> None:
    task = cv.Task(*catdog_pairs(2, seed=0), metric=cv.logit_diff("cat", "dog"))
    with pytest.raises(OptionError, match="torchrun"):
        cv.attribute(cv.load("catdog-tiny"), task, processes=True, progress=False)


@pytest.mark.parametrize("method", ["hybrid", "auto", "random", "atp-star"])
def test_methods_that_look_at_all_pairs_at_once_are_refused(method: str) -> None:
    task = cv.Task(*catdog_pairs(2, seed=0), metric=cv.logit_diff("cat", "dog"))
    with pytest.raises(OptionError, match="one process only"):
        cv.attribute(cv.load("catdog-tiny"), task, method, processes=True, progress=False)
