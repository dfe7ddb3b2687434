"""Reading against looking: `clip-tiny` has a circuit that reads signs and another that looks at animals.

    python examples/reading_and_looking.py

A wrong word on a sign turns two thirds of what `clip-tiny` says of animals. Which edges read the word, which
look at the animal, and where do the two meet? Both behaviours have exact counterfactuals: the same scene with
another word, and the same scene with another animal. Each circuit is found on some scenes and put to the test
on others, as two claims: alone it carries its own behaviour, and without it the other one suffers less.
"""

from __future__ import annotations

from pathlib import Path

import circuitvit as cv
from circuitvit.datasets import signs

PROMPTS = [f"a photo of a {animal}" for animal in signs.ANIMALS]


def main(folder: str | Path = "out/reading", found_on: int = 24, held_out: int = 200) -> cv.Specificity:
    """Find both circuits, test them on held-out scenes and against each other, and draw them."""
    model = cv.load("clip-tiny").with_prompts(PROMPTS)
    kinds = {"reading": signs.word_pairs, "looking": signs.animal_pairs}
    metric = cv.logit_diff("a photo of a cat", "a photo of a dog")
    circuits, tests = {}, {}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in kinds.items():
        task = cv.Task(*pairs(found_on, seed=1), metric=metric)
        tests[name] = cv.Task(*pairs(held_out, seed=2), metric=metric)
        circuits[name] = cv.find(model, task, within="30s", progress=False).circuit
        report = cv.verify(model, task, circuits[name], held_out=tests[name], progress=False)
        print(f"{name}: {report}\n")
        scored = circuits[name].with_scores(cv.attribute(model, task, "exact", progress=False))
        scored.draw(folder / f"{name}.svg", model=model, task=task, thumbnails=True)

    both = circuits["reading"] & circuits["looking"]
    meeting = ", ".join(sorted(both)) or "nowhere"
    print(f"they share {len(both)} edges: {meeting}\n")

    print(f"drawn in {folder}: {', '.join(f'{name}.svg' for name in kinds)}\n")
    whole = cv.specificity(model, tests, circuits, progress=False)
    print(whole, "\n")
    alone = {name: circuit - both for name, circuit in circuits.items()}
    print("Of the edges that only one of them has:")
    print(cv.specificity(model, tests, alone, progress=False))
    return whole


if __name__ == "__main__":
    main()
