"""The whole way, from a model and image pairs to a circuit, its proof and its diagram.

    python examples/first_circuit.py

It uses the bundled model `catdog-tiny` and pictures that are drawn on the spot, so nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs


def main(out: Path = Path("out/first_circuit")) -> cv.Report:
    """Find, verify, save and draw a circuit; give the report."""
    out.mkdir(parents=True, exist_ok=True)

    # 1. A model is a list of stages that read from and write to one residual stream. Its graph has an edge
    #    from every component that writes to every later one that reads.
    model = cv.load("catdog-tiny")
    print(model)
    print(model.graph)

    # 2. A behaviour: pictures of cats, the same pictures with the features of a dog, and a number that says
    #    how strongly the model prefers "cat". Seed 1 is for finding the circuit, seed 2 for judging it.
    metric = cv.logit_diff("cat", "dog")
    task = cv.Task(*catdog_pairs(16, seed=1), metric=metric)
    held_out = cv.Task(*catdog_pairs(64, seed=2), metric=metric)

    # 3. The exact effect of every edge: how the metric changes when that edge alone hears the dog.
    scores = cv.attribute(model, task, method="exact")
    print("\nThe strongest edges; a negative effect means that the edge supports 'cat':")
    for name, effect in scores.strongest(5):
        print(f"  {name:16} {effect:+.2f}")

    # 4. A circuit: at most 80 edges, grown path by path, so that each leads from the input to the logits.
    circuit = scores.connected(80)
    print(f"\n{circuit}")

    # 5. The proof, on pictures that played no part in finding it.
    report = cv.verify(model, task, circuit, held_out=held_out)
    print(report)
    for warning in report.warnings:
        print(f"caveat: {warning}")

    # 6. To keep: data for programs, a report and a diagram for people.
    circuit.save(out / "circuit.json")
    scores.save(out / "scores.json")
    report.save(out / "report.md")
    circuit.draw(out / "circuit.svg")
    print(f"\nwrote {out}")
    return report


if __name__ == "__main__":
    main()
