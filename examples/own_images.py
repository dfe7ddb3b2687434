"""Your own images: two folders of files, matched by name, or a table of pairs.

    python examples/own_images.py

The files here are drawn first, to have some; put your own in their place. What matters is how a task is made
from files: they are read, resized, cropped and normalised as the model's own preprocessing says.
"""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image
from torch import Tensor

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs


def main(out: Path = Path("out/own_images")) -> cv.Report:
    """Draw files, find a circuit from them, verify it on others; give the report."""
    draw_files(out / "find", pairs=16, seed=1)
    draw_files(out / "judge", pairs=32, seed=2)
    model = cv.load("catdog-tiny")

    # Two folders: cats/03.png is paired with dogs/03.png. Without named classes the metric compares what the
    # model sees in each clean image with what it sees in its counterfactual.
    task = cv.Task(out / "find" / "cats", out / "find" / "dogs")
    circuit = cv.attribute(model, task, "exact").connected(80)

    # Or a table, with a target and a foil of its own for each pair; paths are relative to the table.
    held_out = cv.Task.from_csv(out / "judge" / "pairs.csv")

    report = cv.verify(model, task, circuit, held_out=held_out)
    print(report)
    weakest = min(report.headline.pairs, key=lambda pair: pair.circuit - pair.nothing)
    gives = f"it gives {weakest.circuit:.1f}, the model {weakest.whole:.1f}"
    print(f"The circuit does least on {weakest.clean}: {gives}")
    return report


def draw_files(folder: Path, pairs: int, seed: int) -> None:
    """Write cats/00.png ..., dogs/00.png ... and pairs.csv."""
    drawn = catdog_pairs(pairs, seed=seed, preprocessed=False)  # pixels from 0 to 1, to look at
    for name, pictures in (("cats", drawn.clean), ("dogs", drawn.corrupt)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            as_image(picture).save(folder / name / f"{number:02}.png")
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["clean", "corrupt", "target", "foil"])
        for number in range(pairs):
            table.writerow([f"cats/{number:02}.png", f"dogs/{number:02}.png", "cat", "dog"])


def as_image(picture: Tensor) -> Image.Image:
    """A picture `(channel, height, width)` from 0 to 1 as 8-bit RGB."""
    return Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())


if __name__ == "__main__":
    main()
