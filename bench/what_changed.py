"""Does `diff` give the right verdict? Twenty changes of three kinds, each on freshly drawn pairs.

Asked: 20 of 20 of each kind. What is right is known: trained a little further on fresh scenes, `catdog-tiny`
does what it did (checked on 200 other pairs); with its heads in another order, those of the circuit where it
has none, it does exactly the same by other edges; trained from another seed it tells cats from dogs by a
circuit of its own. `--reseeded` takes models that `circuitvit train` wrote; without, two are trained (half an
hour).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.models.zoo import load_zoo_module
from circuitvit.training import train
from circuitvit.training.data import catdog_data
from circuitvit.training.loop import Recipe, fit

DRAWS = 20
PAIRS = 24
CHECKED = 200
STEPS, RATE, BATCH = 10, 1e-4, 64
SEEDS = (11, 12)
METRIC = cv.logit_diff("cat", "dog")
PLAN = cv.Plan(steps=20, trim_runs=1000, batch_size=16)

Made = Callable[[int], cv.Model]


def wrapped(module: nn.Module, like: cv.Model, name: str) -> cv.Model:
    """A changed copy as a model."""
    return cv.wrap(module, name=name, classes=like.classes, preprocessing=like.preprocessing)


def tuned(like: cv.Model, seed: int, steps: int = STEPS, rate: float = RATE) -> cv.Model:
    """The bundled model, trained a few steps further on fresh scenes."""
    module, data = load_zoo_module("catdog-tiny"), catdog_data(1000 + seed, held_out=1)

    def objective(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = data.batch(step, BATCH)
        return F.cross_entropy(module(batch.images), batch.targets), torch.zeros(())

    fit(module, objective, Recipe(steps=steps, learning_rate=rate, seed=seed, weight_decay=0.0), "", False)
    return wrapped(module, like, f"tuned {seed}")


def reordered(like: cv.Model, seed: int, circuit: cv.Circuit | None = None) -> cv.Model:
    """The same function, with the heads of every block in another order.

    No head stays where it was, and none of the circuit comes to stand where another of the circuit was, as
    far as there is room: were two of them to change places, the circuit might be the same one.
    """
    module = copy.deepcopy(load_zoo_module("catdog-tiny"))
    generator = np.random.default_rng(seed)
    with torch.no_grad():
        for layer, block in enumerate(module.blocks):  # type: ignore[arg-type]
            heads = block.attn.num_heads
            own = {n for n in range(heads) if circuit is not None and f"a{layer}.h{n}" in circuit.nodes}
            rolls = [by for by in range(1, heads) if not own & {(n + by) % heads for n in own}]
            order = np.roll(np.arange(heads), generator.choice(rolls or range(1, heads)))
            for tensor in (block.attn.qkv.weight, block.attn.qkv.bias):
                tensor.copy_(tensor.unflatten(0, (3, heads, -1))[:, order].flatten(0, 2))
            weight = block.attn.proj.weight
            weight.copy_(weight.unflatten(1, (heads, -1))[:, order].flatten(1, 2))
    return wrapped(module, like, f"reordered {seed}")


def truly_unchanged(old: cv.Model, new: cv.Model, circuit: cv.Circuit) -> bool:
    """Whether behaviour and faithfulness are within the tolerance on many other pairs."""
    task = cv.Task(*catdog_pairs(CHECKED, seed=10**6), metric=METRIC)
    found = cv.diff(old, new, task, circuit, edges=0, progress=False)
    assert found.behaviour is not None
    assert found.faithfulness_change is not None
    return abs(found.behaviour.value - 1) < 0.1 and abs(found.faithfulness_change.value) < 0.1


def row(
    what: str, expected: str, old: cv.Model, circuit: cv.Circuit, make: Made, edges: int | None = None
) -> bool:
    """Twenty changes of one kind; whether all got their verdict."""
    begin, told = time.process_time(), Counter[str]()
    for seed in range(DRAWS):
        task = cv.Task(*catdog_pairs(PAIRS, seed=5000 + seed), metric=METRIC)
        told[cv.diff(old, make(seed), task, circuit, edges=edges, progress=False).verdict] += 1
    verdicts = ", ".join(f"{verdict} {count}" for verdict, count in told.most_common())
    print(f"{what:28} {expected:10} {verdicts:40} {time.process_time() - begin:6.0f} s", flush=True)
    return told[expected] == DRAWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reseeded", type=Path, nargs="+", help="models of circuitvit train")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    old = cv.load("catdog-tiny")
    task = cv.Task(*catdog_pairs(96, seed=1), metric=METRIC)
    circuit = cv.find(old, task, plan=PLAN, faithfulness=0.95, progress=False).circuit
    print(f"stored circuit: {len(circuit)} of {old.graph.n_edges} edges; {PAIRS} pairs each\n")
    made = [tuned(old, seed) for seed in range(DRAWS)]
    held = sum(truly_unchanged(old, each, circuit) for each in made)
    print(f"truly unchanged by tuning: {held} of {DRAWS}, on {CHECKED} pairs each")
    right = [
        row("trained a little further", "unchanged", old, circuit, lambda seed: made[seed]),
        row(
            "heads in another order",
            "rerouted",
            old,
            circuit,
            lambda seed: reordered(old, seed, circuit),
            edges=0,
        ),
    ]
    others = (
        [cv.load(str(path)) for path in asked.reseeded]
        if asked.reseeded
        else [wrapped(train(catdog_data(seed), seed=seed).model, old, "") for seed in SEEDS]
    )
    another: Made = lambda seed: others[seed % len(others)]  # noqa: E731
    right.append(row("trained from another seed", "rerouted", old, circuit, another, edges=0))
    if not all(right):
        raise SystemExit("a verdict was wrong")


if __name__ == "__main__":
    main()
