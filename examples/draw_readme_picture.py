"""The picture in the README: the circuit by which `catdog-tiny` tells a cat from a dog.

    python examples/draw_readme_picture.py

It writes `docs/images/cat_dog.svg`. The number of runs is fixed, so the search does not depend on how fast
the machine is; another version of torch may round differently and end with a slightly different circuit.
"""

from __future__ import annotations

from pathlib import Path

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "cat_dog.svg"
PLAN = cv.Plan(steps=0, trim_runs=2000, batch_size=8)


def main(path: Path = PICTURE, pairs: int = 64) -> cv.Report:
    """Find the circuit, draw it with the exact effects of its edges, and verify it."""
    model = cv.load("catdog-tiny")
    metric = cv.logit_diff("cat", "dog")
    task = cv.Task(*catdog_pairs(pairs, seed=1), metric=metric)
    held_out = cv.Task(*catdog_pairs(64, seed=2), metric=metric)

    finding = cv.find(model, task, plan=PLAN)
    print(finding.summary)

    circuit = finding.circuit.with_scores(cv.attribute(model, task, "exact"))
    circuit.draw(path, title="How catdog-tiny tells a cat from a dog")
    report = cv.verify(model, task, circuit, held_out=held_out)
    print(report)
    print(f"wrote {path}")
    return report


if __name__ == "__main__":
    main()
